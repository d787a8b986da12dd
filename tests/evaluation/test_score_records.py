"""`evaluate` on predictions made by hand: what the records say, and what is left out by itself."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
from given_predictions import CONFIG, NAMES, changing, empty_workspace, fewer, logged, take_in, write
from scipy.stats import binomtest

from utils.building import build_commands
from utils.core.config_file import load_config
from utils.core.errors import ConfigError, UserError
from utils.evaluation.evaluate import evaluate
from utils.numeric import proportions, statistics
from utils.numeric.means import paired_interval
from utils.numeric.metric_intervals import metric_intervals
from utils.numeric.metrics import METRICS, log_loss_per_row, softmax
from utils.numeric.uniform_mixture import mixed_with_uniform, uniform_weight
from utils.predictions import catalog

pytestmark = pytest.mark.usefixtures("without_figures")
ENSEMBLES = ("hard_voting_ensemble", "logit_averaging_ensemble", "soft_voting_ensemble")


def configured(*overrides):
    return load_config(CONFIG.source, overrides=list(overrides))


def built(tmp_path, *, config=CONFIG, **given):
    """A workspace of imported members with the three votes; `given` goes to what writes the predictions."""
    workspace = empty_workspace(tmp_path / "w")
    take_in(workspace, write(tmp_path / "given", **given))
    build_commands.build_ensemble(config, workspace)
    return workspace


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Read it only."""
    workspace = built(tmp_path_factory.mktemp("evaluated"))
    result = evaluate(CONFIG, workspace)
    assert result.failures == []
    return workspace


def record(workspace, name, split="test"):
    place = workspace.ensemble_metrics if name in ENSEMBLES else workspace.member_metrics
    return json.loads(place(name, split).read_text())


def ranking(workspace, split="test"):
    return json.loads(workspace.ranking(split).read_text())


def answers(workspace, name):
    """Probabilities (N, C) and labels (N,) on the test rows."""
    if name in ENSEMBLES:
        with np.load(workspace.ensemble(name) / "predictions_test.npz") as arrays:
            return arrays["probabilities"], arrays["labels"]
    folder = workspace.predictions(name, "test")
    return softmax(np.load(folder / "logits.npy")), np.load(folder / "labels.npy")


@pytest.mark.parametrize("name", [*ENSEMBLES, *NAMES])
def test_intervals_hold_the_value_and_are_those_of_the_metrics(evaluated, name):
    found = record(evaluated, name)
    probabilities, labels = answers(evaluated, name)
    samples = statistics.bootstrap_metrics([probabilities], labels, seed=CONFIG.seed)
    samples = {metric: values[0] for metric, values in samples.items()}
    expected, reason = metric_intervals(found, samples, probabilities, labels)
    assert found["ci95"] == expected
    assert found["notes"].get("ci95", "") == reason
    for metric, (low, high) in found["ci95"].items():
        assert low <= found[metric] <= high, metric
    assert found["bootstrap"] == {"replicates": 2000, "unit": "row", "units": 30}
    for metric, (function, _) in METRICS.items():
        assert found[metric] == function(probabilities, labels)


def test_comparisons_are_paired_on_the_same_rows(evaluated):
    best = ranking(evaluated)["peers"]["best_single"]
    one, labels = answers(evaluated, "hard_voting_ensemble")
    other, _ = answers(evaluated, best)
    hits, others = (found.argmax(axis=1) == labels for found in (one, other))
    found = record(evaluated, "hard_voting_ensemble")["vs_best_single"]
    assert found["name"] == best
    assert found["delta_accuracy"] == pytest.approx(hits.mean() - others.mean())
    losses = log_loss_per_row(one, labels) - log_loss_per_row(other, labels)
    assert found["delta_log_loss"] == pytest.approx(losses.mean())
    apart = int((hits & ~others).sum()), int((others & ~hits).sum())
    assert found["mcnemar_p"] == pytest.approx(binomtest(apart[0], sum(apart)).pvalue if sum(apart) else 1)
    assert found["test"] == "mcnemar"
    assert found["p_value"] == found["mcnemar_p"]
    expected = proportions.difference_interval(hits, others)
    assert found["delta_ci95"] == (None if expected is None else list(expected))
    assert tuple(found["delta_log_loss_ci95"]) == pytest.approx(paired_interval(losses))
    own = record(evaluated, best)
    assert own["vs_best_single"] is None
    assert best in own["notes"]["vs_best_single"]
    assert own["vs_soft_voting"]["name"] == "soft_voting_ensemble"


