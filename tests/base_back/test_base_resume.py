"""Trainings that are interrupted anywhere go on from their last epoch and end with the bytes of an undisturbed run."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from battery_networks import Small
from conftest import PROJECT, ZOO_BACKBONES, ZOO_FOLDS, ZOO_OPTIONS
from fake_cuda import fake_cuda
from killing import digests, run_and_kill
from noise_datasets import logged, noise_datasets

from config import settings
from models import create_custom_backbone
from training.fitting import Fitted, fit
from training.pipeline import write_checkpoint
from training.progress import Progress, random_state, restore_random_state
from training.recipe import Recipe
from utils import set_seed
from utils.datasets import BatchLoader, DecodedDataset

CPU = torch.device("cpu")


# One network with BatchNorm and the hybrid, which has LayerNorm as well; the slow test trains the third one too.
@pytest.mark.parametrize(
    ("kills", "backbones"), [(4, ZOO_BACKBONES[1:]), pytest.param(10, ZOO_BACKBONES, marks=pytest.mark.slow)]
)
def test_kills_in_a_training_of_several_backbones_change_no_byte(trained, tmp_path, kills, backbones):
    workspace = tmp_path / "w"
    shutil.copytree(trained / "split_dataset", workspace / "split_dataset")
    shutil.copytree(trained / "image_cache", workspace / "image_cache")
    stages = ("--stages", "kfold", "train", "--jobs", "1")
    command = [sys.executable, str(PROJECT / "BASE-BACK" / "src" / "main.py"), "--workspace", str(workspace)]
    command += ["--backbones", *backbones, *ZOO_OPTIONS, *stages]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DBT_")}
    environment |= {"DBT_AUGMENT": "no_flip", "DBT_BATCH_SIZE": "32", "DBT_PROGRESS_SECONDS": "0"}
    rng = random.Random(20)
    for number in range(kills):
        assert run_and_kill(command, environment, workspace, rng) is None, f"run {number} ended before it was killed"
        for path in workspace.glob("checkpoints/[!.]*.pth"):
            torch.load(path, weights_only=True)  # whole, whenever the kill came
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    log = (workspace / "debug_logs" / "training.log").read_text(encoding="utf-8")
    resumed = [line for line in log.splitlines() if ": resumed " in line]
    assert len(resumed) >= kills // 3, resumed
    assert any(" at epoch " in line and "at epoch 1 " not in line for line in resumed), resumed  # within a stage
    assert "damaged" not in log
    expected = {name: digest for name, digest in digests(trained).items() if name.startswith(backbones)}
    assert len(expected) == len(backbones) * (6 + ZOO_FOLDS + 1)
    assert digests(workspace) == expected
    assert not (workspace / "checkpoints" / ".progress").exists()
    assert not list(workspace.rglob(".*partial*"))


def test_the_number_of_threads_is_recorded_in_every_checkpoint(trained):
    names = [
        f"{backbone}_{role}" for backbone in ZOO_BACKBONES for role in ("final", "fold0", "snapshot1", "head_best")
    ]
    records = [torch.load(trained / "checkpoints" / f"{name}.pth", weights_only=True) for name in names]
    assert {record["extra"]["threads"] for record in records} == {1}


@pytest.fixture
def loaders(tmp_path) -> tuple[DecodedDataset, DecodedDataset]:
    return noise_datasets(tmp_path)


class Interrupted(Exception):
    """Stands for the kill."""


class Stopping(Progress):
    """Saves every epoch, and ends the training after the save of a given number."""

    def __init__(self, path: Path, stop_after: int) -> None:
        super().__init__(path, "digest", seconds=0)
        self.left = stop_after

    def save(self, record: dict) -> None:
        super().save(record)
        self.left -= 1
        if self.left == 0:
            raise Interrupted


def recipe_of(backbone: str, **changes: object) -> Recipe:
    from dataclasses import replace

    recipe = Recipe.from_settings(backbone, ["0", "1", "2"], "split")
    fixed = {"epochs_head": 2, "epochs_finetune": 4, "batch_size": 8, "augment": "full", "snapshots": 2}
    return replace(recipe, **(fixed | changes))


def train(
    recipe: Recipe,
    loaders: tuple[DecodedDataset, DecodedDataset],
    progress: Progress | None = None,
    device: torch.device = CPU,
) -> Fitted:
    set_seed(5)
    model = create_custom_backbone(recipe.backbone, 3, size="tiny", img_size=32)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2  # whatever the architecture's default is: the generator's state must matter

    def loader(seed: int) -> BatchLoader:
        return BatchLoader(loaders[0], recipe.batch_size, training=True, seed=seed, kind=recipe.augment)

    val = BatchLoader(loaders[1], 12)
    return fit(recipe, model, loader, val, purpose=("final",), device=device, progress=progress)


def bytes_of(fitted: Fitted, path: Path) -> str:
    """Digest of everything that a training leaves, written as a checkpoint."""
    stages = [vars(stage) for stage in fitted.stages]
    weights = dict(fitted.model.state_dict())
    write_checkpoint(path, {"stages": stages, "model": weights, "val": fitted.validation})
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Keeping(Progress):
    """Saves every epoch, and keeps a copy of each save, which is what a training stopped after it leaves."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "digest", seconds=0)
        self.copies: list[Path] = []

    def save(self, record: dict) -> None:
        super().save(record)
        self.copies.append(self.path.with_suffix(f".{len(self.copies) + 1}.pth"))
        shutil.copyfile(self.path, self.copies[-1])


