"""Sandboxes of `debug`: where they are, what reaches them, and their removal."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from utils.core.errors import ConfigError, UserError
from utils.core.workspace import Workspace
from utils.operations import debug_sandbox
from utils.operations.debug_sandbox import BACKBONES, CLASSES, IMAGES_PER_CLASS, Sandbox


@pytest.fixture
def workspace(tmp_path):
    names = ("split_dataset", "checkpoints", "metrics_output", "kfold_results", "deployment_models", "cache", "logs")
    return Workspace(tmp_path, *(tmp_path / name for name in names))


def test_the_user_s_variables_do_not_reach_the_synthetic_workspace(monkeypatch, tmp_path):
    monkeypatch.setenv("DBT_SPLIT_DIR", "/elsewhere")
    monkeypatch.setenv("BASE_BACK_DIR", "/elsewhere")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    environment = Sandbox(tmp_path, True, (), ()).environment()
    assert not {name for name in environment if name.startswith("DBT_") or name == "BASE_BACK_DIR"}
    assert environment["OMP_NUM_THREADS"] == "1"  # more threads than cores wait for one another
    assert Sandbox(tmp_path, False, (), ()).environment() == dict(os.environ)


def test_trained_members_are_used_unless_fast_is_asked_for(workspace):
    assert debug_sandbox.choose_sandbox(workspace, fast=False, arch=None).is_synthetic
    workspace.checkpoints.mkdir()
    (workspace.checkpoints / "A_final.pth").touch()
    sandbox = debug_sandbox.choose_sandbox(workspace, fast=False, arch=None)
    assert not sandbox.is_synthetic
    assert sandbox.options == ("--workspace", str(workspace.base), "--output", str(sandbox.folder))
    fast = debug_sandbox.choose_sandbox(workspace, fast=True, arch="Another")
    assert fast.is_synthetic
    assert set(fast.backbones) == {*BACKBONES, "Another"}
    assert fast.folder.parent == sandbox.folder.parent == workspace.root / debug_sandbox.FOLDER_NAME


def test_a_section_refuses_to_run_outside_a_sandbox(workspace, tmp_path):
    with pytest.raises(ConfigError, match="not a sandbox"):
        debug_sandbox.require_sandbox(workspace)
    inside = tmp_path / debug_sandbox.FOLDER_NAME / "workspace"
    debug_sandbox.require_sandbox(Workspace(inside, *(inside / str(number) for number in range(7))))


def test_synthetic_images_are_the_same_each_time_and_existing_ones_are_kept(tmp_path):
    for name in ("one", "two"):
        debug_sandbox.write_images(tmp_path / name)
    files = sorted((tmp_path / "one").rglob("*.png"))
    assert len(files) == len(CLASSES) * IMAGES_PER_CLASS
    for file in files:
        assert file.read_bytes() == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes()
    bright, dark = (np.asarray(Image.open(tmp_path / "one" / name / "0.png")) for name in CLASSES)
    assert bright.min() > dark.max()
    files[0].write_bytes(b"mine")
    debug_sandbox.write_images(tmp_path / "one")
    assert files[0].read_bytes() == b"mine"


def test_reset_removes_everything_after_a_confirmation(workspace, tmp_path):
    folder = debug_sandbox.folder_of(workspace)
    (folder / "synthetic").mkdir(parents=True)
    (folder / "synthetic" / "file").write_bytes(b"123")
    with pytest.raises(UserError, match="--confirm"):
        debug_sandbox.remove_sandboxes(workspace, confirm=False)
    assert (folder / "synthetic" / "file").exists()
    assert debug_sandbox.remove_sandboxes(workspace, confirm=True) == (1, 3)
    assert not folder.exists()
    assert debug_sandbox.remove_sandboxes(workspace, confirm=True) == (0, 0)


def test_reset_does_not_follow_a_link(workspace, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    debug_sandbox.folder_of(workspace).symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="symbolic link"):
        debug_sandbox.remove_sandboxes(workspace, confirm=True)
    assert (tmp_path / "precious" / "file").exists()
