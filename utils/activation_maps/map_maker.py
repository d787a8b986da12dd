"""Class-activation maps of a member or an ensemble for image files, averaged over its networks.

All maps are resampled to the frame of one member: the input square of its network.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils import base_back
from utils.building import ensembles
from utils.networks.memory import safe_delete_model
from utils.networks.preprocessing import Preprocessing
from utils.predictions import image_splits, streaming
from utils.predictions.catalog import IMPORTED, Member
from utils.predictions.image_splits import ImageSplit
from utils.predictions.rows import UNKNOWN
from utils.predictions.store import Store

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("disease_pipeline")

CENTRAL_SIDE = 0.5**0.5
"""Side of the central region, as a fraction of the frame's: the square with half of the area."""


@dataclass(frozen=True)
class ImageMap:
    """The map of one image for one class."""

    pixels: np.ndarray
    """uint8 (S, S, 3), the input square of the frame's network"""
    mass: np.ndarray
    """float32 (S, S), nonnegative; sums to 1"""

    @cached_property
    def outside_centre(self) -> float:
        """Fraction of the mass outside the central square that has half of the area; 0.5 for a uniform map."""
        side = len(self.mass)
        margin = round((1 - CENTRAL_SIDE) / 2 * side)
        return float(1 - self.mass[margin : side - margin, margin : side - margin].sum())


class MapMaker:
    """Maps of the networks of a model.

    Members of an ensemble are weighted by the weights in its record, or else equally. For a member with views or fold
    networks, the map is that of the full network on the image itself.
    """

    def __init__(self, store: Store, name: str, members: Sequence[Member]) -> None:
        """Raises NoMapError if all members have imported predictions."""
        from utils.networks.class_maps import NoMapError

        self.store = store
        self.refused = {
            member.name: "imported predictions, without a network" for member in members if member.source == IMPORTED
        }
        """{member: reason why it has no map}"""
        weights = _weights(store, name, [member.name for member in members])
        self.counted = [
            (member, weight)
            for member, weight in zip(members, weights, strict=True)
            if weight > 0 and member.name not in self.refused
        ]
        if not self.counted:
            raise NoMapError(name, "no member that counts has a network, so it has no class-activation map")
        frames = (member.image_preprocessing for member, _ in self.counted)
        self.frame = max(frames, key=lambda preprocessing: preprocessing.input_size)
        self.device = streaming.resolve_device(store.config.device)
        self.threads = image_splits.decoding_threads(store.config.dataset.num_workers)

    def maps(self, paths: Sequence[Path], contents: Sequence[str], targets: np.ndarray) -> list[ImageMap]:
        """The maps of readable images with content digests `contents` for the classes `targets` (N,).

        One network is in memory at a time. Raises NoMapError if no network of the model has a map; a warning names
        networks without maps.
        """
        from utils.networks.class_maps import NoMapError

        images = ImageSplit(
            split="maps",
            classes=self.store.catalog.classes,
            sample_ids=tuple(map(str, paths)),
            labels=np.full(len(paths), UNKNOWN),
            paths=tuple(paths),
            contents=tuple(contents),
            digest="",
        )
        total = np.zeros((len(paths), self.frame.input_size, self.frame.input_size), dtype=np.float32)
        refused: list[NoMapError] = []
        with tempfile.TemporaryDirectory(prefix="maps-") as folder:
            for member, weight in self.counted:
                columns = np.array([member.classes.index(name) for name in self.store.catalog.classes])
                preprocessing = member.image_preprocessing
                try:
                    for start, block in self._of_member(member, images, columns[targets], Path(folder)):
                        for row, of_member in enumerate(block, start):
                            total[row] += weight * _in_frame(of_member, preprocessing, self.frame, paths[row])
                except NoMapError as error:
                    refused.append(error)
                    if member.name not in self.refused:
                        self.refused[member.name] = error.reason
                        logger.warning("%s", error)
            if len(refused) == len(self.counted):
                raise refused[0]
            opened = image_splits.open_images(images, self.frame, image_cache=Path(folder), threads=self.threads)
            pixels = opened.crops(range(len(paths)))
        sums = np.maximum(total.sum(axis=(1, 2), keepdims=True), np.finfo(np.float32).tiny)
        return [ImageMap(np.asarray(image), mass) for image, mass in zip(pixels, total / sums, strict=True)]

    def _of_member(
        self, member: Member, images: ImageSplit, outputs: np.ndarray, cache: Path
    ) -> Iterator[tuple[int, Tensor]]:
        """(first row, maps (B, h, w)) of one member, batch by batch."""
        import torch

        from utils.networks.class_maps import ClassMaps

        spec = replace(member.network(self.store.workspace), views=())
        network = streaming.open_network(spec).to(self.device)
        try:
            mapper = ClassMaps(network, member.name)
            opened = image_splits.open_images(images, spec.preprocessing, image_cache=cache, threads=self.threads)
            size = self.store.config.dataset.batch_size
            for start in range(0, len(images.paths), size):
                rows = range(start, min(start + size, len(images.paths)))
                batch = image_splits.normalise(torch.from_numpy(opened.crops(rows)), spec.preprocessing).to(self.device)
                if start == 0:
                    mapper.probe(batch[:2])
                yield start, mapper(batch, torch.from_numpy(outputs[start : rows.stop]).to(self.device)).cpu()
        finally:
            safe_delete_model(network)


