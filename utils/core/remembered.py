"""The stored configuration of a workspace: which configuration a command uses, and what building commands store.

`ensembles/config.yaml` has every value, and under `provenance` the origin of each. A command without `--config` uses
it, or the default file if there is none. Building commands write it:

    first build of a workspace      the file and every `--set`
    `--config FILE`, FILE differs   only FILE, completely
    otherwise                       nothing changes; a `--set` is recorded with the results of the command

`config --set` changes the stored configuration. Differences from it are logged in one line.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from utils.core.artifacts import write_text
from utils.core.config import Config, of_workspace
from utils.core.config_file import PROVENANCE, find_config, leaves, load_config, read_provenance, with_overrides
from utils.core.display_text import first_names
from utils.core.errors import ConfigError, UserError
from utils.core.links import remove_file
from utils.core.workspace import Workspace

DEFAULT = "configs/ensemble_config.yaml"
SHOWN = 4  # differences in one line
HEADER = """\
# What this workspace was built with; commands without --config use it.
# To change it: python ensemble_orchestrator.py config --set KEY=VALUE; to replace it: --config FILE with a build.
"""
logger = logging.getLogger("disease_pipeline")
Names = Mapping[str, Collection[str]]


@dataclass(frozen=True)
class Choice:
    """The configuration of one command, and the configuration that its workspace stores after a build."""

    config: Config
    kept: Config
    before: Config | None
    """The configuration stored before; None if there was no readable one."""

    @property
    def changes_memory(self) -> bool:
        """Whether a build changes the stored configuration."""
        return self.before is None or self.kept is not self.before


def choose(
    path: Path,
    *,
    file: str | None,
    overrides: Sequence[str] = (),
    device: str | None = None,
    project: Path,
    names: Names,
    builds: bool,
    logs_differences: bool = True,
) -> Choice:
    """Determine the configuration of a command in a workspace that stores its configuration at `path`.

    `file` and `overrides` are those of the command line; `device` applies only to this command. Differences are
    logged if `logs_differences`. Raises ConfigError that lists all problems.
    """
    before = _read(path, names, is_used=file is None)
    from_file = find_config(file or DEFAULT, project) if file is not None or before is None else path
    sets = list(overrides)
    if before is not None and file is None and not sets:
        requested = before
    else:
        requested = load_config(from_file, overrides=sets, names=names)
    config = load_config(from_file, overrides=[*sets, f"device={device}"], names=names) if device else requested
    if before is None:
        return Choice(config, requested, None)
    if file is None:
        stored, unremembered = before, sets
    elif not differences(before, requested):  # for example, the same command again
        stored, unremembered = before, []
    else:
        plain = load_config(from_file, names=names)
        stored, unremembered = (plain if differences(before, plain) else before), sets
    if logs_differences:
        _log_differences(before, requested, stored, file, sets, builds=builds)
    if logs_differences and file is None:
        _log_changed_file(path, project)
    configuration = of_workspace(
        config,
        overrides=unremembered,
        recorded=[line for line in unremembered if differences(stored, with_overrides(stored, [line]))],
        is_remembered=file is None,
    )
    return Choice(configuration, stored, before)


def differences(one: Config, other: Config) -> list[str]:
    """`key: value -> value` of each value that differs."""
    values = dict(leaves(other.as_dict()))
    return [
        f"{key}: {_show(value)} -> {_show(values[key])}" for key, value in leaves(one.as_dict()) if values[key] != value
    ]


@contextmanager
def kept_by_build(workspace: Workspace, choice: Choice) -> Iterator[None]:
    """Store the configuration of a build; if it fails before building anything, restore the previous state."""
    path = workspace.config
    if not choice.changes_memory:
        yield
        return
    previous, built = path.read_text(encoding="utf-8") if path.is_file() else None, _built(workspace)
    write(path, choice.kept)
    try:
        yield
    except (UserError, ConfigError):
        if _built(workspace) == built:
            if previous is None:
                remove_file(path)
                with suppress(OSError):  # not empty
                    path.parent.rmdir()
            else:
                write_text(path, previous)
        raise
    if choice.before is None:
        logger.info("configuration: remembered in %s; later commands in this workspace use it", path)


def _built(workspace: Workspace) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in workspace.models.glob("*/ensemble.json")}


def write(path: Path, config: Config) -> None:
    """Write a configuration as the stored one, with its provenance."""
    write_text(path, HEADER + as_yaml(config.as_dict() | {PROVENANCE: _provenance(config)}))


def as_yaml(values: Mapping[str, Any]) -> str:
    """YAML in the format of the configuration's reader; short lists on one line."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)


def as_flow(value: Any) -> str:
    """One value as YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.strip().removesuffix("\n...").strip()


def current(path: Path) -> Config | None:
    """The configuration stored at `path`; None if there is none. Raises ConfigError for a damaged file."""
    return load_config(path) if path.is_file() else None


def is_used(path: Path, config: Config) -> bool:
    """Whether a command without `--config` and `--set` uses these values, except for the device."""
    if not path.is_file():
        return False
    try:
        remembered = load_config(path)
    except ConfigError:
        return False
    return all(line.startswith("device: ") for line in differences(remembered, config))


def origin_of(path: Path) -> tuple[str, str] | None:
    """(file, its SHA-256) that a stored configuration came from; None if it is not recorded."""
    provenance = read_provenance(path)
    file, digest = provenance.get("file"), provenance.get("sha256")
    return (file, digest) if isinstance(file, str) and isinstance(digest, str) else None


def _provenance(config: Config) -> dict[str, Any]:
    origin = origin_of(config.source)
    file, digest = origin or (str(config.source), _digest(config.source))
    return {"file": file, "sha256": digest, "keys": dict(sorted(config.origins.items()))}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _read(path: Path, names: Names, *, is_used: bool) -> Config | None:
    """Read the stored configuration. Raises ConfigError for a damaged file that the command would use."""
    if not path.is_file():
        return None
    try:
        return load_config(path, names=names)
    except ConfigError as error:
        if is_used:
            raise ConfigError(
                f"{error}\nThis is the configuration that the workspace remembers. Give another: --config FILE, "
                f"which a building command remembers in its place; or remove {path}"
            ) from error
        logger.warning("%s; the remembered configuration is not compared", error)
        return None


def _log_differences(
    before: Config, requested: Config, stored: Config, file: str | None, sets: Sequence[str], *, builds: bool
) -> None:
    """Log in one line the differences from the stored configuration."""
    changed = differences(before, requested)
    if not changed:
        return
    differences_text = first_names(changed, SHOWN, "; ")
    if file is None:
        use = "for this command" + (", and recorded with what it builds" if builds else "")
        how = f"--set {use}; to remember it: config --set {' --set '.join(sets)}"
    elif stored is before:
        how = f"--set, {'recorded with what this command builds' if builds else 'for this command alone'}"
    else:
        how = f"{file} {'replaces the remembered one' if builds else 'for this command alone'}"
    logger.info("configuration: %s (%s)", how, differences_text)


def _log_changed_file(path: Path, project: Path) -> None:
    """Log that the file from which the stored configuration came has changed."""
    origin = origin_of(path)
    if origin is None:
        return
    file, digest = origin
    try:
        current = find_config(file, project)
    except ConfigError:  # the file no longer exists, which does not affect the stored configuration
        return
    if _digest(current) != digest:
        logger.info(
            "configuration: %s has changed since the workspace remembered it; to use it: --config %s", file, file
        )


def _show(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_show, value))}]"
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )
