"""Networks of a teacher, of which small ones stay open."""

from __future__ import annotations

import gc
import weakref

import pytest
from stored_predictions import workspace_at
from student_runs import SMALL, store_of

from utils.distillation import open_networks
from utils.distillation.open_networks import OpenNetworks
from utils.predictions import streaming


@pytest.fixture
def specs(built):
    store = store_of(workspace_at(built), SMALL)
    return [member.network(store.workspace) for member in store.catalog.members.values()][:3]


def opened(specs, networks, monkeypatch):
    """The checkpoints that are opened by two passes, and references to the networks of the first."""
    opener, checkpoints, references = streaming.open_network, [], []
    monkeypatch.setattr(streaming, "open_network", lambda spec: checkpoints.append(spec.checkpoint) or opener(spec))
    for number in range(2):
        for spec in specs:
            with networks.network(spec, "cpu") as network:
                assert not network.model.training
                if number == 0:
                    references.append(weakref.ref(network.model))
                del network
    gc.collect()
    return checkpoints, references


def test_small_networks_are_opened_once(specs, monkeypatch):
    networks = OpenNetworks()
    checkpoints, references = opened(specs, networks, monkeypatch)
    assert checkpoints == [spec.checkpoint for spec in specs]
    assert all(network() is not None for network in references)
    del networks
    gc.collect()
    assert all(network() is None for network in references)


def test_networks_that_do_not_fit_are_freed_after_each_pass(specs, monkeypatch):
    monkeypatch.setattr(open_networks, "KEPT_BYTES", specs[0].checkpoint.stat().st_size)
    networks = OpenNetworks()
    checkpoints, references = opened(specs, networks, monkeypatch)
    first, *others = (spec.checkpoint for spec in specs)
    assert checkpoints == [first, *others, *others]
    assert [network() is not None for network in references] == [True, False, False]


def test_a_network_is_freed_when_its_pass_fails(specs, monkeypatch):
    monkeypatch.setattr(open_networks, "KEPT_BYTES", 0)

    def failing_pass():
        with OpenNetworks().network(specs[0], "cpu") as network:
            references.append(weakref.ref(next(network.model.parameters())))
            raise RuntimeError("failed")

    references = []
    with pytest.raises(RuntimeError, match="failed"):
        failing_pass()
    gc.collect()
    assert references[0]() is None
