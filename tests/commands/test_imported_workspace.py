"""Predictions of scikit-learn models through the real command line, alone and beside trained networks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT, run_python
from given_predictions import content, empty_workspace, opened, shuffled, take_in, write

from utils.evaluation import score_plots

pytestmark = pytest.mark.usefixtures("few_fits")

DEMO = ("--config", "configs/votes.yaml")
MEMBERS = ("bayes", "forest", "logistic", "neighbours")
ENSEMBLES = ("hard_voting_ensemble", "logit_averaging_ensemble", "soft_voting_ensemble")


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """Four models of scikit-learn on its digits: cross-validated, and fitted on all train rows. Read it only."""
    from sklearn.datasets import load_digits
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.naive_bayes import GaussianNB
    from sklearn.neighbors import KNeighborsClassifier

    folder = tmp_path_factory.mktemp("given")
    digits = load_digits()
    pixels, labels = digits.data[:900] / 16, digits.target[:900]
    ids = np.array([f"{label}/{row:04d}.png" for row, label in enumerate(labels)])
    places = np.random.default_rng(0).permutation(len(labels))
    rows = {"train": places[:500], "val": places[500:700], "test": places[700:]}
    deal = StratifiedKFold(5)
    fold = np.empty(500, dtype=np.int64)
    for number, (_, held_out) in enumerate(deal.split(pixels[rows["train"]], labels[rows["train"]])):
        fold[held_out] = number
    models = {
        "bayes": GaussianNB(var_smoothing=0.01),
        "forest": RandomForestClassifier(30, random_state=0),
        "logistic": LogisticRegression(max_iter=300),
        "neighbours": KNeighborsClassifier(15),
    }
    for name, model in models.items():
        (folder / name).mkdir()
        own, truth = pixels[rows["train"]], labels[rows["train"]]
        more = {"labels": truth, "sample_ids": ids[rows["train"]], "fold": fold, "classes": np.arange(10)}
        unseen = cross_val_predict(model, own, truth, cv=deal, method="predict_proba")
        np.savez_compressed(folder / name / "oof.npz", probabilities=unseen, **more)
        model.fit(own, truth)
        for split, places in rows.items():
            more = {"labels": labels[places], "sample_ids": ids[places], "classes": model.classes_}
            np.savez(folder / name / f"{split}.npz", probabilities=model.predict_proba(pixels[places]), **more)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory, given, orchestrator) -> Path:
    """A folder that held nothing, after import, build-ensemble and evaluate. Read it only."""
    workspace = tmp_path_factory.mktemp("alone")
    for command in (("import-predictions", "--from", str(given)), ("build-ensemble", *DEMO), ("evaluate", *DEMO)):
        done = orchestrator(*command, workspace=workspace)
        assert done.returncode == 0, done.stderr
    return workspace


def read(path: Path):
    return json.loads(path.read_text())


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


# alone --------------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_models_probabilities_by_hand(given, alone):
    from sklearn.metrics import accuracy_score, log_loss

    files = [load(given / name / "test.npz") for name in MEMBERS]
    mean = np.mean([arrays["probabilities"] for arrays in files], axis=0)
    record = read(alone / "metrics_output" / "ensembles" / "soft_voting_ensemble" / "metrics.json")
    assert record["accuracy"] == pytest.approx(accuracy_score(files[0]["labels"], mean.argmax(axis=1)))
    assert record["log_loss"] == pytest.approx(log_loss(files[0]["labels"], mean), abs=1e-5)
    assert record["crossfit"]["n"] == 700
    assert record["members"] == list(MEMBERS)
    assert read(alone / "metrics_output" / "ensembles" / "ranking.json")["recommended"]["evidence"]["rows"] == "oof+val"


def test_what_cannot_be_measured_is_null_with_the_reason(alone):
    record = read(alone / "metrics_output" / "ensembles" / "soft_voting_ensemble" / "metrics.json")
    assert record["latency_ms"] is record["size_mb"] is None
    assert (
        record["notes"]["latency_ms"]
        == record["notes"]["size_mb"]
        == ("imported predictions: bayes, forest, logistic, neighbours")
    )
    assert record["overlap"] == {"fitted": 0, "selected": 0, "dropped": 0}
    assert record["notes"]["overlap.dropped"].startswith("without images")
    assert [part["split"] for part in record["fitted_on"]] == ["train"]
    assert [part["split"] for part in record["selected_on"]] == ["val"]
    assert not record["contaminated"]


def test_neighbours_with_equal_answers_in_and_out_of_sample_are_believed_unless_all_are(given, alone, tmp_path):
    unseen, own = (load(given / "neighbours" / f"{stem}.npz")["probabilities"] for stem in ("oof", "train"))
    telling = own.max(axis=1) < 1
    assert (np.abs(unseen - own).max(axis=1) < 1e-9)[telling].mean() > 0.1
    found = read(alone / "ensembles" / "ensemble_catalog.json")
    assert all(member["oof"]["rows"] == 500 for member in found["members"].values())
    assert found["problems"] == []
    folder = shutil.copytree(given, tmp_path / "given")
    arrays = load(folder / "neighbours" / "oof.npz")
    np.savez(folder / "neighbours" / "oof.npz", **arrays | {"probabilities": own})
    workspace = empty_workspace(tmp_path / "w")
    assert "neighbours: out-of-fold predictions refused: " in take_in(workspace, folder).text
    assert opened(workspace).catalog.members["neighbours"].oof is None


def test_the_same_ensembles_whatever_the_order_of_rows_and_classes(given, alone, tmp_path, orchestrator):
    for place, path in enumerate(sorted(given.rglob("*.npz"))):
        other = tmp_path / "other" / path.relative_to(given)
        other.parent.mkdir(parents=True, exist_ok=True)
        np.savez(other, **shuffled(load(path), place))
    workspace = tmp_path / "w"
    workspace.mkdir()
    assert orchestrator("import-predictions", "--from", str(tmp_path / "other"), workspace=workspace).returncode == 0
    assert orchestrator("build-ensemble", *DEMO, workspace=workspace).returncode == 0
    for name in ENSEMBLES:
        for file in ("combiner.safetensors", "crossfit.npz", "provenance.npz", "ensemble.json"):
            place = Path("ensembles", "models", name, file)
            assert (workspace / place).read_bytes() == (alone / place).read_bytes(), place


def test_every_command_runs_without_images_and_without_torch(tmp_path):
    """Plots of one ensemble are drawn, and the figures of the report."""
    code = (
        "import sys, ensemble_orchestrator as o\n"
        "from utils.evaluation import score_plots\n"
        "place, folder, support = sys.argv[1:]\n"
        "sys.path.append(support)\n"
        "from in_process import write_pixel\n"
        "draw = score_plots._draw\n"
        "plotted = lambda picture: picture.record['name'] == 'soft_voting_ensemble'\n"
        "score_plots._draw = lambda picture: (draw if plotted(picture) else write_pixel)(picture)\n"
        "lines = [['import-predictions', '--from', folder], ['build-ensemble'], ['evaluate'],\n"
        "    ['evaluate', '--split', 'val', '--plots', 'none'], ['discover'], ['status'], ['clean'], ['pipeline'],\n"
        "    ['status']]\n"
        "for line in lines:\n"
        "    common = ['--workspace', place, '--config', 'configs/votes.yaml']\n"
        "    assert o.main([*line, *common]) == 0, line\n"
        "    assert not {'torch', 'sklearn', 'timm'} & set(sys.modules), line"  # matplotlib brings PIL
    )
    given = write(tmp_path / "given")
    workspace = tmp_path / "w"
    workspace.mkdir()
    done = run_python("-c", code, str(workspace), str(given), str(PROJECT / "tests" / "support"))
    assert done.returncode == 0, done.stderr
    plots = (workspace / "metrics_output" / "ensembles" / "soft_voting_ensemble").rglob("*.png")
    assert len([path for path in plots if path.stat().st_size > 5000]) == len(score_plots.KINDS)
    assert done.stdout.rstrip().endswith("nothing is missing or stale")
    assert "train networks" not in done.stdout


def test_the_configuration_as_printed_takes_all_imported_members(tmp_path, orchestrator):
    workspace = tmp_path / "w"
    workspace.mkdir()
    given = write(tmp_path / "given")
    assert orchestrator("import-predictions", "--from", str(given), workspace=workspace).returncode == 0
    printed = ("--config", "configs/ensemble_config.yaml")
    done = orchestrator("build-ensemble", *printed, workspace=workspace)
    assert done.returncode == 4, done.stderr  # of soups and the like, which need networks
    assert "3 members: bayes, forest, linear" in done.stdout
    assert "not found, skipping" not in done.stderr


def test_changed_predictions_make_ensembles_stale(given, alone, tmp_path, orchestrator):
    workspace, folder = shutil.copytree(alone, tmp_path / "w"), shutil.copytree(given, tmp_path / "given")
    arrays = load(folder / "bayes" / "val.npz")
    np.savez(folder / "bayes" / "val.npz", **arrays | {"probabilities": 0.9 * arrays["probabilities"] + 0.01})
    done = orchestrator("import-predictions", "--from", str(folder), workspace=workspace)
    assert "bayes       replaced" in done.stdout
    done = orchestrator("status", *DEMO, workspace=workspace)
    assert "soft_voting_ensemble  stale: bayes has other predictions now" in done.stdout
    assert "next: python ensemble_orchestrator.py build-ensemble" in done.stdout


def test_a_test_split_that_is_not_there_is_asked_for(given, tmp_path, orchestrator):
    folder = shutil.copytree(given, tmp_path / "given", ignore=shutil.ignore_patterns("test.npz"))
    workspace = tmp_path / "w"
    workspace.mkdir()
    assert orchestrator("import-predictions", "--from", str(folder), workspace=workspace).returncode == 0
    assert orchestrator("build-ensemble", *DEMO, workspace=workspace).returncode == 0
    done = orchestrator("evaluate", *DEMO, workspace=workspace)
    assert done.returncode == 1
    assert "member bayes: no predictions for test; none are imported. Write DIR/bayes/test.npz" in done.stderr
    assert orchestrator("evaluate", "--split", "val", *DEMO, workspace=workspace).returncode == 0


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "cannot be read, "),
        (
            lambda path: np.savez(path, sample_ids=np.array([{}, {}], dtype=object)),
            "cannot be read, sample_ids.npy holds",
        ),
    ],
)
def test_a_damaged_file_is_one_line_and_changes_nothing(given, alone, tmp_path, orchestrator, damage, words):
    workspace, folder = shutil.copytree(alone, tmp_path / "w"), shutil.copytree(given, tmp_path / "given")
    damage(folder / "forest" / "test.npz")
    before = content(workspace / "ensembles")
    done = orchestrator("import-predictions", "--from", str(folder), workspace=workspace)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert f"forest/test.npz: {words}" in done.stderr
    assert done.stdout == ""
    assert content(workspace / "ensembles") == before


def test_an_output_of_its_own_takes_everything(given, tmp_path, orchestrator):
    base, output = tmp_path / "base", tmp_path / "ours"
    base.mkdir()
    options = ("--output", str(output))
    for command in (("import-predictions", "--from", str(given)), ("build-ensemble", *DEMO), ("evaluate", *DEMO)):
        assert orchestrator(*command, *options, workspace=base).returncode == 0
    assert "nothing is missing or stale" in orchestrator("status", *DEMO, *options, workspace=base).stdout
    assert content(base) == {}


# beside networks ----------------------------------------------------------------------------------------------------


def answers(workspace: Path, split: str) -> dict[str, np.ndarray]:
    """What a trained member says of a split, blurred, with rows and classes in another order and a row too many."""
    folder = workspace / "ensembles" / "predictions" / "CustomConvNeXt" / split
    stored = {name: np.load(folder / f"{name}.npy") for name in ("logits", "labels", "sample_ids")}
    stored["logits"] = stored["logits"] + np.random.default_rng(7).normal(size=stored["logits"].shape)
    found = shuffled(stored | {"classes": np.array(["0", "1", "2", "3"])}, 3)
    more = {"logits": np.ones((1, 4)), "labels": [-1], "sample_ids": ["0/of another split.png"]}
    return found | {name: np.concatenate([found[name], value]) for name, value in more.items()}


@pytest.fixture
def blurred(own_copy, tmp_path) -> Path:
    folder = tmp_path / "given" / "blurred"
    folder.mkdir(parents=True)
    for split in ("val", "test"):
        np.savez(folder / f"{split}.npz", **answers(own_copy, split))
    return folder


def test_a_member_from_files_joins_trained_ones_and_stays(own_copy, blurred, orchestrator):
    done = orchestrator("import-predictions", "--from", str(blurred.parent), workspace=own_copy)
    assert done.returncode == 0, done.stderr
    assert "blurred: 1 of 29 rows of val.npz are no images of val and are left out" in done.stdout
    assert "\n4 members, 4 classes" in done.stdout
    for _ in range(2):
        done = orchestrator("pipeline", *DEMO, workspace=own_copy)
        assert done.returncode == 0, done.stderr
        assert "4 members: CustomConvNeXt, CustomResNetMish, CustomViTHybrid, blurred" in done.stdout
    scores = own_copy / "metrics_output" / "ensembles"
    record = read(scores / "soft_voting_ensemble" / "metrics.json")
    assert record["members"] == ["CustomConvNeXt", "CustomResNetMish", "CustomViTHybrid", "blurred"]
    assert (record["size_mb"], record["crossfit"]["n"]) == (None, 28)  # val alone: it has no oof.npz
    assert read(scores / "members" / "CustomConvNeXt" / "metrics.json")["size_mb"] > 0
    done = orchestrator("build-ensemble", "--set", "backbones.include=[CustomConvNeXt]", *DEMO, workspace=own_copy)
    assert "1 members: CustomConvNeXt" in done.stdout


def test_labels_ids_and_names_must_be_those_of_the_images(own_copy, blurred, orchestrator):
    good = load(blurred / "val.npz")
    wrong = {
        "are not those of the class folders, first": good | {"labels": (good["labels"] + 1) % 4},
        "nothing in common with the images of val; its first id is val/": good
        | {"sample_ids": np.char.add("val/", good["sample_ids"])},
        "has the classes 9, 0, 1, 2; expected 0, 1, 2, 3": good | {"classes": np.array(["9", "0", "1", "2"])},
    }
    for words, arrays in wrong.items():
        np.savez(blurred / "val.npz", **arrays)
        done = orchestrator("import-predictions", "--from", str(blurred.parent), workspace=own_copy)
        assert done.returncode == 1
        assert words in done.stderr
    np.savez(blurred / "val.npz", **good)
    blurred.rename(blurred.parent / "CustomConvNeXt")
    done = orchestrator("import-predictions", "--from", str(blurred.parent), workspace=own_copy)
    assert "member 'CustomConvNeXt': a network of this workspace has that name" in done.stderr


def test_images_alone_are_enough_and_other_images_ask_for_another_import(own_copy, blurred, orchestrator):
    for folder in ("checkpoints", "ensembles", "kfold_results"):
        shutil.rmtree(own_copy / folder)
    images = ("import-predictions", "--from", str(blurred.parent))
    for command in (images, ("discover",), ("build-ensemble", *DEMO), ("evaluate", *DEMO)):
        done = orchestrator(*command, workspace=own_copy)
        assert done.returncode == 0, done.stderr
    assert "nothing is missing or stale" in orchestrator("status", *DEMO, workspace=own_copy).stdout
    image = sorted((own_copy / "split_dataset" / "val" / "0").iterdir())[0]
    image.rename(image.with_name("other.png"))
    done = orchestrator("discover", workspace=own_copy)
    assert done.returncode == 4
    assert "error: blurred: imported for other images or classes: val" in done.stdout
    assert orchestrator("build-ensemble", *DEMO, workspace=own_copy).returncode == 1
    done = orchestrator(*images, workspace=own_copy)
    assert done.returncode == 0, done.stderr
    assert "2 of 29 rows of val.npz are no images of val" in done.stdout
    assert "1 of 28 images of val are missing in val.npz" in done.stdout
    assert orchestrator("build-ensemble", *DEMO, workspace=own_copy).returncode == 0


def test_images_that_come_later_take_over(alone, trained, tmp_path, orchestrator):
    workspace = shutil.copytree(alone, tmp_path / "w")
    shutil.copytree(trained / "split_dataset", workspace / "split_dataset")
    assert "there are images now" in orchestrator("status", *DEMO, workspace=workspace).stdout
    done = orchestrator("discover", workspace=workspace)
    assert done.returncode == 4
    assert "imported for other images or classes: train, val, test, out-of-fold" in done.stdout
