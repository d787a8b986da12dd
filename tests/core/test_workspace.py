"""Names of folders, an output of its own, and a workspace that cannot be written."""

from __future__ import annotations

import json
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from bound_process import DEMO, PROGRAM, run_bound
from conftest import run_python

from utils.core.errors import UserError
from utils.core.workspace import Workspace


def settings_of(base: Path, **more: Path) -> SimpleNamespace:
    folders = {
        "SPLIT_DIR": "split_dataset",
        "CKPT_DIR": "checkpoints",
        "METRICS_DIR": "metrics_output",
        "KFOLD_DIR": "kfold_results",
        "DEPLOY_DIR": "deployment_models",
        "DEBUG_LOG_DIR": "debug_logs",
    }
    return SimpleNamespace(BASE_DIR=base, **{key: base / name for key, name in folders.items()}, **more)


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv("DBT_ENSEMBLE_DIR", raising=False)
    monkeypatch.delenv("DBT_IMAGE_CACHE_DIR", raising=False)
    return tmp_path / "base"


def ours(workspace: Workspace) -> list[Path]:
    """Every place that is written to."""
    return [
        *(workspace.ensembles, workspace.catalog, workspace.digests, workspace.lock, workspace.crossfit_folds),
        *(workspace.predictions("A", "val"), workspace.oof("A"), workspace.embeddings("A", "val")),
        *(workspace.embeddings_record("A", "val"), workspace.ensemble("x"), workspace.ensemble_metrics("x", "test")),
        *(workspace.member_metrics("A", "val"), workspace.ranking("test"), workspace.exports),
        *(workspace.image_cache, workspace.log_file),
    ]


def test_without_an_output_everything_lies_in_the_workspace(base):
    workspace = Workspace.from_settings(settings_of(base))
    assert all(path.is_relative_to(base) for path in ours(workspace))
    assert workspace.ranking("val") == base / "metrics_output" / "ensembles" / "ranking_val.json"
    assert workspace.exports == workspace.deployment
    assert replace(workspace, deployment=base / "elsewhere").exports == base / "elsewhere"


@pytest.mark.parametrize("by", ["option", "variable"])
def test_an_output_takes_everything_of_ours_and_nothing_of_the_base(base, tmp_path, monkeypatch, by):
    if by == "variable":
        monkeypatch.setenv("DBT_ENSEMBLE_DIR", str(tmp_path / "out"))
    workspace = Workspace.from_settings(settings_of(base), str(tmp_path / "out") if by == "option" else None)
    assert all(path.is_relative_to(tmp_path / "out") for path in ours(workspace))
    assert workspace.ranking("test") == tmp_path / "out" / "metrics_output" / "ensembles" / "ranking.json"
    read = (workspace.checkpoint("A", "final"), workspace.training_metrics("A"), workspace.base_oof("A"))
    assert all(path.is_relative_to(base) for path in (*read, workspace.split_dir, workspace.deployment))
    assert workspace.relative(base / "checkpoints" / "A_final.pth") == "checkpoints/A_final.pth"
    assert workspace.relative(tmp_path / "out" / "x") == (tmp_path / "out" / "x").as_posix()


def test_the_option_wins_over_the_variable_and_the_workspace_itself_is_no_output(base, tmp_path, monkeypatch):
    monkeypatch.setenv("DBT_ENSEMBLE_DIR", str(tmp_path / "variable"))
    assert Workspace.from_settings(settings_of(base), str(tmp_path / "option")).output == tmp_path / "option"
    assert Workspace.from_settings(settings_of(base), str(base)).output is None
    monkeypatch.chdir(tmp_path)
    assert Workspace.from_settings(settings_of(base), "here").output == tmp_path / "here"


