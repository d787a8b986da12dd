"""What a CUDA device gains, and whether the product keeps it busy: streaming, training, distillation, export.

    make gpu                                            install, run the tests marked gpu, then this program
    python benchmarks/gpu.py                            five full-size members, 16,384 images of 224 px each
    python benchmarks/gpu.py --quick                    tiny networks and few images, not the form to report
    python benchmarks/gpu.py --device cpu --quick       the same code on the CPU: a smoke test without verdicts

Members are bundled architectures that are trained on the device for two epochs; photographs are crops of scikit-learn's
two sample images. Every ratio is of two loops of one run. A part that fails is reported in the table, the others are
measured all the same, and the exit code is 1. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import gpu_runs
from gpu_workspace import FULL, QUICK, Bench, prepared
from reporting import report, row

STREAMING, TRAINING = 0.9, 0.8
PARITY = 0.02
"""Largest difference of a probability between half precision and float32."""
TENSORRT, CPU = "TensorrtExecutionProvider", "CPUExecutionProvider"
"""Of onnxruntime."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; returns 1 without a CUDA device and where a part failed, 0 also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="gpu.py", description="What a CUDA device gains, and how busy it is.")
    parser.add_argument("--quick", action="store_true", help="tiny networks and few images, not the form to report")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a smoke test (default: cuda)")
    options = parser.parse_args(argv)
    if options.device == "cuda" and (problem := missing_device()):
        print(problem, file=sys.stderr)
        return 1
    device = "cuda:0" if options.device == "cuda" else "cpu"
    rows, failed = [], []
    with prepared(QUICK if options.quick else FULL, device) as bench:
        for name, part in PARTS.items():
            start = time.monotonic()
            try:
                rows += part(bench)
            except Exception as error:
                traceback.print_exc()
                failed.append(name)
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                rows.append(row(name, None, "", None, None, f"failed: {reason}"))
            print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    if device == "cpu":
        rows = [entry | {"holds": None} for entry in rows]  # the goals are those of a GPU
    packages = ("torch", "timm", "numpy", "onnxruntime")
    report("gpu", rows, quick=options.quick, packages=packages, card=card_of(device), device=device, failed=failed)
    return 1 if failed else 0


def missing_device() -> str | None:
    """What to do where there is no CUDA device; None where there is one."""
    import torch

    if torch.cuda.is_available():
        return None
    reason = "finds no CUDA device" if torch.version.cuda else "is built without CUDA; install one of pypi.org"
    return (
        f"torch {torch.__version__} {reason}. Run it where nvidia-smi lists a card, or smoke-test it here: "
        "python benchmarks/gpu.py --device cpu --quick"
    )


def card_of(device: str) -> str | None:
    """Name, memory and CUDA version of a GPU; None for the CPU."""
    import torch

    if not device.startswith("cuda"):
        return None
    facts = torch.cuda.get_device_properties(device)
    return f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def extraction_rows(bench: Bench) -> list[dict[str, Any]]:
    """Each member against a plain loop, the share of forward passes, memory and the largest batch."""
    form = bench.form
    gpu_runs.streamed(bench, form.members[0], form.photographs["val"])  # decodes the images and wakes the device
    found, rows = {}, []
    for name in form.members:
        ours = found[name] = gpu_runs.streamed(bench, name, form.streamed)
        bare = gpu_runs.bare_forward_seconds(bench, name, form.streamed, ours.batch_size)
        ratio = bare / ours.seconds
        speeds = f"{form.streamed / ours.seconds:.0f} and {form.streamed / bare:.0f} images/s"
        beside = f"{speeds}, batches of {ours.batch_size}, opened in {ours.opening:.2f} s"
        what = f"streaming {name}, {form.size}, {form.streamed} images of {form.side} px"
        rows.append(row(what, ratio, "of a bare loop", f"at least {STREAMING}", ratio >= STREAMING, beside))
    seconds, opening, forward = (
        sum(getattr(each, key) for each in found.values()) for key in ("seconds", "opening", "forward")
    )
    lowest = min(found, key=lambda name: found[name].forward / found[name].seconds)
    beside = (
        f"{forward / (seconds - opening):.3f} once networks are open ({opening:.1f} of {seconds:.1f} s open them); "
        f"lowest {lowest} {found[lowest].forward / found[lowest].seconds:.3f}"
    )
    share = forward / seconds
    what = f"forward passes while streaming {len(found)} members"
    rows.append(row(what, share, "of wall time", f"at least {STREAMING}", share >= STREAMING, beside))
    return rows + _memory_rows(found)


def _memory_rows(found: dict[str, gpu_runs.Streamed]) -> list[dict[str, Any]]:
    peaks = {name: each.peak_bytes for name, each in found.items() if each.peak_bytes is not None}
    what = "peak device memory while streaming", "largest batch that streaming reaches"
    if not peaks:
        return [row(text, None, "", None, None, "not measured: needs a CUDA device") for text in what]
    most = max(peaks, key=lambda name: peaks[name])
    batches = ", ".join(f"{name} {each.batch_size}" for name, each in found.items())
    largest = max(each.batch_size for each in found.values())
    memory = f"{most}, in batches of {found[most].batch_size} at most, larger ones that failed included"
    return [
        row(what[0], peaks[most] / 1e9, "GB", None, None, memory),
        row(what[1], largest, "images", None, None, batches),
    ]


