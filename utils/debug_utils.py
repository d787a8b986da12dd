"""`debug`: runs sections of the system on synthetic data or with the trained members, in `debug_tmp/`.

Each section is a subprocess that runs the production commands in a sandbox below `debug_tmp/`. Status, time and
failures of each section are printed as a table and written to `debug_tmp/report.json`.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import Any

from utils import base_back
from utils.core import caches, locks, subprocesses
from utils.core.artifacts import write_json
from utils.core.config import Config
from utils.core.config_sections import Backbones
from utils.core.errors import ConfigError, UserError, nearest_first
from utils.core.results import Result
from utils.core.workspace import Workspace
from utils.operations import debug_plan, debug_sandbox
from utils.operations.debug_plan import ALL, RESET, SECTIONS
from utils.operations.debug_sandbox import Sandbox
from utils.predictions import catalog

logger = logging.getLogger("disease_pipeline")

PASSED, PARTIAL, FAILED, PLANNED, NOT_RUN = "passed", "partly", "failed", "planned", "not run"
STATUS_OF_EXIT_CODE = {0: PASSED, 4: PARTIAL}


def debug(
    config: Config,
    workspace: Workspace,
    *,
    commands: Container[str],
    section: str = ALL,
    arch: str | None = None,
    fast: bool = False,
    dry_run: bool = False,
    confirm: bool = False,
    verbose: bool = False,
    force: bool = False,
) -> Result:
    """Run sections in a sandbox, or with `dry_run` list what they would do without changing anything.

    `commands` are the names that the command line accepts. Sections that did not pass are failures of the result.
    Raises ConfigError for an unknown `arch`, and UserError for `reset` without `confirm` or if the networks of the
    synthetic workspace cannot be trained.
    """
    if section == RESET:
        return _reset(workspace, confirm=confirm, dry_run=dry_run)
    _require_backbone(arch, workspace)
    sandbox = debug_sandbox.choose_sandbox(workspace, fast=fast, arch=arch)
    if not fast and sandbox.is_synthetic:
        logger.info("%s: no trained members, so debug creates a synthetic workspace", workspace.base)
    names = debug_plan.sections_to_run(section)
    if dry_run:
        return _plan(names, config, workspace, sandbox, commands, arch)
    folder = debug_sandbox.folder_of(workspace)
    rows: list[dict[str, Any]] = []
    with locks.writer_lock(folder / debug_sandbox.LOCK_NAME, "debug"):
        start = time.monotonic()
        settings = folder / "config.yaml"  # JSON is YAML; the values of --set are part of it
        write_json(settings, config.as_dict())
        debug_sandbox.prepare_sandbox(sandbox)
        logger.info("debug: sandbox %s ready after %.1f s", sandbox.folder, time.monotonic() - start)
        for number, name in enumerate(names, start=1):
            failed = next((row["section"] for row in rows if _is_failed_prerequisite(name, row)), None)
            row = _missing_command_row(name, commands) or (
                _row(name, NOT_RUN, 0.0, [f"its prerequisite {failed} did not pass"])
                if failed
                else _run_in_subprocess(name, settings, sandbox, arch, verbose=verbose)
            )
            rows.append(row)
            logger.info("[%d/%d] %s: %s, %.1f s", number, len(names), name, row["status"], row["seconds"])
        report = {
            "sandbox": str(sandbox.folder),
            "synthetic": sandbox.is_synthetic,
            "arch": arch,
            "seconds": round(time.monotonic() - start, 3),
            "passed": all(row["status"] == PASSED for row in rows),
            "sections": rows,
        }
        write_json(folder / "report.json", report)
    text = f"{format_table(rows)}\nwritten: {folder / 'report.json'}"
    failures = [f"{row['section']}: {reason}" for row in rows for reason in row["failures"]]
    return Result(text, report, failures)


def run_section(
    config: Config,
    workspace: Workspace,
    section: str,
    *,
    run: Callable[[Sequence[str], Config, Workspace, bool], Result],
    verbose: bool = False,
) -> Result:
    """Run the steps of one section in the sandbox `workspace`, in the subprocess that `debug` starts.

    `run(line, config, workspace, force)` runs one command line. The last step is the one that the section tests, so it
    is forced; the steps before it build its prerequisites unless they are up to date. Raises UserError if the section
    does not write the files that it lists.
    """
    from utils.operations import debug_probes

    debug_sandbox.require_sandbox(workspace)
    documents: dict[str, Any] = {}
    failures: list[str] = []
    before = _file_states(workspace.root)
    steps = SECTIONS[section].steps
    for step in steps:
        logger.debug("debug: %s", shlex.join(step))
        if step[0] == "probe":
            result: Result = getattr(debug_probes, step[1])(config, workspace, force=True)
        else:
            result = run(step, config, workspace, step is steps[-1])
        for line in result.text.splitlines():
            logger.debug("    %s", line)
        documents[" ".join(step)] = result.document
        failures += result.failures
    after = _file_states(workspace.root)
    written = sorted(path for path, state in after.items() if before.get(path) != state)
    if verbose:
        for path in written:
            logger.debug("    wrote %s", debug_probes.describe_file(path))
    missing = [pattern for pattern in SECTIONS[section].outputs if not any(workspace.root.glob(pattern))]
    if missing:
        raise UserError(
            f"{workspace.root}: the section {section} wrote no {', '.join(missing)}; expected at least one file each. "
            f"Run: python ensemble_orchestrator.py debug --section {section} --verbose"
        )
    return Result(section, {"steps": documents, "written": [str(path) for path in written]}, failures)


def format_table(rows: Iterable[dict[str, Any]]) -> str:
    """Return a table of section, status, seconds and failures."""
    lines = [f"{'section':20}{'status':9}{'seconds':>8}  failures"]
    for row in rows:
        first, *more = row["failures"] or [""]
        lines.append(f"{row['section']:20}{row['status']:9}{row['seconds']:>8.1f}  {first}".rstrip())
        lines += [f"{'':39}{failure}" for failure in more]
    return "\n".join(lines)


def section_overrides(name: str, sandbox: Sandbox, arch: str | None) -> list[str]:
    """Return the configuration values of a section for `--set`; they override the user's."""
    section = SECTIONS[name]
    values = [
        *(debug_sandbox.SYNTHETIC_SETTINGS if sandbox.is_synthetic else ()),
        *section.settings,
        *section.quick_settings,
    ]
    members = [arch] if arch and section.per_member else list(sandbox.backbones)
    if members:
        values += [f"backbones.include=[{','.join(members)}]", "backbones.exclude=[]"]
    return values


