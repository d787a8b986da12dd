"""Compares the same methods over several workspaces: data sets, seeds or splits (the command `compare`).

`workspace_scores` reads the records of `evaluate` in each workspace, `comparison` ranks and tests the methods, and
`comparison_tables` and `critical_difference` write the result. Predictions are not read, and workspaces are not
changed.
"""
