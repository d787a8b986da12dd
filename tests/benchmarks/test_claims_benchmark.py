"""The benchmark of claims: what its simulated workspaces hold, and which claims it finds to be wrong."""

from __future__ import annotations

import json
from dataclasses import replace

import claims
import numpy as np
import pytest
from claim_checks import Check, Claim, covers, softmax_of
from simulated_workspaces import WORKSPACES, SimulatedWorkspace, draw, draw_population

from utils.numeric.metrics import accuracy, ece

SMALL = SimulatedWorkspace("small", 80, 4, 2.0)
LARGE = replace(SMALL, rows=600)


# workspaces ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("letter", WORKSPACES)
def test_every_class_has_groups_and_rare_ones_are_rare(letter):
    workspace = WORKSPACES[letter]
    drawn = draw(workspace, np.random.default_rng(0), 2)
    assert drawn.logits.shape == (2, workspace.rows, workspace.classes)
    counts = np.bincount(drawn.labels, minlength=workspace.classes)
    assert counts.tolist() == (workspace.class_counts() * workspace.group).tolist()
    assert counts.min() >= 1
    rare = counts[workspace.classes - workspace.rare :]
    assert not workspace.rare or rare.max() < counts[0] / 3
    if workspace.group > 1:
        assert drawn.groups is not None
        assert len(np.unique(drawn.groups)) == workspace.rows // workspace.group
        assert all(len(set(drawn.labels[drawn.groups == group])) == 1 for group in np.unique(drawn.groups))
    else:
        assert drawn.groups is None


def test_models_are_calibrated_unless_they_were_smoothed():
    random = np.random.default_rng(1)
    right = draw_population(SMALL, random)
    smoothed = draw_population(replace(SMALL, smoothing=0.2), random)
    assert ece(softmax_of(right.logits[0]), right.labels) < 0.005
    assert ece(softmax_of(smoothed.logits[0]), smoothed.labels) > 0.05


def test_rows_of_a_group_and_models_of_a_row_err_together():
    grouped = SimulatedWorkspace("grouped", 20_000, 3, 1.5, group=10)
    drawn = draw(grouped, np.random.default_rng(2), 2)
    hits = (drawn.logits.argmax(axis=2) == drawn.labels).astype(float)
    assert np.corrcoef(hits)[0, 1] > 0.2
    of_groups = hits[0].reshape(-1, 10)
    assert np.corrcoef(of_groups[:, 0], of_groups[:, 1])[0, 1] > 0.3
    stronger = draw(grouped, np.random.default_rng(2), 2, signals=[1.5, 2.5])
    scores = [accuracy(softmax_of(logits), stronger.labels) for logits in stronger.logits]
    assert scores[1] > scores[0] + 0.05


# verdicts on claims --------------------------------------------------------------------------------------------------
def mean_check(half_width, *, abstains=0.0):
    """Of an interval of the mean of 50 normal numbers, this many standard errors wide to either side."""

    def prepare(workspace, random):
        def simulate(random):
            values = random.standard_normal(50)
            half = half_width * values.std(ddof=1) / 50**0.5
            bounds = None if random.random() < abstains else [values.mean() - half, values.mean() + half]
            return {"mean": covers(bounds, 0.0)}

        return simulate

    return Check({"mean": Claim("mean, interval", "interval")}, prepare)


def verdict_on(check, workspace=SMALL, simulations=2000):
    outcomes = claims.simulate(check, workspace, "seed", simulations)
    (key,) = outcomes
    found = claims.figure(check.claims[key], outcomes[key])
    return found, claims.holds(check.claims[key], found, workspace)


def test_a_right_interval_passes_and_wrong_ones_are_flagged():
    found, verdict = verdict_on(mean_check(2.01))
    assert 93.5 < found.actual < 96.5
    assert verdict is True
    narrow, wide = verdict_on(mean_check(1.5)), verdict_on(mean_check(3.5))
    assert narrow[0].actual < 90
    assert wide[0].actual > 99
    assert (narrow[1], wide[1]) == (False, False)


def test_abstentions_count_in_large_workspaces_alone():
    check = mean_check(2.01, abstains=0.2)
    found, verdict = verdict_on(check)
    assert 17 < found.abstained < 23
    assert 93 < found.actual < 98  # of those that answer
    assert verdict is True
    assert verdict_on(check, LARGE)[1] is False
    assert verdict_on(mean_check(2.01, abstains=1.0))[1] is None


def constant_check(kind, values, nominal=None):
    """Outcomes that repeat these values."""

    def prepare(workspace, random):
        outcomes = iter(values)
        return lambda random: {"value": next(outcomes)}

    return Check({"value": Claim("value", kind, nominal)}, prepare)


