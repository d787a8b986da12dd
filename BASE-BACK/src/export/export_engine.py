"""The older interface of the export, kept for scripts that use it; everything delegates to `packaging`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import settings
from export.formats import FORMATS, known_formats, make_package, write_checked
from export.packaging import NOT_BUILT, device_of, export_and_package_model, write_package
from utils import logger
from utils.files import atomic_path

ALIASES = {"pytorch": "state_dict"}
DEFAULT_FORMATS = ("state_dict", "onnx", "torchscript")


def export_model(
    model: nn.Module,
    model_name: str,
    output_dir: Path | str,
    input_shape: Sequence[int] | None = None,
    formats: Iterable[str] | None = None,
    class_names: Sequence[str] | None = None,
    training_metadata: Mapping[str, Any] | None = None,
) -> dict[str, Path]:
    """Write the formats (default: state_dict, onnx, torchscript) and their records into `output_dir`.

    `input_shape` is the shape of one batch, `(B, 3, H, W)`; None uses the model's image size, else IMG_SIZE.
    Returns {format as named in `formats`: path}; formats that failed or are not supported are omitted, with a warning.
    Raises ValueError for an unknown format, before anything is written.
    """
    requested = list(DEFAULT_FORMATS if formats is None else formats)
    canonical = known_formats(ALIASES.get(name, name) for name in requested)
    package = make_package(
        model,
        model_name,
        None if input_shape is None else torch.zeros(*input_shape),
        training_metadata=training_metadata,
        class_names=class_names,
    )
    folder = Path(output_dir)
    record = write_package(folder, package, canonical, device=device_of(model), force=True, log=logger)
    paths = {}
    for name in requested:
        entry = record["export_results"][ALIASES.get(name, name)]
        if entry["status"] == "ok":
            paths[name] = folder / entry["path"]
        else:
            logger.warning(f"export {model_name}, {name}: {entry['status']}, {entry['reason']}")
    return paths


def export_to_format(
    model: nn.Module, export_format: str, output_path: Path | str, dummy_input: Tensor | None = None
) -> bool:
    """Write one file of one format, checked like those of a package; the suffix .safetensors selects that file type.

    `dummy_input` is one batch `(B, 3, H, W)`. Returns True. Raises ValueError for an unknown or unsupported format, and
    for a file whose logits differ from the model's.
    """
    (name,) = known_formats([ALIASES.get(export_format, export_format)])
    if name not in FORMATS:
        raise ValueError(f"{export_format} is not written here: {NOT_BUILT}")
    path = Path(output_path)
    write = next(
        (writer for file, writer in FORMATS[name].items() if Path(file).suffix == path.suffix),
        next(iter(FORMATS[name].values())),
    )
    with atomic_path(path) as temporary:
        write_checked(make_package(model, path.stem, dummy_input), name, write, temporary)
    return True


@dataclass(frozen=True)
class ExportConfig:
    """Options of `ExportEngine`."""

    model_name: str
    """Name of the folder and of the files."""
    output_dir: Path | str | None = None
    """Folder that holds the packages; None is DEPLOY_DIR."""
    formats: Sequence[str] = field(default_factory=lambda: list(settings.EXPORT_FORMATS))
    class_names: Sequence[str] | None = None
    force: bool = False


class ExportEngine:
    """`export_and_package_model` with its options in one object."""

    def __init__(self, config: ExportConfig) -> None:
        self.config = config

    def export(self, model: nn.Module, dummy_input: Tensor | None = None) -> dict[str, Any]:
        """Package the model; returns the record of `export_and_package_model`."""
        config = self.config
        return export_and_package_model(
            model,
            config.model_name,
            sample_input=dummy_input,
            export_formats=config.formats,
            deploy_root=config.output_dir,
            force=config.force,
            class_names=config.class_names,
        )
