"""Extraction: members without a network are passed over."""

from __future__ import annotations

import numpy as np
from given_predictions import empty_workspace, opened, take_in, write

from utils.predictions import extraction


def test_imported_members_are_passed_over_and_keep_their_rows(tmp_path):
    workspace = empty_workspace(tmp_path / "workspace")
    take_in(workspace, write(tmp_path / "given"))
    store = opened(workspace)
    before, members = store.catalog, list(store.catalog.members.values())
    logits = np.array(store.rows(members[0], "val").logits)
    extraction.ensure(store, members, ("train", *extraction.STREAMED_SPLITS))  # none has in-sample rows
    assert store.catalog is before
    assert np.array_equal(store.rows(members[0], "val").logits, logits)
