"""What the product claims, checked on simulated workspaces by its own functions.

A check prepares what is true of a workspace and returns a function that simulates it once: {claim: outcome}. An outcome
is 1 where an interval contains the true value, 0 where it does not; 1 where a verdict or a p-value of at most 0.05 is
wrong; a fraction of rows; or a number of nats too many. None is no answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from simulated_workspaces import Draw, SimulatedWorkspace, draw, draw_population

Outcomes = Mapping[str, float | None]
Simulation = Callable[[np.random.Generator], Outcomes]
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "votes.yaml"
SETTINGS = ["runs.score_ensemble.optimization_metric=log_loss", "runs.score_ensemble.pool=log_linear"]
SIGNIFICANT = 0.05
NEW_ROWS = 4000  # on which a fitted combiner's true score is measured
FOLDS = 5


@dataclass(frozen=True)
class Claim:
    """One row of the table."""

    title: str
    kind: str
    """interval, error, at_least, at_most or bias; own_bias and none have no goal"""
    nominal: float | None = None
    """Per cent; None where the kind says it"""


@dataclass(frozen=True)
class Check:
    """Claims that one simulation checks together."""

    claims: Mapping[str, Claim]
    prepare: Callable[[SimulatedWorkspace, np.random.Generator], Simulation]
    workspaces: str = "ABCDEFGHI"
    """Letters of `WORKSPACES`."""
    divisor: int = 1
    """Of the number of simulations, where each takes long"""


def covers(bounds: Any, truth: float) -> float | None:
    return None if bounds is None or None in bounds else float(bounds[0] <= truth <= bounds[1])


def softmax_of(logits: np.ndarray) -> np.ndarray:
    from utils.numeric.metrics import softmax

    return softmax(logits)


def losses_of(drawn: Draw) -> np.ndarray:
    from utils.numeric.metrics import log_loss_per_row

    return np.stack([log_loss_per_row(softmax_of(logits), drawn.labels) for logits in drawn.logits])


def hits_of(drawn: Draw) -> np.ndarray:
    hits: np.ndarray = drawn.logits.argmax(axis=2) == drawn.labels
    return hits


# scores and comparisons on test rows ---------------------------------------------------------------------------------
SCORES = ("accuracy", "f1_macro", "log_loss", "brier", "ece", "roc_auc_ovr_macro")


def check_scores(workspace: SimulatedWorkspace, random: np.random.Generator) -> Simulation:
    """Intervals of the scores of a model."""
    from utils.numeric.metric_intervals import metric_intervals
    from utils.numeric.metrics import point_metrics
    from utils.numeric.statistics import REPLICATES, bootstrap_metrics

    classes = tuple(map(str, range(workspace.classes)))
    population = draw_population(workspace, random)
    truth = point_metrics(softmax_of(population.logits[0]), population.labels, classes)
    replicates = REPLICATES if workspace.rows <= 100 else REPLICATES // 4

    def simulate(random: np.random.Generator) -> Outcomes:
        drawn = draw(workspace, random, 1)
        probabilities, labels, groups = softmax_of(drawn.logits[0]), drawn.labels, drawn.groups
        samples = bootstrap_metrics([probabilities], labels, groups=groups, replicates=replicates)
        of_model = {name: values[0] for name, values in samples.items()}
        record = point_metrics(probabilities, labels, classes)
        intervals, _ = metric_intervals(record, of_model, probabilities, labels, groups)
        return {name: covers(intervals.get(name), truth[name]) for name in SCORES}

    return simulate


def check_comparisons(workspace: SimulatedWorkspace, random: np.random.Generator) -> Simulation:
    """A model beside one that is as good: its record in `metrics.json`, and the report's sentence on it."""
    from utils.evaluation import score_records
    from utils.evaluation.calibrated_scores import CalibratedLosses
    from utils.evaluation.report import report_summary
    from utils.numeric.areas import mean_areas

    def simulate(random: np.random.Generator) -> Outcomes:
        drawn = draw(workspace, random, 2)
        inputs = SimpleNamespace(rows=SimpleNamespace(labels=drawn.labels), groups=drawn.groups)
        models = [
            SimpleNamespace(name=name, probabilities=softmax_of(logits))
            for name, logits in zip(("first", "second"), drawn.logits, strict=True)
        ]
        calibrated = CalibratedLosses(drawn.labels, drawn.groups, lambda model: None)  # no rows to fit them on
        context = SimpleNamespace(
            inputs=inputs,
            calibrated=calibrated,
            areas=lambda model: mean_areas(model.probabilities, drawn.labels),
        )
        compared = score_records._compared(*models, context)
        sentence = report_summary._measured_difference(compared, "second")
        p_value = compared["p_value"]
        return {
            "delta_accuracy": covers(compared["delta_ci95"], 0.0),
            "delta_log_loss": covers(compared["delta_log_loss_ci95"], 0.0),
            "p": None if p_value is None else float(p_value <= SIGNIFICANT),
            "sentence": float("it is better" in sentence or "it is worse" in sentence),
        }

    return simulate


