"""`predict --maps`: pictures and a table, in the frame of the largest input, weighted like the ensemble."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import PROJECT
from stored_predictions import workspace_at

from utils.activation_maps import map_maker
from utils.activation_maps.map_maker import ImageMap, MapMaker
from utils.core.config_file import load_config
from utils.core.errors import ConfigError, UserError
from utils.inference import map_pictures, predict
from utils.inference.classifier import WorkspaceClassifier
from utils.networks import class_maps
from utils.networks.class_maps import NoMapError
from utils.networks.preprocessing import Preprocessing
from utils.predictions import catalog
from utils.predictions.store import Store


@pytest.fixture
def config():
    return load_config(PROJECT / "configs" / "votes.yaml", overrides=["device=cpu"])


@pytest.fixture
def store(built, config):
    workspace = workspace_at(built)
    return Store(config, workspace, catalog.load(workspace))


def predicted(store, config, folder, name):
    images = [str(path) for path in store.images("test").paths[:6]]
    table = folder / "answers.csv"
    predict.predict(
        config, store.workspace, paths=images, model_name=name, to=str(table), maps=str(folder / "maps"), force=True
    )
    files = (table, folder / "maps" / map_pictures.TABLE)
    return tuple(list(csv.DictReader(file.read_text().splitlines())) for file in files)


@pytest.mark.parametrize("name", ["soft_voting_ensemble", "CustomViTHybrid"])
def test_every_image_has_a_picture_of_the_predicted_class(store, config, tmp_path, name):
    from PIL import Image

    answers, maps = predicted(store, config, tmp_path, name)
    assert [(row["path"], row["class"]) for row in maps] == [(row["path"], row["class"]) for row in answers]
    assert all(0 <= float(row["outside_centre"]) <= 1 for row in maps)
    for row in maps:
        with Image.open(tmp_path / "maps" / row["map"]) as picture:
            assert picture.mode == "RGB"
            assert min(picture.size) >= map_pictures.LEAST_SIDE


def test_a_member_without_a_map_is_named_and_the_others_answer(store, monkeypatch, heard):
    members = [store.catalog.members[name] for name in ("CustomConvNeXt", "CustomResNetMish")]
    probe = class_maps.ClassMaps.probe

    def refusing(self, images):
        if self.name == "CustomConvNeXt":
            raise NoMapError("CustomConvNeXt", "no positions")
        probe(self, images)

    images = store.images("test")
    monkeypatch.setattr(class_maps.ClassMaps, "probe", refusing)
    arguments = (images.paths[:2], images.contents[:2], np.array([0, 1]))
    both = MapMaker(store, "pair", members).maps(*arguments)
    alone = MapMaker(store, "pair", members[1:]).maps(*arguments)
    assert "CustomConvNeXt: no positions" in heard.text
    for first, second in zip(both, alone, strict=True):
        np.testing.assert_allclose(first.mass, second.mass, atol=1e-6)
    with pytest.raises(UserError, match="no positions"):
        MapMaker(store, "alone", members[:1]).maps(*arguments)


def test_members_count_by_the_weights_of_the_record(store, monkeypatch):
    names = ["CustomConvNeXt", "CustomResNetMish"]
    assert map_maker._weights(store, "no_ensemble", names) == [0.5, 0.5]
    for recorded, expected in (
        ({"CustomConvNeXt": 3, "CustomResNetMish": 1}, [0.75, 0.25]),
        ({"CustomConvNeXt": -3, "CustomResNetMish": 1}, [0.5, 0.5]),
        ([1, 2], [0.5, 0.5]),
    ):
        monkeypatch.setattr(map_maker.ensembles, "record_of", lambda *_, found=recorded: {"weights": found})
        assert map_maker._weights(store, "soft_voting_ensemble", names) == expected


@pytest.mark.parametrize(
    ("outside", "stands_out", "is_said"), [(0.7, True, True), (0.7, False, False), (0.4, True, False)]
)
def test_the_background_is_named_where_maps_and_audit_agree(store, monkeypatch, tmp_path, outside, stands_out, is_said):
    classifier = WorkspaceClassifier(store, "soft_voting_ensemble")
    mapping = map_pictures.MappingClassifier(classifier, tmp_path)
    mapping._outside = [outside, outside]
    probes = [
        {"name": "border pixels", "accuracy": 0.71, "stands_out": stands_out},
        {"name": "file names", "accuracy": 0.9, "stands_out": True},
    ]
    monkeypatch.setattr(map_pictures.report_audit, "current_record", lambda *_: {"probes": probes})
    lines = mapping.summary()
    assert f"{outside:.0%} of their mass" in lines[0]
    assert (
        any(
            "looks at the background: in the audit, border pixels alone predict the class of 71% of the images" in line
            for line in lines
        )
        == is_said
    )


def test_a_uniform_map_has_half_of_its_mass_outside_the_centre():
    uniform = ImageMap(np.zeros((224, 224, 3), np.uint8), np.full((224, 224), 1 / 224**2, np.float32))
    assert uniform.outside_centre == pytest.approx(0.5, abs=0.01)


def test_a_map_of_a_smaller_crop_lies_further_inside(tmp_path):
    from PIL import Image

    path = tmp_path / "photo.png"
    Image.new("RGB", (300, 200)).save(path)
    frame = replace(Preprocessing.of_base_pipeline(64), resized=64)  # the whole square
    crop = replace(frame, resized=128)  # its centre
    corner = torch.zeros(4, 4)
    corner[0, 0] = 1
    moved = map_maker._in_frame(corner, crop, frame, path)
    rows, columns = np.nonzero(moved > 0)
    assert moved.sum() == pytest.approx(1, abs=1e-5)
    assert min(rows.min(), columns.min()) >= 12
    same = map_maker._in_frame(corner, frame, frame, path)
    assert np.nonzero(same > 0)[0].min() == 0


def test_an_exported_file_has_no_maps(tmp_path):
    with pytest.raises(ConfigError, match="--maps: an exported file gives no gradients"):
        predict.predict_from_export(paths=["a.png"], from_export="model.onnx", maps=str(tmp_path))


def test_a_file_in_place_of_the_folder_is_refused(store, config, tmp_path):
    (tmp_path / "maps").write_text("x")
    with pytest.raises(UserError, match=r"--maps .*: a file; expected a folder"):
        predicted(store, config, tmp_path, "CustomResNetMish")
