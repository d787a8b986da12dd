"""What both export benchmarks need: networks with random weights, images, the proof of a file in its own runtime."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils  # noqa: F401  (installs the mount)

CLASSES = 10
PARITY = 1e-4
"""Largest difference of a probability that a file may show, as the certificate has it."""


@contextmanager
def prepared(size: str, data: Path | None, count: int) -> Iterator[tuple[Path, list[Path]]]:
    """A folder for what is made, and image files; networks of this size run on one thread."""
    with tempfile.TemporaryDirectory(prefix="export-bench-") as name:
        scratch = Path(name)
        os.environ |= {"DBT_BASE_DIR": str(scratch / "workspace"), "DBT_MODEL_SIZE": size}
        import torch

        torch.set_num_threads(1)
        yield scratch, image_files(data, scratch, count)


def proved(
    name: str, entry: dict, staged: Path, images: np.ndarray, combiner: Any, seen: Any, outputs: Any, network: Any,
    scratch: Path,
) -> dict[str, Any]:  # fmt: skip
    """The certificate of one file, run in a new process by its own runtime on one thread.

    Compared with `combiner` on what it has `seen`; where that is None, with the network itself.
    """
    import torch

    from utils.exporting import parity_check, tflite_conversion

    failed = {"passed": False, "parity": None, "latency_ms": None}
    if entry["status"] != "ok":
        return failed | {"reason": entry["reason"]}
    if combiner is None:
        with torch.inference_mode():
            expected = torch.cat([network(few) for few in torch.from_numpy(images).split(4)]).double().numpy()
    else:
        expected = combiner.predict_proba(seen)
    batches, rows = parity_check.make_batches(
        [(image,) for image in images], (1,) if name == "tflite" else parity_check.BATCH_SIZES
    )
    probe = parity_check.ReferenceBatches(batches, rows, expected)
    if outputs is not None:
        own = outputs.embeddings if combiner.reads_embeddings else None
        probe = parity_check.ReferenceBatches(batches, rows, expected, outputs.logits, own, combiner)
    python = {"python": tflite_conversion.python_interpreter()} if name == "tflite" else {}
    try:
        files = [staged / entry["path"]]
        with parity_check.RuntimeProcess(
            name, files, probe, network.output_names, scratch / "run", job={"threads": 1}, **python
        ) as process:
            (answers,) = process.outputs()
    except parity_check.FileRunError as error:
        return failed | {"reason": str(error)}
    return parity_check.compare_outputs(probe, answers) | {"latency_ms": answers.facts["latency_ms"]}


def part(name: str, size: str) -> Any:
    """A network with random weights whose BatchNorm has seen some noise."""
    import torch

    from models import create_custom_backbone
    from utils.networks.ensemble_network import MemberNetworks
    from utils.networks.preprocessing import Preprocessing

    torch.manual_seed(0)
    network = create_custom_backbone(name, CLASSES, size=size)
    side = network.img_size
    with torch.no_grad():
        network.train()(torch.randn(8, 3, side, side))
    return MemberNetworks(name, [network.eval()], Preprocessing.of_base_pipeline(side), range(CLASSES))


def squares(files: Sequence[Path], size: int) -> np.ndarray:
    """Files as float32 (N, 3, size, size) in [0, 1]."""
    from utils.inference.onnx_prediction import ImageInput, ResizeRule, open_image

    given = ImageInput("images", ResizeRule(size, int(size * 1.14)), "ignore")
    return np.stack([given.array({"ignore": open_image(file).convert("RGB")}) for file in files])


def image_files(data: Path | None, scratch: Path, count: int) -> list[Path]:
    """The first `count` images of a folder; without one, scikit-learn's digits as PNG files in `scratch`."""
    if data is not None:
        from utils.inference import onnx_prediction

        return onnx_prediction.list_image_files([data])[:count]
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = scratch / "images"
    folder.mkdir()
    for number, pixels in enumerate(load_digits().images[:count]):
        Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8)).save(folder / f"{number:03d}.png")
    return sorted(folder.iterdir())
