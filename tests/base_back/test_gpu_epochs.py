"""Epochs of the base pipeline on a device that counts what is moved and how often it is waited for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_cuda import fake_cuda
from noise_datasets import noise_datasets

BATCHES, CLASSES = 5, 3


def batches():
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(4, 3, 32, 32, generator=generator), torch.randint(0, CLASSES, (4,), generator=generator))
        for _ in range(BATCHES)
    ]


def network():
    from models import create_custom_backbone

    torch.manual_seed(0)
    return create_custom_backbone("CustomConvNeXt", CLASSES, size="tiny", img_size=32)


def epochs(device: str, count: int, *, shares_scaler: bool = True):
    """The weights after some epochs, and what the last one returned."""
    from training.pipeline import train_epoch_optimized

    model = network().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cuda") if shares_scaler and device == "cuda" else None
    for _ in range(count):
        torch.manual_seed(1)
        result = train_epoch_optimized(
            model, batches(), optimizer, torch.nn.CrossEntropyLoss(), torch.device(device), scaler=scaler
        )
    return {name: values.cpu() for name, values in model.state_dict().items()}, result


def test_a_training_ends_as_on_the_cpu(monkeypatch):
    expected, expected_result = epochs("cpu", 2)
    with fake_cuda(monkeypatch):
        weights, result = epochs("cuda", 2)
    for name, values in expected.items():
        torch.testing.assert_close(weights[name], values, atol=1e-3, rtol=1e-3)
    np.testing.assert_allclose(result[7], expected_result[7], atol=1e-3)
    np.testing.assert_array_equal(result[6], expected_result[6])


@pytest.mark.parametrize("is_training", [True, False])
def test_a_batch_is_moved_once_and_its_predictions_come_back_with_all_others(monkeypatch, is_training):
    from training.pipeline import train_epoch_optimized, validate_epoch_optimized

    criterion = torch.nn.CrossEntropyLoss()
    with fake_cuda(monkeypatch) as device:
        model = network().to("cuda")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cuda")
        device.counts.clear()
        if is_training:
            train_epoch_optimized(model, batches(), optimizer, criterion, torch.device("cuda"), scaler=scaler)
        else:
            validate_epoch_optimized(model, batches(), criterion, torch.device("cuda"))
        counts = device.counts.copy()
    moved_by_scaler = BATCHES if is_training else 0
    assert counts["to device"] <= 2 * BATCHES + moved_by_scaler
    assert counts["synchronisations"] <= (3 if is_training else 1) * BATCHES
    assert counts["to host"] <= 1 + moved_by_scaler


def test_the_fake_refuses_what_a_gpu_refuses(monkeypatch):
    with fake_cuda(monkeypatch):
        model, images = network().to("cuda"), batches()[0][0]
        with pytest.raises(RuntimeError, match="same device"):
            model(images)
        with pytest.raises(TypeError, match="can't convert cuda"):
            model(images.to("cuda")).detach().numpy()
        assert model(images.to("cuda")).is_cuda
    assert not images.is_cuda


@pytest.mark.parametrize("is_training", [True, False])
def test_a_loader_transforms_its_batches_on_the_device(tmp_path, monkeypatch, is_training):
    from utils.datasets import BatchLoader

    train, _ = noise_datasets(tmp_path)
    expected = list(BatchLoader(train, 8, training=is_training, kind="full", device="cpu"))
    with fake_cuda(monkeypatch) as device:
        batches = list(BatchLoader(train, 8, training=is_training, kind="full", device="cuda"))
        assert all(images.is_cuda and not labels.is_cuda for images, labels in batches)
        counted = device.counts["to host"], device.counts["synchronisations"], device.counts["from pageable memory"]
        assert counted == (0, 0, 0)
        assert device.counts["bytes to device"] < 2 * len(train) * 3 * 36 * 36  # a byte for each number of a pixel
        for (images, labels), (other_images, other_labels) in zip(batches, expected, strict=True):
            assert torch.equal(images.cpu(), other_images)
            assert torch.equal(labels, other_labels)


def test_a_loader_is_that_of_the_base_pipelines_device(tmp_path, monkeypatch):
    from utils import datasets

    monkeypatch.setattr(datasets, "DEVICE", torch.device("cuda"))
    train, _ = noise_datasets(tmp_path)
    with fake_cuda(monkeypatch):
        assert all(images.is_cuda for images, _ in datasets.BatchLoader(train, 8))
