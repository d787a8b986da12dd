"""The workspace of the GPU benchmark: photographs, trained members, and the device that is measured."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

import utils  # noqa: E402, F401  (installs the mount)

CLASSES = ("china_left", "china_right", "flower_left", "flower_right")
"""Where a crop comes from: which of scikit-learn's two photographs, and which part of it; the parts overlap."""
MEMBER_EPOCHS, RATE = 2, 1e-3


@dataclass(frozen=True)
class Form:
    """How large a run is."""

    size: str
    """Of the networks: full or tiny"""
    side: int
    """Of their images, px"""
    crop: int
    """Of the photographs, px"""
    members: tuple[str, ...]
    trained: str
    """The network whose training is timed"""
    student: str
    photographs: dict[str, int]
    """Split -> number of photographs"""
    streamed: int
    """Images that each member is streamed over: the photographs of val again and again"""
    compared: int
    """Photographs on which a device is compared with float32 on the CPU"""
    batch_size: int
    turns: int
    """Of epochs that are timed by turns; the quickest of each kind counts"""


FULL = Form(
    size="full",
    side=224,
    crop=300,
    members=("CustomGhostNetV2", "CustomRegNet", "CustomSwinTransformer", "CustomCoAtNet", "CustomMaxViT"),
    trained="CustomResNetMish",
    student="CustomMobileOne",
    photographs={"train": 512, "val": 512, "test": 8},
    streamed=16384,
    compared=128,
    batch_size=32,
    turns=3,
)
QUICK = Form(
    size="tiny",
    side=32,
    crop=64,
    members=("CustomRegNet", "CustomConvNeXt"),
    trained="CustomResNetMish",
    student="CustomMobileOne",
    photographs={"train": 32, "val": 32, "test": 8},
    streamed=128,
    compared=32,
    batch_size=16,
    turns=1,
)


@dataclass(frozen=True)
class Bench:
    """A workspace with photographs and trained members, and the device that is measured."""

    workspace: Path
    form: Form
    device: str

    @property
    def on_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    @property
    def torch_device(self) -> Any:
        """The device as torch's object."""
        import torch

        return torch.device(self.device)

    def new_scaler(self) -> Any:
        """Of the loss of a training in float16; it changes nothing on the CPU."""
        import torch

        return torch.amp.GradScaler("cuda", enabled=self.on_cuda)

    def images(self, split: str, count: int | None = None) -> Any:
        """The images of a split as an `ImageSplit`; with `count` so many, the same ones again where there are fewer."""
        from utils.core.artifacts import FileDigests
        from utils.predictions.image_splits import list_images

        found = list_images(self.workspace / "split_dataset", split, FileDigests(self.workspace / "digests.json"))
        return found if count is None else found.take(np.arange(count) % len(found.paths))

    def spec(self, name: str) -> Any:
        """How the trained member of that name is built."""
        from utils.networks.construction import NetworkSpec

        checkpoint = self.workspace / "checkpoints" / f"{name}_final.pth"
        return NetworkSpec(name, checkpoint, self.form.size, self.preprocessing(), CLASSES)

    def preprocessing(self) -> Any:
        """The base pipeline's."""
        from utils.networks.preprocessing import Preprocessing

        return Preprocessing.of_base_pipeline(self.form.side)

    def new_network(self, name: str) -> Any:
        """A network with random weights, on the device."""
        import torch

        from models import create_custom_backbone

        torch.manual_seed(0)
        model = create_custom_backbone(name, len(CLASSES), size=self.form.size, img_size=self.form.side)
        return model.to(self.device)

    def train_loader(self) -> Any:
        """The base pipeline's batches of train, shuffled and augmented."""
        from utils.datasets import BatchLoader, DecodedDataset

        dataset = DecodedDataset.of_split("train", self.form.side, self.workspace / "split_dataset")
        return BatchLoader(dataset, self.form.batch_size, training=True)

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.on_cuda:
            import torch

            torch.cuda.synchronize()


@contextmanager
def prepared(form: Form, device: str) -> Iterator[Bench]:
    """A temporary workspace with photographs and members that were trained on the device."""
    with tempfile.TemporaryDirectory(prefix="gpu-") as name:
        bench = Bench(Path(name), form, device)
        os.environ |= {"DBT_BASE_DIR": name, "DBT_MODEL_SIZE": form.size}
        write_photographs(bench)
        for member in form.members:
            _train_member(bench, member)
        yield bench


def write_photographs(bench: Bench) -> None:
    """Crops of scikit-learn's two sample photographs as JPEG files in class folders of each split."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    rng = np.random.default_rng(0)
    scenes = {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    for split, count in bench.form.photographs.items():
        for number in range(count):
            label = CLASSES[number % len(CLASSES)]
            scene, _, part = label.partition("_")
            height, width = (length - bench.form.crop for length in scenes[scene].shape[:2])
            left = int(rng.integers(0, width // 2)) + (width // 2 if part == "right" else 0)
            top = int(rng.integers(0, height))
            pixels = scenes[scene][top : top + bench.form.crop, left : left + bench.form.crop]
            path = bench.workspace / "split_dataset" / split / label / f"{number:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, quality=92)


def _train_member(bench: Bench, name: str) -> None:
    """A short training, after which the classes have different probabilities, as those of real members have."""
    from training import (
        create_optimized_optimizer,
        get_loss_function_for_backbone,
        save_checkpoint,
        train_epoch_optimized,
    )

    model, loader = bench.new_network(name), bench.train_loader()
    optimizer, scaler = create_optimized_optimizer(model, RATE, name), bench.new_scaler()
    criterion = get_loss_function_for_backbone(name, len(CLASSES))
    for _ in range(MEMBER_EPOCHS):
        train_epoch_optimized(model, loader, optimizer, criterion, bench.torch_device, scaler=scaler)
    extra = {"backbone_name": name, "model_size": bench.form.size, "img_size": bench.form.side}
    path = bench.workspace / "checkpoints" / f"{name}_final.pth"
    path.parent.mkdir(exist_ok=True)
    save_checkpoint(path, model.cpu(), extra=extra | {"classes": list(CLASSES)})