@pytest.mark.parametrize("name", [*ENSEMBLES, *NAMES])
def test_the_calibrated_loss_has_a_temperature_of_out_of_sample_rows(evaluated, name):
    found = record(evaluated, name)
    probabilities, labels = answers(evaluated, name)
    logs = np.log(np.maximum(probabilities, 1e-12)) / found["calibration_temperature"]
    weight = uniform_weight(found["crossfit"]["n"], probabilities.shape[1])
    expected = log_loss_per_row(mixed_with_uniform(softmax(logs), weight), labels)
    assert found["calibrated_log_loss"] == pytest.approx(expected.mean())
    assert found["calibration_temperature"] != 1


def test_comparisons_of_calibrated_losses_have_a_temperature_on_both_sides(evaluated):
    best = ranking(evaluated)["peers"]["best_single"]
    found = record(evaluated, "hard_voting_ensemble")
    difference = found["calibrated_log_loss"] - record(evaluated, best)["calibrated_log_loss"]
    assert found["vs_best_single"]["delta_calibrated_log_loss"] == pytest.approx(difference)
    low, high = found["vs_best_single"]["delta_calibrated_log_loss_ci95"]
    assert low < difference < high


def test_the_ranking_corrects_its_p_values_by_holm(evaluated):
    rows = {row["name"]: row for row in ranking(evaluated)["rows"]}
    for key in ("vs_best_single", "vs_soft_voting"):
        raw = {name: row[key]["mcnemar_p"] for name, row in rows.items() if row[key]}
        assert len(raw) == 5
        assert {name: rows[name][key]["mcnemar_p_holm"] for name in raw} == statistics.holm(raw)


def test_soft_voting_is_compared_with_though_it_is_not_built(tmp_path):
    config = configured("runs.score_ensemble.methods=[hard_voting]")
    workspace = built(tmp_path, config=config)
    evaluate(config, workspace)
    mean = np.mean([answers(workspace, name)[0] for name in NAMES], axis=0)
    labels = answers(workspace, "bayes")[1]
    found = record(workspace, "bayes")["vs_soft_voting"]
    hits = [(values.argmax(axis=1) == labels).mean() for values in (answers(workspace, "bayes")[0], mean)]
    assert found["delta_accuracy"] == pytest.approx(hits[0] - hits[1])
    assert ranking(workspace)["peers"]["soft_voting"] is None


def test_cross_fitted_figures_and_those_of_members_on_their_honest_rows(evaluated):
    for name in ("soft_voting_ensemble", "bayes"):
        found = record(evaluated, name)["crossfit"]
        assert found["n"] == 90
        low, high = found["log_loss_ci95"] or (0, 9)
        assert low < found["log_loss"] < high


def test_the_configuration_is_that_of_the_ensemble_itself(evaluated):
    saved = json.loads((evaluated.ensemble("soft_voting_ensemble") / "ensemble.json").read_text())
    assert record(evaluated, "soft_voting_ensemble")["config_digest"] == saved["config_digest"]
    assert record(evaluated, "bayes")["config_digest"] is None


