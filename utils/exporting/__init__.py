"""Writes an ensemble as deployment files, each checked for parity in its own runtime."""
