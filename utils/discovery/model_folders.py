"""Folders of trained networks in the layout of timm and Hugging Face: `config.json` and one weights file.

Files and addresses named in the configuration are not accessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.core.errors import UserError, did_you_mean
from utils.core.strict_json import read_json_object
from utils.discovery import preprocessing_sources
from utils.discovery.class_lists import class_list
from utils.networks.preprocessing import Preprocessing

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.pth", "pytorch_model.pth")
"""Names of the weights file; the first existing one is read."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
EXPECTED = f"expected {CONFIG} and {WEIGHTS[0]} or {WEIGHTS[1]}, as timm.models.save_for_hf writes them"
CORRECT = "Correct the file, or save the network again with timm.models.save_for_hf"
NEUTRAL_ARGUMENTS = ("num_classes", "drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate")
"""Arguments of timm's factory that do not affect the outputs of a trained network, or that are compared elsewhere."""


@dataclass(frozen=True)
class ModelFolder:
    """Facts about a network from its folder; None for facts that no file states."""

    weights: Path
    architecture: str
    num_classes: int | None
    classes: tuple[str, ...] | None
    """Names of the outputs, in order."""
    global_pool: str | None
    preprocessing: Preprocessing | None
    conflict: str | None
    """The other preprocessing, if the folder has two that differ."""


def is_model_folder(folder: Path) -> bool:
    """Whether a folder looks like one network: it has a configuration or a weights file."""
    return (folder / CONFIG).is_file() or any(
        path.suffix in WEIGHT_SUFFIXES and path.is_file() for path in folder.iterdir()
    )


def is_complete(folder: Path) -> bool:
    """Whether a folder has a configuration and a weights file with one of the usual names."""
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in WEIGHTS)


def read_model_folder(folder: Path, *, preprocessing_is_given: bool = False) -> ModelFolder:
    """Read the facts about the network in `folder`, but not its weights.

    With `preprocessing_is_given`, an unsupported preprocessing record is ignored. Raises UserError for a folder without
    configuration or weights, a contradictory configuration, a network that is not timm's, and an unsupported
    preprocessing.
    """
    if not folder.is_dir():
        problem = "a file, not a folder" if folder.exists() else "no such folder"
        siblings = [path.name for path in folder.parent.glob("*") if path.is_dir()]
        raise UserError(f"{folder}: {problem}{did_you_mean(folder.name, siblings, ';')} {EXPECTED}")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no {CONFIG}; {EXPECTED}. A bare file of weights: --add NAME=timm:ARCH@FILE")
    config = read_json_object(folder / CONFIG, remedy=CORRECT)
    where = str(folder / CONFIG)
    architecture = config.get("architecture")
    if not isinstance(architecture, str) or not architecture:
        raise UserError(f"{where}: no architecture{_of_transformers(config)}; expected the name of a timm network")
    pretrained_cfg = config.get("pretrained_cfg")
    # Configurations of timm before 0.8 have these entries at the top level.
    data = pretrained_cfg if isinstance(pretrained_cfg, Mapping) else config
    arguments = _arguments(config, where)
    classes = _classes(config, data, where)
    num_classes = _num_classes(config, data, arguments, classes, where)
    records, unread = _records(folder, data, arguments, where, tolerant=preprocessing_is_given)
    conflict = records[1].describe() if len(records) > 1 and preprocessing_sources.differ(*records) else None
    return ModelFolder(
        weights=_weights(folder),
        architecture=architecture,
        num_classes=num_classes,
        classes=classes,
        global_pool=_text(arguments.get("global_pool", config.get("global_pool"))),
        preprocessing=records[0] if records else None,
        conflict=conflict or unread,
    )


