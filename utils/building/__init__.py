"""Builders: each fits ensembles of one family and saves them with provenance and baselines."""
