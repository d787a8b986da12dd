"""Distils an ensemble into a single student network."""
