"""Parity check of an exported file: its outputs, computed by its runtime in a new process, against the ensemble's.

The inputs are real rows, and the ensemble's outputs are the stored predictions that `evaluate` scores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from utils.combiners.protocol import Combiner
from utils.core import subprocesses
from utils.numeric.metrics import softmax
from utils.predictions.rows import MemberOutputs

BATCH_SIZES = (1, 3, 17)
TOLERANCE = 1e-4
"""Largest absolute difference of a probability."""
MAX_DISCONTINUITY_FRACTION = 0.05
"""Fraction of rows that may lie at a discontinuity of the combiner."""
N_LOG_LINES = 6  # last lines of a failed process to quote in a message
TIMEOUT_SECONDS = 1800.0


InputArrays = tuple[np.ndarray, ...]
"""One array per input of a file, of one row or of a batch."""


@dataclass(frozen=True)
class ReferenceBatches:
    """Real rows in batches of a file's inputs, with the expected outputs of each row."""

    batches: list[InputArrays]
    """The batches; images of different size are in different batches."""
    rows: list[np.ndarray]
    """For each batch, the indices of its rows in the expected outputs, int64."""
    probabilities: np.ndarray
    """Expected, float64 (N, C)"""
    member_logits: np.ndarray | None = None
    """Expected, float32 (M, N, C); only for a file that returns them"""
    member_embeddings: tuple[np.ndarray, ...] | None = None
    """Expected, M arrays float32 (N, D_m); only for a file that returns them"""
    combiner: Combiner | None = None
    """Applied to the member outputs of a file that returns them."""


@dataclass(frozen=True)
class FileOutputs:
    """Outputs of a file, row by row in the order of the reference batches."""

    rows: np.ndarray
    """int64 (R,), indices into the expected outputs; one may occur twice"""
    outputs: dict[str, np.ndarray]
    """{output: (R, ...)}"""
    facts: dict[str, Any] = field(default_factory=dict)
    """`versions` and `latency_ms`, reported by the runtime"""


class FileRunError(Exception):
    """A file could not be run; the message ends with the last lines of its process."""


def make_batches(
    inputs: Sequence[InputArrays],
    sizes: Sequence[int] = BATCH_SIZES,
) -> tuple[list[InputArrays], list[np.ndarray]]:
    """Group rows, whose images are each (H, W, 3) or (3, S, S), into batches, cycling through the given sizes.

    Returns the batches and the indices of the rows in each. The images of a batch have the same shape. If too few rows
    are left for a size, a batch repeats some of the largest group, so that every size occurs.
    """
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for row, images in enumerate(inputs):
        groups.setdefault(tuple(image.shape for image in images), []).append(row)
    largest = max(groups.values(), key=len)
    rows: list[np.ndarray] = []
    for group in groups.values():
        start, turn = 0, 0
        while start < len(group):
            size = sizes[turn % len(sizes)]
            if size > len(group) - start:
                size = max(smaller for smaller in (1, *sizes) if smaller <= len(group) - start)
            rows.append(np.array(group[start : start + size]))
            start, turn = start + size, turn + 1
    missing = sorted(set(sizes) - {len(batch) for batch in rows})
    rows += [np.resize(np.array(largest), size) for size in missing]
    return [tuple(map(np.stack, zip(*(inputs[row] for row in batch), strict=True))) for batch in rows], rows


def named_arrays(number: int, batch: InputArrays) -> dict[str, np.ndarray]:
    """{name in a `.npz` file: array} of a batch: `batch_0000`, or with several inputs `batch_0000/000`, ..."""
    name = f"batch_{number:04d}"
    if len(batch) == 1:
        return {name: batch[0]}
    return {f"{name}/{index:03d}": array for index, array in enumerate(batch)}


