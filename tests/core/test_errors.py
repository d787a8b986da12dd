"""Texts of errors that the operating system causes, and hints for misspelt names."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from utils.core import errors


@pytest.mark.parametrize(
    ("word", "hint"),
    [("soft_votng", "; did you mean 'soft_voting'?"), ("zzz", ""), (7, "")],
    ids=["near", "far", "number"],
)
def test_a_hint_names_the_nearest_word_only(word, hint):
    assert errors.did_you_mean(word, ["hard_voting", "soft_voting"]) == hint


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "clean"),
        (errno.EDQUOT, "clean"),
        (errno.EACCES, errors.OUTPUT_HINT),
        (errno.EROFS, errors.OUTPUT_HINT),
        (errno.ENOTDIR, errors.OUTPUT_HINT),
        (errno.ENOENT, "discover"),
        (errno.EIO, "run the command again"),
    ],
    ids=errno.errorcode.get,
)
def test_the_remedy_fits_the_reason(number, remedy):
    error = OSError(number, "reason", "/data/file")
    text = errors.describe_os_error(error, None)
    assert text.startswith("/data/file: reason. ")
    assert remedy in text
    assert str(errors.cannot_write(Path("/data/other"), error)).startswith("/data/other: cannot be written (reason). ")


def test_an_error_without_a_file_names_the_folder_and_one_without_a_number_is_a_full_disk():
    short_write = OSError("12 requested and 3 written")  # as numpy raises it
    text = errors.describe_os_error(short_write, Path("/data"))
    assert text.startswith("a file in /data: 12 requested and 3 written. ")
    assert "Free some space" in text
    assert errors.describe_os_error(short_write, None).startswith("a file: ")


def test_every_error_that_a_user_can_cause_has_the_common_base():
    kinds = (errors.UserError, errors.ConfigError, errors.LeakageError, errors.PartialFailure)
    assert all(issubclass(kind, errors.OrchestratorError) for kind in kinds)
    assert issubclass(errors.ContaminatedError, errors.LeakageError)
