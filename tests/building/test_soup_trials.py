"""Checkpoints and mixtures on really trained networks: statistics by hand, barriers, which may be averaged at all."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from one_member import change
from preprocessings import BASE_32
from soup_zoo import NAME, config, one_backbone
from stored_predictions import workspace_at
from torch import nn

from utils.building import soup_trials
from utils.building.soup_trials import SoupScores, Trial, Trials
from utils.core.errors import UserError
from utils.discovery import discover
from utils.networks.preprocessing import Preprocessing
from utils.networks.soups import Ingredient, weighted_average
from utils.numeric.metrics import accuracy, log_loss, softmax
from utils.predictions import catalog, extraction, image_splits, streaming
from utils.predictions.store import Store

STAGES = ("final", "finetune_best", "fold0", "head_best", "snapshot1", "snapshot2", "snapshot3")


def store_at(base, *overrides):
    workspace = workspace_at(base)
    return Store(config(*overrides), workspace, catalog.load(workspace))


def survey(store):
    member = store.catalog.members[NAME]
    return soup_trials.survey_checkpoints(store, member, [e for e in member.checkpoints if e["stage"] in STAGES])


@pytest.fixture(scope="module")
def base(tmp_path_factory, trained):
    return one_backbone(trained, tmp_path_factory.mktemp("trials") / "w")


@pytest.fixture(scope="module")
def looked(base):
    return survey(store_at(base))


@pytest.fixture
def own(tmp_path, base):
    return shutil.copytree(base, tmp_path / "w")


# scores ---------------------------------------------------------------------------------------------------------------
def test_figures_are_those_of_the_stored_predictions(base, looked):
    store = store_at(base)
    member = store.catalog.members[NAME]
    extraction.ensure(store, [member], ("val",))
    rows = store.rows(member, "val")
    found = looked.trials.single("final")
    assert found.accuracy == accuracy(softmax(rows.logits), rows.labels)
    assert found.log_loss == pytest.approx(log_loss(softmax(rows.logits), rows.labels), abs=1e-6)


@pytest.mark.parametrize(("metric", "sign"), [("f1_macro", 1), ("accuracy", 1), ("log_loss", -1), ("brier", -1)])
def test_the_configured_metric_comes_first_and_log_loss_second(base, looked, metric, sign):
    store = store_at(base, f"runs.score_ensemble.optimization_metric={metric}")
    trials = Trials(store, store.catalog.members[NAME], looked.trials.ingredients)
    found = trials.single("snapshot1")
    assert found.rank == (sign * found.score, -found.log_loss)
    if metric in ("accuracy", "log_loss"):
        assert found.score == getattr(found, metric)


def test_a_mixture_is_run_once(looked, monkeypatch):
    trials = looked.trials
    mix = (("final", 1), ("snapshot1", 3))
    first = trials.trial(mix)
    monkeypatch.setattr(streaming, "stream", lambda *_, **__: pytest.fail("it was run again"))
    assert trials.trial(mix) == first


def figures(acc, loss, score=None):
    score = acc if score is None else score
    return SoupScores(score, acc, loss, (score, -loss), np.ones(1, dtype=bool), np.array([loss]))


def test_the_better_statistics_are_kept_and_the_averaged_ones_of_equals():
    low, high = figures(0.5, 1.0), figures(0.6, 1.0)
    assert Trial(low, high).kept == high
    assert Trial(high, low).kept == high
    assert not Trial(high, high).is_recomputed
    assert Trial(low, None).as_record() == {"averaged": low.as_record(), "recomputed": None, "kept": "averaged"}
    assert Trial(low, high).as_record()["kept"] == "recomputed"


# statistics -----------------------------------------------------------------------------------------------------------
def test_recomputed_statistics_are_those_of_shuffled_train_images_by_hand(base, looked):
    trials, store = looked.trials, store_at(base)
    mix = (("final", 1), ("snapshot1", 1))
    mixed = weighted_average([trials.ingredients[name] for name, _ in mix])
    found = trials.weights(mix, recompute=True)
    train, size = store.images("train"), store.config.dataset.batch_size
    assert size == 64
    order = np.random.default_rng(store.config.seed).permutation(len(train.paths))
    order = order[: len(order) // size * size]
    pixels = image_splits.open_images(train, BASE_32, image_cache=store.workspace.image_cache, threads=1)
    batches = [
        image_splits.normalise(torch.from_numpy(pixels.crops(part)), BASE_32) for part in order.reshape(-1, size)
    ]
    means, variances = by_hand(streaming.open_network(trials.spec, mixed), batches)
    for name in means:
        torch.testing.assert_close(found[f"{name}.running_mean"], means[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[f"{name}.running_var"], variances[name], rtol=1e-5, atol=1e-6)
    assert len(means) > 5
    assert not torch.allclose(found[f"{name}.running_var"], mixed[f"{name}.running_var"], rtol=1e-3)
    others = [name for name in mixed if name.rpartition(".")[0] not in means or name.endswith(("weight", "bias"))]
    assert all(torch.equal(found[name], mixed[name]) for name in others)


def by_hand(model, batches):
    """Means over the batches of each BatchNorm's input, every layer normalising by its batch."""
    seen: dict[str, list] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.training, layer.momentum = True, 0.0
            layer.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.setdefault(name, []).append(
                    (inputs[0].mean(dim=(0, 2, 3)), inputs[0].var(dim=(0, 2, 3), correction=1))
                )
            )
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return (
        {name: torch.stack([pair[n] for pair in pairs]).mean(dim=0) for name, pairs in seen.items()} for n in (0, 1)
    )


