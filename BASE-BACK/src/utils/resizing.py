"""Resize rules: how the input square of a network is computed from an image, with Pillow's arithmetic.

A rule resizes the decoded image, then crops the centre square. The result equals, bit for bit, that of torchvision
(`Resize`, `CenterCrop`), of timm (`transforms_imagenet_eval` with crop mode center, squash or border) and of Hugging
Face image processors (`shortest_edge` or `height`/`width`, then `center_crop`). Normalisation is not included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

RESIZES = ("shorter-side", "squash", "pad")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_OFFSETS = ("round", "floor")
EXIF_RULES = ("ignore", "apply")
CROP_MODES = {"center": "shorter-side", "squash": "squash", "border": "pad"}
"""timm's crop mode -> resize rule."""
LARGEST_RESIZED = 1 << 26  # pixels
ORIENTATION = 0x0112  # EXIF tag
TRANSPOSITIONS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""EXIF orientation -> Pillow's transposition that makes the image upright; other orientations are upright."""


@dataclass(frozen=True)
class Resizing:
    """The rule that computes the square of `input_size` px from a decoded image."""

    input_size: int
    """Side length of the square in px."""
    resized: int
    """Target length in px of the shorter side (`shorter-side`), both sides (`squash`) or the longer side (`pad`)."""
    resize: str = "shorter-side"
    interpolation: str = "bilinear"
    """Pillow's name of the interpolation."""
    crop_offset: str = "round"
    """Rounding of half pixels: `round` to even, as in torchvision and timm, or `floor`, as in Hugging Face."""
    exif: str = "ignore"
    """`apply`: transpose the image by its EXIF orientation before resizing; `ignore`: do not."""
    fill: tuple[int, int, int] = (0, 0, 0)
    """RGB of the padding."""

    @property
    def key(self) -> str:
        """Identifier of the resized pixels, which crops of any size, offset and fill share."""
        parts = [str(self.resized)]
        parts += [self.resize] if self.resize != "shorter-side" else []
        parts += [self.interpolation] if self.interpolation != "bilinear" else []
        return "-".join([*parts, "exif"] if self.exif == "apply" else parts)

    def target_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after resizing an image of that size. Raises ValueError beyond LARGEST_RESIZED pixels.

        The shorter side is exact and the longer one truncated (torchvision, Hugging Face); with `pad` the longer side
        is exact and the shorter one rounded (timm's ResizeKeepRatio).
        """
        long, short = max(width, height), min(width, height)
        if self.resize == "squash":
            return self.resized, self.resized
        if self.resize == "pad":
            ratio = long / self.resized
            return max(1, round(width / ratio)), max(1, round(height / ratio))
        length = int(self.resized * long / short)
        if self.resized * length > LARGEST_RESIZED:
            raise ValueError(
                f"{width} x {height} pixels, and still {self.resized * length} with its shorter side at {self.resized}"
            )
        return (self.resized, length) if width <= height else (length, self.resized)

    def resized_image(self, image: Image.Image) -> Image.Image:
        """The whole RGB image at its target size; with `exif` = `apply`, the image must be upright already."""
        from PIL import Image  # imported here, since commands that open no image read records too

        method = Image.Resampling[self.interpolation.upper()]
        return image.resize(self.target_size(*image.size), method)

    def crop(self, pixels: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Crop the centre square, uint8 (input_size, input_size, 3), from resized pixels (height, width, 3)."""
        size = self.input_size
        square = np.empty((size, size, 3), dtype=np.uint8) if out is None else out
        starts = [self._start(length) for length in pixels.shape[:2]]
        if min(starts) < 0 or min(pixels.shape[:2]) < size:
            square[:] = self.fill
        targets, sources = [], []
        for start, length in zip(starts, pixels.shape[:2], strict=True):
            sources.append(slice(max(start, 0), min(start + size, length)))
            targets.append(slice(sources[-1].start - start, sources[-1].stop - start))
        square[tuple(targets)] = pixels[tuple(sources)]
        return square

    def _start(self, length: int) -> int:
        """Offset of the square along a side; negative if the side is shorter than the square."""
        excess = length - self.input_size
        if self.crop_offset == "floor":
            return excess // 2
        return -(-excess // 2) if excess < 0 else round(excess / 2)

    def square(self, image: Image.Image) -> np.ndarray:
        """The square of one decoded image of any mode, uint8 (input_size, input_size, 3)."""
        return self.crop(resized_pixels(image, [self])[self.key])


def resized_side(size: int) -> int:
    """Shorter side in px to which the base pipeline resizes an image before it crops a square of `size` px."""
    return int(size * 1.14)


def evaluation_resizing(size: int) -> Resizing:
    """The rule of the base pipeline's evaluation transform for networks of `size` px."""
    return Resizing(size, resized_side(size))


def evaluation_record(size: int, exif: str = "ignore") -> dict[str, Any]:
    """The preprocessing record of the base pipeline's evaluation transform."""
    return {
        "input_size": size,
        "resize": "shorter-side",
        "resized": resized_side(size),
        "interpolation": "bilinear",
        "crop_offset": "round",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "channels": "RGB",
        "value_range": [0.0, 1.0],
        "exif": exif,
        "source": "base pipeline",
    }


def scaled_record(record: Any, size: int, *, source: str) -> dict[str, Any]:
    """A preprocessing record at another input size with the same crop fraction; the resized side is rounded down.

    Raises ValueError if `record`, which may come from any file, is not a preprocessing record.
    """
    names = evaluation_record(size).keys()
    if not isinstance(record, Mapping) or record.keys() != names:
        raise ValueError(f"preprocessing is {str(record)[:60]!r}; expected a dictionary of {', '.join(names)}")
    choices = {"resize": RESIZES, "interpolation": INTERPOLATIONS, "crop_offset": CROP_OFFSETS, "exif": EXIF_RULES}
    for name, values in (choices | {"channels": ("RGB", "BGR")}).items():
        if record[name] not in values:
            raise ValueError(f"preprocessing.{name} is {str(record[name])[:60]!r}; expected {' or '.join(values)}")
    for name in ("input_size", "resized"):
        if type(record[name]) is not int or record[name] < 1:
            raise ValueError(f"preprocessing.{name} is {str(record[name])[:60]!r}; expected a number of pixels")
    for name, count in (("mean", 3), ("std", 3), ("value_range", 2)):
        if not _are_finite(record[name], count):
            raise ValueError(f"preprocessing.{name} is {str(record[name])[:60]!r}; expected {count} finite numbers")
    if min(record["std"]) <= 0 or record["value_range"][0] >= record["value_range"][1]:
        raise ValueError("preprocessing: expected each std above 0, and value_range in ascending order")
    resized = record["resized"] * size // record["input_size"]  # float division could lose a pixel
    return {**record, "input_size": size, "resized": resized, "source": source}


def _are_finite(values: Any, count: int) -> bool:
    is_list = isinstance(values, list | tuple) and len(values) == count
    return is_list and all(type(value) in (int, float) and math.isfinite(value) for value in values)


def resized_pixels(image: Image.Image, rules: Iterable[Resizing]) -> dict[str, np.ndarray]:
    """{key: RGB pixels, uint8 (height, width, 3)} of an opened image, resized from its original pixels by each rule.

    16-bit channels are clipped to 8 bits. Raises ValueError for an image that a rule would enlarge beyond
    LARGEST_RESIZED pixels.
    """
    distinct = {rule.key: rule for rule in rules}
    for rule in distinct.values():
        rule.target_size(*image.size)  # checked before decoding, which allocates the memory
    sources = {exif: decoded(image, exif) for exif in {rule.exif for rule in distinct.values()}}
    return {key: np.asarray(rule.resized_image(sources[rule.exif])) for key, rule in distinct.items()}


def decoded(image: Image.Image, exif: str) -> Image.Image:
    """The RGB image of an opened image, upright if `exif` is `apply`."""
    rgb = image.convert("RGB")
    name = TRANSPOSITIONS.get(exif_orientation(image)) if exif == "apply" else None
    if name is None:
        return rgb
    from PIL import Image

    return rgb.transpose(Image.Transpose[name])


def exif_orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, that remains to be applied to a decoded image; 1 (upright) if the tag is damaged.

    Pillow's TIFF decoder applies the orientation itself; the image is then upright.
    """
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged metadata do not affect the pixels
        return 1
    return value if value in TRANSPOSITIONS else 1


def resizing_of_record(record: Mapping[str, Any]) -> Resizing:
    """The rule of a preprocessing record; padding has the colour of the record's mean."""
    names = ("input_size", "resized", "resize", "interpolation", "crop_offset", "exif")
    rule = Resizing(**{name: record[name] for name in names})
    if rule.resize != "pad":
        return rule
    return replace(rule, fill=pad_fill(record["mean"], record["value_range"], record["channels"]))


def timm_record(architecture: str, img_size: int | None = None) -> dict[str, Any]:
    """The preprocessing record of a timm architecture by `timm.data.resolve_data_config`, without building the network.

    `architecture` may have a tag ("resnet18.a1_in1k"); the default is the tag of timm's default weights. `img_size`
    replaces the input size; the crop fraction stays. Raises ValueError for a name unknown to timm, and for a
    configuration that a record cannot represent.
    """
    import timm

    if not timm.is_model(architecture):
        raise ValueError(f"timm {timm.__version__} has no model {architecture!r}")
    try:
        defaults = timm.get_pretrained_cfg(architecture)
    except RuntimeError as error:
        raise ValueError(f"{architecture}: {error}") from error
    return record_of_timm_config({} if defaults is None else defaults.to_dict(), img_size, source="timm")


def record_of_timm_config(config: Mapping[str, Any], img_size: int | None = None, *, source: str) -> dict[str, Any]:
    """The preprocessing record of a timm pretrained configuration (the `pretrained_cfg` of a `config.json`).

    Missing entries get timm's defaults. Raises ValueError for what a record cannot represent: an input that is not
    square or does not have three channels, an unknown crop mode or interpolation, an invalid number.
    """
    from timm.data import resolve_data_config

    try:
        resolved = resolve_data_config({"img_size": img_size}, pretrained_cfg=dict(config))
        channels, height, width = resolved["input_size"]
        size, fraction = int(width), float(resolved["crop_pct"])
        mean, std = ([float(value) for value in resolved[name]] for name in ("mean", "std"))
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise ValueError(f"not the form of a timm configuration ({error})") from error
    if channels != 3 or height != width:
        raise ValueError(f"input_size {list(resolved['input_size'])}; expected three channels and a square")
    if not _are_finite([*mean, *std], 6) or min(std) <= 0:
        raise ValueError(f"mean {mean} and std {std}; expected three finite numbers each, and std above 0")
    if not 0 < fraction <= 4:
        raise ValueError(f"crop_pct {fraction}; expected a fraction above 0")
    if resolved["crop_mode"] not in CROP_MODES or resolved["interpolation"] not in INTERPOLATIONS:
        raise ValueError(
            f"crop_mode {resolved['crop_mode']!r} and interpolation {resolved['interpolation']!r}; expected one of "
            f"{', '.join(CROP_MODES)} and one of {', '.join(INTERPOLATIONS)}"
        )
    return {
        "input_size": size,
        "resize": CROP_MODES[resolved["crop_mode"]],
        "resized": math.floor(size / fraction),
        "interpolation": resolved["interpolation"],
        "crop_offset": "round",
        "mean": mean,
        "std": std,
        "channels": "RGB",
        "value_range": [0.0, 1.0],
        "exif": "ignore",
        "source": source,
    }


def pad_fill(mean: Sequence[float], value_range: Sequence[float], channels: str) -> tuple[int, int, int]:
    """RGB padding colour of timm, the mean; `mean` is in the channel order `channels`, for values in `value_range`."""
    low, high = value_range
    values = [min(255, max(0, round(255 * (value - low) / (high - low)))) for value in mean]
    red, green, blue = reversed(values) if channels == "BGR" else values
    return red, green, blue
