"""Which files are meant by files, folders, patterns and lists."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from utils.core.errors import UserError
from utils.inference.image_paths import list_images


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for name in ("b.jpg", "a.PNG", "notes.txt", ".hidden.jpg", "deep/er/c.tif", ".git/d.jpg", "deep/e.jpeg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*wanted: str, stdin: bytes = b"") -> list[str]:
    return [str(path) for path in list_images(wanted, io.BytesIO(stdin)).paths]


def test_a_folder_gives_its_images_to_any_depth_in_order(folder):
    assert names("in") == ["in/a.PNG", "in/b.jpg", "in/deep/e.jpeg", "in/deep/er/c.tif"]


def test_a_link_that_leads_back_is_followed_once(folder):
    (folder / "in" / "deep" / "round").symlink_to(folder / "in")
    (folder / "other").mkdir()
    (folder / "other" / "f.jpg").touch()
    (folder / "in" / "linked").symlink_to(folder / "other")
    assert names("in") == ["in/a.PNG", "in/b.jpg", "in/deep/e.jpeg", "in/deep/er/c.tif", "in/linked/f.jpg"]


def test_a_file_is_taken_as_it_is_named_and_each_once(folder):
    assert names("in/notes.txt", "in/b.jpg", "in") == [
        *("in/notes.txt", "in/b.jpg", "in/a.PNG", "in/deep/e.jpeg", "in/deep/er/c.tif")
    ]


def test_what_does_not_exist_is_refused_with_what_was_meant_unless_a_list_names_it(folder):
    with pytest.raises(UserError) as error:
        list_images(["in/b.jpg", "in/dep", "nowhere/at/all.jpg"], io.BytesIO())
    assert str(error.value) == (
        "in/dep: no such file or folder; did you mean in/deep?; nowhere/at/all.jpg: no such file or folder"
    )
    assert list_images(["-"], io.BytesIO(b"nowhere.jpg\n")).paths == (Path("nowhere.jpg"),)


def test_patterns_find_images_and_a_file_of_that_name_comes_first(folder):
    assert names("in/**/*.j*g") == ["in/b.jpg", "in/deep/e.jpeg"]
    (folder / "[b].jpg").touch()
    assert names("[b].jpg") == ["[b].jpg"]


def test_what_holds_no_image_is_said(folder):
    found = list_images(["empty", "in/*.gif", "in/b.jpg"], io.BytesIO())
    assert found.empty == ("empty", "in/*.gif")
    assert found.paths == (Path("in/b.jpg"),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"in/b.jpg\nin/a.PNG\n", ["in/b.jpg", "in/a.PNG"]),
        (b"in/b.jpg\r\nin/deep\r\n", ["in/b.jpg", "in/deep/e.jpeg", "in/deep/er/c.tif"]),
        (b"new\nline.jpg\0in/b.jpg\0", ["new\nline.jpg", "in/b.jpg"]),
        (b"caf\xe9.jpg", ["caf\udce9.jpg"]),
        (b"", []),
    ],
)
def test_a_list_on_standard_input(folder, text, expected):
    assert names("-", stdin=text) == expected


def test_names_that_are_no_utf8_are_found(folder):
    (folder / "odd").mkdir()
    with open(os.fsencode(folder / "odd") + b"/caf\xe9.jpg", "wb"):
        pass
    assert names("odd") == ["odd/caf\udce9.jpg"]
