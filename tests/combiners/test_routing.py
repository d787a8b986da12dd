"""Running only the members that rows need."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from utils.combiners.routing import SparseCombiner, routed_members, run_sparse
from utils.numeric.metrics import softmax


@dataclass
class FirstThenSecond(SparseCombiner):
    """Member 0, and member 1 for rows on which class 0 leads."""

    @classmethod
    def configured(cls, config, members):
        return cls()

    def _fit(self, logits, labels, folds):
        pass

    def route(self, logits, ran):
        second = ran[0] & (logits[0].argmax(axis=1) == 0)
        return np.stack([~ran[0], second & ~ran[1], np.zeros_like(second)])

    def _predict_proba(self, logits):
        second = logits[0].argmax(axis=1) == 0
        return softmax(np.where(second[:, None], logits[1], logits[0]))

    def _to_module(self):
        raise NotImplementedError

    def restricted(self, used):
        return self

    def report(self, names):
        return {}


LOGITS = np.random.default_rng(3).normal(size=(3, 40, 4)).astype(np.float32)


def test_members_run_once_on_the_rows_that_need_them():
    calls = []

    def run(member, rows):
        calls.append((member, rows))
        return LOGITS[member, rows]

    probabilities, ran = run_sparse(FirstThenSecond(), run, LOGITS.shape)
    assert [member for member, _ in calls] == [0, 1]
    np.testing.assert_array_equal(calls[1][1], np.flatnonzero(LOGITS[0].argmax(axis=1) == 0))
    assert ran[0].all()
    assert not ran[2].any()
    assert probabilities.tobytes() == FirstThenSecond().predict_proba(LOGITS).tobytes()


def test_routed_members_are_those_that_run():
    ran = routed_members(FirstThenSecond(), LOGITS)
    np.testing.assert_array_equal(ran[1], LOGITS[0].argmax(axis=1) == 0)
