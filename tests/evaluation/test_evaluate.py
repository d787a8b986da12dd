"""The command `evaluate`: what it writes, what it reads, and that its ranking ignores the test split."""

from __future__ import annotations

import json
import shutil

import given_predictions
import numpy as np
import pytest
import torch
from file_reads import counted_reads
from in_process import empty_figures, every_plot, run

from utils.building import build_commands
from utils.core import parsed_files
from utils.evaluation import score_plots
from utils.evaluation.evaluate import evaluate
from utils.numeric import uncertainty
from utils.numeric.metrics import softmax

DEMO = ("--config", "configs/votes.yaml")
MEMBERS = ("CustomConvNeXt", "CustomResNetMish", "CustomViTHybrid")
NAMES = ("soft_voting_ensemble", "hard_voting_ensemble", "logit_averaging_ensemble")
KEYS = {
    *("name", "split", "n_samples", "n_classes", "accuracy", "f1_macro", "f1_weighted", "precision_macro"),
    *("recall_macro", "log_loss", "brier", "ece", "mce", "roc_auc_ovr_macro", "confusion_matrix", "per_class", "ci95"),
    *("vs_best_single", "vs_soft_voting", "latency_ms", "size_mb", "members", "weights", "crossfit", "fitted_on"),
    *("selected_on", "contaminated", "optimistic", "overlap", "config_digest", "seed", "versions", "created", "notes"),
    *("calibrated_log_loss", "calibration_temperature"),
    *("precision_weighted", "recall_weighted", "ece_adaptive", "ece_by_chance", "reliability", "bootstrap"),
    *("conformal", "selective"),
    *("balanced_accuracy", "matthews_corrcoef", "average_precision_macro", "top_3_accuracy", "top_5_accuracy"),
    *("cohen_kappa", "cohen_kappa_linear", "cohen_kappa_quadratic", "curves", "folds"),
    *("mutual_information", "out_of_distribution", "unknown_training_data"),
}


def read(path):
    return json.loads(path.read_text())


def metrics(workspace, name, file="metrics.json"):
    return read(workspace / "metrics_output" / "ensembles" / name / file)


def stored(workspace, array):
    """All members' arrays of this name on the test split."""
    folder = workspace / "ensembles" / "predictions"
    return np.stack([np.load(folder / name / "test" / f"{array}.npy") for name in MEMBERS])


@pytest.mark.parametrize("name", [*NAMES, "members/CustomConvNeXt", "members/CustomViTHybrid"])
def test_metrics_have_every_key_and_null_has_a_reason(built, name):
    record = metrics(built, name)
    assert record.keys() == KEYS
    assert all(key in record["notes"] for key, value in record.items() if value is None)
    assert record["contaminated"] is False
    assert record["optimistic"] is False
    assert record["overlap"] == {"fitted": 0, "selected": 0, "dropped": 0}
    assert {part["split"] for part in record["fitted_on"]} == {"train"}
    assert record["selected_on"] == []  # the networks are the last epochs of their trainings
    assert sum(record["weights"].values()) == pytest.approx(1)
    sizes = [(built / "checkpoints" / f"{member}_final.pth").stat().st_size for member in record["members"]]
    assert record["size_mb"] == pytest.approx(sum(sizes) / 1e6, abs=1e-3)


def test_scores_are_those_of_the_members_logits_by_hand(built):
    from sklearn import metrics as sk

    logits, labels = stored(built, "logits"), stored(built, "labels")[0]
    expected = {
        "soft_voting_ensemble": softmax(logits).mean(axis=0),
        "logit_averaging_ensemble": softmax(logits.mean(axis=0)),
    }
    for name, probabilities in expected.items():
        record = metrics(built, name)
        assert record["accuracy"] == pytest.approx(sk.accuracy_score(labels, probabilities.argmax(axis=1)))
        assert record["f1_macro"] == pytest.approx(sk.f1_score(labels, probabilities.argmax(axis=1), average="macro"))
        assert record["log_loss"] == pytest.approx(sk.log_loss(labels, probabilities), abs=1e-6)
        assert record["confusion_matrix"] == sk.confusion_matrix(labels, probabilities.argmax(axis=1)).tolist()


