"""Locates and reads the configuration file, applies every `--set`, and reports all problems at once.

An absent section has the specification's values. The exception: if a file has any section of `runs`, every absent
section with an `enable` key (`runs.*`, `pruning`, `distillation`) is off, except `exports`. A section that is present
has the specification's value for every missing key, including `enable`: `moe: {top_k: 1}` leaves moe off,
`fusion: {end_to_end: true}` leaves fusion on. `--set` is applied afterwards, so it does not switch other sections.
"""

from __future__ import annotations

import copy
import os
import re
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from utils.core.config import FILE, SPECIFIED, Config, of_workspace, validate
from utils.core.config_sections import Runs, Section
from utils.core.errors import ConfigError, UserError, did_you_mean, nearest_first

MOST_FILES, MOST_LINES = 10, 100  # number of similar files and of problems in a message
MOST_BYTES, MOST_VALUES, LONGEST, DEEPEST = 1_000_000, 10_000, 1_000, 20  # limits of a configuration file
PROVENANCE = "provenance"
"""Section of a stored configuration with the origin of each value."""
YAML = "tag:yaml.org,2002:"
SCALARS = {YAML + kind for kind in ("null", "bool", "int", "float")}
AS_TEXT = {YAML + kind for kind in ("str", "timestamp", "value", "merge")}  # dates, `=` and `<<` are plain text here
TAGS = {yaml.ScalarNode: SCALARS | AS_TEXT, yaml.SequenceNode: {YAML + "seq"}, yaml.MappingNode: {YAML + "map"}}
KeyPath = tuple[str, ...]
Problems = list[tuple[KeyPath, str]]


def find_config(name: str, project: Path) -> Path:
    """The file `name` in the working directory, else in the project. Raises ConfigError naming both paths."""
    requested = Path(os.path.expanduser(name))
    candidates = [requested] if requested.is_absolute() else [requested, project / requested]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    folders = dict.fromkeys([*(candidate.parent for candidate in candidates), project / "configs"])
    files = sorted(file for folder in folders for file in folder.glob("*.y*ml"))
    similar_files = list(
        dict.fromkeys(str(file.relative_to(project) if file.is_relative_to(project) else file) for file in files)
    )
    problem = "is a folder; expected a file" if any(candidate.is_dir() for candidate in candidates) else "no such file"
    searched = dict.fromkeys(os.path.abspath(candidate) for candidate in candidates)
    suggestion = did_you_mean(name, similar_files) or did_you_mean(
        requested.name, [Path(file).name for file in similar_files]
    )
    shown_files = [*similar_files[:MOST_FILES], *(["..."] if similar_files[MOST_FILES:] else [])]
    raise ConfigError(
        f"{name}: {problem}{suggestion or '.'} Looked for {' and '.join(searched)}; there are "
        f"{', '.join(shown_files) or 'no YAML files'}"
    )


