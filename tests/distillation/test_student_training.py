"""The training of a student: it learns, ends with its schedule, and with equal weights wherever it was interrupted."""

from __future__ import annotations

import logging
import shutil
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from digit_splits import split_of
from fake_cuda import fake_cuda
from noise_datasets import logged
from preprocessings import BASE_32

from utils import base_back
from utils.core.errors import UserError
from utils.distillation import student_training
from utils.distillation.soft_targets import Targets
from utils.distillation.student_training import (
    StudentTrainingResult,
    StudentTrainingSettings,
    predict_logits,
    train,
)
from utils.distillation_methods import teacher_loss
from utils.numeric.metrics import log_loss, softmax
from utils.predictions.rows import UNKNOWN
from utils.training.batch_schedule import HALF, NEVER, BatchSchedule
from utils.training.image_source import ImageSource
from utils.training.progress import TrainingProgress

NAME = "CustomViTHybrid"  # warm-up with cosine, BatchNorm
TIMM_NAME = "timm:test_resnet"  # trained channels last


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[ImageSource, ImageSource]:
    """16 train and 8 val images of noise."""
    folder = tmp_path_factory.mktemp("distillation")
    images = split_of(folder / "images", count=24)
    parts = (np.arange(16), np.arange(16, 24))
    return tuple(ImageSource(images.take(rows), BASE_32, "full", image_cache=folder / "cache") for rows in parts)


def initial_network(name: str = NAME) -> torch.nn.Module:
    torch.manual_seed(3)
    if name == TIMM_NAME:
        return base_back.load("training.timm_networks").build_timm("test_resnet", 3, 32)
    model = base_back.load("models").create_custom_backbone(name, 3, size="tiny", img_size=32)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2  # its random numbers must not depend on where the training was interrupted
    return model


def random_targets(epoch: int) -> Targets:
    rng = np.random.default_rng(epoch)
    probabilities = rng.dirichlet(np.ones(3), size=16)
    return Targets(np.log(probabilities).astype(np.float32), rng.normal(size=(16, 5)).astype(np.float32))


def schedule_of(source: ImageSource, unaugmented: str = NEVER) -> BatchSchedule:
    return BatchSchedule(source, 8, 1, np.full(16, unaugmented))


def run(
    sources,
    epochs: int = 4,
    progress: TrainingProgress | None = None,
    *,
    lr: float = 1e-3,
    name: str = NAME,
    feature_weight: float = 0.0,
) -> StudentTrainingResult:
    settings = StudentTrainingSettings(name, epochs, lr, 4.0, 0.5, seed=1, feature_weight=feature_weight)
    schedule = schedule_of(sources[0], HALF)
    model = initial_network(name)
    return train(model, settings, schedule, random_targets, sources[1], device="cpu", progress=progress)


def equal(result: StudentTrainingResult, expected: StudentTrainingResult) -> bool:
    return result.history == expected.history and all(
        torch.equal(result.weights[name], expected.weights[name]) for name in expected.weights
    )


class Interrupted(Exception):
    """Stands for the kill."""


class InterruptedProgress(TrainingProgress):
    def __init__(self, path, stop_after: int) -> None:
        super().__init__(path, "key")
        self.left, self.seconds = stop_after, 0.0

    def save(self, record) -> None:
        super().save(record)
        self.left -= 1
        if self.left == 0:
            raise Interrupted


class CopiedProgress(TrainingProgress):
    """Leaves `1.pth` and so on: what a kill after each epoch would leave."""

    def __init__(self, path) -> None:
        super().__init__(path, "key")
        self.seconds, self.saved = 0.0, 0

    def save(self, record) -> None:
        super().save(record)
        self.saved += 1
        shutil.copy(self.path, self.path.with_name(f"{self.saved}.pth"))


@pytest.mark.parametrize(
    ("name", "feature_weight"),
    [(NAME, 0.0), ("CustomConvNeXt", 0.0), (NAME, 2.0), ("CustomConvNeXt", 2.0), (TIMM_NAME, 2.0)],
)
def test_interrupted_after_any_epoch_it_ends_with_the_same_weights(sources, tmp_path, name, feature_weight):
    expected = run(sources, 3, name=name, feature_weight=feature_weight)
    run(sources, 3, CopiedProgress(tmp_path / "progress.pth"), name=name, feature_weight=feature_weight)
    paths = sorted(tmp_path.glob("?.pth"))
    assert len(paths) == 3
    for path in paths:
        resumed = run(sources, 3, TrainingProgress(path, "key"), name=name, feature_weight=feature_weight)
        assert equal(resumed, expected), f"stopped after epoch {path.stem}"


