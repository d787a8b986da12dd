"""The prediction store on really trained members."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stored_predictions import CONFIG, workspace_at

from utils.core.config_file import load_config
from utils.core.errors import UserError
from utils.discovery import discover
from utils.predictions import catalog, extraction, streaming
from utils.predictions.folds import crossfit_folds
from utils.predictions.store import Store


@pytest.fixture(scope="module")
def discovered(tmp_path_factory, trained) -> Path:
    """A copy of the trained workspace after `discover`."""
    left_out = shutil.ignore_patterns("Data", "deployment_models")
    base = Path(shutil.copytree(trained, tmp_path_factory.mktemp("discovered") / "w", ignore=left_out))
    discover.discover(load_config(CONFIG), workspace_at(base))
    return base


@pytest.fixture
def store(tmp_path, discovered):
    workspace = workspace_at(Path(shutil.copytree(discovered, tmp_path / "w")))
    return Store(load_config(CONFIG), workspace, catalog.load(workspace))


def test_stored_logits_are_those_of_the_network_on_the_base_transform(store):
    from PIL import Image

    import models
    from utils.datasets import create_optimized_transforms

    found = store.catalog.members["CustomViTHybrid"]
    extraction.ensure(store, [found], ("val", "test"))
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
    assert rows.out_of_sample.all()
    assert [str(i).split("/")[0] for i in rows.sample_ids] == [store.catalog.classes[k] for k in rows.labels]


def test_nothing_is_run_twice_and_new_weights_are_run_again(store, monkeypatch):
    members = [store.catalog.members[name] for name in ("CustomConvNeXt", "CustomResNetMish")]
    extraction.ensure(store, members, ("val",))
    streamed = []
    original = streaming.stream

    def counting(spec, *arguments, **options):
        streamed.append(spec.architecture)
        return original(spec, *arguments, **options)

    monkeypatch.setattr(streaming, "stream", counting)
    extraction.ensure(store, members, ("val",))
    assert streamed == []
    other = replace(members[0], digest="other weights")
    extraction.ensure(store, [other, members[1]], ("val",))
    assert streamed == ["CustomConvNeXt"]
    record_path = store.workspace.predictions("CustomResNetMish", "val") / "record.json"
    record_path.unlink()  # as after a kill before the last write
    extraction.ensure(store, [members[1]], ("val",))
    assert streamed == ["CustomConvNeXt", "CustomResNetMish"]
    assert record_path.is_file()


def test_in_sample_outputs_are_marked_dishonest(store):
    found = store.catalog.members["CustomConvNeXt"]
    extraction.ensure(store, [found], ("train",))
    assert not store.rows(found, "train").out_of_sample.any()


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
    extraction.ensure(store, [m for m in store.catalog.members.values() if m.source == "trained"], ("val",))
    assert len(alive) == 3


def test_oof_rows_are_aligned_with_the_classes_and_cached(store):
    found = store.catalog.members["CustomConvNeXt"]
    rows = store.oof(found)
    with np.load(store.workspace.base / found.oof["path"]) as arrays:
        assert np.array_equal(rows.logits, arrays["logits"])
    assert store.workspace.oof("CustomConvNeXt").is_file()
    assert rows.out_of_sample.all()
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
    result = discover.discover(store.config, store.workspace)
    found = catalog.load(store.workspace)
    assert re.search(f"predictions of CustomConvNeXt refused: .*{re.escape(words)}", result.text)
    assert "oof_refused" in {problem.code for problem in found.problems if problem.member == "CustomConvNeXt"}
    again = Store(store.config, store.workspace, found)
    assert again.oof(found.members["CustomConvNeXt"]) is None
    assert not store.workspace.oof("CustomConvNeXt").is_file()


def test_pickled_arrays_are_refused_and_the_member_is_used_without_them(store):
    np.savez(store.workspace.base_oof("CustomConvNeXt"), logits=np.array([{"a": 1}], dtype=object))
    result = discover.discover(store.config, store.workspace)
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
        extraction.ensure(fresh, [store.catalog.members["CustomConvNeXt"]], ("val",))
    checkpoint = store.workspace.checkpoint("CustomResNetMish", "final")
    shutil.copy(store.workspace.checkpoint("CustomResNetMish", "snapshot1"), checkpoint)
    with pytest.raises(UserError, match=r"CustomResNetMish_final.pth: changed since discovery"):
        extraction.ensure(
            Store(store.config, store.workspace, store.catalog), [store.catalog.members["CustomResNetMish"]], ("test",)
        )


def test_the_record_says_what_the_arrays_are(store):
    found = store.catalog.members["CustomConvNeXt"]
    extraction.ensure(store, [found], ("val",))
    record = json.loads((store.workspace.predictions("CustomConvNeXt", "val") / "record.json").read_text())
    assert record["member_digest"] == found.digest
    assert record["classes"] == list(store.catalog.classes)
    assert record["n"] == len(store.rows(found, "val").labels)


def test_a_store_for_another_catalog_leaves_the_first_one_as_it_is(store):
    images = store.images("val")
    fewer = replace(store.catalog, members={"CustomConvNeXt": store.catalog.members["CustomConvNeXt"]})
    other = store.with_catalog(fewer)
    assert (other.catalog, len(store.catalog.members) > 1) == (fewer, True)
    assert other.digests is store.digests
    assert other.images("val") is images  # neither listed nor hashed again
    changed = {**store.catalog.splits, "val": store.catalog.splits["val"] | {"digest": "0" * 64}}
    with pytest.raises(UserError):
        store.with_catalog(replace(store.catalog, splits=changed)).images("val")