def test_latency_is_that_of_the_networks_and_the_combiner_and_measured_once(own_copy, orchestrator):
    kept = read(own_copy / "ensembles" / "latency.json")
    networks = {entry["member"]: entry for by_device in kept["networks"].values() for entry in by_device.values()}
    combiners = {entry["ensemble"]: entry for by_device in kept["combiners"].values() for entry in by_device.values()}
    assert combiners.keys() == set(NAMES)
    for name in (*NAMES, "members/CustomConvNeXt"):
        found = metrics(own_copy, name)["latency_ms"]
        parts = [networks[member] for member in metrics(own_copy, name)["members"]]
        parts += [combiners[name]] if name in NAMES else []
        for size in ("batch_1", "batch_32"):
            for key in ("p50", "p95"):
                assert found[size][key] == pytest.approx(sum(part["batches"][size][key] for part in parts), abs=1e-3)
        assert (found["device"], found["threads"]) == (parts[0]["device"], parts[0]["threads"])
    before = metrics(own_copy, NAMES[0])
    done = orchestrator("evaluate", "--force", *DEMO, workspace=own_copy)
    assert done.returncode == 0, done.stderr
    assert read(own_copy / "ensembles" / "latency.json") == kept
    after = metrics(own_copy, NAMES[0])
    assert {**before, "created": 0} == {**after, "created": 0}


