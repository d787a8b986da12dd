"""Self-check of the base pipeline."""