def _weights(store: Store, name: str, members: Sequence[str]) -> list[float]:
    """The weights of an ensemble's members in its record, if it has any, else equal weights. They sum to 1."""
    record = ensembles.record_of(store.workspace, name) if name in ensembles.names(store.workspace) else None
    recorded: Any = (record or {}).get("weights")
    weights = [0.0] * len(members)
    if isinstance(recorded, Mapping):
        recorded_weights = [recorded.get(member) for member in members]
        if all(isinstance(weight, int | float) and weight >= 0 for weight in recorded_weights):
            weights = [float(weight) for weight in recorded_weights]  # type: ignore[arg-type]  # checked above
    total = sum(weights)
    return [weight / total if total > 0 else 1 / len(members) for weight in weights]


def _in_frame(of_member: Tensor, preprocessing: Preprocessing, frame: Preprocessing, path: Path) -> np.ndarray:
    """A member's map (h, w) resampled to the frame, float32 (S, S), aligned if the two crops differ; sums to 1."""
    import torch
    from torch.nn import functional as F

    side = frame.input_size
    stretch = (1.0, 1.0)
    if preprocessing.resizing() != frame.resizing():
        with base_back.load_bundled("image_files").open_image(path) as image:
            frame_extent, map_extent = (_half_extent(each, *image.size) for each in (frame, preprocessing))
        stretch = (frame_extent[0] / map_extent[0], frame_extent[1] / map_extent[1])
    theta = torch.tensor([[[stretch[0], 0.0, 0.0], [0.0, stretch[1], 0.0]]])
    grid = F.affine_grid(theta, [1, 1, side, side], align_corners=False)
    moved = F.grid_sample(of_member[None, None], grid, padding_mode="border", align_corners=False)[0, 0]
    inside = (grid[0].abs() <= 1 + 1 / min(of_member.shape)).all(dim=2)
    moved = moved * inside
    return np.asarray(moved / moved.sum().clamp_min(torch.finfo(torch.float32).tiny))


def _half_extent(preprocessing: Preprocessing, width: int, height: int) -> tuple[float, float]:
    """Half of the width and height, in pixels of the image, of a network's input square around the centre."""
    fraction = preprocessing.input_size / preprocessing.resized / 2
    if preprocessing.resize == "squash":
        return fraction * width, fraction * height
    side = min(width, height) if preprocessing.resize == "shorter-side" else max(width, height)
    return fraction * side, fraction * side
