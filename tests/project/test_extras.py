"""`make test-extras`: when its tests are due, and what counts as passed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from datetime import date

import pytest
from conftest import PROJECT


@pytest.fixture(scope="module")
def extras():
    spec = importlib.util.spec_from_file_location("extras_run", PROJECT / "tests" / "extras" / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def one(extras, tmp_path, monkeypatch):
    """An extra whose tests pass, in a folder of its own, and the names of those that ran."""
    (tmp_path / "code.py").write_text("1")
    ran = []
    extra = extras.Extra((), sys.executable, (), ("code.py",))
    monkeypatch.setattr(extras, "EXTRAS", {"one": extra})
    monkeypatch.setattr(extras, "PASSED", tmp_path / "passed.json")
    monkeypatch.setattr(extras, "passes", lambda extra: ran.append(extra) or True)
    plain = extras.state
    monkeypatch.setattr(extras, "state", lambda extra: plain(extra, tmp_path, date(2026, 11, 30)))
    return tmp_path, ran


def test_they_are_due_until_they_pass_and_again_when_a_source_changes(extras, one):
    folder, ran = one
    assert [extras.main(["--due"]) for _ in range(2)] == [0, 0]
    assert len(ran) == 1
    (folder / "code.py").write_text("2")
    extras.main(["--due"])
    assert len(ran) == 2
    extras.main([])
    assert len(ran) == 3


def test_a_week_makes_them_due(extras, tmp_path):
    (tmp_path / "code.py").write_text("1")
    extra = extras.Extra((), sys.executable, (), ("code.py",))
    sunday, monday = (extras.state(extra, tmp_path, date(2026, 12, day)) for day in (6, 7))
    assert (sunday["week"], monday["week"]) == ("2026-W49", "2026-W50")
    assert sunday["sources"] == monday["sources"]


def test_what_fails_is_named_and_not_recorded(extras, one, monkeypatch, capsys):
    folder, _ = one
    monkeypatch.setattr(extras, "passes", lambda extra: False)
    assert extras.main([]) == 1
    assert "make test-extras ARGS=one" in capsys.readouterr().err
    assert not (folder / "passed.json").exists()


@pytest.mark.parametrize(
    ("body", "expected"),
    [("assert True", True), ("assert False", False), ("pytest.skip('no package')", False), (None, False)],
)
def test_a_test_that_is_skipped_or_missing_has_not_passed(extras, tmp_path, body, expected):
    test = f"import pytest\n\ndef test_it():\n    {body}\n" if body else ""
    (tmp_path / "test_it.py").write_text(test)
    results = tmp_path / "results.xml"
    call = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "--rootdir", str(tmp_path), "-c", "/dev/null"]
    done = subprocess.run([*call, f"--junitxml={results}", str(tmp_path)], capture_output=True, check=False)
    assert (done.returncode == 0 and extras.none_skipped(results)) is expected


def test_a_source_that_has_moved_is_an_error(extras):
    with pytest.raises(SystemExit, match=r"no file utils/gone\.py"):
        extras.state(replace(extras.EXTRAS["ray"], sources=("utils/gone.py",)))


def test_every_source_is_there_and_every_test_of_ray_is_run(extras):
    for extra in extras.EXTRAS.values():
        extras.state(extra)
    with_ray = {
        path.relative_to(PROJECT).as_posix()
        for path in (PROJECT / "tests").rglob("test_*.py")
        if "@needs_ray" in path.read_text(encoding="utf-8") and path.name != "test_extras.py"
    }
    assert with_ray == {word for word in extras.EXTRAS["ray"].tests if word.endswith(".py")}
    assert extras.requirements("ray")[0].startswith("ray")


def test_what_is_recorded_names_the_extras(extras):
    assert json.loads(extras.PASSED.read_text(encoding="utf-8")).keys() == extras.EXTRAS.keys()
