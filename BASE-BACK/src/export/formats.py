"""Export formats: the contents of a package, the writer of each file, and the check of each file."""

from __future__ import annotations

import copy
import difflib
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from config import settings
from export.onnx_files import TRACING, exporter_of, write_onnx
from export.programs import capture
from export.smoke_tests import (
    answers,
    check_file,
    evaluation_copy,
    is_ready,
    probe_batches,
)
from utils.torchscript import exporter_without_notices, torchscript_without_notices


@dataclass(frozen=True)
class Package:
    """A network and everything that is exported with it."""

    arch_name: str
    network: nn.Module
    """The model, or a copy if it is not on the CPU in evaluation mode; never modified."""
    weights: dict[str, Tensor]
    """Its state dict: contiguous CPU tensors that share no storage."""
    checkpoint: dict[str, Any]
    """Contents of the full checkpoint."""
    batches: list[tuple[Tensor, ...]]
    """Probe batches, each a tuple of one tensor `(B, 3, H, W)` per input of the network."""
    expected: list[Tensor]
    """The network's logits `(B, C)` for each probe batch."""

    @property
    def width(self) -> int:
        """Number of logits."""
        return self.expected[0].shape[1]

    @cached_property
    def deployed(self) -> nn.Module:
        """The network in its inference form: training-time branches (MobileOne) are fused into one convolution.

        With such branches it is a copy that shares every other tensor, since an ensemble is large.
        """
        changing = [module for module in self.network.modules() if hasattr(module, "reparameterize")]
        if not changing:
            return self.network
        replaced = {id(tensor) for module in changing for tensor in (*module.parameters(), *module.buffers())}
        tensors = (*self.network.parameters(), *self.network.buffers())
        network: Any = copy.deepcopy(
            self.network, {id(tensor): tensor for tensor in tensors if id(tensor) not in replaced}
        )
        with torch.random.fork_rng(devices=[]):  # fused convolutions are initialised before they get their weights
            for module in list(network.modules()):
                if hasattr(module, "reparameterize"):
                    module.reparameterize()
        deployed: torch.nn.Module = network
        return deployed

    @property
    def example(self) -> tuple[Tensor, ...]:
        """A batch of two rows to trace with: tracing may treat a batch size of one as a constant."""
        return tuple(torch.cat([first, first.flip(-1)]) for first in self.batches[0])

    @property
    def shape(self) -> tuple[Any, ...]:
        """Shape of one row; for a network with several inputs, one shape per input."""
        shapes = tuple(tuple(images.shape[1:]) for images in self.batches[0])
        return shapes[0] if len(shapes) == 1 else shapes

    def source(self, name: str) -> str:
        """Digest of everything that determines the file of a format; an equal digest means the file is current."""
        if name == "checkpoint":
            return digest(self.checkpoint)
        facts = [type(self.network).__name__, self.shape, self.weights]
        exporter = exporter_of(self.network) if name == "onnx" else TRACING
        return digest(facts if exporter == TRACING else [*facts, exporter])


def _write_weights(package: Package, path: Path) -> None:
    _save(package.weights, path)


def _write_safetensors(package: Package, path: Path) -> None:
    save_file(package.weights, path, metadata={"format": "pt"})


def _write_checkpoint(package: Package, path: Path) -> None:
    _save(package.checkpoint, path)


def _write_trace(package: Package, path: Path) -> None:
    with torchscript_without_notices(), torch.no_grad(), path.open("wb") as file:
        torch.jit.save(torch.jit.trace(package.deployed, package.example, check_trace=False), file)


def _write_program(package: Package, path: Path) -> None:
    with path.open("wb") as file, exporter_without_notices():
        torch.export.save(capture(package.deployed, package.example), file)


def _write_onnx(package: Package, path: Path) -> None:
    metadata = {"arch_name": package.arch_name, "classes": package.checkpoint["extra"]["classes"]}
    metadata |= package.checkpoint.get("metadata", {})
    write_onnx(package.deployed, package.example, path, metadata, data_name=f"{package.arch_name}.onnx.data")


def _save(content: Any, path: Path) -> None:
    with path.open("wb") as file:  # with a path, its name would be in the archive
        torch.save(content, file)


FORMATS: dict[str, dict[str, Callable[[Package, Path], None]]] = {
    "state_dict": {"{}_state_dict_cpu.pth": _write_weights, "{}_state_dict_cpu.safetensors": _write_safetensors},
    "checkpoint": {"{}_checkpoint_full.pth": _write_checkpoint},
    "torchscript": {"{}_trace.pt": _write_trace},
    "onnx": {"{}.onnx": _write_onnx},
    "exported_program": {"{}.pt2": _write_program},
}
"""Format -> its files and their writers; the first file is the one that records name."""


