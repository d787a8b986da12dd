"""Pictures of class-activation maps: the image in grey with the map in colour over it."""

from __future__ import annotations

import numpy as np

from utils.activation_maps.map_maker import ImageMap

MOST_OPAQUE = 0.65  # opacity of the colour at the maximum of the map
COLOURS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=np.float32)
"""Five colours of increasing lightness, distinguishable with any colour vision."""


def overlay(image_map: ImageMap) -> np.ndarray:
    """The image in grey under the coloured map, uint8 (S, S, 3); larger values are lighter and more opaque."""
    strength = image_map.mass / max(float(image_map.mass.max()), np.finfo(np.float32).tiny)
    position = strength * (len(COLOURS) - 1)
    lower = np.minimum(position.astype(int), len(COLOURS) - 2)
    share = (position - lower)[..., None]
    colour = COLOURS[lower] * (1 - share) + COLOURS[lower + 1] * share
    opacity = MOST_OPAQUE * strength[..., None]
    grey = np.repeat(image_map.pixels.astype(np.float32).mean(axis=2, keepdims=True), 3, axis=2)
    return np.rint(grey * (1 - opacity) + colour * opacity).astype(np.uint8)
