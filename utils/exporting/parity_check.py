"""The proof that an exported file answers like the ensemble: run afresh, in its own runtime, on real images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.combiners.protocol import Combiner
from utils.numeric.metrics import softmax
from utils.predictions.rows import MemberOutputs

BATCH_SIZES = (1, 3, 17)
TOLERANCE = 1e-4  # on probabilities
MAX_DISCONTINUITY_FRACTION = 0.05  # share of rows that may lie at a step of the combiner
N_LOG_LINES = 6  # of a failed process that are told
TIMEOUT_SECONDS = 1800.0


@dataclass(frozen=True)
class ReferenceBatches:
    """Real rows in the form that a file takes, and what is expected of each."""

    batches: list[np.ndarray]
    """Each of one shape, so that images of unequal size are in batches of their own."""
    rows: list[np.ndarray]
    """Which rows of the expectation a batch holds, int64."""
    probabilities: np.ndarray
    """float64 (N, C)"""
    member_logits: np.ndarray | None = None
    """float32 (M, N, C), where the file gives them too"""
    member_embeddings: tuple[np.ndarray, ...] | None = None
    """M arrays float32 (N, D_m)"""
    combiner: Combiner | None = None
    """Of a file that gives its members' outputs: what has to agree on them."""


@dataclass(frozen=True)
class FileOutputs:
    """What a file gave, row by row in the order of the probe's batches."""

    rows: np.ndarray
    """int64 (R,), rows of the expectation; one may occur twice"""
    outputs: dict[str, np.ndarray]
    """{output: (R, ...)}"""
    facts: dict[str, Any] = field(default_factory=dict)


class FileRunError(Exception):
    """A file could not be run; the text is the end of what its process said."""


def make_batches(
    images: Sequence[np.ndarray],
    sizes: Sequence[int] = BATCH_SIZES,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Images, each (H, W, 3) or (3, S, S), in batches of the given sizes in turn; with the rows in each.

    Images of one shape go together. A batch that there are too few images for is filled up with those there are, so
    that every size occurs.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, image in enumerate(images):
        groups.setdefault(image.shape, []).append(row)
    largest = max(groups.values(), key=len)
    rows: list[np.ndarray] = []
    for own in groups.values():
        start, turn = 0, 0
        while start < len(own):
            size = sizes[turn % len(sizes)]
            if size > len(own) - start:
                size = max(small for small in (1, *sizes) if small <= len(own) - start)
            rows.append(np.array(own[start : start + size]))
            start, turn = start + size, turn + 1
    missing = sorted(set(sizes) - {len(batch) for batch in rows})
    rows += [np.resize(np.array(largest), size) for size in missing]
    return [np.stack([images[row] for row in batch]) for batch in rows], rows


def run_in_subprocess(
    kind: str,
    files: Sequence[Path],
    probe: ReferenceBatches,
    outputs: Sequence[str],
    scratch: Path,
    *,
    job: Mapping[str, Any] | None = None,
    python: str = sys.executable,
    seconds: float = TIMEOUT_SECONDS,
) -> list[FileOutputs]:
    """Answers of each file of one format, in a new process of `python`; `scratch` is for what goes back and forth.

    Each file is opened by itself; they share the process for the seconds that a runtime takes to be there. Raises
    RunFailed with the last lines of the process, which name the file, where it fails, hangs or is killed.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    given, answers, place = (scratch / name for name in ("probe.npz", "answers.npz", "job.json"))
    named = {f"batch_{number:04d}": batch for number, batch in enumerate(probe.batches)}
    np.savez(given, allow_pickle=False, **named)
    record = {**(job or {}), "format": kind, "files": [str(path) for path in files], "outputs": list(outputs)}
    record |= {"probe": str(given), "answers": str(answers)}
    place.write_text(json.dumps(record), encoding="utf-8")
    script = Path(__file__).with_name("runtimes.py")
    # run_path does not put our folder first on the search path, where a module of ours could pass for another's.
    code = f"import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path({str(script)!r}, run_name='__main__')"
    command = [python, "-c", code, script.name, str(place)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "TF_CPP_MIN_LOG_LEVEL": "3"}
    try:
        done = subprocess.run(
            command, cwd=scratch, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise FileRunError(f"its runtime did not end within {seconds:.0f} s") from error
    if done.returncode != 0 or not answers.is_file():
        raise FileRunError(f"its runtime ended with {done.returncode}: {last_lines(done.stderr)}")
    rows = np.concatenate(probe.rows)
    with np.load(answers) as arrays:
        facts = json.loads(str(arrays["facts"]))
        return [
            FileOutputs(
                rows,
                {
                    output: np.concatenate([arrays[f"{place}/{name}/{output}"] for name in named]).astype(np.float32)
                    for output in outputs
                },
                own,
            )
            for place, own in enumerate(facts)
        ]


def last_lines(text: str) -> str:
    """The end of what a process said, in one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-N_LOG_LINES:]) or "it said nothing"


