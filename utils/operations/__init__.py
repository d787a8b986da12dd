"""Status, clean-up and debug runs of a workspace."""
