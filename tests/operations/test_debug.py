"""`debug`: sections in a sandbox, plans that touch nothing, production files that stay as they are."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import foreign_base_back
import pytest
from conftest import PROJECT, run_python
from in_process import run

from ensemble_orchestrator import COMMANDS
from utils import debug_utils
from utils.commands import DEBUG_SECTIONS
from utils.core import locks, subprocesses
from utils.operations import debug_plan, debug_sandbox
from utils.operations.debug_plan import SECTIONS

LATER = {name for name in SECTIONS if debug_plan.missing_commands(SECTIONS[name], COMMANDS)}
"""Sections whose command another version brings."""


def tree(folder: Path, *without: str) -> dict[str, tuple[str, int]]:
    """Every path below a folder with content and time of change, folders too."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] not in without:
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            found[name] = (content, path.stat().st_mtime_ns if path.is_file() else 0)
    return found


def rows(done) -> dict[str, dict]:
    return {row["section"]: row for row in done.document["sections"]}


@pytest.fixture
def own(synthetic, tmp_path) -> Path:
    """A workspace with trained members."""
    return Path(shutil.copytree(synthetic, tmp_path / "workspace"))


@pytest.fixture
def prepared(synthetic, tmp_path) -> Path:
    """A bare workspace whose sandbox was trained before, which a run finds finished."""
    shutil.copytree(synthetic, tmp_path / "bare" / "debug_tmp" / "synthetic")
    return tmp_path / "bare"


def test_a_bare_clone_makes_its_own_zoo_and_writes_into_debug_tmp_alone(tmp_path):
    done = run("debug", "--section", "kfold", "--fast", "--json", workspace=tmp_path)
    assert done.code == 0, done.stderr
    assert {name: row["status"] for name, row in rows(done).items()} == {"discover": "passed", "kfold": "passed"}
    assert [path.name for path in tmp_path.iterdir()] == ["debug_tmp"]
    assert sorted(path.name for path in (tmp_path / "debug_tmp").iterdir()) == [
        "config.yaml",
        "report.json",
        "synthetic",
    ]
    images = list((tmp_path / "debug_tmp" / "synthetic" / "Data").rglob("*.png"))
    assert len(images) == 16
    assert {path.parent.name for path in images} == set(debug_sandbox.CLASSES)
    assert json.loads((tmp_path / "debug_tmp" / "report.json").read_text())["passed"] is True


@pytest.mark.slow  # .ci/run types the same line
def test_all_sections_run_on_the_synthetic_images(tmp_path):
    start = time.monotonic()
    done = run("debug", "--section", "all", "--fast", "--json", workspace=tmp_path)
    assert done.code == (4 if LATER else 0), done.stderr
    assert time.monotonic() - start < 120
    sandbox = tmp_path / "debug_tmp" / "synthetic"
    for name, row in rows(done).items():
        assert row["status"] == ("failed" if name in LATER else "passed"), row
        assert row["seconds"] < 30
        for pattern in SECTIONS[name].outputs if name not in LATER else ():
            assert list(sandbox.glob(pattern)), pattern


def test_a_section_without_its_command_never_passes(prepared, monkeypatch):
    later = dataclasses.replace(SECTIONS["stack"], steps=(("stack-later",),), prerequisites=())
    monkeypatch.setitem(SECTIONS, "stack", later)
    done = run("debug", "--section", "stack", "--fast", "--json", workspace=prepared)
    assert done.code == 4
    assert rows(done)["stack"]["status"] == "failed"
    assert rows(done)["stack"]["failures"] == ["this version has no command stack-later; install a later version"]