def _run_in_subprocess(
    name: str, settings: Path, sandbox: Sandbox, arch: str | None, *, verbose: bool
) -> dict[str, Any]:
    program = str(base_back.PROJECT / "ensemble_orchestrator.py")
    command = [
        *(sys.executable, program, "debug", "--section", name, "--inside", "--json", "--config", str(settings)),
        *sandbox.options,
        *(argument for value in section_overrides(name, sandbox, arch) for argument in ("--set", value)),
        *(["--verbose"] if verbose else []),
    ]
    logger.debug("debug: %s", shlex.join(command))
    start = time.monotonic()
    exit_code, output, last_lines = subprocesses.run_program(command, sandbox.environment())
    seconds = time.monotonic() - start
    try:
        failures = list(json.loads(output)["failures"])
    except (ValueError, KeyError, TypeError):
        failures = []
    status = STATUS_OF_EXIT_CODE.get(exit_code, FAILED)
    if status == FAILED:
        failures = [f"exit code {exit_code}: {last_lines[-1] if last_lines else 'no output'}"]
    return _row(name, status, seconds, failures)


def _row(name: str, status: str, seconds: float, failures: Sequence[str]) -> dict[str, Any]:
    return {"section": name, "status": status, "seconds": round(seconds, 3), "failures": list(failures)}