def test_pictures_and_tables_lie_beside_the_scores(own_copy, orchestrator):
    with every_plot():
        done = orchestrator("evaluate", "--force", *DEMO, workspace=own_copy)
    assert done.returncode == 0, done.stderr
    scores = own_copy / "metrics_output" / "ensembles"
    shown = plotted(own_copy)
    assert {"soft_voting_ensemble", read(scores / "ranking.json")["recommended"]["name"]} <= shown
    for name in shown:
        folder = scores / name if name in NAMES else scores / "members" / name
        for kind in score_plots.KINDS:
            assert (folder / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
    for name in NAMES:
        tables = {path.name for path in (scores / name).iterdir()} - {f"{kind}.png" for kind in score_plots.KINDS}
        both = {f"{kind}.{suffix}" for kind in ("per_class", "confusion_matrix") for suffix in ("csv", "md", "tex")}
        assert tables == both | {"curves.csv", "metrics.json"}
    assert {path.suffix for path in scores.glob("ranking.*")} == {".json", ".csv", ".md", ".tex"}
    first = (scores / "label_issues.csv").read_text().splitlines()
    assert first[0].startswith("rank,split,sample_id,image,label,suggested")
    for line in first[1:]:
        assert (own_copy / line.split(",")[3]).is_file()


def test_plots_are_those_of_the_selection_and_no_others(own_copy, orchestrator):
    ranking = read(own_copy / "metrics_output" / "ensembles" / "ranking.json")
    ranked = {row["name"] for row in ranking["rows"]}
    compared = plotted(own_copy)
    assert compared < ranked
    for selection, expected in (("all", ranked), ("none", set()), ("compared", compared)):
        done = orchestrator("evaluate", "--plots", selection, *DEMO, workspace=own_copy)
        assert done.returncode == 0, done.stderr
        assert plotted(own_copy) == expected
    (left_out, *_) = sorted(ranked - compared)
    for selection, expected in (("all", compared | {left_out}), ("none", compared)):
        done = orchestrator("evaluate", "--model-name", left_out, "--plots", selection, *DEMO, workspace=own_copy)
        assert done.returncode == 0, done.stderr
        assert plotted(own_copy) == expected


def plotted(workspace):
    """Names of the models of which there are plots of the test split."""
    return {path.parent.name for path in (workspace / "metrics_output" / "ensembles").rglob("reliability.png")}


def test_a_checkpoint_that_is_back_has_its_size_again(own_copy, orchestrator):
    checkpoint = own_copy / "checkpoints" / "CustomConvNeXt_final.pth"
    size = metrics(own_copy, "soft_voting_ensemble")["size_mb"]
    away = checkpoint.rename(own_copy / "away.pth")
    assert orchestrator("evaluate", "--force", *DEMO, workspace=own_copy).returncode == 0
    without = metrics(own_copy, "soft_voting_ensemble")
    assert without["size_mb"] is None
    assert "missing files: CustomConvNeXt_final.pth" in without["notes"]["size_mb"]
    assert "up to date" in orchestrator("evaluate", *DEMO, workspace=own_copy).stdout
    away.rename(checkpoint)
    assert orchestrator("evaluate", *DEMO, workspace=own_copy).returncode == 0
    assert metrics(own_copy, "soft_voting_ensemble")["size_mb"] == size


def test_conformal_sets_cover_test_rows_as_promised_over_ten_resplits(built):
    parts = []
    with np.load(built / "ensembles" / "models" / "soft_voting_ensemble" / "crossfit.npz") as arrays:
        rows = arrays["split"] == "val"
        parts.append((arrays["probabilities"][rows], arrays["labels"][rows]))
    with np.load(built / "ensembles" / "models" / "soft_voting_ensemble" / "predictions_test.npz") as arrays:
        parts.append((arrays["probabilities"], arrays["labels"]))
    probabilities, labels = (np.concatenate(values) for values in zip(*parts, strict=True))
    uniforms = uncertainty.uniform_numbers(map(str, range(len(labels))))
    for kind in uncertainty.NONCONFORMITY_SCORES:
        covered = []
        for seed in range(10):
            order = np.random.default_rng(seed).permutation(len(labels))
            halves = [
                uncertainty.LabelledRows(probabilities[half], labels[half], uniforms[half])
                for half in np.array_split(order, 2)
            ]
            found = uncertainty.conformal_metrics(kind, *halves)
            covered.append(found["coverage"])
        low, high = found["coverage_interval"]
        assert low <= np.mean(covered)
        assert kind == "aps" or np.mean(covered) <= high


def test_ranking_is_in_order_and_recommends_without_the_test_split(built, own_copy, orchestrator):
    ranking = read(built / "metrics_output" / "ensembles" / "ranking.json")
    rows = ranking["rows"]
    assert [row["rank"] for row in rows] == list(range(1, 7))
    order = [(-row["f1_macro"], row["log_loss"], row["name"]) for row in rows]
    assert order == sorted(order)
    assert {row["name"] for row in rows if row["kind"] == "ensemble"} == set(NAMES)
    evidence = ranking["recommended"]["evidence"]
    assert evidence["rows"] == "oof+val"
    assert evidence["n"] == 224 + 28
    with np.load(built / "ensembles" / "models" / ranking["recommended"]["name"] / "crossfit.npz") as unseen:
        hits = unseen["probabilities"].argmax(axis=1) == unseen["labels"]
    assert evidence["accuracy"] == pytest.approx(hits.mean())
    assert ranking["peers"]["soft_voting"] == "soft_voting_ensemble"
    # Whatever the test labels say, the recommendation stays.
    test = own_copy / "split_dataset" / "test"
    (test / "0").rename(test / "x")
    (test / "1").rename(test / "0")
    (test / "x").rename(test / "1")
    assert orchestrator("pipeline", *DEMO, workspace=own_copy).returncode == 0
    other = read(own_copy / "metrics_output" / "ensembles" / "ranking.json")
    assert other["recommended"] == ranking["recommended"]
    assert other["rows"] != rows
    # And what was stored for the rows as they were is not taken for those of now.
    logits, labels = stored(own_copy, "logits"), stored(own_copy, "labels")[0]
    hits = softmax(logits).mean(axis=0).argmax(axis=1) == labels
    assert metrics(own_copy, "soft_voting_ensemble")["accuracy"] == pytest.approx(hits.mean())


def test_members_of_an_ensemble_are_scored_though_the_configuration_leaves_them_out(own_copy, orchestrator):
    left_out = ("--set", "backbones.exclude=[CustomViTHybrid]")
    done = orchestrator("evaluate", "--force", *left_out, *DEMO, workspace=own_copy)
    assert done.returncode == 0, done.stderr
    rows = read(own_copy / "metrics_output" / "ensembles" / "ranking.json")["rows"]
    assert {row["name"] for row in rows} == {*NAMES, *MEMBERS}


def test_a_metric_of_which_less_is_better_orders_upwards(own_copy, orchestrator):
    before = read(own_copy / "metrics_output" / "ensembles" / "ranking.json")
    wanted = ("--set", "runs.score_ensemble.optimization_metric=log_loss")
    assert orchestrator("evaluate", *wanted, *DEMO, workspace=own_copy).returncode == 0
    ranking = read(own_copy / "metrics_output" / "ensembles" / "ranking.json")
    losses = [row["log_loss"] for row in ranking["rows"]]
    assert losses == sorted(losses)
    assert ranking["order"][0] == "log_loss"
    assert ranking["recommended"] == before["recommended"]


def test_the_chosen_metrics_are_the_columns_of_every_table(own_copy, orchestrator):
    chosen = ("--metrics", "balanced_accuracy", "delong", "cohen_kapa")
    refused = orchestrator("evaluate", *chosen, *DEMO, workspace=own_copy)
    assert refused.returncode == 2
    assert "delong" in refused.stderr
    assert "cohen_kapa; did you mean 'cohen_kappa'?" in refused.stderr
    done = orchestrator("evaluate", *DEMO, "--metrics", "matthews_corrcoef", "brier", workspace=own_copy)
    assert "MCC [95%]" in done.stdout
    assert "F1 macro [95%]" not in done.stdout
    scores = own_copy / "metrics_output" / "ensembles"
    ranking = read(scores / "ranking.json")
    assert ranking["options"]["metrics"] == ["matthews_corrcoef", "brier"]
    for row in ranking["rows"]:
        folder = row["name"] if row["kind"] == "ensemble" else f"members/{row['name']}"
        assert row["matthews_corrcoef"] == metrics(own_copy, folder)["matthews_corrcoef"]
    assert (scores / "ranking.md").read_text().startswith("| rank | name | MCC | Brier | p |")
    again = orchestrator("evaluate", *DEMO, "--metrics", "matthews_corrcoef", "brier", workspace=own_copy)
    assert "up to date" in again.stdout
    assert "F1 macro [95%]" in orchestrator("evaluate", *DEMO, workspace=own_copy).stdout


def test_folds_are_those_of_the_networks_and_of_the_crossfit(built):
    member, ensemble = (metrics(built, name)["folds"] for name in ("members/CustomConvNeXt", NAMES[0]))
    with np.load(built / "ensembles" / "oof_predictions" / "CustomConvNeXt.npz") as oof:
        hits = oof["logits"].argmax(axis=1) == oof["labels"]
        values = [hits[oof["fold"] == fold].mean() for fold in np.unique(oof["fold"])]
    assert (member["rows"], member["n"], member["k"]) == ("train", 224, len(values))
    assert member["accuracy"]["values"] == pytest.approx(values)
    assert (ensemble["rows"], ensemble["n"], ensemble["k"]) == ("train+val", 224 + 28, 5)


def test_the_area_of_each_ensemble_is_compared_with_the_best_single_member(built):
    ranking = read(built / "metrics_output" / "ensembles" / "ranking.json")
    single = metrics(built, f"members/{ranking['peers']['best_single']}")
    for row in ranking["rows"]:
        compared = row["vs_best_single"]
        if compared is not None:
            folder = row["name"] if row["kind"] == "ensemble" else f"members/{row['name']}"
            areas = [record["roc_auc_ovr_macro"] for record in (metrics(built, folder), single)]
            assert compared["delta_roc_auc"] == pytest.approx(areas[0] - areas[1])
            assert compared["delong_p"] <= compared["delong_p_holm"] <= 1


def test_crossfit_rows_are_the_honest_rows_by_the_right_networks(built):
    with np.load(built / "ensembles" / "models" / "soft_voting_ensemble" / "crossfit.npz") as arrays:
        unseen = dict(arrays)
    by_id = {}
    for name in MEMBERS:
        with np.load(built / "kfold_results" / f"{name}_oof_predictions.npz") as oof:
            for sample_id, logits in zip(oof["sample_ids"].tolist(), oof["logits"], strict=True):
                by_id.setdefault(("train", sample_id), []).append(softmax(logits[None])[0])
        folder = built / "ensembles" / "predictions" / name / "val"
        ids, logits = np.load(folder / "sample_ids.npy").tolist(), np.load(folder / "logits.npy")
        for sample_id, row in zip(ids, logits, strict=True):
            by_id.setdefault(("val", sample_id), []).append(softmax(row[None])[0])
    keys = list(zip(unseen["split"].tolist(), unseen["sample_ids"].tolist(), strict=True))
    assert set(keys) == set(by_id)
    expected = np.array([np.mean(by_id[key], axis=0) for key in keys])
    np.testing.assert_allclose(unseen["probabilities"], expected, atol=1e-6)


def test_val_scores_have_files_of_their_own_and_are_optimistic_where_val_chose_an_epoch(own_copy, orchestrator):
    def optimistic(name):
        return metrics(own_copy, name, "metrics_val.json")["optimistic"]

    before = (own_copy / "metrics_output" / "ensembles" / "ranking.json").read_bytes()
    done = orchestrator("evaluate", "--split", "val", *DEMO, workspace=own_copy)
    assert done.returncode == 0, done.stderr
    assert "optimistic" not in done.stdout
    assert not any(optimistic(name) for name in ("soft_voting_ensemble", "members/CustomConvNeXt"))
    assert (own_copy / "metrics_output" / "ensembles" / "ranking.json").read_bytes() == before
    path = own_copy / "checkpoints" / "CustomConvNeXt_final.pth"  # as earlier versions wrote it
    record = torch.load(path, weights_only=True)
    del record["extra"]["selection"]
    torch.save(record, path)
    assert orchestrator("pipeline", *DEMO, workspace=own_copy).returncode == 0
    done = orchestrator("evaluate", "--split", "val", *DEMO, workspace=own_copy)
    assert "optimistic" in done.stdout
    assert [optimistic(name) for name in ("soft_voting_ensemble", "members/CustomConvNeXt")] == [True, True]
    assert not optimistic("members/CustomViTHybrid")


def test_a_test_image_that_is_also_a_train_image_is_left_out_for_all(own_copy, orchestrator):
    train = sorted((own_copy / "split_dataset" / "train" / "2").iterdir())[0]
    shutil.copy(train, own_copy / "split_dataset" / "test" / "2" / "twin.png")
    done = orchestrator("pipeline", *DEMO, workspace=own_copy)
    assert done.returncode == 0, done.stderr
    assert f"the same image in two splits: train/2/{train.name} and test/2/twin.png" in done.stdout
    assert f"evaluate: test/2/twin.png is the same image as train/2/{train.name} and is left out" in done.stderr
    for name in (*NAMES, "members/CustomConvNeXt"):
        record = metrics(own_copy, name)
        assert record["overlap"]["dropped"] == 1
        assert record["n_samples"] == 28


def test_one_model_by_name_and_an_unknown_name(own_copy, orchestrator):
    others = [own_copy / "metrics_output" / "ensembles" / name / "metrics.json" for name in NAMES[1:]]
    before = [path.stat().st_mtime_ns for path in others]
    done = orchestrator("evaluate", "--model-name", "soft_voting_ensemble", *DEMO, workspace=own_copy)
    assert done.returncode == 0
    assert [path.stat().st_mtime_ns for path in others] == before
    assert done.stdout.startswith("soft_voting_ensemble on test: accuracy")
    done = orchestrator("evaluate", "--model-name", "soft_voting_ensembel", *DEMO, workspace=own_copy)
    assert done.returncode == 1
    assert "did you mean 'soft_voting_ensemble'?" in done.stderr


def plant_fitted_rows(workspace, name):
    """Let an ensemble's record say that it was fitted on the test rows."""
    from utils.building.ensembles import RowSet

    folder = workspace / "ensembles" / "models" / name
    ids = tuple(f"{p.parent.name}/{p.name}" for p in sorted((workspace / "split_dataset" / "test").glob("*/*.png")))
    with np.load(folder / "provenance.npz") as arrays:
        kept = dict(arrays)
    np.savez(folder / "provenance.npz", **kept, **{"fitted_on/1/test/held_out": np.array(ids)})
    record = read(folder / "ensemble.json")
    record["fitted_on"].append(RowSet("test", "held_out", ids).as_record())
    record["inputs_digest"] = "planted"
    (folder / "ensemble.json").write_text(json.dumps(record))


def test_a_contaminated_ensemble_is_marked_unranked_and_refused_by_name(own_copy, orchestrator):
    plant_fitted_rows(own_copy, "hard_voting_ensemble")
    done = orchestrator("evaluate", "--model-name", "hard_voting_ensemble", *DEMO, workspace=own_copy)
    assert done.returncode == 3
    assert "it was fitted on 28 of the 28 rows of test" in done.stderr
    done = orchestrator("evaluate", *DEMO, workspace=own_copy)
    assert done.returncode == 0, done.stderr
    rows = read(own_copy / "metrics_output" / "ensembles" / "ranking.json")["rows"]
    assert (rows[-1]["name"], rows[-1]["rank"], rows[-1]["contaminated"]) == ("hard_voting_ensemble", None, True)
    named = ("--model-name", "hard_voting_ensemble", "--allow-contaminated")
    assert orchestrator("evaluate", *named, *DEMO, workspace=own_copy).returncode == 0


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("ensemble.json", b"{", "damaged"),
        ("combiner.safetensors", b"\x00", "cannot be read"),
        ("provenance.npz", b"PK", "cannot be read"),
    ],
)
def test_a_damaged_ensemble_is_named_with_the_command_that_mends_it(own_copy, orchestrator, file, content, words):
    path = own_copy / "ensembles" / "models" / "soft_voting_ensemble" / file
    path.write_bytes(content)
    done = orchestrator("evaluate", *DEMO, workspace=own_copy)
    assert done.returncode == 1
    assert words in done.stderr
    assert "build-ensemble --force" in done.stderr
    assert orchestrator("build-ensemble", "--force", *DEMO, workspace=own_copy).returncode == 0
    assert orchestrator("evaluate", *DEMO, workspace=own_copy).returncode == 0


