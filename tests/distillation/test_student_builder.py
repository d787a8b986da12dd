"""The command `distill` on really trained networks: what it leaves, who teaches whom, what it refuses."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROJECT, WITHOUT_TORCH, run_python
from given_predictions import logged
from killing import run_and_kill_repeatedly
from stored_predictions import workspace_at
from student_runs import QUICK, SMALL, config, distill, record, store_of
from synthetic_votes import own, votes

from utils.building import ensembles, recommendation
from utils.core import engines, worker_processes
from utils.core.errors import LeakageError, UserError
from utils.distillation import open_networks, student_builder, target_sources, teachers, trained_pairs
from utils.distillation.students import ensemble_name
from utils.evaluation.evaluate import evaluate
from utils.numeric.metrics import log_loss, softmax
from utils.operations import inventory, upkeep
from utils.predictions import catalog, member_selection, streaming

__all__ = ["own", "votes"]
pytestmark = pytest.mark.usefixtures("without_figures")
NAME = "distilled_mobile"
ALONE = "distillation.teacher=CustomConvNeXt"  # where one network teaches as well as three


def weights(workspace, name="CustomConvNeXt"):
    return torch.load(workspace.checkpoint(name, "distilled"), weights_only=True)["model_state_dict"]


@pytest.fixture(scope="module")
def taught(tmp_path_factory, votes):
    """The workspace after `distill` and `evaluate`. Shared: read it, never write into it."""
    workspace = workspace_at(Path(shutil.copytree(votes.base, tmp_path_factory.mktemp("taught") / "w")))
    result = distill(workspace)
    assert result.document["built"] == [NAME]
    evaluate(config(), workspace)
    return workspace


# what it leaves -------------------------------------------------------------------------------------------------------
def test_a_student_is_a_derived_member_and_an_ensemble_of_its_own(taught):
    member = catalog.load(taught).members["CustomMobileOne_distilled"]
    assert (member.source, member.oof, member.usable) == ("derived", None, True)
    assert member.parents == ("CustomConvNeXt", "CustomResNetMish", "CustomViTHybrid")
    assert (member.size, member.img_size) == ("tiny", 32)  # as its neighbours are
    ensemble = ensembles.load(taught, NAME)
    assert (ensemble.method, ensemble.members) == ("distilled", ("CustomMobileOne_distilled",))
    assert ensemble.provenance.selected_on == ()
    assert member.selection == "last"
    assert set(ensembles.load_crossfit(taught, NAME).split) == {"val"}
    assert not list(taught.distillation(NAME).glob("progress_*"))
    extra = torch.load(taught.checkpoint("CustomMobileOne", "distilled"), weights_only=True)["extra"]
    assert (extra["stage"], extra["selection"], extra["augment"]) == ("distilled", "last", "no_flip")
    assert extra["teacher"] == "soft_voting_ensemble"


def test_metrics_have_the_controls_and_the_gain_that_is_kept(taught):
    found = json.loads(taught.ensemble_metrics(NAME, "test").read_text())
    for who in ("alone", "teacher"):
        assert {"accuracy", "log_loss", "ece", "latency_ms", "size_mb"} <= found["controls"][who].keys()
        assert found["controls"][who]["latency_ms"]["batch_1"]["p50"] > 0
    teacher = json.loads(taught.ensemble_metrics("soft_voting_ensemble", "test").read_text())
    for metric in ("accuracy", "log_loss", "ece"):
        assert found["controls"]["teacher"][metric] == pytest.approx(teacher[metric], abs=1e-6)
    assert found["controls"]["teacher"]["size_mb"] > found["controls"]["alone"]["size_mb"] == found["size_mb"]
    assert set(found["gain_kept"]) == {"value", "ci95", "log_loss"}
    assert "advantage in accuracy" in found["notes"]["controls"]
    assert "than the teacher" in found["notes"]["controls"]  # its speed
    assert not found["contaminated"]
    others = json.loads(taught.ensemble_metrics("hard_voting_ensemble", "test").read_text())
    assert "controls" not in others["notes"]


def test_the_checkpoint_loads_without_this_project_and_gives_the_same_answers(taught, tmp_path):
    program = """
