"""95% intervals of the figures of each class against the rest: Wilson's of rates, and areas by rows' influences."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.numeric.areas import ClassAreas, class_areas
from utils.numeric.delong import influence_variance
from utils.numeric.means import count_units
from utils.numeric.metric_intervals import AREA_WIDENING, MIN_CLASS_ROWS, score_interval, widening_of_classes
from utils.numeric.metrics import MAX_LISTED_CLASSES, check_probabilities
from utils.numeric.proportions import proportion_interval

Intervals = dict[str, list[float]]


def class_intervals(
    probabilities: ArrayLike, labels: ArrayLike, groups: ArrayLike | None = None
) -> list[Intervals] | None:
    """Return {figure: [low, high]} of each class, of probabilities (N, C) with labels (N,) and groups (N,).

    The figures are `sensitivity`, `specificity`, `positive_predictive_value`, `negative_predictive_value`, `roc_auc`
    and `average_precision`; those of too few rows or groups are missing. None for more than 1,000 classes, whose
    intervals would be most of the record.
    """
    scores, truth = check_probabilities(probabilities, labels)
    if scores.shape[1] > MAX_LISTED_CLASSES:
        return None
    winners = scores.argmax(axis=1)
    units = None if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    intervals = [_rates(truth == index, winners == index, units) for index in range(scores.shape[1])]
    for areas in class_areas(scores, truth, influences=True):
        intervals[areas.index] |= _areas(areas, units)
    return intervals


def _rates(is_class: NDArray[np.bool_], is_predicted: NDArray[np.bool_], units: NDArray[np.int64] | None) -> Intervals:
    is_right = is_class == is_predicted
    rows = {
        "sensitivity": is_class,
        "specificity": ~is_class,
        "positive_predictive_value": is_predicted,
        "negative_predictive_value": ~is_predicted,
    }
    bounds = {
        name: proportion_interval(is_right[chosen], None if units is None else units[chosen])
        for name, chosen in rows.items()
        if chosen.any()
    }
    return {name: list(interval) for name, interval in bounds.items() if interval is not None}


def _areas(areas: ClassAreas, units: NDArray[np.int64] | None) -> Intervals:
    """Of a class and a rest of at least five rows, or groups, each."""
    sides = [
        count_units(int(side.sum()), None if units is None else units[side])
        for side in (areas.is_positive, ~areas.is_positive)
    ]
    if min(sides) < MIN_CLASS_ROWS:
        return {}
    widening = AREA_WIDENING * widening_of_classes(sum(sides), len(sides), min(sides))
    values = {
        "roc_auc": (areas.roc_auc, areas.roc_auc_influence),
        "average_precision": (areas.average_precision, areas.average_precision_influence),
    }
    return {
        name: list(
            score_interval(
                value, influence_variance(influence, areas.is_positive, units) * widening**2, float(min(sides))
            )
        )
        for name, (value, influence) in values.items()
    }
