"""Mean ranks, tests and gains of the same methods over several workspaces; no file is accessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.comparison.workspace_scores import BEST_SINGLE, RECOMMENDED, WorkspaceScores
from utils.core.errors import UserError, did_you_mean
from utils.numeric import rank_tests
from utils.numeric.means import LEVEL
from utils.numeric.statistics import holm

MIN_TESTED = 6
"""Fewest workspaces for which the signed-rank test can give a p-value below 0.05."""
MIN_METHODS = 2
ALPHA = 0.05
Floats = NDArray[np.float64]


def compare_methods(
    workspaces: Sequence[WorkspaceScores],
    *,
    metric: str,
    higher_is_better: bool,
    models: Sequence[str] | None = None,
    control: str = BEST_SINGLE,
) -> dict[str, Any]:
    """Compare the methods that all workspaces share, or those of `models`, with each other and with the control.

    The record has `methods`, best mean rank first, each with its mean score, gain over the control with its interval
    and p-values; `pairs`; `friedman` and `nemenyi`. With fewer than `MIN_TESTED` workspaces there are no tests and
    intervals, as stated in `notes`. Raises UserError for fewer than two common methods and for unknown names.
    """
    names, left_out = _common(workspaces, models, control)
    scores = np.array([[workspace.scores[name] for name in names] for workspace in workspaces], dtype=np.float64)
    ranked = rank_tests.ranks(scores, higher_is_better=higher_is_better)
    sign = 1.0 if higher_is_better else -1.0
    gains = sign * (scores - scores[:, [names.index(control)]])
    is_tested = len(workspaces) >= MIN_TESTED
    tests = _control_tests(names, ranked, gains, control) if is_tested else {}
    means = ranked.mean(axis=0)
    order = sorted(range(len(names)), key=lambda index: (means[index], -sign * scores[:, index].mean(), names[index]))
    methods = [
        {
            "name": names[index],
            "mean_rank": float(means[index]),
            "mean": float(scores[:, index].mean()),
            "scores": scores[:, index].tolist(),
            "ranks": ranked[:, index].tolist(),
            "gain": float(gains[:, index].mean()),
            "gain_ci95": _interval(gains[:, index]) if is_tested else None,
            "wins": int((gains[:, index] > 0).sum()),
            "losses": int((gains[:, index] < 0).sum()),
            **tests.get(names[index], dict.fromkeys(("rank_p", "rank_p_holm", "wilcoxon_p", "wilcoxon_p_holm"))),
        }
        for index in order
    ]
    return {
        "metric": metric,
        "higher_is_better": higher_is_better,
        "workspaces": [
            {
                "name": workspace.name,
                "folder": str(workspace.folder),
                "n": workspace.n_rows,
                "n_classes": len(workspace.classes),
            }
            | {"chosen": dict(workspace.chosen)}
            for workspace in workspaces
        ],
        "control": control,
        "methods": methods,
        "pairs": _pairs(names, ranked, sign * scores) if is_tested else None,
        "friedman": _friedman(ranked) if is_tested else None,
        "nemenyi": {
            "alpha": ALPHA,
            "critical_difference": rank_tests.critical_difference(len(workspaces), len(names), alpha=ALPHA),
        }
        if is_tested
        else None,
        "left_out": left_out,
        "notes": _notes(workspaces),
        "summary": _summary(workspaces, metric, sign),
    }


def _common(
    workspaces: Sequence[WorkspaceScores], models: Sequence[str] | None, control: str
) -> tuple[list[str], dict[str, list[str]]]:
    """Return the methods with a score in every workspace, and {other method: workspaces that lack it}."""
    all_names = list(dict.fromkeys(name for workspace in workspaces for name in workspace.scores))
    lacking = {
        name: [workspace.name for workspace in workspaces if workspace.scores.get(name) is None] for name in all_names
    }
    wanted = all_names if models is None else list(dict.fromkeys([*models, control]))
    problems = [f"{name} is nowhere{did_you_mean(name, all_names)}" for name in wanted if name not in lacking]
    if models is not None or lacking.get(control):
        named = [control] if models is None else wanted
        problems += [f"{name} has no score in {', '.join(lacking[name])}" for name in named if lacking.get(name)]
    common = [name for name in wanted if name in lacking and not lacking[name]]
    if control not in all_names:
        problems.append(f"the control {control} is nowhere{did_you_mean(control, all_names)}")
    if problems:
        shared = ", ".join(name for name in all_names if not lacking[name]) or "none"
        raise UserError(f"compare: {'; '.join(dict.fromkeys(problems))}. Methods of all workspaces: {shared}")
    if len(common) < MIN_METHODS:
        raise UserError(
            f"compare: {len(common)} method that all workspaces have; expected {MIN_METHODS} or more. Build the same "
            "ensembles in each, with one configuration"
        )
    return common, {name: workspaces_of for name, workspaces_of in lacking.items() if workspaces_of and models is None}


def _control_tests(names: Sequence[str], ranked: Floats, gains: Floats, control: str) -> dict[str, dict[str, float]]:
    """Return the p-values of each method against the control, by mean ranks and by signed ranks, Holm-corrected too.

    Takes ranks and gains (D, K) of K methods on D workspaces.
    """
    means, control_index = ranked.mean(axis=0), names.index(control)
    by_rank = rank_tests.rank_difference_p(means - means[control_index], *ranked.shape)
    others = [index for index in range(len(names)) if index != control_index]
    rank_p = {names[index]: float(by_rank[index]) for index in others}
    wilcoxon_p = {names[index]: rank_tests.signed_rank(gains[:, index]).p_value for index in others}
    rank_holm, wilcoxon_holm = holm(rank_p), holm(wilcoxon_p)
    return {
        name: {
            "rank_p": rank_p[name],
            "rank_p_holm": rank_holm[name],
            "wilcoxon_p": wilcoxon_p[name],
            "wilcoxon_p_holm": wilcoxon_holm[name],
        }
        for name in rank_p
    }


def _pairs(names: Sequence[str], ranked: Floats, scores: Floats) -> list[dict[str, Any]]:
    """Return every pair of methods, better mean rank first, with Nemenyi's and Wilcoxon's p-values."""
    means = ranked.mean(axis=0)
    order = sorted(range(len(names)), key=lambda index: (means[index], names[index]))
    pairs = list(combinations(order, 2))
    nemenyi = rank_tests.nemenyi_p([means[second] - means[first] for first, second in pairs], *ranked.shape)
    signed = [rank_tests.signed_rank(scores[:, first] - scores[:, second]).p_value for first, second in pairs]
    corrected = holm({str(number): p_value for number, p_value in enumerate(signed)})
    return [
        {
            "first": names[first],
            "second": names[second],
            "rank_difference": float(means[second] - means[first]),
            "gain": float((scores[:, first] - scores[:, second]).mean()),
            "nemenyi_p": float(nemenyi[number]),
            "wilcoxon_p": signed[number],
            "wilcoxon_p_holm": corrected[str(number)],
        }
        for number, (first, second) in enumerate(pairs)
    ]


def _friedman(ranked: Floats) -> dict[str, Any]:
    test = rank_tests.friedman(ranked)
    return {
        "chi_square": test.chi_square,
        "chi_square_p": test.chi_square_p,
        "f": test.f,
        "degrees": list(test.degrees),
        "p_value": test.f_p,
    }


def _interval(gains: Floats) -> list[float]:
    """Return the 95% interval of the mean over workspaces, of gains (D,), by Student's t."""
    from scipy.special import stdtrit

    half = float(stdtrit(len(gains) - 1, (1 + LEVEL) / 2)) * float(gains.std(ddof=1)) / len(gains) ** 0.5
    return [float(gains.mean()) - half, float(gains.mean()) + half]