def known_formats(names: Iterable[str]) -> list[str]:
    """The formats without duplicates. Raises ValueError with the known names when one is unknown."""
    requested = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    all_formats = list(dict.fromkeys([*settings.EXPORT_TYPES, *FORMATS]))
    for name in requested:
        if name not in all_formats:
            near = difflib.get_close_matches(str(name).lower(), all_formats, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"unknown export format {name!r}{hint} Known: {', '.join(all_formats)}")
    return requested


def make_package(
    model: nn.Module,
    arch_name: str,
    sample_input: Tensor | Sequence[Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    training_metadata: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
) -> Package:
    """Run the model once and collect a `Package`; raises ValueError when the sample or the classes do not fit it.

    `sample_input` holds one batch per input of the model; a single input may be passed as a tensor.
    """
    side = getattr(model, "img_size", None) or settings.IMG_SIZE
    sample = torch.zeros(1, 3, side, side) if sample_input is None else sample_input
    samples = (sample,) if isinstance(sample, Tensor) else tuple(sample)
    # A network with `input_names` defines the shapes and types of its inputs, for example uint8 (B, H, W, 3).
    if not hasattr(model, "input_names"):
        for images in samples:
            if images.ndim != 4 or not images.is_floating_point():
                raise ValueError(f"sample_input is {images.dtype} {tuple(images.shape)}; expected floats (B, 3, H, W)")
    network = model if is_ready(model) else evaluation_copy(model)
    batches = probe_batches([(images.shape, images.dtype) for images in samples])
    expected = answers(network, batches)
    width = expected[0].shape[1]
    names = [str(number) for number in range(width)] if class_names is None else list(class_names)
    for count, noun in ((num_classes, "num_classes"), (len(names), "class names")):
        if count is not None and count != width:
            raise ValueError(f"{arch_name}: the model gives {width} logits, but there are {count} {noun}")
    weights = _weights_of(network)
    extra = {"backbone_name": getattr(model, "architecture", arch_name), "classes": names}
    extra |= {"model_size": getattr(model, "size", None), "img_size": samples[0].shape[-1]}
    checkpoint: dict[str, Any] = {"model_state_dict": weights, "arch_name": arch_name, "extra": extra}
    if optimizer is not None:
        checkpoint["optimizer_state_dict"] = _on_cpu(optimizer.state_dict())
    if scheduler is not None:
        checkpoint["scheduler_state_dict"] = _on_cpu(scheduler.state_dict())
    if training_metadata is not None:
        checkpoint["metadata"] = plain(training_metadata, "training_metadata")
    return Package(arch_name, network, weights, checkpoint, batches, expected)


def write_checked(package: Package, name: str, write: Callable[[Package, Path], None], path: Path) -> dict[str, Any]:
    """Write one file, open it again and return its parity record. Raises ParityError when the logits differ."""
    write(package, path)
    return check_file(name, path, package.network, package.batches, package.expected)


def plain(value: Any, location: str) -> Any:
    """Convert a record to types that JSON and `weights_only` support; NaN and infinity become None.

    Raises ValueError with the dotted location of a value of any other type.
    """
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, float):
        return float(value) if np.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{location}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{location}[{number}]") for number, item in enumerate(value)]
    raise ValueError(f"{location} is a {type(value).__name__}; expected numbers, text, lists and dictionaries")


def _weights_of(network: nn.Module) -> dict[str, Tensor]:
    """The state dict; only tensors that are views or share storage are copied, since files would hold them twice."""
    weights: dict[str, Tensor] = {}
    addresses: set[int] = set()
    for name, tensor in network.state_dict().items():
        storage = tensor.untyped_storage()
        is_unshared = (
            tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage.data_ptr() not in addresses
        )
        addresses.add(storage.data_ptr())
        weights[name] = tensor.detach() if is_unshared else tensor.detach().clone(memory_format=torch.contiguous_format)
    return weights


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(item) for item in value)
    return value


def digest(value: Any) -> str:
    """SHA-256 of nested dictionaries and lists of tensors and plain values."""
    total = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            total.update(f"{part.dtype}{tuple(part.shape)}".encode())
            total.update(part.contiguous().flatten().view(torch.uint8).numpy().data)
        elif isinstance(part, Mapping):
            total.update(b"{")
            for key, item in part.items():
                total.update(f"{key!r}:".encode())
                add(item)
            total.update(b"}")
        elif isinstance(part, (list, tuple)):
            total.update(b"[")
            for item in part:
                add(item)
                total.update(b",")
            total.update(b"]")
        else:
            total.update(repr(part).encode())

    add(value)
    return total.hexdigest()
