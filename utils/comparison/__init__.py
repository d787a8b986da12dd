"""Compares the same methods over several workspaces: data sets, seeds or splits (the command `compare`).

`workspace_scores` reads the records that `evaluate` left in each workspace, `comparison` ranks and tests the methods,
`comparison_tables` and `critical_difference` write the result. Nothing is computed from predictions, and no workspace
changes.
"""
