"""Log lines about the progress of a prediction."""

from __future__ import annotations

import logging

from given_predictions import logged

from utils.inference import prediction_progress as progress_module
from utils.inference.prediction_progress import PredictionProgress


def test_progress_logs_the_fraction_done_and_the_remaining_time(caplog, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO, "disease_pipeline")
    progress = PredictionProgress(100, 2)
    with logged(caplog):
        for seconds in (5.0, 12.0):
            now[0] = seconds
            progress.step(10)
        now[0] = 30.0
        progress.end_block(50)
    messages = list(dict.fromkeys(entry.getMessage() for entry in caplog.records))
    assert messages == ["10% of 100 images by 2 networks; about 108 s left", "[50/100] images; about 30 s left"]


def test_unreadable_images_count_as_done_at_the_end_of_a_block():
    progress = PredictionProgress(10, 2)
    progress.step(3)
    progress.end_block(5)
    assert progress.done == 10