import sys, numpy as np, torch
sys.path.insert(0, sys.argv[1])
from training.work import open_network, logits_of
from utils.datasets import DecodedDataset
from pathlib import Path
model, extra = open_network(Path(sys.argv[2]))
assert "soup_building" not in " ".join(sys.modules)
np.save(sys.argv[3], logits_of(model, DecodedDataset.of_split("test", extra["img_size"]), 32))
"""
    path = taught.checkpoint("CustomMobileOne", "distilled")
    script = tmp_path / "program.py"
    script.write_text(program)
    arguments = (str(PROJECT / "BASE-BACK" / "src"), str(path), str(tmp_path / "logits.npy"))
    done = run_python(str(script), *arguments, environment={"DBT_BASE_DIR": str(taught.base)}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kept = np.load(taught.predictions("CustomMobileOne_distilled", "test") / "logits.npy")
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), kept, atol=1e-4)


def test_a_second_run_keeps_it_and_needs_no_torch(taught):
    settings = [word for override in QUICK for word in ("--set", override)]
    options = ("--config", "configs/votes.yaml", "--workspace", str(taught.base), "--json")
    done = run_python("-c", WITHOUT_TORCH, "distill", *settings, *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["up_to_date"] == [NAME]


def test_status_knows_whether_it_is_current(taught):
    assert inventory.take(config(), taught).ensembles[NAME].state == "current"
    other = inventory.take(config("distillation.temperature=2"), taught)
    assert other.ensembles[NAME].state == "stale"
    missing = inventory.take(config(SMALL), taught)
    assert missing.ensembles["distilled_convnext"].state == "missing"
    assert missing.requested["distill"] == ("distilled_convnext",)
    assert NAME not in inventory.take(config("distillation.enable=false"), taught).requested.get("distill", ())


def test_it_stays_out_of_other_ensembles_and_is_never_recommended(taught):
    assert "CustomMobileOne_distilled" not in ensembles.load(taught, "soft_voting_ensemble").candidates
    ranking = json.loads(taught.ranking("test").read_text())
    assert NAME in {row["name"] for row in ranking["rows"]}
    assert ranking["recommended"]["name"] != NAME


def test_names_are_those_of_the_contract():
    names = {"CustomMobileOne": "distilled_mobile", "CustomConvNeXt": "distilled_convnext"}
    names |= {"CustomGhostNetV2": "distilled_ghostnetv2", "resnet10t": "distilled_resnet10t"}
    assert {name: ensemble_name(name) for name in names} == names


def test_the_same_request_gives_the_same_bytes_and_the_control_is_the_same_network(own, tmp_path):
    distill(own, SMALL)
    first = own.checkpoint("CustomConvNeXt", "distilled").read_bytes()
    distill(own, SMALL, force=True)
    assert own.checkpoint("CustomConvNeXt", "distilled").read_bytes() == first
    found = record(own, SMALL)
    assert [len(rows) for rows in found["history"].values()] == [2, 2]
    assert found["epochs"] == {"alone": 2, "student": 2}
    # With nothing of the teacher's the student is its own control.
    distill(own, SMALL, "distillation.alpha=0", "distillation.epochs=1")
    alike = record(own, SMALL)
    assert alike["history"]["student"] == alike["history"]["alone"]


def test_the_pipeline_distills_and_evaluates_again(own, orchestrator):
    settings = [word for override in (*QUICK, SMALL) for word in ("--set", override)]
    done = orchestrator("pipeline", "--config", "configs/votes.yaml", "--json", *settings, workspace=own.base)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["distill"]["built"] == ["distilled_convnext"]
    names = [{row["name"] for row in found[stage]["rows"]} for stage in ("evaluate", "evaluate-2")]
    assert names[1] - names[0] == {"distilled_convnext"}


# who teaches ----------------------------------------------------------------------------------------------------------
def test_oof_targets_come_from_networks_and_a_combiner_that_did_not_see_the_row(built):
    """Against the arrays of the fold networks themselves, and copies of the combiner fitted on the other folds."""
    workspace = workspace_at(built)
    store = store_of(workspace)
    ids = store.images("train").sample_ids
    teacher = teachers.resolve(store, "soft_voting", excluded_member="x")
    parts = []
    for name in teacher.ensemble.members:
        with np.load(built / "kfold_results" / f"{name}_oof_predictions.npz") as arrays:
            place = {sample_id: row for row, sample_id in enumerate(arrays["sample_ids"].tolist())}
            parts.append(softmax(arrays["logits"][[place[sample_id] for sample_id in ids]]))
    np.testing.assert_allclose(
        np.exp(teachers.crossfit_log_probabilities(store, teacher, "train", ids)), np.mean(parts, axis=0), atol=1e-5
    )
    member = teachers.resolve(store, "CustomViTHybrid", excluded_member="x")
    where = list(teacher.ensemble.members).index("CustomViTHybrid")
    np.testing.assert_allclose(
        np.exp(teachers.crossfit_log_probabilities(store, member, "train", ids)), parts[where], atol=1e-5
    )


def test_a_combiner_s_targets_do_not_change_with_the_labels_of_their_own_fold(own):
    """What a learned teacher says of a fold's rows comes from a copy that never read their labels."""
    from utils.building import build_commands, fitting

    learned = ("runs.score_ensemble.methods=[weighted]",)
    build_commands.build_ensemble(config(*learned), own)
    store = store_of(own)
    teacher = teachers.resolve(store, "weighted", excluded_member="x")
    ids = store.images("train").sample_ids
    log_probabilities = teachers.crossfit_log_probabilities(store, teacher, "train", ids)
    honest = fitting.out_of_sample_rows(store, teachers.members_of(store, teacher))
    held_out = honest.fold == 0
    recipe = ensembles.COMBINERS["weighted"].configured(
        config(*learned), fitting.member_facts(store, teachers.members_of(store, teacher))
    )
    copy = recipe.fit(honest.rows.logits[:, ~held_out], honest.rows.labels[~held_out], honest.fold[~held_out])
    own_rows = held_out & (honest.rows.split == "train")
    expected = dict(
        zip(honest.rows.sample_ids[own_rows], copy.predict_proba(honest.rows.logits[:, own_rows]), strict=True)
    )
    for place, sample_id in enumerate(ids):
        if sample_id in expected:
            np.testing.assert_allclose(np.exp(log_probabilities[place]), expected[sample_id], atol=1e-5)


