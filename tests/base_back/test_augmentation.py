"""The training transform on tensors."""

from __future__ import annotations

import pytest
import torch
from fake_cuda import fake_cuda

from utils import augmentation
from utils.augmentation import MEAN, STD, augment, copied


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def restored(batch: torch.Tensor) -> torch.Tensor:
    return batch * torch.tensor(STD).view(1, 3, 1, 1) + torch.tensor(MEAN).view(1, 3, 1, 1)


def test_images_of_several_shapes_become_one_batch_and_the_seed_decides():
    images = [torch.randint(0, 255, (3, *shape), dtype=torch.uint8) for shape in ((36, 36), (36, 50), (60, 36))]
    first = augment(images, 32, "full", generator())
    assert first.shape == (3, 3, 32, 32)
    assert torch.isfinite(first).all()
    assert torch.equal(first, augment(images, 32, "full", generator()))
    assert not torch.equal(first, augment(images, 32, "full", generator(1)))
    # An image is warped as it would be beside images of its own shape.
    assert torch.equal(first[:1], augment([images[0], *images[1:]], 32, "full", generator())[:1])


def test_values_stay_colours():
    images = [torch.full((3, 36, 36), value, dtype=torch.uint8) for value in (0, 128, 255) for _ in range(50)]
    pixels = restored(augment(images, 32, "full", generator()))
    assert pixels.min() > -1e-5
    assert pixels.max() < 1 + 1e-5


def test_grey_stays_grey_under_the_turn_of_hue():
    images = [torch.randint(0, 255, (1, 36, 36), dtype=torch.uint8).expand(3, -1, -1) for _ in range(20)]
    pixels = restored(augment(images, 32, "full", generator()))
    assert (pixels - pixels.mean(1, keepdim=True)).abs().max() < 1e-4


@pytest.mark.parametrize(("kind", "mirrored"), [("full", True), ("no_flip", False)])
def test_only_full_mirrors(kind, mirrored):
    image = torch.zeros(3, 36, 36, dtype=torch.uint8)
    image[:, :, :18] = 255  # bright on the left
    pixels = restored(augment([image] * 200, 32, kind, generator()))
    left_is_brighter = pixels[..., :16].mean((1, 2, 3)) > pixels[..., 16:].mean((1, 2, 3))
    assert (left_is_brighter.float().mean() < 0.9) == mirrored
    assert left_is_brighter.any()


def test_none_is_the_centre_crop():
    image = torch.arange(3 * 36 * 36, dtype=torch.int64).remainder(256).to(torch.uint8).view(3, 36, 36)
    pixels = restored(augment([image], 32, "none", generator()))
    assert torch.allclose(pixels[0] * 255, image[:, 2:34, 2:34].float(), atol=1e-3)


@pytest.mark.parametrize("kind", ["full", "no_flip", "none"])
def test_a_gpu_gets_bytes_and_transforms_the_batch_without_a_wait(monkeypatch, kind):
    shapes = ((36, 36), (36, 50), (60, 36), (36, 36)) * 10
    images = [torch.randint(0, 255, (3, *shape), dtype=torch.uint8) for shape in shapes]
    expected = augment(images, 32, kind, generator())
    moved = []
    with fake_cuda(monkeypatch) as device:
        monkeypatch.setattr(augmentation, "copied", lambda values, to: moved.append(values) or copied(values, to))
        batch = augment(images, 32, kind, generator(), "cuda")
        assert batch.is_cuda
        assert device.counts["synchronisations"] == device.counts["to host"] == 0
        assert device.counts["from pageable memory"] == 0
        assert torch.equal(batch.cpu(), expected)
    assert {values.dtype for values in moved if values.dim() > 3} == {torch.uint8}
    floats = sum(values.numel() for values in moved if values.is_floating_point())
    assert floats <= len(images) * (6 + 3 + 9) + 9  # warps, factors and turns of hue; constants


def test_rectangles_are_erased_where_and_as_large_as_the_view_says():
    pixels = torch.ones(3, 3, 10, 20)
    views = torch.tensor([[1.0, 0.25, 2.0, 0.0, 0.99], [0.0, 0.5, 1.0, 0.0, 0.0], [1.0, 0.02, 1.0, 0.99, 0.0]])
    erased = augmentation._erase(pixels.clone(), views) == 0
    assert erased.sum((1, 2, 3)).tolist() == [3 * 10 * 5, 0, 3 * 2 * 2]
    assert erased[0, :, :, 15:].all()  # 10 of 10 rows and 5 columns at the right
    assert erased[2, :, 8:, :2].all()
    assert torch.equal(augmentation._erase(pixels.clone(), views[1:2].expand(3, 5)), pixels)
