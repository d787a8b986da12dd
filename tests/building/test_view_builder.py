"""Test-time augmentation of trained networks: chosen where val needs it, derived with fold networks, exported."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import page_outputs
import pytest
from conftest import PROJECT
from stored_predictions import workspace_at

from utils.building import build_commands, ensembles, view_builder, view_outputs
from utils.building.builder_protocol import Session
from utils.core.config_file import load_config
from utils.core.errors import UserError
from utils.discovery import discover
from utils.exporting import export
from utils.inference import predict
from utils.inference.classifier import WorkspaceClassifier
from utils.numeric.metrics import softmax
from utils.numeric.view_choice import ORIGINAL, ViewChoice
from utils.predictions import catalog, fold_networks, view_members
from utils.predictions.store import Store

NAME, OTHER = "CustomResNetMish", "CustomConvNeXt"
NETWORK = f"{NAME}_tta"
SETTINGS = ("device=cpu", f"backbones.include=[{NAME}]", "runs.score_ensemble.methods=[soft_voting]")


def config(*overrides: str):
    return load_config(PROJECT / "configs" / "votes.yaml", overrides=[*SETTINGS, *overrides])


ON = config("tta.enable=true", "tta.views=[flip, rotations]")


def write_mirrored(folder: Path, digits: dict[int, list[np.ndarray]]) -> None:
    """Digits of which every second one is mirrored, as `<digit>/<number>.png`."""
    from PIL import Image

    for digit, images in digits.items():
        place = folder / str(digit)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for number, pixels in enumerate(images):
            Image.fromarray(pixels[:, ::-1] if number % 2 else pixels).save(place / f"{number:04d}.png")


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory, trained) -> Path:
    """One network of upright digits, with a val and a test split of other digits that are mirrored half of the time."""
    from sklearn.datasets import load_digits

    base = tmp_path_factory.mktemp("mirrored") / "w"
    shutil.copytree(trained, base, ignore=shutil.ignore_patterns("kfold_results", "Data", "image_cache"))
    for path in (base / "checkpoints").glob("*.pth"):
        if not path.name.startswith(f"{NAME}_final"):
            path.unlink()
    data = load_digits()
    scans = np.rint(data.images * (255 / 16)).astype(np.uint8)
    of_class = {digit: list(scans[data.target == digit][70:170]) for digit in range(4)}
    write_mirrored(base / "split_dataset" / "val", {digit: images[:60] for digit, images in of_class.items()})
    write_mirrored(base / "split_dataset" / "test", {digit: images[60:] for digit, images in of_class.items()})
    discover.discover(ON, workspace_at(base))
    build_commands.build_ensemble(ON, workspace_at(base))
    return base


@pytest.fixture
def workspace(mirrored, tmp_path):
    return workspace_at(Path(shutil.copytree(mirrored, tmp_path / "w")))


def listed(workspace):
    return catalog.load(workspace).members


def record(workspace, name=NAME):
    return json.loads(workspace.view_choice(name).read_text())


def test_val_decides_for_the_view_that_the_planted_images_need(workspace):
    entry = record(workspace)
    assert entry["views"] == ["flip"]
    assert entry["log_loss_gain_ci95"][0] > 0
    member = listed(workspace)[NETWORK]
    assert (member.source, member.parents, member.views) == ("derived", (NAME,), ("flip",))
    assert ensembles.load(workspace, "tta_ensemble").members == (NETWORK,)
    assert ensembles.load(workspace, "soft_voting_ensemble").members == (NETWORK,)


def test_the_gain_holds_on_the_test_split(workspace):
    store = Store(ON, workspace, catalog.load(workspace))
    scores = {name: store.rows(store.catalog.members[name], "test") for name in (NETWORK,)}
    Session(store, ()).ensure([store.catalog.members[NAME]])
    scores[NAME] = store.rows(store.catalog.members[NAME], "test")
    losses = {n: -np.log(softmax(r.logits)[np.arange(len(r.labels)), r.labels]).mean() for n, r in scores.items()}
    assert losses[NETWORK] < losses[NAME]


def test_a_second_build_runs_no_network_and_other_settings_rebuild(workspace, monkeypatch):
    monkeypatch.setattr(view_outputs.streaming, "stream", lambda *_, **__: pytest.fail("a network was run"))
    again = build_commands.build_ensemble(ON, workspace)
    assert set(again.document["up_to_date"]) == {"tta_ensemble", "soft_voting_ensemble"}
    fewer = config("tta.enable=true", "tta.views=[flip]")  # whose logits are kept
    assert "tta_ensemble" in build_commands.build_ensemble(fewer, workspace).document["built"]


def test_a_new_discovery_keeps_the_views_until_the_network_changes(workspace):
    discover.discover(ON, workspace)
    assert NETWORK in listed(workspace)
    path = workspace.checkpoint(NAME, "final")
    path.write_bytes(path.read_bytes() + b" ")
    discover.discover(ON, workspace)
    assert NETWORK not in listed(workspace)


def test_without_the_section_the_plain_network_is_selected(workspace):
    build_commands.build_ensemble(config(), workspace)
    assert ensembles.load(workspace, "soft_voting_ensemble").members == (NAME,)


def test_predict_with_views_is_the_derived_member(workspace):
    store = Store(ON, workspace, catalog.load(workspace))
    assert predict.model_with_views(store, NAME) == NETWORK
    assert predict.model_with_views(store, "tta_ensemble") == "tta_ensemble"
    paths = store.images("test").paths
    found = WorkspaceClassifier(store, NETWORK).predict_block(paths, lambda _: None)
    expected = softmax(store.rows(store.catalog.members[NETWORK], "test").logits)
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-5)


def test_predict_with_views_refuses_a_model_without_any(workspace):
    build_commands.build_ensemble(config(), workspace)
    store = Store(ON, workspace, catalog.load(workspace))
    with pytest.raises(UserError, match=r"no member of soft_voting_ensemble averages .* --set tta\.enable=true"):
        predict.model_with_views(store, "soft_voting_ensemble")
    workspace.view_choice(NAME).unlink()
    plain = replace(store.catalog, members={NAME: store.catalog.members[NAME]})
    with pytest.raises(UserError, match=r"no views were chosen .* build-ensemble --set tta\.enable=true"):
        predict.model_with_views(store.with_catalog(plain), NAME)


@pytest.mark.parametrize("input_kind", ["float-nchw", "uint8-nhwc"])
def test_the_exported_graph_holds_the_views(workspace, input_kind):
    done = export.export(
        config("exports.enable=true"), workspace, model_name="tta_ensemble", formats=["onnx"], input=input_kind
    )
    assert done.failures == []
    parity = json.loads((workspace.exports / "tta_ensemble" / "export_status.json").read_text())["onnx"]["parity"]
    assert parity["max_abs_diff"] <= 1e-4


@pytest.fixture(scope="module")
def folds(tmp_path_factory, trained):
    """A workspace with fold networks, in which flips are chosen whatever the rows say. Shared: remove nothing."""
    base = tmp_path_factory.mktemp("folds") / "w"
    shutil.copytree(trained, base, ignore=shutil.ignore_patterns("Data"))
    for path in (base / "checkpoints").glob("*.pth"):
        if not path.name.startswith(NAME) or "snapshot" in path.name:
            path.unlink()
    chosen = ViewChoice(("flip",), ("flip",), 0.1, (0.05, 0.15), 0.0)
    workspace = workspace_at(base)
    discover.discover(ON, workspace, verify=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view_builder, "choose_views", lambda _: chosen)
        build_commands.build_ensemble(ON, workspace)
    return Store(ON, workspace, catalog.load(workspace))


def test_fold_networks_answer_for_train_rows_with_the_views(folds):
    member, plain = folds.catalog.members[NETWORK], folds.catalog.members[NAME]
    outputs = view_outputs.measure(folds, plain, ("flip",))
    rows = folds.oof(member)
    of_train = outputs.split == "train"
    expected = (outputs.logits[ORIGINAL] + outputs.logits["flip"])[of_train] / 2
    np.testing.assert_allclose(rows.logits, expected, atol=1e-5)
    np.testing.assert_array_equal(rows.sample_ids, outputs.sample_ids[of_train])
    assert np.abs(softmax(outputs.logits[ORIGINAL][of_train]) - softmax(folds.oof(plain).logits)).max() < 1e-3
    assert fold_networks.stages(member) == ("fold0", "fold1")
    parts = folds.out_of_sample_parts([member])[NETWORK]
    assert {part.split for part in parts} == {"train", "val"}
    val = np.concatenate([part.logits for part in parts if part.split == "val"])
    mean = (outputs.logits[ORIGINAL] + outputs.logits["flip"])[~of_train] / 2
    np.testing.assert_allclose(val, mean, atol=1e-4)


def test_the_rows_that_chose_the_views_are_in_the_provenance(folds):
    provenance = ensembles.load(folds.workspace, "tta_ensemble").provenance
    assert {part.split for part in provenance.selected_on} == {"train", "val"}


def test_out_of_fold_rows_of_lost_fold_networks_leave_a_member_without_views(folds):
    lost = [entry for entry in folds.catalog.members[NAME].checkpoints if entry["stage"] != "fold1"]
    reason = view_outputs.reason_without(folds, replace(folds.catalog.members[NAME], checkpoints=tuple(lost)))
    assert "main.py --stages kfold" in reason


def test_one_choice_for_all_members_needs_shared_rows(workspace):
    store = Store(ON, workspace, catalog.load(workspace))
    part = view_outputs.measure(store, store.catalog.members[NAME], ("flip",))
    other = replace(part, split=np.full(len(part.labels), "train"))
    with pytest.raises(UserError, match=r"no row is out of sample for all members.*--set tta\.scope=member"):
        view_builder.shared_outputs(store, [part, other])
    together = view_builder.shared_outputs(store, [part, part])
    assert together.logits["flip"].shape == (2, len(part.labels), 4)


def test_a_damaged_record_is_named_and_left_out(workspace):
    workspace.view_choice(NAME).write_text('{"key": "", "networks": "", "views": 3}')
    current = catalog.read(workspace)
    assert NETWORK not in view_members.with_views(workspace, current).members
    with pytest.raises(UserError, match="expected a list"):
        view_members.record_of(workspace, NAME)


def test_the_guide_shows_the_words_of_two_choices():
    (shown,) = [block for block in page_outputs.blocks("guides/methods.md") if "passes for an image" in "".join(block)]
    unstable = {"views": [], "chosen_on_all_rows": ["rotations"]}
    stable = {"views": ["rotations"], "log_loss_gain": 0.1093, "log_loss_gain_ci95": [0.0597, 0.1590]}
    described = [f"    {name}: {view_builder.describe(choice)}" for name, choice in ((OTHER, unstable), (NAME, stable))]
    assert shown[1:] == described
