"""Plans of the sections of `debug`, from file sizes alone."""

from __future__ import annotations

import pytest

from utils.core.config import Config
from utils.core.workspace import SPLITS, Workspace
from utils.operations import debug_plan
from utils.operations.debug_plan import SECTIONS

BACKBONE = Config().backbones.selected[0]


@pytest.fixture
def workspace(tmp_path):
    """One checkpoint of 3 MB and two images in each split."""
    names = ("split_dataset", "checkpoints", "metrics_output", "kfold_results", "deployment_models", "cache", "logs")
    workspace = Workspace(tmp_path, *(tmp_path / name for name in names))
    workspace.checkpoints.mkdir()
    (workspace.checkpoints / f"{BACKBONE}_final.pth").write_bytes(b"0" * 3_000_000)
    for split in SPLITS:
        (workspace.split_dir / split / "a").mkdir(parents=True)
        for number in range(2):
            (workspace.split_dir / split / "a" / f"{number}.png").touch()
    return workspace


def test_a_section_runs_after_its_prerequisites():
    assert debug_plan.sections_to_run("all") == list(SECTIONS)
    assert debug_plan.sections_to_run("discover") == ["discover"]
    assert debug_plan.sections_to_run("stack") == ["discover", "stack"]


def test_commands_that_a_version_lacks_are_named():
    assert debug_plan.missing_commands(SECTIONS["smoke"], ()) == []  # a probe is no command
    assert debug_plan.missing_commands(SECTIONS["meta_fuse"], ("build-ensemble", "stack")) == ["meta-fuse"]


def test_a_plan_lists_files_and_costs(workspace):
    plan = debug_plan.plan_section(SECTIONS["smoke"], Config(), workspace, None)
    assert [item["bytes"] for item in plan["reads"]] == [3_000_000]
    assert (plan["megabytes_read"], plan["missing"]) == (3.0, [])
    assert plan["images"] == dict.fromkeys(SPLITS, 2)
    assert plan["seconds"] > 0
    training = debug_plan.plan_section(SECTIONS["fusion_train"], Config(), workspace, None)
    assert training["memory_mb"] == pytest.approx(plan["memory_mb"] + 2 * 3.0)  # gradients and moments of the weights


def test_a_plan_names_what_is_missing(workspace):
    other = debug_plan.plan_section(SECTIONS["smoke"], Config(), workspace, "Another")
    assert "Another" in other["missing"][0]
    folds = debug_plan.plan_section(SECTIONS["kfold"], Config(), workspace, None)
    assert "out-of-fold" in folds["missing"][0]
    for path in (workspace.split_dir / "val").rglob("*.png"):
        path.unlink()
    assert (
        str(workspace.split_dir / "val")
        in debug_plan.plan_section(SECTIONS["smoke"], Config(), workspace, None)["missing"][0]
    )


def test_a_long_list_of_files_is_shortened(workspace, tmp_path):
    plan = debug_plan.plan_section(SECTIONS["smoke"], Config(), workspace, None)
    plan |= {"steps": ["probe smoke"], "reads": [{"path": str(number), "bytes": 1} for number in range(20)]}
    lines = list(debug_plan.format_plan("smoke", plan, tmp_path))
    assert sum(line.startswith("    reads   ") for line in lines) == debug_plan.MAX_FILES_LISTED + 2
    assert "    reads   8 more files" in lines
