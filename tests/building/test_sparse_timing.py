"""A stopwatch runs the members' networks on the rows that it is given, and its pauses do not count."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT
from finished_workspace import at

from utils.building import sparse_timing
from utils.building.sparse_timing import Stopwatch
from utils.core.config_file import load_config
from utils.predictions import catalog, member_selection, streaming
from utils.predictions.store import Store


@pytest.fixture(scope="module")
def watch(built: Path) -> Stopwatch:
    config = load_config(PROJECT / "configs" / "votes.yaml", overrides=("device=cpu", "dataset.batch_size=2"))
    content = catalog.load(at(built))
    store = Store(config, at(built), content)
    return Stopwatch(store, member_selection.select(content, config), store.images("val").take([3, 9, 20]), "cpu")


def test_it_predicts_as_the_store_does_on_the_rows_alone(watch):
    logits = watch.run(1, np.array([0, 2]))
    np.testing.assert_allclose(logits, watch.store.rows(watch.members[1], "val").logits[[3, 20]], atol=1e-4)


def test_opening_and_decoding_are_not_counted(watch):
    watch.uncounted = 0.0
    watch.run(0, np.array([0, 1, 2]))  # two batches
    assert watch.uncounted > 0
    assert watch.of_member(0) > 0


def test_small_networks_stay_open_and_of_large_ones_one_is_open(watch, monkeypatch):
    opened = []
    original = streaming.network_on_device

    @contextmanager
    def recorded(spec, device):
        opened.append(spec.checkpoint.name)
        with original(spec, device) as network:
            yield network
        opened.append("closed")

    monkeypatch.setattr(streaming, "network_on_device", recorded)
    names = [member.network(watch.store.workspace).checkpoint for member in watch.members]
    monkeypatch.setattr(sparse_timing, "KEPT_BYTES", names[0].stat().st_size)
    with Stopwatch(watch.store, watch.members, watch.images, "cpu") as limited:
        first = [limited.run(member, np.array([0, 1])).tolist() for member in (0, 1, 0, 1)]
    assert first[:2] == first[2:]
    one, other = (path.name for path in names[:2])
    assert opened == [one, other, "closed", other, "closed", "closed"]