def _notes(workspaces: Sequence[WorkspaceScores]) -> dict[str, str]:
    notes = {}
    if len(workspaces) < MIN_TESTED:
        notes["tests"] = (
            f"{len(workspaces)} workspaces are too few for a test: the signed-rank test can reach 0.05 with "
            f"{MIN_TESTED} or more. Ranks and gains describe these workspaces alone"
        )
    distinct = len({workspace.classes for workspace in workspaces})
    if distinct < len(workspaces):
        notes["data_sets"] = (
            f"{len(workspaces)} workspaces have {distinct} different lists of classes: seeds or splits of one data set "
            "are not independent, so that intervals are too narrow and tests reject too often (Nadeau and Bengio 2003)"
        )
    return notes


def _summary(workspaces: Sequence[WorkspaceScores], metric: str, sign: float) -> str:
    """Return a sentence on the gain of the recommended model over the best single member; "" if it is unknown."""
    gains: Mapping[str, float] = {
        workspace.name: sign * (recommended - single)
        for workspace in workspaces
        if (recommended := workspace.scores.get(RECOMMENDED)) is not None
        and (single := workspace.scores.get(BEST_SINGLE)) is not None
    }
    if len(gains) < len(workspaces):
        return ""
    values = np.array(list(gains.values()))
    low, high = _interval(values) if len(values) >= MIN_TESTED else (None, None)
    interval = f" [{low:+.4f}, {high:+.4f}]" if low is not None else ""
    listed = ", ".join(f"{gain:+.4f} on {name}" for name, gain in gains.items())
    return (
        f"the recommended model gains {values.mean():+.4f}{interval} in {metric} over the best single member, "
        f"mean of {len(values)} workspaces" + (f" ({listed})" if len(values) < MIN_TESTED else "")
    )
