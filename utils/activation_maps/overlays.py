"""Pictures of class-activation maps: the image in grey with the map in colour over it."""

from __future__ import annotations

import numpy as np

from utils.activation_maps.map_maker import ImageMap

MOST_OPAQUE = 0.65  # of the colour, where the map is largest
COLOURS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=np.float32)
"""Five colours of increasing lightness, which readers with any colour vision tell apart."""


def overlay(found: ImageMap) -> np.ndarray:
    """uint8 (S, S, 3): the larger the map, the lighter and the less transparent its colour."""
    strength = found.mass / max(float(found.mass.max()), np.finfo(np.float32).tiny)
    place = strength * (len(COLOURS) - 1)
    lower = np.minimum(place.astype(int), len(COLOURS) - 2)
    share = (place - lower)[..., None]
    colour = COLOURS[lower] * (1 - share) + COLOURS[lower + 1] * share
    opacity = MOST_OPAQUE * strength[..., None]
    grey = np.repeat(found.pixels.astype(np.float32).mean(axis=2, keepdims=True), 3, axis=2)
    return np.rint(grey * (1 - opacity) + colour * opacity).astype(np.uint8)
