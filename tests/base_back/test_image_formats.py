"""Image files of other formats than networks are trained on: named and refused, without a decoder of theirs."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT
from finished_workspace import at
from in_process import run
from onnx_files import constant
from PIL import Image

from utils import image_files, samples
from utils.datasets import OptimizedImageDataset
from utils.evaluation.report.thumbnails import thumbnail
from utils.exporting.parity_rows import decode_image
from utils.inference import onnx_prediction

NAME = "soft_voting_ensemble"
CONFIG = ("--config", PROJECT / "configs" / "votes.yaml")
REFUSAL = "its content is of the format EPS; expected one of MPO, JPEG, PNG, BMP, TIFF, WEBP"
EPS = """%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 16 16
%%EndComments
%%EndProlog
0 0 16 16 rectfill
showpage
%%EOF
"""


@pytest.fixture
def eps(tmp_path) -> Path:
    path = tmp_path / "drawing.png"
    path.write_text(EPS)
    return path


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A function that tells how often `gs` was started."""
    from PIL import EpsImagePlugin

    folder, mark = tmp_path / "programs", tmp_path / "started"
    folder.mkdir()
    program = folder / "gs"
    program.write_text(f'#!/bin/sh\necho "$@" >> "{mark}"\n[ "$*" = --version ]\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks for it once in a process
    return lambda: len(mark.read_text().splitlines()) if mark.exists() else 0


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An ONNX file that answers 0.25 and 0.75 for every image."""
    return constant(tmp_path_factory.mktemp("model") / "model.onnx", [0.25, 0.75])


def test_the_program_is_started_where_pillow_may_choose_the_decoder(eps, ghostscript):
    with Image.open(eps) as image, pytest.raises(subprocess.CalledProcessError):
        image.load()
    assert ghostscript() == 2  # for its version, then for the pixels


def test_predict_refuses_it(eps, ghostscript, built):
    done = run("predict", "--model-name", NAME, eps, "--json", *CONFIG, workspace=built)
    assert done.code == 4, done.stderr
    assert done.document["images"][0]["error"] == f"cannot be decoded ({REFUSAL})"
    assert ghostscript() == 0


def test_predict_from_export_refuses_it_and_answers_the_rest(eps, ghostscript, model, tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "good.png")
    done = run("predict", "--from-export", model, eps, tmp_path / "good.png", "--json")
    assert done.code == 4, done.stderr
    first, second = done.document["images"]
    assert first["error"] == f"cannot be decoded ({REFUSAL})"
    assert (second["class"], second["error"]) == ("b", None)
    assert ghostscript() == 0


def test_the_delivered_program_refuses_it(eps, ghostscript, model, tmp_path):
    program = tmp_path / "predict.py"
    shutil.copyfile(onnx_prediction.__file__, program)
    command = [sys.executable, "-P", str(program), "--model", str(model), str(eps)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"predict: {eps}: cannot be decoded ({REFUSAL})\n"
    assert ghostscript() == 0


def test_a_split_with_it_is_refused(eps, ghostscript, own_copy):
    image = next(at(own_copy).split_dir.glob("val/*/*.png"))
    shutil.copyfile(eps, image)
    done = run("discover", "--verify", *CONFIG, workspace=own_copy)
    assert done.code == 4, done.stderr
    assert f"{image}: cannot be decoded ({REFUSAL})" in done.stderr
    assert ghostscript() == 0


def test_the_base_pipeline_refuses_to_split_it(eps, ghostscript, tmp_path):
    data = tmp_path / "data"
    for name in "ab":
        (data / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.full((16, 16, 3), 40 * number + 20 * (name == "b"), dtype=np.uint8)
            Image.fromarray(pixels).save(data / name / f"{number}.png")
    shutil.copyfile(eps, data / "a" / "9.png")
    program = PROJECT / "BASE-BACK" / "src" / "main.py"
    done = subprocess.run(
        [sys.executable, str(program), "--stages", "split", "--data", str(data)],
        env=os.environ | {"DBT_BASE_DIR": str(tmp_path / "base")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert REFUSAL in done.stdout + done.stderr
    assert ghostscript() == 0


def test_nothing_else_that_reads_pixels_opens_it(eps, ghostscript):
    assert thumbnail(eps).problem == f"cannot be decoded ({REFUSAL})"
    with pytest.raises(OSError, match=REFUSAL):
        decode_image(eps)
    with pytest.raises(ValueError, match=REFUSAL):
        OptimizedImageDataset([(str(eps), 0)], ["a"])[0]
    assert ghostscript() == 0


@pytest.mark.parametrize("kind", ["jpeg", "mpo", "png", "bmp", "tiff", "webp"])
def test_the_formats_of_photographs_are_opened_whatever_the_name(kind, tmp_path):
    path = tmp_path / "image.png"
    image = Image.new("RGB", (20, 20), "red")
    image.save(path, kind, **({"save_all": True, "append_images": [image]} if kind == "mpo" else {}))
    with image_files.open_image(path) as opened:
        assert opened.convert("RGB").getpixel((10, 10))[0] > 250


@pytest.mark.parametrize("kind", ["gif", "ico", "ppm", "pcx"])
def test_another_format_is_named(kind, tmp_path):
    path = tmp_path / "image.jpg"
    Image.new("RGB", (20, 20)).save(path, kind)
    with pytest.raises(OSError, match=f"of the format {kind.upper()}; expected one of"):
        image_files.open_image(path)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\nand no more", b"no image at all"])
def test_what_is_no_image_or_a_damaged_one_has_no_other_format(content, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(OSError, match="cannot identify image file"):
        image_files.open_image(path)


def test_the_delivered_program_opens_files_as_the_pipeline_does():
    assert onnx_prediction.FORMATS == image_files.FORMATS
    assert set(onnx_prediction.SUFFIXES) == set(samples.SUFFIXES)
    for name in ("open_image", "format_of"):
        own, delivered = (inspect.getsource(getattr(module, name)) for module in (image_files, onnx_prediction))
        assert own == delivered
