"""Converts one network to files of every requested format, and checks the parity of each file in its own runtime."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from utils import base_back
from utils.core import engines
from utils.core.errors import UserError
from utils.exporting import (
    export_folder,
    export_formats,
    exported_network,
    parity_check,
    parity_rows,
    reduced_precision,
    runtimes,
    tflite_conversion,
)
from utils.exporting.export_formats import PACKAGED, TENSORRT, TFLITE
from utils.exporting.exported_network import UINT8_NHWC, ExportSignature, ExportSource
from utils.exporting.parity_check import FileOutputs, FileRunError, InputArrays, RuntimeProcess
from utils.exporting.parity_rows import ParitySample
from utils.exporting.reduced_precision import REDUCED
from utils.predictions.store import Store

if TYPE_CHECKING:
    from torch import Tensor

    from utils.exporting.exported_network import ExportNetwork

logger = logging.getLogger("disease_pipeline")

WEIGHTS = ("state_dict", "checkpoint")
"""Formats of weights only, which the runtime loads into rebuilt networks"""
LARGE_FILE_MB = 500.0  # a runtime holds its file once more in memory


@dataclass(frozen=True)
class ConversionJob:
    """Inputs, reference rows and folders of one export."""

    store: Store
    source: ExportSource
    signature: ExportSignature
    source_digest: str
    onnx_exporter: str
    """torch's ONNX exporter: `tracing` or `dynamo`."""
    description: dict[str, Any]
    """Metadata of the files, JSON-ready."""
    sample: ParitySample
    threads: int
    """Intra-op threads of the runtimes that check the files"""
    staged: Path
    """Temporary folder that becomes the export's folder."""
    scratch: Path
    """Folder of files that only the conversion needs."""


def write_files(
    job: ConversionJob,
    network: ExportNetwork,
    formats: Sequence[str],
    on_entry: Callable[[str, dict[str, Any]], object],
) -> None:
    """Write the files of the formats that are converted from the network.

    `on_entry(format, entry)` is called as soon as a format is written; its entry has no parity yet.
    """
    import torch

    name = job.source.name
    # The packaging compares the traced graph with the network; a discontinuity may move a probability by up to 1.
    network.parity_tolerance = 1.0 if job.source.is_discontinuous else parity_check.TOLERANCE  # type: ignore[assignment]  # nn.Module types attributes as Tensor or Module
    network.onnx_exporter = job.onnx_exporter  # type: ignore[assignment]
    if packaged := [format_name for format_name in PACKAGED if format_name in formats]:
        logger.info("export %s: writing %s", name, ", ".join(packaged))
        sample = [torch.from_numpy(array[None]) for array in job.sample.inputs[0]]
        export_formats.write_packaged_formats(
            network, name, packaged, job.staged, sample, job.description, job.source.classes, on_entry
        )
    if TFLITE in formats:
        logger.info("export %s: writing tflite", name)

        def open_network() -> tuple[ExportNetwork, tuple[Tensor, ...]]:
            return _fixed_size_network(job, network)

        on_entry(TFLITE, export_formats.write_tflite(open_network, name, job.staged, job.scratch / "converter"))
    if TENSORRT in formats:
        on_entry(TENSORRT, export_formats.tensorrt_entry(name, job.description))