# One cycle and warm-up with cosine: the two schedules; both networks draw random numbers while they train.
@pytest.mark.parametrize("backbone", ["CustomConvNeXt", "CustomViTHybrid"])
def test_a_training_stopped_after_any_epoch_ends_with_the_same_bytes(backbone, loaders, tmp_path):
    recipe = recipe_of(backbone, epochs_finetune=2)
    expected = bytes_of(train(recipe, loaders), tmp_path / "expected.pth")
    keeping = Keeping(tmp_path / "progress" / "a.pth")
    train(recipe, loaders, keeping)
    assert len(keeping.copies) == recipe.epochs_head + recipe.epochs_finetune
    for stop, path in enumerate(keeping.copies, start=1):
        resumed = Keeping(path)
        again = train(recipe, loaders, resumed)
        assert bytes_of(again, tmp_path / "again.pth") == expected, f"stopped after epoch {stop}"
        assert len(resumed.copies) == len(keeping.copies) - stop


def test_on_a_gpu_a_training_goes_on_where_it_was_stopped_with_the_scale_of_its_loss(loaders, tmp_path, monkeypatch):
    recipe, path = recipe_of("CustomConvNeXt", epochs_head=1, epochs_finetune=2), tmp_path / "a.pth"
    expected = train(recipe, loaders)
    with fake_cuda(monkeypatch):
        with pytest.raises(Interrupted):
            train(recipe, loaders, Stopping(path, 2), torch.device("cuda"))
        assert torch.load(path, weights_only=True)["running"]["scaler"]["_growth_tracker"] > 0
        again = train(recipe, loaders, Progress(path, "digest", seconds=0), torch.device("cuda"))
    assert [stage.name for stage in again.stages] == [stage.name for stage in expected.stages]
    for name, values in expected.stages[-1].last.items():
        torch.testing.assert_close(again.stages[-1].last[name], values, atol=1e-3, rtol=1e-3)


def test_a_resumed_training_has_as_many_threads_as_when_it_began(loaders, tmp_path, monkeypatch):
    recipe, path = recipe_of("CustomConvNeXt", epochs_head=1, epochs_finetune=2), tmp_path / "progress.pth"
    used = []

    class Watched(BatchLoader):
        def __iter__(self):
            used.append(torch.get_num_threads())
            return super().__iter__()

    here = torch.get_num_threads()
    watched = [Watched(data, 8) for data in loaders]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    model = Small(0, 5)  # of few operations: threads wait for one another where the machine is busy
    with pytest.raises(Interrupted):
        fit(*(recipe, model, lambda _: watched[0], watched[1]), purpose=("a",), device=CPU, progress=Stopping(path, 2))
    assert set(used) == {2}
    assert torch.get_num_threads() == here
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    progress = Progress(path, "digest")
    fit(*(recipe, model, lambda _: watched[0], watched[1]), purpose=("a",), device=CPU, progress=progress)
    assert set(used) == {2}
    assert progress.threads == 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    used.clear()
    fit(*(recipe, model, lambda _: watched[0], watched[1]), purpose=("a",), device=CPU)
    assert set(used) == {1}