@pytest.mark.parametrize(
    ("kind", "nominal", "values", "expected"),
    [
        ("error", None, [1.0] * 6 + [0.0] * 94, True),
        ("error", None, [1.0] * 7 + [0.0] * 93, False),
        ("at_least", 90, [0.901] * 100, True),
        ("at_least", 90, [0.89, 0.9] * 50, False),
        ("at_most", 5, [0.059] * 100, True),
        ("at_most", 5, [0.061] * 100, False),
        ("bias", None, [1.2, -1.0] * 50, True),
        ("bias", None, [1.4, -0.8] * 50, False),
        ("none", None, [1.0] * 100, None),
    ],
)
def test_each_kind_has_its_goal(kind, nominal, values, expected):
    found, verdict = verdict_on(constant_check(kind, values * 10, nominal), simulations=1000)
    assert verdict is expected, found


def test_few_answers_are_given_the_error_of_their_number():
    values = [1.0] * 9 + [0.0] * 91  # 9% wrong, 2.9% of error
    assert verdict_on(constant_check("error", values), simulations=100)[1] is True
    assert verdict_on(constant_check("error", values * 10), simulations=1000)[1] is False


def test_the_table_marks_what_is_missed_and_where_nothing_was_said():
    claim = Claim("accuracy, interval", "interval")
    figures = {
        "accuracy": {
            "A": claims.Figure(95.2, 0.0, 0.5, 2000),
            "C": claims.Figure(88.0, 0.0, 0.7, 2000),
            "G": claims.Figure(95.0, 12.0, 0.5, 1760),
            "I": claims.Figure(None, 100.0, 0.0, 0),
        }
    }
    lines = claims.table({"accuracy": claim}, figures)
    assert lines[0] == "| claim | nominal | goal | A | C | G | I |"
    assert lines[2] == "| accuracy, interval | 95% | 93 to 98 | 95.2 | **88.0** | **95.0** (12) | **-** (100) |"
    assert "C: 200 rows, 6 classes, 2 of them rare" in lines
    entries = claims.rows({"accuracy": claim}, figures)
    assert [entry["holds"] for entry in entries] == [True, False, False, False]
    assert entries[2]["peer"] == "nominal 95%, no answer in 12.0%"


# the product's claims ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", claims.CHECKS)
def test_every_check_gives_an_outcome_for_each_of_its_claims(name):
    check = claims.CHECKS[name]
    letters = [letter for letter in ("A", "E") if letter in check.workspaces]
    for letter in letters:
        outcomes = claims.simulate(check, WORKSPACES[letter], "test", 2)
        assert outcomes.keys() == check.claims.keys()
        assert all(values.shape == (2,) for values in outcomes.values())


def test_titles_are_different():
    titles = [claim.title for check in claims.CHECKS.values() for claim in check.claims.values()]
    assert len(set(titles)) == len(titles)


def test_a_part_gives_the_figures_of_the_whole_and_ends_with_its_report(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(claims, "KEPT", tmp_path / "kept")
    assert claims.main(["--simulations", "5", "--only", "comparisons", "--workspaces", "AC"]) == 0
    whole = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert claims.main(["--simulations", "5", "--only", "comparisons", "--workspaces", "C"]) == 0
    part = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (whole["benchmark"], whole["simulations"], whole["quick"]) == ("claims", 5, False)
    assert part["rows"] == [entry for entry in whole["rows"] if entry["what"].endswith("[C]")]


def test_kept_outcomes_are_not_simulated_again(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(claims, "KEPT", tmp_path)
    outcomes = {"delta_accuracy": [1.0] * 4, "delta_log_loss": [1.0] * 4, "p": [None] * 4, "sentence": [0.0] * 4}
    claims.keep("comparisons", "A", "abc", {key: np.array(values, dtype=float) for key, values in outcomes.items()})
    call = ["--simulations", "4", "--only", "comparisons", "--workspaces", "AB"]
    assert claims.main([*call, "--continue"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    figures = {entry["what"]: entry["figure"] for entry in found["rows"]}
    assert figures["difference in accuracy, interval [A]"] == 100
    assert figures["p of two equally accurate models <= 0.05 [A]"] is None
    assert figures["p of two equally accurate models <= 0.05 [B]"] is not None
    assert found["commits"] == sorted(["abc", claims.commit()])
    assert claims.read_kept("comparisons", "A", 4)[0] == "abc"
    assert claims.read_kept("comparisons", "A", 5) is None
    assert claims.main(call) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["commits"] == [claims.commit()]
