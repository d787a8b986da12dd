"""The evaluation benchmark: that its two sides agree, and what it says of them."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
from conftest import PROJECT, run_python

PROGRAM = PROJECT / "benchmarks" / "evaluation.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("evaluation_benchmark", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_sides_score_the_same_samples_alike(benchmark):
    found = benchmark.scikit_learn(2, 300, 4, 40)
    assert found["difference"] < 1e-5
    assert benchmark.ours(2, 300, 4, 40)["megabytes"] > 1


def test_goals_are_held_against_what_was_measured(benchmark):
    times = {"seconds": 50.0, "cpu": 10.0, "megabytes": 900.0}
    loop = {"cpu": 19.0, "difference": 0.0}
    rows = benchmark.timing_rows((40, 10000, 13, 2000), times, loop, times | {"seconds": 61.0, "cpu": 30.0})
    assert [row["holds"] for row in rows] == [False, True, False, None]
    assert rows[2]["figure"] == 9.5  # 190 s against 20 s
    assert [row["figure"] for row in rows[:2]] == [61.0, 900.0]


def test_coverage_is_shown_for_images_of_ones_own(benchmark, tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for number, name in enumerate(("a", "b", "c")):
        (tmp_path / name).mkdir()
        for image in range(40):
            pixels = rng.integers(0, 200, (9, 9, 3)) + 20 * number
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name / f"{image}.png")
    rows = benchmark.coverage_rows(tmp_path)
    assert [row["what"][:8] for row in rows] == ["LAC sets", "APS sets", "RAPS set"]
    assert all(row["figure"] > 0.8 for row in rows)
    with pytest.raises(SystemExit, match="at least two classes"):
        benchmark.images(PROJECT / "docs")


def test_the_quick_form_runs_to_its_end():
    done = run_python(str(PROGRAM), "--quick")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["benchmark"], found["quick"], len(found["rows"])) == ("evaluation", True, 7)