def _is_failed_prerequisite(name: str, row: dict[str, Any]) -> bool:
    return row["section"] in SECTIONS[name].prerequisites and row["status"] in (FAILED, NOT_RUN)


def _missing_command_row(name: str, commands: Container[str]) -> dict[str, Any] | None:
    missing = debug_plan.missing_commands(SECTIONS[name], commands)
    if not missing:
        return None
    return _row(name, FAILED, 0.0, [f"this version has no command {', '.join(missing)}; install a later version"])


def _plan(
    names: Sequence[str],
    config: Config,
    workspace: Workspace,
    sandbox: Sandbox,
    commands: Container[str],
    arch: str | None,
) -> Result:
    lines, failures = [f"sandbox: {sandbox.folder}"], []
    rows: list[dict[str, Any]] = []
    if sandbox.is_synthetic:
        count = len(debug_sandbox.CLASSES) * debug_sandbox.IMAGES_PER_CLASS
        lines.append(
            f"    creates {count} images in {len(debug_sandbox.CLASSES)} classes and trains "
            f"{', '.join(sandbox.backbones)} for one epoch and two folds: about {debug_sandbox.SECONDS} s, "
            f"{debug_sandbox.MEMORY_MB} MB of memory, {debug_sandbox.MEGABYTES} MB of disk"
        )
    for name in names:
        if sandbox.is_synthetic:
            plan: dict[str, Any] = {"reads": [], "images": {}, "megabytes_read": 0, "missing": []}
            plan |= {"seconds": debug_sandbox.SECONDS / 2, "megabytes_written": 1, "memory_mb": debug_sandbox.MEMORY_MB}
        else:
            plan = debug_plan.plan_section(SECTIONS[name], config, workspace, arch)
        steps = [shlex.join((*step, *sandbox.options)) for step in SECTIONS[name].steps]
        plan |= {"section": name, "status": PLANNED, "steps": steps, "set": section_overrides(name, sandbox, arch)}
        plan["writes"] = [str(sandbox.folder / pattern) for pattern in SECTIONS[name].outputs]
        unavailable = _missing_command_row(name, commands)
        plan["failures"] = [
            *(unavailable["failures"] if unavailable else []),
            *(f"no {what}" for what in plan["missing"]),
        ]
        rows.append(plan)
        lines += debug_plan.format_plan(name, plan, sandbox.folder)
        failures += [f"{name}: {failure}" for failure in plan["failures"]]
    lines.append("nothing was changed")
    return Result("\n".join(lines), {"sandbox": str(sandbox.folder), "dry_run": True, "sections": rows}, failures)


def _reset(workspace: Workspace, *, confirm: bool, dry_run: bool) -> Result:
    folder = debug_sandbox.folder_of(workspace)
    if dry_run:
        text = f"would remove {folder}, {caches.format_bytes(caches.total_size(folder))}\nnothing was changed"
        return Result(text, {"dry_run": True, "folder": str(folder)})
    count, size = debug_sandbox.remove_sandboxes(workspace, confirm=confirm)
    text = f"removed: {count} files, {caches.format_bytes(size)}" if count else f"{folder}: nothing to remove"
    return Result(text, {"removed": count, "bytes": size, "folder": str(folder)})


def _require_backbone(arch: str | None, workspace: Workspace) -> None:
    available = {*Backbones.model_fields["include"].default, *catalog.checkpoint_files(workspace)}
    if arch is not None and arch not in available:
        raise ConfigError(f"--arch {arch}: no such backbone{nearest_first(arch, sorted(available), 'Expected one of')}")


def _file_states(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """Return size, modification time and inode of every file, by which written files are recognised."""
    states = {}
    for entry in caches.walk_files(folder):
        status = os.stat(entry.path)
        states[Path(entry.path)] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return states
