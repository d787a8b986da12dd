"""`export`: an ensemble or member as files of every format, each with the proof that it answers the same."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import base_back
from utils.core.artifacts import read_json
from utils.core.config import Config, require_enabled
from utils.core.errors import ConfigError, UserError, did_you_mean
from utils.core.results import Result
from utils.core.workspace import Workspace
from utils.exporting import (
    custom_format,
    export_checks,
    export_comparison,
    export_folder,
    export_formats,
    exported_network,
    exported_programs,
    parity_check,
    parity_rows,
    reduced_precision,
    runtimes,
    tflite_conversion,
)
from utils.exporting.export_formats import CUSTOM, FORMATS, PACKAGED, TENSORRT, TFLITE
from utils.exporting.exported_network import UINT8_NHWC, ExportSignature, ExportSource
from utils.exporting.parity_check import FileRunError, run_in_subprocess
from utils.exporting.parity_rows import ParitySample
from utils.exporting.reduced_precision import REDUCED
from utils.predictions import catalog
from utils.predictions.store import Store

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

logger = logging.getLogger("disease_pipeline")


@dataclass(frozen=True)
class ExportJob:
    """One export under way."""

    store: Store
    subject: ExportSource
    form: ExportSignature
    staged: Path
    scratch: Path
    description: dict[str, Any]
    sampled: ParitySample
    outputs: tuple[str, ...]
    source_digest: str


def export(
    config: Config,
    workspace: Workspace,
    *,
    model_name: str | None = None,
    formats: Sequence[str] | None = None,
    precision: Sequence[str] | None = None,
    input: str | None = None,
    max_members: int | None = None,
    member_probabilities: bool = False,
    check_tools: bool = False,
    verify: str | None = None,
    trust: bool = False,
    compare: bool = False,
    force: bool = False,
) -> Result:
    """Write `deployment_models/<name>/` for the ensemble or member named, else for the recommended one.

    Formats that are there already, whole and of the same ensemble, are kept unless `force`. A format that fails stops
    no other and ends with exit code 4. `check_tools` tells instead what can be written here, `verify` whether the
    export in a folder still holds (`trust`: also one that another workspace wrote), `compare` how the exported forms
    stand beside one another. Raises UserError for an unknown name, changed checkpoints, a folder that is not ours, or a
    disk without room; ConfigError for an unknown format.
    """
    if trust and verify is None:
        raise ConfigError("--trust: expected --verify DIR beside it, whose programs it lets run")
    if check_tools:
        return export_checks.list_tools()
    if verify is not None:
        return export_checks.verify(workspace, Path(verify).expanduser(), trust=trust)
    if compare:
        return export_comparison.compare_exports(workspace)
    require_enabled(config, "exports")
    if max_members is not None and max_members < 1:
        raise ConfigError(f"--max-members {max_members}: expected a whole number of at least 1")
    wanted = _known(formats or config.exports.formats, precision or config.exports.precision)
    store = Store(config, workspace, catalog.load(workspace))
    name = model_name or exported_network.recommended_name(store)
    subject = exported_network.load_source(store, name)
    exported_network.require_member_limit(subject, max_members or config.exports.max_members)
    exported_network.require_current_checkpoints(store, subject)
    form = ExportSignature(input or config.exports.input, member_probabilities)
    final = workspace.exports / subject.name
    export_folder.recover_interrupted(final)
    if not force and not export_folder.is_replaceable(final):
        return _left(subject, final, model_name)
    source = exported_network.source_digest(subject, form)
    present = {} if force else export_folder.reusable_formats(final, source)
    if set(wanted) <= present.keys():
        status = read_json(final / export_folder.STATUS, remedy=export_folder.EXPORT_AGAIN)
        return _result(subject, final, status, wanted, "already there, whole and of the same ensemble")
    if model_name is None:
        logger.info("exporting the recommended one: %s", subject.name)
    export_folder.require_free_space(final, _needed(store, subject, wanted))
    with export_folder.replacing_folder(final) as staged:
        network = exported_network.assemble_network(store, subject, form)
        work = ExportJob(
            store=store,
            subject=subject,
            form=form,
            staged=staged,
            scratch=staged.parent / "scratch",
            description=exported_network.describe_network(subject, form, network),
            sampled=parity_rows.sample_rows(store, subject, form, network),
            outputs=network.output_names,
            source_digest=source,
        )
        status = _written(work, network, [name for name in wanted if name not in present])
        source_of_reduced = (final if "onnx" in present else staged) / "onnx" / f"{subject.name}.onnx"
        status |= _reduced(work, source_of_reduced, [name for name in wanted if name not in present])
        del network
        status = {name: _proved(work, name, written) for name, written in status.items()}
        # Before the folder appears, so that a kill in between leaves no export that is not recorded.
        exported_programs.record_files(workspace, subject.name, status)
        for format_name, kept in present.items():
            export_folder.link_files(final, staged, kept)
            status[format_name] = kept
        _finish(work, status)
    return _result(subject, final, status, wanted, "written")


def _left(subject: ExportSource, final: Path, model_name: str | None) -> Result:
    """Nothing is done where another program's export lies. Raises UserError where this one was asked for by name."""
    words = f"{final}: holds an export that is not ours (the base pipeline's of a backbone lies there)"
    if model_name is not None:
        raise UserError(f"{words}. --force replaces it; --output DIR writes elsewhere")
    text = (
        f"the recommended one is the member {subject.name}, which the base pipeline has exported: {final}\n"
        f"  export --model-name {subject.name} --force replaces that by one with preprocessing inside"
    )
    return Result(text, {"name": subject.name, "folder": str(final), "formats": {}})


