"""docs/contract.md, read as tables: every command leaves the files, prints the keys and ends with the codes there."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import PROJECT
from given_predictions import write
from in_process import run

import ensemble_orchestrator as o
from utils import errors

PAGE = (PROJECT / "docs" / "contract.md").read_text()
SMALL = (
    *("--set", "runs.score_ensemble.methods=[soft_voting,weighted]", "--set", "runs.model_soup.enable=false"),
    *(
        "--set",
        "pruning.enable=false",
        "--set",
        "runs.stacking.meta_learners=[lr]",
        "--set",
        "runs.fusion.enable=false",
    ),
    *("--set", "runs.meta_fuser.input_ensembles=[soft_voting,stacking_lr]", "--set", "runs.meta_fuser.fuser_type=mlp"),
    *("--set", "distillation.enable=false", "--set", "exports.enable=false", "--quiet"),
)
LINES = {
    "import-predictions": ("import-predictions", "--from", "{given}"),
    "discover": ("discover",),
    "build-ensemble": ("build-ensemble",),
    "stack": ("stack",),
    "meta-fuse": ("meta-fuse",),
    "evaluate": ("evaluate",),
    "pipeline": ("pipeline",),
    "status": ("status",),
    "clean": ("clean",),
}
"""In this order each finds what it needs; `debug` has tests of its own, and so has what needs images."""


def table(title: str) -> dict[str, list[str]]:
    """{first cell: the others} of the table under a title; a cell in backquotes loses them."""
    part = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
    return {row[0].strip("`"): row[1:] for row in rows[2:]}


def words(cell: str) -> set[str]:
    """What stands in backquotes, one by one."""
    return {word for quoted in re.findall(r"`([^`]+)`", cell) for word in quoted.split(", ")}


COMMANDS = table("Commands")


@pytest.fixture(scope="module")
def run_all(tmp_path_factory) -> tuple[Path, dict]:
    """A workspace of imported members after every command, and what each printed."""
    folder = tmp_path_factory.mktemp("contract")
    write(folder / "given")
    (folder / "w").mkdir()
    found = {}
    for name, line in LINES.items():
        typed = [word.replace("{given}", str(folder / "given")) for word in line]
        before = {path for path in (folder / "w").rglob("*") if path.is_file()}
        done = run(*typed, "--json", *SMALL, workspace=folder / "w")
        found[name] = (done, {path for path in (folder / "w").rglob("*") if path.is_file()} - before)
    return folder / "w", found


def test_every_command_has_a_row():
    assert set(COMMANDS) == set(o.COMMANDS), "docs/contract.md, the table of commands: add a row, or take one away"


@pytest.mark.parametrize("command", LINES)
def test_a_command_keeps_to_its_row(command, run_all):
    workspace, found = run_all
    done, new = found[command]
    assert done.code == 0, done.stderr
    document = json.loads(done.stdout)  # one document and nothing else on stdout
    files, keys = COMMANDS[command]
    assert done.stdout.count("\n") == 1
    assert document["failures"] == []
    expected = words(keys) if words(keys) else {name for name, _, _ in o.PIPELINE} & document.keys()
    assert document.keys() - {"failures", "next"} == expected
    for pattern in words(files):
        assert list(workspace.glob(pattern)), pattern
    if files == "nothing":
        assert {path for path in new if "debug_logs" not in path.parts} == set()


def test_debug_keeps_to_its_row(synthetic, tmp_path):
    shutil.copytree(synthetic, tmp_path / "debug_tmp" / "synthetic")
    done = run("debug", "--section", "discover", "--fast", "--json", "--quiet", workspace=tmp_path)
    assert done.code == 0, done.stderr
    assert done.document.keys() - {"failures"} == words(COMMANDS["debug"][1])
    assert json.loads((tmp_path / "debug_tmp" / "report.json").read_text()).keys() == words(COMMANDS["debug"][1])
    for options, printed in (
        (("--dry-run", "--section", "stack"), {"sandbox", "dry_run", "sections"}),
        (("--section", "reset", "--confirm"), {"removed", "bytes", "folder"}),
    ):
        done = run("debug", *options, "--json", "--quiet", workspace=tmp_path)
        assert done.document.keys() - {"failures"} == printed


def test_exit_codes_are_those_of_the_program():
    stated = {
        int(code): cells[1].strip("`") for code, cells in table("Exit codes").items() if code.isdigit() and cells[1]
    }
    for code, name in stated.items():
        kind = KeyboardInterrupt if name == "KeyboardInterrupt" else getattr(errors, name)
        assert o.exit_code(kind("x")) == code
    assert set(map(int, table("Exit codes"))) == {0, o.BUG, 143, *o.EXIT_CODES.values()}


@pytest.mark.parametrize("pattern", table("Records"))
def test_records_hold_the_keys_of_the_page(pattern, run_all):
    workspace, _ = run_all
    files = [path for path in workspace.glob(pattern) if path.parent.name != "members"]
    assert files
    for path in files:
        assert words(table("Records")[pattern][0]) <= json.loads(path.read_text()).keys(), path
