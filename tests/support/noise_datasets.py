"""Decoded data sets of noise images, which a network can only memorise, and the pipeline's log."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from utils.datasets import DecodedDataset
from utils.samples import Sample


def noise_datasets(folder: Path) -> tuple[DecodedDataset, DecodedDataset]:
    """Twenty-four train and twelve val images of three classes."""
    from PIL import Image

    rng = np.random.default_rng(3)
    datasets = []
    for split, count in (("train", 24), ("val", 12)):
        samples = []
        for number in range(count):
            path = folder / split / str(number % 3) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (36, 36, 3), dtype=np.uint8)).save(path)
            samples.append(Sample(path=path, sample_id=f"{path.parent.name}/{path.name}", label=number % 3))
        contents = [hashlib.sha256(sample.path.read_bytes()).hexdigest() for sample in samples]
        datasets.append(DecodedDataset(samples, ["0", "1", "2"], contents, 32))
    return datasets[0], datasets[1]


@contextmanager
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The pipeline's logger hands nothing on, so that its records are caught at itself."""
    target = logging.getLogger("disease_pipeline")
    target.addHandler(caplog.handler)
    try:
        yield
    finally:
        target.removeHandler(caplog.handler)