@pytest.mark.skipif(worker_processes.start_method() != "fork", reason="the control is trained in a fork only")
@pytest.mark.parametrize("kind", ["oof", "consistent"])
def test_the_control_is_trained_in_another_process_with_equal_results(own, monkeypatch, tmp_path, kind):
    train_control = trained_pairs.PairTraining._alone

    def noted(run, number):
        (tmp_path / f"cores.{engines.cores()}.{os.getpid()}").touch()
        return train_control(run, number)

    monkeypatch.setattr(trained_pairs.PairTraining, "_alone", noted)
    found = {}
    for cores in (1, 2):
        monkeypatch.setattr(engines, "cores", lambda cores=cores: cores)
        distill(own, SMALL, ALONE, f"distillation.targets={kind}", force=True)
        history = record(own, SMALL)["history"]
        found[cores] = history, weights(own), (own.distillation("distilled_convnext") / "controls.npz").read_bytes()
    processes = dict(path.name.split(".")[1:] for path in tmp_path.glob("cores.*"))
    assert processes["1"] == str(os.getpid()) != processes["2"]
    (history, network, controls), (other_history, other_network, other_controls) = found[1], found[2]
    assert history == other_history
    assert network.keys() == other_network.keys()
    assert all(torch.equal(network[name], other_network[name]) for name in network)
    assert controls == other_controls


