"""The members of a workspace and their stored predictions, row by row."""
