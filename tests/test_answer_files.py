"""Files of answers: their form, and that a killed process loses no whole record."""

from __future__ import annotations

import csv
import json
import os

import pytest

from utils import answer_files
from utils.answer_files import AnswerFile, Form
from utils.errors import UserError

CLASSES = ("ant", 'b"ee,', "c\nat")
NAMES = (
    "plain.jpg",
    'quote".jpg',
    "com,ma.jpg",
    "new\nline.jpg",
    "return\r.jpg",
    "<script>.jpg",
    "caf\udce9.jpg",
    "ü.jpg",
)


def record(path: str, model: str = "m@1") -> dict:
    found = {"path": path, "class": "ant", "probability": 0.5, "set": ["ant", 'b"ee,'], "abstain": False}
    return found | {"disagreement": None, "model": model, "error": None, "probabilities": [0.5, 0.3, 0.2]}


def written(path, form: Form, names=NAMES, *, model: str = "m@1", **how):
    file = AnswerFile(path, form, model, append=how.get("append", False), replace=how.get("replace", False))
    file.add([form.line(record(name, model)) for name in names if name not in file.done])
    return file


def read(path, form: Form) -> list[dict]:
    if form.format == "jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(params=["csv", "jsonl"])
def form(request) -> Form:
    return Form(request.param, CLASSES)


def test_every_name_comes_back(tmp_path, form):
    written(tmp_path / "a", form)
    rows = read(tmp_path / "a", form)
    assert [row["path"] for row in rows] == list(NAMES)
    assert os.fsencode(rows[6]["path"]) == b"caf\xe9.jpg"
    if form.format == "csv":
        assert b"caf\xe9.jpg" in (tmp_path / "a").read_bytes()
        assert (rows[0]["abstain"], rows[0]["disagreement"], rows[0]["p:c\nat"]) == ("false", "", "0.2")
        assert json.loads(rows[0]["set"]) == ["ant", 'b"ee,']
    else:
        assert rows[0]["probabilities"] == {"ant": 0.5, 'b"ee,': 0.3, "c\nat": 0.2}
        assert rows[0]["abstain"] is False


def test_wherever_it_was_cut_it_goes_on_to_the_same_bytes(tmp_path, form):
    path = tmp_path / "a"
    written(path, form)
    whole = path.read_bytes()
    for end in range(1, len(whole), 7):
        path.write_bytes(whole[:end])
        written(path, form, append=True)
        assert path.read_bytes() == whole, end


def test_records_with_an_error_go_and_the_others_stay_as_they_were(tmp_path, form, monkeypatch):
    monkeypatch.setattr(answer_files, "PART", 5)
    path, bad = tmp_path / "a", {NAMES[0], NAMES[3], NAMES[4], NAMES[-1]}
    nothing = {"error": "no\nimage", "class": None, "probabilities": None}
    lines = [form.line(record(name) | (nothing if name in bad else {})) for name in NAMES]
    AnswerFile(path, form, "m@1", append=False, replace=False).add(lines)
    with path.open("ab") as file:
        file.write(lines[1].encode()[:20])  # cut off by a killed process
    file = AnswerFile(path, form, "m@1", append=True, replace=False)
    assert file.done == set(NAMES) - bad
    kept = [line for name, line in zip(NAMES, lines, strict=True) if name not in bad]
    assert path.read_bytes() == (form.head + "".join(kept)).encode("utf-8", "surrogateescape")
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_not_replaced_unasked(tmp_path, form):
    path = tmp_path / "a"
    written(path, form)
    with pytest.raises(UserError, match="--append goes on with it"):
        written(path, form)
    written(path, form, ["other.jpg"], replace=True)
    assert [row["path"] for row in read(path, form)] == ["other.jpg"]


@pytest.mark.parametrize("content", [b"my notes", b"a,b\n1,2\n", b'{"other": 1}\n', b"\xff\xfe"])
def test_a_foreign_file_is_refused_and_stays(tmp_path, form, content):
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(UserError, match="Name another file with --to"):
        written(path, form, append=True)
    assert path.read_bytes() == content


def test_answers_of_another_model_or_with_other_columns_are_refused(tmp_path, form):
    path = tmp_path / "a"
    written(path, form)
    before = path.read_bytes()
    with pytest.raises(UserError, match="m@1; expected m@2"):
        written(path, form, model="m@2", append=True)
    with pytest.raises(UserError, match="columns"):
        AnswerFile(path, Form(form.format, None), "m@1", append=True, replace=False)
    assert path.read_bytes() == before


def test_a_place_that_cannot_be_written_is_named(tmp_path, form):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        written(tmp_path / "file" / "a.csv", form)
