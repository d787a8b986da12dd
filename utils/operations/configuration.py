"""The command `config`: shows the configuration of a workspace with comments, and explains keys by the schema."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.core import config_schema, remembered
from utils.core.artifacts import write_text
from utils.core.config import FILE, Config
from utils.core.config_schema import Key
from utils.core.errors import UserError
from utils.core.remembered import as_flow as as_yaml_value
from utils.core.results import Result
from utils.core.workspace import Workspace

WIDTH = 110
SCHEMA_LINE = "# yaml-language-server: $schema={}"
SCHEMA_FILE = Path(__file__).resolve().parents[2] / "configs" / "schema.json"
EVERYTHING = "every ensemble"
RANKING = "the ranking"
OTHER_EFFECTS: dict[str, tuple[str, ...]] = {
    "backbones": (EVERYTHING, RANKING),
    "seed": (EVERYTHING, RANKING),
    "dataset.group_regex": (EVERYTHING, RANKING),
    "runs.score_ensemble.optimization_metric": ("soups", RANKING),
    "dataset.batch_size": ("soups",),
    "runs.model_soup": ("soups",),
    "runs.snapshot_ensemble": ("snapshot_ensemble",),
    "runs.meta_fuser.enable": ("stacking_*",),  # inputs of a fuser are predicted by the full networks
    "runs.meta_fuser.input_ensembles": ("stacking_*", "meta_fuser"),
    "runs.fusion.end_to_end": ("fusion_*",),
    "runs.fusion.end_to_end_epochs": ("fusion_* that are trained end to end",),
    "distillation": (),
}
"""{key or section: ensembles that depend on it, in addition to the `settings` of combiners}"""


def show(config: Config, workspace: Workspace, *, set: Sequence[str] = (), force: bool = False, **_: Any) -> Result:
    """Print every value with its meaning and origin; with `set`, store these values first.

    `force` has no effect.
    """
    changed: list[str] = []
    if set:
        before = remembered.current(workspace.config)
        changed = [] if before is None else remembered.differences(before, config)
        remembered.write(workspace.config, config)
    origin = remembered.origin_of(workspace.config)
    source = f"{config.source}{f' (from {origin[0]})' if origin and config.source == workspace.config else ''}"
    lines = [f"# {source}", *_yaml_lines(config.as_dict(), config.origins)]
    if set:
        lines = [*changed, f"written: {workspace.config}"]
    document = {"source": str(config.source), "values": config.as_dict(), "origins": dict(config.origins)}
    return Result("\n".join(lines), document | {"changed": changed}, next="status" if changed else None)


def explain(*, explain: str, **_: Any) -> Result:
    """Explain a key or a section: meaning, type, range and default, and what a change makes stale."""
    key = config_schema.find(explain)
    effects = affected(key)
    document = {"key": key.name, "meaning": key.meaning, "type": key.kind, "affects": effects}
    lines = [key.name, *_row("meaning", key.meaning), *_row("type", key.kind)]
    if key.keys:
        keys = [config_schema.find(name) for name in key.keys]
        width = max(len(each.name) for each in keys)
        lines += ["", *(f"  {each.name:{width}}  {each.meaning}" for each in keys)]
        return Result("\n".join(lines), document | {"keys": list(key.keys)})
    lines += [*_row("range", key.range), *_row("default", as_yaml_value(key.default))]
    lines += _row("affects", ", ".join(effects) or "nothing that is built: no result becomes stale")
    return Result("\n".join(lines), document | {"range": key.range, "default": key.default})


def schema(**_: Any) -> Result:
    """The JSON schema, which editors use to complete and check a configuration file."""
    from utils.ensemble_methods import COMBINERS

    document = config_schema.json_schema({"runs.score_ensemble.methods": tuple(COMBINERS)})
    return Result(json.dumps(document, indent=2), document)


def init(*, init: str, **_: Any) -> Result:
    """Write a file with every key, its default and a comment. Raises UserError if the file exists."""
    path = Path(init).expanduser()
    if path.exists():
        raise UserError(f"{path}: there is one already, which stays as it is. Give another name: config --init FILE")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.absolute().parent}. Make it, or give another name")
    write_text(path, "\n".join([*_starter(path), ""]))
    return Result(
        f"written: {path}\nuse it: python ensemble_orchestrator.py build-ensemble --config {path}", {"file": str(path)}
    )


def affected(key: Key) -> list[str]:
    """Ensembles and results that become stale when the value of the key changes."""
    # Imported here, since these import most of the project, which is not needed to report a mistyped key.
    from utils.building import ensembles
    from utils.distillation.student_plan import DIGEST_SETTINGS

    student_keys = (*DIGEST_SETTINGS, "teacher", "student", "unlabeled_dir", "assistant")
    stale = [name for prefix, names in OTHER_EFFECTS.items() if _overlap(key.name, prefix) for name in names]
    if EVERYTHING in stale:
        return list(dict.fromkeys(stale))
    for method, combiner in ensembles.COMBINERS.items():
        if any(_overlap(key.name, setting) for setting in combiner.settings):
            stale.append(ensembles.NAMES.get(method, method))
    if key.name == "distillation" or key.name.removeprefix("distillation.") in student_keys:
        stale.append("the student")
    return list(dict.fromkeys(stale))


def _overlap(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _starter(path: Path) -> Iterator[str]:
    yield SCHEMA_LINE.format(os.path.relpath(SCHEMA_FILE, path.absolute().parent))
    yield "# Every key with its default. Change what you like; a key that you remove keeps its default."
    yield from _yaml_lines(Config().as_dict(), None)


def _yaml_lines(values: Mapping[str, Any], origins: Mapping[str, str] | None) -> Iterator[str]:
    """The configuration as YAML, with the meaning above each key and the origin after each value."""
    for key in config_schema.iterate_keys():
        depth = key.name.count(".")
        indent = "  " * depth
        if depth == 0:
            yield ""
        yield from textwrap.wrap(key.meaning, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        name = key.name.rpartition(".")[2]
        if key.keys:
            yield f"{indent}{name}:"
            continue
        value: Any = values
        for part in key.name.split("."):
            value = value[part]
        line = f"{indent}{name}: {as_yaml_value(value)}"
        yield line if origins is None else f"{line}  # {_origin(origins.get(key.name))}"


def _origin(origin: str | None) -> str:
    if origin is None:
        return "default"
    return "file" if origin == FILE else f"--set {origin}"


def _row(title: str, text: str) -> list[str]:
    if not text:
        return []
    lines = textwrap.wrap(text, WIDTH - 12)
    return [f"  {title:9} {lines[0]}", *(f"{'':12}{line}" for line in lines[1:])]
