"""Finds trained networks and imported predictions, checks them and writes the catalog."""
