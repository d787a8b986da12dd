"""Networks and heads trained together: they learn, in blocks or at once, and end alike wherever they were stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from digit_splits import split_of
from given_predictions import logged

from utils import base_back
from utils.combiners.fusion_heads import ConcatHead, MappedEmbeddings
from utils.core.errors import UserError
from utils.networks.construction import NetworkSpec
from utils.predictions.streaming import open_network
from utils.training import joint_training
from utils.training.image_views import Album, Lessons
from utils.training.joint_networks import Course, FusionHeads, Moving, Part, in_memory
from utils.training.joint_training import Tuned, train

NAMES = ("CustomConvNeXt", "CustomViTHybrid")
NONE = np.zeros((0, 0), dtype=np.float32)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> list[Part]:
    """Two untrained networks whose outputs are in another order than the classes; 24 images of noise."""
    folder = tmp_path_factory.mktemp("joint")
    images = split_of(folder / "images", count=24)
    found = []
    for name in NAMES:
        torch.manual_seed(len(name))
        model = base_back.load("models").create_custom_backbone(name, 3, size="tiny", img_size=32)
        path = folder / f"{name}.pth"
        torch.save({"model_state_dict": model.state_dict(), "extra": {}}, path)
        classes = images.classes
        spec = NetworkSpec(name, path, "tiny", 32, (classes[2], classes[0], classes[1]))
        train_rows, val_rows = np.arange(16), np.arange(16, 24)
        album, exam = (
            Album(images.take(rows), 32, "none", image_cache=folder / "cache") for rows in (train_rows, val_rows)
        )
        part = Part(name, name, spec, [1, 2, 0], Lessons(album, 8, 1, np.full(16, "never")), exam, (NONE, NONE))
        moving = Moving(part, None, Course(1, 1e-3, 0.0, 1), "cpu")
        seen = moving.seen(album), moving.seen(exam)
        found.append(Part(name, name, spec, [1, 2, 0], part.lessons, exam, seen))
    return found


def head_of(parts: list[Part]) -> FusionHeads:
    widths = [part.embeddings[0].shape[1] for part in parts]
    maps = MappedEmbeddings(
        [np.zeros(width) for width in widths], [np.ones(1)] * len(widths), [NONE] * len(widths), summed=False
    )
    torch.manual_seed(5)
    return FusionHeads(maps, [ConcatHead(widths, (8,), 3, 0.1, 0)])


def run(
    parts: list[Part], folder: Path, *, epochs: int = 2, budget: int = 10**12, lr: float = 1e-2, key: str = "key"
) -> Tuned:
    course = Course(epochs, lr, 0.0, seed=1)
    return train(parts, head_of(parts), course, folder=folder, key=key, device="cpu", batch_size=8, budget=budget)


def end_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(("budget", "blocks"), [(10**12, [list(NAMES)]), (1, [[name] for name in NAMES])])
def test_it_learns_and_leaves_the_checkpoints_as_they_are(parts, tmp_path, budget, blocks):
    before = [part.spec.checkpoint.read_bytes() for part in parts]
    found = run(parts, tmp_path / "run", epochs=8, budget=budget)
    assert found.blocks == blocks
    assert found.twice == ([] if budget > 1 else list(NAMES))
    losses = [row["train_loss"] for row in found.history[1:]]
    assert losses[-1] < 0.7 * losses[0]
    assert [part.spec.checkpoint.read_bytes() for part in parts] == before
    for part in parts:
        record = torch.load(found.folder / f"epoch8-{part.name}.pth", weights_only=True)
        assert record["schedule"]["last_epoch"] == 8 * len(part.lessons)
    assert found.epoch == min(range(9), key=lambda epoch: found.history[epoch]["val_log_loss"])
    if found.epoch:
        own = open_network(parts[0].spec).state_dict()
        tuned = found.weights(NAMES[0])
        assert any(not torch.equal(own[name], tuned[name]) for name in own)


def test_logits_come_in_the_order_of_the_workspaces_classes(parts):
    part = parts[0]
    moving = Moving(part, None, Course(1, 1e-3, 0.0, 1), "cpu")
    images = part.exam.show(torch.arange(4), 32, None)
    moving.model.eval()
    with torch.no_grad():
        assert torch.equal(moving.answer(images)[0], open_network(part.spec)(images)[:, part.order])


def test_weights_gradients_and_moments_are_freed_without_a_collection(parts):
    with in_memory(parts[:1], [None], Course(1, 1e-3, 0.0, 1), "cpu") as (moving,):
        moving.answer(parts[0].exam.show(torch.arange(4), 32, None))[0].sum().backward()
        moving.optimizer.step()
        assert any("exp_avg" in state for state in moving.optimizer.state.values())
    assert not moving.optimizer.state
    tensors = [*moving.model.parameters(), *moving.model.buffers()]
    assert sum(tensor.numel() for tensor in tensors) == 0
    assert all(weight.grad is None for weight in moving.model.parameters())


class Interrupted(Exception):
    """Stands for the kill."""


@pytest.mark.parametrize("budget", [10**12, 1])
def test_stopped_at_any_write_it_ends_with_the_same_bytes(parts, tmp_path, monkeypatch, budget):
    expected = run(parts, tmp_path / "undisturbed", budget=budget)
    whole = end_of(tmp_path / "undisturbed")
    save = joint_training.TrainingProgress.save
    for stop in (1, 2, 3, 5):
        writes = []

        def counted(self, record, writes=writes, stop=stop):
            save(self, record)
            writes.append(self.path)
            if len(writes) == stop:
                raise Interrupted

        with monkeypatch.context() as patched:
            patched.setattr(joint_training.TrainingProgress, "save", counted)
            with pytest.raises(Interrupted):
                run(parts, tmp_path / "run", budget=budget)
        found = run(parts, tmp_path / "run", budget=budget)
        assert found.history == expected.history, f"stopped after write {stop}"
        assert end_of(tmp_path / "run") == whole, f"stopped after write {stop}"
        shutil.rmtree(tmp_path / "run")


def test_whether_they_move_together_is_decided_once(parts, tmp_path, monkeypatch):
    finish = joint_training._Run.finish
    monkeypatch.setattr(joint_training._Run, "finish", lambda self: None)
    run(parts, tmp_path / "run", budget=1)
    monkeypatch.setattr(joint_training._Run, "finish", finish)
    assert len(run(parts, tmp_path / "run", budget=10**12).blocks) == 2


def test_what_is_damaged_or_of_another_key_is_begun_anew(parts, tmp_path, caplog):
    expected = run(parts, tmp_path / "run")
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    damaged = tmp_path / "run" / state["files"][NAMES[1]]
    damaged.write_bytes(damaged.read_bytes()[:2000])
    with logged(caplog):
        again = run(parts, tmp_path / "run")
    assert again.history == expected.history
    assert f"{damaged} is damaged" in caplog.text
    caplog.clear()
    with logged(caplog):
        others = run(parts, tmp_path / "run", key="of others")
    assert others.history == expected.history
    assert "resumed" not in caplog.text
    assert "belongs to another" not in caplog.text  # the state says so before any network is read


def test_memory_that_runs_out_takes_smaller_parts_and_says_so(parts, tmp_path, monkeypatch, caplog):
    losses = joint_training._Run._losses
    sizes = []

    def narrow(self, moving, images, rows):
        sizes.append(len(rows))
        if len(rows) > 4:
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        return losses(self, moving, images, rows)

    monkeypatch.setattr(joint_training._Run, "_losses", narrow)
    with logged(caplog):
        found = run(parts, tmp_path / "run", epochs=1)
    assert sizes == [8, 4, 4, 4, 4]
    assert np.isfinite(found.history[1]["train_loss"])
    assert "batches are taken in 2 parts" in caplog.text
    monkeypatch.setattr(joint_training._Run, "_losses", lambda *given: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(UserError, match=r"does not fit into memory.*end_to_end=false"):
        run(parts, tmp_path / "other", epochs=1)


def test_a_loss_that_is_no_number_is_said_with_a_lower_rate(parts, tmp_path):
    with pytest.raises(UserError, match=r"the loss became .* lower rate: --set runs.fusion.fusion_config.lr="):
        run(parts, tmp_path / "run", epochs=6, lr=1e30)