def test_consistent_hands_teacher_and_student_the_same_tensors(own, monkeypatch):
    """And one network of the teacher's is in memory at a time where they are too large to stay."""
    monkeypatch.setattr(engines, "cores", lambda: 1)  # so that everything runs in this process
    monkeypatch.setattr(open_networks, "KEPT_BYTES", 0)
    shown: dict[str, list[torch.Tensor]] = {}
    networks, residents = [], []

    def listened(who, model):
        def note(_, given):
            if model.training or who not in ("student", "alone"):  # val is looked at in evaluation mode
                shown.setdefault(who, []).append(given[0].clone())

        model.register_forward_pre_hook(note)
        return model

    def open_network(spec, *given):
        model = opened(spec, *given)
        networks.append(model)
        residents.append(sum(any(len(tensor) for tensor in one.parameters()) for one in networks))
        return listened(spec.architecture, model)

    opened, initial = streaming.open_network, student_builder.students.initial_network
    turns = iter(("of its size", "student", "alone"))
    monkeypatch.setattr(streaming, "open_network", open_network)
    monkeypatch.setattr(
        student_builder.students,
        "initial_network",
        lambda *given, **options: listened(next(turns), initial(*given, **options)),
    )
    distill(own, SMALL, "distillation.targets=consistent", "distillation.mix=cutmix", "distillation.epochs=1")
    batches = len(store_of(own).images("train").sample_ids) // 4
    assert len(shown["student"]) == batches > 1
    for name in ("CustomConvNeXt", "CustomResNetMish", "CustomViTHybrid", "alone"):
        pairs = zip(shown[name][:batches], shown["student"], strict=True)
        assert all(torch.equal(one, other) for one, other in pairs), name
    assert residents[:3] == [1, 1, 1]
    assert record(own, SMALL)["targets"]["rows"] == "in_sample"


def test_auto_is_function_matching_and_tells_where_that_is_expensive(own, caplog):
    """In one epoch a pass of three members costs much beside the training, in 200 it does not."""
    store = store_of(own, SMALL)
    teacher = teachers.resolve(store, "soft_voting", excluded_member="x")
    train, size = store.images("train"), (own.checkpoint("CustomConvNeXt", "final").stat().st_size, 32)
    told = {}
    for epochs in (1, 200):
        caplog.clear()
        with logged(caplog), caplog.at_level(logging.INFO, logger="disease_pipeline"):
            epochs_store = store_of(own, SMALL, f"distillation.epochs={epochs}")
            assert target_sources.resolve_kind(epochs_store, teacher, train, size)[0] == "consistent"
        told[epochs] = "auto takes consistent: each of the" in caplog.text
    assert told == {1: True, 200: False}
    distill(own, SMALL, ALONE, "distillation.epochs=1", "distillation.targets=views")
    found = record(own, SMALL)["targets"]
    assert (found["kind"], found["rows"], found["views"], found["mix"]) == ("views", "in_sample", 4, "both")
    distill(own, SMALL, ALONE, "distillation.epochs=1")
    assert record(own, SMALL)["targets"]["kind"] == "consistent"


def test_without_cross_fitted_predictions_oof_is_refused(own):
    (own.base / "kfold_results" / "CustomViTHybrid_oof_predictions.npz").unlink()
    from utils.building import build_commands
    from utils.discovery import discover

    discover.discover(config(), own)
    build_commands.build_ensemble(config("runs.score_ensemble.methods=[soft_voting]"), own)
    with pytest.raises(LeakageError, match="no cross-fitted predictions of train rows"):
        distill(own, SMALL, "distillation.targets=oof")


def test_views_are_asked_about_once_and_found_again(own, monkeypatch, caplog):
    of_views = ("distillation.epochs=1", "distillation.targets=views", "distillation.views=2")
    views = (*of_views, "distillation.teacher=CustomConvNeXt")
    passes = []
    shown = teachers.predict_views
    monkeypatch.setattr(
        teachers, "predict_views", lambda *given, **options: passes.append(given[2]) or shown(*given, **options)
    )
    distill(own, SMALL, *views)
    train = len(store_of(own).images("train").sample_ids)
    assert passes == [2 * train]
    with np.load(own.distillation("distilled_convnext") / "targets.npz") as arrays:
        assert arrays["values"].shape == (2, train, 2)
        assert arrays["values"].dtype == np.float16
    distill(own, SMALL, *views, "distillation.temperature=2")
    assert len(passes) == 1
    with logged(caplog):
        distill(own, SMALL, *of_views, "distillation.teacher=CustomResNetMish")
    assert "targets of another teacher" in caplog.text
    assert len(passes) == 2


