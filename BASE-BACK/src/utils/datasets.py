"""Data sets, transforms and loaders of the base pipeline."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from config.settings import AUGMENT, BATCH_SIZE, EXIF, IMAGE_CACHE_DIR, IMG_SIZE, SPLIT_DIR
from utils import DEVICE, get_optimal_workers
from utils.augmentation import MEAN, STD, Normalisation, augment, copied, normalise
from utils.class_balance import balanced_order
from utils.image_cache import DecodedImages, open_images
from utils.resizing import decoded, evaluation_record, evaluation_resizing, resized_side, resizing_of_record
from utils.samples import Sample, scan
from utils.splitting import prepare_optimized_datasets, split_contents, verify_dataset_split

__all__ = [
    "BatchLoader",
    "DecodedDataset",
    "OptimizedImageDataset",
    "OptimizedTempDataset",
    "WindowsCompatibleImageFolder",
    "create_optimized_dataloader",
    "create_optimized_transforms",
    "prepare_datasets_for_backbone",
    "prepare_optimized_datasets",
    "verify_dataset_split",
    "worker_init_fn",
]

FEW_IMAGES = 300  # for fewer images, loader processes cost more time than they save


def _open_rgb(path: str) -> Any:
    from utils.image_files import open_image

    try:
        with open_image(path) as image:
            return decoded(image, EXIF or "ignore")
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise ValueError(f"{path}: cannot be decoded ({error})") from error


class _ImageFiles(Dataset):
    """Image files that are opened on access; an item is (image, class index)."""

    samples: list[tuple[str, int]]
    transform: Callable | None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        image = _open_rgb(path)
        return (self.transform(image) if self.transform else image), label


class OptimizedImageDataset(_ImageFiles):
    """Images of a list of (path, class index); an item is (image, class index). Unreadable files raise ValueError."""

    def __init__(
        self, samples: Sequence[tuple[str, int]], class_names: Sequence[str], transform: Callable | None = None
    ) -> None:
        self.samples = [(str(path), int(label)) for path, label in samples]
        self.targets = [label for _, label in self.samples]
        self.classes = list(class_names)
        self.transform = transform


class OptimizedTempDataset(OptimizedImageDataset):
    """`OptimizedImageDataset` under the name that K-fold code uses."""


class WindowsCompatibleImageFolder(_ImageFiles):
    """A folder of class folders, one level deep, sorted by path; an item is (image, class index)."""

    def __init__(self, root: str | Path, transform: Callable | None = None) -> None:
        self.root = Path(root)
        self.transform = transform
        self.classes, samples = scan(self.root)
        self.class_to_idx = {name: index for index, name in enumerate(self.classes)}
        self.samples = [(str(sample.path), sample.label) for sample in samples]


def create_optimized_transforms(size: int = IMG_SIZE, is_training: bool = True) -> Callable:
    """A torchvision transform of one PIL image to a normalised float32 tensor (3, size, size)."""
    from torchvision import transforms as t

    if not is_training:
        return t.Compose(
            [t.Resize(resized_side(size)), t.CenterCrop(size), t.ToTensor(), t.Normalize(list(MEAN), list(STD))]
        )
    return t.Compose(
        [
            t.RandomResizedCrop(size, scale=(0.8, 1.0)),
            t.RandomHorizontalFlip(0.5),
            t.RandomVerticalFlip(0.2),
            t.ColorJitter(0.2, 0.2, 0.2, 0.05),
            t.RandomRotation(15),
            t.RandomAffine(0, translate=(0.1, 0.1), scale=(0.95, 1.05)),
            t.ToTensor(),
            t.RandomErasing(0.15),
            t.Normalize(list(MEAN), list(STD)),
        ]
    )


def worker_init_fn(_worker_id: int) -> None:
    """Seed NumPy and `random` of a loader process from its torch seed."""
    seed = torch.initial_seed() % 2**32
    np.random.seed(seed)
    random.seed(seed)


def create_optimized_dataloader(
    dataset: Dataset,
    batch_size: int,
    shuffle: bool = True,
    num_workers: int | None = None,
    *,
    generator: torch.Generator | None = None,
) -> DataLoader:
    """A `DataLoader` without timeout; without `num_workers`, small data sets use no loader processes."""
    if num_workers is None:
        num_workers = 0 if len(dataset) < FEW_IMAGES else get_optimal_workers()  # type: ignore[arg-type]
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available() and num_workers > 0,
        persistent_workers=num_workers > 0,
        prefetch_factor=2 if num_workers > 0 else None,
        worker_init_fn=worker_init_fn,
        generator=generator,
    )


class DecodedDataset(Dataset):
    """Samples with pixels from the image cache; an item is (normalised centre crop, float32 (3, S, S), class index)."""

    def __init__(
        self,
        samples: Sequence[Sample],
        classes: Sequence[str],
        contents: Sequence[str],
        size: int = IMG_SIZE,
        preprocessing: Mapping[str, Any] | None = None,
    ) -> None:
        self.records = list(samples)
        self.samples = [(str(sample.path), sample.label) for sample in self.records]
        self.targets = [sample.label for sample in self.records]
        self.sample_ids = [sample.sample_id for sample in self.records]
        self.classes = list(classes)
        self.contents = list(contents)
        self.size = size
        self.preprocessing = preprocessing
        self.normalisation = None if preprocessing is None else Normalisation.of_record(preprocessing)
        resizing = evaluation_resizing(size) if preprocessing is None else resizing_of_record(preprocessing)
        self.images: DecodedImages = open_images(
            [sample.path for sample in self.records], self.contents, resizing, IMAGE_CACHE_DIR
        )

    @classmethod
    def of_split(
        cls,
        split: str,
        size: int = IMG_SIZE,
        split_dir: Path = SPLIT_DIR,
        preprocessing: Mapping[str, Any] | None = None,
    ) -> DecodedDataset:
        """Load one split from disk; raises FileNotFoundError if there is none.

        `preprocessing` is the record of a network of `size` px; None: the base pipeline's evaluation transform.
        """
        classes, samples, contents = split_contents(Path(split_dir), split)
        return cls(samples, classes, [contents[sample.sample_id] for sample in samples], size, preprocessing)

    def subset(self, rows: Sequence[int] | np.ndarray) -> DecodedDataset:
        """The data set of the given rows (n,), in the given order."""
        records, contents = [self.records[row] for row in rows], [self.contents[row] for row in rows]
        return DecodedDataset(records, self.classes, contents, self.size, self.preprocessing)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.crops([index])[0], self.targets[index]

    def crops(self, rows: Sequence[int] | np.ndarray, device: torch.device | str = "cpu") -> Tensor:
        """Normalised centre crops of the given rows by the evaluation transform, float32 (B, 3, S, S) on `device`."""
        pixels = copied(torch.from_numpy(self.images.crops(rows)), device).permute(0, 3, 1, 2)
        normal = normalise(pixels) if self.normalisation is None else self.normalisation.apply(pixels)
        return normal.contiguous()


class BatchLoader:
    """Batches (images (B, 3, S, S), labels (B,) on the CPU) from a `DecodedDataset`, in this process.

    Images are transformed on `device`, by default the base pipeline's, and remain there.

    In training, every epoch is shuffled and augmented by a generator seeded with (seed, epoch), so that an epoch can
    be reproduced without the earlier ones; a last batch of one image is merged into the previous batch, since BatchNorm
    fails on it. `balanced` epochs draw the same number of images with replacement, every class equally likely.
    """

    def __init__(
        self,
        dataset: DecodedDataset,
        batch_size: int = BATCH_SIZE,
        *,
        training: bool = False,
        seed: int = 0,
        kind: str = AUGMENT,
        balanced: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.training = training
        self.seed = seed
        self.kind = kind
        self.balanced = balanced
        self.device = DEVICE if device is None else device
        self.epoch = 0
        self._labels = torch.tensor(dataset.targets, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._bounds())

    def _bounds(self) -> list[tuple[int, int]]:
        count = len(self.dataset)
        starts = list(range(0, count, self.batch_size))
        if self.training and len(starts) > 1 and count - starts[-1] == 1:
            starts.pop()
        return list(zip(starts, [*starts[1:], count], strict=True))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self.dataset))
        if self.training:
            generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
            if self.balanced:
                order = balanced_order(self._labels, len(self.dataset.classes), generator)
            else:
                order = torch.randperm(len(self.dataset), generator=generator)
            self.epoch += 1
        for start, stop in self._bounds():
            rows = order[start:stop]
            if self.training:
                pixels = [torch.from_numpy(self.dataset.images.image(int(row)).copy()).permute(2, 0, 1) for row in rows]
                images = self._augmented(pixels, generator)
            else:
                images = self.dataset.crops(rows.numpy(), self.device)
            yield images, self._labels[rows]

    def _augmented(self, pixels: list[Tensor], generator: torch.Generator) -> Tensor:
        images = augment(pixels, self.dataset.size, self.kind, generator, self.device)
        normalisation = self.dataset.normalisation
        return images if normalisation is None else normalisation.replace_imagenet(images)


def prepare_datasets_for_backbone(backbone_name: str, size: int = IMG_SIZE) -> tuple[DecodedDataset, DecodedDataset]:
    """(train, val) data sets of the split; raises FileNotFoundError if there is no split yet."""
    preprocessing = evaluation_record(size, EXIF) if EXIF == "apply" else None
    train, val = (DecodedDataset.of_split(split, size, preprocessing=preprocessing) for split in ("train", "val"))
    return train, val