class RuntimeProcess:
    """A process that runs the files of one format on the reference batches; leaving the context ends it.

    The files share the process, since a runtime takes seconds to start, but are opened separately.
    """

    def __init__(
        self,
        format_name: str,
        files: Sequence[Path],
        reference: ReferenceBatches,
        outputs: Sequence[str],
        scratch: Path,
        *,
        job: Mapping[str, Any] | None = None,
        python: str = sys.executable,
    ) -> None:
        """Start a process of the interpreter `python`.

        `outputs` are the names of the files' outputs, `job` holds further entries of the runtime's job, and `scratch`
        is a folder for exchanging arrays.
        """
        self._reference, self._output_names = reference, list(outputs)
        self._results = scratch / "outputs.npz"
        command = _runtime_command(format_name, files, reference, outputs, scratch, job or {}, python)
        environment = subprocesses.watching_environment(os.environ)
        environment |= {"PYTHONWARNINGS": "ignore", "TF_CPP_MIN_LOG_LEVEL": "3"}
        streams: dict[str, Any] = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        self._process = subprocess.Popen(command, cwd=scratch, env=environment, text=True, **streams)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended, so that `outputs` does not wait."""
        return self._process.poll() is not None

    def outputs(self, seconds: float = TIMEOUT_SECONDS) -> list[FileOutputs]:
        """Wait for the process and return the outputs of each file.

        Raises FileRunError with the last lines of the process, which name the file, if it fails, has not ended after
        `seconds` or is killed.
        """
        try:
            _, messages = self._process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise FileRunError(f"its runtime did not end within {seconds:.0f} s") from error
        code = self._process.returncode
        if code != 0 or not self._results.is_file():
            raise FileRunError(f"its runtime ended with {code}: {last_lines(messages)}")
        with np.load(self._results) as arrays:
            facts = json.loads(str(arrays["facts"]))
            return [self._file_outputs(arrays, index, of_file) for index, of_file in enumerate(facts)]

    def _file_outputs(self, arrays: Mapping[str, np.ndarray], index: int, facts: dict[str, Any]) -> FileOutputs:
        batches = [f"{index}/batch_{number:04d}" for number in range(len(self._reference.batches))]
        outputs = {
            name: np.concatenate([arrays[f"{batch}/{name}"] for batch in batches]).astype(np.float32)
            for name in self._output_names
        }
        return FileOutputs(np.concatenate(self._reference.rows), outputs, facts)


def _runtime_command(
    format_name: str,
    files: Sequence[Path],
    reference: ReferenceBatches,
    outputs: Sequence[str],
    scratch: Path,
    job: Mapping[str, Any],
    python: str,
) -> list[str]:
    """Write the job of a runtime; the command that runs it."""
    scratch.mkdir(parents=True, exist_ok=True)
    inputs_path, outputs_path, job_path = (scratch / name for name in ("batches.npz", "outputs.npz", "job.json"))
    arrays_by_name: dict[str, Any] = {}
    for number, batch in enumerate(reference.batches):
        arrays_by_name |= named_arrays(number, batch)
    np.savez(inputs_path, allow_pickle=False, **arrays_by_name)
    record = {**job, "format": format_name, "files": [str(path) for path in files], "outputs": list(outputs)}
    record |= {"batches": str(inputs_path), "results": str(outputs_path)}
    job_path.write_text(json.dumps(record), encoding="utf-8")
    return subprocesses.script_command(python, str(Path(__file__).with_name("runtimes.py")), str(job_path))


def last_lines(text: str) -> str:
    """The last lines of a process's output, joined into one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-N_LOG_LINES:]) or "no output"