def test_uncertainty_is_calibrated_on_val_and_measured_on_test(evaluated):
    with np.load(evaluated.ensemble("soft_voting_ensemble") / "crossfit.npz") as unseen:
        val = unseen["split"] == "val"
        scores = 1 - unseen["probabilities"][val][np.arange(val.sum()), unseen["labels"][val]]
    found = record(evaluated, "soft_voting_ensemble")
    lac = found["conformal"]["lac"]
    assert (lac["alpha"], lac["n"]) == (0.1, 30)
    assert lac["threshold"] == pytest.approx(np.sort(scores)[math.ceil(31 * 0.9) - 1], abs=1e-6)
    probabilities, labels = answers(evaluated, "soft_voting_ensemble")
    sets = 1 - probabilities <= lac["threshold"]
    sets[np.arange(30), probabilities.argmax(axis=1)] = True
    assert lac["coverage"] == pytest.approx(sets[np.arange(30), labels].mean())
    assert lac["mean_size"] == pytest.approx(sets.sum(axis=1).mean())
    assert found["conformal"]["aps"].keys() == lac.keys()
    assert found["selective"]["coverage"][-1] == 1
    assert found["selective"]["risk"][-1] == pytest.approx(1 - found["accuracy"])
    folder = [softmax(np.load(evaluated.predictions(name, "test") / "logits.npy")) for name in NAMES]
    mean = np.mean(folder, axis=0)
    entropy = [-(values * np.log(values)).sum(axis=-1) for values in (mean, np.array(folder))]
    by_row = entropy[0] - entropy[1].mean(axis=0)
    with np.load(evaluated.ensemble("soft_voting_ensemble") / "predictions_test.npz") as arrays:
        np.testing.assert_allclose(arrays["mutual_information"], by_row, atol=1e-6)
    assert found["mutual_information"] == pytest.approx(by_row.mean(), abs=1e-6)
    assert record(evaluated, "bayes")["mutual_information"] is None
    assert found["out_of_distribution"]["energy"].keys() == {"reference", "beyond"}


def test_reliability_and_calibration_errors_agree(evaluated):
    found = record(evaluated, "soft_voting_ensemble")
    table = found["reliability"]
    gaps = [
        count * abs(accuracy - confidence)
        for count, accuracy, confidence in zip(table["count"], table["accuracy"], table["confidence"], strict=True)
        if count
    ]
    assert sum(gaps) / 30 == pytest.approx(found["ece"])


def test_other_options_are_other_records_and_equal_ones_are_kept(tmp_path):
    workspace = built(tmp_path)
    assert "written" in evaluate(CONFIG, workspace).text
    assert "up to date" in evaluate(CONFIG, workspace).text
    options = {"alpha": 0.2, "target_risk": 0.1, "class_conditional": True}
    assert "written" in evaluate(CONFIG, workspace, **options).text
    assert "up to date" in evaluate(CONFIG, workspace, **options).text
    found = record(workspace, "soft_voting_ensemble")
    assert found["conformal"]["lac"]["alpha"] == found["conformal_by_class"]["aps"]["alpha"] == 0.2
    assert found["selective"]["target_risk"] == found["selective"]["wanted_error"] == 0.1
    assert found["conformal_by_class"]["lac"]["classes"].keys() == {"ant", "bee", "cat"}
    for name, value in (("alpha", 0.0), ("target_risk", 1.0), ("alpha", float("nan"))):
        with pytest.raises(ConfigError, match="expected a fraction of rows"):
            evaluate(CONFIG, workspace, **{name: value})


def test_the_earlier_name_of_the_target_risk_is_accepted_and_announced(tmp_path, caplog):
    workspace = built(tmp_path)
    with logged(caplog):
        evaluate(CONFIG, workspace, wanted_error=0.2)
    assert record(workspace, "soft_voting_ensemble")["selective"]["target_risk"] == 0.2
    assert any(entry.levelname == "WARNING" and "--target-risk" in entry.getMessage() for entry in caplog.records)


def test_the_same_rows_give_the_same_records(evaluated, tmp_path):
    again = built(tmp_path)
    evaluate(CONFIG, again)
    for name in (*ENSEMBLES, *NAMES):
        first, second = (record(workspace, name) for workspace in (evaluated, again))
        for one in (first, second):
            del one["created"]
        assert first == second