# matched embeddings ---------------------------------------------------------------------------------------------------
def test_embeddings_are_matched_on_request_and_auto_takes_what_val_prefers(own, monkeypatch):
    """Both students are trained; the val rows that chose are no longer out of sample for the one that is kept."""
    short = (SMALL, "distillation.epochs=1")
    distill(own, *short, "distillation.feature_weight=1")
    matched, weights_of_matched = record(own, SMALL), weights(own)
    assert matched["feature_weight"] == {"value": 1.0, "val_log_loss": None}
    assert matched["targets"]["kind"] == "consistent"  # not views, as the cost of the passes would decide
    assert catalog.load(own).members["CustomConvNeXt_distilled"].selection == "last"
    distill(own, *short, "distillation.targets=consistent")
    plain = record(own, SMALL)["history"]["student"]
    distill(own, *short, "distillation.feature_weight=auto")
    chosen = record(own, SMALL)
    losses = chosen["feature_weight"]["val_log_loss"]
    assert losses.keys() == {"0", "1"}
    assert losses[f"{chosen['feature_weight']['value']:g}"] == min(losses.values())
    assert chosen["history"]["student"] in (plain, matched["history"]["student"])
    assert catalog.load(own).members["CustomConvNeXt_distilled"].selection == "val"
    assert "held_out" in json.dumps(json.loads((own.models / "distilled_convnext" / "ensemble.json").read_text()))
    # With the order of the losses reversed it takes the other one.
    monkeypatch.setattr(trained_pairs, "log_loss", lambda *given: -log_loss(*given))
    distill(own, *short, "distillation.feature_weight=auto", force=True)
    other = record(own, SMALL)
    assert other["feature_weight"]["value"] == 1 - chosen["feature_weight"]["value"]
    is_matched = all(torch.equal(tensor, weights_of_matched[name]) for name, tensor in weights(own).items())
    assert is_matched == (other["feature_weight"]["value"] == 1)


def test_best_is_the_recommended_one_and_a_soup_or_member_may_teach(own):
    distill(own, SMALL, "distillation.epochs=1", "distillation.teacher=best")
    store = store_of(own)
    saved = {name: ensembles.load(own, name) for name in ensembles.names(own) if not name.startswith("distilled")}
    members = {member.name: member for member in member_selection.select(store.catalog, store.config)}
    assert record(own, SMALL)["teacher"] == recommendation.recommended(store, members, saved)["name"]
    distill(own, SMALL, "distillation.epochs=1", "distillation.teacher=CustomResNetMish")
    assert record(own, SMALL)["teacher"] == "CustomResNetMish"


def test_a_model_of_timm_is_a_student_and_loads_with_timm_alone(own):
    import timm

    model = "test_resnet.r160_in1k" if timm.is_model("test_resnet") else "resnet10t"
    student = f"distillation.student={model}"
    distill(own, student, "distillation.epochs=1")
    name = ensemble_name(model)
    assert ensembles.load(own, name).members == (f"{model}_distilled",)
    member = catalog.load(own).members[f"{model}_distilled"]
    assert member.architecture == f"timm:{model}"
    found = torch.load(own.checkpoint(model, "distilled"), weights_only=True)
    timm.create_model(model, num_classes=2).load_state_dict(found["model_state_dict"])
    from utils.discovery import discover

    discover.discover(config(), own)  # a later scan finds it again
    assert catalog.load(own).members[f"{model}_distilled"] == member


def test_an_assistant_stands_between(own):
    settings = (SMALL, "distillation.assistant=CustomResNetMish", "distillation.epochs=1")
    first_teacher = "distillation.teacher=CustomViTHybrid"
    result = distill(own, *settings, first_teacher)
    assert result.document["built"] == ["distilled_resnetmish", "distilled_convnext"]
    assert record(own, SMALL)["teacher"] == "CustomResNetMish_distilled"
    again = distill(own, *settings, first_teacher)
    assert again.document["built"] == []
    # Another teacher changes the assistant alone, and by that the student's own teacher.
    other_teacher = distill(own, *settings, "distillation.teacher=CustomConvNeXt")
    assert other_teacher.document["built"] == ["distilled_resnetmish", "distilled_convnext"]


def write_noise(folder: Path) -> Path:
    """Five images of noise, in a folder of this one."""
    from PIL import Image

    (folder / "deep").mkdir(parents=True)
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 255, (36, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "deep" / f"{number}.png")
    return folder


