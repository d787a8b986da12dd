"""Mathematics on NumPy arrays: metrics, statistics, calibration, pools and searches; opens no file."""
