"""The base pipeline's check of itself."""
