"""Which links on the way to a file to be written are refused, by the folders of the environment."""

from __future__ import annotations

import pytest

from utils.core import links
from utils.core.errors import UserError


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.setenv("DBT_BASE_DIR", str(tmp_path / "workspace"))
    monkeypatch.setenv("DBT_ENSEMBLE_DIR", str(tmp_path / "output"))
    for name in ("workspace", "output", "elsewhere"):
        (tmp_path / name).mkdir()
    return tmp_path / "workspace"


@pytest.mark.parametrize("root", ["workspace", "output"])
@pytest.mark.parametrize("place", ["a", "a/b", "a/b/c"])
def test_a_link_at_any_depth_below_a_root_is_refused(workspace, root, place):
    link = workspace.parent / root / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(workspace.parent / "elsewhere")
    for path in (link / "file", link / "deep" / "file"):
        with pytest.raises(UserError, match=rf"^{link}: a symbolic link to {workspace.parent}/elsewhere; noth"):
            links.require_unlinked(path)
    links.require_unlinked(link)  # a file that is a link itself is replaced


def test_a_root_may_be_a_link_and_other_folders_too(workspace, monkeypatch):
    link = workspace.parent / "link"
    link.symlink_to(workspace)
    links.require_unlinked(link / "a" / "file")
    monkeypatch.setenv("DBT_BASE_DIR", str(link))
    links.require_unlinked(link / "file")
    links.require_unlinked(link / "a" / "b" / "file")
    monkeypatch.delenv("DBT_BASE_DIR")
    links.require_unlinked(link / "file")


def test_a_file_behind_a_link_is_not_removed(workspace):
    (workspace / "file").touch()
    links.remove_file(workspace / "file")
    links.remove_file(workspace / "file")  # it is gone already
    assert list(workspace.iterdir()) == []
    kept = workspace.parent / "elsewhere" / "file"
    kept.touch()
    (workspace / "a").symlink_to(kept.parent)
    with pytest.raises(UserError, match="a symbolic link to"):
        links.remove_file(workspace / "a" / "file")
    assert kept.exists()
