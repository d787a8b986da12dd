"""Combiners of the members' outputs: `fit`, `predict_proba`, `to_module`, `state`."""
