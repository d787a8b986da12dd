"""Open exported files again and compare their logits with the network's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from config import settings
from utils import logger
from utils.torchscript import exporter_without_notices, torchscript_without_notices

TOLERANCE = 1e-5  # on the logits
OTHER_RUNTIMES = {"onnx": 1e-4}  # they sum in another order, which costs logits of about 10 five digits
LARGE_LOGITS = 10.0  # above this magnitude the tolerance grows with the largest logit
BATCH_SIZES = (1, 3, 17)  # neither the traced batch nor multiples of it


class ParityError(ValueError):
    """A file could be opened, but its logits differ from the network's; `parity` is the comparison."""

    def __init__(self, parity: dict[str, Any]) -> None:
        self.parity = parity
        difference = "not finite" if parity["max_abs_diff"] is None else f"off by {parity['max_abs_diff']:.3g}"
        super().__init__(
            f"opened again, its answers are {difference} (allowed {parity['tolerance']:g}); "
            f"{parity['label_flips']} of {parity['rows']} labels differ"
        )


def evaluation_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU in evaluation mode; the model keeps its device and mode."""
    return copy.deepcopy(model).cpu().eval()


def is_ready(model: nn.Module) -> bool:
    """Whether the model and all its modules are on the CPU and in evaluation mode."""
    tensors = (*model.parameters(), *model.buffers())
    return all(tensor.device.type == "cpu" for tensor in tensors) and not any(m.training for m in model.modules())


def probe_batches(inputs: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[tuple[Tensor, ...]]:
    """Seeded noise in batches of 1, 3 and 17 rows; `inputs` holds (batch shape `(B, 3, H, W)`, dtype) of each input."""
    generator = torch.Generator().manual_seed(settings.SEED)

    def noise(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if not dtype.is_floating_point:
            return torch.randint(0, 256, tuple(shape), generator=generator).to(dtype)
        return torch.randn(*shape, generator=generator).to(dtype)

    return [tuple(noise((rows, *shape[1:]), dtype) for shape, dtype in inputs) for rows in BATCH_SIZES]


def answers(network: Callable[..., Any], batches: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Logits `(B, C)` of every batch: the output, or the first of several. Raises ValueError for any other output."""
    with torch.no_grad():
        outputs_of_batches = [network(*batch) for batch in batches]
    all_logits = [outputs[0] if isinstance(outputs, tuple) else outputs for outputs in outputs_of_batches]
    for (images, *_), logits in zip(batches, all_logits, strict=True):
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            count = len(images)
            raise ValueError(f"for {count} images the network returned {shape}; expected logits ({count}, C)")
    return all_logits


def compare(expected: Sequence[Tensor], actual: Sequence[Tensor], tolerance: float = TOLERANCE) -> dict[str, Any]:
    """Parity of two lists of logits `(B, C)`: the largest difference, and the labels that change.

    Rows whose two best logits lie closer than twice the tolerance are counted as `near_threshold`, not as flips.
    Raises ValueError when the shapes differ.
    """
    if [logits.shape for logits in expected] != [logits.shape for logits in actual]:
        raise ValueError(f"opened again, it answers {tuple(actual[0].shape)}; expected {tuple(expected[0].shape)}")
    before, after = torch.cat(list(expected)).double(), torch.cat(list(actual)).double()
    difference = (before - after).abs().max().item()
    best = before.topk(min(2, before.shape[1]), dim=1).values
    near = (best[:, 0] - best[:, -1] <= 2 * tolerance) & (before.shape[1] > 1)
    flips = (before.argmax(dim=1) != after.argmax(dim=1)) & ~near
    return {
        "rows": len(before),
        "tolerance": tolerance,
        "max_abs_diff": difference if torch.isfinite(before).all() and torch.isfinite(after).all() else None,
        "label_flips": int(flips.sum()),
        "near_threshold": int(near.sum()),
        "batch_sizes": [len(logits) for logits in expected],
    }


