"""Renaming: which requests are refused before anything changes, and what a renaming leaves on disk."""

from __future__ import annotations

import pytest
from given_predictions import empty_workspace, take_in, write

from utils.core.errors import UserError
from utils.discovery import renaming
from utils.predictions import catalog


@pytest.fixture
def workspace(tmp_path):
    workspace = empty_workspace(tmp_path / "workspace")
    take_in(workspace, write(tmp_path / "given"))
    return workspace


def anything(name, where):
    """Every name may be given."""


@pytest.mark.parametrize("requests", [["bayes"], ["=new"], ["bayes="], ["bayes=a", "forest=bayes"], ["unknown=new"]])
def test_an_invalid_request_changes_nothing(workspace, requests):
    before = sorted(workspace.base.rglob("*"))
    with pytest.raises(UserError, match="--rename"):
        renaming.begin(workspace, catalog.read(workspace), requests, anything)
    assert sorted(workspace.base.rglob("*")) == before


def test_a_renamed_member_has_both_names_on_disk_until_the_old_one_is_removed(workspace):
    renamed, names = renaming.begin(workspace, catalog.read(workspace), ["bayes=naive"], anything)
    assert names == {"bayes": "naive"}
    assert sorted(renamed.members) == ["forest", "linear", "naive"]
    old, new = (workspace.predictions(name, "val") / "logits.npy" for name in ("bayes", "naive"))
    assert old.samefile(new)
    catalog.save(workspace, renamed)
    renaming.remove_old_names(workspace, names)
    assert new.is_file()
    assert not old.exists()
    assert not workspace.oof("bayes").exists()
