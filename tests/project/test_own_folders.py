"""The guard of the project's folder: what a test or its program writes there fails, other programs do not matter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import PROJECT, run_python
from own_folders import WrittenIntoProject, kept_clean


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "project"
    (folder / "inside").mkdir(parents=True)
    (folder / "file").touch()
    with kept_clean(folder):
        yield folder


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: (folder / "new").write_text("x"),
        lambda folder: (folder / "file").open("r+b"),
        lambda folder: (folder / "inside" / "new").mkdir(),
        lambda folder: os.open(folder / "new", os.O_CREAT | os.O_WRONLY),
        lambda folder: (folder.parent / "elsewhere").rename(folder / "new"),
        lambda folder: (folder / "new").symlink_to(folder.parent),
        lambda folder: os.link(folder.parent / "elsewhere", folder / "new"),
    ],
    ids=["file", "old file", "folder", "os.open", "rename", "symbolic link", "hard link"],
)
def test_what_is_written_into_the_project_fails_where_it_is_written(project, write):
    (project.parent / "elsewhere").touch()
    with pytest.raises(WrittenIntoProject, match=str(project)):
        write(project)
    assert sorted(path.name for path in project.rglob("*")) == ["file", "inside"]


def test_reading_and_the_caches_of_tools_are_free(project, monkeypatch):
    monkeypatch.chdir(project)
    assert (project / "file").read_bytes() == b""
    (project / "inside" / "__pycache__").mkdir()
    (project / "inside" / "__pycache__" / "a.pyc").write_bytes(b"")
    with pytest.raises(WrittenIntoProject):
        open("relative", "w")  # noqa: SIM115


def test_other_programs_may_write_there_while_tests_run(project):
    subprocess.run(["mkdir", str(project / "Data")], check=True)
    subprocess.run([sys.executable, "-c", "open('debug_logs', 'w')"], cwd=project, check=True)
    assert sorted(path.name for path in project.iterdir()) == ["Data", "debug_logs", "file", "inside"]


def test_a_program_of_a_test_is_watched_too(tmp_path):
    new = PROJECT / "written-by-a-test"
    program = tmp_path / "program.py"
    program.write_text(f"open({str(new)!r}, 'w')\n")
    try:
        done = run_python(str(program))
        assert done.returncode == 1
        assert f"{new}: a test may write into folders of its own only" in done.stderr
        assert not new.exists()
    finally:
        new.unlink(missing_ok=True)
