"""How large an import may be: time and memory of every command on 5,000 classes, and on 200 members.

    python benchmarks/sizes.py                     5,000 classes x 5 members, 200 members x 50,000 rows, and halves
    python benchmarks/sizes.py --quick             a tenth of the rows and members
    python benchmarks/sizes.py --only members      one of `classes` and `members`
    python benchmarks/sizes.py --no-growth         without the halves
    python benchmarks/sizes.py --limit 600         seconds that one command may take before it is killed

A growth is the logarithm to base 2 of the processor time of the whole over that of half the classes, members or rows:
1 is linear, 2 quadratic. Memory is the highest resident size. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from large_inputs import Cost, cost_of, write_predictions  # noqa: E402
from reporting import report, row  # noqa: E402

LIMIT = 1800.0  # seconds
SMALL = 5.0  # seconds of processor time below which a growth says nothing: the start of Python is most of them


class Size(NamedTuple):
    """How much is imported."""

    members: int
    classes: int
    rows: int
    """Out-of-sample rows, half of them out of fold and half of val; test has as many"""

    @property
    def text(self) -> str:
        return f"{self.members} members x {self.rows:,} rows x {self.classes:,} classes"


OFF = ("--set", "runs.model_soup.enable=false", "--device", "cpu", "--quiet", "--set", "dataset.num_workers=0")


def build(*methods: str) -> tuple[str, ...]:
    """Build these combiners and nothing else."""
    chosen = ("--set", "runs.score_ensemble.enable=true", "--set", f"runs.score_ensemble.methods=[{','.join(methods)}]")
    return ("build-ensemble", *chosen, "--set", "pruning.enable=false", *OFF)


def prune(*methods: str) -> tuple[str, ...]:
    """Choose members in these ways."""
    only = ("--set", "runs.score_ensemble.enable=false", "--set", "pruning.enable=true")
    return ("build-ensemble", *only, "--set", f"pruning.methods=[{','.join(methods)}]", *OFF)


def stack(learner: str) -> tuple[str, ...]:
    """Fit one stacker."""
    return ("stack", "--set", f"runs.stacking.meta_learners=[{learner}]", *OFF)


COMMANDS: Mapping[str, tuple[str, ...]] = {
    "votes": build("soft_voting", "hard_voting", "logit_averaging"),
    "weighted": build("weighted"),
    "weighted, log-loss": (*build("weighted"), "--set", "runs.score_ensemble.optimization_metric=log_loss"),
    "greedy_selection": build("greedy_selection"),
    "calibrated votes": build("soft_voting_calibrated"),
    "pruning: forward": prune("greedy_forward"),
    "pruning: backward": prune("greedy_backward"),
    "pruning: diversity, clustering": prune("diversity_max", "clustering"),
    "stacking_lr": stack("lr"),
    "stacking_xgb": stack("xgb"),
    "stacking_rf": stack("rf"),
    "stacking_mlp": stack("mlp"),
    "meta-fuse": (
        *("meta-fuse", "--set", "runs.meta_fuser.input_ensembles=[soft_voting,logit_averaging]"),
        *("--set", "runs.meta_fuser.fuser_type=convex", *OFF),
    ),
    "evaluate": ("evaluate", "--quiet"),
    "status": ("status", "--quiet"),
    "export": ("export", "--model-name", "soft_voting_ensemble", "--formats", "onnx", "--quiet"),
    "clean": ("clean", "--quiet"),
}
"""{what: command}, each on what the ones before have left."""
EXPECTED = (0, 3, 4)  # done, refused by name of a limit, done in part


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; returns 0, also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="sizes.py", description="Time and memory of every command on large imports.")
    parser.add_argument("--quick", action="store_true", help="a tenth of members, classes and rows")
    parser.add_argument("--only", choices=("classes", "members"), help="one of the two sizes")
    parser.add_argument("--no-growth", action="store_true", help="measure no halves")
    parser.add_argument("--commands", nargs="+", choices=tuple(COMMANDS), help="some of the commands")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds a command may take (default {LIMIT:g})")
    options = parser.parse_args(argv)
    part = 10 if options.quick else 1
    whole = {"classes": Size(5, 5000 // part, 5000 // part), "members": Size(200 // part, 10, 50_000 // part)}
    halves = {
        "classes": {"classes": whole["classes"]._replace(classes=2500 // part)},
        "members": {
            "members": whole["members"]._replace(members=100 // part),
            "rows": whole["members"]._replace(rows=25_000 // part),
        },
    }
    commands = {name: COMMANDS[name] for name in options.commands or COMMANDS}
    found = []
    for kind in [options.only] if options.only else whole:
        costs = measured(whole[kind], commands, options.limit)
        smaller = {}
        if not options.no_growth:
            smaller = {of: measured(size, commands, options.limit) for of, size in halves[kind].items()}
        found += [size_row(whole[kind], what, cost, smaller) for what, cost in costs.items()]
    report("sizes", found, quick=options.quick, packages=("numpy", "scikit-learn", "torch", "xgboost-cpu"))
    return 0


def measured(size: Size, commands: Mapping[str, tuple[str, ...]], limit: float) -> dict[str, Cost]:
    """{what: cost} of an import of this size and of each command after it."""
    with tempfile.TemporaryDirectory(prefix="sizes-") as name:
        folder = Path(name)
        half = size.rows // 2
        given = write_predictions(
            folder / "given", size.members, size.classes, {"oof": half, "val": half, "test": size.rows}
        )
        workspace = folder / "w"
        workspace.mkdir()
        costs = {
            "import-predictions": cost_of(workspace, "import-predictions", "--from", str(given), "--quiet", limit=limit)
        }
        shutil.rmtree(given)
        for what, line in commands.items():
            costs[what] = cost_of(workspace, *line, limit=limit)
            print(f"{size.text}: {what}: {described(costs[what])}", file=sys.stderr, flush=True)
    return costs


def described(cost: Cost) -> str:
    """In words."""
    end = "" if cost.code in EXPECTED else f", ended with {cost.code}: {cost.output[-300:].strip()}"
    return f"{cost.seconds:.0f} s, {cost.cpu_seconds:.0f} s of CPU, {cost.megabytes:.0f} MB{end}"


def size_row(size: Size, what: str, cost: Cost, smaller: Mapping[str, Mapping[str, Cost]]) -> dict:
    """The row of one command: its time, memory, and growths."""
    growths = {of: growth(cost, costs[what]) for of, costs in smaller.items()}
    growths_text = ", ".join(f"growth in {of} {number:.2f}" for of, number in growths.items() if number is not None)
    beside = f"{cost.cpu_seconds:.0f} s of CPU, {cost.megabytes:.0f} MB{', ' + growths_text if growths_text else ''}"
    return row(f"{size.text}: {what}", cost.seconds, "s", "ends", cost.code in EXPECTED, beside)


def growth(whole: Cost, half: Cost) -> float | None:
    """Exponent of the processor time in what was halved; None where the half is hardly any time."""
    if half.cpu_seconds < SMALL or not {whole.code, half.code} <= set(EXPECTED):
        return None
    return math.log2(whole.cpu_seconds / half.cpu_seconds)


if __name__ == "__main__":
    sys.exit(main())
