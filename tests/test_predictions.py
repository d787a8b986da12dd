"""Alignment of members by id and class name, and the prediction store on really trained members."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from utils import catalog, discovery, streaming
from utils.config_file import load
from utils.errors import UserError
from utils.predictions import MemberRows, Store, align, crossfit_folds
from utils.workspace import Workspace

CLASSES = ("ant", "bee", "cat")
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "digits_demo.yaml"


def member(seed, ids=tuple(f"ant/{n}.png" for n in range(20)), split="val"):
    rng = np.random.default_rng(seed)
    labels = np.random.default_rng(99).integers(0, 3, len(ids))
    logits = rng.normal(size=(len(ids), 3)).astype(np.float32)
    return MemberRows(split, CLASSES, np.array(ids), labels, logits, np.ones(len(ids), dtype=bool))


def shuffled(rows, seed):
    order = np.random.default_rng(seed).permutation(len(rows.labels))
    return replace(rows, sample_ids=rows.sample_ids[order], labels=rows.labels[order], logits=rows.logits[order])


def permuted_classes(rows, order):
    """The same outputs with columns, class names and label numbers in another order."""
    number = np.argsort(order)
    return replace(
        rows, classes=tuple(CLASSES[k] for k in order), logits=rows.logits[:, order], labels=number[rows.labels]
    )


def test_rows_are_matched_by_id_and_columns_by_name():
    a, b = member(1), member(2)
    expected = align({"a": [a], "b": [b]}, CLASSES)
    found = align({"b": [permuted_classes(shuffled(b, 5), [2, 0, 1])], "a": [shuffled(a, 6)]}, CLASSES)
    assert found.members == ("a", "b")
    assert np.array_equal(found.logits, expected.logits)
    assert np.array_equal(found.labels, expected.labels)
    assert np.array_equal(found.sample_ids, expected.sample_ids)


def test_equal_ids_of_two_splits_are_two_rows():
    rows = align({"a": [member(1), member(2, split="train")]}, CLASSES)
    assert len(rows.labels) == 40
    assert set(rows.split.tolist()) == {"train", "val"}


def test_only_shared_rows_are_kept_and_the_rest_is_told(caplog):
    few = member(2, ids=tuple(f"ant/{n}.png" for n in range(5, 20)))
    few = replace(few, labels=member(1).labels[5:])
    with caplog.at_level("WARNING", logger="disease_pipeline"):
        import logging

        logging.getLogger("disease_pipeline").addHandler(caplog.handler)
        rows = align({"a": [member(1)], "b": [few]}, CLASSES)
        logging.getLogger("disease_pipeline").removeHandler(caplog.handler)
    assert len(rows.labels) == 15
    assert "ant/5.png" in rows.sample_ids.tolist()
    assert "a: 5 of 20 rows are not shared" in caplog.text


def spoil(rows, **changes):
    return replace(rows, **changes)


def with_nan(rows):
    logits = rows.logits.copy()
    logits[7, 1] = np.nan
    return spoil(rows, logits=logits)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (with_nan(member(2)), r"member b: 1 row\(s\) with NaN or infinity, first ant/7.png"),
        (spoil(member(2), labels=(member(2).labels + 1) % 3), r"members a and b: 20 label\(s\) disagree"),
        (
            spoil(member(2), sample_ids=np.array(["ant/0.png"] * 20)),
            "member b: the sample id val/ant/0.png occurs twice",
        ),
        (spoil(member(2), classes=("ant", "bee", "dog")), "member b: classes ant, bee, dog; expected ant, bee, cat"),
        (spoil(member(2), split="test"), "no row in common"),
    ],
)
def test_members_that_do_not_fit_are_named(broken, words):
    with pytest.raises(UserError, match=words):
        align({"a": [member(1)], "b": [broken]}, CLASSES)


def workspace_at(base: Path) -> Workspace:
    names = (
        "split_dataset",
        "checkpoints",
        "metrics_output",
        "kfold_results",
        "deployment_models",
        "image_cache",
        "logs",
    )
    return Workspace(base, *(base / name for name in names))


@pytest.fixture
def store(tmp_path, trained):
    base = Path(shutil.copytree(trained, tmp_path / "w"))
    workspace = workspace_at(base)
    config = load(CONFIG)
    discovery.discover(config, workspace)
    return Store(config, workspace, catalog.load(workspace))


def test_stored_logits_are_those_of_the_network_on_the_base_transform(store):
    from PIL import Image

    import models
    from utils.datasets import create_optimized_transforms

    found = store.catalog.members["CustomViTHybrid"]
    store.ensure([found], ("val", "test"))
    rows = store.rows(found, "test")
    record = torch.load(store.workspace.base / found.checkpoints[0]["path"], weights_only=True)
    network = models.create_custom_backbone("CustomViTHybrid", 4, size="tiny", img_size=32).eval()
    network.load_state_dict(record["model_state_dict"])
    transform = create_optimized_transforms(32, is_training=False)
    images = []
    for sample_id in rows.sample_ids:
        with Image.open(store.workspace.split_dir / "test" / str(sample_id)) as image:
            images.append(transform(image.convert("RGB")))
    with torch.inference_mode():
        expected = network(torch.stack(images)).numpy()
    np.testing.assert_allclose(rows.logits, expected, atol=1e-5)
    embeddings = np.load(store.workspace.embeddings("CustomViTHybrid", "test"))
    with torch.inference_mode():
        again = network.get_classifier()(torch.from_numpy(embeddings)).numpy()
    np.testing.assert_allclose(again, rows.logits, atol=1e-5)
    assert rows.honest.all()
    assert [str(i).split("/")[0] for i in rows.sample_ids] == [store.catalog.classes[k] for k in rows.labels]


def test_nothing_is_run_twice_and_new_weights_are_run_again(store, monkeypatch):
    members = [store.catalog.members[name] for name in ("CustomConvNeXt", "CustomResNetMish")]
    store.ensure(members, ("val",))
    streamed = []
    original = streaming.stream

    def counting(spec, *arguments, **options):
        streamed.append(spec.architecture)
        return original(spec, *arguments, **options)

    monkeypatch.setattr(streaming, "stream", counting)
    store.ensure(members, ("val",))
    assert streamed == []
    other = replace(members[0], digest="other weights")
    store.ensure([other, members[1]], ("val",))
    assert streamed == ["CustomConvNeXt"]
    record_path = store.workspace.predictions("CustomResNetMish", "val") / "record.json"
    record_path.unlink()  # as after a kill before the last write
    store.ensure([members[1]], ("val",))
    assert streamed == ["CustomConvNeXt", "CustomResNetMish"]
    assert record_path.is_file()


def test_in_sample_outputs_are_marked_dishonest(store):
    found = store.catalog.members["CustomConvNeXt"]
    store.ensure([found], ("train",))
    assert not store.rows(found, "train").honest.any()


def test_one_network_is_resident_and_its_memory_is_released(store, monkeypatch):
    alive = []
    original = streaming.open_network

    def tracking(spec):
        import weakref

        assert not [ref for ref in alive if ref() is not None and next(ref().parameters()).numel()]
        network = original(spec)
        alive.append(weakref.ref(network))
        return network

    monkeypatch.setattr(streaming, "open_network", tracking)
    store.ensure([m for m in store.catalog.members.values() if m.source == "trained"], ("val",))
    assert len(alive) == 3


def test_oof_rows_are_aligned_with_the_classes_and_cached(store):
    found = store.catalog.members["CustomConvNeXt"]
    rows = store.oof(found)
    with np.load(store.workspace.base / found.oof["path"]) as arrays:
        assert np.array_equal(rows.logits, arrays["logits"])
    assert store.workspace.oof("CustomConvNeXt").is_file()
    assert rows.honest.all()
    assert rows.split == "train"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda a: a | {"sample_ids": np.array(["0/nowhere.png", *a["sample_ids"][1:]])},
            "1 rows are not train images",
        ),
        (lambda a: a | {"sample_ids": np.array([a["sample_ids"][1], *a["sample_ids"][1:]])}, "occurs twice"),
        (lambda a: a | {"classes": np.array(["0", "1", "2", "9"])}, "its classes are 0, 1, 2, 9"),
        (lambda a: a | {"labels": (a["labels"] + 1) % 4}, "its labels are not those of the class folders"),
        (lambda a: {k: v for k, v in a.items() if k != "fold"}, "no array fold"),
        (lambda a: a | {"logits": np.where(np.arange(4) == 2, np.inf, a["logits"])}, "NaN or infinite logits"),
    ],
)
def test_oof_that_does_not_fit_is_refused_by_name(store, change, words):
    path = store.workspace.base_oof("CustomConvNeXt")
    with np.load(path) as arrays:
        broken = change(dict(arrays))
    np.savez(path, **broken)
    result = discovery.discover(store.config, store.workspace)
    found = catalog.load(store.workspace)
    assert re.search(f"predictions of CustomConvNeXt refused: .*{re.escape(words)}", result.text)
    assert "oof_refused" in {problem.code for problem in found.problems if problem.member == "CustomConvNeXt"}
    again = Store(store.config, store.workspace, found)
    assert again.oof(found.members["CustomConvNeXt"]) is None
    assert not store.workspace.oof("CustomConvNeXt").is_file()


def test_pickled_arrays_are_refused_and_the_member_is_used_without_them(store):
    np.savez(store.workspace.base_oof("CustomConvNeXt"), logits=np.array([{"a": 1}], dtype=object))
    result = discovery.discover(store.config, store.workspace)
    assert "expected arrays without pickled objects" in result.text
    member = catalog.load(store.workspace).members["CustomConvNeXt"]
    assert member.usable
    assert member.oof is None


def test_crossfit_folds_cover_train_and_val_once_and_are_kept(store):
    folds = crossfit_folds(store)
    ids = {(split, i) for split in ("train", "val") for i in store.images(split).sample_ids}
    assert folds.keys() == ids
    assert set(folds.values()) == set(range(5))
    stamp = store.workspace.crossfit_folds.stat().st_mtime_ns
    assert crossfit_folds(store) == folds
    assert store.workspace.crossfit_folds.stat().st_mtime_ns == stamp
    for fold in range(5):
        held_out = [i.split("/")[0] for (_, i), k in folds.items() if k == fold]
        assert min(held_out.count(name) for name in store.catalog.classes) >= 9


def test_changed_images_and_checkpoints_are_noticed(store):
    image = sorted((store.workspace.split_dir / "val").glob("*/*.png"))[0]
    other = sorted((store.workspace.split_dir / "val").glob("*/*.png"))[1]
    image.write_bytes(other.read_bytes())
    fresh = Store(store.config, store.workspace, store.catalog)
    with pytest.raises(UserError, match="the images have changed since discovery"):
        fresh.ensure([store.catalog.members["CustomConvNeXt"]], ("val",))
    checkpoint = store.workspace.checkpoint("CustomResNetMish", "final")
    shutil.copy(store.workspace.checkpoint("CustomResNetMish", "snapshot1"), checkpoint)
    with pytest.raises(UserError, match=r"CustomResNetMish_final.pth: changed since discovery"):
        Store(store.config, store.workspace, store.catalog).ensure(
            [store.catalog.members["CustomResNetMish"]], ("test",)
        )


def test_the_record_says_what_the_arrays_are(store):
    found = store.catalog.members["CustomConvNeXt"]
    store.ensure([found], ("val",))
    record = json.loads((store.workspace.predictions("CustomConvNeXt", "val") / "record.json").read_text())
    assert record["member_digest"] == found.digest
    assert record["classes"] == list(store.catalog.classes)
    assert record["n"] == len(store.rows(found, "val").labels)
