"""`stack` beside AutoGluon's stack of the same base predictions: 15 members, 3,000 out-of-sample rows, 13 classes.

    python -m venv .venv-bench && .venv-bench/bin/pip install -r benchmarks/requirements.txt     once: the peer

    python benchmarks/autogluon_stack.py                 about three minutes
    python benchmarks/autogluon_stack.py --quick         5 members, 600 rows, 3 classes: not the form to report

Both sides read the same simulated predictions and fit the same four learners with five folds: logistic regression,
boosted trees, random forest and perceptron. The base predictions are the first of the two layers. AutoGluon's second
layer is its `LR`, `XGB`, `RF` and `NN_TORCH` with their default settings, bagged in five folds (the random forest by
its out-of-bag rows), and its weighted ensemble of these. Seconds are those of whole programs. The recommended ensemble
and AutoGluon's best model are scored on test rows that neither has seen. Where `.venv-bench` is missing, the peer's
figures are null. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pipeline

import scale
from reporting import report, row
from scale import Cost, Size

PEER = scale.PROJECT / ".venv-bench" / "bin" / "python"
COMMANDS = ("import-predictions", "stack", "evaluate")
LEARNERS = {
    "stacking_lr": "LinearModel",
    "stacking_xgb": "XGBoost",
    "stacking_rf": "RandomForest",
    "stacking_mlp": "NeuralNetTorch",
}
"""Names of the same learner here and there."""
FULL = Size(15, 3000, 13, 50, 100)
QUICK = Size(5, 600, 3, 5, 10)
TEST_ROWS = 10_000
OVERRIDES = ("runs.stacking.meta_learners=[lr, xgb, rf, mlp]",)
RATIO = 0.5
LABEL = "label"


def main(argv: Sequence[str] | None = None) -> int:
    """Run both sides; returns 0, also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="autogluon_stack.py", description="`stack` beside AutoGluon's stack.")
    parser.add_argument("--quick", action="store_true", help="few members and rows, short trainings; not to report")
    parser.add_argument("--seed", type=int, default=0, help="of the simulated predictions (default: %(default)s)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.part:
        PARTS[options.part](options.folder)
        return 0
    if not PEER.is_file():
        print(f"{PEER}: not there, so that nothing is compared; the first line of --help makes it", file=sys.stderr)
    size = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory(prefix="autogluon-stack-") as name:
        folder = Path(name)
        scale.write_predictions(folder / "predictions", size, options.seed, test_rows=TEST_ROWS)
        (folder / "workspace").mkdir()
        costs = {command: scale.run_command(command, folder, size, overrides=OVERRIDES) for command in COMMANDS}
        recommended, losses = pipeline.recommended(folder / "workspace")
        peer_cost, peer = run_peer(folder)
    report(
        "autogluon_stack",
        rows(size, costs["stack"], recommended, losses, peer_cost, peer),
        quick=options.quick,
        packages=("numpy", "scikit-learn", "xgboost-cpu", "torch"),
        seed=options.seed,
        losses=losses,
        recommended=recommended,
        peer=peer,
    )
    return 0


def rows(
    size: Size,
    cost: Cost,
    recommended: str,
    losses: Mapping[str, float],
    peer_cost: Cost | None,
    peer: Mapping[str, Any] | None,
) -> list[dict[str, Any]]:
    """Ratio of the times, log-loss of the recommended beside the peer's best, and of each learner."""
    what = f"{size.members} members, {size.rows:,} rows, {size.classes} classes"
    ratio = cost.seconds / peer_cost.seconds if peer_cost else None
    unit = f"times AutoGluon's stack ({_told(cost)})"
    beside = _told(peer_cost) if peer_cost else None
    loss, other = losses[recommended], peer["losses"][peer["best"]] if peer else None
    table = [
        row(f"{what}: stack", ratio, unit, f"at most {RATIO}", None if ratio is None else ratio <= RATIO, beside),
        row(
            f"{what}: test log-loss of {recommended}",
            loss,
            "nats",
            "no higher",
            None if other is None else loss <= other,
            f"{peer['best']}: {other:.4f}" if peer else None,
        ),
    ]
    for name, there in LEARNERS.items():
        found = _of_learner(peer["losses"], there) if peer else None
        other = None if found is None else f"{found:.4f}"
        table.append(row(f"{what}: test log-loss of {name}", losses[name], "nats", None, None, other))
    return table


def _told(cost: Cost) -> str:
    return f"{cost.seconds:.1f} s; {cost.cpu:.1f} s of processors"


def _of_learner(losses: Mapping[str, float], name: str) -> float | None:
    """Log-loss of the model of this learner, whose name AutoGluon completes; None where it was not fitted."""
    return next((loss for model, loss in losses.items() if model.startswith(f"{name}_")), None)


def run_peer(folder: Path) -> tuple[Cost | None, dict[str, Any] | None]:
    """Time in which the peer fits, and what it found; None where it is not installed."""
    if not PEER.is_file():
        return None, None
    call = [str(PEER), __file__, "--folder", str(folder), "--part"]
    cost = scale.timed([*call, "fit"])
    scale.timed([*call, "judge"])
    return cost, json.loads((folder / "peer.json").read_text(encoding="utf-8"))


# parts, in the peer's environment ------------------------------------------------------------------------------------
def fit(folder: Path) -> None:
    """Fit AutoGluon's stack on the predictions below `folder` and save its models."""
    from autogluon.tabular import TabularPredictor

    predictor = TabularPredictor(
        LABEL, problem_type="multiclass", eval_metric="log_loss", path=str(folder / "autogluon")
    )
    predictor.fit(
        _frame(folder, scale.OUT_OF_SAMPLE),
        hyperparameters={"LR": {}, "XGB": {}, "RF": {}, "NN_TORCH": {}},
        num_bag_folds=scale.FOLDS,
        num_bag_sets=1,
        num_stack_levels=0,
        dynamic_stacking=False,  # otherwise everything is fitted twice, to select the number of levels
        # With Ray, folds side by side: 119 s in all instead of 91 on two cores.
        ag_args_ensemble={"fold_fitting_strategy": "sequential_local"},
        num_gpus=0,
    )


def judge(folder: Path) -> None:
    """Write `peer.json`: the name of the best model, {model: log-loss on test} and the version."""
    from importlib.metadata import version

    from autogluon.tabular import TabularPredictor

    predictor = TabularPredictor.load(str(folder / "autogluon"))
    scores = predictor.leaderboard(_frame(folder, ["test"])).set_index("model")["score_test"]
    found = {
        "best": predictor.model_best,
        "losses": {name: -float(score) for name, score in scores.items()},
        "version": version("autogluon.tabular"),
    }
    (folder / "peer.json").write_text(json.dumps(found), encoding="utf-8")


def _frame(folder: Path, stems: Sequence[str]) -> Any:
    """A `pandas.DataFrame` of the log-probabilities and the label of each row."""
    import pandas

    table, labels = scale.peer_rows(folder / "predictions", stems)
    return pandas.DataFrame(table, columns=[f"feature{n:03d}" for n in range(table.shape[1])]).assign(**{LABEL: labels})


PARTS = {"fit": fit, "judge": judge}


if __name__ == "__main__":
    sys.exit(main())
