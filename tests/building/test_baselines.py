"""The simple combinations that a learned one is held against."""

from __future__ import annotations

import os
import re
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from utils.building import baselines, ensembles, family_fits
from utils.building.ensembles import Crossfit, Ensemble, Provenance
from utils.combiners.calibrated_votes import CalibratedSoftVoting, calibrated_probabilities
from utils.combiners.protocol import MemberFacts, fit_crossfitted
from utils.core import engines, worker_processes
from utils.core.config import Config, validate
from utils.core.workspace import Workspace
from utils.ensemble_methods import SoftVoting
from utils.numeric.metrics import log_loss, softmax

pytestmark = pytest.mark.usefixtures("short_searches")

N, C = 200, 3
FACTS = MemberFacts(("a", "b"), np.array([0.5, 0.6]), np.full(2, np.nan), np.full(2, np.nan))
NO_ROWS = Provenance((), ())
WORKSPACE = Workspace(*([Path("nowhere")] * 8))


@pytest.fixture
def measured():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, C, N)
    logits = rng.normal(size=(2, N, C)).astype(np.float32)
    logits[1, np.arange(N), labels] += 2
    return baselines.measure(WORKSPACE, Config(), FACTS, logits, labels, np.arange(N) % 5), logits, labels


def test_the_five_simple_combinations_are_measured_on_unseen_rows(measured):
    found, logits, labels = measured
    assert list(found.losses) == [
        *("best_single", "soft_voting", "greedy_selection", "convex_weights", "log_linear_pool"),
    ]
    assert found.best_single == "b"
    folds = np.arange(N) % 5
    expected = calibrated_probabilities(logits[1], labels, folds)
    assert found.losses["best_single"].mean() == pytest.approx(log_loss(expected, labels), abs=1e-6)
    vote = fit_crossfitted(CalibratedSoftVoting(), logits, labels, folds)
    assert found.losses["soft_voting"].mean() == pytest.approx(log_loss(vote, labels), abs=1e-6)
    assert found.losses["soft_voting"].mean() < log_loss(softmax(logits).mean(axis=0), labels) - 0.01


def test_baselines_on_many_rows_run_side_by_side_with_the_same_losses(measured, monkeypatch):
    found, logits, labels = measured
    processes = set()
    fit_each = family_fits.fit_each

    def noted(function, items, *, n_logits, are_nested, shared, description):
        call = partial(_with_process, function)
        for result, process in fit_each(
            call, items, shared=shared, description=description, n_logits=n_logits, are_nested=are_nested
        ):
            processes.add(process)
            yield result

    monkeypatch.setattr(family_fits, "fit_each", noted)
    monkeypatch.setattr(worker_processes, "START_SECONDS", dict.fromkeys(worker_processes.START_SECONDS, 0.0))
    monkeypatch.setattr(engines, "cores", lambda: 2)
    monkeypatch.setattr(baselines, "_measured", {})
    again = baselines.measure(WORKSPACE, Config(), FACTS, logits, labels, np.arange(N) % 5)
    assert len(processes) == 2
    assert again.best_single == found.best_single
    for name, losses in found.losses.items():
        np.testing.assert_allclose(again.losses[name], losses, atol=1e-9)


def _with_process(function, *arguments):
    return function(*arguments), os.getpid()


@pytest.mark.parametrize("changed", ["logits", "labels", "folds", "members", "config"])
def test_equal_inputs_are_measured_once_and_others_anew(measured, monkeypatch, changed):
    found, logits, labels = measured
    folds = np.arange(N) % 5
    inputs = {
        "workspace": WORKSPACE,
        "config": Config(),
        "members": FACTS,
        "logits": logits,
        "labels": labels,
        "folds": folds,
    }
    groups = np.arange(N) // 2
    again = baselines.measure(**{name: deepcopy(value) for name, value in inputs.items()}, groups=groups)
    assert again.losses is found.losses
    assert (found.groups is None, again.groups is groups) == (True, True)
    other = {
        "logits": logits[:, ::-1],
        "labels": labels[::-1],
        "folds": folds[::-1],
        "members": replace(FACTS, recorded_accuracy=np.array([0.6, 0.5])),
        "config": Config(seed=1),
    }
    assert baselines.measure(**inputs | {changed: other[changed]}).losses is not found.losses


@pytest.fixture
def compared(measured, tmp_path):
    """A workspace with an ensemble that was compared with the measured baselines, and the inputs of these."""
    found, logits, labels = measured
    workspace = Workspace(tmp_path, *(tmp_path / name for name in "abcdefg"))
    ids = np.arange(N).astype(str)
    vote = Ensemble("vote", "soft_voting", ("a", "b"), ("a", "b"), ("x", "y", "z"), SoftVoting(), NO_ROWS, "", {}, 42)
    unseen = Crossfit(np.zeros((N, C)), labels, ids, np.full(N, "val"), np.arange(N) % 5)
    record = baselines.compare(found, found.losses["soft_voting"]) | {"baselines_digest": found.digest}
    ensembles.save(workspace, vote, unseen, record, found.losses)
    return workspace, {"config": Config(), "members": FACTS, "logits": logits, "labels": labels, "folds": unseen.fold}


@pytest.fixture
def no_fits(monkeypatch):
    """A later process, in which baselines cannot be measured."""
    monkeypatch.setattr(baselines, "_measured", {})
    monkeypatch.setattr(baselines, "_measure", lambda *_: pytest.fail("measured again"))


