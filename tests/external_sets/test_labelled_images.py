"""Names of external sets, and files whose names no record can hold."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from image_folders import write_class_folders

from utils.core.artifacts import FileDigests
from utils.core.errors import ConfigError, UserError
from utils.external_sets.labelled_images import read_labelled_images, set_name


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/data/field 2024", "field-2024"),
        ("/data/field/metadata.csv", "field"),
        ("/data/field/spring.csv", "spring"),
        ("/data/field/..", "data"),
        ("/data/Überblick", "berblick"),
        ("/data/äöü", "external"),
    ],
)
def test_a_set_is_named_by_its_folder_or_manifest(source, name):
    assert set_name(Path(source), None) == name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "a b", "x" * 65, "a\n"])
def test_a_name_that_is_no_name_of_a_folder_is_refused(name):
    with pytest.raises(ConfigError, match="--name"):
        set_name(Path("/data"), name)


def test_a_file_name_that_is_not_utf8_is_named_and_left_out(tmp_path):
    source = write_class_folders(tmp_path / "set", ("a", "b"), 2)
    try:
        os.rename(source / "a" / "0.png", os.fsencode(source / "a") + b"/\xff.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    listed = read_labelled_images(source, FileDigests(tmp_path / "digests.json"))
    assert listed.names == ("a/1.png", "b/0.png", "b/1.png")
    assert list(listed.unreadable) == [r"a/\xff.png"]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_labelled_images(tmp_path / "none", FileDigests(tmp_path / "digests.json"))
