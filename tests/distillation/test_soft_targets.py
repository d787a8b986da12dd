"""Stored targets: half precision, the largest of many classes, and whose they are."""

from __future__ import annotations

import numpy as np
import pytest
from given_predictions import logged

from utils.core.errors import UserError
from utils.distillation.soft_targets import TOP_CLASSES, content_digest, load, log_probabilities, pack, save, unpack


def targets(views: int, rows: int, classes: int, spread: float = 0.1) -> np.ndarray:
    drawn = np.random.default_rng(1).dirichlet(np.full(classes, spread), size=(views, rows))
    return log_probabilities(drawn)


def test_few_classes_are_kept_whole_and_a_missing_row_stays_missing():
    given = targets(2, 7, 10)
    given[1, 3] = np.nan
    found = unpack(pack(given))
    assert np.isnan(found[1, 3]).all()
    known = ~np.isnan(given)
    np.testing.assert_allclose(np.exp(found[known]), np.exp(given[known]), atol=2e-3)
    np.testing.assert_allclose(np.exp(found[0]).sum(axis=1), 1, atol=1e-6)
    assert found.dtype == np.float32


def test_of_many_classes_the_largest_are_kept_and_the_rest_is_spread():
    given = targets(1, 20, 300, spread=1.0)
    given[0, 4] = np.nan
    packed = pack(given)
    assert packed["values"].shape == packed["places"].shape == (1, 20, TOP_CLASSES)
    found = unpack(packed)
    assert np.isnan(found[0, 4]).all()
    assert np.exp(found[0, 0]).sum() == pytest.approx(1, abs=1e-5)
    best = np.argsort(-given[0, 0])
    np.testing.assert_allclose(
        np.exp(found[0, 0, best[:TOP_CLASSES]]), np.exp(given[0, 0, best[:TOP_CLASSES]]), rtol=5e-3
    )
    assert np.ptp(found[0, 0, best[TOP_CLASSES:]]) == 0


def test_zero_probability_is_no_infinity():
    assert np.isfinite(unpack(pack(log_probabilities(np.array([[[1.0, 0.0, 0.0]]]))))).all()


def test_five_thousand_images_in_four_views_take_less_than_two_megabytes(tmp_path):
    save(tmp_path / "targets.npz", "key", pack(targets(4, 5000, 10)))
    assert (tmp_path / "targets.npz").stat().st_size < 2e6


def test_targets_of_another_teacher_are_named_and_not_used(tmp_path, caplog):
    path, packed = tmp_path / "targets.npz", pack(targets(1, 5, 3))
    assert load(path, "one") is None
    save(path, "one", packed)
    assert content_digest(load(path, "one")) == content_digest(packed)
    with logged(caplog):
        assert load(path, "another") is None
    assert f"{path}: targets of another teacher" in caplog.text
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="Remove it, then distill again"):
        load(path, "one")


def test_the_digest_is_of_the_content():
    one, other = pack(targets(1, 5, 3)), pack(targets(1, 5, 3))
    assert content_digest(one) == content_digest(other)
    other["values"][0, 0, 0] -= 1
    assert content_digest(one) != content_digest(other)
