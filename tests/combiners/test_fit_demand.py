"""Which learners are refused before they take the memory or days: by the numbers of classes, members and rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import PROJECT

from utils.building import stacking_builder
from utils.building.fitting import OutOfSampleRows
from utils.combiners.fit_demand import EstimatesDemand, FitDemand
from utils.combiners.logistic import LogisticLearner
from utils.combiners.stacking_features import KINDS
from utils.core.config_file import load_config
from utils.numeric import nested_cv
from utils.stacking_methods import COMBINERS

CONFIG = load_config(PROJECT / "configs" / "ensemble_config.yaml")
FITS = 16  # of a nested search over five folds


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    monkeypatch.setattr("utils.combiners.fit_demand.physical_memory", lambda: 24_000_000_000)


def refused(members, rows, classes, cores=2):
    learners = {name: kind.make_learner(CONFIG) for name, kind in COMBINERS.items()}
    assert all(isinstance(learner, EstimatesDemand) for learner in learners.values())
    reasons = {name: each.demand(members, rows, classes).refusal(FITS, cores) for name, each in learners.items()}
    return {name.removeprefix("stacking_"): reason for name, reason in reasons.items() if reason is not None}


@pytest.mark.parametrize("size", [(15, 9545, 13), (200, 50_000, 10), (15, 10_000, 100)])
def test_common_sizes_are_not_refused(size):
    assert refused(*size) == {}


def test_thousands_of_classes_leave_the_perceptron_alone():
    reasons = refused(5, 5000, 5000)
    assert reasons.keys() == {"lr", "xgb", "rf"}
    assert reasons["lr"] == "a fit needs about 43 GB of memory; this machine has 24 GB"
    assert reasons["xgb"].startswith("its 16 fits, 1 at a time, need about ")
    assert reasons["xgb"].endswith(" hours; the limit is 24")


def test_time_is_divided_by_cores_and_memory_is_not():
    assert "lr" in refused(5, 10_000, 1000)
    assert refused(5, 10_000, 1000, cores=8).keys() == {"rf"}


@pytest.mark.parametrize(
    ("demand", "cores", "is_refused"),
    [
        (FitDemand(19.1e9, 0), 1, False),
        (FitDemand(19.3e9, 0), 1, True),
        (FitDemand(0, 24 * 3600 / FITS), 1, False),
        (FitDemand(0, 24 * 3600 / FITS + 1), 1, True),
        (FitDemand(0, 24 * 3600 + 1), 64, True),  # one fit takes one core
        (FitDemand(9e9, 2 * 24 * 3600 / FITS), 64, False),  # two fits have room in the memory at a time
        (FitDemand(9e9, 2 * 24 * 3600 / FITS + 1), 64, True),
    ],
)
def test_the_limits(demand, cores, is_refused):
    assert (demand.refusal(FITS, cores) is not None) == is_refused


@pytest.mark.parametrize(
    ("n_bytes", "n_beside", "expected"), [(0, 1, 19_200_000_000), (3e9, 1, 6), (3e9, 3, 2), (19e9, 3, 1)]
)
def test_fits_at_a_time_have_room_in_the_memory(n_bytes, n_beside, expected):
    assert FitDemand(n_bytes, 0).max_at_a_time(n_beside) == expected


def test_a_stacker_fits_as_many_at_a_time_as_have_room(monkeypatch):
    numbers = []

    def record(*_, n_jobs, **__):
        numbers.append(n_jobs)
        raise RuntimeError("stop")

    monkeypatch.setattr("utils.numeric.nested_cv.cross_validate", record)
    logits, labels, folds = np.zeros((2, 6, 3)), np.arange(6) % 3, np.arange(6) % 2
    for n_bytes in (3e9, 0):
        monkeypatch.setattr(LogisticLearner, "demand", lambda *_, n_bytes=n_bytes: FitDemand(n_bytes, 0))
        stacker = replace(COMBINERS["stacking_lr"](learner=LogisticLearner(KINDS)), n_jobs=64)
        with pytest.raises(RuntimeError, match="stop"):
            stacker.fit(logits, labels, folds)
    assert numbers == [6, 64]


@pytest.mark.parametrize(("enough", "expected"), [(2_000, 16), (20, 11)])
def test_the_estimate_counts_the_fits_of_the_search(monkeypatch, enough, expected):
    counted = []
    monkeypatch.setattr(nested_cv, "ENOUGH_ROWS", enough)
    monkeypatch.setattr(FitDemand, "refusal", lambda demand, n_fits, cores: counted.append(n_fits))
    rows = OutOfSampleRows(None, np.arange(50) % 5)  # the estimate reads folds alone
    stacking_builder._refusal(CONFIG, "stacking_lr", FitDemand(1.0, 1.0), rows)
    assert counted == [expected]
