"""Damaged records of the base pipeline: errors that name the file, not tracebacks."""

from __future__ import annotations

import json

import pytest

from config import settings
from training.ledger import Ledger
from utils.checkpoint_manager import CheckpointManager
from utils.files import read_json

DAMAGE = [
    "",
    "[1]",
    "null",
    "3",
    '"x"',
    '{"units": []}',
    '{"results": 3}',
    '{"completed_backbones": {}}',
    "[" * 100_000,
]
ENTRY = {"digest": "0" * 64, "seconds": 1.5, "result": {}, "files": {"checkpoints/a.pth": [1, 2, "0" * 64]}}
ENTRIES = [
    None,
    [],
    {},
    *({**ENTRY, key: wrong} for key in ENTRY for wrong in (None, 3 if key != "seconds" else "x")),
    {**ENTRY, "files": {"a": [1]}},
    {**ENTRY, "files": {"a": None}},
]


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "CKPT_DIR", tmp_path)
    return tmp_path / ".recovery_state.json"


@pytest.mark.parametrize("text", DAMAGE)
def test_a_damaged_recovery_state_is_named(state, text):
    state.write_text(text)
    with pytest.raises(ValueError, match=rf"{state}: damaged.*remove the file and run the pipeline again"):
        Ledger()
    if "units" not in text:
        with pytest.raises(ValueError, match=rf"{state}: damaged"):
            CheckpointManager(state.parent).get_recovery_status()


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_a_damaged_unit_is_named(state, entry):
    state.write_text(json.dumps({"units": {"a train": ENTRY, "b train": entry}}))
    with pytest.raises(ValueError, match=rf"{state}: damaged, its unit 'b train' is not what this pipeline writes"):
        Ledger()


def test_a_whole_state_and_none_are_read(state):
    assert Ledger().units == {}
    state.write_text(json.dumps({"units": {"a train": ENTRY}, "results": {}, "completed_backbones": ["a"], "more": 1}))
    assert Ledger().units == {"a train": ENTRY}
    assert read_json(state.parent / "none.json") is None
