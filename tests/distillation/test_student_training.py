"""The training of a student: it learns, stops by val, and ends with equal weights wherever it was interrupted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from digit_splits import split_of

from utils import base_back
from utils.core.errors import UserError
from utils.distillation.student_training import Course, Trained, logits_of, train
from utils.training.image_views import Album, Lessons
from utils.training.progress import TrainingProgress

NAME = "CustomViTHybrid"  # warm-up with cosine, BatchNorm


@pytest.fixture(scope="module")
def albums(tmp_path_factory) -> tuple[Album, Album]:
    folder = tmp_path_factory.mktemp("distilling")
    images = split_of(folder / "images", count=24)
    train_rows, val_rows = np.arange(16), np.arange(16, 24)
    return tuple(Album(images.take(rows), 32, "full", image_cache=folder / "cache") for rows in (train_rows, val_rows))


def fresh(name: str = NAME) -> torch.nn.Module:
    torch.manual_seed(3)
    model = base_back.load("models").create_custom_backbone(name, 3, size="tiny", img_size=32)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2  # what it draws must not depend on where the training was interrupted
    return model


def teach(epoch: int) -> np.ndarray:
    drawn = np.random.default_rng(epoch).dirichlet(np.ones(3), size=16)
    return np.log(drawn).astype(np.float32)


def run(
    albums, epochs: int = 4, progress: TrainingProgress | None = None, *, lr: float = 1e-3, name: str = NAME
) -> Trained:
    lessons = Lessons(albums[0], 8, 1, np.full(16, "half"))
    course = Course(name, epochs, lr, 4.0, 0.5, seed=1)
    return train(fresh(name), course, lessons, teach, albums[1], device="cpu", progress=progress)


def same(one: Trained, other: Trained) -> bool:
    return one.history == other.history and all(
        torch.equal(one.weights[name], other.weights[name]) for name in one.weights
    )


class Interrupted(Exception):
    """Stands for the kill."""


class Stopping(TrainingProgress):
    def __init__(self, path, stop_after: int) -> None:
        super().__init__(path, "key")
        self.left, self.seconds = stop_after, 0.0

    def save(self, record) -> None:
        super().save(record)
        self.left -= 1
        if self.left == 0:
            raise Interrupted


@pytest.mark.parametrize("name", [NAME, "CustomConvNeXt"])
def test_stopped_after_any_epoch_it_ends_with_the_same_weights(albums, tmp_path, name):
    expected = run(albums, name=name)
    for stop in range(1, 5):
        path = tmp_path / f"{stop}.pth"
        with pytest.raises(Interrupted):
            run(albums, progress=Stopping(path, stop), name=name)
        assert same(run(albums, progress=TrainingProgress(path, "key"), name=name), expected), (
            f"stopped after epoch {stop}"
        )


def test_it_learns_from_labels_and_from_a_teacher(albums, tmp_path):
    plain = Album(albums[0].images, 32, "none", image_cache=tmp_path)  # noise can be learned by heart alone
    lessons = Lessons(plain, 8, 1, np.full(16, "never"))
    labels = albums[0].images.labels
    sure = np.log(np.full((16, 3), 0.02) + 0.94 * np.eye(3)[(labels + 1) % 3]).astype(np.float32)
    answers = []
    for alpha in (0.0, 1.0):
        model = fresh("CustomConvNeXt")
        course = Course("CustomConvNeXt", 40, 1e-3, 1.0, alpha, seed=1)
        train(model, course, lessons, lambda _: sure, albums[1], device="cpu")
        answers.append(logits_of(model, plain, "cpu").argmax(axis=1))
    assert (answers[0] == labels).mean() > 0.8
    assert (answers[1] == (labels + 1) % 3).mean() > 0.8  # what the teacher says, whatever the labels are


def test_rows_without_target_and_label_take_no_part(albums):
    lessons = Lessons(albums[0], 8, 1, np.full(16, "never"))
    nothing = np.full((16, 3), np.nan, dtype=np.float32)
    model, before = fresh(), fresh().state_dict()
    course = Course(NAME, 1, 1e-3, 4.0, 1.0, seed=1)
    done = train(model, course, lessons, lambda _: nothing, albums[1], device="cpu")
    assert done.history[0]["train_loss"] == 0
    assert torch.isfinite(torch.cat([value.flatten().float() for value in done.weights.values()])).all()
    weight = next(name for name in before if name.endswith("head.weight") or name.endswith("classifier.weight"))
    assert torch.allclose(done.weights[weight], before[weight], atol=1e-4)  # weight decay alone


def test_val_stops_it_and_chooses_the_epoch(albums):
    done = run(albums, epochs=40, lr=3e-3)  # noise: what is learned by heart does harm on val
    best = int(np.argmin([row["val_log_loss"] for row in done.history]))
    assert done.epoch == best < 30
    assert done.is_stopped
    assert len(done.history) - 1 - max(best, 20) == 10  # a quarter of the epochs, from the middle on


def test_a_loss_that_is_no_number_is_said(albums):
    lessons, course = Lessons(albums[0], 8, 1, np.full(16, "never")), Course(NAME, 1, 1e-3, 4.0, 0.5, 1)
    infinite = np.full((16, 3), -np.inf, dtype=np.float32)
    with pytest.raises(UserError, match=r"the loss became nan.*lower distillation\.lr"):
        train(fresh(), course, lessons, lambda _: infinite, albums[1], device="cpu")
