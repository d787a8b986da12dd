"""The classifier of a workspace: sizes of blocks, embeddings, disagreement and networks that give no finite output."""

from __future__ import annotations

import numpy as np
import pytest
from finished_workspace import CONFIG, at
from predict_runs import NAME

from utils.core.config_file import load_config
from utils.core.errors import UserError
from utils.inference import classifier
from utils.inference.classifier import WorkspaceClassifier
from utils.networks.preprocessing import Preprocessing
from utils.predictions import catalog
from utils.predictions.store import Store


@pytest.fixture
def workspace(own_copy):
    return at(own_copy)


def test_a_block_is_bounded_by_pixels_and_by_logits():
    def block_size(sizes, members, classes):
        made = WorkspaceClassifier.__new__(WorkspaceClassifier)
        made.preprocessings = [Preprocessing.of_base_pipeline(size) for size in sizes]
        made.members, made.classes = (None,) * members, (None,) * classes
        return made.block_size

    assert block_size([32], 3, 4) == classifier.MAX_BLOCK
    photographs = block_size([224], 15, 13)
    assert 4 * photographs * (1.14 * 224) ** 2 <= classifier.BLOCK_BYTES
    assert photographs > 4000
    assert block_size([224], 20, 20_000) * 20 * 20_000 * 4 <= classifier.ARRAY_BYTES
    assert block_size([4096], 1, 10**7) == classifier.MIN_BLOCK


def test_embeddings_come_along_for_combiners_that_read_them(workspace, tmp_path):
    store = Store(load_config(CONFIG), workspace, catalog.load(workspace))
    predictor = WorkspaceClassifier(store, NAME)
    predictor.reads_embeddings = True
    images = store.images("test")
    for member in predictor.members:
        logits, embeddings = predictor.run_networks(member, images, tmp_path / "cache", lambda count: None)
        np.testing.assert_allclose(embeddings, np.load(workspace.embeddings(member.name, "test")), atol=1e-4)
        np.testing.assert_allclose(
            logits, np.load(workspace.predictions(member.name, "test") / "logits.npy"), atol=1e-4
        )


def test_a_network_without_a_finite_output_costs_its_image_alone(workspace, monkeypatch):
    predictor = WorkspaceClassifier(Store(load_config(CONFIG), workspace, catalog.load(workspace)), NAME)
    paths = predictor.store.images("test").paths[:4]
    expected = predictor.predict_block(paths, lambda count: None)
    run_networks = WorkspaceClassifier.run_networks

    def with_nan(self, member, images, cache, step):
        logits, embeddings = run_networks(self, member, images, cache, step)
        if member.name == self.members[0].name:
            logits[2, 0] = np.nan
        return logits, embeddings

    monkeypatch.setattr(WorkspaceClassifier, "run_networks", with_nan)
    predictions = predictor.predict_block(paths, lambda count: None)
    assert predictions.readable.tolist() == [0, 1, 3]
    assert predictions.problems.keys() == {2}
    np.testing.assert_array_equal(predictions.probabilities, expected.probabilities[[0, 1, 3]])
    np.testing.assert_array_equal(predictions.disagreement, expected.disagreement[[0, 1, 3]])


def test_equal_and_unreadable_files_have_rows_of_their_own(workspace, tmp_path):
    predictor = WorkspaceClassifier(Store(load_config(CONFIG), workspace, catalog.load(workspace)), NAME)
    first = predictor.store.images("test").paths[0]
    copy, broken = tmp_path / "copy.png", tmp_path / "broken.png"
    copy.write_bytes(first.read_bytes())
    broken.write_bytes(b"no image")
    counted = []
    predictions = predictor.predict_block([first, broken, copy, tmp_path / "absent.png"], counted.append)
    assert predictions.readable.tolist() == [0, 2]
    assert predictions.problems.keys() == {1, 3}
    np.testing.assert_array_equal(predictions.probabilities[0], predictions.probabilities[1])
    assert sum(counted) == 2 * predictor.n_networks


def test_an_unknown_name_is_refused_with_the_nearest_one(workspace):
    store = Store(load_config(CONFIG), workspace, catalog.load(workspace))
    with pytest.raises(UserError, match=f"did you mean '{NAME}'"):
        WorkspaceClassifier(store, NAME[:-1])