def test_beside_trained_members_nothing_of_production_changes(own):
    before = tree(own)
    budget = ("--set", "pruning.cost_budget.max_latency_ms=100000")  # whatever else this machine is doing
    few = ("--set", "runs.score_ensemble.methods=[soft_voting]", "--set", "pruning.methods=[greedy_forward]")
    done = run("debug", "--section", "build_ensemble", "--json", *budget, *few, workspace=own)
    assert done.code == 0, done.stderr
    assert done.document["synthetic"] is False
    assert (own / "debug_tmp" / "workspace" / "ensembles" / "models" / "soft_voting_ensemble").is_dir()
    assert tree(own, "debug_tmp") == before


def test_smoke_loads_the_one_real_member_that_is_asked_for(own):
    done = run("debug", "--section", "smoke", "--arch", "CustomViTHybrid", "--verbose", workspace=own)
    assert done.code == 0, done.stderr
    assert "CustomViTHybrid: logits (2, 2) [" in done.stderr
    assert "CustomConvNeXt: logits" not in done.stderr
    assert "debug: probe smoke" in done.stderr


def test_a_damaged_member_is_named_and_the_section_does_not_pass(own):
    assert run("debug", "--section", "discover", workspace=own).code == 0
    path = own / "checkpoints" / "CustomViTHybrid_final.pth"
    path.write_bytes(path.read_bytes()[:1000])
    done = run("debug", "--section", "smoke", "--json", workspace=own)
    assert done.code == 4
    assert not done.document["passed"]
    assert "CustomViTHybrid" in done.stderr


@pytest.mark.parametrize("name", ["own", "bare"])
def test_a_dry_run_touches_nothing_and_tells_the_plan(name, request, tmp_path):
    folder = request.getfixturevalue("own") if name == "own" else tmp_path / "bare"
    folder.mkdir(exist_ok=True)
    before = tree(folder)
    done = run("debug", "--section", "build_ensemble", "--dry-run", workspace=folder)
    assert done.code == 0, done.stderr
    assert tree(folder) == before
    assert "runs    build-ensemble --workspace" in done.stdout
    assert "ensembles/models/*/ensemble.json" in done.stdout
    assert "MB of memory" in done.stdout
    if name == "own":
        assert f"reads   {folder}/checkpoints/CustomConvNeXt_final.pth" in done.stdout
        assert f"reads   {folder}/kfold_results/CustomConvNeXt_oof_predictions.npz" in done.stdout
        assert "images: train 12, val 2, test 2" in done.stdout
    else:
        assert "creates 16 images in 2 classes" in done.stdout


def test_a_dry_run_in_a_process_of_its_own_makes_no_folder_either(own):
    before = tree(own)
    program = str(PROJECT / "ensemble_orchestrator.py")
    done = run_python(program, "debug", "--dry-run", "--workspace", str(own))
    assert done.returncode == (4 if LATER else 0), done.stderr
    assert tree(own) == before


def test_a_mounted_pipeline_that_makes_folders_makes_none_for_debug(tmp_path):
    mounted = foreign_base_back.build(tmp_path)
    (tmp_path / "w").mkdir()
    program = str(PROJECT / "ensemble_orchestrator.py")
    line = ("debug", "--section", "discover", "--dry-run", "--base-back", str(mounted), "--workspace")
    done = run_python(program, *line, str(tmp_path / "w"))
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "w").iterdir()) == []


def test_a_dry_run_says_what_is_missing(own):
    shutil.rmtree(own / "kfold_results")
    done = run("debug", "--section", "kfold", "--dry-run", workspace=own)
    assert done.code == 4
    assert "no out-of-fold predictions" in done.stderr


def test_reset_needs_confirm_and_then_empties_the_sandbox_alone(own):
    before = tree(own)
    assert run("debug", "--section", "discover", workspace=own).code == 0
    done = run("debug", "--section", "reset", workspace=own)
    assert done.code == 1
    assert "nothing is removed without --confirm" in done.stderr
    assert (own / "debug_tmp" / "workspace").is_dir()
    done = run("debug", "--section", "reset", "--confirm", workspace=own)
    assert done.code == 0, done.stderr
    assert not (own / "debug_tmp").exists()
    assert tree(own) == before


