"""Write one trained network to a folder of files, with their records and parity checks against the network."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from config import settings
from export.formats import FORMATS, Package, digest, known_formats, make_package, write_checked
from utils import compute_file_sha256, logger
from utils.files import atomic_path, read_json, write_json

STATUS, CHECKSUMS, METADATA, CLASSES = "export_status.json", "checksums.json", "metadata.json", "class_mapping.json"
RECORDS = (STATUS, CHECKSUMS, METADATA, CLASSES)
NOT_BUILT = f"this version's base export writes {', '.join(FORMATS)}"


def export_and_package_model(
    model: nn.Module,
    arch_name: str,
    sample_input: Tensor | Sequence[Tensor] | None = None,
    export_formats: Iterable[str] | None = None,
    deploy_root: Path | str | None = None,
    force: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    training_metadata: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    logger_inst: Any = None,
    class_names: Sequence[str] | None = None,
    on_entry: Callable[[str, dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """Write `deploy_root/<arch_name>/` in the requested formats; None means EXPORT_FORMATS and DEPLOY_DIR.

    `sample_input` is one batch `(B, 3, H, W)`, or one per input of the model. A format is `ok` only after its files
    were opened again and gave the model's logits; an existing, intact file made from the same weights is kept unless
    `force`. The model keeps its device and mode. `on_entry(format, entry)` is called after each format. Raises
    ValueError, before anything is written, for an unknown format, an invalid name, a sample that is not a batch of
    images, and classes that do not fit the logits.
    """
    formats = known_formats(settings.EXPORT_FORMATS if export_formats is None else export_formats)
    if not re.fullmatch(r"[A-Za-z0-9_][\w.+-]*", arch_name):
        raise ValueError(f"arch_name {arch_name!r} cannot name a folder; expected letters, digits and . _ + -")
    package = make_package(
        model, arch_name, sample_input, optimizer, scheduler, training_metadata, num_classes, class_names
    )
    log = logger_inst or logger
    if class_names is None:
        log.warning(f"export {arch_name}: no class names were given; the classes are called 0 to {package.width - 1}")
    folder = Path(settings.DEPLOY_DIR if deploy_root is None else deploy_root) / arch_name
    return write_package(folder, package, formats, device=device_of(model), force=force, log=log, on_entry=on_entry)


def device_of(model: nn.Module) -> str:
    """Device of the model's parameters; `cpu` for a model without any."""
    return str(next((parameter.device for parameter in model.parameters()), torch.device("cpu")))


