"""The benchmark of external sets: its images, the time that it counts, its quick form."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import PROJECT, run_python
from PIL import Image

import external


def test_images_are_of_each_class_in_turn_and_all_different(tmp_path):
    for name, count in (("ant", 1), ("bee", 3)):
        folder = tmp_path / "split" / "test" / name
        folder.mkdir(parents=True)
        for number in range(count):
            Image.fromarray(np.full((8, 8, 3), 90 + number, np.uint8)).save(folder / f"{number}.png")
    external.write_set(SimpleNamespace(split_dir=tmp_path / "split"), tmp_path / "set", 6)
    written = sorted((tmp_path / "set").glob("*/*.png"), key=lambda path: path.name)
    assert [path.parent.name for path in written] == ["ant", "bee", "bee", "bee", "ant", "bee"]
    assert len({path.read_bytes() for path in written}) == 6


def test_the_time_of_a_function_is_counted_until_it_is_undone():
    owner, spent = SimpleNamespace(double=lambda value: 2 * value), {}
    original = owner.double
    undo = external.timed(owner, "double", "part", spent)
    assert [owner.double(value) for value in (1, 2)] == [2, 4]
    assert spent["part"] > 0
    undo()
    assert owner.double is original


@pytest.mark.slow
def test_the_quick_form_ends_with_its_report():
    done = run_python(str(PROJECT / "benchmarks" / "external.py"), "--quick")
    assert done.returncode == 0, done.stderr
    first, *parts = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert first["what"] == "1 tiny networks, 200 images: outside of forward passes"
    assert first["figure"] > 0
    assert {"decode", "predictions", "report"} <= {part["what"].rpartition(": ")[2] for part in parts}
