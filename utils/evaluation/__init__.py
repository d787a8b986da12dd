"""Scores, ranks and reports members and ensembles."""
