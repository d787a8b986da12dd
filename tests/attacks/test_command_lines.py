"""Words that no command takes are mistakes of usage, whatever they consist of."""

from __future__ import annotations

import pytest
from in_process import run


@pytest.mark.parametrize("word", ["", " ", "\n", "\t\t", "\x1b[2J", "\udcff", "-", "x" * 5000])
@pytest.mark.parametrize("line", [("audit", "--strict"), ("status",), ("discover", "--verify")])
def test_a_word_too_many(tmp_path, line, word):
    done = run(*line, word, workspace=tmp_path)
    assert done.code == 2, done.stderr
    assert "unrecognized arguments" in done.stderr
    assert "\x1b" not in done.stderr
