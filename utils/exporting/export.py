"""`export`: writes an ensemble or a member in deployment formats and checks the parity of each file."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils import base_back
from utils.core.artifacts import read_json, read_record
from utils.core.config import Config, require_enabled
from utils.core.errors import ConfigError, UserError, nearest_first
from utils.core.progress_bar import progress_bar
from utils.core.results import Result
from utils.core.workspace import Workspace
from utils.evaluation import recommended_names
from utils.evaluation.evaluation_records import SCORES
from utils.exporting import (
    conversion,
    custom_format,
    export_checks,
    export_comparison,
    export_folder,
    export_formats,
    exported_network,
    exported_programs,
    parity_rows,
)
from utils.exporting.conversion import ConversionJob, ParityChecks
from utils.exporting.export_formats import CUSTOM, FORMATS
from utils.exporting.exported_network import UINT8_NHWC, ExportSignature, ExportSource
from utils.exporting.reduced_precision import REDUCED
from utils.predictions import catalog
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")


@dataclass(frozen=True)
class ExportRequest:
    """One requested export, and the reusable files of an earlier export of the same source."""

    source: ExportSource
    signature: ExportSignature
    formats: tuple[str, ...]
    """Requested formats; `custom` is always included, last."""
    onnx_exporter: str
    """torch's ONNX exporter: `tracing` or `dynamo`."""
    folder: Path
    """deployment_models/<name>"""
    source_digest: str
    """Digest of everything that determines the contents of the files."""
    reusable: Mapping[str, dict[str, Any]]
    """{format: entry} of an earlier export with an equal digest, whose files are intact"""

    @property
    def missing(self) -> list[str]:
        """Requested formats that have to be written."""
        return [name for name in self.formats if name not in self.reusable]


def export(
    config: Config,
    workspace: Workspace,
    *,
    model_name: str | None = None,
    formats: Sequence[str] | None = None,
    precision: Sequence[str] | None = None,
    input: str | None = None,
    onnx_exporter: str | None = None,
    max_members: int | None = None,
    member_probabilities: bool = False,
    check_tools: bool = False,
    verify: str | None = None,
    trust: bool = False,
    compare: bool = False,
    force: bool = False,
) -> Result:
    """Write `deployment_models/<name>/` for the named ensemble or member, by default the recommended one.

    `model_name` may also be `recommended` or `recommended_fast`.

    Formats whose files are intact and from the same source are kept unless `force`. If a format fails, the others are
    still written; the exit code is then 4. Other modes: `check_tools` lists the formats that can be written here,
    `verify` checks an earlier export (`trust`: also one written by another workspace), and `compare` lists all exports.

    Raises UserError for an unknown name, changed checkpoints, a folder with other contents, or a full disk, and
    ConfigError for an unknown format or a wrong option.
    """
    if trust and verify is None:
        raise ConfigError("--trust: expected together with --verify DIR, whose programs it allows to run")
    if check_tools:
        return export_checks.list_tools()
    if verify is not None:
        return export_checks.verify(workspace, Path(verify).expanduser(), trust=trust)
    if compare:
        return export_comparison.compare_exports(workspace)
    require_enabled(config, "exports")
    if max_members is not None and max_members < 1:
        raise ConfigError(f"--max-members {max_members}: expected a whole number of at least 1")
    requested = _requested_formats(formats or config.exports.formats, precision or config.exports.precision)
    store = Store(config, workspace, catalog.load(workspace))
    name = recommended_names.resolve(store, model_name or recommended_names.RECOMMENDED)
    source = exported_network.load_source(store, name)
    exported_network.require_member_limit(source, max_members or config.exports.max_members)
    exported_network.require_current_checkpoints(store, source)
    folder = workspace.exports / source.name
    export_folder.recover_interrupted(folder)
    if not force and not export_folder.is_replaceable(folder):
        return _base_pipeline_export(source.name, folder, is_requested=model_name == name)
    signature = ExportSignature(input or config.exports.input, member_probabilities)
    onnx_exporter = onnx_exporter or config.exports.onnx_exporter
    digest = exported_network.source_digest(source, signature, onnx_exporter)
    reusable = {} if force else export_folder.reusable_formats(folder, digest)
    request = ExportRequest(source, signature, requested, onnx_exporter, folder, digest, reusable)
    if not request.missing:
        return _result(request, export_folder.read_status(folder) or {}, "up to date")
    if model_name != name:
        logger.info("exporting the recommended model: %s", source.name)
    export_folder.require_free_space(folder, _estimated_bytes(workspace, request))
    return _result(request, write_export(store, request), "written")


def _requested_formats(names: Sequence[str], precisions: Sequence[str]) -> tuple[str, ...]:
    """The requested formats without duplicates, always with `custom` last; reduced precisions only with an ONNX file.

    Raises ConfigError for an unknown format.
    """
    requested = list(dict.fromkeys(part for name in names for part in name.split(",") if part))
    unknown = [name for name in requested if name not in FORMATS]
    if unknown:
        nearest_format = nearest_first(unknown[0], FORMATS)
        raise ConfigError(f"--formats: unknown {', '.join(map(repr, unknown))}{nearest_format}")
    reduced = [name for name in REDUCED if "onnx" in requested and name.removeprefix("onnx_") in precisions]
    return (*(name for name in FORMATS if name in requested and name != CUSTOM), *reduced, CUSTOM)