def test_val_has_files_of_its_own_and_no_conformal_sets(evaluated, tmp_path):
    config = configured("runs.score_ensemble.methods=[soft_voting,logit_averaging_calibrated]")
    workspace = built(tmp_path, config=config)
    evaluate(config, workspace, split="val")
    found = record(workspace, "soft_voting_ensemble", "val")
    assert found["conformal"] is None
    assert "calibrate" in found["notes"]["conformal"]
    assert found["calibrated_log_loss"] is found["calibration_temperature"] is None
    assert "val rows" in found["notes"]["calibrated_log_loss"]
    assert found["vs_best_single"]["delta_calibrated_log_loss"] is None
    assert found["selective"]["threshold"] is None
    for suffix in ("csv", "md", "tex"):
        assert workspace.ranking_table("val", suffix).is_file()
        assert not workspace.ranking_table("test", suffix).is_file()
    assert (workspace.scores / "soft_voting_ensemble" / "reliability_val.png").is_file()
    # The temperature is fitted on val rows, so that these cannot judge it.
    last = ranking(workspace, "val")["rows"][-1]
    assert (last["name"], last["rank"], last["contaminated"]) == ("logit_averaging_calibrated_ensemble", None, True)
    assert last["vs_best_single"]["mcnemar_p_holm"] is None


def test_groups_are_drawn_whole(tmp_path):
    config = configured(r"dataset.group_regex='^(\d\d\d)'")
    workspace = built(tmp_path, config=config)
    evaluate(config, workspace)
    found = record(workspace, "soft_voting_ensemble")
    assert found["bootstrap"] == {"replicates": 2000, "unit": "group", "units": 3}
    assert found["ci95"] == {}
    assert found["notes"]["ci95"] == "3 groups; an interval needs 10"
    compared = found["vs_best_single"] or found["vs_soft_voting"] or record(workspace, "bayes")["vs_soft_voting"]
    assert (compared["test"], compared["p_value"], compared["mcnemar_p"]) == ("sign_flip", None, None)
    assert compared["delta_ci95"] is compared["delta_log_loss_ci95"] is None
    assert found["crossfit"]["log_loss_ci95"] is None
    assert found["conformal"] is None
    assert "too few groups: " in found["notes"]["conformal"]
    assert found["out_of_distribution"] is None
    assert "3 groups of val rows are too few" in found["notes"]["out_of_distribution"]


def test_a_member_without_rows_of_the_split_does_not_stop_the_others(tmp_path):
    workspace = empty_workspace(tmp_path / "w")
    folder = write(tmp_path / "given")
    (folder / "forest" / "test.npz").unlink()
    take_in(workspace, folder)
    build_commands.build_ensemble(CONFIG, workspace)
    few = ("backbones.include=[bayes,linear]",)
    build_commands.build_ensemble(configured(*few, "runs.score_ensemble.methods=[soft_voting]"), workspace)
    config = configured(*few)
    result = evaluate(config, workspace)
    assert [failure.split(":")[0] for failure in result.failures] == ["forest", *ENSEMBLES[:2]]
    assert "no predictions for test; none are imported" in result.failures[0]
    assert "its member forest has no predictions on the rows of test" in result.failures[1]
    assert {row["name"] for row in ranking(workspace)["rows"]} == {"bayes", "linear", "soft_voting_ensemble"}
    assert evaluate(config, workspace).failures == result.failures
    for name in ("forest", "hard_voting_ensemble"):
        with pytest.raises(UserError, match="forest"):
            evaluate(config, workspace, model_name=name)
    for name in ("bayes", "linear"):
        (folder / name / "test.npz").unlink()
    take_in(workspace, folder, force=True)
    with pytest.raises(UserError, match="no predictions for test"):
        evaluate(CONFIG, workspace)


def test_an_ensemble_whose_member_is_gone_is_named_with_what_to_do(tmp_path):
    workspace = built(tmp_path)
    found = catalog.read(workspace)
    del found.members["forest"]
    catalog.save(workspace, found)
    result = evaluate(CONFIG, workspace)
    assert [failure.split(":")[0] for failure in result.failures] == list(ENSEMBLES)
    assert "its member forest is no longer in the catalog. Put the checkpoint or the" in result.failures[0]
    assert "build-ensemble --force" in result.failures[0]
    assert {row["name"] for row in ranking(workspace)["rows"]} == {"bayes", "linear"}
    with pytest.raises(UserError, match="its member forest is no longer"):
        evaluate(CONFIG, workspace, model_name="soft_voting_ensemble")


