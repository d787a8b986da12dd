"""What a soup of many checkpoints takes: peak memory above the level after imports, and seconds.

    python benchmarks/soup_memory.py            fifteen checkpoints of 25 million parameters (1.5 GB on disk)
    python benchmarks/soup_memory.py --quick    five of 5 million, not the form to report

The weights are random, in 160 tensors of a large network's shapes. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from reporting import report, row

PROJECT = Path(__file__).resolve().parents[1]
GOAL = 3  # checkpoints
LAYERS = 40


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; returns 0, also where the goal is missed."""
    parser = argparse.ArgumentParser(prog="soup_memory.py", description="Memory and time of a soup.")
    parser.add_argument("--quick", action="store_true", help="five checkpoints of 5 million parameters")
    parser.add_argument("--part", choices=sorted(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.part:
        print(json.dumps(PARTS[options.part](options.folder)))
        return 0
    report("soup_memory", measure(quick=options.quick), quick=options.quick, packages=("torch", "safetensors"))
    return 0


def measure(*, quick: bool) -> list[dict[str, Any]]:
    """The rows of the report, `{what, figure, unit, goal, holds, peer}`; each way runs in a process of its own."""
    count, millions = (5, 5) if quick else (15, 25)
    with tempfile.TemporaryDirectory(prefix="soup-") as name:
        folder = Path(name)
        _write_checkpoints(folder, count, millions)
        size = (folder / "0.pth").stat().st_size / 1e6
        ours, plain = (_part(part, folder) for part in ("soup", "all_at_once"))
    what = f"{count} checkpoints of {millions} million parameters ({size:.0f} MB each)"
    peaks = [None if found["megabytes"] is None else found["megabytes"] / size for found in (ours, plain)]
    holds = None if peaks[0] is None else peaks[0] < GOAL
    beside = None if peaks[1] is None else f"all in memory at once: {peaks[1]:.2f}"
    return [
        row(f"{what}: peak memory", peaks[0], "checkpoints", f"under {GOAL}", holds, beside),
        row(f"{what}: averaged and written", ours["seconds"], "s", None, None, f"at once: {plain['seconds']:.2f} s"),
    ]


def _write_checkpoints(folder: Path, count: int, millions: int) -> None:
    """Random weights in the base pipeline's form: four tensors a layer, most of it in one matrix."""
    import torch

    width = int((millions * 1e6 / LAYERS) ** 0.5)
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        weights = {}
        for layer in range(LAYERS):
            weights[f"{layer}.weight"] = torch.randn(width, width, generator=generator)
            weights |= {f"{layer}.{name}": torch.randn(width, generator=generator) for name in ("bias", "running_mean")}
            weights[f"{layer}.num_batches_tracked"] = torch.tensor(number)
        torch.save({"model_state_dict": weights, "extra": {"backbone_name": "random"}}, folder / f"{number}.pth")


def _part(name: str, folder: Path) -> dict[str, Any]:
    call = [sys.executable, __file__, "--part", name, "--folder", str(folder)]
    done = subprocess.run(
        call, env=os.environ | {"PYTHONPATH": str(PROJECT)}, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"the part {name} of the benchmark ended with {done.returncode}; see the messages above")
    return json.loads(done.stdout.splitlines()[-1])


# parts, each in a process of its own ---------------------------------------------------------------------------------
def soup(folder: Path) -> dict[str, Any]:
    """The product's way: block by block from memory maps, then a checkpoint."""
    from functools import partial

    from utils.core import artifacts
    from utils.networks import checkpoints, soups

    def opened(path: Path) -> dict[str, Any]:
        return checkpoints.state_dict_of(checkpoints.read_checkpoint(path))

    def work() -> None:
        ingredients = [soups.Ingredient(path.stem, partial(opened, path)) for path in sorted(folder.glob("?*.pth"))]
        artifacts.write_checkpoint(
            folder / "soup" / "soup.pth", soups.weighted_average(ingredients), {"stage": "uniform_soup"}
        )

    return _watched(work)


def all_at_once(folder: Path) -> dict[str, Any]:
    """The plain way: every state dictionary in memory, then their mean."""
    import torch

    def work() -> None:
        states = [torch.load(path, weights_only=True)["model_state_dict"] for path in sorted(folder.glob("?*.pth"))]
        mean = {name: torch.stack([state[name].float() for state in states]).mean(0) for name in states[0]}
        torch.save({"model_state_dict": mean}, folder / "mean.tmp")

    return _watched(work)


def _watched(work: Callable[[], None]) -> dict[str, Any]:
    """Seconds, and megabytes of peak memory above the level before; None where the system does not tell."""
    status, start = Path("/proc/self/status"), time.perf_counter()
    if not status.is_file():
        work()
        return {"megabytes": None, "seconds": time.perf_counter() - start}
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    level = _kilobytes(status, "VmRSS")
    work()
    seconds = time.perf_counter() - start
    return {"megabytes": (_kilobytes(status, "VmHWM") - level) * 1024 / 1e6, "seconds": seconds}


def _kilobytes(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(f"{name}:"))


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {"soup": soup, "all_at_once": all_at_once}


if __name__ == "__main__":
    sys.exit(main())
