"""Preprocessing records from Hugging Face image processors (`preprocessor_config.json`). Reads no settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils.resizing import record_of_timm_config

RESAMPLES = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Pillow's interpolations, indexed by the integer value of `resample`."""


@dataclass(frozen=True)
class _Processor:
    """Defaults of a class of image processor, for entries missing from its file."""

    is_square: bool
    """Whether a size given as one number means both sides, not the shorter one."""
    crops: bool = True
    normalises: bool = True
    is_bgr: bool = False
    has_crop_pct: bool = False
    """Below 384 px the shorter side is resized to size / crop_pct, then cropped; from 384 px on both sides to size."""


PROCESSORS = {
    "Beit": _Processor(is_square=True),
    "Bit": _Processor(is_square=False),
    "CLIP": _Processor(is_square=False),
    "ConvNext": _Processor(is_square=False, crops=False, has_crop_pct=True),
    "DeiT": _Processor(is_square=True),
    "MobileNetV1": _Processor(is_square=False),
    "MobileNetV2": _Processor(is_square=False),
    "MobileViT": _Processor(is_square=False, normalises=False, is_bgr=True),
    "Siglip": _Processor(is_square=True, crops=False),
    "ViT": _Processor(is_square=True, crops=False),
}
"""{class of image processor without its suffix: its defaults}; other classes may crop, pad or normalise differently."""
PROCESSOR_SUFFIX = re.compile(r"(?:ImageProcessor(?:Fast|Pil)?|FeatureExtractor)$")
CONVNEXT_SQUASHES_FROM = 384


def record_of_image_processor(config: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """The preprocessing record of a `preprocessor_config.json` of Hugging Face's transformers.

    Its image loader applies the EXIF orientation, and its crop rounds down. Raises ValueError for a class of image
    processor that is not in PROCESSORS, and for invalid entries.
    """
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    if kind.startswith("TimmWrapper") and isinstance(config.get("pretrained_cfg"), Mapping):
        return record_of_timm_config(config["pretrained_cfg"], source=source)
    name = PROCESSOR_SUFFIX.sub("", kind)
    if name not in PROCESSORS:
        raise ValueError(
            f"image_processor_type {kind[:60]!r} is not supported; expected one of {', '.join(PROCESSORS)}"
        )
    processor, entries = PROCESSORS[name], _Entries(config)
    if not entries.flag("do_resize", True) or entries.flag("do_pad", False):
        raise ValueError("it does not resize, or it pads; expected a resized square")
    resize, resized, input_size = _geometry(entries, processor)
    scale = entries.number("rescale_factor", 1 / 255) if entries.flag("do_rescale", True) else 1.0
    normalises = entries.flag("do_normalize", processor.normalises)
    return {
        "input_size": input_size,
        "resize": resize,
        "resized": resized,
        "interpolation": entries.interpolation(),
        "crop_offset": "floor",
        "mean": entries.values("image_mean") if normalises else [0.0] * 3,
        "std": entries.values("image_std") if normalises else [1.0] * 3,
        "channels": "BGR" if entries.flag("do_flip_channel_order", processor.is_bgr) else "RGB",
        "value_range": [0.0, round(255 * scale, 6)],
        "exif": "apply",
        "source": source,
    }


def _geometry(entries: _Entries, processor: _Processor) -> tuple[str, int, int]:
    """(resize rule, resized side in px, side of the input in px)."""
    sides = entries.size("size", "both" if processor.is_square else "shortest_edge")
    is_squashed, side = "shortest_edge" not in sides, sides.get("shortest_edge") or entries.square(sides, "size")
    if processor.has_crop_pct:
        if side >= CONVNEXT_SQUASHES_FROM:
            return "squash", side, side
        return "shorter-side", int(side / entries.number("crop_pct", 224 / 256)), side
    if not entries.flag("do_center_crop", processor.crops):
        if not is_squashed:
            raise entries.error("do_center_crop", "true, since images of another shape would not become squares")
        return "squash", side, side
    input_size = entries.square(entries.size("crop_size", "both"), "crop_size")
    if input_size > side:
        raise entries.error("crop_size", f"at most size, {side}, since a larger crop would be padded")
    return "squash" if is_squashed else "shorter-side", side, input_size


@dataclass(frozen=True)
class _Entries:
    """Typed access to the entries of a `preprocessor_config.json`."""

    config: Mapping[str, Any]

    def error(self, name: str, expected: str) -> ValueError:
        return ValueError(f"{name} is {str(self.config.get(name))[:60]!r}; expected {expected}")

    def flag(self, name: str, default: bool) -> bool:
        value = self.config.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.error(name, "true or false")
        return default if value is None else value

    def number(self, name: str, default: float) -> float:
        value = self.config.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise self.error(name, "a number above 0 and at most 1")
        return float(value)

    def values(self, name: str) -> Any:
        if name not in self.config:
            raise self.error(name, "three numbers")
        value = self.config[name]
        return [value] * 3 if isinstance(value, int | float) else value

    def interpolation(self) -> str:
        value = self.config.get("resample")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(RESAMPLES):
            raise self.error("resample", f"an integer from 0 to {len(RESAMPLES) - 1}")
        return RESAMPLES[value]

    def size(self, name: str, meaning: str) -> dict[str, int]:
        """{`shortest_edge`: side} or {`height`, `width`}; `meaning` tells how to read a single number."""
        value: Any = self.config.get(name)
        sides: Any = value
        if isinstance(value, int) and not isinstance(value, bool):
            sides = {"height": value, "width": value} if meaning == "both" else {"shortest_edge": value}
        is_sound = isinstance(sides, Mapping) and set(sides) in ({"shortest_edge"}, {"height", "width"})
        if not is_sound or not all(type(side) is int and side > 0 for side in sides.values()):
            raise self.error(name, "a number of pixels, {shortest_edge} or {height, width}")
        return dict(sides)

    def square(self, sides: Mapping[str, int], name: str) -> int:
        if len(set(sides.values())) > 1:
            raise self.error(name, "equal sides")
        return next(iter(sides.values()))
