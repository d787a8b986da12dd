"""What may be broken, and what each command then says: the exit code, the file, the value, the remedy.

Every row of the table is a run of the command line in this process, in a workspace of its own.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import spoiling as s
from fault_table import FAULTS, STACK, VOTES, Fault
from given_predictions import write
from in_process import Done, run


@pytest.fixture(scope="module")
def templates(synthetic, short_paths, few_folds, tmp_path_factory) -> dict[str, Path]:
    """The four workspaces, each made once."""
    folder = tmp_path_factory.mktemp("templates")
    (folder / "empty").mkdir()
    not_read = shutil.ignore_patterns("Data", "*_snapshot?.pth", "*_best.pth")
    shutil.copytree(synthetic, folder / "trained", ignore=not_read)
    shutil.copytree(synthetic, folder / "ready", ignore=not_read)
    for line in (("discover", *VOTES), ("build-ensemble", *VOTES), ("stack", *VOTES, *STACK), ("evaluate", *VOTES)):
        done = run(*line, workspace=folder / "ready")
        assert done.code == 0, done.stderr
    write(folder / "given")
    (folder / "imported").mkdir()
    done = run("import-predictions", "--from", folder / "given", workspace=folder / "imported")
    assert done.code == 0, done.stderr
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module", autouse=True)
def count():
    """The figure that docs/reliability.md quotes."""
    yield
    print(f"\nfaults: {len(FAULTS)} rows")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_fault_ends_as_the_table_says(fault, templates, tmp_path):
    folder = Path(shutil.copytree(templates[fault.base], tmp_path / "w"))
    fault.spoil(folder)
    command = tuple(word.replace("{folder}", str(folder)) for word in fault.command)
    done = run(*command, workspace=None if "--workspace" in command else folder)
    judge(done, fault)
    assert not list(tmp_path.rglob(s.CANARY)), "something of the data was run"
    assert not list(folder.rglob(".*partial*"))
    assert [path.name for path in tmp_path.iterdir()] == ["w"], "something was written outside the workspace"


def judge(done: Done, fault: Fault) -> None:
    output = done.stdout + done.stderr
    assert done.code == fault.code, f"code {done.code}: {done.stderr[-900:]}"
    assert "Traceback" not in output
    for word in fault.words:
        assert word in output, f"{word!r} is not in: {done.stderr[-900:]}"


def test_the_table_is_long_enough_and_tells_its_rows_apart():
    assert len(FAULTS) >= 60
    assert len({(fault.what, fault.command[0]) for fault in FAULTS}) == len(FAULTS)