def compare_outputs(
    reference: ReferenceBatches, file_outputs: FileOutputs, tolerance: float = TOLERANCE
) -> dict[str, Any]:
    """Compare a file's outputs with the expected ones: `passed`, `reason`, and the `parity` of `export_status.json`.

    A file that returns its member outputs is compared twice. Its member outputs, as probabilities, are compared with
    the expected ones; its probabilities are compared with those that the combiner computes from the file's member
    outputs, on every row. A row whose member outputs agree, but for which the combiner's probabilities differ from
    those for the expected member outputs, is at a discontinuity: it is counted as `near_threshold` and excluded only
    from the end-to-end comparison.
    """
    expected = reference.probabilities[file_outputs.rows]
    probabilities = file_outputs.outputs["probabilities"].astype(np.float64)
    if probabilities.shape != expected.shape:
        reason = f"its probabilities have the shape {probabilities.shape}; expected {expected.shape}"
        return {"passed": False, "reason": reason, "parity": None}
    is_excluded = np.zeros(len(expected), dtype=bool)
    parity: dict[str, Any] = {
        "rows": len(np.unique(file_outputs.rows)),
        "tolerance": tolerance,
        "batch_sizes": sorted({len(rows) for rows in reference.rows}),
    }
    reasons: list[str] = []
    if reference.combiner is not None and reference.member_logits is not None:
        member_logits, combined = _recombined(reference.combiner, reference, file_outputs)
        expected_members = softmax(reference.member_logits[:, file_outputs.rows])
        member_difference = np.abs(softmax(member_logits) - expected_members).max()
        combiner_difference = float(np.abs(combined - probabilities).max())
        flips = _label_flips(combined, probabilities, tolerance)
        is_excluded = np.abs(combined - expected).max(axis=1) > tolerance
        parity["members"] = {"max_abs_diff": _finite(member_difference)}
        parity["combiner"] = {"max_abs_diff": _finite(combiner_difference), "label_flips": flips}
        if not member_difference <= tolerance:
            reasons.append(f"its members' probabilities differ by {member_difference:.3g}")
        if not combiner_difference <= tolerance or flips:
            reasons.append(
                f"its combiner differs by {combiner_difference:.3g} on the file's member outputs, {flips} label(s) flip"
            )
        if is_excluded.mean() > MAX_DISCONTINUITY_FRACTION:
            reasons.append(
                f"{int(is_excluded.sum())} of {len(is_excluded)} rows lie at a discontinuity of the combiner"
            )
    largest = float(np.abs(expected - probabilities)[~is_excluded].max(initial=0.0))
    flips = _label_flips(expected[~is_excluded], probabilities[~is_excluded], tolerance)
    if not np.isfinite(probabilities).all():
        largest = float("nan")
    if not largest <= tolerance or flips:
        reasons.append(f"its probabilities differ by {largest:.3g} (allowed {tolerance:g}), {flips} label(s) flip")
    parity |= {"max_abs_diff": _finite(largest), "label_flips": flips, "near_threshold": int(is_excluded.sum())}
    return {"passed": not reasons, "reason": "; ".join(reasons) or None, "parity": parity}


def _recombined(
    combiner: Combiner, reference: ReferenceBatches, file_outputs: FileOutputs
) -> tuple[np.ndarray, np.ndarray]:
    """The file's member logits (M, R, C), and the combiner's probabilities (R, C) for the file's member outputs."""
    logits = file_outputs.outputs["member_logits"].transpose(1, 0, 2)
    if reference.member_embeddings is None:
        return logits, combiner.predict_proba(logits)
    ends = np.cumsum([part.shape[1] for part in reference.member_embeddings])[:-1]
    embeddings = tuple(np.split(file_outputs.outputs["member_embeddings"], ends, axis=1))
    return logits, combiner.predict_proba(MemberOutputs(logits, embeddings))


def _label_flips(expected: np.ndarray, probabilities: np.ndarray, tolerance: float) -> int:
    """Number of rows whose top class differs although its margin, expected (N, C), exceeds twice the tolerance."""
    differs = expected.argmax(axis=1) != probabilities.argmax(axis=1)
    return int(differs[_margin(expected) > 2 * tolerance].sum())


def _margin(probabilities: np.ndarray) -> np.ndarray:
    """Difference of the two highest probabilities of each row, (N,)."""
    if probabilities.shape[1] < 2:
        return np.ones(len(probabilities))
    ordered = np.sort(probabilities, axis=1)
    return ordered[:, -1] - ordered[:, -2]


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
