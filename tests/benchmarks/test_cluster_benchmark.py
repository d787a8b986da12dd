"""The benchmark of a Ray cluster: its workspace, its rows, and a machine that is lost on the way."""

from __future__ import annotations

import json
import re

import pytest
from conftest import PROJECT, needs_ray, run_python

import cluster

SMALL = cluster.Size(2, 12, 4, 5)


def test_every_class_has_an_image_in_every_split(tmp_path):
    cluster.write_images(tmp_path, SMALL)
    counts = {
        split: len(list((tmp_path / "split_dataset" / split).rglob("*.png"))) for split in ("train", "val", "test")
    }
    assert counts == {"train": 4, "val": 8, "test": 4}
    assert all(len(list(split.iterdir())) == 4 for split in (tmp_path / "split_dataset").iterdir())
    files = [path.read_bytes() for path in tmp_path.rglob("*.png")]
    assert len(set(files)) == len(files)


@pytest.mark.parametrize("digests", ["aaa", "aab", "aba"])
def test_predictions_that_differ_miss_the_goal(digests):
    here, there, after_loss = (cluster.Run(10.0 * (1 + place), digest) for place, digest in enumerate(digests))
    rows = cluster.rows(SMALL, here, there, after_loss, (0.001, 0.004), 2_000_000)
    assert [entry["figure"] for entry in rows] == [4.0, 2.0, 1.5, float(digests.count("b")), 2.0]
    assert [entry["holds"] for entry in rows] == [None, None, None, digests == "aaa", None]


def test_without_ray_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    assert cluster.main([]) == 1
    assert "pip install 'ray>=2.40,<3'" in capsys.readouterr().err


@pytest.mark.slow
@needs_ray
def test_ray_gives_equal_bytes_also_when_a_machine_is_lost():
    done = run_python(str(PROJECT / "benchmarks" / "cluster.py"), "--quick", afresh=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [entry["holds"] for entry in rows if entry["goal"]] == [True]
    assert int(re.search(r"; (\d+) members were left", rows[2]["unit"])[1]) > 0


def test_a_temporary_file_of_a_killed_worker_changes_no_digest(tmp_path):
    folder = tmp_path / "ensembles" / "predictions" / "m" / "val"
    folder.mkdir(parents=True)
    (folder / "logits.npy").write_bytes(b"1")
    whole = cluster._digest(tmp_path)
    (folder / ".logits.00ff00ff.partial.npy").write_bytes(b"2")
    assert cluster._digest(tmp_path) == whole
    (folder / "logits.npy").write_bytes(b"3")
    assert cluster._digest(tmp_path) != whole