def test_an_epoch_at_a_time(loaders, tmp_path):
    """Every run dies after one more epoch; which epoch was best so far goes over the kills."""
    recipe = recipe_of("CustomConvNeXt", epochs_finetune=6, backbone_lr=1e-6)
    undisturbed = train(recipe, loaders)
    assert undisturbed.stages[1].epoch < 5, "the last epoch must not be the best one, or the test shows nothing"
    path = tmp_path / "a.pth"
    for _ in range(recipe.epochs_head + len(undisturbed.stages[1].rows)):
        with pytest.raises(Interrupted):
            train(recipe, loaders, Stopping(path, 1))
    ended = train(recipe, loaders, Stopping(path, 1))
    assert ended.history == undisturbed.history
    assert bytes_of(ended, tmp_path / "b.pth") == bytes_of(undisturbed, tmp_path / "c.pth")


def test_a_damaged_file_and_one_of_another_digest_are_named_and_removed(loaders, tmp_path, caplog):
    path = tmp_path / "CustomConvNeXt_fold0.pth"
    record = {"stages": [], "running": None, "tensor": torch.arange(10_000)}
    Progress(path, "one").save(record)
    assert torch.equal(Progress(path, "one").load()["tensor"], record["tensor"])
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"PK\x03\x04" + b"\0" * 500, whole[:5000] + b"!" + whole[5001:]):
        path.write_bytes(damage)
        with logged(caplog):
            assert Progress(path, "one").load() is None
        assert f"{path} is damaged" in caplog.text
        assert not path.exists()
        caplog.clear()
    Progress(path, "one").save(record)
    with logged(caplog):
        assert Progress(path, "two").load() is None
    assert f"{path} belongs to other data, settings or another version" in caplog.text
    assert not path.exists()


def test_saving_is_rare_and_a_full_disk_does_not_end_the_training(tmp_path, caplog):
    assert settings.PROGRESS_SECONDS == 5
    assert not Progress(tmp_path / "a.pth", "one").due()
    assert Progress(tmp_path / "a.pth", "one", seconds=0).due()
    slow = Progress(tmp_path / "a.pth", "one", seconds=1e-9)
    assert slow.due()
    slow._cost = 1e6  # the last save took long: the next waits for twenty times as long
    assert not slow.due()
    (tmp_path / "file").touch()
    with logged(caplog):
        Progress(tmp_path / "file" / "a.pth", "one").save({})
    assert "progress cannot be saved" in caplog.text


def test_every_generator_goes_on_where_it_was():
    set_seed(1)
    state = random_state(CPU)
    draws = [torch.rand(3), np.random.rand(3), random.random(), torch.randperm(9)]
    set_seed(2)
    restore_random_state(state, CPU)
    again = [torch.rand(3), np.random.rand(3), random.random(), torch.randperm(9)]
    assert all(np.array_equal(first, second) for first, second in zip(draws, again, strict=True))


def test_a_finished_training_leaves_no_progress_and_force_uses_none(trained, tmp_path, base_main):
    """What a run killed right after the entry of a unit has left is removed by the next run; --force starts anew."""
    assert not (trained / "checkpoints" / ".progress").exists()
    workspace = shutil.copytree(trained, tmp_path / "w")
    leftover = workspace / "checkpoints" / ".progress" / "CustomConvNeXt_fold0.pth"
    other = leftover.with_name("CustomResNetMish_fold0.pth")  # of a backbone that this run is not asked for
    leftover.parent.mkdir()
    for path in (leftover, other, leftover.with_name(".CustomConvNeXt_train.x.partial.pth")):
        path.write_bytes(b"not a checkpoint")
    options = ("--backbones", "CustomConvNeXt", "--stages", "kfold", *ZOO_OPTIONS)
    assert base_main(*options, workspace=workspace).returncode == 0
    assert list(leftover.parent.iterdir()) == [other]
    assert digests(workspace) == digests(trained)
    leftover.write_bytes(b"not a checkpoint")
    short = ("--epochs-head", "0", "--epochs-finetune", "1", "--force")
    done = base_main(*options, *short, workspace=workspace)
    assert done.returncode == 0
    assert "damaged" not in done.stderr
    assert list(leftover.parent.iterdir()) == [other]


def test_a_bad_setting_is_one_line(base_main, tmp_path):
    done = base_main("--stages", "verify", workspace=tmp_path, environment={"DBT_PROGRESS_SECONDS": "-1"})
    assert done.returncode == 2
    assert done.stderr.strip() == "DBT_PROGRESS_SECONDS: found '-1'; allowed: a number of seconds from 0"
