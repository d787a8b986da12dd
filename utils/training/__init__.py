"""Training loops of image networks, one or several at a time."""
