"""The choice between full networks and the means of fold networks, on hand-made rows."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from utils.building import inference_choice
from utils.building.inference_choice import Measurement
from utils.combiners.protocol import MemberFacts
from utils.core.config import Config
from utils.predictions.rows import Rows

N, C = 120, 3
FACTS = MemberFacts(("a", "b"), np.array([0.5, 0.6]), np.full(2, np.nan), np.full(2, np.nan))


def rows(rng, signal, *, sureness=1.0):
    """80 out-of-fold rows as any networks of the same signal give them, then 40 val rows, `sureness` times as sure."""
    labels = np.arange(N) % C
    logits = np.random.default_rng(1).normal(size=(2, N, C))
    logits[:, 80:] = rng.normal(size=(2, 40, C))
    logits[:, np.arange(N), labels] += signal
    logits[:, 80:] *= sureness
    split = np.array(["train"] * 80 + ["val"] * 40)
    ids = np.array([f"{n:03d}" for n in range(N)])
    return Rows(("a", "b"), ("x", "y", "z"), split, ids, labels, logits.astype(np.float32), np.ones(N, dtype=bool))


def measured(full, folds):
    return inference_choice.measure(Config(), FACTS, np.arange(N) % 5, full, folds)


def test_what_fits_the_out_of_fold_rows_is_taken():
    fitting = rows(np.random.default_rng(2), 1.0)
    too_sure = rows(np.random.default_rng(2), 1.0, sureness=8.0)
    chosen = inference_choice.choose("auto", measured(too_sure, fitting), lacking=[], feeds_fuser=False)
    assert chosen["chosen"] == "folds"
    assert chosen["val_log_loss"]["full"] > chosen["val_log_loss"]["folds"]
    assert chosen["gain_of_folds"] > chosen["standard_error"]
    other = inference_choice.choose("auto", measured(fitting, too_sure), lacking=[], feeds_fuser=False)
    assert other["chosen"] == "full"
    assert other["gain_of_folds"] == pytest.approx(-chosen["gain_of_folds"])


def test_a_gain_below_its_standard_error_is_none():
    base = np.full(40, 0.5)
    differences = np.array([1.0, -1.0] * 20) + 0.05  # standard error 0.16
    small = Measurement(base + differences, base, {})
    assert inference_choice.choose("auto", small, lacking=[], feeds_fuser=False)["chosen"] == "full"
    large = Measurement(base + differences + 0.2, base, {})
    assert inference_choice.choose("auto", large, lacking=[], feeds_fuser=False)["chosen"] == "folds"


def test_a_gain_that_one_group_has_is_none():
    base = np.full(40, 0.5)
    gain = np.where(np.arange(40) < 20, 0.9, -0.1)  # all of it in one of four groups
    alone = Measurement(base + gain, base, {})
    assert inference_choice.choose("auto", alone, lacking=[], feeds_fuser=False)["chosen"] == "folds"
    grouped = Measurement(base + gain, base, {}, np.where(np.arange(40) < 20, 0, 1))
    assert grouped.gain[1] > 4 * alone.gain[1]
    assert inference_choice.choose("auto", grouped, lacking=[], feeds_fuser=False)["chosen"] == "full"
    assert Measurement(base + gain, base, {}, np.zeros(40)).gain is None


def test_what_stands_against_fold_networks_is_said():
    clear = Measurement(np.array([1.0, 1.1, 0.9]), np.array([0.1, 0.1, 0.1]), {})
    lacking = inference_choice.choose("auto", clear, lacking=["b"], feeds_fuser=False)
    assert (lacking["chosen"], lacking["reason"]) == ("full", "no complete set of fold networks: b")
    fused = inference_choice.choose("auto", clear, lacking=[], feeds_fuser=True)
    assert fused["chosen"] == "full"
    assert "runs.meta_fuser" in fused["reason"]
    assert inference_choice.choose("folds", clear, lacking=[], feeds_fuser=True)["chosen"] == "folds"
    assert inference_choice.choose("full", clear, lacking=[], feeds_fuser=False)["chosen"] == "full"


def test_val_labels_fit_nothing_that_is_measured_on_them():
    full = rows(np.random.default_rng(2), 2.0)
    before = measured(full, None).full
    shuffled = full.labels.copy()
    shuffled[80:] = np.roll(shuffled[80:], 1)
    after = inference_choice.measure(
        Config(), FACTS, np.arange(N) % 5, Rows(**(vars(full) | {"labels": shuffled})), None
    ).full
    untouched = np.flatnonzero(full.labels[80:] == shuffled[80:])
    np.testing.assert_array_equal(before[untouched], after[untouched])
    assert after.mean() > before.mean()


def test_without_out_of_fold_or_fold_rows_nothing_is_measured():
    full = rows(np.random.default_rng(2), 2.0)
    val = full.take(np.flatnonzero(full.split == "val"))
    found = inference_choice.measure(Config(), FACTS, np.zeros(40, dtype=int), val, None)
    assert (found.full, found.folds, found.gain) == (None, None, None)
    chosen = inference_choice.choose("auto", found, lacking=[], feeds_fuser=False)
    assert chosen["chosen"] == "full"
    json.dumps(chosen, allow_nan=False)


def test_the_shift_is_described_in_known_numbers():
    half = math.log(0.5)
    found = inference_choice.describe(np.array([[half, half, -50.0], [0.0, -50.0, -50.0]]), np.array([0, 1]))
    assert found == {
        "n": 2,
        "accuracy": 0.5,
        "mean_largest_probability": pytest.approx(0.75),
        "mean_entropy": pytest.approx(-half / 2),
    }
    full = rows(np.random.default_rng(2), 1.0)
    sure = rows(np.random.default_rng(2), 1.0, sureness=8.0)
    shift = measured(sure, full).shift["a"]
    assert shift["full"]["mean_largest_probability"] > shift["folds"]["mean_largest_probability"]
    assert shift["full"]["accuracy"] == shift["folds"]["accuracy"]
    assert shift["full"]["mean_entropy"] < shift["folds"]["mean_entropy"]
    record = inference_choice.choose("auto", measured(sure, full), lacking=[], feeds_fuser=False)
    lines = inference_choice.summary_lines(json.loads(json.dumps(record, allow_nan=False)))
    assert lines[0].startswith("inference members: folds (fold networks gain +")
    assert [line.split()[0] for line in lines[1:]] == ["a,", "b,"]


def test_of_many_members_those_with_the_largest_differences_are_listed():
    def described(probability):
        return {"n": 5, "accuracy": 0.5, "mean_largest_probability": probability, "mean_entropy": 1.0}

    shift = {
        f"m{number:02d}": {"out_of_fold": described(0.5), "full": described(0.5 + number / 100), "folds": None}
        for number in range(25)
    }
    record = {"chosen": "full", "reason": "asked for", "shift": shift}
    lines = inference_choice.summary_lines(record)
    assert [line.split(",")[0].strip() for line in lines[1:-1]] == [f"m{number:02d}" for number in range(5, 25)]
    assert lines[-1].strip() == "and 5 members with smaller differences, in ensemble.json"
    assert len(inference_choice.summary_lines(record | {"shift": dict(list(shift.items())[:20])})) == 21
