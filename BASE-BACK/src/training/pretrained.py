"""Resolves pretrained weights, mode and preprocessing of each timm network from the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from config import settings
from training.timm_networks import (
    TIMM,
    build_pretrained,
    build_timm,
    default_input_size,
    head_names,
    require_architecture,
    require_input_size,
    require_linear_head,
)
from utils import compute_file_sha256, logger
from utils.files import atomic_path, read_json, write_json
from utils.image_files import open_image
from utils.image_processors import record_of_image_processor
from utils.pretrained_weights import (
    SUFFIXES,
    WHEELS,
    PretrainedFile,
    WeightsError,
    hub_name,
    read_config,
    read_json_object,
    read_pretrained,
    remedy,
    weights_path,
)
from utils.resizing import record_of_timm_config, scaled_record, timm_record
from utils.samples import Sample
from utils.stage_features import timm_name
from utils.trunks import trunk_digest

HUB = "hub"
RANDOM = "random"
PROCESSOR = "preprocessor_config.json"
LEAST_DEFAULT_SIZE, SIZE_STEP = 64, 32  # px; smaller inputs leave no feature map to pool
ENLARGEMENT = 1.4
"""Largest factor by which small images are enlarged by default. A frozen network on 477 photographs of 160 px has an
out-of-fold log-loss of 0.322 at 224 px and of 0.350 at 160 px; the time grows with the area."""
MEASURED_IMAGES = 200


class PretrainedError(ValueError):
    """A timm network cannot be trained as requested; the message names the remedy."""


@dataclass(frozen=True)
class Pretrained:
    """A timm network and its initial weights."""

    architecture: str
    """timm's name, without the prefix `timm:`, optionally with the suffix `+stages`."""
    mode: str
    """`frozen`: a linear head on the features; `finetune`: the head, then all layers; `scratch`: random weights."""
    views: int
    """Views of each train image that a head is fitted on: 1, the evaluation view; 2, also its horizontal flip."""
    path: str | None
    """File with the weights; None for random weights."""
    source: str
    """`wheel:PROJECT`, `hub:NAME`, `file:NAME` or `random`."""
    sha256: str | None
    """SHA-256 of the file; None for random weights."""
    trained_on: str
    """Rows of this workspace that the weights were trained on: none, train, train+val, all or unknown."""
    preprocessing: dict[str, Any]
    """The preprocessing record."""
    trunk_sha256: str | None = None
    """`trunk_digest` of all layers except the head; None unless the mode is frozen."""
    head: tuple[str, ...] = ()
    """Names of the head's tensors."""

    @property
    def img_size(self) -> int:
        """Side length of the input in px."""
        return int(self.preprocessing["input_size"])

    def as_record(self) -> dict[str, Any]:
        """Everything that determines the trained weights, JSON-ready."""
        record = asdict(self)
        del record["path"]  # the same file may be stored elsewhere
        return record

    def explain(self) -> dict[str, Any]:
        """The record of the initial weights in a checkpoint."""
        return {
            "backbone_name": f"{TIMM}{self.architecture}",
            "preprocessing": dict(self.preprocessing),
            "mode": self.mode,
            "weights": {"source": self.source, "sha256": self.sha256, "trained_on": self.trained_on},
        }


def resolve_networks(names: Sequence[str], samples: Sequence[Sample], num_classes: int) -> dict[str, Pretrained]:
    """{name: weights and preprocessing} of the timm networks among `names`.

    `samples` are the train images, whose sizes determine the default input size. The result is recorded in
    `checkpoints/timm_networks.json`, so that a later run may pass only the name. Raises `PretrainedError`.
    """
    timm_names = [name for name in names if name in settings.TIMM_BACKBONES]
    if not timm_names:
        return {}
    recorded = read_json(settings.TIMM_NETWORKS) or {}
    networks: dict[str, Pretrained] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name in timm_names:
        architecture = settings.TIMM_BACKBONES[name]
        earlier = recorded.get(name, {})
        earlier = earlier if earlier.get("architecture") == architecture else {}
        try:
            require_architecture(architecture)
            network, entries[name] = _resolve(name, architecture, earlier, samples)
            networks[name] = _checked(network, num_classes)
        except ValueError as error:
            raise PretrainedError(f"--backbones {name}: {error}") from error
    if recorded | entries != recorded:
        write_json(settings.TIMM_NETWORKS, recorded | entries)
    return networks


