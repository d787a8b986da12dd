"""The progress file of a training: read where it is whole and of the same key, else removed."""

from __future__ import annotations

import torch
from given_predictions import logged

from utils.training.progress import TrainingProgress


def test_progress_that_is_damaged_or_of_something_else_is_named_and_removed(tmp_path, caplog):
    path = tmp_path / "progress_student.pth"
    TrainingProgress(path, "one").save({"tensor": torch.arange(5000)})
    whole = path.read_bytes()
    assert torch.equal(TrainingProgress(path, "one").load()["tensor"], torch.arange(5000))
    for content, key, words in (
        (whole, "two", "belongs to another teacher, other images or settings"),
        (whole[: len(whole) // 2], "one", "is damaged"),
        (whole[:5000] + b"!" + whole[5001:], "one", "is damaged"),
    ):
        path.write_bytes(content)
        caplog.clear()
        with logged(caplog):
            assert TrainingProgress(path, key).load() is None
        assert f"{path} {words}" in caplog.text
        assert not path.exists()
