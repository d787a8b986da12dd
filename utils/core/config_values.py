"""Types of the configuration's values: each validates one value and describes the expected values.

Messages and `config --explain` print the text of a check; the bounds are in the JSON schema too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

A_LIST = "expected a list such as [a, b], or [] for none"
ALL = "all"
"""`backbones.include`: every member that is not derived and whose training data is known; `input_ensembles` of
`runs.meta_fuser`: every built ensemble that can be an input"""
A_NAME = "expected a name, without slashes, leading dot or outer spaces"
Metric = Literal["f1_macro", "accuracy", "log_loss", "brier"]
FitRows = Literal["honest", "val", "oof"]
ViewGroup = Literal["flip", "five_crop", "rotations", "multi_scale"]
VIEW_GROUPS: tuple[ViewGroup, ...] = get_args(ViewGroup)


def _check(expected: str, fits: Callable[[Any], bool], turn: Callable[[Any], Any] = lambda raw: raw) -> BeforeValidator:
    def check(raw: object) -> object:
        if not fits(turn(raw)):
            raise ValueError(expected)
        return turn(raw)

    check.__doc__ = expected
    return BeforeValidator(check)


def _real(raw: object) -> float:
    """A number, also one written as text (`1e-3` is text in YAML 1.1); NaN, which no check accepts, otherwise."""
    try:
        number = float("nan" if isinstance(raw, bool) or not isinstance(raw, (int, float, str)) else raw)
    except (ValueError, OverflowError):
        return float("nan")
    return number if abs(number) < 2**53 else float("nan")


def _whole(raw: object) -> float:
    number = _real(raw)
    return int(number) if number == number // 1 else float("nan")


def _has_one_group(pattern: object) -> bool:
    try:
        return isinstance(pattern, str) and re.compile(pattern).groups == 1
    except (re.error, OverflowError, RecursionError):
        return False


def is_name(raw: object) -> bool:
    """Whether a member or an ensemble, and its folder, can have this name."""
    return isinstance(raw, str) and bool(re.fullmatch(r"(?![.\s])[^/\\\x00-\x1f]+(?<!\s)", raw))


def _names(raw: object, info: ValidationInfo) -> object:
    """Check a list of names and report all invalid items at once, each with its position."""
    if not isinstance(raw, (list, tuple)):
        raise ValueError(A_LIST)
    if not raw and info.data.get("enable"):
        raise ValueError("expected at least one name, or enable: false")
    twice = [(position, item, "expected each name once") for position, item in enumerate(raw) if item in raw[:position]]
    if problems := [(position, item, A_NAME) for position, item in enumerate(raw) if not is_name(item)] + twice:
        raise PydanticCustomError("items", "see the context", {"items": problems})
    return raw


def _names_or_all(raw: object, info: ValidationInfo) -> object:
    """`all`, or a list of names."""
    if isinstance(raw, str) and raw != ALL:
        raise ValueError(f"expected a list such as [a, b], or {ALL}")
    return raw if raw == ALL else _names(raw, info)


def some_left(excluded: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    """Check that `exclude` leaves some names of `include`; the specification recommends to exclude names of it."""
    included = info.data.get("include")
    if included and included != ALL and set(included) <= set(excluded):
        raise ValueError(f"expected at least one of the {len(included)} names of include left")
    return excluded


def at_most_experts(top_k: int, info: ValidationInfo) -> int:
    if top_k > (experts := info.data.get("num_experts", top_k)):
        raise ValueError(f"expected at most num_experts, which is {experts}")
    return top_k


def differs_from_student(assistant: str | None, info: ValidationInfo) -> str | None:
    if assistant is not None and assistant == info.data.get("student"):
        raise ValueError("expected another network than the student")
    return assistant


def as_best(teacher: str) -> str:
    """Replace `recommended`, the name in other places, by `best`."""
    return "best" if teacher == "recommended" else teacher


def without_meta_fuser(inputs: tuple[str, ...] | str) -> tuple[str, ...] | str:
    if "meta_fuser" in inputs:
        raise ValueError("expected other ensembles: meta_fuser cannot be an input of itself")
    return inputs


Count = Annotated[int, Field(ge=1), _check("expected a whole number of at least 1", lambda number: number >= 1, _whole)]
Workers = Annotated[
    int, Field(ge=0), _check("expected a whole number of at least 0", lambda number: number >= 0, _whole)
]
Seed = Annotated[
    int,
    Field(ge=0, lt=2**32),
    _check("expected a whole number from 0 to 4294967295", lambda seed: 0 <= seed < 2**32, _whole),
]
Positive = Annotated[float, Field(gt=0), _check("expected a number above 0", lambda number: number > 0, _real)]
Fraction = Annotated[
    float, Field(ge=0, le=1), _check("expected a number from 0 to 1", lambda number: 0 <= number <= 1, _real)
]
FeatureWeight = Annotated[
    Annotated[float, Field(ge=0)] | Literal["auto"],
    _check(
        "expected a number of at least 0, or auto",
        lambda weight: weight == "auto" or weight >= 0,
        lambda raw: raw if raw == "auto" else _real(raw),
    ),
]
Shrinkage = Annotated[
    float, Field(gt=0, le=1), _check("expected a number above 0, at most 1", lambda number: 0 < number <= 1, _real)
]
Dropout = Annotated[
    float, Field(ge=0, lt=1), _check("expected a number from 0 to below 1", lambda number: 0 <= number < 1, _real)
]
Flag = Annotated[bool, _check("expected true or false, without quotes", lambda raw: isinstance(raw, bool))]
Text = Annotated[
    str, Field(min_length=1), _check("expected text, in quotes", lambda raw: isinstance(raw, str) and raw.strip() != "")
]
Name = Annotated[str, _check(A_NAME, is_name)]
NameOrNone = Annotated[str | None, _check(f"{A_NAME}, or null", lambda raw: raw is None or is_name(raw))]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
NamesOrAll = Annotated[tuple[str, ...] | Literal["all"], BeforeValidator(_names_or_all)]
Precisions = Annotated[tuple[Literal["fp32", "fp16", "int8"], ...], BeforeValidator(_names)]
ViewGroups = Annotated[tuple[ViewGroup, ...], BeforeValidator(_names)]
Sizes = Annotated[tuple[Count, ...], _check(A_LIST, lambda raw: isinstance(raw, (list, tuple)))]
Device = Annotated[
    str,
    Field(pattern=r"^(cuda(:[0-9]{1,3})?|cpu|auto)$"),
    _check(
        "expected cuda, cuda:N, cpu or auto",
        lambda raw: isinstance(raw, str) and bool(re.fullmatch(r"cuda(:[0-9]{1,3})?|cpu|auto", raw)),
    ),
]
Pattern = Annotated[
    str | None,
    _check("expected null or a regex with exactly one group", lambda raw: raw is None or _has_one_group(raw)),
]
Batch = Annotated[int, Field(ge=2), _check("expected a whole number of at least 2", lambda number: number >= 2, _whole)]
Folder = Annotated[
    str | None,
    _check("expected a folder, or null", lambda raw: raw is None or (isinstance(raw, str) and raw.strip() != "")),
]
Threads = Annotated[
    Annotated[int, Field(ge=1)] | None,
    _check(
        "expected a whole number of at least 1, or null for the number that the network decides",
        lambda number: number is None or number >= 1,
        lambda raw: None if raw is None else _whole(raw),
    ),
]
Limit = Annotated[
    Annotated[float, Field(gt=0)] | None,
    _check(
        "expected a number above 0, or null for no limit",
        lambda number: number is None or number > 0,
        lambda raw: None if raw is None else _real(raw),
    ),
]
