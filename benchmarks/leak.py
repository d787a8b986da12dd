"""The size of the leak: gradient-boosted trees stacked on in-sample predictions beside out-of-fold ones.

    python benchmarks/leak.py              handwritten digits; without a prepared split one is made first
    python benchmarks/leak.py --data DIR   your own images, one folder per class

Both boosters see outputs of the same architectures on the same train images with the same settings. One is given what
the full networks say of images that they were trained on, the other what networks say that did not see them. Each is
asked what it expects (by nested cross-validation over the same folds), and then answers the test images through the
full networks. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import prepare
from reporting import report, row

PROJECT = Path(__file__).resolve().parents[1]
KINDS = ("in-sample", "out-of-fold")


def main(argv: Sequence[str] | None = None) -> int:
    """Print what both boosters expect of themselves and what they reach; returns 0."""
    parser = argparse.ArgumentParser(
        prog="leak.py", description="Stacking on in-sample predictions, and what it costs."
    )
    parser.add_argument("--data", metavar="DIR", type=Path, help="the images whose prepared splits are read")
    parser.add_argument("--quick", action="store_true", help="a zoo of two poor networks, not the one to report")
    options = parser.parse_args(argv)
    splits = prepare.ready(options.data, quick=options.quick)
    if splits is None:
        return 1
    print(f"{splits.folder}: {len(splits.files)} splits, {splits.age_hours:.1f} hours old, digest {splits.digest}")
    sys.path.insert(0, str(PROJECT))
    rows = leak_rows([measure(prepare.read(path)) for path in splits.files])
    report("leak", rows, quick=options.quick, packages=("numpy", "xgboost-cpu"), **splits.facts())
    return 0


def measure(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """{kind: {expected and test log-loss and accuracy}} of one split, fitted on its train images."""
    from dataclasses import replace

    from utils.combiners.protocol import MemberFacts, fit_crossfitted
    from utils.core.config_file import load_config
    from utils.numeric.metrics import accuracy, log_loss
    from utils.stacking_methods import COMBINERS

    own = arrays["split"] == "train"
    if not np.array_equal(arrays["sample_ids"][own], arrays["train_ids"]):
        raise SystemExit("the out-of-fold rows are not those of the train images; remove the split and prepare it anew")
    labels, folds = arrays["labels"][own], arrays["fold"][own]
    unknown = np.full(len(arrays["members"]), np.nan)
    facts = MemberFacts(tuple(arrays["members"].tolist()), unknown, unknown, unknown)
    recipe = replace(COMBINERS["stacking_xgb"].configured(load_config(prepare.CONFIG), facts), fallback=False)
    found = {}
    for kind, logits in zip(KINDS, (arrays["train_logits"], arrays["logits"][:, own]), strict=True):
        expected = fit_crossfitted(recipe, logits, labels, folds)
        answers = recipe.predict_proba(arrays["test_logits"])
        found[kind] = {
            "expected log-loss": log_loss(expected, labels),
            "test log-loss": log_loss(answers, arrays["test_labels"]),
            "expected accuracy": accuracy(expected, labels),
            "test accuracy": accuracy(answers, arrays["test_labels"]),
        }
    return found


def leak_rows(found: Sequence[Mapping[str, Mapping[str, float]]]) -> list[dict[str, Any]]:
    """Means over the splits: what each booster expects beside what it reaches."""
    rows = []
    for kind in KINDS:
        for score, unit in (("log-loss", "nats"), ("accuracy", "of all")):
            estimated, measured = (
                float(np.mean([entry[kind][f"{when} {score}"] for entry in found])) for when in ("expected", "test")
            )
            rows.append(
                row(f"on {kind} predictions: test {score}", measured, f"{unit} ({measured:.4f})", None, None, None)
            )
            times = f", {measured / estimated:.1f} times that" if score == "log-loss" else ""
            what = f"on {kind} predictions: its own estimate of it"
            rows.append(
                row(what, estimated, f"{unit} ({estimated:.4f}); the test gave {measured:.4f}{times}", None, None, None)
            )
    return rows


if __name__ == "__main__":
    sys.exit(main())
