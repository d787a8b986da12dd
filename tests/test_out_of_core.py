"""Selection and weights on files in blocks of rows give what arrays in memory give."""

from __future__ import annotations

import resource
import time

import numpy as np
import pytest

from utils import engines, out_of_core, pools
from utils.candidates import scorer
from utils.errors import UserError
from utils.metrics import softmax
from utils.out_of_core import Shards, linear_weights, select_in_blocks
from utils.selection import select

M, N, C = 9, 700, 6


def outputs(members=M, rows=N, classes=C, seed=0):
    """Logits (M, N, C) of members that differ in strength, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    logits = rng.normal(size=(members, rows, classes)).astype(np.float32)
    logits[:, np.arange(rows), labels] += np.linspace(0.3, 2.5, members)[:, None].astype(np.float32)
    return logits, labels


def written(folder, values, cuts=(250, 600), *, logits=False):
    """One file per shard of rows and member."""
    shards = []
    for number, part in enumerate(np.split(values, cuts, axis=1)):
        files = [folder / f"{member}_{number}.npy" for member in range(len(values))]
        for file, own in zip(files, part, strict=True):
            np.save(file, own)
        shards.append(tuple(files))
    return Shards(tuple(shards), logits)


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Probabilities in memory and in files, and labels; blocks are small, so that there are many."""
    monkeypatch.setattr(out_of_core, "BLOCK_BYTES", 4 * M * C * 64)
    logits, labels = outputs()
    probabilities = softmax(logits).astype(np.float32)
    return probabilities, written(tmp_path, probabilities), labels


@pytest.mark.parametrize("metric", ["log_loss", "brier", "accuracy", "f1_macro"])
@pytest.mark.parametrize("options", [{}, {"sorted_start": True}, {"bags": 3, "steps": 6}, {"tries": 3, "steps": 5}])
def test_the_same_members_and_losses_as_in_memory(given, metric, options):
    probabilities, shards, labels = given
    here = select(probabilities, labels, metric=metric, **options)
    there = select_in_blocks(shards, labels, metric=metric, **options)
    assert [path.members for path in there.paths] == [path.members for path in here.paths]
    for ours, theirs in zip(there.paths, here.paths, strict=True):
        np.testing.assert_allclose(ours.losses, theirs.losses, rtol=0, atol=1e-9)
    assert (there.counts == here.counts).all()


@pytest.mark.parametrize("metric", ["log_loss", "brier", "accuracy", "f1_macro"])
def test_every_candidate_has_its_loss_from_memory_whatever_was_asked_before(given, metric):
    probabilities, shards, labels = given
    here, there = scorer(probabilities, labels, metric), out_of_core.SCORERS[metric](shards, labels)
    for member in (8, 3, 0, 8):
        here.add(member)
        there.add(member)
        assert there.loss() == pytest.approx(here.loss(), abs=1e-9)
        np.testing.assert_allclose(there.losses(all_exact=True), here.losses(all_exact=True), rtol=0, atol=1e-9)


def test_log_loss_decides_where_accuracy_finds_members_equal(given):
    probabilities, shards, labels = given
    words = {"metric": "accuracy", "tie_breaker": "log_loss", "steps": 8}
    here, there = select(probabilities, labels, **words), select_in_blocks(shards, labels, **words)
    assert there.paths[0].members == here.paths[0].members


def test_rows_that_no_member_can_change_are_not_read_again(tmp_path, monkeypatch):
    logits, labels = outputs()
    logits[:, np.arange(N), labels] += 4
    shards = written(tmp_path, logits, logits=True)
    read = []
    whole = Shards.read
    monkeypatch.setattr(Shards, "read", lambda self, block: read.append(len(block.places)) or whole(self, block))
    votes = out_of_core.SCORERS["accuracy"](shards, labels)
    seen = []
    for _ in range(25):
        read.clear()
        votes.losses()
        seen.append(sum(read))
        votes.add(M - 1)
    assert seen[0] == N
    assert sum(seen) < len(seen) * N / 2


def test_soft_max_is_taken_of_logits(given, tmp_path):
    probabilities, _, labels = given
    (tmp_path / "logits").mkdir()
    shards = written(tmp_path / "logits", outputs()[0], logits=True)
    here = select(probabilities, labels, metric="log_loss")
    assert select_in_blocks(shards, labels, metric="log_loss").paths[0].members == here.paths[0].members


