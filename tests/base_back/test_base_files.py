"""Files of the base pipeline appear whole or not at all, and a disk that takes no more is said with the file's name."""

from __future__ import annotations

import pytest
from conftest import PROJECT, run_python

from utils.files import atomic_path

WRITE = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {src!r})
from utils.files import atomic_path, write_json
path, way = Path(sys.argv[1]), sys.argv[2]
path.write_bytes(b"before")
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    if way == "json":
        write_json(path, ["x" * 100_000])
    elif way == "arrays":
        import numpy as np
        with atomic_path(path) as temporary:
            np.savez(temporary, a=np.zeros(100_000))
    else:
        import torch
        from training.pipeline import write_checkpoint
        write_checkpoint(path, {{"a": torch.zeros(100_000)}})
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize(("way", "name"), [("json", "a.json"), ("arrays", "a.npz"), ("checkpoint", "a.pth")])
def test_a_file_that_the_disk_does_not_take_is_named_and_the_old_one_stays(tmp_path, way, name):
    """The limit of a process, which the system keeps as it keeps that of a disk."""
    script, folder = tmp_path / "write.py", tmp_path / "folder"
    script.write_text(WRITE.format(src=str(PROJECT / "BASE-BACK" / "src")), encoding="utf-8")
    folder.mkdir()
    done = run_python(str(script), str(folder / name), way, environment={"DBT_BASE_DIR": str(tmp_path / "w")})
    assert done.stdout == f"[Errno 27] File too large: '{folder / name}'\n", done.stderr
    assert (folder / name).read_bytes() == b"before"
    assert [path.name for path in folder.iterdir()] == [name]


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file or directory", "another"), RuntimeError("boom")])
def test_what_is_no_matter_of_the_file_is_raised_as_it_is(tmp_path, error):
    with pytest.raises(type(error)) as caught, atomic_path(tmp_path / "a"):
        raise error
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []
