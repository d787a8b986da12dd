"""`evaluate --data`: the own test split as an external set, other class names, images of train, unreadable files."""

from __future__ import annotations

import json
import shutil

import numpy as np
import page_outputs
import pytest
from in_process import run
from PIL import Image
from two_members import FEWER, two_members

from utils.evaluation import external_text

__all__ = ["two_members"]

DEMO = ("--config", "configs/votes.yaml", *FEWER)
NAMES = ("soft_voting_ensemble", "hard_voting_ensemble")
MEMBERS = ("members/CustomResNetMish", "members/CustomViTHybrid")
MEASURED = ("created", "versions", "latency_ms")


def read(path):
    return json.loads(path.read_text())


def scores(workspace):
    return workspace / "metrics_output" / "ensembles"


def evaluate(workspace, data, *options):
    return run("evaluate", "--data", data, "--json", *options, *DEMO, workspace=workspace)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, two_members):
    """One copy for all external sets of this module, each of a name of its own."""
    return shutil.copytree(two_members, tmp_path_factory.mktemp("external") / "w")


@pytest.fixture(scope="module")
def field(tmp_path_factory, built):
    """The test images, darker: class folders of the workspace's names."""
    folder = tmp_path_factory.mktemp("sets") / "field"
    for path in sorted((built / "split_dataset" / "test").glob("*/*.png")):
        darker = np.asarray(Image.open(path).convert("RGB")) * 0.4
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(darker.astype(np.uint8)).save(folder / path.parent.name / path.name)
    return folder


def test_the_own_test_split_gives_the_same_metrics(workspace):
    before = (workspace / "ensembles" / "ensemble_catalog.json").read_bytes()
    done = evaluate(workspace, workspace / "split_dataset" / "test", "--name", "own")
    assert done.code == 0, done.stderr
    for name in (*NAMES, *MEMBERS):
        own = read(scores(workspace) / name / "metrics.json")
        external = read(scores(workspace) / "external" / "own" / name / "metrics.json")
        assert external.pop("split") == "external"
        assert own.pop("split") == "test"
        assert external.pop("external")["drop"]["accuracy"]["change"] == 0
        for key in MEASURED:
            external.pop(key), own.pop(key)
        assert external == own
    assert (workspace / "ensembles" / "ensemble_catalog.json").read_bytes() == before
    assert done.document["also_in_test"] == done.document["n"]
    assert "external set own" in (workspace / "ensembles" / "report" / "index.html").read_text()


def test_the_guide_shows_lines_that_are_printed(workspace, field, tmp_path):
    wrong = tmp_path / "wrong"  # each image in the folder of another class, so that every model is worse than on test
    for label in range(4):
        shutil.copytree(field / str(label), wrong / str((label + 1) % 4))
    done = run("evaluate", "--data", wrong, *DEMO, workspace=workspace)
    assert done.code == 0, done.stderr
    renamed = shutil.copytree(field, tmp_path / "renamed")
    (renamed / "3").rename(renamed / "3-")
    refused = run("evaluate", "--data", renamed, *DEMO, workspace=workspace)
    assert refused.code == 1
    scores_shown, refusal_shown = page_outputs.blocks("guides/external_sets.md")[:2]
    names = ("CustomResNetMish", "CustomViTHybrid", "wrong", "renamed", "lite0", "field", "canker", "Black Spot")
    assert "recall of single classes: too few rows for an interval" in done.stdout
    classes = [{"class": name, "test": 1.0, "external": 0.02, "drops": True} for name in ("canker", "black_spot")]
    record = read(scores(workspace) / "external" / "wrong" / "external.json")
    record["models"][record["recommended"]]["classes"] = classes
    printed = f"{done.stdout}\n{external_text.as_text(record, [])}"
    assert page_outputs.not_printed(scores_shown, printed, names) == [], printed
    assert page_outputs.not_printed(refusal_shown, refused.stderr.partition("ERROR | ")[2], (*names, "3", "3-")) == []


def test_images_of_train_and_unreadable_ones_are_left_out_and_named(workspace, field, tmp_path):
    data = shutil.copytree(field, tmp_path / "mixed")
    train = next((workspace / "split_dataset" / "train" / "0").glob("*.png"))
    shutil.copyfile(train, data / "2" / "renamed.png")
    (data / "1" / "broken.png").write_text("no image")
    ranking = (scores(workspace) / "ranking.json").read_bytes()
    done = evaluate(workspace, data)
    assert done.code == 4
    left_out = done.document["left_out_images"]
    assert left_out["copies"] == {"2/renamed.png": f"train/0/{train.name}"}
    assert list(left_out["unreadable"]) == ["1/broken.png"]
    assert done.document["n"] == len(list(field.glob("*/*.png")))
    assert (scores(workspace) / "ranking.json").read_bytes() == ranking
    assert done.document["recommended"] == json.loads(ranking)["recommended"]["name"]
    record = read(scores(workspace) / "external" / "mixed" / "soft_voting_ensemble" / "metrics.json")
    assert record["overlap"]["dropped"] == 1
    assert record["external"]["drop"].keys() >= {"accuracy", "f1_macro", "log_loss", "ece"}
    assert record["external"]["promises"]["conformal"]["lac"]["promised"] == pytest.approx(0.9)
    assert 0.5 < record["external"]["ood_auroc"]["energy"]["auroc"] <= 1


