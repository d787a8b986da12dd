"""The training transform on tensors."""

from __future__ import annotations

import pytest
import torch

from utils.augmentation import MEAN, STD, augment


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