def test_an_ensemble_of_old_checkpoints_is_told_and_left_out(own_copy, orchestrator):
    checkpoints = own_copy / "checkpoints"
    shutil.copy(checkpoints / "CustomResNetMish_snapshot1.pth", checkpoints / "CustomResNetMish_final.pth")
    assert orchestrator("discover", *DEMO, workspace=own_copy).returncode == 0
    done = orchestrator("evaluate", *DEMO, workspace=own_copy)
    assert done.returncode == 0, done.stderr
    assert "soft_voting_ensemble was built from other checkpoints" in done.stderr
    assert "soft_voting_ensemble" not in done.stdout


@pytest.fixture(scope="module")
def voting(tmp_path_factory):
    """A workspace of imported members with three votes, before any evaluation."""
    folder = tmp_path_factory.mktemp("voting")
    workspace = given_predictions.empty_workspace(folder / "w")
    given_predictions.take_in(workspace, given_predictions.write(folder / "given", stems=("oof", "val", "test")))
    build_commands.build_ensemble(given_predictions.CONFIG, workspace)
    return workspace.base


@pytest.fixture
def imported(tmp_path, voting):
    """A copy of it to evaluate; figures are empty meanwhile."""
    with empty_figures():
        yield given_predictions.empty_workspace(shutil.copytree(voting, tmp_path / "w"))


