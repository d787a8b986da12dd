"""The stacking benchmark's pure parts: what is compared, how it is told, and what its zoos are called."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import PROJECT, run_python

import leak
import prepare
import stacking
import stacking_costs
from utils.ensemble_methods import COMBINERS
from utils.numeric.metrics import log_loss, softmax


@pytest.fixture
def arrays():
    """A split as it is kept: three members of three classes, the second the best."""
    rng = np.random.default_rng(0)
    labels, truth = rng.integers(0, 3, 90), rng.integers(0, 3, 40)

    def outputs(answers):
        noise = rng.normal(size=(3, len(answers), 3))
        return (noise + np.array([1, 3, 2])[:, None, None] * np.eye(3)[answers]).astype(np.float32)

    ids = np.array([f"{number:03d}" for number in range(90)])
    return {
        "members": np.array(["a", "b", "c"]),
        "logits": outputs(labels),
        "labels": labels,
        "sample_ids": ids,
        "split": np.array(["train"] * 60 + ["val"] * 30),
        "fold": np.arange(90) % 5,
        "test_logits": outputs(truth),
        "test_labels": truth,
        "train_logits": outputs(labels[:60]),
        "train_ids": ids[:60],
    }


@pytest.fixture
def few(monkeypatch):
    """Only what is quick to fit, and no peers."""

    def recipes(config, facts):
        kinds = {name: COMBINERS[name].configured(config, facts) for name in ("soft_voting", "logit_averaging")}
        return kinds, {"log-linear pool": COMBINERS["logit_averaging"].configured(config, facts)}

    monkeypatch.setattr(stacking, "_recipes", recipes)
    monkeypatch.setattr(stacking, "PEER", PROJECT / "none")


def test_every_way_is_scored_on_the_test_rows_alone(few, arrays):
    found = stacking.outcome(arrays)
    test, truth = softmax(arrays["test_logits"]), arrays["test_labels"]
    assert found.losses["best single"] == log_loss(test[1], truth)
    assert found.losses["plain mean"] == log_loss(test.mean(axis=0), truth)
    assert found.recommended in ("b", "soft_voting", "logit_averaging", "meta_fuser, convex")
    name = {"b": "best single", "soft_voting": "plain mean"}.get(found.recommended, found.recommended)
    assert found.losses["recommended"] == found.losses[name]
    offered = [found.losses[each] for each in ("best single", "plain mean", "logit_averaging")]
    assert found.losses["recommended without the fuser"] in offered
    assert found.losses[stacking.LOGISTIC] < np.log(3)
    assert [found.losses[peer] for peer in stacking.PEERS] == [None, None]
    other = stacking.outcome(arrays | {"test_labels": (truth + 1) % 3})
    assert other.recommended == found.recommended
    assert other.losses["recommended"] > found.losses["recommended"]


def test_rows_tell_mean_interval_and_where_the_recommended_one_loses():
    losses = [
        {"recommended": 0.2, "best single": 0.3, "plain mean": 0.1, "CMA-ES weights": None},
        {"recommended": 0.4, "best single": 0.5, "plain mean": 0.4, "CMA-ES weights": None},
    ]
    rows = stacking.loss_rows([stacking.Outcome(entry, "weighted") for entry in losses])
    assert [entry["holds"] for entry in rows] == [None, True, False, None]
    assert [entry["figure"] for entry in rows] == [0.3, 0.4, 0.25, None]
    assert rows[2]["peer"].startswith("the recommended one gains -0.0500 [")
    assert rows[3]["peer"] is None
    alone = stacking.loss_rows([stacking.Outcome(losses[0], "weighted")])
    assert alone[0]["what"].startswith("test log-loss, 1 split: ")
    assert "[" not in alone[0]["unit"]


def test_the_bare_estimators_are_fitted_on_the_rows_of_the_nested_search():
    folds = np.array([0, 1, 2, 3, 0])
    fits = [tuple(np.flatnonzero(rows)) for rows in stacking_costs._rows_of_fits(folds)]
    assert len(fits) == len(set(fits)) == 4 * 5 // 2 + 1
    assert fits[-1] == (0, 1, 2, 3, 4)
    assert (2, 3) in fits
    assert (1, 2, 3) in fits


def test_trees_are_compared_by_layout(monkeypatch):
    monkeypatch.setattr(stacking_costs, "MANY", 200)
    rows = stacking_costs.tree_rows(rounds=2, turns=1)
    assert len(rows) == 2 * 2 * 3
    exact = [entry for entry in rows if entry["what"].endswith("exactness")]
    assert all(entry["holds"] for entry in exact)
    assert all(entry["figure"] > 0 for entry in rows if not entry["what"].endswith("exactness"))


def test_the_leak_compares_in_sample_with_out_of_fold(arrays):
    rows = leak.leak_rows(
        [
            {
                kind: {
                    "expected log-loss": expected,
                    "test log-loss": 0.4,
                    "expected accuracy": 1.0,
                    "test accuracy": 0.5,
                }
                for kind, expected in zip(leak.KINDS, (0.1, 0.4), strict=True)
            }
        ]
    )
    assert [entry["figure"] for entry in rows] == [0.4, 0.1, 0.5, 1.0, 0.4, 0.4, 0.5, 1.0]
    assert rows[1]["unit"].endswith("the test gave 0.4000, 4.0 times that")
    with pytest.raises(SystemExit, match="prepare it anew"):
        leak.measure(arrays | {"train_ids": arrays["train_ids"][::-1]})


def test_zoos_of_other_images_lie_elsewhere(tmp_path):
    places = {
        prepare.folder_of(None, quick=False),
        prepare.folder_of(None, quick=True),
        prepare.folder_of(tmp_path / "a" / "leaves", quick=False),
        prepare.folder_of(tmp_path / "b" / "leaves", quick=False),
    }
    assert len(places) == 4
    assert all(place.parent == prepare.ZOO for place in places)


def test_the_digest_is_of_what_the_splits_hold(tmp_path):
    files = tuple(tmp_path / f"split{number}.npz" for number in range(2))
    for number, path in enumerate(files):
        path.write_bytes(bytes([number]))
    found = prepare.Prepared(tmp_path, files)
    first = found.digest
    assert found.facts().keys() == {"splits", "digest", "age_hours"}
    files[1].write_bytes(b"other")
    assert found.digest != first


@pytest.mark.parametrize("name", ["prepare", "stacking", "leak"])
def test_a_folder_that_is_not_there_is_named(name, tmp_path):
    done = run_python(str(PROJECT / "benchmarks" / f"{name}.py"), "--data", str(tmp_path / "none"))
    assert done.returncode == 1
    assert "no such folder; expected one folder of images per class in it" in done.stderr
