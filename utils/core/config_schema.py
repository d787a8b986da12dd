"""Descriptions of the configuration's keys (meaning, type, range and default), and the JSON schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from utils.core.config import SPECIFIED, Config
from utils.core.config_sections import Section
from utils.core.errors import ConfigError, did_you_mean

DIALECT = "https://json-schema.org/draft/2020-12/schema"
WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text", tuple: "list"}


@dataclass(frozen=True)
class Key:
    """One key of the configuration, or one section."""

    name: str
    """Dotted name, such as `runs.moe.top_k`"""
    meaning: str
    kind: str
    """Type of its values; `section` for a section"""
    range: str
    """Accepted values in words; empty if the type suffices"""
    default: Any
    keys: tuple[str, ...] = ()
    """Keys of a section"""


def iterate_keys(section: type[Section] = Config, above: str = "") -> Iterator[Key]:
    """All sections and keys in the file's order, a section before its keys."""
    for name, field in section.model_fields.items():
        dotted = f"{above}{name}"
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            inner = tuple(f"{dotted}.{key}" for key in kind.model_fields)
            yield Key(dotted, field.description or "", "section", "", None, inner)
            yield from iterate_keys(kind, f"{dotted}.")
        else:
            yield Key(dotted, field.description or "", _kind(kind), _range(dotted, field), _plain(field.default))


def find(name: str) -> Key:
    """The key or section with a dotted name. Raises ConfigError that suggests the closest name."""
    keys = {key.name: key for key in iterate_keys()}
    if name not in keys:
        ends = [dotted for dotted in keys if dotted.endswith(f".{name}")]
        if len(ends) > 1:
            raise ConfigError(f"--explain {name}: several keys have this name: {', '.join(ends)}")
        last = {dotted.rpartition(".")[2]: dotted for dotted in keys}
        similar = ends or [last[word] for word in get_close_matches(name.rpartition(".")[2], last, n=1)]
        hint = f"; did you mean {similar[0]!r}?" if similar and "." not in name else did_you_mean(name, keys)
        raise ConfigError(f"--explain {name}: no such key{hint or '.'} The command `config` lists them all")
    return keys[name]


def json_schema(names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The JSON schema of a configuration file. `names` as in `config_file.load_config`."""
    schema = Config.model_json_schema()
    for dotted, specified in SPECIFIED.items():
        allowed = [*specified, *sorted(set(names.get(dotted, ())) - set(specified))]
        *sections, key = dotted.split(".")
        node = schema
        for section in sections:
            node = schema["$defs"][node["properties"][section]["$ref"].rpartition("/")[2]]
        target = node["properties"][key]
        (target["items"] if target.get("type") == "array" else target)["enum"] = allowed
    # A stored configuration has the origins of its values.
    schema["properties"]["provenance"] = {"type": "object", "description": "Where each value came from."}
    return {"$schema": DIALECT, **schema, "title": "Configuration of the ensemble system"}


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return "one of"
    if annotation in WORDS:
        return WORDS[annotation]
    if get_origin(annotation) is tuple:
        return "list"
    parts = [part for part in get_args(annotation) if part is not type(None)]
    words = list(dict.fromkeys(_kind(part) for part in parts))
    if len(words) > 1 and "one of" in words:  # a list, or one of some words
        words = [word for word in words if word != "one of"] + ["a word"]
    return " or ".join(words) + (" or null" if type(None) in get_args(annotation) else "")


def _range(dotted: str, field: FieldInfo) -> str:
    if dotted in SPECIFIED:
        return ", ".join(SPECIFIED[dotted])
    words = _literals(field.annotation)
    own_checks = [_expected(each) for each in field.metadata]
    of_parts = [_expected(each) for part in get_args(field.annotation) for each in getattr(part, "__metadata__", ())]
    if get_origin(field.annotation) is tuple:
        of_parts = [f"each {text}" for text in of_parts if text]
    return "; ".join(filter(None, [", ".join(words), *own_checks, *of_parts]))


def _expected(check: Any) -> str:
    """The values that a check of `config_values` accepts, in words."""
    text = check.func.__doc__ or "" if isinstance(check, BeforeValidator) else ""
    return text.removeprefix("expected ") if text.startswith("expected ") else ""


def _literals(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return list(map(str, get_args(annotation)))
    return [word for part in get_args(annotation) for word in _literals(part)]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
