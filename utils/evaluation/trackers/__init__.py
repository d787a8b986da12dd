"""Logging of an evaluation to experiment trackers on request: MLflow and TensorBoard."""
