"""Scores on labelled images from outside the workspace: `evaluate --data`.

An external set is one more split of the prediction store, `external-<name>`: each network runs over it once, and its
outputs are kept by content, so that a second ensemble needs no further pass. Scores are made by the code that scores
the test split, so that the set of the test images itself gives the same record. Nothing here is read by anything that
fits, selects or recommends.
"""
