"""Students beside the same networks trained alone and beside their teacher, on disjoint stratified test folds.

    python benchmarks/distillation.py                    scikit-learn's digits, 5% train, 10% val
    python benchmarks/distillation.py --data DIR         photographs DIR/<class>/<file> at 128 px, pretrained networks
    python benchmarks/distillation.py --fold-of-design   the fold that fixes the design; it is never reported
    python benchmarks/distillation.py --quick            one fold, two members, two epochs; not the one to report

The images are divided into six disjoint stratified folds. The first one has fixed rates, lengths and the fraction that
is trained on (`distillation_runs.DIGITS`, `PHOTOGRAPHS`); the other five are test folds. Per fold a soft-voting teacher
is trained on images of the other folds, then each student by function matching with mixup and CutMix, and the same
network alone with the same weights, images, augmentation, mixing and schedule. Each is calibrated on val. Scores are
means over the seeds, intervals are over the test images of all folds, Fieller's for fractions of gains.

Finished trainings are kept in `benchmarks/zoo/distillation`, all folds of a seed before the next seed, so that a run
goes on where it stopped; `--minutes` stops before the training after that time and reports what is there. One thread.
`--curves FILE.png` draws learning curves (needs matplotlib). The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from distillation_runs import (
    ALONE,
    CONSISTENT,
    DIGITS,
    N_FOLDS,
    PHOTOGRAPHS,
    PROJECT,
    TEACHER,
    VIEWS,
    Design,
    Fold,
    pending,
    read_images,
    set_up,
)

from distillation_rows import Trained, draw, score_rows
from reporting import report, row

KEPT = PROJECT / "benchmarks" / "zoo" / "distillation"
ARMS = (ALONE, CONSISTENT, VIEWS)
CACHE = (5000, 4, 10)  # images, views, classes whose targets are to stay below two megabytes


def main(argv: Sequence[str] | None = None) -> int:
    """Run all rows; returns 0, also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="distillation.py", description="Students beside their controls.")
    parser.add_argument("--data", metavar="DIR", type=Path, help="photographs, DIR/<class>/<file> (default: digits)")
    parser.add_argument("--folds", metavar="N", type=int, default=N_FOLDS - 1, help="test folds (default: all five)")
    parser.add_argument("--seeds", metavar="N", type=int, default=3, help="trainings of each arm (default: 3)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS[:2]), help="(default: alone consistent)")
    parser.add_argument("--students", nargs="+", metavar="ARCH", help="some of the design's students")
    parser.add_argument(
        "--minutes", metavar="M", type=float, default=120, help="start no training later (default: 120)"
    )
    parser.add_argument("--fold-of-design", action="store_true", help="the fold that fixes the design")
    parser.add_argument("--curves", metavar="FILE", type=Path, help="draw the learning curves into this PNG")
    parser.add_argument("--quick", action="store_true", help="one fold, two members, two epochs")
    options = parser.parse_args(argv)
    if ALONE not in options.arms:
        parser.error("--arms: the network alone is what students are compared with; add alone")
    set_up()
    data = options.data.expanduser().resolve() if options.data else digits()
    design = DIGITS if options.data is None else PHOTOGRAPHS
    if options.students:
        design = replace(design, students=tuple(options.students))
    if options.quick:
        design = shortened(design)
    first = 0 if options.fold_of_design else 1
    count = 1 if options.fold_of_design or options.quick else options.folds
    images, folder = read_images(data), KEPT / f"{data.name}-{digest(design)}"
    folds = [Fold(images, number, design, folder) for number in range(first, first + count)]
    with ExitStack() as stack:
        on_one_thread(stack)
        seeds = 1 if options.quick else options.seeds
        run(folds, options.arms, seeds, minutes=options.minutes)
        rows = []
        for student in design.students:
            trained = [each for fold in folds if (each := collected(fold, student, options.arms, seeds)) is not None]
            if not trained:
                continue
            rows += score_rows(student, trained)
            if options.curves:
                file = options.curves.with_stem(f"{options.curves.stem}_{student}")
                draw(trained, file, f"{student}, {data.name}, {len(trained)} folds")
    rows.append(cache_row())
    report(
        "distillation",
        rows,
        quick=options.quick,
        packages=("numpy", "torch", "timm"),
        data=data.name,
        design=asdict(design),
        fold_of_design=options.fold_of_design,
    )
    return 0


def digits() -> Path:
    """The folder of the digits, written once."""
    from utils.operations.demo import write_digits

    folder = KEPT / "digits"
    KEPT.mkdir(parents=True, exist_ok=True)
    write_digits(folder)
    return folder


def shortened(design: Design) -> Design:
    """Two members and two epochs."""
    return replace(design, members=design.members[:2], member_epochs=2, epochs=dict.fromkeys(design.students, 2))


def digest(design: Design) -> str:
    """First digits of the SHA-256 of a design; trainings of another one are kept apart."""
    facts = {name: value for name, value in asdict(design).items() if name != "students"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]


def on_one_thread(stack: ExitStack) -> None:
    """Limit all libraries to one thread."""
    import torch
    from threadpoolctl import threadpool_limits

    stack.enter_context(threadpool_limits(limits=1))
    torch.set_num_threads(1)


def run(folds: Sequence[Fold], arms: Sequence[str], seeds: int, *, minutes: float) -> None:
    """Train what is not kept yet, until the time is up."""
    start = time.monotonic()
    for fold, student, arm, seed in pending(folds, arms, seeds):
        if fold.is_kept(student, arm, seed):
            continue
        if time.monotonic() - start > 60 * minutes:
            print(f"stopped after {minutes:g} minutes; the same command goes on", file=sys.stderr)
            return
        seconds = float(fold.outcome(student, arm, seed)["seconds"])
        print(f"fold {fold.fold}, seed {seed}, {student}, {arm}: {seconds:.0f} CPU s", file=sys.stderr, flush=True)


def collected(fold: Fold, student: str, arms: Sequence[str], seeds: int) -> Trained | None:
    """The seeds of a fold for which every arm is trained; None where there is none."""
    complete = [seed for seed in range(seeds) if all(fold.is_kept(student, arm, seed) for arm in arms)]
    if not complete:
        return None
    outcomes = {arm: [fold.outcome(student, arm, seed) for seed in complete] for arm in arms}
    splits = ("val", "test")
    probabilities = {
        arm: {split: np.stack([each[split] for each in of_arm]) for split in splits} for arm, of_arm in outcomes.items()
    }
    probabilities[TEACHER] = {split: fold.teacher_probabilities(split)[None] for split in splits}
    curves = {
        arm: [{key: each[key] for key in ("val_accuracy", "val_log_loss")} for each in of_arm]
        for arm, of_arm in outcomes.items()
    }
    seconds = {arm: [float(each["seconds"]) for each in of_arm] for arm, of_arm in outcomes.items()}
    return Trained({split: fold.labels(split) for split in splits}, probabilities, seconds, curves)


def cache_row() -> dict:
    """Megabytes of the stored targets of many images in some views."""
    from utils.distillation import soft_targets

    images, views, classes = CACHE
    rng = np.random.default_rng(0)
    targets = soft_targets.log_probabilities(rng.dirichlet(np.full(classes, 0.1), size=(views, images)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "targets.npz"
        soft_targets.save(path, "key", soft_targets.pack(targets))
        size = path.stat().st_size / 1e6
    what = f"stored targets, {images} images x {views} views x {classes} classes"
    return row(what, size, "MB", "< 2", size < 2, None)


if __name__ == "__main__":
    sys.exit(main())
