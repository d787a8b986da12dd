"""Mathematics on NumPy arrays: metrics, statistics, calibration, pools and searches; opens no file.

`candidate_losses` scores a pool with each member added, all members at once: exact in float64 where it decides, to
1e-6 elsewhere. Losses within 1e-12 are equal, so that the order of rows does not matter; of equals the first member
by name wins. `nested_cv.cross_validate` makes every fit of a nested search once: a fit without folds k and j serves
the copies of both, and a fit without k answers k and helps to choose the setting of the final fit, so five folds take
15 fits and not 30.
"""