def test_a_cache_that_was_placed_elsewhere_stays_there(base, tmp_path, monkeypatch):
    placed = tmp_path / "big disk"
    monkeypatch.setenv("DBT_IMAGE_CACHE_DIR", str(placed))
    assert (
        Workspace.from_settings(settings_of(base), str(tmp_path / "out")).image_cache == placed
    )  # a foreign BASE-BACK has no setting
    assert Workspace.from_settings(settings_of(base, IMAGE_CACHE_DIR=placed)).image_cache == placed


def test_an_output_that_is_a_file_is_refused(base, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"--output .*file: a file; expected a folder"):
        Workspace.from_settings(settings_of(base), str(tmp_path / "file"))


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_mtime_ns, status.st_size if path.is_file() else 0)
    return found


@pytest.fixture
def read_only(tmp_path, synthetic) -> Path:
    base = Path(shutil.copytree(synthetic, tmp_path / "base"))
    for path in [base, *base.rglob("*")]:
        if path.is_dir():
            path.chmod(0o555)
    yield base
    for path in [base, *base.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)


def test_a_read_only_workspace_is_one_clear_message_and_with_an_output_everything_works(read_only, tmp_path):
    before = snapshot(read_only)
    done = run_bound("discover", workspace=read_only)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert f"{read_only}/ensembles/.lock: cannot be written (Permission denied)" in done.stderr
    assert "--output DIR (or DBT_ENSEMBLE_DIR)" in done.stderr
    done = run_bound("status", workspace=read_only)
    assert done.returncode == 0
    assert done.stderr == ""  # a reader needs nothing to be written
    out = tmp_path / "out"
    done = run_bound("pipeline", "--output", str(out), "--json", workspace=read_only)
    assert done.returncode == 0, done.stderr
    assert "cannot be written" not in done.stderr
    catalog = json.loads((out / "ensembles" / "ensemble_catalog.json").read_text())
    assert catalog["members"]["CustomConvNeXt"]["checkpoints"][0]["path"] == "checkpoints/CustomConvNeXt_final.pth"
    places = ("metrics_output/ensembles/ranking.json", "ensembles/models/soft_voting_ensemble/ensemble.json")
    assert all((out / place).is_file() for place in places)
    assert list((out / "image_cache").glob("*.npz"))
    assert (out / "debug_logs" / "ensemble_orchestrator.log").is_file()
    assert sorted(path.name for path in out.iterdir()) == ["debug_logs", "ensembles", "image_cache", "metrics_output"]
    assert snapshot(read_only) == before
    assert not stat.S_IMODE(read_only.stat().st_mode) & 0o200


def test_an_output_in_somebody_else_s_workspace_gives_the_same_bytes(built, tmp_path, orchestrator):
    before = snapshot(built)
    done = orchestrator("pipeline", *DEMO, "--output", str(tmp_path / "out"), workspace=built)
    assert done.returncode == 0, done.stderr
    assert snapshot(built) == before
    for path in (built / "ensembles" / "models").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "out" / path.relative_to(built)).read_bytes(), path
    done = orchestrator("status", *DEMO, "--json", "--output", str(tmp_path / "out"), workspace=built)
    assert json.loads(done.stdout)["output"] == str(tmp_path / "out")


def test_a_file_in_the_place_of_a_folder_is_named(trained, tmp_path):
    (tmp_path / "file").write_text("x")
    place = tmp_path / "file" / "below"
    done = run_python(PROGRAM, "discover", "--workspace", str(trained), "--output", str(place))
    assert done.returncode == 1
    assert f"{place}/ensembles/.lock: cannot be written (Not a directory)" in done.stderr
    assert "Expected every parent of it to be a folder" in done.stderr


def test_empty_splits_are_no_images(tmp_path):
    workspace = Workspace(tmp_path, *(tmp_path / name for name in ("split", *"bcdefg")))
    assert not workspace.has_images
    (tmp_path / "split" / "train" / ".hidden").mkdir(parents=True)
    (tmp_path / "split" / "val").mkdir()
    assert not workspace.has_images
    (tmp_path / "split" / "val" / "ant").mkdir()
    assert workspace.has_images
