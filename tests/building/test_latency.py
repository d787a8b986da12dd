"""Latencies: measured once per network, device and threads, with real runs, and never again."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import fake_cuda

from utils.building import latency
from utils.building.latency import Timing, measure, stored, timing_of
from utils.core import other_programs
from utils.core.artifacts import FileDigests
from utils.core.config import Config
from utils.core.errors import UserError
from utils.core.workspace import Workspace
from utils.predictions import streaming
from utils.predictions.catalog import Member

MODEL = "test_resnet"


@pytest.fixture
def store(tmp_path):
    workspace = Workspace(tmp_path, *(tmp_path / name for name in "abcdefg"))
    return SimpleNamespace(
        workspace=workspace, config=Config(device="cpu"), digests=FileDigests(tmp_path / "digests.json")
    )


@pytest.fixture
def member(store):
    """A function that makes a member with a checkpoint of timm's smallest network; those of other `pixels` differ."""
    import timm

    def make(name, digest=None, pixels=32):
        path = store.workspace.base / f"{name}.pth"
        torch.manual_seed(0)
        torch.save(timm.create_model(MODEL, num_classes=3).state_dict(), path)
        checkpoint = {"path": path.name, "stage": "final", "sha256": store.digests.of(path)}
        return Member(
            name, f"timm:{MODEL}", "full", pixels, ("x", "y", "z"), (checkpoint,), (), None, None, 0.9, digest or name
        )

    return make


@pytest.fixture
def opened(monkeypatch):
    """The networks that were opened, in order."""
    seen = []
    original = streaming.open_network
    monkeypatch.setattr(streaming, "open_network", lambda spec: (seen.append(spec.checkpoint.stem), original(spec))[1])
    return seen


def test_a_network_is_measured_once_and_its_times_are_kept(store, member, opened):
    members = [member("b"), member("a", pixels=48)]
    found = measure(store, members)
    assert list(found) == opened == ["b", "a"]
    for record in found.values():
        assert (record.device, record.threads) == ("cpu", torch.get_num_threads())
        assert list(record.batches) == [1, 32]
        assert all(0 < timing.p50 <= timing.p95 and timing.runs >= 1 for timing in record.batches.values())
    before = store.workspace.latency.read_bytes()
    assert measure(store, members) == found
    assert len(opened) == 2
    assert store.workspace.latency.read_bytes() == before
    assert stored(store.workspace, members, "cpu", torch.get_num_threads()) == found


def test_only_the_missing_batch_is_measured_later(store, member):
    first = measure(store, [member("a")], batches=[1])["a"]
    both = measure(store, [member("a")])["a"]
    assert list(both.batches) == [1, 32]
    assert both.batches[1] == first.batches[1]


def test_other_weights_threads_and_devices_are_measured_for_themselves(store, member, opened, monkeypatch):
    measure(store, [member("a")], batches=[1])
    threads = torch.get_num_threads()
    assert stored(store.workspace, [member("a", "other weights")], "cpu", threads) == {}
    assert stored(store.workspace, [member("a")], "cpu", threads + 1) == {}
    assert stored(store.workspace, [member("a")], "cuda (A)", threads) == {}
    measure(store, [member("a", "other weights")], batches=[1])
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert measure(store, [member("a")], batches=[1])["a"].threads == threads + 1
    assert opened == ["a", "a", "a"]
    assert list(stored(store.workspace, [member("a")], "cpu", threads)) == ["a"]


def test_members_of_one_content_share_a_measurement(store, member, opened):
    found = measure(store, [member("a", "same"), member("b", "other", pixels=48)], batches=[1])
    again = measure(store, [member("copy", "same")], batches=[1])
    assert again["copy"] == found["a"]
    assert opened == ["a", "b"]


def test_a_backbone_and_its_soup_share_a_measurement(store, member, opened):
    backbone = measure(store, [member("a")], batches=[1])["a"]
    found = measure(store, [member("a"), member("a_soup"), member("larger", pixels=48)])
    assert found["a_soup"] == found["a"]
    assert found["a"].batches[1] == backbone.batches[1]
    assert opened == ["a", "a", "larger"]  # for one image, then for 32
    assert measure(store, [member("a_soup")]) == {"a_soup": found["a"]}


def test_the_record_is_sorted_json_that_names_device_threads_and_member(store, member):
    measure(store, [member("b"), member("a")], batches=[1])
    text = store.workspace.latency.read_text()
    record = json.loads(text)
    assert list(record["networks"]) == ["a", "b"]
    (entry,) = record["networks"]["a"].values()
    assert (entry["member"], entry["device"], entry["threads"]) == ("a", "cpu", torch.get_num_threads())
    assert entry["batches"]["batch_1"].keys() == {"p50", "p95", "runs"}


def test_a_member_without_a_network_is_left_out(store, member):
    imported = Member("p", "", "", 0, ("x",), (), (), None, None, None, "p", source="imported")
    assert list(measure(store, [imported, member("a")], batches=[1])) == ["a"]


def test_a_checkpoint_that_is_gone_or_another_is_named(store, member):
    gone = member("a")
    (store.workspace.base / "a.pth").unlink()
    with pytest.raises(UserError, match=r"a\.pth: the checkpoint of a is gone"):
        measure(store, [gone])
    (store.workspace.base / "a.pth").write_bytes(b"other")
    with pytest.raises(UserError, match="changed since discovery"):
        measure(store, [gone])


