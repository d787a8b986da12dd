"""`predict --from-export` with files of strangers: an error that names the file, never an answer, a hang or a crash."""

from __future__ import annotations

import csv
import json
import time

import numpy as np
import pytest
from hostile_onnx import HOSTILE, INVALID_ROWS, valid
from in_process import run
from PIL import Image

SECONDS = 120.0  # a hang, on however busy a machine


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name, side in (("a.png", 8), ("b.png", 11), ("c.png", 30)):
        Image.fromarray(np.full((side, side + 2, 3), side, dtype=np.uint8)).save(folder / name)
    return folder


def predicted(folder, images, *options):
    start = time.monotonic()
    done = run("predict", "--from-export", folder / "model.onnx", *options, images)
    assert time.monotonic() - start < SECONDS
    assert "Traceback" not in done.stdout + done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert not list(folder.rglob("canary"))
    return done


def test_the_file_that_the_others_are_made_of_answers(tmp_path, images):
    valid(tmp_path / "model.onnx")
    done = predicted(tmp_path, images)
    assert (done.code, done.stdout.count("0.75")) == (0, 3)


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_an_error_that_names_it(tmp_path, images, what):
    HOSTILE[what](tmp_path / "model.onnx")
    done = predicted(tmp_path, images, "--to", tmp_path / "answers.csv")
    assert done.code == 1, done.stdout + done.stderr
    assert str(tmp_path / "model.onnx") in done.stderr
    answers = tmp_path / "answers.csv"
    rows = csv.DictReader(answers.read_text().splitlines()) if answers.exists() else ()
    assert not any(row["class"] for row in rows)


@pytest.mark.parametrize("what", INVALID_ROWS)
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_rows_that_are_no_probabilities_are_errors_of_their_images(tmp_path, images, what, form):
    INVALID_ROWS[what](tmp_path / "model.onnx")
    done = predicted(tmp_path, images, "--format", form, "--probabilities")
    assert done.code == 4
    records = csv.DictReader(done.stdout.splitlines()) if form == "csv" else map(json.loads, done.stdout.splitlines())
    for record in records:
        assert not any(record.get(key) for key in ("class", "probability", "probabilities", "p:a"))
        assert "its probabilities" in record["error"]