def test_a_second_model_of_the_same_images_runs_no_network_again(workspace, field, heard):
    first = evaluate(workspace, field, "--model-name", "soft_voting_ensemble")
    assert first.code == 0, first.stderr
    assert [row["name"] for row in first.document["rows"]] == ["soft_voting_ensemble"]
    heard.clear()
    second = evaluate(workspace, field, "--model-name", NAMES[1])
    assert second.code == 0, second.stderr
    assert "streamed" not in heard.text


def test_predict_gives_the_same_classes_and_probabilities_row_by_row(workspace, field):
    done = evaluate(workspace, field, "--model-name", "soft_voting_ensemble")
    assert done.code == 0, done.stderr
    with np.load(
        workspace / "ensembles" / "models" / "soft_voting_ensemble" / "predictions_external-field.npz"
    ) as file:
        arrays = dict(file)
    ids = arrays["sample_ids"].tolist()
    predicted = run(
        *("predict", "--model-name", "soft_voting_ensemble", "--probabilities", "--json"),
        *(str(field / name) for name in ids),
        *DEMO,
        workspace=workspace,
    )
    rows = predicted.document["images"]
    classes = arrays["classes"].tolist()
    found = np.array([[row["probabilities"][name] for name in classes] for row in rows])
    np.testing.assert_allclose(found, arrays["probabilities"], atol=2e-6)
    assert [row["class"] for row in rows] == [classes[index] for index in arrays["probabilities"].argmax(axis=1)]


def test_other_class_names_are_refused_with_a_suggestion_and_scored_with_a_map(workspace, field, tmp_path):
    data = shutil.copytree(field, tmp_path / "named")
    (data / "3").rename(data / "three")
    refused = evaluate(workspace, data, "--model-name", "soft_voting_ensemble")
    assert refused.code == 1
    assert "three" in refused.stderr
    typed = f"--data {data} --model-name soft_voting_ensemble --workspace {workspace}"
    assert f"{typed} --missing ignore" in refused.stderr
    assert f"{typed} --missing restrict" in refused.stderr
    class_map = tmp_path / "map.csv"
    class_map.write_text("external,workspace\nthree,3\n")
    done = evaluate(workspace, data, "--class-map", class_map)
    assert done.code == 0, done.stderr
    assert done.document["classes"]["mapped"] == {"three": "3"}
    assert done.document["n"] == len(list(field.glob("*/*.png")))


def test_absent_classes_stay_possible_answers_or_are_taken_from_all_probabilities(workspace, field, tmp_path):
    data = shutil.copytree(field, tmp_path / "two")
    for name in ("2", "3"):
        shutil.rmtree(data / name)
    found = {}
    for treatment in ("ignore", "restrict"):
        done = evaluate(workspace, data, "--missing", treatment, "--name", treatment)
        assert done.code == 0, done.stderr
        assert done.document["classes"]["absent"] == ["2", "3"]
        folder = scores(workspace) / "external" / treatment
        found[treatment] = read(folder / "soft_voting_ensemble" / "metrics.json")
    assert found["ignore"]["n_classes"] == 4
    assert found["restrict"]["n_classes"] == 2
    assert found["restrict"]["accuracy"] >= found["ignore"]["accuracy"]
    on_test = read(scores(workspace) / "soft_voting_ensemble" / "metrics.json")["n_samples"]
    for record in found.values():  # the same classes on test
        assert record["external"]["test_n"] < on_test


def test_a_set_of_one_class_is_scored_and_never_restricted(workspace, field, tmp_path):
    data = tmp_path / "one"
    shutil.copytree(field / "1", data / "1")
    done = evaluate(workspace, data, "--missing", "ignore")
    assert done.code == 0, done.stderr
    record = read(scores(workspace) / "external" / "one" / "soft_voting_ensemble" / "metrics.json")
    assert record["roc_auc_ovr_macro"] is None
    assert "roc_auc_ovr_macro" in record["notes"]
    assert evaluate(workspace, data, "--missing", "restrict").code == 1


