"""Strict reader of JSON files of any origin, such as a downloaded `config.json`.

Unlike `json.load`, it limits size and nesting and refuses duplicate keys and numbers that are not finite. It returns
plain values; nothing in a file is followed or executed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from utils.core.errors import UserError
from utils.core.regular_files import open_regular

MOST_BYTES = 16 << 20  # a list of 20,000 class names needs less than one megabyte
MOST_LEVELS = 32


def read_json_object(path: Path, *, remedy: str) -> dict[str, Any]:
    """Read the JSON object in `path`.

    Raises UserError with `remedy` for a file that is missing, larger than MOST_BYTES, not UTF-8, not strict JSON,
    nested deeper than MOST_LEVELS, or holds another type of value.
    """
    try:
        with open_regular(path) as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(
                f"{path}: {path.stat().st_size} bytes; expected a JSON file of at most {MOST_BYTES}. {remedy}"
            )
        record = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
        if not isinstance(record, dict):
            raise ValueError(f"it holds a {type(record).__name__}")
        _require_shallow(record, MOST_LEVELS)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. {remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}). {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}; expected a JSON object. {remedy}") from error
    return record


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {duplicate[:40]!r} occurs twice")
    return record


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _require_shallow(value: Any, levels: int) -> None:
    if levels < 0:
        raise ValueError(f"nested deeper than {MOST_LEVELS} levels")
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in items:
        _require_shallow(item, levels - 1)
