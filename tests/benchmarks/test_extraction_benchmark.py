"""The extraction benchmark: its networks, its photographs and the form of its report."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from functools import partial

import pytest
from conftest import PROJECT, run_python
from PIL import Image

PROGRAM = PROJECT / "benchmarks" / "extraction.py"


@pytest.fixture(scope="module")
def extraction():
    spec = importlib.util.spec_from_file_location("extraction", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_covers_the_bundled_architectures(extraction):
    from models import BACKBONE_MAP

    assert set(extraction.ARCHITECTURES) == set(BACKBONE_MAP)
    assert set(extraction.LARGEST) <= set(extraction.QUICK) <= set(BACKBONE_MAP)


def test_photographs_are_all_different_and_lie_in_three_splits(extraction, tmp_path):
    workspace = extraction.lay_out(tmp_path / "w", 30, 64, None)
    files = list((workspace / "split_dataset").rglob("*.jpg"))
    assert len({path.read_bytes() for path in files}) == len(files) == 38
    assert len(list((workspace / "split_dataset" / "val" / "first").iterdir())) == 16
    with Image.open(files[0]) as image:
        assert image.size == (64, 64)


def test_own_images_are_taken_by_turns_from_their_classes(extraction, tmp_path):
    for name in ("oak", "elm"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (40, 40), (number, 0, 0)).save(tmp_path / "data" / name / f"{number}.png")
    workspace = extraction.lay_out(tmp_path / "w", 6, 64, tmp_path / "data")
    assert sorted(path.parent.name for path in (workspace / "split_dataset" / "val").rglob("*.jpg")) == [
        *["elm"] * 3,
        *["oak"] * 3,
    ]
    with pytest.raises(SystemExit, match="two are needed"):
        extraction.lay_out(tmp_path / "v", 6, 64, tmp_path / "data" / "oak")


def test_a_part_measures_the_product_beside_the_bare_passes(extraction, tmp_path, monkeypatch):
    # A program whose messages are not those of this process may be a fork (`warm`).
    monkeypatch.setattr(subprocess, "run", partial(subprocess.run, stderr=subprocess.PIPE))
    workspace = extraction.lay_out(tmp_path / "w", 12, 64, None)
    extraction.part("save", workspace, ["tiny", "0", "CustomRegNet", "CustomConvNeXt"])
    found = extraction.part("full", workspace, ["CustomRegNet", "CustomConvNeXt"])
    assert found["images"] == 12
    assert found["product"] > found["outside"] > 0
    assert found["forward"] > 0
    assert extraction.part("memory", workspace, ["CustomRegNet"])["megabytes"] > 0
    assert len(list((workspace / "ensembles" / "predictions").iterdir())) == 1


def test_a_folder_that_is_none_is_named(tmp_path):
    done = run_python(str(PROGRAM), "--data", str(tmp_path / "none"))
    assert done.returncode == 1
    assert "no such folder; expected one folder of images per class" in done.stderr


@pytest.mark.slow
def test_the_quick_form_ends_with_its_report():
    done = run_python(str(PROGRAM), "--quick")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["rows"]) == 6
    assert found["quick"]
