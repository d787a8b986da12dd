"""Preprocessing records of declared networks, from the user, a file or timm.

In this order: `--preprocess KEY=VALUE`, the record of the checkpoint or of the folder (`preprocessor_config.json` of
Hugging Face, `pretrained_cfg` in timm's `config.json`), timm's configuration of the architecture. The last describes
timm's public weights, so it is an assumption for other weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from utils import base_back
from utils.core.errors import UserError, nearest_first
from utils.networks.preprocessing import Preprocessing

USER = "user"
TIMM = "timm"
ASSUMED = "assumed"
GUESSES = (TIMM, ASSUMED)
"""Sources that describe an architecture, not its weights."""
KEYS = (
    *("input_size", "resize", "crop", "resized", "interpolation", "crop_offset", "mean", "std", "channels", "range"),
    "exif",
)
"""Keys of --preprocess."""
FIELDS = {"range": "value_range"}
"""Fields of a preprocessing whose name differs from their key."""
TIMM_KEYS = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
STATE = "State it with --preprocess KEY=VALUE ..."


# the user's records --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Requests:
    """The values of --preprocess: for all networks of the same command, and for single ones by name."""

    general: Mapping[str, Any]
    by_name: Mapping[str, Mapping[str, Any]]

    def of(self, name: str) -> dict[str, Any]:
        """{key: value} for one network that the command adds."""
        return {**self.general, **self.by_name.get(name, {})}


def parse_requests(texts: Sequence[str]) -> Requests:
    """Parse `KEY=VALUE` and `NAME:KEY=VALUE`. Raises UserError for an invalid text."""
    general: dict[str, Any] = {}
    by_name: dict[str, dict[str, Any]] = {}
    for text in texts:
        target, separator, value = text.partition("=")
        name, _, key = target.rpartition(":")
        where = f"--preprocess {text}"
        if not separator or not key or not value:
            raise UserError(f"{where}: expected KEY=VALUE or NAME:KEY=VALUE, such as mean=0.5; keys: {', '.join(KEYS)}")
        if key not in KEYS:
            raise UserError(f"{where}: no such key{nearest_first(key, KEYS, 'Keys')}")
        values = by_name.setdefault(name, {}) if name else general
        if key in values:
            raise UserError(f"{where}: {key} occurs twice. Give it once")
        values[key] = _parsed(key, value, where)
        if {"crop", "resized"} <= set(values):
            raise UserError(f"{where}: crop and resized say the same thing. Give one of them")
    return Requests(general, by_name)


def _parsed(key: str, text: str, where: str) -> Any:
    """Parse the value of one key. Raises UserError for an invalid text; `Preprocessing` checks the bounds."""
    if key in ("mean", "std"):
        values = _numbers(text, (1, 3), where)
        return values * 3 if len(values) == 1 else values
    if key == "range":
        return _numbers(text, (2,), where)
    if key == "crop":
        (fraction,) = _numbers(text, (1,), where)
        if not 0 < fraction <= 1:
            raise UserError(f"{where}: expected a fraction above 0 and at most 1")
        return fraction
    if key in ("input_size", "resized"):
        if not re.fullmatch(r"\d{1,5}", text):
            raise UserError(f"{where}: expected a whole number of pixels")
        return int(text)
    return text.upper() if key == "channels" else text


def _numbers(text: str, counts: tuple[int, ...], where: str) -> list[float]:
    parts = text.split(",")
    try:
        values = [float(part) for part in parts]
    except ValueError:
        values = []
    if len(values) not in counts or not all(map(math.isfinite, values)):
        expected = " or ".join(map(str, counts))
        raise UserError(f"{where}: expected {expected} number{'s' if counts != (1,) else ''}, separated by commas")
    return values


def with_requests(base: Preprocessing, requests: Mapping[str, Any], where: str) -> Preprocessing:
    """`base` with the user's changes. Raises UserError for invalid values.

    A new input size keeps the crop fraction, unless the user sets it too. The rule `squash` without a fraction does not
    crop.
    """
    if not requests:
        return base
    record = base.as_record()
    values = dict(requests)
    fraction = values.pop("crop", None)
    if "range" in values:
        values["value_range"] = values.pop("range")
    record.update(values)
    size = record["input_size"]
    if "resized" not in values:
        if fraction is not None:
            record["resized"] = math.floor(size / fraction)
        elif values.get("resize", base.resize) != base.resize:
            record["resized"] = size
        elif size != base.input_size:
            record["resized"] = math.floor(size * base.resized / base.input_size + 1e-9)
    if record["resized"] < size and record["resize"] != "pad":
        raise UserError(f"{where}: resized {record['resized']} is less than input_size {size}; a square must fit in")
    low, high = record["value_range"]
    if "mean" in values and not all(low <= value <= high for value in record["mean"]):
        raise UserError(
            f"{where}: mean {_listed(record['mean'])} lies outside the range {_listed((low, high))} of the pixels' "
            "values. Give the range, such as range=0,255, or the mean of values in it"
        )
    record["source"] = USER
    return Preprocessing.from_record(record, where, remedy="Correct --preprocess")


def as_requests(record: Preprocessing, base: Preprocessing) -> list[str]:
    """The arguments of --preprocess that turn `base` into `record`."""
    values = {
        name: _listed(value) if isinstance(value, tuple) else str(value)
        for name, value in (
            ("input_size", record.input_size),
            ("resize", record.resize),
            ("resized", record.resized),
            ("interpolation", record.interpolation),
            ("crop_offset", record.crop_offset),
            ("mean", record.mean),
            ("std", record.std),
            ("channels", record.channels),
            ("range", record.value_range),
            ("exif", record.exif),
        )
    }
    changed = [
        name for name in values if getattr(record, FIELDS.get(name, name)) != getattr(base, FIELDS.get(name, name))
    ]
    if {"input_size", "resize"} & set(changed) and "resized" not in changed:
        changed.append("resized")  # otherwise it would be derived from them
    return [f"{name}={values[name]}" for name in changed]


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:.9g}" for value in values)


# timm's records -------------------------------------------------------------------------------------------------------


def of_timm_config(config: Mapping[str, Any], where: str, *, source: str, img_size: int | None = None) -> Preprocessing:
    """The preprocessing of a timm `pretrained_cfg`. Raises UserError for an unsupported configuration."""
    try:
        record = base_back.load_bundled("resizing").record_of_timm_config(config, img_size, source=source)
    except ValueError as error:
        raise UserError(f"{where}: {error}. {STATE}") from error
    return Preprocessing.from_record(record, where, remedy=STATE)


def of_architecture(architecture: str, fallback_size: int, input_size: int | None = None) -> Preprocessing:
    """timm's preprocessing for its weights of an architecture; `input_size` replaces its input size.

    If timm's configuration has none, that of the base pipeline at `input_size`, or `fallback_size`, is assumed.
    """
    try:
        record = base_back.load_bundled("resizing").timm_record(architecture, input_size)
    except ValueError:
        return Preprocessing.of_base_pipeline(input_size or fallback_size).with_source(ASSUMED)
    return Preprocessing.from_record(record, f"timm:{architecture}")


# Hugging Face's records -----------------------------------------------------------------------------------------------


def of_hugging_face(config: Mapping[str, Any], where: str, *, source: str) -> Preprocessing:
    """The preprocessing of a `preprocessor_config.json` of Hugging Face transformers.

    Raises UserError for an unknown class of image processor, and for invalid entries.
    """
    try:
        record = base_back.load_bundled("image_processors").record_of_image_processor(config, source=source)
    except ValueError as error:
        raise UserError(f"{where}: {error}. {STATE}") from error
    return Preprocessing.from_record(record, where, remedy=STATE)


def is_guess(record: Preprocessing) -> bool:
    """Whether a preprocessing was assumed: its source is neither the user nor a file."""
    return record.source in GUESSES


def differ(first: Preprocessing, second: Preprocessing) -> bool:
    """Whether two records give different inputs, apart from the rounding of a crop and the EXIF orientation."""
    return first != replace(second, crop_offset=first.crop_offset, exif=first.exif)