def test_nan_leaves_out_its_member_alone(tmp_path):
    workspace = built(tmp_path)
    path = workspace.predictions("linear", "test") / "logits.npy"
    right = path.read_bytes()
    logits = np.load(path)
    logits[4, 1] = np.nan
    np.save(path, logits)
    result = evaluate(CONFIG, workspace)
    assert any(line.startswith("linear: 1 row(s) of test with NaN or infinity, first ") for line in result.failures)
    assert len(result.failures) == 4
    assert {row["name"] for row in ranking(workspace)["rows"]} == {"bayes", "forest"}
    path.write_bytes(right)  # once it is mended, the command is not told that all is up to date
    assert evaluate(CONFIG, workspace).failures == []
    assert {row["name"] for row in ranking(workspace)["rows"]} == {*NAMES, *ENSEMBLES}


def only(*labels):
    """Test rows of these classes alone."""

    def alter(given):
        return fewer(np.isin(given["labels"], labels))(given)

    return lambda member, stem, given: alter(given) if stem == "test" else given


@pytest.mark.parametrize(("classes", "reason"), [((0, 1), "2 of 3 classes; without rows: cat"), ((1,), "of class bee")])
def test_a_class_without_rows_and_one_class(tmp_path, classes, reason):
    workspace = built(tmp_path, change=only(*classes))
    assert evaluate(CONFIG, workspace, class_conditional=True).failures == []
    found = record(workspace, "soft_voting_ensemble")
    assert (found["roc_auc_ovr_macro"] is None) == (len(classes) == 1)
    assert reason in found["notes"]["roc_auc_ovr_macro"]
    assert ("roc_auc_ovr_macro" in found["ci95"]) == (len(classes) == 2)
    assert found["conformal_by_class"]["lac"]["classes"]["cat"]["coverage"] is None


def test_probabilities_of_exactly_0_and_1(tmp_path):
    def certain(member, stem, given):
        given = {key: value for key, value in given.items() if key != "logits"} | {"probabilities": given["logits"]}
        winners = given["probabilities"].argmax(axis=1)
        return given | {"probabilities": np.eye(3, dtype=np.float32)[winners]}

    workspace = built(tmp_path, change=certain)
    assert evaluate(CONFIG, workspace).failures == []
    found = record(workspace, "bayes")
    assert found["ece"] == pytest.approx(1 - found["accuracy"], abs=1e-6)
    assert found["out_of_distribution"] is None
    assert "log-probabilities" in found["notes"]["out_of_distribution"]
    assert np.isfinite(found["log_loss"])


def test_labels_in_doubt_are_listed_by_the_recommended_one(tmp_path):
    def wrong_label(given):
        labels = given["labels"].copy()
        labels[7] = (labels[7] + 1) % 3
        return given | {"labels": labels}

    def surer(member, stem, given):
        given = given | {"logits": given["logits"] * 3}
        return wrong_label(given) if stem == "val" else given

    workspace = built(tmp_path, change=surer)
    result = evaluate(CONFIG, workspace)
    found = ranking(workspace)
    with workspace.label_issues("csv").open() as file:
        lines = list(csv.DictReader(file))
    assert found["label_issues"] == {"model": found["recommended"]["name"], "n": 90, "in_doubt": len(lines)}
    from given_predictions import arrays

    sample_id = arrays("val", 1)["sample_ids"][7]
    assert sample_id in [line["sample_id"] for line in lines[:3]]
    assert [line["image"] for line in lines] == [""] * len(lines)
    margins = [float(line["margin"]) for line in lines]
    assert margins == sorted(margins)
    assert f"labels in doubt: {len(lines)} of 90 out-of-sample rows" in result.text
    counts = np.array(json.loads(workspace.label_issues("json").read_text())["confident_joint"])
    assert counts.sum() - counts.trace() == len(lines)


@pytest.mark.parametrize(("stem", "count"), [("test", 20), ("val", 30)])
def test_a_member_with_fewer_rows_narrows_what_is_scored(tmp_path, stem, count):
    workspace = built(tmp_path, change=changing("bayes", stem, fewer(slice(0, 20))))
    assert evaluate(CONFIG, workspace).failures == []
    found = record(workspace, "soft_voting_ensemble")
    assert found["n_samples"] == count
    assert found["out_of_distribution"] is not None
