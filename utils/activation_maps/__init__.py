"""Class-activation maps of a model for image files: where its networks look for a class.

`map_maker` averages the maps of a model's networks, `overlays` draws them, and `background` says when a model looks at
the background. `predict --maps` and `evaluate --maps` show them.
"""