def check_file(
    kind: str, path: Path, model: nn.Module, batches: Sequence[Sequence[Tensor]], expected: Sequence[Tensor]
) -> dict[str, Any]:
    """Open `path` as a file of this kind, run it and return its parity. Raises ParityError when the logits differ.

    `batches` are those of `probe_batches`, `expected` the logits `(B, C)` of each. A network's attribute
    `parity_tolerance` overrides the tolerance; a discontinuous network needs it.
    """
    largest = max(float(logits.abs().max()) for logits in expected)
    usual = OTHER_RUNTIMES.get(kind, TOLERANCE) * max(1.0, largest / LARGE_LOGITS)
    tolerance = getattr(model, "parity_tolerance", usual)
    parity = compare(expected, answers(OPENERS[kind](path, model), batches), tolerance)
    if parity["max_abs_diff"] is None or parity["max_abs_diff"] > tolerance or parity["label_flips"]:
        raise ParityError(parity)
    return parity


def _same_form(model: nn.Module) -> nn.Module:
    """A network of the same structure to load weights into: one of `models` is rebuilt, any other is copied."""
    size, img_size = getattr(model, "size", None), getattr(model, "img_size", None)
    if size is not None and img_size is not None:
        from models import BACKBONE_MAP, create_custom_backbone

        name = type(model).__name__
        if BACKBONE_MAP.get(name) is type(model):
            with torch.random.fork_rng(devices=[]):  # initialisation must not advance the caller's generator
                return create_custom_backbone(name, model.num_classes, size=size, img_size=img_size).eval()
    return evaluation_copy(model)


def _open_state_dict(path: Path, model: nn.Module) -> nn.Module:
    if path.suffix == ".safetensors":
        weights = load_file(path)
    else:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    network = _same_form(model)
    network.load_state_dict(weights)
    return network


def _open_checkpoint(path: Path, model: nn.Module) -> nn.Module:
    network = _same_form(model)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["model_state_dict"])
    return network


def _open_torchscript(path: Path, model: nn.Module) -> nn.Module:
    with torchscript_without_notices():
        return torch.jit.load(path, map_location="cpu").eval()


def _open_program(path: Path, model: nn.Module) -> nn.Module:
    with exporter_without_notices():
        network: nn.Module = torch.export.load(path).module()
    return network


def _open_onnx(path: Path, model: nn.Module) -> Callable[..., Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    output_name = session.get_outputs()[0].name

    def run(*images: Tensor) -> Tensor:
        arrays = {name: batch.numpy() for name, batch in zip(names, images, strict=True)}
        return torch.from_numpy(session.run([output_name], arrays)[0])

    return run


OPENERS: dict[str, Callable[[Path, nn.Module], Callable[..., Any]]] = {
    "state_dict": _open_state_dict,
    "checkpoint": _open_checkpoint,
    "torchscript": _open_torchscript,
    "onnx": _open_onnx,
    "exported_program": _open_program,
}


def run_export_smoke_tests(
    model: nn.Module,
    export_results: Mapping[str, Any],
    model_dir: Path | str,
    num_classes: int | None = None,
    image_size: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Open every exported file again and compare it with the model.

    `export_results` maps formats to paths or to entries of `export_status.json`; relative paths are relative to
    `model_dir`. Without `num_classes` any number of logits is accepted; `image_size` defaults to the model's.
    Returns {format: {passed, details, parity}}.
    """
    network = evaluation_copy(model)
    side = image_size or getattr(model, "img_size", None) or settings.IMG_SIZE
    batches = probe_batches([((1, 3, side, side), torch.float32)])
    expected = answers(network, batches)
    if num_classes is not None and expected[0].shape[1] != num_classes:
        raise ValueError(f"the model gives {expected[0].shape[1]} logits; expected {num_classes}")
    results: dict[str, dict[str, Any]] = {}
    for name, entry in export_results.items():
        kind = "state_dict" if name == "pytorch" else name
        path = entry.get("path") if isinstance(entry, Mapping) else entry
        passed, parity = False, None
        if path is None:
            details = f"no file: {entry.get('reason') or 'not exported'}"
        elif kind not in OPENERS:
            details = f"this version opens {', '.join(OPENERS)}"
        else:
            try:
                parity = check_file(kind, Path(model_dir) / path, network, batches, expected)
                passed, details = True, f"{parity['rows']} rows agree"
            except Exception as error:  # runtimes raise many types for a damaged file; the message is the result
                parity = getattr(error, "parity", None)
                details = f"{type(error).__name__}: {error}"
                logger.error("%s, %s: %s", Path(model_dir).name, name, details)
        results[name] = {"passed": passed, "details": details, "parity": parity}
    return results
