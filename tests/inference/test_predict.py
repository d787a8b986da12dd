"""`predict` on real networks: the answers of `evaluate`, row by row, whatever lies among the images."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import struct
import sys
import zlib

import in_process
import numpy as np
import pytest
from finished_workspace import CONFIG, at
from given_predictions import logged
from PIL import Image
from predict_runs import NAME, asked, by_id, compare, stored

from utils.building import ensembles
from utils.core.config_file import load_config
from utils.core.errors import UserError
from utils.inference import classifier
from utils.inference import predict as predicting
from utils.inference.classifier import WorkspaceClassifier
from utils.inference.thresholds import load_thresholds
from utils.numeric import uncertainty
from utils.predictions import catalog, fold_networks
from utils.predictions.store import Store

DEMO = ("--config", "configs/votes.yaml")


@pytest.fixture
def workspace(own_copy):
    return at(own_copy)


@pytest.fixture
def finished(built):
    """The workspace that all tests share, for those that write nothing into it."""
    return at(built)


@pytest.mark.parametrize("name", [NAME, "hard_voting_ensemble", "logit_averaging_ensemble"])
def test_it_agrees_with_evaluate_row_by_row(finished, name):
    folder = finished.split_dir / "test"
    found = asked(finished, folder, model_name=name, probabilities=True)
    records = by_id(found.document["images"], folder)
    compare(records, stored(finished, name))
    metrics = json.loads(finished.ensemble_metrics(name, "test").read_text())
    hits = [record["class"] == sample_id.split("/")[0] for sample_id, record in records.items()]
    assert np.mean(hits) == metrics["accuracy"]
    assert all(0 <= record["disagreement"] <= np.log(3) for record in records.values())


def test_a_member_answers_alone(finished):
    folder = finished.split_dir / "test"
    found = asked(finished, folder, model_name="CustomConvNeXt", probabilities=True)
    metrics = json.loads(finished.member_metrics("CustomConvNeXt", "test").read_text())
    records = by_id(found.document["images"], folder)
    assert np.mean([record["class"] == key.split("/")[0] for key, record in records.items()]) == metrics["accuracy"]
    assert {record["disagreement"] for record in records.values()} == {None}


def test_the_recommended_ones_answer_by_these_names(finished):
    folder = finished.split_dir / "test" / "2"
    ranking = json.loads(finished.ranking("test").read_text())
    for choice in ("recommended", "recommended_fast"):
        named = ranking[choice]
        assert named["latency_ms"] > 0
        found = asked(finished, folder, model_name=choice, sets="raps")
        assert {record["model"].split("@")[0] for record in found.document["images"]} == {named["name"]}
        assert all(record["class"] in record["set"] for record in found.document["images"])
        again = asked(finished, folder, model_name=named["name"], sets="raps")
        assert again.document["images"] == found.document["images"]
    assert ranking["recommended_fast"]["latency_ms"] <= ranking["recommended"]["latency_ms"]


def test_fold_networks_answer_where_the_ensemble_was_built_on_them(workspace):
    folder = workspace.split_dir / "test"
    path = workspace.ensemble(NAME) / "ensemble.json"
    record = json.loads(path.read_text())
    store = Store(load_config(CONFIG), workspace, catalog.load(workspace))
    members = [store.catalog.members[name] for name in record["members"]]
    digests = {member.name: fold_networks.digest(member, "folds") for member in members}
    path.write_text(json.dumps(record | {"inference": "folds", "member_digests": digests}))
    fold_networks.ensure(store, members, ("test",), "folds")
    rows = fold_networks.aligned(store, members, "test", "folds")
    expected = ensembles.predict(ensembles.load(workspace, NAME), rows)
    found = asked(workspace, folder, probabilities=True)
    arrays = {"classes": np.array(rows.classes), "sample_ids": rows.sample_ids, "probabilities": expected}
    compare(by_id(found.document["images"], folder), arrays)
    assert WorkspaceClassifier(store, NAME).n_networks == 6


def test_blocks_change_nothing_and_leave_nothing(finished, monkeypatch, tmp_path):
    folder = finished.split_dir / "test"
    whole = asked(finished, folder, probabilities=True).document["images"]
    monkeypatch.setattr(classifier, "MAX_BLOCK", 5)
    monkeypatch.setattr(classifier, "MIN_BLOCK", 1)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(classifier.tempfile, "tempdir", str(tmp_path / "temporary"))
    seen = []
    answer = WorkspaceClassifier.predict_block

    def watched(self, paths, step):
        seen.append(len(paths))
        return answer(self, paths, step)

    monkeypatch.setattr(WorkspaceClassifier, "predict_block", watched)
    parts = asked(finished, folder, probabilities=True).document["images"]
    assert max(seen) == 5
    assert sum(seen) == len(whole) == len(parts)
    assert [record["path"] for record in parts] == [record["path"] for record in whole]
    for one, other in zip(parts, whole, strict=True):
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)
        assert one["class"] == other["class"]
    assert list((tmp_path / "temporary").iterdir()) == []


def bomb(path, side: int) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")))


@pytest.fixture
def hostile(tmp_path, built):
    """A folder of everything that people send, and which of it can be read."""
    folder = tmp_path / "sent"
    folder.mkdir()
    source = sorted((at(built).split_dir / "test" / "2").iterdir())[0]
    image = Image.open(source)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "rotated.png", exif=exif)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.asarray(image).astype(np.uint16) * 257).save(folder / "sixteen.png")
    image.convert("RGBA").save(folder / "alpha.png")
    image.convert("P").save(folder / "palette.png")
    for name in ('quote".png', "<script>alert(1)</script>.png".replace("/", "_"), "new\nline.png", "com,ma.png"):
        shutil.copy(source, folder / name)
    shutil.copy(source, os.fsencode(folder) + b"/caf\xe9.png")
    (folder / "empty.png").touch()
    (folder / "words.jpg").write_text("no image")
    (folder / "half.png").write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    bomb(folder / "bomb.png", 20_000)
    return folder


def test_what_cannot_be_read_is_a_row_and_exit_code_4(finished, hostile, orchestrator):
    to = hostile.parent / "answers.csv"
    done = orchestrator("predict", "--model-name", NAME, str(hostile), "--to", str(to), *DEMO, workspace=finished.base)
    assert done.returncode == 4, done.stderr
    with to.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = {os.path.basename(row["path"]): row for row in csv.DictReader(file)}
    bad = {"empty.png", "words.jpg", "half.png", "bomb.png"}
    assert {name for name, row in rows.items() if row["error"]} == bad
    assert "left out" in done.stderr
    assert {row["class"] for name, row in rows.items() if name in bad} == {""}
    good = rows.keys() - bad
    assert good == {
        *("rotated.png", "cmyk.jpg", "sixteen.png", "alpha.png", "palette.png", 'quote".png', "com,ma.png"),
        *("<script>alert(1)<_script>.png", "new\nline.png", "caf\udce9.png"),
    }
    assert all(float(rows[name]["probability"]) > 0 for name in good)
    # EXIF rotation is not applied in training and evaluation, so it is not applied here.
    same = ("rotated.png", 'quote".png', "new\nline.png", "caf\udce9.png")
    assert len({rows[name]["probability"] for name in same}) == 1


def test_copies_of_an_unreadable_file_are_all_named(finished, hostile):
    shutil.copy(hostile / "words.jpg", hostile / "words again.jpg")
    found = asked(finished, hostile / "words.jpg", hostile / "words again.jpg", hostile / "alpha.png")
    errors = [record["error"] for record in found.document["images"]]
    assert [error is not None for error in errors] == [True, True, False]
    assert len(found.failures) == 2


def test_many_unreadable_files_are_counted(finished, tmp_path):
    for number in range(9):
        (tmp_path / f"{number}.png").write_text(str(number))
    found = asked(finished, tmp_path)
    assert len(found.failures) == 6
    assert found.failures[-1].startswith("4 more images")


def test_a_stopped_run_goes_on_where_it_was(finished, tmp_path, monkeypatch):
    folder, to = finished.split_dir / "test", tmp_path / "answers.jsonl"
    asked(finished, folder, to=str(to), probabilities=True)
    whole = to.read_bytes()
    lines = whole.splitlines(keepends=True)
    to.write_bytes(b"".join(lines[:7]) + lines[7][:20])
    seen = []
    answer = WorkspaceClassifier.predict_block
    watched = lambda self, paths, step: seen.extend(paths) or answer(self, paths, step)  # noqa: E731
    monkeypatch.setattr(WorkspaceClassifier, "predict_block", watched)
    found = asked(finished, folder, to=str(to), probabilities=True, append=True)
    assert len(seen) == len(lines) - 7
    assert found.document["answered"] == len(lines) - 7
    before = [json.loads(line) for line in lines]
    after = [json.loads(line) for line in to.read_text().splitlines()]
    assert [record["path"] for record in after] == [record["path"] for record in before]
    for one, other in zip(after, before, strict=True):
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)
    seen.clear()
    asked(finished, folder, to=str(to), probabilities=True, append=True)
    assert seen == []


def test_a_list_on_standard_input(finished, monkeypatch):
    files = sorted((finished.split_dir / "test" / "1").iterdir())[:3]
    text = b"\0".join(os.fsencode(path) for path in files)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    done = in_process.run("predict", "--model-name", NAME, "-", "--json", *DEMO, workspace=finished.base)
    assert done.code == 0, done.stderr
    assert [record["path"] for record in done.document["images"]] == [str(path) for path in files]


def test_sets_and_abstention_come_from_what_was_measured(workspace):
    folder = workspace.split_dir / "test"
    path = workspace.ensemble_metrics(NAME, "test")
    record = json.loads(path.read_text())
    probabilities, classes = stored(workspace)["probabilities"], stored(workspace)["classes"].tolist()
    limit = float(np.median(np.sort(probabilities, axis=1)[:, -2]))  # the second class is in half of the sets
    sure = float(np.median(probabilities.max(axis=1)))
    measured = {"conformal": {"lac": {"threshold": 1 - limit}}, "selective": {"threshold": sure}}
    path.write_text(json.dumps(record | measured))
    found = by_id(asked(workspace, folder).document["images"], folder)
    sizes, silent = [], 0
    for sample_id, expected in zip(stored(workspace)["sample_ids"].tolist(), probabilities, strict=True):
        inside = found[sample_id]["set"]
        assert classes[expected.argmax()] in inside
        clear = np.abs(expected - limit) > 1e-4
        assert {classes[place] for place in np.flatnonzero((expected >= limit) & clear)} <= set(inside)
        assert not {classes[place] for place in np.flatnonzero((expected < limit) & clear)} & set(inside) - {
            classes[expected.argmax()]
        }
        if abs(expected.max() - sure) > 1e-4:
            assert found[sample_id]["abstain"] is bool(expected.max() < sure)
        sizes.append(len(inside))
        silent += found[sample_id]["abstain"]
    assert 1 < np.mean(sizes) < 3
    assert 0 < silent < len(sizes)


def test_the_sets_that_are_asked_for_are_those_that_evaluate_measured(workspace):
    path = workspace.ensemble_metrics(NAME, "test")
    limits = {"lac": {"threshold": 0.6}, "aps": {"threshold": 0.9}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"conformal": limits}))
    probabilities, classes = stored(workspace)["probabilities"], stored(workspace)["classes"].tolist()
    found = {}
    for kind, limit in (("lac", 0.6), ("aps", 0.9)):
        thresholds = load_thresholds(workspace, NAME, is_ensemble=True, sets=kind)
        found[kind] = [row["set"] for row in thresholds.apply(probabilities, classes, [])]
        expected = uncertainty.prediction_sets(kind, probabilities, limit)
        assert found[kind] == [[classes[place] for place in np.flatnonzero(row)] for row in expected]
    assert found["lac"] != found["aps"]
    folder = workspace.split_dir / "test"
    records = by_id(asked(workspace, folder, sets="aps").document["images"], folder)
    assert [records[name]["set"] for name in stored(workspace)["sample_ids"].tolist()] == found["aps"]


def test_images_that_failed_are_tried_again(finished, tmp_path):
    good, sent, to = sorted((finished.split_dir / "test").rglob("*.png"))[:3], tmp_path / "sent", tmp_path / "a.csv"
    sent.mkdir()
    for number, path in enumerate(good):
        shutil.copy(path, sent / f"{number}.png")
    (sent / "1.png").write_bytes(b"not yet copied")
    assert asked(finished, sent, to=str(to)).document["unreadable"] == 1
    shutil.copy(good[1], sent / "1.png")
    again = asked(finished, sent, to=str(to), append=True)
    assert (again.document["answered"], again.failures) == (1, [])
    with to.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [os.path.basename(row["path"]) for row in rows] == ["0.png", "2.png", "1.png"]
    assert {row["error"] for row in rows} == {""}


def test_thresholds_of_an_older_ensemble_are_not_used(workspace, caplog):
    path, built = workspace.ensemble_metrics(NAME, "test"), workspace.ensemble(NAME) / "ensemble.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"selective": {"threshold": 0.5}}))
    assert load_thresholds(workspace, NAME, is_ensemble=True).abstain == 0.5
    later = path.stat().st_mtime + 10
    os.utime(built, (later, later))
    with logged(caplog):
        assert load_thresholds(workspace, NAME, is_ensemble=True).abstain is None
    assert "was built again since it was evaluated" in caplog.text


def test_what_cannot_answer_is_refused_with_the_remedy(workspace, tmp_path):
    folder = workspace.split_dir / "test"
    with pytest.raises(UserError, match="did you mean 'soft_voting_ensemble'"):
        asked(workspace, folder, model_name="soft_voting_ensembel")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image found"):
        asked(workspace, tmp_path / "empty")
    with pytest.raises(UserError, match="--to FILE"):
        asked(workspace, folder, append=True)
    checkpoint = workspace.checkpoints / "CustomResNetMish_final.pth"
    content = checkpoint.read_bytes()
    checkpoint.unlink()
    with pytest.raises(UserError, match=r"CustomResNetMish_final.pth: the checkpoint .* is gone. Train it again"):
        asked(workspace, folder)
    checkpoint.write_bytes(content + b" ")
    with pytest.raises(UserError, match="changed since discovery"):
        asked(workspace, folder)
    record = json.loads(workspace.catalog.read_text())
    del record["members"]["CustomResNetMish"]
    workspace.catalog.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"its member CustomResNetMish is not in the catalog.*build-ensemble"):
        asked(workspace, folder)


def test_more_images_than_a_screen_takes_need_a_file(finished, monkeypatch):
    monkeypatch.setattr(predicting, "MAX_IMAGES_ON_SCREEN", 3)
    with pytest.raises(UserError, match="--to FILE"):
        asked(finished, finished.split_dir / "test")