def repeated(reads):
    """{file: count} of files that were parsed or opened more than once."""
    return {str(path): count for path, count in sorted(reads.items()) if count > 1}


@pytest.mark.parametrize("split", ["test", "val"])
def test_no_record_is_parsed_twice_and_no_array_opened_twice(imported, split):
    for options in ({}, {"force": True}, {"model_name": "soft_voting_ensemble"}):
        parsed_files.forget()
        with counted_reads() as reads:
            evaluate(given_predictions.CONFIG, imported, split=split, **options)
        read = {imported.catalog, imported.oof("bayes"), imported.predictions("bayes", split) / "logits.npy"}
        assert read <= reads.keys()
        assert repeated(reads) == {}


def test_a_missing_page_is_written_from_files_that_are_read_once(imported):
    evaluate(given_predictions.CONFIG, imported)
    imported.report("test").unlink()
    parsed_files.forget()
    with counted_reads() as reads:
        result = evaluate(given_predictions.CONFIG, imported)
    assert "up to date" in result.text
    assert imported.report("test").is_file()
    assert imported.ensemble(result.document["recommended"]["name"]) / "predictions_test.npz" in reads
    assert repeated(reads) == {}


def test_networks_and_images_are_read_once_as_well(own_copy):
    for command in (["evaluate", "--force"], ["evaluate", "--split", "val"]):
        parsed_files.forget()
        with counted_reads() as reads:
            done = run(*command, *DEMO, workspace=own_copy)
        assert done.code == 0, done.stderr
        assert own_copy / "ensembles" / "latency.json" in reads
        assert repeated(reads) == {}