# images without labels ------------------------------------------------------------------------------------------------
def test_images_without_labels_join_with_the_teacher_s_words_alone(own, tmp_path, caplog):
    folder = write_noise(tmp_path / "more")
    val_image = next((own.split_dir / "val").glob("*/*.png"))
    shutil.copy(val_image, folder / "of_val.png")
    settings = (SMALL, "distillation.epochs=1", f"distillation.unlabeled_dir={folder}", "distillation.targets=views")
    with logged(caplog):
        distill(own, *settings)
    assert "1 of 6 images" in caplog.text
    found = record(own, SMALL)
    assert found["targets"]["unlabeled"] == 5
    with np.load(own.distillation("distilled_convnext") / "targets.npz") as arrays:
        train = len(store_of(own).images("train").sample_ids)
        assert arrays["values"].shape == (4, train + 5, 2)
        assert np.isfinite(arrays["values"]).all()
    (folder / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1 unreadable image.*broken\.png"):
        distill(own, *settings)


# teachers known by their predictions alone ----------------------------------------------------------------------------
def test_a_student_cannot_teach_itself(taught):
    for teacher in (NAME, "CustomMobileOne_distilled"):
        with pytest.raises(UserError, match="the student itself"):
            distill(taught, f"distillation.teacher={teacher}")


# what killed trainings left -------------------------------------------------------------------------------------------
def test_what_killed_trainings_left_is_counted_and_goes_with_the_next_one(own):
    folder = own.distillation("distilled_convnext")
    folder.mkdir(parents=True)
    unfinished = [
        folder / ".progress_student.abcd1234.partial.pth",
        folder / ".targets.abcd1234.partial.npz",
        own.checkpoints / ".CustomConvNeXt_distilled.abcd1234.partial.pth",
    ]
    of_the_base = own.checkpoints / ".CustomConvNeXt_final.abcd1234.partial.pth"
    for path in (*unfinished, of_the_base):
        path.write_bytes(b"12345")
    assert upkeep.status(config(SMALL), own).document["bytes"]["temporary"] == 15
    distill(own, SMALL, ALONE, "distillation.epochs=1")
    assert not [path for path in unfinished if path.exists()]
    assert of_the_base.exists()
    for path in (folder / "progress_student.pth", unfinished[0]):
        path.write_bytes(b"of a training that was killed when it had just been recorded")
    assert distill(own, SMALL, ALONE, "distillation.epochs=1").document["up_to_date"] == ["distilled_convnext"]
    assert sorted(path.name for path in folder.iterdir() if "progress" in path.name) == []


# a kill at any moment -------------------------------------------------------------------------------------------------
def test_kill_nine_in_the_middle_and_again_gives_equal_weights(own, tmp_path):
    """Of two seeds and of the second student that `auto` trains, from a member's weights, with unlabeled images."""
    options = ("distillation.seeds=2", "distillation.initial_weights=member", "distillation.feature_weight=auto", ALONE)
    undisturbed = workspace_at(Path(shutil.copytree(own.base, tmp_path / "undisturbed")))
    unlabeled = f"distillation.unlabeled_dir={write_noise(tmp_path / 'more')}"
    longer = (SMALL, "distillation.epochs=3", unlabeled, *options)
    distill(undisturbed, *longer)
    settings = [word for override in (*QUICK, *longer) for word in ("--set", override)]
    command = [sys.executable, str(PROJECT / "ensemble_orchestrator.py"), "distill", *settings]
    command += ["--config", str(PROJECT / "configs" / "votes.yaml"), "--workspace", str(own.base)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DBT_")}
    environment |= {"DBT_PROGRESS_SECONDS": "0"}
    watched = own.distillation("distilled_convnext")
    *_, was_killed = run_and_kill_repeatedly(3, command, environment, own.base, random.Random(2), watched)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    log = (own.base / "debug_logs" / "ensemble_orchestrator.log").read_text(encoding="utf-8")
    assert not was_killed or ": resumed at epoch " in log
    expected = weights(undisturbed)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(own).items())
    assert record(own, *longer)["history"] == record(undisturbed, *longer)["history"]
    assert not list(watched.glob("progress_*"))
    assert not [path for path in own.base.rglob(".*partial*") if "distill" in str(path)]
