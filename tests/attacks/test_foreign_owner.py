"""Code beside the project that belongs to somebody else is run only where its folder is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from utils import base_back
from utils.core.errors import UserError


@pytest.fixture
def beside(tmp_path, monkeypatch) -> Path:
    """A `BASE-BACK` beside a project."""
    (tmp_path / "project").mkdir()
    for name in ("config", "utils"):
        (tmp_path / "BASE-BACK" / "src" / name).mkdir(parents=True)
    monkeypatch.setattr(base_back, "PROJECT", tmp_path / "project")
    monkeypatch.delenv("BASE_BACK_DIR", raising=False)
    return tmp_path / "BASE-BACK"


def test_a_base_back_of_one_s_own_is_found(beside):
    assert base_back.locate() == beside


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files to another user")
@pytest.mark.parametrize("part", ["", "src", "src/utils"])
def test_that_of_another_user_is_refused_unless_it_is_named(beside, monkeypatch, part):
    os.chown(beside / part, 12345, -1)
    with pytest.raises(UserError, match=rf"{beside / part}: belongs to user 12345.*--base-back {beside}; for the bund"):
        base_back.locate()
    assert base_back.locate(str(beside)) == beside
    monkeypatch.setenv("BASE_BACK_DIR", str(beside))
    assert base_back.locate() == beside