@pytest.mark.parametrize(("name", "layout"), [(TIMM_NAME, torch.channels_last), (NAME, torch.contiguous_format)])
def test_network_and_images_have_the_memory_format_of_the_rule(sources, name, layout):
    model = initial_network(name)
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]) if module.training else None)
    settings = StudentTrainingSettings(name, 1, 1e-3, 4.0, 0.5, seed=1)
    result = train(model, settings, schedule_of(sources[0]), random_targets, sources[1], device="cpu")
    kernels = [weight for weight in model.state_dict().values() if weight.dim() == 4 and min(weight.shape[1:]) > 1]
    assert seen
    assert kernels
    assert all(tensor.is_contiguous(memory_format=layout) for tensor in (*seen, *kernels))
    assert all(weight.is_contiguous() for weight in result.weights.values())  # files do not depend on the layout


@pytest.mark.parametrize("feature_weight", [0.0, 2.0])
def test_on_a_gpu_it_ends_as_on_the_cpu_and_waits_once_a_step(sources, monkeypatch, feature_weight):
    expected = run(sources, epochs=2, feature_weight=feature_weight)
    settings = StudentTrainingSettings(NAME, 2, 1e-3, 4.0, 0.5, seed=1, feature_weight=feature_weight)
    with fake_cuda(monkeypatch) as device:
        model = initial_network()
        weights = len(model.state_dict())
        result = train(model, settings, schedule_of(sources[0], HALF), random_targets, sources[1], device="cuda")
        counts = device.counts.copy()
    assert result.threads is None
    for name, values in expected.weights.items():
        torch.testing.assert_close(result.weights[name], values, atol=1e-3, rtol=1e-3)
    steps = 2 * len(schedule_of(sources[0]))
    moved_per_step = 5 + (feature_weight > 0)  # images, labels, targets and the rows of both; embeddings
    assert counts["to device"] <= 2 * weights + (moved_per_step + 1) * steps
    # Whether the loss and its gradients are finite, and what ends an epoch.
    assert counts["synchronisations"] <= 2 * steps + 2


def test_a_bar_counts_the_batches_that_are_left(sources, tmp_path, monkeypatch):
    totals, counted = [], []

    @contextmanager
    def bar(total, what, *, unit):
        totals.append((total, what, unit))
        yield counted.append

    monkeypatch.setattr(student_training, "progress_bar", bar)
    with pytest.raises(Interrupted):
        run(sources, progress=InterruptedProgress(tmp_path / "progress.pth", 1))
    assert (totals, sum(counted)) == ([(8, NAME, "batch")], 2)  # 4 epochs of 16 images in batches of 8
    counted.clear()
    run(sources, progress=TrainingProgress(tmp_path / "progress.pth", "key"))
    assert (totals[1][0], sum(counted)) == (6, 6)


def test_a_resumed_training_has_as_many_threads_as_when_it_began(sources, tmp_path, monkeypatch):
    expected = run(sources, epochs=2)
    with pytest.raises(Interrupted):
        run(sources, 2, InterruptedProgress(tmp_path / "progress.pth", 1))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    resumed = run(sources, 2, TrainingProgress(tmp_path / "progress.pth", "key"))
    assert equal(resumed, expected)
    assert (expected.threads, resumed.threads, run(sources, epochs=1).threads) == (1, 1, 2)


@pytest.mark.parametrize(("alpha", "shift"), [(0.0, 0), (1.0, 1)])
def test_it_learns_the_labels_or_the_teacher(sources, tmp_path, alpha, shift):
    """The teacher predicts the next class of each label with confidence."""
    unaugmented = ImageSource(sources[0].images, BASE_32, "none", image_cache=tmp_path)  # noise is only memorised
    labels = sources[0].images.labels
    confident = np.log(np.full((16, 3), 0.02) + 0.94 * np.eye(3)[(labels + 1) % 3]).astype(np.float32)
    model = initial_network("CustomConvNeXt")
    settings = StudentTrainingSettings("CustomConvNeXt", 15, 3e-3, 1.0, alpha, seed=1)
    train(model, settings, schedule_of(unaugmented), lambda _: Targets(confident), sources[1], device="cpu")
    predicted = predict_logits(model, unaugmented, "cpu").argmax(axis=1)
    assert (predicted == (labels + shift) % 3).mean() > 0.8


