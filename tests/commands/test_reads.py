"""Each command reads a record, and opens an array, at most once in a process."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
from conftest import PROJECT
from file_reads import counted_reads
from given_predictions import empty_workspace, take_in, write

from utils.building import build_commands
from utils.building.meta_builder import meta_fuse
from utils.building.stacking_builder import stack
from utils.core import parsed_files
from utils.core.config import Config
from utils.core.config_file import load_config
from utils.core.workspace import Workspace
from utils.operations import upkeep

pytestmark = pytest.mark.usefixtures("few_fits")

ON = (
    "runs.stacking.enable=true",
    "runs.stacking.meta_learners=[lr]",
    "runs.meta_fuser.enable=true",
    "runs.meta_fuser.fuser_type=xgb",
    "runs.stacking.xgb_config.n_estimators=3",
    "runs.meta_fuser.input_ensembles=[soft_voting,stacking_lr]",
    "pruning.enable=true",
)
"""Sections that need no network."""


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(PROJECT / "configs" / "votes.yaml", overrides=ON)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, config) -> Workspace:
    """Imported predictions with everything of the configuration built. Shared: read it, never write into it."""
    workspace = empty_workspace(tmp_path_factory.mktemp("finished") / "base")
    take_in(workspace, write(tmp_path_factory.mktemp("given")))
    build_commands.build_ensemble(config, workspace)
    stack(config, workspace)
    meta_fuse(config, workspace)
    return workspace


@pytest.fixture
def own(finished, tmp_path) -> Workspace:
    return empty_workspace(Path(shutil.copytree(finished.base, tmp_path / "base")))


@pytest.fixture(autouse=True)
def new_process():
    """Records that earlier commands of this process have parsed are forgotten."""
    parsed_files.forget()


def repeated(counter: Counter[Path]) -> dict[str, int]:
    return {path.name if len(path.parts) < 2 else "/".join(path.parts[-3:]): n for path, n in counter.items() if n > 1}


COMMANDS = {
    "build-ensemble": build_commands.build_ensemble,
    "stack": stack,
    "meta-fuse": meta_fuse,
    "status": upkeep.status,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_up_to_date_is_read_once(command, finished, config):
    with counted_reads() as counter:
        COMMANDS[command](config, finished)
    assert counter
    assert repeated(counter) == {}


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "status"])
def test_what_a_build_takes_is_read_once(command, own, config):
    with counted_reads() as counter:
        result = COMMANDS[command](config, own, force=True)
    assert result.document["built"]
    inputs = Counter({path: n for path, n in counter.items() if "models" not in path.parts})
    assert repeated(inputs) == {}


def test_the_counter_counts_a_second_read(own):
    from utils.core.artifacts import read_record

    with counted_reads() as counter:
        for _ in range(2):
            read_record(own.catalog, remedy="")
    assert counter[own.catalog] == 2
