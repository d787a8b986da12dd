"""The section `runs.model_soup` on really trained networks: files, records, what is kept, what is reported."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import run_python
from one_member import change
from soup_runs import DEMO, ROLES, SETTINGS, brew, brewed_once, config
from soup_zoo import NAME
from stored_predictions import workspace_at

from utils.building import builder_protocol, ensembles, soup_mixing
from utils.building.builder_protocol import Session
from utils.building.soup_builder import SoupBuilder
from utils.core.errors import UserError
from utils.discovery import discover
from utils.networks.soups import Ingredient, weighted_average
from utils.numeric.metrics import log_loss, softmax
from utils.operations import inventory
from utils.predictions import catalog
from utils.predictions.store import Store

UNIFORM = "runs.model_soup.methods=[uniform]"


def weights(path):
    return torch.load(path, weights_only=True)["model_state_dict"]


def record(workspace):
    return json.loads(workspace.soup(NAME).read_text())


def reasons(workspace):
    return {entry["stage"]: entry["left_out"] for entry in record(workspace)["ingredients"]}


def loss_on_val(workspace, member):
    found = catalog.load(workspace)
    rows = Store(config(), workspace, found).rows(found.members[member], "val")
    return log_loss(softmax(rows.logits), rows.labels)


@pytest.fixture(scope="module")
def brewed(tmp_path_factory, trained):
    """Shared: read it, never write into it."""
    return brewed_once(tmp_path_factory, trained)


@pytest.fixture
def own(tmp_path, brewed):
    return workspace_at(shutil.copytree(brewed.base, tmp_path / "w"))


# what is written ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("role", ROLES)
def test_a_soup_is_a_derived_member_and_an_ensemble_of_its_own(brewed, role):
    member = catalog.load(brewed).members[f"{NAME}_{role}"]
    assert (member.source, member.parents, member.oof, member.usable) == ("derived", (NAME,), None, True)
    assert [entry["stage"] for entry in member.checkpoints] == [role]
    ensemble = ensembles.load(brewed, f"{role}_{NAME}")
    assert ensemble.members == (f"{NAME}_{role}",)
    assert ensemble.method == role
    assert {rows.split for rows in ensemble.provenance.selected_on} == {"val"}
    assert [(rows.split, rows.rows) for rows in ensemble.provenance.fitted_on] == [("train", "in_sample")]
    soup_record = json.loads((brewed.ensemble(ensemble.name) / "ensemble.json").read_text())["soup"]
    assert soup_record["normalisation"] == record(brewed)["soups"][role.removesuffix("_soup")]["normalisation"]
    assert soup_record["threads"] == (1 if soup_record["normalisation"]["kept"] == "recomputed" else None)
    assert {entry["stage"] for entry in soup_record["ingredients"]} >= {"final", "fold0", "head_best", "snapshot1"}
    unseen = ensembles.load_crossfit(brewed, ensemble.name)
    assert set(unseen.split.tolist()) == {"val"}


@pytest.mark.parametrize("role", ROLES)
def test_the_base_pipeline_opens_it_and_its_figures_are_the_recorded_ones(brewed, role):
    from training.work import open_network

    path = brewed.checkpoint(NAME, role)
    network, extra = open_network(path)
    assert network.architecture == extra["backbone_name"] == NAME
    assert not network.training
    own = torch.load(brewed.checkpoint(NAME, "final"), weights_only=True)["extra"]
    shared = ("classes", "model_size", "img_size", "augment", "group_regex", "split_digest")
    assert {name: extra[name] for name in shared if own[name] is not None} == {
        name: own[name] for name in shared if own[name] is not None
    }
    member = catalog.load(brewed).members[f"{NAME}_{role}"]
    rows = Store(config(), brewed, catalog.load(brewed)).rows(member, "val")
    assert extra["accuracy"] == member.recorded_accuracy == float((rows.logits.argmax(1) == rows.labels).mean())
    digests = {entry["stage"]: entry["sha256"] for entry in catalog.load(brewed).members[NAME].checkpoints}
    assert all(digests[part["stage"]] == part["sha256"] for part in extra["ingredients"])


def test_the_uniform_soup_is_the_mean_of_its_basin(brewed):
    part = record(brewed)["soups"]["uniform"]
    stages = list(part["shares"])
    assert len(stages) >= 2
    assert set(part["shares"].values()) == {1}
    expected = weighted_average([Ingredient(s, lambda s=s: weights(brewed.checkpoint(NAME, s))) for s in stages])
    found = weights(brewed.checkpoint(NAME, "uniform_soup"))
    assert found.keys() == expected.keys()
    learned = [name for name in found if "running_" not in name and "num_batches" not in name]
    assert all(torch.equal(found[name], expected[name]) for name in learned)
    kept = part["normalisation"]["kept"] == "averaged"
    assert all(torch.equal(found[name], expected[name]) for name in found) == kept


def test_of_both_statistics_the_better_is_kept_and_no_greedy_soup_is_below_its_best_part(brewed):
    soups, ingredients = record(brewed)["soups"], record(brewed)["ingredients"]
    for part in soups.values():
        kept = part["normalisation"][part["normalisation"]["kept"]]
        others = [part["normalisation"][kind] for kind in ("averaged", "recomputed") if part["normalisation"][kind]]
        assert (kept["score"], -kept["log_loss"]) == max((o["score"], -o["log_loss"]) for o in others)
    best = max((entry["score"], -entry["log_loss"]) for entry in ingredients if entry["left_out"] is None)
    greedy = soups["greedy"]["normalisation"][soups["greedy"]["normalisation"]["kept"]]
    assert (greedy["score"], -greedy["log_loss"]) >= best
    assert loss_on_val(brewed, f"{NAME}_greedy_soup") == pytest.approx(greedy["log_loss"], abs=1e-6)


def test_wise_ft_is_the_best_of_eleven_points_from_head_to_final(brewed):
    part = record(brewed)["soups"]["wise_ft"]
    assert [step["alpha"] for step in part["sweep"]] == [n / 10 for n in range(11)]
    scores = {entry["stage"]: entry["score"] for entry in record(brewed)["ingredients"] if "score" in entry}
    assert part["sweep"][0]["averaged"]["score"] == scores["head_best"]
    assert part["sweep"][10]["averaged"]["score"] == scores["final"]
    assert part["sweep"][0]["recomputed"] is part["sweep"][10]["recomputed"] is None
    kept = [step[step["kept"]] for step in part["sweep"]]
    best = max(range(11), key=lambda n: (kept[n]["score"], -kept[n]["log_loss"], n))
    assert part["alpha"] == best / 10
    expected = weighted_average(
        [Ingredient(s, lambda s=s: weights(brewed.checkpoint(NAME, s))) for s in ("head_best", "final")],
        [10 - best, best],
    )
    name = next(iter(expected))
    assert torch.equal(weights(brewed.checkpoint(NAME, "wise_ft"))[name], expected[name])


def test_other_ensembles_stay_as_they_are_and_take_a_soup_only_by_name(own, heard):
    before = ensembles.stored_digest(own, "soft_voting_ensemble")
    assert ensembles.load(own, "soft_voting_ensemble").members == (NAME,)
    assert brew(own, "runs.model_soup.enable=false").document["up_to_date"] == ["soft_voting_ensemble"]
    assert ensembles.stored_digest(own, "soft_voting_ensemble") == before
    assert "No K-fold results" not in heard.text
    named = f"backbones.include=[{NAME}, {NAME}_uniform_soup]"
    assert f"uniform_soup_{NAME}" in brew(own, named).document["up_to_date"]
    assert ensembles.load(own, "soft_voting_ensemble").members == (NAME, f"{NAME}_uniform_soup")
    assert f"derived ones have no others: {NAME}_uniform_soup" in heard.text
    assert "No K-fold results" not in heard.text


# again ----------------------------------------------------------------------------------------------------------------
def test_a_second_build_does_nothing_and_imports_no_torch(own):
    before = {path: path.stat().st_mtime_ns for path in own.base.rglob("*") if "debug_logs" not in str(path)}
    code = (
        "import sys, ensemble_orchestrator as o\n"
        "code = o.main(sys.argv[1:])\n"
        "assert not {'torch', 'timm', 'PIL'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    options = [word for value in SETTINGS for word in ("--set", value)]
    done = run_python("-c", code, "build-ensemble", "--config", str(DEMO), *options, "--workspace", str(own.base))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("up to date") == 4
    assert "the catalog is older" not in done.stderr
    after = {path: path.stat().st_mtime_ns for path in before if path.is_file()}
    assert after == {path: time for path, time in before.items() if path.is_file()}


def test_force_gives_the_same_bytes(own, brewed):
    result = brew(own, force=True)
    assert set(result.document["built"]) == {f"{role}_{NAME}" for role in ROLES} | {"soft_voting_ensemble"}
    places = [own.checkpoint(NAME, role) for role in ROLES] + [own.soup(NAME)]
    places += [path for role in ROLES for path in own.ensemble(f"{role}_{NAME}").iterdir()]
    for path in places:
        assert path.read_bytes() == (brewed.base / path.relative_to(own.base)).read_bytes(), path


def test_status_knows_which_soups_are_current_and_why_not(own):
    def states(*overrides):
        found = inventory.take(config(*overrides), own)
        return {name: str(state) for name, state in found.ensembles.items()}, found.requested["build-ensemble"]

    names = [f"{role}_{NAME}" for role in ROLES]
    assert states()[0] == dict.fromkeys(sorted([*names, "soft_voting_ensemble"]), "current")
    assert set(names) <= set(states()[1])
    assert states("runs.model_soup.recompute_bn=false")[0][names[0]].startswith("stale: its checkpoints, images or")
    assert not set(names) & set(states("runs.model_soup.enable=false")[1])
    own.checkpoint(NAME, "greedy_soup").unlink()
    assert states()[0][names[1]] == "stale: its files have changed since the build"
    assert states()[0][names[0]] == "current"
    shutil.rmtree(own.ensemble(names[0]))
    assert states()[0][names[0]] == "missing"
    discover.discover(config(), own)
    assert set(brew(own).document["built"]) == set(names)
    assert set(states()[0].values()) == {"current"}


def test_another_ingredient_is_another_soup(own):
    before = own.checkpoint(NAME, "uniform_soup").read_bytes()
    change(own.checkpoint(NAME, "snapshot2"), lambda r: r["model_state_dict"]["network.fc.bias"].add_(0.25))
    discover.discover(config(), own)
    assert f"uniform_soup_{NAME}" in brew(own).document["built"]
    assert own.checkpoint(NAME, "uniform_soup").read_bytes() != before


def test_discovery_finds_the_soups_again_as_they_stand_in_the_catalog(own):
    before = catalog.load(own)
    discover.discover(config(), own)
    assert catalog.load(own).members == before.members


# what helps and what does not -----------------------------------------------------------------------------------------
def test_a_soup_of_noisy_copies_beats_each_of_them(own):
    """All checkpoints become noisy copies of one good network, whose mean is nearer to it than any of them."""
    good = weights(own.checkpoint(NAME, "final"))
    stages = ("final", "snapshot1", "snapshot2", "snapshot3")
    for path in own.checkpoints.glob("*.pth"):
        if path.name.removeprefix(f"{NAME}_").removesuffix(".pth") not in stages:
            path.unlink()
    for seed, stage in enumerate(stages):
        generator = torch.Generator().manual_seed(seed)

        def spoil(found, generator=generator):
            for name, value in good.items():
                noise = torch.randn(value.shape, generator=generator)
                is_matrix = value.is_floating_point() and value.ndim >= 2
                found["model_state_dict"][name] = value + 0.6 * value.std() * noise if is_matrix else value

        change(own.checkpoint(NAME, stage), spoil)
    discover.discover(config(), own)
    metric = "runs.score_ensemble.optimization_metric=log_loss"
    result = brew(own, metric, "runs.model_soup.methods=[uniform, greedy]")
    parts = [entry["log_loss"] for entry in record(own)["ingredients"]]
    assert len(parts) == 4
    for role in ("uniform_soup", "greedy_soup"):
        assert loss_on_val(own, f"{NAME}_{role}") < min(parts) - 0.02
    assert "on the val rows that chose it" in result.text
    assert "is worse than" not in result.text


def test_a_poor_part_makes_no_poor_greedy_soup_and_this_is_told(own):
    def spoil(found):
        found["model_state_dict"]["network.fc.bias"].add_(torch.tensor([1.5, 0, 0, 0]))

    for stage in ("snapshot1", "snapshot2"):
        change(own.checkpoint(NAME, stage), spoil)
    discover.discover(config(), own)
    metric = "runs.score_ensemble.optimization_metric=log_loss"
    result = brew(own, metric, "runs.model_soup.methods=[greedy]")
    part = record(own)["soups"]["greedy"]
    best = min(entry["log_loss"] for entry in record(own)["ingredients"] if entry["left_out"] is None)
    assert part["gain"]["log_loss"] <= 0
    assert loss_on_val(own, f"{NAME}_greedy_soup") <= best + 1e-6
    assert not {"snapshot1", "snapshot2"} & set(part["shares"])
    assert not result.failures


def test_nothing_to_average_is_told_and_a_failure_only_where_there_is_no_soup_at_all(own):
    for path in own.checkpoints.glob("*.pth"):
        if not path.name.endswith(("_final.pth", "_finetune_best.pth", *(f"_{role}.pth" for role in ROLES))):
            path.unlink()
    discover.discover(config(), own)
    result = brew(own)
    assert "nothing to average: of 2 checkpoints one lies in the basin of final" in result.text
    assert "it needs head_best and a fine-tuned checkpoint with other weights; one of them is missing" in result.text
    assert [text.partition(":")[0] for text in result.failures] == ["runs.model_soup"]
    assert "no selected backbone has two different checkpoints" in result.failures[0]
    found = inventory.take(config(), own)
    reason = "stale: the last build left it out: nothing to average: of 2 checkpoints one lies in the basin of final"
    assert str(found.ensembles[f"greedy_soup_{NAME}"]) == reason
    assert found.requested["build-ensemble"] == (
        "soft_voting_ensemble",
    )  # a build would change nothing about it; `clean --stale` does
    assert brew(own).document["built"] == []


def test_trouble_with_one_backbone_is_a_failure_with_its_name(own):
    change(own.checkpoint(NAME, "final"), lambda r: r["model_state_dict"]["network.fc.bias"].add_(1))
    found = catalog.load(own)
    store = Store(config(), own, found)
    outcome = builder_protocol.run([SoupBuilder()], Session(store, (found.members[NAME],)), force=True)
    assert [text.partition(": /")[0] for text in outcome.failures] == [f"runs.model_soup: {NAME}"]
    assert "changed since discovery" in outcome.failures[0]


def test_late_epochs_alone_are_looked_at(brewed):
    member = catalog.load(brewed).members[NAME]
    stages = [
        "final",
        "finetune_epoch0",
        "finetune_epoch4",
        "finetune_epoch5",
        "finetune_epoch9",
        "head_epoch7",
        "fold0",
    ]
    entries = tuple({"path": stage, "stage": stage, "sha256": stage} for stage in stages)
    object.__setattr__(member, "checkpoints", entries)
    found = [entry["stage"] for entry in soup_mixing.usable_checkpoints(member)]
    assert found == ["final", "finetune_epoch5", "finetune_epoch9", "fold0"]


def test_a_damaged_record_is_named_with_its_remedy(own):
    own.soup(NAME).write_text("{")
    result = brew(own)
    assert f"{own.soup(NAME)}: damaged" in result.failures[0]
    assert "Remove it, then run build-ensemble again" in result.failures[0]
    assert inventory.take(config(), own).ensembles[f"greedy_soup_{NAME}"].state == "damaged"
    assert not brew(own, UNIFORM, force=True).failures


def test_checkpoints_of_equal_content_have_equal_bytes(tmp_path):
    from utils.core.artifacts import write_checkpoint

    state = {"w": torch.arange(4.0), "n": torch.tensor(3)}
    text = "".join(["a", "b"])
    write_checkpoint(
        tmp_path / "one.pth", state, {"stage": text, "parents": [text], "accuracy": np.float64(0.5).item()}
    )
    write_checkpoint(tmp_path / "two.pth", dict(state), {"accuracy": 0.5, "parents": ["ab"], "stage": "ab"})
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "two.pth").read_bytes()
    with pytest.raises((UserError, ValueError)):
        write_checkpoint(tmp_path / "three.pth", state, {"accuracy": float("nan")})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.pth", "two.pth"]
