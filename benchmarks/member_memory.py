"""Peak memory against the number of members: networks streamed one at a time, combiners on predictions in arrays.

    python benchmarks/member_memory.py            5 and 30 tiny networks; 5 and 50 imported members of 20,000 rows
    python benchmarks/member_memory.py --quick    fewer of each, not the form to report

Streaming must not grow with the members; what a combiner is fitted on does, by a constant that is reported. Each figure
is the highest resident size of a command in a process of its own. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from large_inputs import cost_of, write_predictions  # noqa: E402
from reporting import report, row  # noqa: E402
from utils.operations import debug_sandbox  # noqa: E402

CLASSES = 10
IMAGES = 150  # of each class and split
STREAMING_GOAL = 1.10
VOTE = ("build-ensemble", "--set", "runs.score_ensemble.methods=[soft_voting]")
COMBINERS = {
    "weighted": ("build-ensemble", "--set", "runs.score_ensemble.methods=[weighted]"),
    "stacking_lr": ("stack", "--set", "runs.stacking.meta_learners=[lr]"),
}
OFF = (
    *("--set", "runs.model_soup.enable=false", "--set", "pruning.enable=false", "--device", "cpu", "--quiet"),
    *("--set", "dataset.num_workers=0"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; returns 0, also where the goal is missed."""
    parser = argparse.ArgumentParser(prog="member_memory.py", description="Peak memory against the number of members.")
    parser.add_argument("--quick", action="store_true", help="fewer members and rows")
    options = parser.parse_args(argv)
    few, many, rows_each = (3, 6, 2000) if options.quick else (5, 30, 20000)
    imported = 10 if options.quick else 50
    with tempfile.TemporaryDirectory(prefix="member-memory-") as name:
        folder = Path(name)
        found = [streaming(folder, few, many)]
        for combiner, line in COMBINERS.items():
            found += combining(folder, combiner, line, imported, rows_each)
    report("member_memory", found, quick=options.quick, packages=("torch", "numpy"))
    return 0


def streaming(folder: Path, few: int, many: int) -> dict:
    """The row about networks: copies of three trained ones under names of their own, which are as many members."""
    zoo = folder / "zoo"
    debug_sandbox.prepare_sandbox(debug_sandbox.Sandbox(zoo, True, (), debug_sandbox.BACKBONES))
    shutil.rmtree(zoo / "split_dataset")
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        _images(zoo / "split_dataset" / split, rng)
    peaks = {}
    for count in (few, many):
        place = Path(shutil.copytree(zoo, folder / f"zoo{count}"))
        sources = sorted((zoo / "checkpoints").glob("*_final.pth"))
        shutil.rmtree(place / "checkpoints")
        shutil.rmtree(place / "kfold_results")
        (place / "checkpoints").mkdir()
        for number in range(count):
            shutil.copy(sources[number % len(sources)], place / "checkpoints" / f"Copy{number:02d}_final.pth")
        _run(place, "discover", *OFF)
        names = ",".join(f"Copy{number:02d}" for number in range(count))
        peaks[count] = _run(place, *VOTE, "--set", f"backbones.include=[{names}]", *OFF)
    ratio = peaks[many] / peaks[few]
    what = f"streaming {many} networks / {few}, peak memory"
    beside = f"{peaks[many]:.0f} MB and {peaks[few]:.0f} MB"
    return row(what, ratio, "times", f"at most {STREAMING_GOAL}", ratio <= STREAMING_GOAL, beside)


def combining(folder: Path, combiner: str, line: Sequence[str], most: int, rows_each: int) -> list[dict]:
    """Rows about one combiner: memory per member beyond the first five, in copies of one member's arrays."""
    peaks = {}
    for count in (5, most):
        given, place = folder / f"given{count}", folder / f"{combiner}{count}"
        write_predictions(given, count, CLASSES, {"oof": rows_each // 2, "val": rows_each // 2})
        place.mkdir()
        _run(place, "import-predictions", "--from", str(given), "--quiet")
        peaks[count] = _run(place, *line, *OFF)
    array = rows_each * CLASSES * 8 / 1e6  # of one member in double precision
    constant = (peaks[most] - peaks[5]) / (most - 5) / array
    what = f"{combiner} on {most} members x {rows_each} rows x {CLASSES} classes"
    beside = f"{peaks[5]:.0f} MB with 5, {peaks[most]:.0f} MB with {most}"
    return [row(what, constant, "double arrays (N, C) per member", "linear in M", None, beside)]


def _images(folder: Path, rng: np.random.Generator) -> None:
    from PIL import Image

    for shift, name in zip((128, 0), debug_sandbox.CLASSES, strict=True):
        (folder / name).mkdir(parents=True)
        for number in range(IMAGES):
            pixels = rng.integers(0, 128, (debug_sandbox.IMAGE_SIZE, debug_sandbox.IMAGE_SIZE, 3)) + shift
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number:03d}.png")


def _run(workspace: Path, *line: str) -> float:
    """Run one command; its highest resident size in MB (10^6 bytes)."""
    cost = cost_of(workspace, *line)
    if cost.code not in (0, 4):
        raise RuntimeError(f"{' '.join(line)} ended with {cost.code}: {cost.output}")
    return cost.megabytes


if __name__ == "__main__":
    sys.exit(main())