def test_weights_have_the_certificate_of_those_in_memory(given):
    probabilities, shards, labels = given
    there = linear_weights(shards, labels)
    here = pools.linear(probabilities[:, np.arange(N), labels])
    np.testing.assert_allclose(there.weights, here.weights, atol=1e-6)
    assert there.gap <= 1e-8
    there, here = linear_weights(shards, labels, metric="brier"), pools.linear_brier(probabilities, labels)
    np.testing.assert_allclose(there.weights, here.weights, atol=1e-5)
    assert there.value == pytest.approx(here.value, abs=1e-9)


def test_number_and_size_of_blocks_change_nothing(given, monkeypatch):
    _, shards, labels = given
    found = []
    for size in (4 * M * C, 4 * M * C * 97, 2**26):
        monkeypatch.setattr(out_of_core, "BLOCK_BYTES", size)
        found.append(select_in_blocks(shards, labels, metric="f1_macro", steps=6).paths)
    assert found[0] == found[1] == found[2]


def test_blocks_are_jobs_of_the_engine(given, monkeypatch):
    _, shards, labels = given
    asked = []

    class Recording(engines.Local):
        def each(self, function, items, **options):
            asked.append((function.__name__, len(items), options["threads"]))
            return super().each(function, items, **options)

    monkeypatch.setattr(engines, "_current", Recording())
    select_in_blocks(shards, labels, metric="accuracy", steps=2)
    assert {name for name, _, _ in asked} == {"_votes_of_block"}
    assert max(count for _, count, _ in asked) > 10
    assert {threads for _, _, threads in asked} == {1}


def test_what_does_not_fit_is_named(given, tmp_path):
    probabilities, shards, labels = given
    with pytest.raises(UserError, match=r"labels: found int64 of shape \(699,\); expected integers of shape \(700,\)"):
        select_in_blocks(shards, labels[:-1], metric="accuracy")
    with pytest.raises(UserError, match=r"labels: found 0\.\.6; expected 0\.\.5"):
        select_in_blocks(shards, np.where(labels == 5, 6, labels), metric="accuracy")
    with pytest.raises(UserError, match="metric: found recall"):
        select_in_blocks(shards, labels, metric="recall")
    np.save(shards.files[1][2], probabilities[2, :5])
    with pytest.raises(UserError, match=r"2_1\.npy: found shape \(5, 6\); expected \(350, 6\)"):
        select_in_blocks(Shards(shards.files), labels, metric="log_loss")
    np.save(shards.files[1][2], np.full((350, 6), np.nan, dtype=np.float32))
    with pytest.raises(UserError, match="found numbers from nan to nan; expected probabilities"):
        select_in_blocks(Shards(shards.files), labels, metric="brier")
    shards.files[0][0].unlink()
    with pytest.raises(UserError, match=r"0_0\.npy: cannot be read"):
        select_in_blocks(Shards(shards.files), labels, metric="brier")


@pytest.mark.slow
def test_a_thousandth_of_a_hundred_members_on_ten_million_images_of_a_thousand_classes(tmp_path):
    """docs/scale.md: 100 members x 10,000 images x 1,000 classes, 4 GB in ten shards; memory stays far below that."""
    members, rows, classes, count = 100, 10_000, 1_000, 10
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, rows)
    noise = rng.normal(size=(2 * rows // count, classes)).astype(np.float32)
    shards = []
    for shard, own in enumerate(np.split(labels, count)):
        files = []
        for member in range(members):
            at = int(rng.integers(rows // count))
            logits = noise[at : at + rows // count] * np.float32(1 + member / members)
            logits[np.arange(len(own)), own] += np.float32(2 + 4 * rng.random())
            files.append(tmp_path / f"{member:03d}_{shard}.npy")
            np.save(files[-1], logits)
        shards.append(tuple(files))
    shards = Shards(tuple(shards), logits=True)
    assert sum(file.stat().st_size for files in shards.files for file in files) >= 4_000_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = {}
    for metric in ("log_loss", "accuracy"):
        start, cpu = time.perf_counter(), time.process_time()
        found = select_in_blocks(shards, labels, metric=metric, steps=5)
        told[metric] = [round(time.perf_counter() - start, 1), round(time.process_time() - cpu, 1)]
        assert 1 <= found.paths[0].kept <= 5
        assert found.paths[0].losses[-1] < found.paths[0].losses[0]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
    print(f"[seconds, CPU seconds] {told}, peak memory grown by {grown:.2f} GB")
    assert grown < 1.5