def _known(names: Sequence[str], precisions: Sequence[str]) -> list[str]:
    """The formats asked for, each once, `custom` last and always; forms of fewer bits where there is an ONNX file.

    Raises ConfigError for an unknown one.
    """
    flat = list(dict.fromkeys(part for name in names for part in name.split(",") if part))
    unknown = [f"{name!r}{did_you_mean(name, FORMATS)}" for name in flat if name not in FORMATS]
    if unknown:
        raise ConfigError(f"--formats: unknown {', '.join(unknown)}. Known: {', '.join(FORMATS)}")
    reduced = [name for name in REDUCED if "onnx" in flat and name.removeprefix("onnx_") in precisions]
    return [*(name for name in FORMATS if name in flat and name != CUSTOM), *reduced, CUSTOM]


def _needed(store: Store, subject: ExportSource, formats: Sequence[str]) -> int:
    """Bytes that the export takes at most, roughly: the weights once for each file and twice for what is under way."""
    if subject.is_imported:
        return 0
    files = [store.workspace.base / entry["path"] for member in subject.members for entry in member.checkpoints[:1]]
    return sum(path.stat().st_size for path in files) * (len(formats) + 3)


def _written(work: ExportJob, network: nn.Module, formats: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Write the files of the formats but `custom`; {format: entry}, not proved yet."""
    import torch

    name, status = work.subject.name, {}
    network.parity_tolerance = 1.0 if work.subject.is_discontinuous else parity_check.TOLERANCE
    if packaged := [each for each in PACKAGED if each in formats]:
        logger.info("export %s: writing %s", name, ", ".join(packaged))
        first = torch.from_numpy(work.sampled.images[0][None])
        status |= export_formats.write_packaged_formats(
            network, name, packaged, work.staged, first, work.description, work.subject.classes
        )
    if TFLITE in formats:

        def opened() -> tuple[nn.Module, Tensor]:
            return _of_fixed_size(work, network)

        logger.info("export %s: converting to tflite", name)
        status[TFLITE] = export_formats.write_tflite(opened, name, work.staged, work.scratch / "converter")
    if TENSORRT in formats:
        status[TENSORRT] = export_formats.tensorrt_entry(name, work.description)
    return status


def _reduced(work: ExportJob, source: Path, formats: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Write the ONNX files of fewer bits; {format: entry}, not proved yet."""
    status = {}
    for format_name in (name for name in REDUCED if name in formats):
        if work.subject.is_imported:
            status[format_name] = export_formats.format_entry(
                "skipped", reason="a combiner alone has no networks to shorten"
            )
            continue
        logger.info("export %s: writing %s", work.subject.name, format_name)

        def opened() -> Sequence[np.ndarray]:
            return parity_rows.calibration_images(work.store, work.subject, work.form)

        status[format_name] = reduced_precision.write_reduced(
            format_name, source, work.subject.name, work.staged, opened
        )
    return status


def _of_fixed_size(work: ExportJob, network: nn.Module) -> tuple[nn.Module, Tensor]:
    """The network for one image at a time that is cut to size already, and such an image."""
    import torch

    takes_uint8 = work.form.input == UINT8_NHWC
    if takes_uint8 and not work.subject.is_imported:
        sizes = {member.img_size for member in work.subject.members}
        if len(sizes) > 1:
            raise UserError("its members look at images of unequal size, and a TFLite file takes one fixed size")
        network = exported_network.assemble_network(work.store, work.subject, work.form, resizes=False)
    probe = work.sampled.reference_batches(fixed=True, takes_uint8=takes_uint8)
    return network, torch.from_numpy(probe.batches[0])


def _proved(work: ExportJob, name: str, written: dict[str, Any]) -> dict[str, Any]:
    """The entry after its files were run afresh: with the certificate, or `failed` with its files set aside."""
    found = _certified(work, name, written)
    if found["status"] == "failed":
        export_folder.move_to_failed(work.staged, name)
    level = logging.INFO if found["status"] == "ok" else logging.WARNING
    logger.log(level, "export %s, %s: %s", work.subject.name, name, _outcome(found))
    return found


def _certified(work: ExportJob, name: str, written: dict[str, Any]) -> dict[str, Any]:
    if written["status"] != "ok":
        return written
    started = time.perf_counter()
    is_tflite = name == TFLITE
    probe = work.sampled.reference_batches(fixed=is_tflite, takes_uint8=work.form.input == UINT8_NHWC)
    python = {"python": tflite_conversion.python_interpreter()} if is_tflite else {}
    place = work.store.workspace
    environment = {"DBT_BASE_DIR": str(place.base)}
    environment |= {"DBT_ENSEMBLE_DIR": str(place.output)} if place.output else {}
    job = {"name": work.subject.name, "form": vars(work.form), "environment": environment}
    job |= {"project": str(base_back.PROJECT)}
    parity, facts, reasons = None, {}, []
    tolerance = reduced_precision.tolerance_of(name) if name in REDUCED else parity_check.TOLERANCE
    files = [work.staged / file for file in written["files"] if not file.endswith(".data")]
    try:
        answered = run_in_subprocess(name, files, probe, work.outputs, work.scratch / name, job=job, **python)
    except FileRunError as error:
        reasons.append(str(error))
    else:
        for file, answers in zip(files, answered, strict=True):
            outcome = parity_check.compare_outputs(probe, answers, tolerance)
            if parity is None or not outcome["passed"]:
                parity, facts = outcome["parity"], answers.facts
            if not outcome["passed"]:
                reasons.append(f"{file.name}: {outcome['reason']}")
    seconds = round((written["seconds"] or 0) + time.perf_counter() - started, 3)
    known = written | {
        "parity": parity,
        "seconds": seconds,
        "versions": written["versions"] | facts.get("versions", {}),
        "latency_ms": facts.get("latency_ms"),
        "source_digest": work.source_digest,
        "members_run": "all",  # no file has control flow, so that a sparse combiner leaves out by weights of 0
    }
    if not reasons and name in REDUCED:
        run, _ = runtimes.open_onnx(work.staged / written["path"], {"outputs": ["probabilities"]})
        known["test_accuracy"] = parity_rows.measure_test_accuracy(work.store, work.subject, work.form, run)
    if not reasons:
        return known
    lost = {"status": "failed", "reason": "; ".join(reasons), "path": None, "sha256": None, "files": {}}
    return known | lost


def _finish(work: ExportJob, status: dict[str, dict[str, Any]]) -> None:
    """Write `custom/` and the records."""
    subject, staged = work.subject, work.staged
    started = time.perf_counter()
    place = work.store.workspace.ensemble_metrics(subject.name, "test")
    score = read_json(place, remedy="Evaluate again")
    custom_format.write_custom_folder(staged / CUSTOM, subject.name, work.description, subject.classes, status, score)
    squares = work.sampled.squares if work.form.input == UINT8_NHWC else ()
    custom_format.write_parity_rows(staged / CUSTOM, work.sampled.reference_batches(), squares)
    files = [staged / CUSTOM / f"{subject.name}_custom.bin", *sorted((staged / CUSTOM).iterdir())]
    seconds = round(time.perf_counter() - started, 3)
    custom = export_formats.entry_of_files(
        staged, list(dict.fromkeys(files)), seconds=seconds, source_digest=work.source_digest
    )
    status[CUSTOM] = custom
    metadata = read_json(staged / export_folder.METADATA, remedy=export_folder.EXPORT_AGAIN) or {}
    given = work.description["input"]
    metadata |= {
        "architecture": subject.name,
        "num_classes": len(subject.classes),
        "input_shape": given["shape"],
        "img_size": given.get("img_size"),
        "batch_size": work.store.config.dataset.batch_size,
        "seed": work.store.config.seed,
        "device": "cpu",
        "training": work.description,
    }
    export_folder.write_records(staged, metadata, subject.classes, status)


def _outcome(of: Mapping[str, Any]) -> str:
    """One format's line for a person."""
    if of["status"] != "ok":
        return f"{of['status']}: {of['reason']}"
    parity = of.get("parity")
    if not parity:
        return f"ok, {of['path']}"
    return (
        f"ok, {of['path']}, {of['size_mb']:.2f} MB: {parity['rows']} real rows, largest difference "
        f"{parity['max_abs_diff']:.1e} (allowed {parity['tolerance']:g}), {parity['label_flips']} label flips"
        + (f", {parity['near_threshold']} at a step of the combiner" if parity["near_threshold"] else "")
        + (f", test accuracy {change['change']:+.4f}" if (change := of.get("test_accuracy")) else "")
    )


def _result(subject: ExportSource, final: Path, status: Mapping[str, Any], wanted: Sequence[str], word: str) -> Result:
    lines = [f"{subject.name} -> {final} ({word})"]
    lines += [f"  {name:<12} {_outcome(status[name])}" for name in (*FORMATS, *REDUCED) if name in status]
    missing = [name for name in wanted if status[name]["status"] != "ok"]
    failures = [f"{name}: {status[name]['status']}, {status[name]['reason']}" for name in missing]
    document = {"name": subject.name, "folder": str(final), "formats": dict(status)}
    return Result("\n".join(lines), document, failures)
