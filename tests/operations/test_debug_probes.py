"""Descriptions of the files that a section of `debug` wrote; the checks themselves run in test_debug."""

from __future__ import annotations

import json

import numpy as np

from utils.operations.debug_probes import describe_file


def test_arrays_are_described_by_type_shape_and_statistics(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[1.0, 3.0]], dtype=np.float32))
    assert describe_file(tmp_path / "a.npy").endswith("float32 (1, 2) [1 .. 2 .. 3]")
    np.savez(tmp_path / "b.npz", names=np.array(["x"]), values=np.arange(3))
    assert "names <U1 (1,)" in describe_file(tmp_path / "b.npz")
    assert "values int64 (3,) [0 .. 1 .. 2]" in describe_file(tmp_path / "b.npz")


def test_records_are_described_by_their_keys(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"b": 1, "a": 2}))
    assert describe_file(tmp_path / "a.json").endswith(": a, b")
    (tmp_path / "b.json").write_text("[1, 2]")
    assert describe_file(tmp_path / "b.json").endswith(": 2 items")


def test_other_and_damaged_files_are_described_and_raise_nothing(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"123")
    assert describe_file(tmp_path / "a.pth").endswith(": 3 bytes")
    (tmp_path / "a.npy").write_bytes(b"no array")
    (tmp_path / "a.json").write_text("{")
    for name in ("a.npy", "a.json"):
        assert describe_file(tmp_path / name).startswith(str(tmp_path / name))
