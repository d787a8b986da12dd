"""Files of predictions that are small on disk and large in memory are refused by their headers."""

from __future__ import annotations

import os
import resource
import struct
import zipfile

import numpy as np
import pytest
from given_predictions import arrays, write
from in_process import run

from utils.core.array_archives import physical_memory
from utils.predictions import inspection

SLACK = 500_000_000  # bytes that a refusal may take


def promising(path, shape, key="logits"):
    """Replace one array of a file by one whose archive promises `shape`, in a thousandth of the bytes."""
    with np.load(path) as given:
        kept = {name: given[name] for name in given.files if name not in (key, "logits")}
    np.savez(path, **kept)
    words = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    words += b" " * (64 - (10 + len(words) + 1) % 64) + b"\n"
    header = np.lib.format.magic(1, 0) + struct.pack("<H", len(words)) + words
    size = 4 * int(np.prod(shape))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{key}.npy", header + os.urandom(size // 1000))
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"PK\x01\x02") + 24
    extra = struct.pack("<HHQ", 1, 8, len(header) + size)
    raw[at : at + 4] = b"\xff\xff\xff\xff"
    name_length = struct.unpack("<H", raw[at + 4 : at + 6])[0]
    raw[at + 6 : at + 8] = struct.pack("<H", len(extra))
    raw[at + 22 + name_length : at + 22 + name_length] = extra
    end = raw.rindex(b"PK\x05\x06")
    raw[end + 12 : end + 16] = struct.pack("<I", struct.unpack("<I", raw[end + 12 : end + 16])[0] + len(extra))
    path.write_bytes(raw)


def imported(folder):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (folder / "workspace").mkdir()
    done = run("import-predictions", "--from", folder / "given", workspace=folder / "workspace")
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < SLACK
    assert done.code == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def changed(**new):
    return lambda name, stem, given: given | new if (name, stem) == ("forest", "val") else given


WIDE = {
    "100,000 classes": (
        lambda: {"logits": np.zeros((30, 100_000), dtype=np.float32)},
        "logits of 100,000 columns; expected at most 32,768",
    ),
    "long ids": (
        lambda: {"sample_ids": np.array([f"{number:0100000d}" for number in range(30)])},
        "sample_ids of 100,000 characters each; expected at most 4,096",
    ),
    "long names": (lambda: {"classes": np.array(["a" * 10**5, "b", "c"])}, "classes of 100,000 characters each"),
    "embeddings of a million": (
        lambda: {"embeddings": np.zeros((30, 10**6), dtype=np.float16)},
        "embeddings of 1,000,000 columns; expected at most 65,536",
    ),
}


@pytest.mark.parametrize("what", WIDE)
def test_wide_arrays_are_refused(tmp_path, what):
    make, words = WIDE[what]
    write(tmp_path / "given", change=changed(**make()))
    text = imported(tmp_path)
    assert words in text
    assert "forest/val.npz" in text


def test_one_file_may_take_a_quarter_of_the_memory_with_its_copies(tmp_path):
    write(tmp_path / "given")
    promising(tmp_path / "given" / "forest" / "val.npz", (physical_memory() // 8 // 4000, 1000))
    text = imported(tmp_path)
    assert "forest/val.npz: cannot be read, its arrays take" in text
    assert "a quarter of this machine's memory" in text


def test_all_files_together_may_take_half_of_it(tmp_path):
    write(tmp_path / "given")
    for name in ("bayes", "forest", "linear"):
        promising(tmp_path / "given" / name / "val.npz", (physical_memory() // 24 // 4000, 1000))
    text = imported(tmp_path)
    assert "the files of 3 members take" in text
    assert "half of this machine's. Import fewer members" in text


def test_a_number_of_classes_squared_is_never_allocated():
    classes = 30_000
    labels = np.arange(40) % classes
    logits = np.zeros((40, classes), dtype=np.float32)
    logits[np.arange(40), labels] = 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    facts = inspection.measure(logits, labels)
    assert (facts["accuracy"], facts["matched"], facts["order"]) == (1, 1, list(range(classes)))
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < SLACK


def test_up_to_two_thousand_classes_the_order_is_checked():
    given = arrays("val", 1)
    facts = inspection.measure(given["logits"][:, [1, 0, 2]], given["labels"])
    assert facts["order"] == [1, 0, 2]
    assert facts["matched"] > facts["accuracy"]
