"""Files of answers: their form, and that a killed process loses no whole record."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.core.errors import UserError
from utils.inference import output_files
from utils.inference.output_files import PredictionFile, RecordFormat

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


def written(path, form: RecordFormat, names=NAMES, *, model: str = "m@1", **how):
    append, replace = how.get("append", False), how.get("replace", False)
    file = PredictionFile(path, form, model, append=append, replace=replace, requested=set(names))
    file.add([form.format_record(record(name, model)) for name in names if name not in file.done])
    return file


def read(path, form: RecordFormat) -> list[dict]:
    if form.format == "jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(params=["csv", "jsonl"])
def form(request) -> RecordFormat:
    return RecordFormat(request.param, CLASSES)


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


def test_cells_are_quoted_where_they_must_be(tmp_path):
    form = RecordFormat("csv", ("ant", "bee"))
    assert form.header == "path,class,probability,set,abstain,disagreement,model,error,p:ant,p:bee\n"
    plain = record("a.jpg") | {"set": None, "probabilities": [0.5, 0.25]}
    assert form.format_record(plain) == "a.jpg,ant,0.5,,false,,m@1,,0.5,0.25\n"
    assert form.format_record(plain | {"path": "a\rb"}).startswith('"a\rb","ant","0.5","",')


def test_wherever_it_was_cut_it_goes_on_to_the_same_bytes(tmp_path, form):
    path = tmp_path / "a"
    written(path, form)
    whole = path.read_bytes()
    for end in range(1, len(whole), 7):
        path.write_bytes(whole[:end])
        written(path, form, append=True)
        assert path.read_bytes() == whole, end


def test_records_with_an_error_go_and_the_others_stay_as_they_were(tmp_path, form, monkeypatch):
    monkeypatch.setattr(output_files, "COPY_BYTES", 5)
    path, bad = tmp_path / "a", {NAMES[0], NAMES[3], NAMES[4], NAMES[-1]}
    nothing = {"error": "no\nimage", "class": None, "probabilities": None}
    lines = [form.format_record(record(name) | (nothing if name in bad else {})) for name in NAMES]
    PredictionFile(path, form, "m@1", append=False, replace=False).add(lines)
    with path.open("ab") as file:
        file.write(lines[1].encode()[:20])  # cut off by a killed process
    file = PredictionFile(path, form, "m@1", append=True, replace=False, requested=set(NAMES))
    assert file.done == set(NAMES) - bad
    kept = [line for name, line in zip(NAMES, lines, strict=True) if name not in bad]
    assert path.read_bytes() == (form.header + "".join(kept)).encode("utf-8", "surrogateescape")
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_not_replaced_unasked(tmp_path, form):
    path = tmp_path / "a"
    written(path, form)
    with pytest.raises(UserError, match="--append continues it"):
        written(path, form)
    written(path, form, ["other.jpg"], replace=True)
    assert [row["path"] for row in read(path, form)] == ["other.jpg"]


def test_a_file_has_the_permissions_of_any_other_and_no_more(tmp_path, form):
    umask = os.umask(0)
    try:
        written(tmp_path / "a", form)
    finally:
        os.umask(umask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666


def test_a_file_has_one_writer(tmp_path, form):
    """Also where the writer has replaced it to remove records with errors; afterwards it is free."""
    path = tmp_path / "a"
    first = PredictionFile(path, form, "m@1", append=False, replace=False)
    first.add([form.format_record(record(NAMES[0]) | {"error": "no image", "class": None, "probabilities": None})])
    with pytest.raises(UserError, match="another predict writes to it"):
        written(path, form, append=True)
    del first
    second = PredictionFile(path, form, "m@1", append=True, replace=False, requested={NAMES[0]})
    assert path.read_text() == form.header  # the error is removed
    before = path.read_bytes()
    for options in ({"append": True}, {"replace": True}):
        with pytest.raises(UserError, match="Wait until it ends"):
            written(path, form, **options)
    assert path.read_bytes() == before
    del second
    written(path, form, append=True)
    assert [row["path"] for row in read(path, form)] == list(NAMES)


@pytest.mark.parametrize("name", ["=1+1", "+a", "-a", "@sum", "\ta", "\ra", "a=1", ""])
def test_text_that_a_spreadsheet_would_run_is_disarmed_on_request(name):
    """Numbers and everything else stay as they are."""
    values = record(name) | {"error": name, "probabilities": [-0.5, 1.0, 0.5]}
    plain = RecordFormat("csv", CLASSES)
    safe = RecordFormat("csv", CLASSES, spreadsheet_safe=True)
    cells, disarmed = (next(csv.reader(io.StringIO(f.format_record(values), newline=""))) for f in (plain, safe))
    is_formula = name not in ("a=1", "")
    assert cells[0] == name
    assert disarmed[0] == disarmed[7] == (f"'{name}" if is_formula else name)
    assert disarmed[8:] == cells[8:]


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/full")])
def test_only_a_regular_file_is_written(tmp_path, form, make):
    make(tmp_path / "a")
    with pytest.raises(UserError, match=r"a: cannot be written \(a .*; expected a regular file"):
        written(tmp_path / "a", form, append=True)


@pytest.mark.parametrize("content", [b"my notes", b"a,b\n1,2\n", b'{"other": 1}\n', b"\xff\xfe"])
def test_a_foreign_file_is_refused_and_stays(tmp_path, form, content):
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(UserError, match="ame another file with --to"):
        written(path, form, append=True)
    assert path.read_bytes() == content


def test_answers_of_another_model_or_with_other_columns_are_refused(tmp_path, form):
    path = tmp_path / "a"
    written(path, form)
    before = path.read_bytes()
    with pytest.raises(UserError, match="m@1; expected m@2"):
        written(path, form, model="m@2", append=True)
    with pytest.raises(UserError, match="columns"):
        PredictionFile(path, RecordFormat(form.format, None), "m@1", append=True, replace=False)
    assert path.read_bytes() == before


def test_a_place_that_cannot_be_written_is_named(tmp_path, form):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        written(tmp_path / "file" / "a.csv", form)


# what does not parse --------------------------------------------------------------------------------------------------
def many(form: RecordFormat, count: int) -> bytes:
    """A file of so many answers, of which every tenth has a line end in its path."""
    names = (f"{number}{chr(10) if number % 10 == 9 else ''}.jpg" for number in range(count))
    lines = [form.format_record(record(name)) for name in names]
    return (form.header + "".join(lines)).encode("utf-8", "surrogateescape")


def again(path: Path, form: RecordFormat, requested=frozenset()) -> PredictionFile:
    return PredictionFile(path, form, "m@1", append=True, replace=False, requested=requested)


@pytest.mark.parametrize("classes", [None, CLASSES])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("number", [1, 10, 18])
def test_a_stray_quote_anywhere_in_an_answer_is_named_and_changes_nothing(tmp_path, kind, classes, number):
    """The last of twenty records, too, behind which the quotes stay open."""
    form = RecordFormat(kind, classes)
    path, whole = tmp_path / "a", many(form, 20)
    lines = [form.format_record(record(f"{row}.jpg")).encode() for row in (number, 19)]
    for line in lines:
        changed_line = line if line in whole else form.format_record(record("18.jpg")).encode()
        start = whole.index(changed_line)
        for place in range(start, start + len(changed_line)):
            changed = whole[:place] + b'"' + whole[place:]
            path.write_bytes(changed)
            try:
                again(path, form)
            except UserError as error:
                message = str(error)
                assert f"{path}: " in message
                assert "line" in message
                assert "--to" in message
            else:  # as in a quoted cell, where the quote and its neighbour are text
                assert len(read(path, form)) == 20
            assert path.read_bytes() == changed


def test_the_line_is_named(tmp_path, form):
    path, whole = tmp_path / "a", many(form, 50)
    path.write_bytes(whole.replace(b"7.jpg", b'7".jpg', 1))
    offset = 2 if form.format == "jsonl" else 0  # the header has a class name with a line end
    with pytest.raises(UserError, match=f"begins in line {10 - offset} .*the file is unchanged"):
        again(path, form)


WRONG_PATH = b'{"path": ["a"], "model": "m@1", "error": null}\n'


@pytest.mark.parametrize(
    "line", [b"\n", b"x\n", b"5\n", b'"x"\n', b"[]\n", b"[" * 100_000 + b"\n", WRONG_PATH], ids=range(7)
)
def test_a_line_that_is_no_answer_is_named_and_changes_nothing(tmp_path, form, line):
    path, whole = tmp_path / "a", many(form, 12)
    first = form.format_record(record("0.jpg")).encode()
    for changed in (whole.replace(first, first + line), whole + line):
        path.write_bytes(changed)
        with pytest.raises(UserError, match="the file is unchanged"):
            again(path, form)
        assert path.read_bytes() == changed


def test_a_last_line_that_is_not_the_beginning_of_an_answer_is_named_and_stays(tmp_path, form):
    path, whole = tmp_path / "a", many(form, 12)
    line = form.format_record(record("new.jpg"))
    for tail in (b'my "notes"', (line.removesuffix("\n") + line[:-20]).encode()):
        path.write_bytes(whole + tail)
        with pytest.raises(UserError, match="the file is unchanged"):
            again(path, form)
        assert path.read_bytes() == whole + tail


def test_zeros_that_a_power_failure_left_are_a_torn_record(tmp_path, form):
    path, whole = tmp_path / "a", many(form, 12)
    path.write_bytes(whole + form.format_record(record("new.jpg")).encode()[:30] + bytes(4096))
    again(path, form)
    assert path.read_bytes() == whole


def test_a_cell_may_be_longer_than_python_s_reader_takes(tmp_path, form):
    path = tmp_path / "a"
    long = form.format_record(record("a.jpg") | {"set": ["x" * 200_000]})
    PredictionFile(path, form, "m@1", append=False, replace=False).add([long])
    before = path.read_bytes()
    assert again(path, form, {"a.jpg"}).done == {"a.jpg"}
    assert path.read_bytes() == before


def test_records_with_an_error_stay_where_nobody_tries_them_again(tmp_path, form):
    path, nothing = tmp_path / "a", {"error": "no image", "class": None, "probabilities": None}
    lines = [form.format_record(record(name) | nothing) for name in ("a.jpg", "b.jpg")]
    PredictionFile(path, form, "m@1", append=False, replace=False).add(lines)
    assert again(path, form, {"b.jpg", "c.jpg"}).done == set()
    assert [row["path"] for row in read(path, form)] == ["a.jpg"]


# any cut --------------------------------------------------------------------------------------------------------------
TEXTS = st.text(st.sampled_from('a,"\n\r\udcff\u00fc {}[]:\\0'), max_size=12)
RECORDS = st.builds(
    lambda path, fields: record(path) | fields,
    TEXTS,
    st.fixed_dictionaries(
        {
            "class": st.sampled_from(CLASSES),
            "set": st.lists(st.sampled_from(CLASSES), unique=True) | st.none(),
            "disagreement": st.floats(0, 2) | st.none(),
            "error": st.none() | TEXTS.map("no image: {}".format),
            "probabilities": st.lists(st.floats(0, 1), min_size=3, max_size=3),
        }
    ),
)


@settings(deadline=None)
@given(
    records=st.lists(RECORDS, min_size=1, max_size=5, unique_by=lambda one: one["path"]),
    kind=st.sampled_from(["csv", "jsonl"]),
    classes=st.sampled_from([None, CLASSES]),
    data=st.data(),
)
def test_wherever_a_file_is_cut_its_whole_answers_stay(records, kind, classes, data):
    form = RecordFormat(kind, classes)
    for one in records:
        if one["error"] is not None:
            one["class"] = one["probability"] = one["probabilities"] = None
        if classes is None:
            one.pop("probabilities")
    pieces = [form.header, *map(form.format_record, records)]
    pieces = [piece.encode("utf-8", "surrogateescape") for piece in pieces]
    whole = b"".join(pieces)
    cut = data.draw(st.integers(1, len(whole)))
    ends = [sum(map(len, pieces[: number + 1])) for number in range(len(pieces))]
    count = sum(end <= cut for end in ends) - 1  # whole records
    answered = {one["path"] for one in records[: max(count, 0)] if one["error"] is None}
    left = [one for one in records if one["path"] not in answered]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        path.write_bytes(whole[:cut])
        file = again(path, form, {one["path"] for one in records})
        assert file.done == answered
        kept = [piece for one, piece in zip(records, pieces[1:], strict=True) if one["path"] in answered]
        assert path.read_bytes() == pieces[0] + b"".join(kept)
        file.add([form.format_record(one) for one in left])
        assert sorted(row["path"] for row in read(path, form)) == sorted(one["path"] for one in records)


# growth ---------------------------------------------------------------------------------------------------------------
def work(path: Path, form: RecordFormat, requested=frozenset()) -> tuple[int, int]:
    """Calls while a file is taken in, and bytes or characters of the strings whose methods are called."""
    calls = size = 0

    def count(_frame, event, function):
        nonlocal calls, size
        if event in ("call", "c_call"):
            calls += 1
            text = getattr(function, "__self__", None)
            size += len(text) if isinstance(text, (bytes, str)) else 0

    sys.setprofile(count)
    try:
        again(path, form, requested)
    finally:
        sys.setprofile(None)
    return calls, size


def test_work_grows_as_the_rows_do(tmp_path, form):
    found = []
    for count in (500, 1000, 2000):
        path, nothing = tmp_path / str(count), {"error": "no image", "class": None, "probabilities": None}
        path.write_bytes(many(form, count))
        bad = [f"bad{number}.jpg" for number in range(count)]
        with path.open("ab") as file:
            file.write("".join(form.format_record(record(name) | nothing) for name in bad).encode())
        found.append(work(path, form, set(bad[::2])))
    for small, large in pairwise(found):
        assert large[0] < 2.1 * small[0]
        assert large[1] < 2.2 * small[1]  # numbers in names grow longer


def test_work_grows_as_the_lines_of_one_record_do(tmp_path):
    form, found = RecordFormat("csv", None), []
    for count in (500, 1000, 2000):
        path = tmp_path / str(count)
        path.write_text(form.header + form.format_record(record("a.jpg") | {"error": "why\n" * count}))
        found.append(work(path, form))
    for small, large in pairwise(found):
        assert large[0] < 2.1 * small[0]
        assert large[1] < 2.1 * small[1]


def test_quotes_that_stay_open_to_the_end_of_the_file_are_no_torn_record(tmp_path):
    """As in 3.5 MB of recorded answers, all of which went as one."""
    form, path = RecordFormat("csv", None), tmp_path / "a"
    lines = [form.format_record(record(f"{number}.jpg") | {"set": None}) for number in range(1000)]
    path.write_text(form.header + '"' + "".join(lines))
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"begins in line 2 .*never closed"):
        again(path, form)
    assert path.read_bytes() == before