def parity_rows(bench: Bench) -> list[dict[str, Any]]:
    """Probabilities of the product on the device against those on the CPU, which are float32."""
    worst, changed, decided, total = 0.0, 0, 0, 0
    for name in bench.form.members:
        device, reference = (gpu_runs.probabilities(bench, name, place) for place in (bench.device, "cpu"))
        difference, flips, rows = compared(device, reference)
        print(f"{name:24} difference {difference:.5f}, {flips} of {rows} changed", file=sys.stderr)
        worst, changed, decided, total = max(worst, difference), changed + flips, decided + rows, total + len(device)
    what = f"half precision against float32, {len(bench.form.members)} members: largest difference"
    labels = f"changed labels among rows of a margin above {PARITY}"
    return [
        row(what, worst, "of probability", f"at most {PARITY}", worst <= PARITY, None),
        row(labels, changed, "rows", "0", changed == 0, f"{decided} of {total} rows have such a margin"),
    ]


def compared(found: np.ndarray, reference: np.ndarray) -> tuple[float, int, int]:
    """Largest difference of two arrays (N, C), changed labels of rows whose margin exceeds PARITY, and their number."""
    ordered = np.sort(reference, axis=1)
    has_margin = ordered[:, -1] - ordered[:, -2] > PARITY
    changed = found.argmax(axis=1) != reference.argmax(axis=1)
    return float(np.abs(found - reference).max()), int((changed & has_margin).sum()), int(has_margin.sum())


def training_rows(bench: Bench) -> list[dict[str, Any]]:
    """An epoch of the base pipeline against a plain loop, and what of the difference is its loader."""
    runs = gpu_runs.training_runs(bench)
    seconds = gpu_runs.by_turns(bench, runs)
    count = bench.form.photographs["train"]
    what = f"training {bench.form.trained}, {bench.form.size}, {count} images, batches of {bench.form.batch_size}"
    ratio = seconds["bare"] / seconds["product"]
    beside = f"{count / seconds['product']:.0f} and {count / seconds['bare']:.0f} images/s"
    without = seconds["bare"] / seconds["in memory"]
    return [
        row(what, ratio, "of a bare loop", f"at least {TRAINING}", ratio >= TRAINING, beside),
        row("the same on batches in memory, without its loader", without, "of a bare loop", None, None, None),
        _busy_row(bench, "device busy while training", runs["product"]),
    ]


def distillation_rows(bench: Bench) -> list[dict[str, Any]]:
    """An epoch of a student with its teacher against one of the network alone."""
    runs = gpu_runs.distillation_runs(bench)
    seconds = gpu_runs.by_turns(bench, runs)
    count = bench.form.photographs["train"]
    teacher = f"{min(len(bench.form.members), gpu_runs.LARGEST_TEACHER)} members"
    what = f"epoch of {bench.form.student}, {bench.form.size}, targets consistent of {teacher}"
    beside = f"{count / seconds['student']:.0f} and {count / seconds['alone']:.0f} images/s"
    return [
        row(what, seconds["student"] / seconds["alone"], "of the network alone", None, None, beside),
        _busy_row(bench, "device busy in that epoch", runs["student"]),
        _busy_row(bench, "device busy in an epoch of the network alone", runs["alone"]),
    ]


def _busy_row(bench: Bench, what: str, run: Callable[[], object]) -> dict[str, Any]:
    share = gpu_runs.busy_share(bench, run)
    reason = "not measured: needs a CUDA device and its profiler" if share is None else None
    return row(what, share, "of wall time", None, None, reason)


def tensorrt_rows(bench: Bench, provider: str = TENSORRT) -> list[dict[str, Any]]:
    """The exported vote in onnxruntime by TensorRT: against the CPU, and against eager networks on the device."""
    import onnxruntime

    what = f"one image by TensorRT, soft voting over {len(bench.form.members)} members: eager over it"
    if provider not in (there := onnxruntime.get_available_providers()):
        reason = f"not measured: onnxruntime {onnxruntime.__version__} here has {', '.join(there)}"
        return [row(what, None, "times", None, None, f"{reason}; onnxruntime-gpu and tensorrt have it")]
    network = gpu_runs.vote_network(bench)
    path = gpu_runs.write_onnx(bench, network)
    session, reference = (
        onnxruntime.InferenceSession(str(path), providers=names)
        for names in (list(dict.fromkeys([provider, CPU])), [CPU])
    )
    if session.get_providers()[0] != provider:
        return [row(what, None, "times", None, None, "not measured: onnxruntime could not load TensorRT's libraries")]
    rng = np.random.default_rng(0)
    images = rng.random((8, 3, bench.form.side, bench.form.side), dtype=np.float32)
    answers, expected = (
        np.concatenate([each.run(["probabilities"], {"images": image[None]})[0] for image in images])
        for each in (session, reference)
    )
    eager = gpu_runs.eager_run(bench, network, images[:1])
    seconds = gpu_runs.by_turns(bench, {"file": lambda: session.run(None, {"images": images[:1]}), "eager": eager})
    beside = f"{1000 * seconds['eager']:.2f} ms eager, {1000 * seconds['file']:.2f} ms TensorRT"
    worst = float(np.abs(answers - expected).max())
    return [
        row(what, seconds["eager"] / seconds["file"], "times", None, None, beside),
        row("its largest difference from the CPU", worst, "of probability", None, None, f"{len(images)} images"),
    ]


PARTS: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
    "extraction": extraction_rows,
    "parity": parity_rows,
    "training": training_rows,
    "distillation": distillation_rows,
    "TensorRT": tensorrt_rows,
}


if __name__ == "__main__":
    sys.exit(main())