def test_labels_are_not_smoothed_with_a_teacher_or_without(sources, tmp_path):
    """The loss of the first batch is the plain cross-entropy, and with a teacher alpha of it is the divergence."""
    unaugmented = ImageSource(sources[0].images, BASE_32, "none", image_cache=tmp_path)
    schedule = BatchSchedule(unaugmented, 16, 1, np.full(16, NEVER))
    batch, images = next(iter(schedule.loader(0, BASE_32)))
    labels = torch.from_numpy(unaugmented.images.labels)[batch.rows]
    targets = random_targets(0)

    def first_loss(alpha: float, epoch_targets) -> float:
        settings = StudentTrainingSettings("CustomSwinTransformer", 1, 1e-3, 4.0, alpha, seed=1)
        model = quiet_network()
        result = train(model, settings, schedule, epoch_targets, sources[1], device="cpu")
        return result.history[0]["train_loss"]

    def quiet_network() -> torch.nn.Module:
        model = initial_network("CustomConvNeXt")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    logits = quiet_network().train()(images)
    plain = torch.nn.functional.cross_entropy(logits, labels).item()
    divergence = teacher_loss(logits, torch.from_numpy(targets.log_probabilities)[batch.rows], 4.0).item()
    assert first_loss(0.5, None) == pytest.approx(plain, rel=1e-5)
    assert first_loss(0.3, lambda _: targets) == pytest.approx(0.3 * divergence + 0.7 * plain, rel=1e-5)


def test_cached_targets_are_mixed_as_the_images_are(sources, tmp_path):
    """One batch with pure matching: the divergence of mixed images from mixed probabilities."""
    unaugmented = ImageSource(sources[0].images, BASE_32, "none", image_cache=tmp_path)
    losses = {}
    for mixes_targets in (True, False):
        schedule = BatchSchedule(unaugmented, 16, 1, np.full(16, NEVER), mix="mixup", mixes_targets=mixes_targets)
        batch, images = next(iter(schedule.loader(0, BASE_32)))
        model = initial_network("CustomConvNeXt")
        targets = torch.from_numpy(random_targets(0).log_probabilities)[batch.rows]
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        target = batch.mixing.log_probabilities(targets) if mixes_targets else targets
        expected = teacher_loss(model.train()(images), target, 4.0).item()
        settings = StudentTrainingSettings("CustomConvNeXt", 1, 1e-3, 4.0, 1.0, seed=1)
        result = train(model, settings, schedule, random_targets, sources[1], device="cpu")
        assert result.history[0]["train_loss"] == pytest.approx(expected, rel=1e-5)
        losses[mixes_targets] = expected
    assert losses[True] != pytest.approx(losses[False], rel=1e-3)


def test_a_matched_student_has_embeddings_from_which_the_teachers_follow(sources, tmp_path):
    """Without labels and probabilities the loss is that of the embeddings: 1 at first, less once they are matched."""
    unaugmented = ImageSource(sources[0].images, BASE_32, "none", image_cache=tmp_path)
    settings = StudentTrainingSettings("CustomConvNeXt", 18, 3e-3, 4.0, 0.5, seed=1, feature_weight=1.0)
    embeddings = random_targets(0).embeddings
    targets = Targets(np.full((16, 3), np.nan, dtype=np.float32), embeddings)
    without_labels = replace(unaugmented.images, labels=np.full(16, UNKNOWN))
    source = ImageSource(without_labels, BASE_32, "none", image_cache=tmp_path)
    model = initial_network("CustomConvNeXt")
    result = train(model, settings, schedule_of(source), lambda _: targets, sources[1], device="cpu")
    losses = [row["train_loss"] for row in result.history]
    assert losses[0] == pytest.approx(1, abs=0.1)
    assert losses[-1] < 0.5
    assert result.weights.keys() == initial_network("CustomConvNeXt").state_dict().keys()  # the projector is dropped


