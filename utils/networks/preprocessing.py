"""Preprocessing of one network's images, defined by a record: resize rule, crop, interpolation and normalisation.

A record is a JSON object in the catalog, in checkpoints (`extra["preprocessing"]`) and in exports. The bundled base
pipeline's `resizing` computes the pixels, with Pillow's arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from utils import base_back
from utils.core.errors import UserError, did_you_mean

LEAST_SIDE, MOST_SIDE = 8, 4096  # bounds of an image size in pixels
CHANNELS = ("RGB", "BGR")
BASE_PIPELINE = "base pipeline"
REMEDY = "Correct the record, or leave it out"


@dataclass(frozen=True)
class Preprocessing:
    """The transform of images to a network's input. Equal instances give equal inputs; `source` is not compared."""

    input_size: int
    """Side length of the square input in px."""
    resize: str
    """`shorter-side`, `squash` (both sides, ignoring the aspect ratio) or `pad` (longer side, then padding)."""
    resized: int
    """Length of that side after resizing, in px; the centre square of `input_size` is then cropped."""
    interpolation: str
    """Pillow's name of the interpolation."""
    crop_offset: str
    """Rounding of half pixels: `round` (to even) or `floor`."""
    mean: tuple[float, float, float]
    """Mean of values in `value_range`, in the order of `channels`."""
    std: tuple[float, float, float]
    channels: str
    """`RGB` or `BGR`"""
    value_range: tuple[float, float]
    """Values of 0 and 255 after rescaling, before mean and standard deviation are applied."""
    exif: str
    """Whether the EXIF orientation is applied: `apply` or `ignore`."""
    source: str = field(compare=False)
    """Origin of the record."""

    @classmethod
    def of_base_pipeline(cls, img_size: int) -> Preprocessing:
        """The base pipeline's evaluation transform for networks of `img_size` px."""
        record = base_back.load_bundled("resizing").evaluation_record(img_size)
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in record.items()}
        return cls(**values)

    @classmethod
    def from_record(cls, record: Any, where: str, *, remedy: str = REMEDY) -> Preprocessing:
        """Create it from a record. Raises UserError, whose message starts with `where`, for an invalid record."""
        names = [entry.name for entry in fields(cls)]
        if not isinstance(record, Mapping):
            raise UserError(f"{where}: {str(record)[:40]!r}; expected a dictionary of {', '.join(names)}. {remedy}")
        unknown = [f"{str(name)[:40]!r}{did_you_mean(name, names)}" for name in record if name not in names]
        missing = [name for name in names if name not in record]
        if unknown or missing:
            parts = [f"unknown {', '.join(unknown)}" if unknown else "", f"no {', '.join(missing)}" if missing else ""]
            raise UserError(
                f"{where}: {' and '.join(part for part in parts if part)}; expected {', '.join(names)}. {remedy}"
            )
        check = _Check(record, where, remedy)
        rules = base_back.load_bundled("resizing")
        low, high = check.numbers("value_range", 2)
        std = check.numbers("std", 3)
        if not low < high:
            raise check.error("value_range", "a lower and a higher number")
        if min(std) <= 0:
            raise check.error("std", "three numbers above 0")
        return cls(
            input_size=check.pixels("input_size"),
            resize=check.choice("resize", rules.RESIZES),
            resized=check.pixels("resized", least=1),
            interpolation=check.choice("interpolation", rules.INTERPOLATIONS),
            crop_offset=check.choice("crop_offset", rules.CROP_OFFSETS),
            mean=check.numbers("mean", 3),
            std=std,
            channels=check.choice("channels", CHANNELS),
            value_range=(low, high),
            exif=check.choice("exif", rules.EXIF_RULES),
            source=check.text("source"),
        )

    @property
    def is_base_pipeline(self) -> bool:
        """Whether it equals the base pipeline's evaluation transform."""
        return self == Preprocessing.of_base_pipeline(self.input_size)

    def as_record(self) -> dict[str, Any]:
        """The record, JSON-ready."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def inputs_record(self) -> dict[str, Any]:
        """The part of the record that determines the network's input, JSON-ready."""
        record = self.as_record()
        del record["source"]
        return record

    def with_source(self, source: str) -> Preprocessing:
        """The same preprocessing with another `source`."""
        return replace(self, source=source)

    def resizing(self) -> Any:
        """The base pipeline's `Resizing`, which computes the pixels."""
        return base_back.load_bundled("resizing").resizing_of_record(self.as_record())

    def describe(self) -> str:
        """One readable line, such as `224 px of shorter side 248, bicubic, mean 0.5, std 0.5 (timm)`."""
        sides = {"shorter-side": "of shorter side", "squash": "squashed to", "pad": "padded, of longer side"}
        parts = [
            f"{self.input_size} px {sides[self.resize]} {self.resized}",
            f"{self.interpolation}{', crop rounded down' if self.crop_offset == 'floor' else ''}",
            f"mean {_short(self.mean)}, std {_short(self.std)}",
            *([self.channels] if self.channels != "RGB" else []),
            *([f"values {_short(self.value_range)}"] if self.value_range != (0, 1) else []),
            *(["EXIF orientation applied"] if self.exif == "apply" else []),
        ]
        return f"{', '.join(parts)} ({self.source})"


def _short(values: tuple[float, ...]) -> str:
    texts = [f"{value:.4g}" for value in values]
    return texts[0] if len(set(texts)) == 1 else " ".join(texts)


@dataclass(frozen=True)
class _Check:
    """Validated access to the entries of a record of any origin."""

    record: Mapping[str, Any]
    where: str
    remedy: str

    def error(self, name: str, expected: str) -> UserError:
        return UserError(f"{self.where}: {name} is {str(self.record[name])[:60]!r}; expected {expected}. {self.remedy}")

    def pixels(self, name: str, least: int = LEAST_SIDE) -> int:
        value = self.record[name]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST_SIDE:
            raise self.error(name, f"a whole number from {least} to {MOST_SIDE}")
        return value

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        value = self.record[name]
        if not isinstance(value, str) or value not in choices:
            raise self.error(name, f"one of {', '.join(choices)}{did_you_mean(value, choices)}")
        return value

    def numbers(self, name: str, count: int) -> tuple[Any, ...]:
        values = self.record[name]
        expected = f"{count} finite numbers"
        if not isinstance(values, list | tuple) or len(values) != count:
            raise self.error(name, expected)
        if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
            raise self.error(name, expected)
        if not all(math.isfinite(value) for value in values):
            raise self.error(name, expected)
        return tuple(float(value) for value in values)

    def text(self, name: str) -> str:
        value = self.record[name]
        if not isinstance(value, str) or not value:
            raise self.error(name, "a name of the source")
        return value
