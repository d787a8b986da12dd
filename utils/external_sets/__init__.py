"""Scores on labelled images from outside the workspace: `evaluate --data`.

An external set is an additional split of the prediction store, `external-<name>`: each network runs on it once, and its
outputs are stored by content, so that a second ensemble needs no further pass. The code that scores the test split
computes the scores, so that an external set of the test images gives the same record. Nothing here affects fits,
selection or recommendations.
"""