def test_a_damaged_record_is_named_with_the_remedy(store, member):
    store.workspace.latency.parent.mkdir(parents=True)
    store.workspace.latency.write_text("{")
    with pytest.raises(UserError, match=r"latency\.json: damaged.*measured again"):
        measure(store, [member("a")])


def test_a_batch_that_memory_is_too_small_for_is_missing_and_the_other_is_kept(store, member, monkeypatch):
    original = latency.timing_of

    def limited(answer, images):
        if len(images) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return original(answer, images)

    monkeypatch.setattr(latency, "timing_of", limited)
    assert list(measure(store, [member("a")])["a"].batches) == [1]


@pytest.fixture
def others(monkeypatch):
    """How many cores other programs use; 2 cores in all."""
    used = SimpleNamespace(cores=0.1)
    monkeypatch.setattr(other_programs.OtherPrograms, "cores", lambda self: used.cores)
    monkeypatch.setattr(other_programs.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return used


def test_latencies_that_others_slowed_down_are_told_and_marked(store, member, others, heard):
    others.cores = 1.2  # they and our one thread have nearly a core each
    assert measure(store, [member("a")], batches=[1])["a"].busy is None
    assert "busy" not in heard.text
    others.cores = 1.94
    measure(store, [member("a")], batches=[1])  # known already
    assert "busy" not in heard.text
    assert measure(store, [member("b")], batches=[1])["b"].busy == 1.9
    words = (
        "this machine is busy (other programs use 1.9 of 2 cores): latencies come out too high, and are stored; remove"
    )
    assert f"{words} {store.workspace.latency}" in heard.text
    others.cores = 0.0
    record = measure(store, [member("b")])["b"]  # a further batch; the first keeps its mark
    assert record.busy == stored(store.workspace, [member("b")], "cpu", 1)["b"].busy == 1.9


def test_a_system_that_does_not_count_is_taken_to_be_idle(store, member, others, heard):
    others.cores = None
    assert measure(store, [member("a")], batches=[1])["a"].busy is None
    assert "busy" not in heard.text


class Clock:
    """Every forward pass takes the next of the given times; the last comes again and again."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.calls, self.seconds = 0.0, 0, seconds
        monkeypatch.setattr(latency.time, "perf_counter", lambda: self.now)

    def __call__(self, images):
        self.now += self.seconds[min(self.calls, len(self.seconds) - 1)]
        self.calls += 1


IMAGES = torch.zeros(1, 3, 4, 4)


def test_warm_up_is_not_counted(monkeypatch):
    clock = Clock(monkeypatch, [0.090, 0.020, 0.010])
    assert timing_of(clock, IMAGES) == Timing(10.0, 10.0, 15)
    assert clock.calls == 2 + 15


def test_percentiles_are_those_of_the_counted_runs(monkeypatch):
    clock = Clock(monkeypatch, [0.2, 0.010, 0.020, 0.030, 0.040, 0.060])
    assert timing_of(clock, IMAGES) == Timing(30.0, 56.0, 5)


@pytest.mark.parametrize(("seconds", "runs"), [(1e-5, 50), (0.004, 38), (0.1, 5), (0.7, 3), (5.0, 1)])
def test_a_slow_network_is_run_a_few_times_and_a_quick_one_often(monkeypatch, seconds, runs):
    assert timing_of(Clock(monkeypatch, [seconds]), IMAGES).runs == runs


def test_one_network_is_in_memory_at_a_time_and_none_is_left(store, member, monkeypatch):
    alive = []
    original = streaming.open_network

    def watched(spec):
        assert all(sum(tensor.numel() for tensor in model.parameters()) == 0 for model in alive)
        alive.append(original(spec))
        return alive[-1]

    monkeypatch.setattr(streaming, "open_network", watched)
    measure(store, [member("a"), member("b", pixels=48)], batches=[1])
    assert [sum(tensor.numel() for tensor in model.parameters()) for model in alive] == [0, 0]


def test_the_network_that_is_measured_answers_as_the_one_that_is_streamed(store, member):
    spec = member("a").network(store.workspace)
    model = streaming.open_network(spec)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with streaming.network_on_device(spec, "cpu") as (answer, placed):
        found = answer(placed(images))
        assert not found.requires_grad
    torch.testing.assert_close(found, model(images).detach())


def test_equal_networks_are_timed_on_equal_images(store, member, monkeypatch):
    seen = []
    monkeypatch.setattr(latency, "timing_of", lambda answer, images: (seen.append(images), Timing(1.0, 1.0, 1))[1])
    for name in ("a", "b"):
        measure(store, [member(name)], batches=[2])
    assert [tuple(images.shape) for images in seen] == [(2, 3, 32, 32)] * 2
    assert torch.equal(*seen)


def test_on_a_gpu_events_are_timed_and_the_device_is_named(store, member, monkeypatch):
    with fake_cuda(monkeypatch) as device:
        timings = latency._measured(member("a"), store.workspace, "cuda:0", (1, 2))
        assert latency._named("cuda:0") == "cuda (fake)"
    assert set(timings) == {1, 2}
    assert all(timing.p50 > 0 for timing in timings.values())
    assert device.counts["to device"] > 0
    assert device.counts["events"] >= 2 * sum(timing.runs for timing in timings.values())  # begin and end of each run