def test_batches_are_full_mixed_and_the_same_every_time(base, looked):
    trials = Trials(store_at(base, "dataset.batch_size=4"), looked.trials.member, looked.trials.ingredients)
    first, again = (list(trials._train_batches()) for _ in range(2))
    assert {len(images) for images, _ in first} == {soup_trials.FEWEST_IMAGES}
    assert len(first) == 224 // 16
    assert min(len(set(labels.tolist())) for _, labels in first) >= 2
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))


def test_nothing_is_recomputed_where_it_is_off_or_there_is_no_batch_norm(base, looked):
    off = store_at(base, "runs.model_soup.recompute_bn=false")
    assert not Trials(off, looked.trials.member, looked.trials.ingredients).recomputes
    bare = {"a": Ingredient("a", lambda: {"head.weight": torch.zeros(4, 4)})}
    assert not Trials(store_at(base), looked.trials.member, bare).recomputes
    assert looked.trials.recomputes
    assert looked.trials.trial((("final", 1),)).recomputed is None


# basins ---------------------------------------------------------------------------------------------------------------
def test_a_network_of_other_random_numbers_is_told_with_its_barrier(looked):
    pair = looked.trials.pair("final", "fold0")
    assert abs(pair.similarity) < 0.05
    assert pair.error > 0.2
    assert pair.log_loss > 0.2
    assert not pair.is_connected
    assert {entry["stage"]: entry["left_out"] for entry in looked.ingredients}["fold0"] == "another initialisation"
    assert ["final", "fold0"] in [record["between"] for record in looked.pairs]


def test_late_epochs_lie_together_and_equal_weights_count_once(looked):
    reasons = {entry["stage"]: entry["left_out"] for entry in looked.ingredients}
    assert reasons["finetune_best"] == "the weights of final"
    assert "snapshot2" in looked.connected
    assert looked.trials.pair("final", "snapshot2").similarity > 0.9
    ranks = [looked.trials.single(name).rank for name in looked.connected]
    assert ranks == sorted(ranks, reverse=True)


@pytest.mark.parametrize(
    ("ends", "middle", "is_connected"),
    [
        ((figures(0.90, 0.3), figures(0.90, 0.3)), figures(0.90, 0.3), True),
        ((figures(0.90, 0.3), figures(0.90, 0.3)), figures(0.60, 0.9), False),  # a barrier
        ((figures(0.90, 0.3), figures(0.10, 2.3)), figures(0.60, 0.9), False),  # a slope: no barrier above the mean
        ((figures(0.90, 0.3), figures(0.10, 2.3)), figures(0.88, 0.9), False),  # as accurate, and unsure
        ((figures(0.90, 0.3), figures(0.50, 0.9)), figures(0.93, 0.3), True),  # a poor part that helps
        ((figures(0.90, 0.3), figures(0.90, 0.3)), figures(0.855, 0.3), True),  # one row of 28 is noise
        ((figures(0.90, 0.3), figures(0.90, 0.3)), figures(0.82, 0.3), False),
    ],
)
def test_the_middle_must_come_up_to_the_better_end(base, looked, ends, middle, is_connected):
    trials = Trials(store_at(base), looked.trials.member, looked.trials.ingredients)
    trials.recomputes = False
    mix = (("final", 1), ("snapshot1", 1))
    trials._known = {(((n, 1),), False): end for n, end in zip(("final", "snapshot1"), ends, strict=True)}
    trials._known[mix, False] = middle
    pair = trials.pair("snapshot1", "final")
    assert pair.is_connected is is_connected
    assert pair.error == pytest.approx(sum(end.accuracy for end in ends) / 2 - middle.accuracy)
    assert pair.error_rise == pytest.approx(ends[0].accuracy - middle.accuracy)


