"""95% intervals of the one-vs-rest metrics of each class: Wilson's for rates, and areas by the influences of rows."""

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
    """Return {metric: [low, high]} for each class, from probabilities (N, C), labels (N,) and groups (N,).

    The metrics are `sensitivity`, `specificity`, `positive_predictive_value`, `negative_predictive_value`, `roc_auc`
    and `average_precision`; those with too few rows or groups are missing. None for more than 1,000 classes, whose
    intervals would make up most of the record.
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
        name: proportion_interval(is_right[is_counted], None if units is None else units[is_counted])
        for name, is_counted in rows.items()
        if is_counted.any()
    }
    return {name: list(interval) for name, interval in bounds.items() if interval is not None}


def _areas(areas: ClassAreas, units: NDArray[np.int64] | None) -> Intervals:
    """Return the intervals of the areas; empty where the class or the rest has fewer than five rows, or groups."""
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
