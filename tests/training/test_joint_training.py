"""Joint training of networks and heads: in blocks or at once, with equal weights wherever it was interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_cuda import fake_cuda
from given_predictions import logged
from joint_members import NAMES, head_of, joint_members

from utils.core.errors import UserError
from utils.predictions.streaming import open_network
from utils.training.joint_networks import JointMember, JointTrainingSettings, TrainableMember
from utils.training.joint_training import JointTrainingResult, train
from utils.training.progress import TrainingProgress

UNLIMITED, NOTHING = 10**12, 1  # bytes that a step may need


@pytest.fixture(scope="module")
def members(tmp_path_factory) -> list[JointMember]:
    return joint_members(tmp_path_factory.mktemp("joint"))


def run(
    members: list[JointMember],
    folder: Path,
    *,
    epochs: int = 2,
    budget: int = UNLIMITED,
    lr: float = 1e-2,
    key: str = "key",
    measured_batch_size: int = 8,
    device: str = "cpu",
) -> JointTrainingResult:
    settings = JointTrainingSettings(epochs, lr, 0.0, seed=1)
    return train(
        *(members, head_of(members), settings),
        folder=folder,
        key=key,
        device=device,
        batch_size=measured_batch_size,
        budget=budget,
    )


@pytest.fixture(scope="module")
def undisturbed(members, tmp_path_factory) -> Callable[[int], JointTrainingResult]:
    """The training on the CPU within a budget, once for all tests that compare others with it.

    Beside its folder lie copies of it, `1`, `2` and so on: what a kill after each write of progress would leave.
    """

    def train_and_copy(budget: int) -> JointTrainingResult:
        folder = tmp_path_factory.mktemp("undisturbed") / "run"
        save, writes = TrainingProgress.save, []

        def save_and_copy(self, record):
            save(self, record)
            writes.append(self.path)
            shutil.copytree(folder, folder.with_name(str(len(writes))))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainingProgress, "save", save_and_copy)
            return run(members, folder, budget=budget)

    return cache(train_and_copy)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(("budget", "blocks"), [(UNLIMITED, [list(NAMES)]), (NOTHING, [[name] for name in NAMES])])
def test_it_learns_and_does_not_change_the_checkpoints(members, tmp_path, budget, blocks):
    checkpoints = [member.spec.checkpoint.read_bytes() for member in members]
    result = run(members, tmp_path / "run", epochs=5, budget=budget)
    assert result.blocks == blocks
    assert result.recomputed == ([] if budget == UNLIMITED else list(NAMES))
    losses = [row["train_loss"] for row in result.history[1:]]
    assert losses[-1] < 0.7 * losses[0]
    assert [member.spec.checkpoint.read_bytes() for member in members] == checkpoints
    for member in members:
        record = torch.load(result.folder / f"epoch5-{member.name}.pth", weights_only=True)
        assert record["schedule"]["last_epoch"] == 5 * len(member.batch_schedule)
    assert result.epoch == min(range(6), key=lambda epoch: result.history[epoch]["val_log_loss"])
    if result.epoch:
        initial = open_network(members[0].spec).state_dict()
        weights = result.weights(NAMES[0])
        assert any(not torch.equal(initial[name], weights[name]) for name in initial)


@pytest.mark.parametrize("budget", [UNLIMITED, NOTHING])
def test_on_a_gpu_it_ends_as_on_the_cpu(members, undisturbed, tmp_path, monkeypatch, budget):
    expected = undisturbed(budget)
    with fake_cuda(monkeypatch) as device:
        result = run(members, tmp_path / "gpu", budget=budget, device="cuda")
    assert device.counts["to device"] > 0
    for row, expected_row in zip(result.history, expected.history, strict=True):
        assert row["val_log_loss"] == pytest.approx(expected_row["val_log_loss"], abs=1e-3)


class Interrupted(Exception):
    """Stands for the kill."""


def interrupt_after(monkeypatch, n_writes: int) -> None:
    """Raise Interrupted after some writes of progress files."""
    save, writes = TrainingProgress.save, []

    def counted(self, record):
        save(self, record)
        writes.append(self.path)
        if len(writes) == n_writes:
            raise Interrupted

    monkeypatch.setattr(TrainingProgress, "save", counted)


@pytest.mark.parametrize("budget", [UNLIMITED, NOTHING])
def test_interrupted_after_any_write_it_ends_with_the_same_bytes(members, undisturbed, tmp_path, budget):
    expected = undisturbed(budget)
    files = files_of(expected.folder)
    for stop in (1, 2, 3, 5):
        left = expected.folder.with_name(str(stop))
        assert files_of(left) != files
        result = run(members, Path(shutil.copytree(left, tmp_path / "run")), budget=budget)
        assert result.history == expected.history, f"stopped after write {stop}"
        assert files_of(tmp_path / "run") == files, f"stopped after write {stop}"
        shutil.rmtree(tmp_path / "run")


def test_the_blocks_of_an_interrupted_training_stay_as_they_are(members, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt_after(patched, 2)  # the initial heads, then the first block
        with pytest.raises(Interrupted):
            run(members, tmp_path / "run", budget=NOTHING)
    assert len(run(members, tmp_path / "run", budget=UNLIMITED).blocks) == 2


def test_a_resumed_training_has_as_many_threads_as_when_it_began(members, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt_after(patched, 2)
        with pytest.raises(Interrupted):
            run(members, tmp_path / "run")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    used, step = [], torch.optim.AdamW.step

    def counted(self, *arguments):
        used.append(torch.get_num_threads())
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    assert run(members, tmp_path / "run").threads == 1
    assert set(used) == {1}
    used.clear()
    assert run(members, tmp_path / "anew", epochs=1).threads == 2
    assert set(used) == {2}


def test_a_damaged_training_and_one_of_another_key_start_again(members, undisturbed, tmp_path, caplog):
    expected = undisturbed(UNLIMITED)
    shutil.copytree(expected.folder, tmp_path / "run")
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    damaged = tmp_path / "run" / state["files"][NAMES[1]]
    damaged.write_bytes(damaged.read_bytes()[:2000])
    with logged(caplog):
        restarted = run(members, tmp_path / "run")
    assert restarted.history == expected.history
    assert f"{damaged} is damaged" in caplog.text
    caplog.clear()
    with logged(caplog):
        of_another_key = run(members, tmp_path / "run", key="another")
    assert of_another_key.history == expected.history
    assert "resumed" not in caplog.text
    assert "belongs to another" not in caplog.text  # the state has the key, so that no network is read


def test_where_memory_runs_out_batches_are_split(members, tmp_path, monkeypatch):
    """The step is measured on four images, and eight do not fit."""
    forward, sizes = TrainableMember.forward, []

    def limited(self, images):
        if self.member.name == NAMES[0]:
            sizes.append(len(images))
        if len(images) > 4:
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        return forward(self, images)

    monkeypatch.setattr(TrainableMember, "forward", limited)
    result = run(members, tmp_path / "run", epochs=1, measured_batch_size=4)
    assert sizes == [4, 8, 4, 4, 4, 4]
    assert np.isfinite(result.history[1]["train_loss"])


def test_a_step_that_does_not_fit_into_memory_is_refused(members, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainableMember, "step_bytes", lambda self, batch_size: 1)
    monkeypatch.setattr(TrainableMember, "forward", lambda *arguments: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(UserError, match=r"backbones.exclude=.*end_to_end=false"):
        run(members, tmp_path / "run", epochs=1)


def test_a_loss_that_is_not_finite_is_refused_with_a_lower_rate(members, tmp_path):
    with pytest.raises(UserError, match=r"--set runs.fusion.fusion_config.lr=1e\+29"):
        run(members, tmp_path / "run", epochs=6, lr=1e30)