def _of_transformers(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        return ""
    return (
        f"; it describes {str(names[0])[:60]} of transformers, which is not built here. Save its predictions and add "
        "them: python ensemble_orchestrator.py import-predictions --from DIR"
    )


def _weights(folder: Path) -> Path:
    present = [path for path in sorted(folder.iterdir()) if path.suffix in WEIGHT_SUFFIXES and path.is_file()]
    named = [folder / name for name in WEIGHTS if folder / name in present]
    if named or len(present) == 1:
        return (named or present)[0]
    if any(folder.glob("*.index.json")):
        raise UserError(f"{folder}: the weights are split over several files; save them as one {WEIGHTS[0]}")
    listed = f"it has {', '.join(path.name for path in present[:5])}" if present else "it has no file of weights"
    raise UserError(f"{folder}: {listed}; {EXPECTED}")


def _arguments(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`model_args`: arguments of timm's factory. Raises UserError for an argument that changes the network."""
    arguments = config.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise UserError(f"{where}: model_args is {str(arguments)[:40]!r}; expected an object. {CORRECT}")
    supported = {*NEUTRAL_ARGUMENTS, "in_chans", "img_size", "global_pool"}
    others = [name for name, value in arguments.items() if name not in supported and value is not None]
    if others:
        raise UserError(
            f"{where}: model_args has {', '.join(sorted(others)[:5])}, with which timm builds another network than the "
            f"architecture alone; supported: {', '.join(sorted(supported))}. Add its predictions instead: "
            "import-predictions"
        )
    if arguments.get("in_chans", 3) != 3:
        raise UserError(f"{where}: in_chans is {arguments['in_chans']}; expected 3, red, green and blue")
    return arguments


def _classes(config: Mapping[str, Any], data: Mapping[str, Any], where: str) -> tuple[str, ...] | None:
    """Names of the outputs. Raises UserError if two lists differ."""
    lists = {}
    for name, value in (
        ("label_names", config.get("label_names", data.get("label_names"))),
        ("labels", config.get("labels", data.get("labels"))),
        ("id2label", config.get("id2label")),
    ):
        names = class_list(value, f"{where}: {name}") if value is not None else None
        if names is not None:
            lists[name] = names
    if len(set(lists.values())) > 1:
        raise UserError(f"{where}: {' and '.join(lists)} name different classes. {CORRECT}")
    return next(iter(lists.values()), None)


def _num_classes(
    config: Mapping[str, Any],
    data: Mapping[str, Any],
    arguments: Mapping[str, Any],
    classes: tuple[str, ...] | None,
    where: str,
) -> int | None:
    """The number of outputs in the configuration. Raises UserError if two entries differ."""
    counts = {
        "num_classes": config.get("num_classes", data.get("num_classes")),
        "model_args.num_classes": arguments.get("num_classes"),
        "the list of classes": len(classes) if classes else None,
    }
    counts = {name: value for name, value in counts.items() if value is not None}
    for name, value in counts.items():
        if type(value) is not int or value < 0:
            raise UserError(f"{where}: {name} is {str(value)[:40]!r}; expected a number of classes. {CORRECT}")
    if len(set(counts.values())) > 1:
        numbers = ", ".join(f"{name} {value}" for name, value in counts.items())
        raise UserError(f"{where}: different numbers of classes: {numbers}. {CORRECT}")
    return next(iter(counts.values()), None)


def _records(
    folder: Path, data: Mapping[str, Any], arguments: Mapping[str, Any], where: str, *, tolerant: bool
) -> tuple[list[Preprocessing], str | None]:
    """The preprocessing records, most specific first, and the problem with a record that cannot be interpreted."""
    records: list[Preprocessing] = []
    unread = None
    processor = folder / PREPROCESSOR
    if processor.is_file():
        config = read_json_object(processor, remedy=CORRECT)
        try:
            records.append(preprocessing_sources.of_hugging_face(config, str(processor), source=PREPROCESSOR))
        except UserError as error:
            if not tolerant:
                raise
            unread = str(error)
    if any(data.get(key) is not None for key in preprocessing_sources.TIMM_KEYS):
        try:
            size = _fixed_size(arguments, where)
            records.append(preprocessing_sources.of_timm_config(data, where, source=CONFIG, img_size=size))
        except UserError as error:
            if not tolerant:
                raise
            unread = str(error)
    return records, unread


def _fixed_size(arguments: Mapping[str, Any], where: str) -> int | None:
    """`model_args.img_size`, the input size of a network with a fixed size."""
    size = arguments.get("img_size")
    sides = size if isinstance(size, list) else [size, size]
    if size is None:
        return None
    if len(sides) != 2 or type(sides[0]) is not int or sides[0] != sides[1]:
        raise UserError(f"{where}: model_args.img_size is {str(size)[:40]!r}; expected equal sides. {CORRECT}")
    return sides[0]


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