def write_reduced_files(job: ConversionJob, onnx_file: Path, formats: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Write the ONNX files of reduced precision from the 32-bit file: {format: entry}, without parity."""
    status = {}
    for format_name in (name for name in REDUCED if name in formats):
        if job.source.is_imported:
            reason = "the export holds a combiner and no networks, so there are no weights to convert"
            status[format_name] = export_formats.format_entry("skipped", reason=reason)
            continue
        logger.info("export %s: writing %s", job.source.name, format_name)

        def calibration_inputs() -> Sequence[InputArrays]:
            return parity_rows.calibration_inputs(job.store, job.source, job.signature)

        status[format_name] = reduced_precision.write_reduced(
            format_name, onnx_file, job.source.name, job.staged, calibration_inputs
        )
    return status


class ParityChecks:
    """The parity checks of an export's files; the processes that run the files end with the context.

    Each format runs in a new process, several at a time where cores and memory allow; formats of weights only share
    one, which rebuilds the networks. A check starts as soon as its files are written, while the next are being written.
    """

    def __init__(self, job: ConversionJob, formats: Sequence[str]) -> None:
        """`formats` are those that will be added."""
        self._job, self._formats = job, formats
        self._status: dict[str, dict[str, Any]] = {}
        self._checks: dict[str, _Check] = {}
        self._processes = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._processes.close()

    def add(self, format_name: str, entry: dict[str, Any]) -> None:
        """Add the entry of a format whose files are written; this process goes on writing, which takes a core."""
        self._status[format_name] = entry
        self._start(n_reserved=1)

    def results(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (format, entry) with the parity of the format's files, in the order in which they were added.

        Files that fail the check are moved to `failed/`, and their entry says so.
        """
        for format_name, entry in self._status.items():
            self._start()
            checked = entry
            if format_name in self._checks:
                checked = _checked_entry(self._job, self._checks[format_name], format_name, entry)
            if checked["status"] == "failed":
                export_folder.move_to_failed(self._job.staged, format_name)
            level = logging.INFO if checked["status"] == "ok" else logging.WARNING
            summary = export_formats.summarize_entry(checked)
            logger.log(level, "export %s, %s: %s", self._job.source.name, format_name, summary)
            yield format_name, checked

    def _start(self, n_reserved: int = 0) -> None:
        """Start checks of written files while processes are free; `n_reserved` of them are not."""
        n_processes = _number_of_processes(self._job, self._status) - n_reserved
        for names in self._waiting():
            if sum(check.is_running for check in set(self._checks.values())) >= n_processes:
                return
            check = _Check(self._job, names, self._status, self._processes)
            self._checks |= dict.fromkeys(names, check)

    def _waiting(self) -> list[list[str]]:
        """The formats of each process that has not been started, and whose files are all written."""
        groups: dict[str, list[str]] = {}
        for name in self._formats:
            groups.setdefault(WEIGHTS[0] if name in WEIGHTS else name, []).append(name)
        complete = [group for group in groups.values() if all(name in self._status for name in group)]
        written = [[name for name in group if self._status[name]["status"] == "ok"] for group in complete]
        return [group for group in written if group and group[0] not in self._checks]


class _Check:
    """The files of one or several formats, which a process runs."""

    def __init__(
        self,
        job: ConversionJob,
        format_names: Sequence[str],
        status: Mapping[str, Mapping[str, Any]],
        processes: ExitStack,
    ) -> None:
        """Start the process, which ends with the block of `processes`."""
        self.start = time.perf_counter()
        self.job, self.processes = job, processes
        is_tflite = format_names[0] == TFLITE
        self.reference = job.sample.reference_batches(fixed=is_tflite, takes_uint8=job.signature.input == UINT8_NHWC)
        self.files = {
            name: [job.staged / file for file in status[name]["files"] if not file.endswith(".data")]
            for name in format_names
        }
        self._process: RuntimeProcess | None = self._started(format_names)
        self._outputs: dict[Path, FileOutputs] = {}

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._process is not None and not self._process.has_ended

    def outputs(self, format_name: str) -> list[FileOutputs]:
        """Wait for the outputs of the format's files, in order; FileRunError if one of them does not run."""
        if self._process is not None:
            process, self._process = self._process, None
            try:
                self._outputs = self._of_files(list(self.files), process)
            except FileRunError:
                if len(self.files) == 1:
                    raise
        if self.files[format_name][0] not in self._outputs:  # a file of another format may be the one that failed
            self._outputs |= self._of_files([format_name], self._started([format_name]))
        return [self._outputs[path] for path in self.files[format_name]]

    def _of_files(self, format_names: Sequence[str], process: RuntimeProcess) -> dict[Path, FileOutputs]:
        files = [path for name in format_names for path in self.files[name]]
        return dict(zip(files, process.outputs(), strict=True))

    def _started(self, format_names: Sequence[str]) -> RuntimeProcess:
        name, job = format_names[0], self.job
        process = RuntimeProcess(
            name,
            [path for name in format_names for path in self.files[name]],
            self.reference,
            job.description["outputs"],
            job.scratch / name,
            job=_runtime_job(job),
            python=tflite_conversion.python_interpreter() if name == TFLITE else sys.executable,
        )
        return self.processes.enter_context(process)


def _number_of_processes(job: ConversionJob, status: Mapping[str, Mapping[str, Any]]) -> int:
    """How many runtimes run at a time: one for each of the cores' groups of threads, one alone for large files."""
    megabytes = max((entry["size_mb"] or 0 for entry in status.values()), default=0)
    return 1 if megabytes > LARGE_FILE_MB else max(1, engines.cores() // max(1, job.threads))


def _fixed_size_network(job: ConversionJob, network: ExportNetwork) -> tuple[ExportNetwork, tuple[Tensor, ...]]:
    """The network for a single image that has been resized, and such an image."""
    import torch

    takes_uint8 = job.signature.input == UINT8_NHWC
    if takes_uint8 and not job.source.is_imported:
        if not job.sample.squares:
            raise UserError(
                "its members resize images by different rules, and a TFLite file takes images of one fixed size; "
                "export it with --input float-nchw"
            )
        network = exported_network.assemble_network(job.store, job.source, job.signature, resizes=False)
    reference = job.sample.reference_batches(fixed=True, takes_uint8=takes_uint8)
    return network, tuple(map(torch.from_numpy, reference.batches[0]))


def _checked_entry(job: ConversionJob, check: _Check, format_name: str, entry: dict[str, Any]) -> dict[str, Any]:
    is_reduced = format_name in REDUCED
    tolerance = reduced_precision.tolerance_of(format_name) if is_reduced else parity_check.TOLERANCE
    parity, facts, reasons = None, {}, []
    try:
        outputs_of_files = check.outputs(format_name)
    except FileRunError as error:
        reasons.append(str(error))
    else:
        for file, file_outputs in zip(check.files[format_name], outputs_of_files, strict=True):
            outcome = parity_check.compare_outputs(check.reference, file_outputs, tolerance)
            if parity is None or not outcome["passed"]:
                parity, facts = outcome["parity"], file_outputs.facts
            if not outcome["passed"]:
                reasons.append(f"{file.name}: {outcome['reason']}")
    seconds = round((entry["seconds"] or 0) + time.perf_counter() - check.start, 3)
    checked = entry | {
        "parity": parity,
        "seconds": seconds,
        "versions": entry["versions"] | facts.get("versions", {}),
        "latency_ms": facts.get("latency_ms"),
        "source_digest": job.source_digest,
        "threads": job.threads,
        "members_run": "all",  # files have no control flow: a sparse combiner gives weight 0 to members that it skips
    }
    if reasons:
        failure: dict[str, Any] = {"reason": "; ".join(reasons), "path": None, "sha256": None, "files": {}}
        return checked | {"status": "failed"} | failure
    if is_reduced:
        run, _ = runtimes.open_onnx(job.staged / entry["path"], {"outputs": ["probabilities"], "threads": job.threads})
        checked["test_accuracy"] = parity_rows.measure_test_accuracy(job.store, job.source, job.signature, run)
    return checked


def _runtime_job(job: ConversionJob) -> dict[str, Any]:
    """Everything that a runtime needs to rebuild the networks, for formats with weights only."""
    workspace = job.store.workspace
    environment = {"DBT_BASE_DIR": str(workspace.base)}
    environment |= {"DBT_ENSEMBLE_DIR": str(workspace.output)} if workspace.output else {}
    return {
        "name": job.source.name,
        "signature": vars(job.signature),
        "environment": environment,
        "project": str(base_back.PROJECT),
        "threads": job.threads,
    }