def check_adjusted(workspace: SimulatedWorkspace, random: np.random.Generator) -> Simulation:
    """p-values of five models against one, adjusted for their number; all are as good."""
    from utils.numeric.proportions import sign_flip_p
    from utils.numeric.statistics import holm

    def simulate(random: np.random.Generator) -> Outcomes:
        drawn = draw(workspace, random, 6)
        hits = hits_of(drawn)
        p_values = {str(index): sign_flip_p(rival, hits[0], drawn.groups) for index, rival in enumerate(hits[1:])}
        tested = {name: p_value for name, p_value in p_values.items() if p_value is not None}
        return {"adjusted": float(min(holm(tested).values()) <= SIGNIFICANT) if tested else None}

    return simulate


# learned combiners, students and choices by out-of-sample rows -------------------------------------------------------
def check_baselines(workspace: SimulatedWorkspace, random: np.random.Generator) -> Simulation:
    """A learned combiner beside four baselines that are as good: the verdict, and one of its gains."""
    from utils.building.baselines import Baselines, compare

    names = ("best_single", "soft_voting", "greedy_selection", "log_linear_pool")

    def simulate(random: np.random.Generator) -> Outcomes:
        drawn = draw(workspace, random, 5)
        losses = losses_of(drawn)
        baselines = Baselines(dict(zip(names, losses, strict=False)), "member", drawn.groups)
        compared = compare(baselines, losses[4])
        is_claimed = compared["verdict"].startswith(("beats", "is worse"))
        return {
            "baselines": None if compared["beats_guards"] is None else float(is_claimed),
            "gain": covers(compared["guards"]["soft_voting"]["gain_ci95"], 0.0),
        }

    return simulate


def check_students(workspace: SimulatedWorkspace, random: np.random.Generator) -> Simulation:
    """A student beside the network trained alone: one that is as good, and one that keeps half of the gain."""
    from utils.distillation import controls, verdicts

    signals = [workspace.signal * factor for factor in (1.0, 1.15, 1.3)]
    alone, student, teacher = (
        {"accuracy": hits_of(drawn)[0].mean(), "log_loss": losses_of(drawn)[0].mean()}
        for drawn in (draw_population(workspace, random, signal=signal) for signal in signals)
    )
    kept = {name: (student[name] - alone[name]) / (teacher[name] - alone[name]) for name in ("accuracy", "log_loss")}

    def simulate(random: np.random.Generator) -> Outcomes:
        drawn = draw(workspace, random, 4, signals=[signals[0], *signals])
        same, single, distilled, taught = softmax_of(drawn.logits)[:, None]
        labels, groups = drawn.labels, drawn.groups
        differences = {metric: verdicts.difference(same, single, labels, metric, groups) for metric in verdicts.METRICS}
        outcome = verdicts.outcome(differences, seeds=1)
        bounds, _ = controls.gain_kept(distilled, single, taught, labels, groups)
        return {
            "student": float("helped in" in outcome or "harmed" in outcome),
            "kept_accuracy": covers(bounds["ci95"], kept["accuracy"]),
            "kept_log_loss": covers(bounds["log_loss"]["ci95"], kept["log_loss"]),
        }

    return simulate


def check_inference(workspace: SimulatedWorkspace, random: np.random.Generator) -> Simulation:
    """Full networks or means of fold networks, which are as good."""
    from utils.building.inference_choice import Measurement, choose

    def simulate(random: np.random.Generator) -> Outcomes:
        drawn = draw(workspace, random, 2)
        measured = Measurement(*losses_of(drawn), {}, drawn.groups)
        chosen = choose("auto", measured, lacking=(), feeds_fuser=False)
        return {"inference": float(chosen["chosen"] == "folds")}

    return simulate


def check_recommendation(workspace: SimulatedWorkspace, random: np.random.Generator) -> Simulation:
    """The recommended of six candidates that are as good, and three that have val rows alone."""
    from utils.building.recommendation import Candidate, recommend
    from utils.building.selection_rule import RowUnits

    truth = float(losses_of(draw_population(workspace, random)).mean())

    def simulate(random: np.random.Generator) -> Outcomes:
        drawn = draw(workspace, random, 9)
        losses, hits = losses_of(drawn), hits_of(drawn)
        split = np.where(np.arange(len(drawn.labels)) % 3, "train", "val")
        keys = tuple((part, str(row)) for row, part in enumerate(split.tolist()))
        is_val = split == "val"
        groups = {} if drawn.groups is None else dict(zip(keys, drawn.groups.tolist(), strict=True))
        units = RowUnits({}, groups)
        candidates = [
            Candidate(f"{kind}{index}", kind, keys, losses[index], hits[index])
            for index, kind in enumerate(["member"] * 3 + ["ensemble"] * 3)
        ]
        challengers = [
            Candidate(
                f"challenger{index}",
                "ensemble",
                tuple(key for key in keys if key[0] == "val"),
                losses[index][is_val],
                hits[index][is_val],
            )
            for index in (6, 7, 8)
        ]
        evidence = recommend(candidates, units)["evidence"]
        after_selection = evidence["after_selection"]
        return {
            "own_score": evidence["log_loss"] - truth,
            "after_selection": after_selection["log_loss"] - truth,
            "recommended": covers(after_selection["log_loss_ci95"], truth),
            "challenger": float(recommend([*candidates, *challengers], units)["reason"].startswith("clearly")),
        }

    return simulate