def test_a_network_without_embeddings_cannot_match_any(sources):
    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = torch.nn.Conv2d(3, 3, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.convolution(images).mean(dim=(2, 3))

    settings = StudentTrainingSettings("pooled", 1, 1e-3, 4.0, 0.5, seed=1, feature_weight=1.0)
    with pytest.raises(UserError, match=r"the student pooled has no embeddings to match; set it to 0"):
        train(Pooled(), settings, schedule_of(sources[0]), random_targets, sources[1], device="cpu")


def test_a_mixed_image_with_an_unlabeled_partner_has_no_label(sources):
    images = replace(sources[0].images, labels=np.where(np.arange(16) < 8, UNKNOWN, sources[0].images.labels))
    source = ImageSource(images, BASE_32, "full", image_cache=sources[0]._image_cache)
    schedule = BatchSchedule(source, 8, 1, np.full(16, NEVER), mix="cutmix")
    settings = StudentTrainingSettings("CustomConvNeXt", 1, 1e-3, 4.0, 0.5, seed=1)
    result = train(initial_network("CustomConvNeXt"), settings, schedule, random_targets, sources[1], device="cpu")
    assert np.isfinite(result.history[0]["train_loss"])


def test_without_a_teacher_alpha_has_no_effect(sources):
    results = []
    for alpha in (0.0, 0.9):
        settings = StudentTrainingSettings("CustomConvNeXt", 1, 1e-3, 4.0, alpha, seed=1)
        model = initial_network("CustomConvNeXt")
        results.append(train(model, settings, schedule_of(sources[0]), None, sources[1], device="cpu"))
    assert equal(*results)


def test_rows_without_target_and_label_do_not_contribute(sources):
    no_targets = Targets(np.full((16, 3), np.nan, dtype=np.float32))
    model, initial = initial_network(), initial_network().state_dict()
    settings = StudentTrainingSettings(NAME, 1, 1e-3, 4.0, 1.0, seed=1)
    result = train(model, settings, schedule_of(sources[0]), lambda _: no_targets, sources[1], device="cpu")
    assert result.history[0]["train_loss"] == 0
    assert torch.isfinite(torch.cat([value.flatten().float() for value in result.weights.values()])).all()
    weight = next(name for name in initial if name.endswith("head.weight") or name.endswith("classifier.weight"))
    assert torch.allclose(result.weights[weight], initial[weight], atol=1e-4)  # weight decay alone


def test_it_keeps_the_last_epoch_whatever_val_shows(sources, tmp_path, caplog):
    unaugmented = ImageSource(sources[0].images, BASE_32, "none", image_cache=tmp_path)
    settings, model = (
        StudentTrainingSettings("CustomConvNeXt", 15, 4e-3, 1.0, 0.0, 1),
        initial_network("CustomConvNeXt"),
    )
    with logged(caplog), caplog.at_level(logging.INFO):  # memorising noise increases the loss on val
        result = train(model, settings, schedule_of(unaugmented), None, sources[1], device="cpu")
    losses = [row["val_log_loss"] for row in result.history]
    assert len(losses) == 15
    assert losses[-1] > 1.1 * min(losses), "the loss on val must rise, or the test shows nothing"
    assert f"the val log-loss rose from {min(losses):.4f} in epoch {int(np.argmin(losses)) + 1}" in caplog.text
    logits = predict_logits(model, sources[1], "cpu", result.weights)
    assert log_loss(softmax(logits), sources[1].images.labels) == losses[-1]


def test_a_loss_that_is_not_finite_is_refused_with_a_lower_rate(sources):
    settings = StudentTrainingSettings(NAME, 1, 1e-3, 4.0, 0.5, 1)
    infinite = Targets(np.full((16, 3), -np.inf, dtype=np.float32))
    with pytest.raises(UserError, match=r"--set distillation\.lr=0\.0001"):
        train(initial_network(), settings, schedule_of(sources[0]), lambda _: infinite, sources[1], device="cpu")


def test_given_weights_replace_those_of_the_model(sources):
    model = initial_network("CustomConvNeXt")
    expected = predict_logits(model, sources[1], "cpu")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    assert not predict_logits(model, sources[1], "cpu", zeros).any()
    np.testing.assert_array_equal(predict_logits(model, sources[1], "cpu"), expected)
