"""One file of predictions is read as it is meant, or refused by what is wrong with it."""

from __future__ import annotations

import pickle
import zipfile

import numpy as np
import pytest
from given_predictions import arrays

from utils.core.errors import UserError
from utils.predictions import prediction_files


def read(tmp_path, given, **options):
    np.savez(tmp_path / "x.npz", **given)
    return prediction_files.read(tmp_path / "x.npz", what="predictions of bayes", remedy="Mend it", **options)


def test_logits_are_kept_as_they_are(tmp_path):
    given = arrays("oof", 1)
    found = read(tmp_path, given, needs=("fold",))
    assert found.kind == "logits"
    assert found.classes == ("ant", "bee", "cat")
    assert found.embeddings is None
    for name in ("logits", "labels", "sample_ids", "fold"):
        assert np.array_equal(getattr(found, name), given[name])


def test_probabilities_are_taken_as_their_logarithm_clipped(tmp_path):
    given = {"probabilities": np.array([[0.25, 0.75], [0.0, 1.0]]), "sample_ids": np.array(["a", "b"])}
    found = read(tmp_path, given)
    assert found.logits.dtype == np.float32
    np.testing.assert_allclose(found.logits, np.log([[0.25, 0.75], [1e-12, 1.0]]), rtol=1e-6)
    assert (found.kind, found.classes, found.fold) == ("probabilities", None, None)
    assert found.labels.tolist() == [-1, -1]
    half = read(tmp_path, given | {"probabilities": given["probabilities"].astype(np.float16)})
    assert half.kind == "half-precision probabilities"


def test_names_of_classes_may_be_numbers_and_embeddings_of_half_precision(tmp_path):
    more = {"classes": np.array([7, 3, 5]), "embeddings": np.ones((30, 4), dtype=np.float16)}
    found = read(tmp_path, arrays("val", 1) | more)
    assert found.classes == ("7", "3", "5")
    assert found.embeddings.dtype == np.float32


def spoilt(key, place, value):
    def spoil(given):
        changed = np.array(given[key])
        changed[place] = value
        return given | {key: changed}

    return spoil


def as_probabilities(given):
    values = np.exp(given["logits"] - given["logits"].max(axis=1, keepdims=True))
    rest = {key: value for key, value in given.items() if key != "logits"}
    return rest | {"probabilities": values / values.sum(axis=1, keepdims=True)}


def without(*keys):
    return lambda given: {key: value for key, value in given.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (spoilt("logits", ([3, 5], 1), np.nan), "2 rows have NaN or infinite logits, first "),
        (spoilt("logits", (3, 1), -np.inf), r"1 rows have .* \(log of 0\? Give probabilities instead\)"),
        (lambda a: a | {"logits": a["logits"].astype(np.float64) * 1e300}, "30 rows have NaN or infinite logits"),
        (
            lambda a: spoilt("probabilities", (slice(2), 1), 2.0)(as_probabilities(a)),
            "of 2 rows do not sum to 1 within",
        ),
        (lambda a: spoilt("probabilities", (0, 1), -0.5)(as_probabilities(a)), "1 rows have probabilities below 0"),
        (lambda a: a | {"sample_ids": np.repeat(a["sample_ids"][:15], 2)}, "the sample id [a-z]+/20.* occurs twice"),
        (lambda a: a | {"classes": np.array(["ant", "bee", "ant"])}, "the class ant occurs twice"),
        (spoilt("labels", 0, 3), "its labels reach from 0 to 3 for 3 classes"),
        (spoilt("labels", 0, -2), "its labels reach from -2 to 2 for 3 classes"),
        (lambda a: a | {"labels": a["labels"].astype(float)}, "labels hold float64; expected whole numbers"),
        (lambda a: a | {"sample_ids": np.arange(30)}, "sample_ids hold int64; expected text"),
        (lambda a: a | {"sample_ids": a["sample_ids"].astype(bytes)}, r"sample_ids hold \|S.*; expected text"),
        (lambda a: a | {"sample_ids": np.array([f"{n}\ud800" for n in range(30)])}, "a sample id is no text"),
        (lambda a: a | {"logits": a["logits"].astype("V4")}, r"logits hold \|V4; expected numbers"),
        (lambda a: a | {"labels": a["labels"][:-1]}, r"labels of shape \(29,\) beside logits of shape \(30, 3\)"),
        (lambda a: a | {"classes": a["classes"][:-1]}, r"classes of shape \(2,\)"),
        (lambda a: a | {"embeddings": np.ones(30)}, r"embeddings of shape \(30,\)"),
        (lambda a: a | {"embeddings": np.full((30, 2), np.inf)}, "30 rows have NaN or infinite embeddings"),
        (lambda a: a | {"logits": a["logits"][:, :1]}, r"logits of shape \(30, 1\); expected a row per sample"),
        (lambda a: a | {"logits": a["logits"][:0]}, r"logits of shape \(0, 3\)"),
        (lambda a: a | {"logits": a["logits"].ravel()}, r"logits of shape \(90,\)"),
        (without("logits", "sample_ids"), "no array logits, sample_ids"),
    ],
)
def test_what_does_not_fit_is_named_with_the_member(tmp_path, change, words):
    with pytest.raises(UserError, match=rf"x\.npz: predictions of bayes refused: .*({words}).*Mend it"):
        read(tmp_path, change(arrays("val", 1)))


def test_arrays_that_are_needed_are_asked_for(tmp_path):
    with pytest.raises(UserError, match="no array fold"):
        read(tmp_path, arrays("val", 1), needs=("labels", "fold"))


def test_the_tolerance_of_sums_can_be_wider(tmp_path):
    given = {"probabilities": np.array([[0.5, 0.505]]), "sample_ids": np.array(["a"])}
    with pytest.raises(UserError, match=r"do not sum to 1 within 0\.001, first a with 1\.005"):
        read(tmp_path, given)
    assert read(tmp_path, given, sum_tolerance=0.01).logits.shape == (1, 2)


def test_pickled_objects_are_refused_and_nothing_of_them_runs(tmp_path):
    canary = tmp_path / "canary"

    class Hostile:
        def __reduce__(self):
            import os

            return os.system, (f"touch {canary}",)

    given = arrays("val", 1)
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (30,)}\n"
    np.savez(tmp_path / "x.npz", **without("sample_ids")(given))
    with zipfile.ZipFile(tmp_path / "x.npz", "a") as archive:
        size = len(header).to_bytes(2, "little")
        archive.writestr("sample_ids.npy", b"\x93NUMPY\x01\x00" + size + header + pickle.dumps(Hostile()))
    with pytest.raises(UserError, match=r"sample_ids\.npy holds pickled objects"):
        prediction_files.read(tmp_path / "x.npz", what="predictions", remedy="")
    assert not canary.exists()
    np.load(tmp_path / "x.npz", allow_pickle=True)["sample_ids"]  # the planted object is a live one
    assert canary.exists()