def _resolve(
    name: str, architecture: str, earlier: dict[str, Any], samples: Sequence[Sample]
) -> tuple[Pretrained, dict[str, Any]]:
    """The network, and its options, which a later run that passes only the name reuses."""
    mode = settings.option_of(settings.NETWORK_MODES, name) or earlier.get("mode")
    mode = settings.MODES[mode or settings.TRANSFER_LEARNING_MODE]
    views = int(settings.option_of(settings.NETWORK_VIEWS, name) or earlier.get("views") or 1)
    weights = settings.option_of(settings.NETWORK_WEIGHTS, name) or earlier.get("weights")
    if weights and weights != HUB:  # a later run may start in another folder
        weights = str(Path(weights).expanduser().absolute())
    file: PretrainedFile | None = None
    path, source, trained_on = None, RANDOM, "none"
    if settings.ENABLE_TRANSFER_LEARNING:
        path, source, trained_on = find_weights(architecture, weights)
        file = read_pretrained(path)
    elif weights:
        raise ValueError("--weights has no effect while ENABLE_TRANSFER_LEARNING is off; leave one of them out")
    elif mode == "frozen":
        raise ValueError(
            "mode frozen needs pretrained weights, and ENABLE_TRANSFER_LEARNING is off; use --mode finetune"
        )
    else:
        mode = "scratch"
    paths = [sample.path for sample in samples]
    size = settings.TIMM_IMG_SIZE or earlier.get("img_size") or default_size(architecture, paths)
    exif = settings.EXIF or earlier.get("exif")
    preprocessing = preprocessing_of(architecture, file, size) | ({"exif": exif} if exif else {})
    sha256 = compute_file_sha256(path) if path else None
    requested_trained_on = settings.option_of(settings.NETWORK_TRAINED_ON, name)
    if requested_trained_on is None and sha256 == earlier.get("sha256"):  # an earlier option applies to its weights
        requested_trained_on = earlier.get("trained_on")
    network = Pretrained(
        architecture,
        mode,
        views,
        str(path) if path else None,
        source,
        sha256,
        requested_trained_on or trained_on,
        preprocessing,
    )
    options = {"architecture": architecture, "mode": mode if mode in settings.MODES else "finetune", "views": views}
    options |= {"img_size": size, "weights": weights, "sha256": sha256, "trained_on": requested_trained_on}
    return network, options | ({"exif": exif} if exif else {})


def find_weights(architecture: str, requested: str | None) -> tuple[Path, str, str]:
    """(weights file, its source, rows of this workspace that it was trained on) for an architecture.

    `requested` is `hub`, a file or a folder. Without it, the search order is PRETRAINED_PATHS, a file in
    PRETRAINED_DIR, an installed wheel. Raises `WeightsError` with the remedy if there is none.
    """
    architecture = timm_name(architecture)
    if requested == HUB:
        path = _from_hub(architecture)
        return path, f"hub:timm/{hub_name(architecture)}", "none"
    base = architecture.partition(".")[0]
    listed = requested or settings.PRETRAINED_PATHS.get(architecture) or settings.PRETRAINED_PATHS.get(base)
    if listed:
        path = weights_path(Path(listed).expanduser().absolute())
        return path, f"file:{path.name}", "unknown"
    for suffix in SUFFIXES:
        path = settings.PRETRAINED_DIR / f"{architecture}{suffix}"
        if path.is_file():
            downloaded = _is_download(path)
            source = f"hub:timm/{hub_name(architecture)}" if downloaded else f"file:{path.name}"
            return path, source, "none" if downloaded else "unknown"
    wheel = WHEELS.get(base)
    if wheel is not None and (file := wheel.file()) is not None:
        return file, f"wheel:{wheel.project}", "none"
    raise WeightsError(
        f"no pretrained weights of {architecture} on this machine: {remedy(architecture, settings.PRETRAINED_DIR)}"
    )


