"""A workspace whose votes have two members instead of three: a trace of the third took half of an export's time."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import made_once
from finished_workspace import run

MEMBERS = ("CustomResNetMish", "CustomViTHybrid")
FEWER = ("--set", f"backbones.include=[{','.join(MEMBERS)}]")
LEFT_OUT = ("*_fold?.pth", "*_snapshot?.pth", "*_best.pth", "deployment_models", "models", "*_ensemble", "ranking.*")
"""Networks of single folds and epochs, the base pipeline's exports, and what was made of three members."""


@pytest.fixture(scope="session")
def two_members(tmp_path_factory: pytest.TempPathFactory, built: Path) -> Path:
    """`built` with soft and hard voting of two members, evaluated. Shared: read it, never write into it."""

    def make(workspace: Path) -> None:
        shutil.copytree(built, workspace, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
        votes = (*FEWER, "--set", "runs.score_ensemble.methods=[soft_voting,hard_voting]")
        for line in (("build-ensemble", *votes), ("evaluate", *FEWER)):
            done = run(workspace, *line)
            assert done.code == 0, done.stderr

    return made_once(tmp_path_factory, "two_members", make)
