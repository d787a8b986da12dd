"""What is given as an answer is a probability for each class, whoever gives it; else its image has none."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import PROJECT
from finished_workspace import at
from in_process import run
from onnx_files import fixed, of_brightness
from PIL import Image

from utils.building import ensembles
from utils.inference import onnx_prediction

NAN, INFINITY = float("nan"), float("inf")
GOOD = (0.25, 0.75)
BAD = {
    "nan": ((NAN, NAN), "NaN or infinity among its probabilities"),
    "one-nan": ((1.0, NAN), "NaN or infinity among its probabilities"),
    "infinity": ((INFINITY, 0.0), "NaN or infinity among its probabilities"),
    "huge": ((1e30, 0.0), "its probabilities must be in [0, 1]; one is 1e+30"),
    "negative": ((-0.5, 1.5), "its probabilities must be in [0, 1]; one is -0.5"),
    "sum": ((0.25, 0.25), "its probabilities sum to 0.5; expected 1 within 0.01"),
}
SHAPES = {
    "one-row-for-all": (np.array([GOOD], dtype=np.float32), "float32 (1, 2)"),
    "no-rows": (np.array(GOOD, dtype=np.float32), "float32 (2,)"),
    "a-single-number": (np.array(0.5, dtype=np.float32), "float32 ()"),
    "a-class-too-many": (np.full((3, 3), 1 / 3, dtype=np.float32), "float32 (3, 3)"),
    "whole-numbers": (np.array([[0, 1]] * 3), "int64 (3, 2)"),
}


@pytest.fixture
def images(tmp_path):
    """Two dark images and, between them, a bright one."""
    paths = [tmp_path / f"{name}.png" for name in ("first", "second", "third")]
    for path, colour in zip(paths, ("black", "white", "black"), strict=True):
        Image.new("RGB", (12, 12), colour).save(path)
    return paths


def strictly(text):
    """JSON as the standard has it, without NaN."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(("row", "reason"), BAD.values(), ids=BAD)
def test_a_bad_answer_of_an_export_costs_its_image_alone(tmp_path, images, row, reason):
    model = of_brightness(tmp_path / "model.onnx", row, GOOD)
    done = run("predict", "--from-export", model, *images, "--json", "--probabilities")
    assert done.code == 4, done.stdout
    records = strictly(done.stdout)["images"]
    assert [record["class"] for record in records] == ["b", None, "b"]
    assert [record["error"] for record in records] == [None, reason, None]
    assert records[1]["probability"] is None
    assert f"{images[1]}: {reason}" in done.stderr


def test_a_bad_answer_is_a_record_with_its_error_in_a_file(tmp_path, images):
    model, to = of_brightness(tmp_path / "model.onnx", (NAN, NAN), GOOD), tmp_path / "answers.csv"
    done = run("predict", "--from-export", model, *images, "--to", to, "--probabilities")
    assert done.code == 4
    with to.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["probability"] for row in rows] == ["0.75", "", "0.75"]
    assert rows[1]["error"] == BAD["nan"][1]
    assert "nan" not in [value for row in rows for value in row.values()]


def test_half_precision_is_near_enough(tmp_path, images):
    model = fixed(tmp_path / "model.onnx", np.array([[0.332, 0.6655]] * 3, dtype=np.float16))
    done = run("predict", "--from-export", model, *images, "--json")
    assert done.code == 0, done.stderr
    assert [record["class"] for record in done.document["images"]] == ["b"] * 3


@pytest.mark.parametrize(("answer", "form"), SHAPES.values(), ids=SHAPES)
def test_an_output_of_another_form_is_an_error_that_names_the_file(tmp_path, images, answer, form):
    model, to = fixed(tmp_path / "model.onnx", answer), tmp_path / "answers.csv"
    done = run("predict", "--from-export", model, *images, "--to", to)
    assert done.code == 1, done.stderr
    assert f"--from-export {model}: the probabilities of 3 images are {form}; expected floats (3, 2)" in done.stderr


def delivered(tmp_path, model, images, *options):
    program = tmp_path / "predict.py"
    shutil.copyfile(onnx_prediction.__file__, program)
    command = [sys.executable, "-P", str(program), "--model", str(model), *map(str, images), *options]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)


def test_the_delivered_program_gives_no_row_for_a_bad_answer(tmp_path, images):
    model = of_brightness(tmp_path / "model.onnx", (NAN, NAN), GOOD)
    done = delivered(tmp_path, model, images, "--json")
    assert done.returncode == 1
    assert [strictly(line)["file"] for line in done.stdout.splitlines()] == [str(images[0]), str(images[2])]
    assert done.stderr == f"predict: {images[1]}: {BAD['nan'][1]}\n"


def test_the_delivered_program_refuses_an_output_of_another_form(tmp_path, images):
    done = delivered(tmp_path, fixed(tmp_path / "model.onnx", SHAPES["one-row-for-all"][0]), images)
    assert (done.returncode, done.stdout) == (1, "")
    assert "model.onnx: the probabilities of 3 images are float32 (1, 2)" in done.stderr


def test_a_bad_answer_of_a_workspace_costs_its_image_alone(built, monkeypatch):
    """A combiner that gives no probability for the second of its rows, though its members' logits are finite."""
    original = ensembles.predict

    def spoilt(ensemble, rows):
        probabilities = original(ensemble, rows)
        probabilities[1] = NAN
        return probabilities

    monkeypatch.setattr(ensembles, "predict", spoilt)
    paths = sorted((at(built).split_dir / "test").rglob("*.png"))[:3]
    config = ("--config", PROJECT / "configs" / "votes.yaml")
    done = run("predict", "--model-name", "soft_voting_ensemble", *paths, "--json", *config, workspace=built)
    assert done.code == 4, done.stderr
    records = strictly(done.stdout)["images"]
    assert [record["error"] for record in records] == [None, BAD["nan"][1], None]
    assert [record["disagreement"] is None for record in records] == [False, True, False]