def write_package(
    folder: Path,
    package: Package,
    formats: Sequence[str],
    *,
    device: str,
    force: bool,
    log: Any,
    on_entry: Callable[[str, dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """Write the formats and the four records; returns the record of `export_and_package_model`."""
    stamp = datetime.now(UTC).isoformat(timespec="seconds")
    earlier: dict[str, dict[str, Any]] = read_json(folder / STATUS) or {}
    weights_digest = digest(package.weights)
    results: dict[str, dict[str, Any]] = {}
    kept = []
    for name in formats:
        if name not in FORMATS:
            results[name] = _entry("skipped", reason=NOT_BUILT)
        elif not force and _is_current(folder, earlier.get(name), package.source(name)):
            results[name] = earlier[name] | {"status": "ok", "reason": None}
            kept.append(name)
        else:
            results[name] = build(folder, package, name) | {"weights_sha256": weights_digest}
        level = log.error if results[name]["status"] == "failed" else log.debug
        reason = results[name]["reason"] or "opened again, answers agree"
        level(f"export {package.arch_name}, {name}: " + ("already there" if name in kept else reason))
        if on_entry is not None:
            on_entry(name, results[name])

    status = _others(folder, earlier, results, weights_digest, log) | results
    checksums: dict[str, str] = {}
    if formats:
        write_json(folder / CLASSES, {str(n): c for n, c in enumerate(package.checkpoint["extra"]["classes"])})
        write_json(folder / METADATA, _metadata(package, device, stamp, weights_digest))
        checksums = _merge_checksums(folder, status)
        write_json(folder / CHECKSUMS, checksums)
        write_json(folder / STATUS, status)
    by_status = {state: [n for n in formats if results[n]["status"] == state] for state in ("ok", "skipped", "failed")}
    built = [name for name in by_status["ok"] if name not in kept]
    parts = (
        ("written", built),
        ("already there", kept),
        ("skipped", by_status["skipped"]),
        ("failed", by_status["failed"]),
    )
    summary = "; ".join(f"{word} {', '.join(names)}" for word, names in parts if names)
    return {
        "architecture": package.arch_name,
        "deploy_directory": str(folder),
        "requested_formats": list(formats),
        "successful_exports": by_status["ok"],
        "skipped_exports": kept + by_status["skipped"],
        "failed_exports": by_status["failed"],
        "export_results": results,
        "smoke_check_results": {
            name: {"passed": results[name]["status"] == "ok", "parity": results[name]["parity"]}
            for name in formats
            if name in FORMATS
        },
        "checksums": checksums,
        "metadata_files": {name: str(folder / name) for name in RECORDS if formats},
        "timestamp": stamp,
        "one_line_summary": f"{package.arch_name}: {summary or 'no format was asked for'}",
    }


def build(folder: Path, package: Package, name: str) -> dict[str, Any]:
    """Write the files of one format and return its entry; a file appears under its name only after it is checked."""
    started = time.perf_counter()
    files: dict[str, str] = {}
    parities = []
    try:
        with ExitStack() as together:
            for template, write in FORMATS[name].items():
                relative = f"{name}/{template.replace('{}', package.arch_name)}"
                temporary = together.enter_context(atomic_path(folder / relative))
                parities.append(write_checked(package, name, write, temporary))
                files[relative] = compute_file_sha256(temporary)
    except Exception as error:  # recorded as the reason of this format; the other formats are still written
        if (folder / name).is_dir() and not any((folder / name).iterdir()):
            (folder / name).rmdir()
        reason = f"{type(error).__name__}: {error}"
        return _entry("failed", reason=reason, parity=getattr(error, "parity", None), seconds=_since(started))
    # Weights too large for one ONNX file.
    files |= {f"{name}/{beside.name}": compute_file_sha256(beside) for beside in (folder / name).glob("*.onnx.data")}
    path = next(iter(files))
    return _entry(
        "ok",
        path=path,
        sha256=files[path],
        size_mb=round((folder / path).stat().st_size / 1e6, 3),
        seconds=_since(started),
        parity=max(parities, key=lambda parity: parity["max_abs_diff"]),
        files=files,
        source_sha256=package.source(name),
    )


def _entry(status: str, **values: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("reason", "path", "sha256", "size_mb", "seconds", "parity"))
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    versions["safetensors"] = safetensors.__version__
    return {"status": status, "versions": versions} | empty | values


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 3)


def _is_current(folder: Path, entry: dict[str, Any] | None, source: str) -> bool:
    """Whether the entry was made from the same content and none of its files has changed."""
    return entry is not None and entry.get("source_sha256") == source and not _changed(folder, entry)


def _changed(folder: Path, entry: dict[str, Any]) -> list[str]:
    """Files of an entry that are missing or have other contents."""
    return [
        name
        for name, checksum in (entry.get("files") or {}).items()
        if not (folder / name).is_file() or compute_file_sha256(folder / name) != checksum
    ]


def _others(
    folder: Path, earlier: dict[str, dict[str, Any]], results: Mapping[str, Any], weights_digest: str, log: Any
) -> dict[str, dict[str, Any]]:
    """Earlier entries of formats that are not requested now; an entry that is no longer valid loses its `ok`."""
    others = {}
    for name, entry in earlier.items():
        if name in results:
            continue
        if entry["status"] == "ok":
            changed = _changed(folder, entry)
            if changed:
                entry = _entry("failed", reason=f"{', '.join(changed)}: gone or changed since the export")
            elif entry.get("weights_sha256") != weights_digest:
                entry = entry | {"status": "skipped", "reason": "holds earlier weights; export this format again"}
            if entry["status"] != "ok":
                log.warning(f"export {folder.name}, {name}: {entry['reason']}")
        others[name] = entry
    return others


def _merge_checksums(folder: Path, status: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """{relative path: SHA-256, computed from the disk} of the records and of every file of this or an earlier export.

    A file of an earlier export that is missing or has changed is omitted. Raises ValueError when a file of this export
    has changed since it was checked.
    """
    written = {name: digest for entry in status.values() for name, digest in (entry.get("files") or {}).items()}
    earlier = {name: digest for name, digest in (read_json(folder / CHECKSUMS) or {}).items() if name not in RECORDS}
    names = [*written, *earlier, METADATA, CLASSES]
    current = {name: compute_file_sha256(folder / name) for name in names if (folder / name).is_file()}
    changed = [name for name, digest in written.items() if current.get(name) != digest]
    if changed:
        raise ValueError(
            f"{folder}: {', '.join(changed)} changed while it was exported; export it again with force=True"
        )
    expected = earlier | written
    return {name: value for name, value in current.items() if expected.get(name, value) == value}


def _metadata(package: Package, device: str, stamp: str, weights_digest: str) -> dict[str, Any]:
    extra = package.checkpoint["extra"]
    return {
        "architecture": package.arch_name,
        "num_classes": package.width,
        "input_shape": [1, *package.shape],
        "export_timestamp": stamp,
        "img_size": extra["img_size"],
        "model_size": extra["model_size"],
        "batch_size": settings.BATCH_SIZE,
        "seed": settings.SEED,
        "device": device,
        "training": package.checkpoint.get("metadata", {}),
        "weights_sha256": weights_digest,
    }