def _base_pipeline_export(name: str, folder: Path, *, is_requested: bool) -> Result:
    """The result if the base pipeline's export occupies the folder; nothing is written.

    Raises UserError if the member was requested by name.
    """
    if is_requested:
        raise UserError(
            f"{folder}: holds an export that this command did not write; the base pipeline's export of a backbone has "
            "the same path. --force replaces it; --output DIR writes elsewhere"
        )
    text = (
        f"the recommended model is the member {name}, which the base pipeline has exported: {folder}\n"
        f"  python ensemble_orchestrator.py export --model-name {name} --force replaces it by an export "
        "with preprocessing inside"
    )
    return Result(text, {"name": name, "folder": str(folder), "formats": {}})


def _estimated_bytes(workspace: Workspace, request: ExportRequest) -> int:
    """Upper bound of the disk space: the weights once per format, and three more times while files are written."""
    if request.source.is_imported:
        return 0
    files = [workspace.base / entry["path"] for member in request.source.members for entry in member.checkpoints[:1]]
    return sum(path.stat().st_size for path in files) * (len(request.formats) + 3)


def write_export(store: Store, request: ExportRequest) -> dict[str, dict[str, Any]]:
    """Write the missing formats and the records, and swap the folder in; returns {format: entry} of all formats."""
    source, signature, workspace = request.source, request.signature, store.workspace
    with export_folder.replacing_folder(request.folder) as staged:
        network = exported_network.assemble_network(store, source, signature)
        rule, size = base_back.load_bundled("threads"), max(member.img_size or 0 for member in source.members)
        threads = rule.threads_of_network("export checks", network, size, "cpu")
        with rule.intra_op_threads(threads):
            sample = parity_rows.sample_rows(store, source, signature, network)
        job = ConversionJob(
            store=store,
            source=source,
            signature=signature,
            source_digest=request.source_digest,
            onnx_exporter=request.onnx_exporter,
            description=exported_network.describe_network(source, signature, network, request.source_digest),
            sample=sample,
            threads=threads,
            staged=staged,
            scratch=staged.parent / "scratch",
        )
        score = read_record(workspace.ensemble_metrics(source.name, "test"), remedy="Evaluate again", form=SCORES)
        steps = 2 * sum(name != CUSTOM for name in request.missing)  # writing and checking
        status: dict[str, dict[str, Any]] = {}
        with (
            progress_bar(steps, f"export {source.name}", unit="step") as advance,
            ParityChecks(job, request.missing) as checks,
        ):

            def on_entry(format_name: str, entry: dict[str, Any]) -> None:
                checks.add(format_name, entry)
                advance(1)

            conversion.write_files(job, network, request.missing, on_entry)
            del network  # frees memory for the runtimes that check the files
            onnx_folder = request.folder if "onnx" in request.reusable else staged
            onnx_file = onnx_folder / "onnx" / f"{source.name}.onnx"
            for name, entry in conversion.write_reduced_files(job, onnx_file, request.missing).items():
                on_entry(name, entry)
            for name, entry in checks.results():
                status[name] = entry
                advance(1)
        # Recorded before the swap, so that an interruption in between leaves no unrecorded export.
        exported_programs.record_files(workspace, source.name, status)
        for name, entry in request.reusable.items():
            export_folder.link_files(request.folder, staged, entry)
            status[name] = entry
        status[CUSTOM] = _write_custom(job, status, score)
        export_folder.write_records(staged, _metadata(job), source.classes, status)
    return status


def _write_custom(
    job: ConversionJob, status: Mapping[str, dict[str, Any]], score: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Write `custom/` and return its entry."""
    started = time.perf_counter()
    name, folder = job.source.name, job.staged / CUSTOM
    custom_format.write_custom_folder(folder, name, job.description, job.source.classes, status, score)
    squares = job.sample.squares if job.signature.input == UINT8_NHWC else ()
    custom_format.write_parity_rows(folder, job.sample.reference_batches(), squares)
    files = dict.fromkeys([folder / f"{name}_custom.bin", *sorted(folder.iterdir())])
    seconds = round(time.perf_counter() - started, 3)
    return export_formats.entry_of_files(job.staged, list(files), seconds=seconds, source_digest=job.source_digest)


def _metadata(job: ConversionJob) -> dict[str, Any]:
    """Contents of `metadata.json`: those written by the packaging, completed."""
    packaged = read_json(job.staged / export_folder.METADATA, remedy=export_folder.EXPORT_AGAIN) or {}
    images = job.description["input"]
    return {
        **packaged,
        "architecture": job.source.name,
        "num_classes": len(job.source.classes),
        "input_shape": images["shape"] if "shape" in images else [entry["shape"] for entry in images["inputs"]],
        "img_size": images.get("img_size"),
        "batch_size": job.store.config.dataset.batch_size,
        "seed": job.store.config.seed,
        "device": "cpu",
        "training": job.description,
    }


def _result(request: ExportRequest, status: Mapping[str, Any], outcome: str) -> Result:
    lines = [f"{request.source.name} -> {request.folder} ({outcome})"]
    lines += [
        f"  {name:<12} {export_formats.summarize_entry(status[name])}"
        for name in (*FORMATS, *REDUCED)
        if name in status
    ]
    missing = [name for name in request.formats if status[name]["status"] != "ok"]
    failures = [f"{name}: {status[name]['status']}, {status[name]['reason']}" for name in missing]
    document = {"name": request.source.name, "folder": str(request.folder), "formats": dict(status)}
    return Result("\n".join(lines), document, failures)
