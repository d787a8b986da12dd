"""Experiment trackers, MLflow and TensorBoard, to which an evaluation is handed on request."""