def test_a_later_command_reads_the_baselines_of_a_saved_ensemble(measured, compared, no_fits):
    workspace, inputs = compared
    other = validate({"runs": {"score_ensemble": {"methods": ["soft_voting"]}}}, source=Path("of the test"))
    costly = replace(FACTS, latency_ms=np.array([1.0, 2.0]), size_mb=np.array([3.0, 4.0]))
    groups = np.arange(N) // 2
    again = baselines.measure(workspace, **inputs | {"members": costly, "config": other}, groups=groups)
    assert again.losses.keys() == measured[0].losses.keys()
    assert all(again.losses[name].tobytes() == losses.tobytes() for name, losses in measured[0].losses.items())
    assert (again.best_single, again.digest, again.groups is groups) == ("b", measured[0].digest, True)


@pytest.mark.parametrize("damage", ["other inputs", "cut short", "missing", "other rows", "other baselines", "record"])
def test_baselines_that_do_not_fit_or_are_damaged_are_measured_again(measured, compared, monkeypatch, damage, caplog):
    workspace, inputs = compared
    file, record = (workspace.ensemble("vote") / name for name in ("baselines.npz", "ensemble.json"))
    losses = dict(measured[0].losses)
    if damage == "other inputs":
        inputs |= {"labels": inputs["labels"][::-1]}
    elif damage == "cut short":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "missing":
        file.unlink()
    elif damage == "other rows":
        np.savez(file, **{name: values[1:] for name, values in losses.items()})
    elif damage == "other baselines":
        np.savez(file, **{name: losses[name] for name in list(losses)[1:]})
    else:
        record.write_text("{")
    monkeypatch.setattr(baselines, "_measured", {})
    monkeypatch.setattr(baselines, "_measure", lambda *_: baselines.Baselines({}, "measured again"))
    assert baselines.measure(workspace, **inputs).best_single == "measured again"
    named = {"cut short": str(file), "missing": str(file), "record": str(record)}
    assert named.get(damage, "") in caplog.text


def test_a_clear_gain_beats_and_a_hair_does_not(measured):
    found = measured[0]
    best = min(found.losses.values(), key=lambda losses: losses.mean())
    clear = baselines.compare(found, best - 0.1)
    assert clear["beats_guards"]
    assert clear["verdict"].startswith("beats ")
    noise = np.random.default_rng(0).normal(size=N)
    hair = baselines.compare(found, best + 0.3 * (noise - noise.mean()) - 1e-6)
    assert not hair["beats_guards"]
    assert hair["verdict"].startswith("cannot be told apart from ")
    worse = baselines.compare(found, best + 0.1)
    assert not worse["beats_guards"]
    assert worse["verdict"].startswith("is worse than ")


def test_a_loss_that_the_correction_leaves_open_has_both_intervals(measured):
    found = measured[0]
    best = min(found.losses.values(), key=lambda losses: losses.mean())
    noise = np.random.default_rng(0).normal(size=N)
    spread = 0.3 * (noise - noise.mean()) / noise.std(ddof=1)
    verdict = baselines.compare(found, best + spread + 2.2 * 0.3 / np.sqrt(N))["verdict"]
    assert verdict.startswith("cannot be told apart from ")
    plain, corrected = re.search(r"\[-0.\d+, (.*)\], and corrected for 5 baselines \[-0.\d+, (.*)\]$", verdict).groups()
    assert float(plain) < 0 < float(corrected)


def test_every_gain_stands_with_its_interval(measured):
    found = measured[0]
    record = baselines.compare(found, found.losses["soft_voting"] - 0.2)
    gain = record["guards"]["soft_voting"]
    assert gain["gain"] == pytest.approx(0.2)
    np.testing.assert_allclose(gain["gain_ci95"], 0.2)


def test_a_gain_that_few_groups_have_is_none(measured):
    found = measured[0]
    best = min(found.losses.values(), key=lambda losses: losses.mean())
    groups = np.arange(N) // 10
    noise = np.random.default_rng(1).normal(0, 1, N // 10)
    gain = (noise - noise.mean() + 0.25)[groups]
    assert baselines.compare(found, best - gain)["beats_guards"]
    grouped = baselines.compare(replace(found, groups=groups), best - gain)
    assert grouped["beats_guards"] is False
    few = baselines.compare(replace(found, groups=np.arange(N) % 9), best - gain)
    assert few["beats_guards"] is None
    assert few["verdict"].startswith("is not tested against ")
    assert few["guards"]["soft_voting"]["gain_ci95"] is None


def test_equal_baselines_are_rarely_beaten_and_rarely_better():
    """The best of four equal baselines looks better than they are: one interval errs in one case of eight."""
    rng = np.random.default_rng(3)
    claims, low_alone = 0, 0
    for _ in range(300):
        losses = rng.gamma(1.0, 0.4, (5, 200))
        simple = baselines.Baselines({f"b{n}": values for n, values in enumerate(losses[:4])}, "b")
        found = baselines.compare(simple, losses[4])
        claims += not found["verdict"].startswith("cannot be told apart")
        best = min(found["guards"].values(), key=lambda entry: entry["log_loss"])
        low_alone += not best["gain_ci95"][0] <= 0 <= best["gain_ci95"][1]
    assert claims / 300 <= 0.06 < low_alone / 300
