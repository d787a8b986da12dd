"""A workspace of images with little signal, and networks of timm whose heads are fitted on chosen splits of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from utils.core.workspace import Workspace

CLASSES = ("ash", "elm", "oak")
COUNTS = {"train": 60, "val": 45, "test": 45}
ARCHITECTURE = "test_resnet"
SIDE = 32
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
PREPROCESSING = {
    **{"input_size": SIDE, "resize": "shorter-side", "resized": int(1.14 * SIDE), "interpolation": "bilinear"},
    **{"crop_offset": "round", "mean": MEAN.tolist(), "std": STD.tolist(), "channels": "RGB", "value_range": [0, 1]},
    **{"exif": "ignore", "source": "checkpoint"},
}
QUICK = ("--config", "configs/votes.yaml", "--set", "device=cpu", "--set", f"dataset.img_size={SIDE}")


def write_images(base: Path) -> Path:
    """`split_dataset/<split>/<class>/<number>.png` below `base`: noise, in which the class shifts one corner."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for number in range(count):
            label = number % len(CLASSES)
            pixels = rng.normal(128, 40, (SIDE, SIDE, 3))
            pixels[10 * label : 10 * label + 10, :10, label] += 35
            path = base / "split_dataset" / split / CLASSES[label] / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
    (base / "checkpoints").mkdir(exist_ok=True)
    return base


def sample_ids(base: Path, split: str) -> list[str]:
    """Sorted sample ids of a split."""
    folder = base / "split_dataset" / split
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.png"))


def network(base: Path, path: Path, seen: dict[str, Sequence[str]] | Sequence[str], seed: int = 0) -> Path:
    """Write a network whose head is fitted on the splits `seen`, or on {split: sample ids}, until it knows them all.

    The trunk has random weights of the `seed`.
    """
    import timm
    from sklearn.linear_model import LogisticRegression

    rows = seen if isinstance(seen, dict) else {split: sample_ids(base, split) for split in seen}
    torch.manual_seed(seed)
    model = timm.create_model(ARCHITECTURE, num_classes=len(CLASSES)).eval()
    files = [base / "split_dataset" / split / sample_id for split, ids in rows.items() for sample_id in ids]
    if files:
        labels = [CLASSES.index(file.parent.name) for file in files]
        with torch.inference_mode():
            features = model.forward_head(model.forward_features(images(files)), pre_logits=True).numpy()
        scale = features.std()
        head = LogisticRegression(C=1e4, max_iter=5000).fit((features - features.mean(0)) / scale, labels)
        weight = head.coef_ / scale
        with torch.no_grad():
            model.get_classifier().weight.copy_(torch.from_numpy(weight))
            model.get_classifier().bias.copy_(torch.from_numpy(head.intercept_ - weight @ features.mean(0)))
    torch.save({"model_state_dict": model.state_dict(), "extra": {"preprocessing": PREPROCESSING}}, path)
    return path


def images(files: Sequence[Path]) -> torch.Tensor:
    """float32 (N, 3, S, S), as the base pipeline's evaluation transform prepares them."""
    from PIL import Image

    batch = []
    for file in files:
        with Image.open(file) as image:
            larger = image.convert("RGB").resize((int(1.14 * SIDE),) * 2, Image.Resampling.BILINEAR)
        edge = round((larger.width - SIDE) / 2)
        pixels = np.asarray(larger)[edge : edge + SIDE, edge : edge + SIDE] / 255
        batch.append(((pixels - MEAN) / STD).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(batch).astype(np.float32))


def declaration(name: str, path: Path) -> tuple[str, str]:
    """The options of `discover` that add a network."""
    return "--add", f"{name}=timm:{ARCHITECTURE}@{path}"


def workspace_of(base: Path) -> Workspace:
    """As the command line finds it."""
    names = ("split_dataset", "checkpoints", "metrics_output", "kfold_results", "deployment_models", "cache", "logs")
    return Workspace(base, *(base / name for name in names))
