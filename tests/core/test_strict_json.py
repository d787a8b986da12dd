"""The strict reader of JSON files of any origin."""

from __future__ import annotations

import pytest

from utils.core import strict_json
from utils.core.errors import UserError
from utils.core.strict_json import read_json_object


def test_an_object_is_returned_as_plain_values(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"architecture": "resnet18", "mean": [0.5, 1e-3], "empty": null}')
    assert read_json_object(path, remedy="R") == {"architecture": "resnet18", "mean": [0.5, 0.001], "empty": None}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        ('{"a": NaN}', "NaN is no JSON"),
        ('{"a": -Infinity}', "-Infinity is no JSON"),
        ('{"a": 1e999}', "1e999 is too large"),
        ('{"a": ' + "[" * 40 + "]" * 40 + "}", "nested deeper than 32 levels"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "expected a JSON object"),
        ("[1, 2]", "it holds a list"),
        ('{"a": 1', "expected a JSON object"),
        ("", "expected a JSON object"),
    ],
)
def test_anything_but_strict_json_is_refused_with_the_file_and_the_remedy(tmp_path, text, reason):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"config\.json: .*{reason}.*Save it again"):
        read_json_object(path, remedy="Save it again")


def test_bytes_that_are_no_text_and_files_that_are_too_large_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match="expected a JSON object"):
        read_json_object(path, remedy="R")
    path.write_text('{"a": "0123456789"}')
    monkeypatch.setattr(strict_json, "MOST_BYTES", 10)
    with pytest.raises(UserError, match="19 bytes; expected a JSON file of at most 10"):
        read_json_object(path, remedy="R")
    with pytest.raises(UserError, match="no such file"):
        read_json_object(tmp_path / "none.json", remedy="R")


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a": ', "}")])
@pytest.mark.parametrize("levels", [32, 33])
def test_the_deepest_level_is_the_limit(tmp_path, opening, closing, levels):
    path = tmp_path / "config.json"
    path.write_text('{"a": ' + opening * (levels - 1) + "1" + closing * (levels - 1) + "}")
    if levels == strict_json.MOST_LEVELS:
        assert list(read_json_object(path, remedy="R")) == ["a"]
        return
    with pytest.raises(UserError, match="nested deeper than 32 levels"):
        read_json_object(path, remedy="R")


def test_a_file_of_sixteen_megabytes_is_read_and_none_of_a_byte_more(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": 1}'.ljust(16 * 1024**2))
    assert read_json_object(path, remedy="R") == {"a": 1}
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(UserError, match="16777217 bytes; expected a JSON file of at most 16777216"):
        read_json_object(path, remedy="R")


def test_a_key_that_occurs_three_times_is_named_among_others(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"b": 0, "a": 1, "a": 2, "a": 3}')
    with pytest.raises(UserError, match="the key 'a' occurs twice"):
        read_json_object(path, remedy="R")


def test_what_is_no_file_is_named_with_the_reason(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match=r"config\.json: cannot be read \(a folder; expected a regular file\)\. R$"):
        read_json_object(tmp_path / "config.json", remedy="R")
