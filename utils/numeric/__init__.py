"""Mathematics on NumPy arrays: metrics, statistics, calibration, pools and searches; opens no file.

`candidate_losses` scores a pool with each member added, all members at once: in float64 near the lowest loss, to 1e-6
elsewhere. Losses within 1e-12 count as equal, so that the order of rows does not matter; the first member by name wins
a tie. `nested_cv.cross_validate` computes every fit of a nested search once: a fit without folds k and j serves the
copies of both, and a fit without k predicts k and helps to select the setting of the final fit, so five folds take
15 fits and not 30, and 10 with many rows.
"""