def load_config(
    path: Path,
    *,
    overrides: Sequence[str] = (),
    names: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> Config:
    """Read the file, apply `overrides` such as `runs.moe.enable=true`, and validate the result.

    `names` maps a key of `SPECIFIED` to further accepted names. Raises ConfigError that lists all problems of the file
    and of the overrides.
    """
    if strange := sorted(set(names) - set(SPECIFIED)):
        raise KeyError(f"the names at {', '.join(strange)} are not checked")
    values, problems = _read_file(path)
    provenance = (values or {}).pop(PROVENANCE, None)
    origins: dict[KeyPath, str] = {}
    raw = _switch_off_absent(values or {})
    stated_origins = _stated_origins(raw, provenance)
    lines = [*_lines(problems, {}), *_apply(raw, overrides, origins)]
    unknown = dict(_unknown_names(raw, names))
    invalid: dict[KeyPath, str] = {}
    try:
        config = validate(
            raw, source=path, origins=stated_origins | {".".join(key): text for key, text in origins.items()}
        )
    except ValidationError as error:
        invalid = dict(chain.from_iterable(map(_explain, error.errors())))
    invalid |= unknown
    for key_path, _ in problems:  # already reported
        invalid.pop(key_path, None)
    if values is None:  # the overrides can still be validated
        invalid = {key_path: text for key_path, text in invalid.items() if _origin(key_path, origins) is not None}
    if lines := [*lines, *_lines(list(invalid.items()), origins)]:
        shown_lines = lines[:MOST_LINES] + [f"... and {len(lines) - MOST_LINES} more"] * (len(lines) > MOST_LINES)
        raise ConfigError(
            "\n  ".join([f"{path}: {len(lines)} problem(s)", *shown_lines]) if lines[1:] else f"{path}: {lines[0]}"
        )
    return config


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """The configuration with `KEY=VALUE` of an earlier command, which those of this command override.

    Raises UserError for an override that the schema does not accept (any more).
    """
    raw, origins = config.as_dict(), dict[KeyPath, str]()
    problems = list(_apply(raw, [*overrides, *config.overrides], origins))
    try:
        changed = validate(raw, source=config.source, origins=config.origins)
    except ValidationError as error:
        problems += _lines(list(chain.from_iterable(map(_explain, error.errors()))), origins)
    if problems:
        raise UserError(f"recorded with a build: {'; '.join(problems)}")
    return of_workspace(
        changed,
        overrides=config.overrides,
        recorded=config.recorded_overrides,
        is_remembered=config.is_remembered,
    )


def leaves(values: Mapping[str, Any], above: KeyPath = ()) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value of a configuration; sections are not values."""
    for name, value in values.items():
        if isinstance(value, dict) and _section((*above, name)) is not None:
            yield from leaves(value, (*above, name))
        else:
            yield ".".join((*above, name)), value


def read_provenance(path: Path) -> dict[str, Any]:
    """The section `provenance` of a stored configuration; empty for other files."""
    values = _read_file(path)[0] if path.is_file() else None
    provenance = (values or {}).get(PROVENANCE)
    return provenance if isinstance(provenance, dict) else {}


def _stated_origins(raw: dict[str, Any], provenance: object) -> dict[str, str]:
    """{key: origin} of the values in a file; a stored configuration records their origins."""
    recorded = provenance.get("keys") if isinstance(provenance, dict) else None
    if isinstance(recorded, dict):
        return {str(key): str(origin) for key, origin in recorded.items()}
    return dict.fromkeys((key for key, _ in leaves(raw)), FILE)


def _switch_off_absent(values: dict[str, Any]) -> dict[str, Any]:
    runs = values.get("runs")
    if not isinstance(runs, dict) or not runs:
        return values
    switched = [name for name in ("pruning", "tta", "distillation") if name not in values]
    off = {name: {"enable": False} for name in Runs.model_fields if name not in runs}
    return values | {name: {"enable": False} for name in switched} | {"runs": runs | off}


def _section(key_path: KeyPath) -> type[Section] | None:
    """The schema of the section at `key_path`; None if there is a value or nothing."""
    section: type[Section] = Config
    for name in key_path:
        field = section.model_fields.get(name)
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, Section)):
            return None
        section = annotation
    return section


def _sections(key_path: KeyPath = ()) -> Iterator[KeyPath]:
    section = _section(key_path)
    if section is not None:
        yield key_path
        for name in section.model_fields:
            yield from _sections((*key_path, name))


def _unknown_key(key_path: KeyPath) -> str:
    """The message for an unknown key of a section."""
    section = _section(key_path[:-1])
    keys = list(section.model_fields) if section else []
    elsewhere = [".".join(section_key) for section_key in _sections() if section_key[-1:] == key_path[-1:]]
    if len(elsewhere) == 1:
        return f"unknown key; did you mean {elsewhere[0]!r}? Allowed here: {', '.join(keys)}"
    return f"unknown key{nearest_first(key_path[-1], keys, 'Allowed')}"


def _explain(problem: ErrorDetails) -> Iterator[tuple[KeyPath, str]]:
    """The message for one of pydantic's problems."""
    key_path = tuple(map(str, problem["loc"]))
    value = f"found {_show(problem['input'])}; "
    if problem["type"] == "extra_forbidden":
        yield key_path, _unknown_key(key_path)
    elif problem["type"] == "model_type" and (section := _section(key_path)):
        yield key_path, f"{value}expected a section with any of the keys {', '.join(section.model_fields)}"
    elif problem["type"] == "literal_error":
        words = re.findall(r"'([^']+)'", problem["ctx"]["expected"])
        yield key_path, value.removesuffix("; ") + nearest_first(problem["input"], words, "Allowed")
    elif problem["type"] == "items":
        for position, item, expected in problem["ctx"]["items"]:
            yield (*key_path, str(position)), f"found {_show(item)}; {expected}"
    else:
        yield key_path, value + problem["msg"].removeprefix("Value error, ")


def _unknown_names(raw: dict[str, Any], names: Mapping[str, Collection[str]]) -> Iterator[tuple[KeyPath, str]]:
    """Problems of unknown method names; strips the suffix `_ensemble` from names."""
    printed = Config()
    for dotted, specified in SPECIFIED.items():
        *parents, key = key_path = tuple(dotted.split("."))
        holder: Any = raw
        for parent in parents:
            holder = holder.get(parent) if isinstance(holder, dict) else None
        value = holder.get(key) if isinstance(holder, dict) else None
        if isinstance(value, list) != isinstance(printed.at(dotted), tuple):
            continue  # absent, or of an invalid type
        allowed = (*specified, *sorted(set(names.get(dotted, ())) - set(specified)))
        items: list[Any] = value if isinstance(value, list) else [value]
        for position, name in enumerate(items):
            if not isinstance(name, str) or name in allowed:
                continue
            if name.removesuffix("_ensemble") in allowed:
                items[position] = name.removesuffix("_ensemble")
                continue
            text = f"found {_show(name)}{nearest_first(name, allowed, 'Allowed')}"
            yield (*key_path, str(position)) if items is value else key_path, text


def _misplaced(key_path: KeyPath) -> str:
    """The reason why no value can be set at `key_path`, or an empty text."""
    for end, name in enumerate(key_path, start=1):
        around = _section(key_path[: end - 1])
        if around is None:
            return f"{'.'.join(key_path[: end - 1])} holds a value, not a section"
        if name not in around.model_fields:
            return ("" if end == len(key_path) else f"{'.'.join(key_path[:end])}: ") + _unknown_key(key_path[:end])
    return ""


def _apply(raw: dict[str, Any], overrides: Sequence[str], origins: dict[KeyPath, str]) -> Iterator[str]:
    """Apply each override to `raw` and record it in `origins`, {key of a value: its override}; yields the problems."""
    for override in overrides:
        dotted, equals, text = override.partition("=")
        key_path = tuple(dotted.strip().split("."))
        if not equals or not all(key_path):
            yield f"--set {override}: expected KEY=VALUE, such as --set runs.moe.enable=true"
        elif misplaced := _misplaced(key_path):
            yield f"--set {override}: {misplaced}"
        else:
            value, problems = _read_text(text)
            yield from (f"--set {override}: {line}" for line in _lines(problems, {}))
            if not problems:
                _put(raw, key_path, value, override, origins)


def _put(raw: dict[str, Any], key_path: KeyPath, value: object, override: str, origins: dict[KeyPath, str]) -> None:
    """Set one value; a mapping is set key by key, so that other keys of the section keep their values."""
    if isinstance(value, dict) and _section(key_path) is not None:
        for key, inner in value.items():
            _put(raw, (*key_path, key), inner, override, origins)
        return
    holder = raw
    for name in key_path[:-1]:
        holder = holder.setdefault(name, {})
        if not isinstance(holder, dict):  # the file has no section here, which is reported as a problem of the file
            return
    holder[key_path[-1]] = value
    origins[key_path] = override


def _origin(key_path: KeyPath, origins: Mapping[KeyPath, str]) -> str | None:
    return next((origins[key_path[:end]] for end in range(len(key_path), 0, -1) if key_path[:end] in origins), None)


def _lines(problems: Problems, origins: Mapping[KeyPath, str]) -> list[str]:
    lines = []
    for key_path, text in problems:
        dotted, override = ".".join(key_path), _origin(key_path, origins)
        shown = [f"--set {override}"] * (override is not None)
        if override is None or override.partition("=")[0].strip() != dotted:
            shown.append(dotted)
        lines.append(": ".join([*filter(None, shown), text]))
    return lines


def _show(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "nothing (null)", True: "true", False: "false"}[value]
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 60
    return brief.repr(value)


def _read_file(path: Path) -> tuple[dict[str, Any] | None, Problems]:
    """The mapping in the file (None if it cannot be read as one) and its problems."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        return None, [((), f"cannot be read: {error.strerror or error}")]
    if len(data) > MOST_BYTES:
        return None, [((), f"found more than {MOST_BYTES} bytes; expected a short YAML file")]
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        return None, [
            ((), f"line {line}, column {column}: found the byte {data[error.start]:#04x}; expected UTF-8 text")
        ]
    values, problems = _read_text(text)
    if not problems and not isinstance(values, dict):
        content = "an empty file" if values is None else _show(values)
        problems = [((), f"line 1, column 1: found {content}; expected sections: {', '.join(Config.model_fields)}")]
    return values if isinstance(values, dict) else None, problems


def _read_text(text: str) -> tuple[Any, Problems]:
    """Parse YAML to plain values and problems; constructs only values of YAML 1.1's plain types."""
    return copy.deepcopy(_parsed(text))


@lru_cache(maxsize=2)  # a command reads the stored configuration, then its provenance
def _parsed(text: str) -> tuple[Any, Problems]:
    try:
        return (reader := _Reader(text)).read(), reader.problems
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - before.rfind("\n")
        return None, [
            ((), f"line {line}, column {column}: found a character that no text file has; expected printable text")
        ]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = ", ".join(filter(None, [error.context, error.problem]))
        problem = "found a tab; expected spaces" if "'\\t'" in problem else f"expected YAML: {problem}"
        return None, [((), position + problem)]


class _Reader(yaml.SafeLoader):
    """Limits the expansion of aliases, reports duplicate keys, and accepts only plain values."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.problems: Problems = []
        self.level = 0
        self.left = MOST_VALUES

    def read(self) -> object:
        node = self.get_single_node()
        self.left = MOST_VALUES
        return None if node is None else self._plain(node, ())

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.level += 1
        self._spend(self.level, self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.level -= 1
        return node

    def _spend(self, depth: int, mark: yaml.Mark) -> None:
        self.left -= 1
        if depth > DEEPEST:
            raise yaml.MarkedYAMLError(None, None, f"at most {DEEPEST} levels, and no alias inside its own value", mark)
        if self.left < 0:
            raise yaml.MarkedYAMLError(None, None, f"at most {MOST_VALUES} values, aliases written out", mark)

    def _plain(self, node: yaml.Node, key_path: KeyPath) -> Any:
        self._spend(len(key_path), node.start_mark)
        if node.tag not in TAGS[type(node)]:
            self._note(key_path, node, f"found the tag {node.tag.replace(YAML, '!!')}; expected a plain value")
            return None
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(item, (*key_path, str(position))) for position, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key_path)
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node, key_path)

    def _note(self, key_path: KeyPath, node: yaml.Node, text: str) -> None:
        self.problems.append(
            (key_path, f"{text} (line {node.start_mark.line + 1}, column {node.start_mark.column + 1})")
        )

    def _scalar(self, node: yaml.ScalarNode, key_path: KeyPath) -> object:
        if len(node.value) > LONGEST:
            self._note(key_path, node, f"found {len(node.value)} characters; expected at most {LONGEST}")
        elif node.tag in AS_TEXT:
            return node.value
        elif re.fullmatch(r"[-+]?(0[0-9_]+|[0-9_]+(:[0-9_.]+)+)", node.value):
            self._note(
                key_path, node, f"found {node.value}, which YAML takes for a number in base 8 or 60; expected base 10"
            )
        else:
            try:
                return self.yaml_constructors[node.tag](self, node)
            except (ValueError, KeyError):  # for example `0b_`, or `!!bool 7`
                self._note(key_path, node, f"found {_show(node.value)}; expected {node.tag.removeprefix(YAML)}")
        return None

    def _mapping(self, node: yaml.MappingNode, key_path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = self._plain(key_node, key_path) if isinstance(key_node, yaml.ScalarNode) else None
            value_path = (*key_path, str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?")
            if not isinstance(key, str):
                self._note(
                    value_path, key_node, "found a key that is not text; expected a name, in quotes if necessary"
                )
            elif key in lines:
                self._note(value_path, key_node, f"found again; expected once, and line {lines[key]} has it")
            else:
                lines[key] = key_node.start_mark.line + 1
                values[key] = self._plain(value_node, value_path)
        return values
