"""Cyclic training of the base pipeline: its schedule, what each cycle leaves, what it takes from trained networks."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import foreign_base_back
import numpy as np
import pytest
import torch
from conftest import PROJECT, ZOO_OPTIONS, run_python
from killing import digests, run_and_kill_repeatedly

from config import settings
from training.pipeline import write_checkpoint
from training.recipe import Recipe
from training.snapshots import create_cyclic_scheduler, cyclic_share, snapshot_phase, snapshot_unit

NAME = "CustomResNetMish"
CYCLES = ("--backbones", NAME, "--stages", "snapshots", "--snapshots", "2", "--epochs-per-cycle", "2")
ENVIRONMENT = {"DBT_AUGMENT": "full", "DBT_PROGRESS_SECONDS": "0"}  # trained with no_flip, which has to win


@pytest.fixture(scope="module")
def cycled(trained, tmp_path_factory, base_main) -> Path:
    """A copy of the trained workspace with two snapshots of one backbone. Shared: read it, never write into it."""
    workspace = tmp_path_factory.mktemp("cycled")
    shutil.copytree(trained, workspace, dirs_exist_ok=True)
    done = base_main(*CYCLES, workspace=workspace, environment=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert f"{NAME} cycles epoch 2/4" in done.stderr
    assert "at most" in done.stderr
    assert f"[1/1] {NAME} snapshots: val accuracies " in done.stderr
    return workspace


def opened(workspace: Path, role: str) -> dict:
    return torch.load(workspace / "checkpoints" / f"{NAME}_{role}.pth", weights_only=True)


def test_the_rate_falls_by_half_a_cosine_in_each_cycle():
    """(1 + cos(pi k / 4)) / 2 for k = 0..3, again and again; a fresh network first rises in a line."""
    half = np.sqrt(0.5)
    cycle = [1, (1 + half) / 2, 0.5, (1 - half) / 2]
    np.testing.assert_allclose([cyclic_share(step, 4) for step in range(8)], [*cycle, *cycle], atol=1e-12)
    warm = [cyclic_share(step, 4, warm_up=2) for step in range(8)]
    np.testing.assert_allclose(warm, [0.5, 1, 0.5, (1 - half) / 2, *cycle], atol=1e-12)


def test_the_scheduler_starts_each_cycle_at_the_peak_and_keeps_the_optimizer():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    scheduler = create_cyclic_scheduler(optimizer, 4, 3, NAME, cycles=2)  # two cycles of six steps, one step of warm-up
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = [0.1 * (1 + np.cos(np.pi * step / 6)) for step in range(6)]
    np.testing.assert_allclose(rates, [0.2, *expected[1:], *expected], atol=1e-12)


def recipe(**changes: object) -> Recipe:
    return replace(Recipe.from_settings(NAME, ["0", "1"], "split"), **changes)


def test_the_training_is_one_phase_that_keeps_the_end_of_each_cycle(monkeypatch, tmp_path):
    monkeypatch.setattr(settings, "TRAINED_DIR", tmp_path)
    monkeypatch.setattr(settings, "CKPT_DIR", tmp_path)
    monkeypatch.setattr(settings, "CYCLES", 3)
    monkeypatch.setattr(settings, "EPOCHS_PER_CYCLE", 4)
    unit = snapshot_unit(recipe())
    phase = snapshot_phase(unit.recipe)
    assert (phase.epochs, phase.every, phase.kept) == (12, 4, 3)
    assert phase.rate == 2.5 * settings.BACKBONE_LR
    # What has no part in it is no reason to do it again; what has, is.
    assert snapshot_unit(recipe(epochs_head=9, head_lr=0.5)).digest == unit.digest
    assert snapshot_unit(recipe(seed=7)).digest != unit.digest
    monkeypatch.setattr(settings, "EPOCHS_PER_CYCLE", 6)
    assert snapshot_unit(recipe()).digest != unit.digest


def test_a_new_network_is_like_the_trained_one_else_like_most_else_as_the_settings_say(monkeypatch, tmp_path):
    monkeypatch.setattr(settings, "TRAINED_DIR", tmp_path)

    def trained(name: str, role: str, size: str, pixels: int, augment: str) -> None:
        facts = {"model_size": size, "img_size": pixels, "augment": augment, "group_regex": None}
        write_checkpoint(tmp_path / f"{name}_{role}.pth", {"model_state_dict": {}, "extra": facts})

    def found(**changes: object) -> tuple:
        like = recipe(**changes).like_trained()
        return like.model_size, like.img_size, like.augment, like.backbone_lr

    assert found(model_size="full", img_size=99, augment="none", backbone_lr=0.5) == ("full", 99, "none", 0.5)
    trained("CustomRegNet", "final", "full", 224, "full")
    trained("CustomMaxViT", "final", "tiny", 48, "no_flip")
    trained("CustomCoAtNet", "final", "tiny", 48, "no_flip")
    for name in ("a", "b", "c"):  # networks of timm, whose size is that of their weights
        facts = {"model_size": "full", "img_size": 160, "augment": "none", "group_regex": None, "mode": "frozen"}
        write_checkpoint(tmp_path / f"{name}_final.pth", {"model_state_dict": {}, "extra": facts})
    assert found(img_size=99) == ("tiny", 48, "no_flip", settings.BACKBONE_LRS["tiny"])
    torch.save({"model_state_dict": {}, "extra": {"accuracy": np.float64(0.5)}}, tmp_path / f"{NAME}_final.pth")
    assert found() == ("tiny", 48, "no_flip", settings.BACKBONE_LRS["tiny"])  # another pipeline's file says nothing
    trained(NAME, "final", "their size", 64, "full")
    assert found()[0] == "tiny"
    (tmp_path / f"{NAME}_final.pth").unlink()
    trained(NAME, "head_best", "tiny", 64, "none")
    assert found() == ("tiny", 64, "none", settings.BACKBONE_LRS["tiny"])
    # The networks of another BASE-BACK have one size.
    assert found(base_back="digest", model_size="full") == ("full", 64, "none", settings.BACKBONE_LRS["full"])
    assert settings.BACKBONE_LRS["full"] < settings.BACKBONE_LRS["tiny"]


def test_each_cycle_leaves_a_network_that_explains_itself(cycled):
    import models
    from training import get_loss_function_for_backbone, validate_epoch_optimized
    from utils.datasets import WindowsCompatibleImageFolder, create_optimized_dataloader, create_optimized_transforms

    val = WindowsCompatibleImageFolder(cycled / "split_dataset" / "val", create_optimized_transforms(32, False))
    loader = create_optimized_dataloader(val, 16, shuffle=False, num_workers=0)
    weights = []
    for cycle, number in ((1, 4), (2, 5)):
        record = opened(cycled, f"snapshot{number}")
        extra = record["extra"]
        assert (extra["backbone_name"], extra["classes"], extra["stage"]) == (NAME, ["0", "1", "2", "3"], "cycle")
        assert (extra["cycle"], extra["epoch"]) == (cycle, 2 * cycle - 1)
        assert (extra["model_size"], extra["img_size"], extra["augment"]) == ("tiny", 32, "no_flip")
        network = models.create_custom_backbone(NAME, 4, size="tiny", img_size=32)
        network.load_state_dict(record["model_state_dict"])
        criterion = get_loss_function_for_backbone(NAME, 4)
        result = validate_epoch_optimized(network, loader, criterion, torch.device("cpu"))
        assert result[1] == pytest.approx(extra["accuracy"], abs=1e-9)
        weights.append(record["model_state_dict"])
    assert not all(torch.equal(first, weights[1][name]) for name, first in weights[0].items())


def test_what_was_trained_before_stays_and_is_still_finished(cycled, trained, base_main):
    before = digests(trained)
    assert {name: digest for name, digest in digests(cycled).items() if name in before} == before
    options = ("--backbones", NAME, "--stages", "kfold", "train", "snapshots", *ZOO_OPTIONS, *CYCLES[4:], "--json")
    done = base_main(*options, workspace=cycled)
    report = json.loads(done.stdout)
    assert (done.returncode, report["done"]) == (0, [])
    assert f"{NAME} snapshots" in report["skipped"]
    found = report["results"][NAME]["snapshots"]
    assert found["files"] == [f"{NAME}_snapshot4.pth", f"{NAME}_snapshot5.pth"]
    assert found["val_accuracies"] == [opened(cycled, f"snapshot{number}")["extra"]["accuracy"] for number in (4, 5)]
    summary = (cycled / "metrics_output" / "pipeline_summary.json").read_text()
    assert summary == (trained / "metrics_output" / "pipeline_summary.json").read_text()


def test_kills_at_any_moment_change_no_byte(cycled, trained, tmp_path):
    workspace = Path(shutil.copytree(trained, tmp_path / "w"))
    script = str(PROJECT / "BASE-BACK" / "src" / "main.py")
    command = [sys.executable, script, "--workspace", str(workspace), *CYCLES]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DBT_")} | ENVIRONMENT
    environment["DBT_BATCH_SIZE"] = "32"
    kills = []
    for was_killed in run_and_kill_repeatedly(3, command, environment, workspace, random.Random(5)):
        kills.append(was_killed)
        for path in workspace.glob("checkpoints/[!.]*.pth"):
            torch.load(path, weights_only=True)
    gone = workspace / "checkpoints" / f"{NAME}_snapshot4.pth"
    assert gone.exists(), "the first cycle's network is written when the cycle ends"
    gone.unlink()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    log = (workspace / "debug_logs" / "training.log").read_text(encoding="utf-8")
    assert not all(kills) or f"{NAME}_snapshots: resumed cycles at epoch " in log
    assert digests(workspace) == digests(cycled)
    assert not (workspace / "checkpoints" / ".progress").exists()


def test_fewer_cycles_leave_no_snapshot_of_the_old_ones(cycled, tmp_path, base_main):
    workspace = Path(shutil.copytree(cycled, tmp_path / "w"))
    one = ("--backbones", NAME, "--stages", "snapshots", "--snapshots", "1", "--epochs-per-cycle", "1")
    done = base_main(*one, workspace=workspace)
    assert done.returncode == 0, done.stderr
    left = sorted(path.name for path in workspace.glob(f"checkpoints/{NAME}_snapshot*.pth"))
    assert left == [f"{NAME}_snapshot{number}.pth" for number in (1, 2, 3, 4)]
    assert opened(workspace, "snapshot4")["extra"]["epoch"] == 0


def test_networks_of_another_base_back_are_trained_on_the_split_they_have(trained, tmp_path, base_main):
    base_back = foreign_base_back.build(tmp_path / "theirs", "BASE-BACK")
    workspace = tmp_path / "w"
    shutil.copytree(trained / "split_dataset", workspace / "split_dataset")
    one = ("--backbones", NAME, "--stages", "snapshots", "--snapshots", "1", "--epochs-per-cycle", "1")
    pixels = {"DBT_IMG_SIZE": "32"}
    done = base_main("--base-back", str(base_back), *one, "--json", workspace=workspace, environment=pixels)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["done"] == [f"{NAME} snapshots"]
    extra = opened(workspace, "snapshot1")["extra"]  # they keep no late epochs, so the first number is free
    assert (extra["base_back"], extra["stage"], extra["model_size"]) == ("external", "cycle", "full")
    assert not (workspace / "metrics_output" / "pipeline_summary.json").exists()


def test_bad_numbers_are_one_line(tmp_path):
    script = str(PROJECT / "BASE-BACK" / "src" / "main.py")
    done = run_python(script, "--workspace", str(tmp_path), "--stages", "snapshots", "--snapshots", "0")
    assert done.returncode == 2
    assert done.stderr.strip() == "DBT_CYCLES: found '0'; allowed: a whole number from 1"
