"""The check that train and val rows share one embedding space, on synthetic networks with a known last layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from utils.building.embedding_rows import require_shared_space
from utils.core.errors import UserError
from utils.predictions.rows import MemberRows

CLASSES = ("a", "b", "c")
WIDTH = 6
RNG = np.random.default_rng(0)
LAYER = RNG.normal(size=(WIDTH, len(CLASSES)))


def rows(split: str, n: int, *, noise: float = 0.05) -> MemberRows:
    embeddings = RNG.normal(size=(n, WIDTH))
    logits = embeddings @ LAYER + noise * RNG.normal(size=(n, len(CLASSES)))
    labels, ids = logits.argmax(axis=1), np.array([f"{split}/{row}" for row in range(n)])
    return MemberRows(split, CLASSES, ids, labels, logits, np.ones(n, dtype=bool), embeddings)


def test_rows_of_one_network_share_a_space():
    correlation = require_shared_space("m", rows("train", 200), rows("val", 80))
    assert correlation is not None
    assert correlation > 0.99


def test_a_constant_added_to_all_logits_of_a_row_does_not_matter():
    train = rows("train", 200)
    shifted = replace(train, logits=train.logits + RNG.normal(size=(200, 1)) * 100)
    correlation = require_shared_space("m", shifted, rows("val", 80))
    assert correlation is not None
    assert correlation > 0.99


def test_rows_of_another_space_are_refused_with_the_remedy():
    train = rows("train", 200)
    with pytest.raises(UserError, match=r"member m: .*train_embeddings=val"):
        require_shared_space("m", replace(train, embeddings=-train.embeddings), rows("val", 80))


def test_logits_that_do_not_follow_from_embeddings_leave_the_question_open():
    val = rows("val", 80)
    unrelated = replace(val, logits=RNG.normal(size=val.logits.shape))
    assert require_shared_space("m", rows("train", 200), unrelated) is None
