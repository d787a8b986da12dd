"""Claims about single predictions and about training data, checked on simulated workspaces as in `claim_checks`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from claim_checks import Check, Claim, Outcomes, Simulation, covers, hits_of, losses_of, softmax_of
from simulated_workspaces import Draw, SimulatedWorkspace, draw, draw_population

ALPHA, TARGET_RISK = 0.1, 0.05
RULES = 5  # of preprocessing that are compared


def check_conformal(workspace: SimulatedWorkspace, random: np.random.Generator) -> Simulation:
    """Coverage of prediction sets whose thresholds come from one split and whose rows from another."""
    from utils.numeric import uncertainty

    classes = tuple(map(str, range(workspace.classes)))

    def labelled_rows(random: np.random.Generator) -> uncertainty.LabelledRows:
        drawn = draw(workspace, random, 1)
        uniforms = random.random(len(drawn.labels))  # as the digests of images give
        return uncertainty.LabelledRows(softmax_of(drawn.logits[0]), drawn.labels, uniforms, drawn.groups)

    def simulate(random: np.random.Generator) -> Outcomes:
        calibration, evaluated = (labelled_rows(random) for _ in range(2))
        outcomes: dict[str, float | None] = {}
        for kind in uncertainty.NONCONFORMITY_SCORES:
            sets = uncertainty.conformal_metrics(kind, calibration, evaluated, alpha=ALPHA)
            outcomes[kind] = None if sets is None else sets["coverage"]
            if kind == "lac":
                bounds = None if sets is None else sets["coverage_interval"]
                outcomes["coverage_interval"] = None if bounds is None else covers(bounds, sets["coverage"])
        by_class = uncertainty.class_conditional_metrics("lac", calibration, evaluated, classes, alpha=ALPHA)
        covered = [
            each["coverage"]
            for each in by_class["classes"].values()
            if each["threshold"] is not None and each["coverage"] is not None
        ]
        return outcomes | {"by_class": float(np.mean(covered)) if covered else None}

    return simulate


def check_selective(workspace: SimulatedWorkspace, random: np.random.Generator) -> Simulation:
    """Whether the true error rate above the confidence threshold exceeds the target."""
    from utils.numeric.selective import selective_metrics

    population = draw_population(workspace, random)
    probabilities = softmax_of(population.logits[0])
    order = np.argsort(-probabilities.max(axis=1))
    confidence = probabilities.max(axis=1)[order]
    errors = np.cumsum(~hits_of(population)[0][order])

    def simulate(random: np.random.Generator) -> Outcomes:
        drawn = draw(workspace, random, 1)
        evidence = (softmax_of(drawn.logits[0]), drawn.labels)
        record = selective_metrics(evidence, evidence, target_risk=TARGET_RISK, groups=drawn.groups)
        threshold = record["threshold"]
        if threshold is None:
            return {"selective": None}
        answered = int(np.searchsorted(-confidence, -threshold, side="right"))
        return {"selective": float(answered > 0 and errors[answered - 1] > TARGET_RISK * answered)}

    return simulate


def check_calibration(workspace: SimulatedWorkspace, random: np.random.Generator) -> Simulation:
    """What the report says of a model whose probabilities are right, and of one whose log-odds are half as large."""
    from utils.numeric.calibration_chance import calibration_verdict, chance_ece
    from utils.numeric.metrics import ece

    def verdict(probabilities: np.ndarray, drawn: Draw) -> str:
        chance = chance_ece(probabilities, drawn.labels, drawn.groups)
        return calibration_verdict(ece(probabilities, drawn.labels), chance)

    unsmoothed = replace(workspace, smoothing=0.0)

    def simulate(random: np.random.Generator) -> Outcomes:
        drawn = draw(unsmoothed, random, 1)
        right, flat = (verdict(softmax_of(drawn.logits[0] * scale), drawn) for scale in (1.0, 0.5))
        return {
            "calibrated": float("miscalibrated" in right or "not well" in right),
            "uncalibrated": float(flat == "well calibrated"),
        }

    return simulate


def check_familiarity(workspace: SimulatedWorkspace, random: np.random.Generator) -> Simulation:
    """Fraction of rows beyond the 95% quantile of an OOD score; warnings about training data; labels in doubt."""
    from utils.evaluation.evaluation_results import _scores
    from utils.numeric import uncertainty
    from utils.numeric.label_issues import find_label_issues
    from utils.predictions import out_of_fold
    from utils.predictions.training_evidence import problems

    unsmoothed = replace(workspace, smoothing=0.0)  # the energy of log-probabilities says nothing

    def simulate(random: np.random.Generator) -> Outcomes:
        splits = [draw(unsmoothed, random, 1) for _ in range(2)]
        scores = [uncertainty.ood_scores(drawn.logits[0]) for drawn in splits]
        summary = uncertainty.ood_summary(*scores, splits[1].groups)
        scored = [_scores(softmax_of(drawn.logits[0]), drawn.labels, drawn.groups) for drawn in splits]
        unseen = {name: scores for name, scores in zip(("val", "test"), scored, strict=True) if scores is not None}
        hits, n = [hits_of(drawn)[0] for drawn in splits], len(splits[0].labels)
        units = [n if drawn.groups is None else len(np.unique(drawn.groups)) for drawn in splits]
        compared = [{"accuracy": hit.mean(), "n": count} for hit, count in zip(hits, units, strict=True)]
        p_value = out_of_fold.higher_accuracy_p_value(*compared)
        issues = find_label_issues(softmax_of(splits[0].logits[0]), splits[0].labels)
        return {
            "ood": None if summary is None else summary["energy"]["beyond"],
            "training_data": float(bool(problems("member", unseen))),
            "out_of_fold": float(p_value < out_of_fold.BEYOND_CHANCE),
            "in_doubt": len(issues.rows) / n,
        }

    return simulate


def check_preprocessing(workspace: SimulatedWorkspace, random: np.random.Generator) -> Simulation:
    """Whether another rule of preprocessing is suggested where all are as good."""
    from utils.discovery import preprocessing_checks

    def simulate(random: np.random.Generator) -> Outcomes:
        drawn = draw(workspace, random, RULES)
        losses, hits = losses_of(drawn), hits_of(drawn)
        rules = [
            {
                "accuracy": float(hit.mean()),
                "log_loss": float(loss.mean()),
                "standard_errors": preprocessing_checks._standard_errors(losses[0] - loss, drawn.groups),
            }
            for hit, loss in zip(hits, losses, strict=True)
        ]
        better = preprocessing_checks._better_rule({"n": len(drawn.labels), "rules": rules})
        return {"preprocessing": float(better is not None)}

    return simulate


CHECKS = {
    "conformal": Check(
        {
            "lac": Claim("LAC sets, coverage", "at_least", 90),
            "aps": Claim("APS sets, coverage", "at_least", 90),
            "raps": Claim("RAPS sets, coverage", "at_least", 90),
            "by_class": Claim("LAC sets with a threshold per class, coverage of classes", "at_least", 90),
            "coverage_interval": Claim("LAC sets, interval of the measured coverage", "interval"),
        },
        check_conformal,
    ),
    "selective": Check(
        {"selective": Claim("true error above the threshold exceeds the target of 5%", "error")}, check_selective
    ),
    "calibration": Check(
        {
            "calibrated": Claim("a calibrated model is called miscalibrated", "error"),
            "uncalibrated": Claim("a model with halved log-odds is called well calibrated", "none"),
        },
        check_calibration,
    ),
    "familiarity": Check(
        {
            "ood": Claim("rows beyond the OOD reference", "at_most", 5),
            "training_data": Claim("warning: trained on rows of a split, without that", "error", 0.1),
            "out_of_fold": Claim("warning: out-of-fold rows seen, without that", "error", 0.1),
            "in_doubt": Claim("right labels in doubt", "none"),
        },
        check_familiarity,
    ),
    "preprocessing": Check(
        {"preprocessing": Claim("another preprocessing 'fits better', without that", "error", 0.1)},
        check_preprocessing,
    ),
}
