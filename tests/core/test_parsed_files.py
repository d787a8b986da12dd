"""Records and arrays are read once as long as their files stay the same."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from utils.core import parsed_files
from utils.core.artifacts import write_array, write_json
from utils.core.errors import UserError


@pytest.fixture(autouse=True)
def nothing_read():
    parsed_files.forget()
    yield
    parsed_files.forget()


def test_a_record_is_shared_until_its_file_is_replaced(tmp_path):
    path = tmp_path / "record.json"
    assert parsed_files.record_once(path, remedy="") is None
    write_json(path, {"value": 1})
    first = parsed_files.record_once(path, remedy="")
    assert parsed_files.record_once(path, remedy="") is first
    write_json(path, {"value": 2})
    assert parsed_files.record_once(path, remedy="") == {"value": 2}
    assert first == {"value": 1}


def test_an_array_is_shared_and_a_missing_one_named(tmp_path):
    path = tmp_path / "array.npy"
    with pytest.raises(UserError, match=r"array\.npy.*Mend it"):
        parsed_files.array_once(path, remedy="Mend it.")
    write_array(path, np.arange(3))
    first = parsed_files.array_once(path, remedy="")
    assert parsed_files.array_once(path, remedy="") is first
    write_array(path, np.arange(4))
    assert parsed_files.array_once(path, remedy="").tolist() == [0, 1, 2, 3]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files by /proc")
def test_arrays_beyond_a_number_are_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(parsed_files, "MAX_OPEN_ARRAYS", 4)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        write_array(tmp_path / f"{number}.npy", np.full(3, number))
        assert parsed_files.array_once(tmp_path / f"{number}.npy", remedy="").tolist() == [number] * 3
    assert len(os.listdir("/proc/self/fd")) <= before + 4
    assert parsed_files.array_once(tmp_path / "0.npy", remedy="").tolist() == [0, 0, 0]
