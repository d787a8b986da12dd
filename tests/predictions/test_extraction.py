"""Extraction: members without a network are passed over."""

from __future__ import annotations

import numpy as np
from given_predictions import empty_workspace, opened, take_in, write

from utils import base_back
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


def test_forked_processes_run_networks_that_use_one_thread_also_if_their_files_have_half_precision(monkeypatch):
    """Otherwise an operation of two threads, which never ends in a fork, would run in one."""
    monkeypatch.setenv("DBT_NUM_THREADS", "0")  # the number of threads is that of the table
    large = int(base_back.load_bundled("threads").LARGE)  # parameters from which images of 32 px take two threads
    assert extraction.use_one_thread([])
    assert extraction.use_one_thread([(2 * large - 2, 32), (1000, 64)])
    assert not extraction.use_one_thread([(1000, 64), (2 * large, 32)])
    assert not extraction.use_one_thread([(large, 64)])