def test_a_barrier_that_statistics_of_its_own_take_away_is_none(base, looked):
    trials = Trials(store_at(base), looked.trials.member, looked.trials.ingredients)
    mix = (("final", 1), ("snapshot1", 1))
    for name in ("final", "snapshot1"):
        trials._known[((name, 1),), False] = figures(0.9, 0.3)
    trials._known |= {(mix, False): figures(0.3, 2.0), (mix, True): figures(0.92, 0.29)}
    assert trials.pair("final", "snapshot1").is_connected
    assert trials.pair("final", "snapshot1").is_recomputed
    trials._known[mix, True] = figures(0.4, 1.5)
    assert not trials.pair("final", "snapshot1").is_connected


# what cannot be averaged ----------------------------------------------------------------------------------------------
def test_other_shapes_are_named_and_left_out(own, heard):
    def widen(record):
        weights = record["model_state_dict"]
        weights[next(iter(weights))] = torch.zeros(1, 2)

    path = own / "checkpoints" / f"{NAME}_snapshot1.pth"
    first = next(iter(torch.load(path, weights_only=True)["model_state_dict"]))
    change(path, widen)
    discover.discover(config(), workspace_at(own))
    found = survey(store_at(own))
    reason = {entry["stage"]: entry["left_out"] for entry in found.ingredients}["snapshot1"]
    assert reason.startswith(f"other tensors than final: {first} is float32 [1, 2], expected float32 [")
    assert "snapshot1" not in found.trials.ingredients
    assert f"{NAME}_snapshot1.pth: left out of the soups of {NAME}: {first} is" in heard.text


def test_checkpoints_of_other_preprocessing_are_left_out(own, heard):
    other = Preprocessing.of_base_pipeline(32).as_record() | {"interpolation": "bicubic"}
    path = own / "checkpoints" / f"{NAME}_snapshot1.pth"
    change(path, lambda record: record["extra"].update(preprocessing=other))
    discover.discover(config(), workspace_at(own))
    result = survey(store_at(own))
    reasons = {entry["stage"]: entry["left_out"] for entry in result.ingredients}
    assert reasons["snapshot1"] == "other preprocessing than final"
    assert "snapshot1" not in result.trials.ingredients
    assert f"{NAME}_snapshot1.pth: left out of the soups of {NAME}: made for other preprocessing" in heard.text


def test_a_checkpoint_that_changed_or_diverged_is_left_out_and_the_own_one_is_needed(own):
    checkpoints = own / "checkpoints"

    def diverge(record):
        record["model_state_dict"]["network.fc.weight"].fill_(float("nan"))

    change(checkpoints / f"{NAME}_snapshot2.pth", diverge)
    discover.discover(config(), workspace_at(own))
    (checkpoints / f"{NAME}_snapshot1.pth").unlink()
    change(checkpoints / f"{NAME}_head_best.pth", lambda record: record["extra"].update(epoch=9))
    found = survey(store_at(own))
    reasons = {entry["stage"]: entry["left_out"] for entry in found.ingredients}
    assert "is gone" in reasons["snapshot1"]
    assert "rows of a batch have NaN" in reasons["snapshot2"]
    assert "changed since discovery" in reasons["head_best"]
    assert found.connected == ("final",)
    change(checkpoints / f"{NAME}_final.pth", lambda record: record["extra"].update(epoch=9))
    with pytest.raises(UserError, match=rf"{NAME}_final\.pth: changed since discovery"):
        survey(store_at(own))