def _from_hub(architecture: str) -> Path:
    """timm's default weights as a file in PRETRAINED_DIR, downloaded if missing."""
    import timm
    from safetensors.torch import save_file

    path = settings.PRETRAINED_DIR / f"{architecture}.safetensors"
    if path.is_file() and _is_download(path):
        return path
    logger.info("%s: downloading the weights of timm/%s", architecture, hub_name(architecture))
    try:
        model = timm.create_model(architecture, pretrained=True)
    except Exception as error:  # any error of the connection or the hub's client
        reason = (str(error).splitlines() or [""])[0]
        raise WeightsError(
            f"--weights hub: timm/{hub_name(architecture)} cannot be downloaded ({type(error).__name__}: {reason}). "
            f"Without network: {remedy(architecture, settings.PRETRAINED_DIR)}"
        ) from error
    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary)
    write_json(path.with_suffix(".json"), {"source": HUB, "sha256": compute_file_sha256(path)})
    return path


def _is_download(path: Path) -> bool:
    """Whether a file in PRETRAINED_DIR was written by `--weights hub`."""
    record = read_json(path.with_suffix(".json"))
    return bool(record) and record.get("source") == HUB and record.get("sha256") == compute_file_sha256(path)


def default_size(architecture: str, paths: Sequence[Path]) -> int:
    """Default input size: `ENLARGEMENT` times the median of the images' shorter sides, in steps of 32 px.

    At most the architecture's default input size.
    """
    size, is_fixed = default_input_size(architecture)
    if is_fixed or not paths:
        return size
    step = max(1, len(paths) // MEASURED_IMAGES)
    sides = []
    for path in paths[::step]:
        with open_image(path) as image:
            sides.append(min(image.size))
    suiting = int(np.median(sides) * ENLARGEMENT) // SIZE_STEP * SIZE_STEP
    return min(size, max(suiting, LEAST_DEFAULT_SIZE))


def preprocessing_of(architecture: str, file: PretrainedFile | None, size: int) -> dict[str, Any]:
    """The preprocessing record at an input size: from the file, from a file beside it, or from the architecture.

    Files beside it are `preprocessor_config.json` (Hugging Face), then `config.json` (timm), as for `discover --add`.
    """
    if file and file.preprocessing is not None:
        try:
            return scaled_record(file.preprocessing, size, source="checkpoint")
        except ValueError as error:
            raise WeightsError(f"{file.path}: extra.{error}. Correct the record, or leave it out") from error
    folder = file.path.parent if file else None
    processor = read_json_object(folder / PROCESSOR) if folder else None
    if folder and processor is not None:
        try:
            return scaled_record(record_of_image_processor(processor, source=PROCESSOR), size, source=PROCESSOR)
        except ValueError as error:
            raise WeightsError(
                f"{folder / PROCESSOR}: {error}. Correct it, or move it away to train with timm's preprocessing"
            ) from error
    config = read_config(folder) if folder else None
    if config and "pretrained_cfg" in config:
        return record_of_timm_config(config["pretrained_cfg"], size, source="config.json")
    return timm_record(timm_name(architecture), size)


def _checked(network: Pretrained, num_classes: int) -> Pretrained:
    """The network with the digest of its trunk and the names of its head; builds it once before training.

    Raises ValueError if the network cannot be built.
    """
    require_input_size(network.architecture, num_classes, network.img_size)
    model = create_pretrained(network, num_classes)
    if network.mode != "frozen":
        return network
    require_linear_head(model, network.architecture, network.img_size)
    head = head_names(model)
    return replace(network, head=tuple(head), trunk_sha256=trunk_digest(model.state_dict(), head))


def create_pretrained(network: Pretrained, num_classes: int) -> Any:
    """Build the network with its pretrained weights; the head is new unless the file's has as many classes."""
    size = network.img_size
    if network.path is None:
        return build_timm(network.architecture, num_classes, size)
    path = Path(network.path)
    if compute_file_sha256(path) != network.sha256:
        raise WeightsError(f"{path}: changed while the training ran; run the command again")
    return build_pretrained(network.architecture, num_classes, size, read_pretrained(path))
