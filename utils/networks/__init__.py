"""One trained network: build it, load its weights, average it, join it with others into one module."""
