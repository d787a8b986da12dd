"""DeLong's test of two areas under the ROC curve: against pROC, against resampling, and with groups."""

from __future__ import annotations

import numpy as np
import pytest
from asah import IS_POOR, NDKA, S100B, WFNS

from utils.numeric.areas import mean_areas
from utils.numeric.delong import compare_areas, influence_variance
from utils.numeric.metrics import softmax

PUBLISHED = {  # tests/testthat/test-roc.test.R of pROC 1.18
    "wfns, s100b": (WFNS, S100B, 2.20898359144091, 0.0271757822291882, 0.0104061769564846, 0.174214419249478),
    "wfns, ndka": (WFNS, NDKA, 2.79777591868904, 0.00514557970691098, 0.0634011709339876, 0.3600405634833566),
    "ndka, s100b": (NDKA, S100B, -1.39077002573558, 0.164295175223054, -0.2876917446341914, 0.0488706064228094),
}


def of_marker(marker):
    """Areas of two classes whose probabilities rise with the marker."""
    scaled = marker / (marker.max() + 1)
    return mean_areas(np.stack([1 - scaled, scaled], axis=1), IS_POOR.astype(np.int64))


def random_rows(seed, count=300, classes=3, strength=1.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    logits = rng.normal(size=(count, classes))
    logits[np.arange(count), labels] += strength
    return softmax(logits), labels


@pytest.mark.parametrize("pair", PUBLISHED)
def test_the_figures_that_proc_publishes_are_reproduced(pair):
    first, second, z, p_value, low, high = PUBLISHED[pair]
    found = compare_areas(of_marker(first), of_marker(second), IS_POOR)
    assert found.difference / found.standard_error == pytest.approx(z, abs=1e-6)
    assert found.p_value == pytest.approx(p_value, abs=1e-6)
    assert found.interval == pytest.approx((low, high), abs=1e-6)


def test_the_variance_of_a_mean_over_classes_is_that_of_rows_drawn_anew():
    probabilities, labels = random_rows(1)
    areas = mean_areas(probabilities, labels)
    rng, drawn = np.random.default_rng(2), []
    rows_of = [np.flatnonzero(labels == index) for index in range(3)]
    for _ in range(400):
        rows = np.concatenate([rng.choice(rows, len(rows)) for rows in rows_of])
        drawn.append(mean_areas(probabilities[rows], labels[rows]).roc_auc)
    variance = influence_variance(areas.roc_auc_influence, labels)
    assert np.var(drawn) == pytest.approx(variance, rel=0.2)


def test_copies_of_a_row_in_one_group_are_no_further_evidence():
    (probabilities, labels), (other, _) = random_rows(3), random_rows(4)
    other = softmax(np.log(other) + 0.5 * np.log(probabilities))
    alone = compare_areas(mean_areas(probabilities, labels), mean_areas(other, labels), labels)
    tripled = np.repeat(np.arange(len(labels)), 3)
    areas = [mean_areas(scores[tripled], labels[tripled]) for scores in (probabilities, other)]
    grouped = compare_areas(*areas, labels[tripled], tripled)
    assert grouped.standard_error == pytest.approx(alone.standard_error, rel=0.02)
    assert compare_areas(*areas, labels[tripled]).standard_error < 0.7 * grouped.standard_error


def test_equal_models_few_rows_and_one_class():
    probabilities, labels = random_rows(5)
    areas = mean_areas(probabilities, labels)
    assert (compare_areas(areas, areas, labels).p_value, compare_areas(areas, areas, labels).interval) == (1.0, None)
    few, other = (mean_areas(random_rows(seed)[0][:9], labels[:9]) for seed in (5, 6))
    assert compare_areas(few, other, labels[:9]).p_value is None
    single = np.zeros(20, dtype=np.int64)
    assert compare_areas(*[mean_areas(probabilities[:20], single)] * 2, single) is None