def test_a_manifest_is_read_with_its_groups(workspace, field):
    names = sorted(path.relative_to(field).as_posix() for path in field.glob("*/*.png"))
    lines = [f"{name},{name.split('/')[0]},{number // 2}" for number, name in enumerate(names)]
    manifest = field / "list.csv"
    manifest.write_text("\n".join(["file_name,label,group", *lines]) + "\n")
    done = evaluate(workspace, manifest)
    manifest.unlink()
    assert done.code == 0, done.stderr
    record = read(scores(workspace) / "external" / "list" / "soft_voting_ensemble" / "metrics.json")
    assert record["bootstrap"]["unit"] == "group"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: (folder / "a.png").write_bytes(b""), "predict"),
        (lambda folder: None, "predict"),
    ],
)
def test_images_without_labels_are_refused_with_the_command_for_them(workspace, tmp_path, make, words):
    make(tmp_path)
    done = evaluate(workspace, tmp_path)
    assert done.code == 1
    assert words in done.stderr


def test_only_images_of_train_leave_nothing_to_score(workspace):
    done = evaluate(workspace, workspace / "split_dataset" / "train")
    assert done.code == 1
    assert "images of train or val" in done.stderr


def test_the_name_of_another_set_is_not_taken_over(workspace, field, tmp_path):
    assert evaluate(workspace, field, "--model-name", "soft_voting_ensemble").code == 0
    other = shutil.copytree(field, tmp_path / "field")
    done = evaluate(workspace, other)
    assert done.code == 1
    assert "--name" in done.stderr


@pytest.mark.parametrize("options", [("--class-map", "a.csv"), ("--name", "a"), ("--missing", "ignore")])
def test_options_of_external_sets_need_data(workspace, options):
    done = run("evaluate", *options, *DEMO, workspace=workspace)
    assert done.code == 2
    assert "--data" in done.stderr


@pytest.mark.parametrize("options", [("--split", "val"), ("--name", "../up"), ("--name", "")])
def test_options_that_do_not_fit_are_usage_errors(workspace, field, options):
    assert evaluate(workspace, field, *options).code == 2


@pytest.fixture(scope="module")
def exported(workspace):
    """The folder of an exported ensemble."""
    name = NAMES[0]
    options = ("--model-name", name, "--formats", "onnx", "--set", "exports.enable=true")
    done = run("export", *options, *DEMO, workspace=workspace)
    assert done.code == 0, done.stderr
    return workspace / "deployment_models" / name


def test_an_exported_file_has_the_scores_of_its_ensemble(workspace, field, exported):
    name = exported.name
    own = evaluate(workspace, field, "--model-name", name)
    done = evaluate(workspace, field, "--from-export", exported)
    assert done.code == 0, done.stderr
    assert {row["name"]: row["kind"] for row in done.document["rows"]} == {
        name: "ensemble",
        f"{name}.onnx": "export",
    } | {row["name"]: row["kind"] for row in own.document["rows"]}
    folder = scores(workspace) / "external" / "field"
    record = read(folder / "exports" / f"{name}.onnx" / "metrics.json")
    expected = read(folder / name / "metrics.json")
    for key in ("accuracy", "f1_macro", "log_loss", "calibration_temperature", "calibrated_log_loss"):
        assert record[key] == pytest.approx(expected[key], abs=1e-4)
    assert record["conformal"]["lac"]["threshold"] == expected["conformal"]["lac"]["threshold"]
    assert record["external"]["drop"]["log_loss"]["test"] == pytest.approx(
        expected["external"]["drop"]["log_loss"]["test"], abs=1e-4
    )
    assert all(key in record["notes"] for key, value in record.items() if value is None)


def test_a_file_that_is_no_export_of_the_workspace_promises_nothing(workspace, field, exported, tmp_path):
    file = tmp_path / "foreign.onnx"
    shutil.copyfile(exported / "onnx" / f"{exported.name}.onnx", file)
    done = evaluate(workspace, field, "--from-export", file, "--name", "foreign")
    assert done.code == 0, done.stderr
    record = read(scores(workspace) / "external" / "foreign" / "exports" / "foreign.onnx" / "metrics.json")
    assert record["conformal"] is None
    assert record["unknown_training_data"] == ["foreign.onnx"]
    assert done.document["rows"][0]["rank"] is None


@pytest.mark.parametrize(
    ("options", "code"),
    [(("--from-export", "none.onnx"), 1), (("--from-export", "x", "--model-name", "CustomConvNeXt"), 2)],
)
def test_exports_that_cannot_be_scored_are_refused(workspace, field, options, code):
    done = evaluate(workspace, field, *options)
    assert done.code == code
    assert "--from-export" in done.stderr