def check_crossfit(method: str) -> Callable[[SimulatedWorkspace, np.random.Generator], Simulation]:
    """The cross-fitted score of a combiner of three members beside its score on new rows."""

    def prepare(workspace: SimulatedWorkspace, random: np.random.Generator) -> Simulation:
        from utils import base_back
        from utils.combiners.protocol import MemberFacts, fit_crossfitted
        from utils.core.config_file import load_config
        from utils.evaluation import score_records
        from utils.meta_methods import INPUT_METHODS
        from utils.numeric.metrics import log_loss

        members, signals = 3, [workspace.signal * factor for factor in (0.9, 1.0, 1.1)]
        unknown = np.full(members, np.nan)
        facts = MemberFacts(tuple(f"member{index}" for index in range(members)), unknown, unknown, unknown)
        grouping = base_back.load_bundled("samples")
        config = load_config(CONFIG, overrides=SETTINGS)
        new = draw(replace(workspace, rows=NEW_ROWS, group=1), random, members, signals=signals)

        def simulate(random: np.random.Generator) -> Outcomes:
            drawn = draw(workspace, random, members, signals=signals)
            logits = drawn.logits.astype(np.float32)
            groups = np.arange(len(drawn.labels)) if drawn.groups is None else drawn.groups
            folds = grouping.stratified_bins(drawn.labels, groups, [1 / FOLDS] * FOLDS, int(random.integers(2**31)))
            recipe = INPUT_METHODS[method].configured(config, facts)
            crossfit = fit_crossfitted(recipe, logits, drawn.labels, np.asarray(folds))
            predictions = SimpleNamespace(probabilities=crossfit, labels=drawn.labels)
            measured = score_records._crossfit(predictions, drawn.groups)
            truth = log_loss(recipe.predict_proba(new.logits.astype(np.float32)), new.labels)
            return {
                f"{method}_bias": measured["log_loss"] - truth,
                f"{method}_interval": covers(measured["log_loss_ci95"], truth),
            }

        return simulate

    return prepare


CHECKS = {
    "scores": Check(
        {
            "accuracy": Claim("accuracy, interval", "interval"),
            "f1_macro": Claim("F1 macro, interval", "interval"),
            "log_loss": Claim("log-loss, interval", "interval"),
            "brier": Claim("Brier score, interval", "interval"),
            "ece": Claim("calibration error, interval", "interval"),
            "roc_auc_ovr_macro": Claim("area under the ROC curve, interval", "interval"),
        },
        check_scores,
    ),
    "comparisons": Check(
        {
            "delta_accuracy": Claim("difference in accuracy, interval", "interval"),
            "delta_log_loss": Claim("difference in log-loss, interval", "interval"),
            "p": Claim("p of two equally accurate models <= 0.05", "error"),
            "sentence": Claim("report: one of two equal models 'is better' or 'is worse'", "error"),
        },
        check_comparisons,
    ),
    "adjusted": Check({"adjusted": Claim("adjusted p of any of five equal models <= 0.05", "error")}, check_adjusted),
    "baselines": Check(
        {
            "baselines": Claim("combiner 'beats' or 'is worse than' equal baselines", "error"),
            "gain": Claim("gain over soft voting, interval", "interval"),
        },
        check_baselines,
    ),
    "students": Check(
        {
            "student": Claim("distillation 'helped' or 'harmed' where it did not", "error"),
            "kept_accuracy": Claim("share of the gain in accuracy kept, interval", "interval"),
            "kept_log_loss": Claim("share of the gain in log-loss kept, interval", "interval"),
        },
        check_students,
        "ABCDEF",
    ),
    "inference": Check(
        {"inference": Claim("fold networks chosen without a gain, by one standard error", "none", 16)},
        check_inference,
    ),
    "recommendation": Check(
        {
            "own_score": Claim("recommended: its own log-loss less the true one", "own_bias"),
            "after_selection": Claim("recommended: log-loss after selection less the true one", "bias"),
            "recommended": Claim("recommended: log-loss after selection, interval", "interval"),
            "challenger": Claim("recommended: 'clearly lower' on val without being lower", "error"),
        },
        check_recommendation,
        "ABCDEFGH",
    ),
    "learned": Check(
        {
            "weighted_bias": Claim("weighted: cross-fitted log-loss less that on new rows", "bias"),
            "weighted_interval": Claim("weighted: cross-fitted log-loss, interval", "interval"),
        },
        check_crossfit("weighted"),
        "ACF",
        divisor=8,
    ),
}