def test_reset_never_goes_through_a_link(own, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (own / "debug_tmp").symlink_to(tmp_path / "precious")
    done = run("debug", "--section", "reset", "--confirm", workspace=own)
    assert done.code == 1
    assert "a symbolic link" in done.stderr
    assert (tmp_path / "precious" / "file").is_file()


def test_a_second_debug_is_refused_by_the_name_of_the_first(own):
    with locks.writer_lock(own / "debug_tmp" / ".lock", "debug"):
        done = run("debug", "--section", "discover", workspace=own)
    assert done.code == 1
    assert f"being written by `debug`, process {os.getpid()}" in done.stderr


def test_an_unknown_backbone_is_a_mistake_of_usage(own):
    done = run("debug", "--section", "smoke", "--arch", "CustomViTHybird", workspace=own)
    assert done.code == 2
    assert "did you mean 'CustomViTHybrid'" in done.stderr
    assert not (own / "debug_tmp").exists()


def test_the_inner_form_is_refused_outside_a_sandbox(own):
    before = tree(own)
    done = run("debug", "--section", "discover", "--inside", workspace=own)
    assert done.code == 2
    assert "is not a sandbox of debug" in done.stderr
    assert tree(own) == before


def test_what_goes_on_from_a_failed_section_is_not_run(own, monkeypatch):
    monkeypatch.setattr(subprocesses, "run_program", lambda *_: (70, "", ["bug: KeyError"]))
    done = run("debug", "--section", "smoke", "--json", workspace=own)
    assert done.code == 4
    found = rows(done)
    assert found["discover"]["failures"] == ["exit code 70: bug: KeyError"]
    assert found["smoke"]["status"] == "not run"


def test_a_section_that_leaves_nothing_does_not_pass(own, monkeypatch):
    place = own / "debug_tmp" / "workspace"
    monkeypatch.setattr(debug_utils, "SECTIONS", {"stack": SECTIONS["stack"]})
    from utils.core.errors import UserError
    from utils.core.results import Result
    from utils.core.workspace import Workspace

    names = ("split_dataset", "checkpoints", "metrics_output", "kfold_results", "deployment_models", "cache", "logs")
    workspace = Workspace(own, *(own / name for name in names), output=place)
    with pytest.raises(UserError, match=r"wrote no ensembles/models/stacking_\*/ensemble.json"):
        debug_utils.run_section(None, workspace, "stack", run=lambda *_: Result("", {}))


def test_what_a_section_needs_is_kept_and_what_it_is_about_is_done_again(tmp_path, monkeypatch):
    from utils.core.results import Result
    from utils.core.workspace import Workspace

    steps = (("build-ensemble",), ("stack",), ("meta-fuse",))
    monkeypatch.setitem(SECTIONS, "meta_fuse", dataclasses.replace(SECTIONS["meta_fuse"], steps=steps, outputs=()))
    forced = []
    workspace = Workspace(tmp_path, *[tmp_path] * 7, output=tmp_path / "debug_tmp" / "workspace")
    debug_utils.run_section(
        None, workspace, "meta_fuse", run=lambda *given: (forced.append((given[0], given[3])), Result("", {}))[1]
    )
    assert forced == [(steps[0], False), (steps[1], False), (steps[2], True)]


def test_every_section_of_the_specification_is_there():
    printed = (
        *("discover", "smoke", "kfold", "extract_embeddings", "build_ensemble", "stack", "fusion_train"),
        *("distill", "recompute_bn", "export"),
    )
    assert set(printed) <= set(DEBUG_SECTIONS)
    assert tuple(SECTIONS) == DEBUG_SECTIONS


def test_messages_of_a_program_are_passed_on_and_its_end_is_told(caplog):
    code = "import sys; print('said'); print('10:00:00 | WARNING | careful', file=sys.stderr); sys.exit(3)"
    assert subprocesses.run_program([sys.executable, "-c", code], dict(os.environ)) == (3, "said\n", ["careful"])