def compare_outputs(probe: ReferenceBatches, answers: FileOutputs, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """The certificate: `passed`, and the comparison as `export_status.json` keeps it.

    Where the file gives its members' outputs there are two comparisons. Those outputs, as probabilities, are held
    against the members' own; and the file's answer against the combiner's on the file's own member outputs, strictly on
    every row. A row on which the combiner itself answers otherwise for the file's member outputs than for the expected
    ones, though these agree, lies at a step: it is counted and left out of the end-to-end comparison alone.
    """
    expected = probe.probabilities[answers.rows]
    found = answers.outputs["probabilities"].astype(np.float64)
    if found.shape != expected.shape:
        return {"passed": False, "reason": f"it answers {found.shape}; expected {expected.shape}", "parity": None}
    near = np.zeros(len(expected), dtype=bool)
    parity: dict[str, Any] = {
        "rows": len(np.unique(answers.rows)),
        "tolerance": tolerance,
        "batch_sizes": sorted({len(batch) for batch in probe.batches}),
    }
    reasons = []
    if probe.combiner is not None and probe.member_logits is not None:
        own = _member_outputs(probe, answers)
        members = getattr(own, "logits", own)
        difference = np.abs(softmax(members) - softmax(probe.member_logits[:, answers.rows])).max()
        on_own = probe.combiner.predict_proba(own)
        strict = float(np.abs(on_own - found).max())
        flips = int((on_own.argmax(axis=1) != found.argmax(axis=1))[_margin(on_own) > 2 * tolerance].sum())
        near = np.abs(on_own - expected).max(axis=1) > tolerance
        parity["members"] = {"max_abs_diff": _number(difference)}
        parity["combiner"] = {"max_abs_diff": _number(strict), "label_flips": flips}
        if not difference <= tolerance:
            reasons.append(f"its members' probabilities are off by {difference:.3g}")
        if not strict <= tolerance or flips:
            reasons.append(f"its combiner is off by {strict:.3g} on its own members' outputs, {flips} label(s) differ")
        if near.mean() > MAX_DISCONTINUITY_FRACTION:
            reasons.append(f"{int(near.sum())} of {len(near)} rows lie at a step of the combiner")
    compared = ~near
    largest = float(np.abs(expected - found)[compared].max()) if compared.any() else 0.0
    differing = expected.argmax(axis=1) != found.argmax(axis=1)
    flips = int((differing & compared & (_margin(expected) > 2 * tolerance)).sum())
    if not np.isfinite(found).all():
        largest = float("nan")
    if not largest <= tolerance or flips:
        reasons.append(f"its probabilities are off by {largest:.3g} (allowed {tolerance:g}), {flips} label(s) differ")
    parity |= {"max_abs_diff": _number(largest), "label_flips": flips, "near_threshold": int(near.sum())}
    return {"passed": not reasons, "reason": "; ".join(reasons) or None, "parity": parity}


def _member_outputs(probe: ReferenceBatches, answers: FileOutputs) -> np.ndarray | MemberOutputs:
    """The file's own member outputs in the form that combiners take: (M, R, C)."""
    logits = answers.outputs["member_logits"].transpose(1, 0, 2)
    if probe.member_embeddings is None:
        return logits
    ends = np.cumsum([part.shape[1] for part in probe.member_embeddings])[:-1]
    return MemberOutputs(logits, tuple(np.split(answers.outputs["member_embeddings"], ends, axis=1)))


def _margin(probabilities: np.ndarray) -> np.ndarray:
    """How much the most probable class of each row is ahead, (N,)."""
    if probabilities.shape[1] < 2:
        return np.ones(len(probabilities))
    best = np.sort(probabilities, axis=1)
    return best[:, -1] - best[:, -2]


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
