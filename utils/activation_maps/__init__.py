"""Class-activation maps of a model for image files: the image regions on which its logits depend.

`map_maker` averages the maps of a model's networks, `overlays` draws them, and `background` decides when a model
depends on the background. `predict --maps` and `evaluate --maps` show them.
"""
