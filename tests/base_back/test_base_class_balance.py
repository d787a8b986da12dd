"""Class weights and balanced sampling: every class counts the same, and nothing changes where none is requested."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from hashlib import sha256

import numpy as np
import pytest
import torch
from noise_datasets import noise_datasets

from models import create_custom_backbone
from training.fitting import fit
from training.pipeline import get_loss_function_for_backbone
from training.recipe import Recipe
from utils import set_seed
from utils.class_balance import class_weights, sample_weights
from utils.datasets import BatchLoader, DecodedDataset

NAME = "CustomConvNeXt"
LABELS = [0] * 6 + [1] * 3 + [2]
ABSENT = ("base_back", "pretrained", "exif")  # from the digest at their defaults
BALANCED = {"class_weights": "balanced", "sampling": "balanced"}


def recipe_of(**changes: object) -> Recipe:
    fixed = {"epochs_head": 0, "epochs_finetune": 1, "batch_size": 8, "augment": "none", "snapshots": 0}
    return replace(Recipe.from_settings(NAME, ["0", "1", "2"], "split"), **(fixed | changes))


@pytest.fixture(scope="module")
def imbalanced(tmp_path_factory) -> DecodedDataset:
    """Eight, four and two images of three classes."""
    train, _ = noise_datasets(tmp_path_factory.mktemp("balance"))
    rows = [np.flatnonzero(np.array(train.targets) == label)[:count] for label, count in enumerate((8, 4, 2))]
    return train.subset(np.concatenate(rows))


def test_weights_are_those_of_scikit_learn():
    from sklearn.utils.class_weight import compute_class_weight, compute_sample_weight

    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS)
    np.testing.assert_allclose(class_weights(LABELS, 3), expected)
    np.testing.assert_allclose(sample_weights(LABELS, 3), compute_sample_weight("balanced", LABELS))
    np.testing.assert_allclose(class_weights([0, 0, 2], 3), [0.5, 0, 1])  # a class that a fold leaves out


def test_the_weighted_loss_is_the_mean_of_the_classes_mean_losses():
    """On all rows; with label smoothing the smoothed share counts by the row's own class."""
    torch.manual_seed(0)
    logits, labels = torch.randn(10, 3), torch.tensor(LABELS)
    weighted = get_loss_function_for_backbone(NAME, 3, class_weights(LABELS, 3))(logits, labels)
    plain = get_loss_function_for_backbone(NAME, 3)
    by_class = [plain(logits[labels == label], labels[labels == label]) for label in range(3)]
    assert float(weighted) == pytest.approx(float(sum(by_class)) / 3, abs=1e-6)
    assert float(weighted) != pytest.approx(float(plain(logits, labels)), abs=1e-3)


def test_balanced_epochs_have_as_many_images_and_every_class_as_often(imbalanced):
    def labels(balanced: bool, epochs: int = 60) -> torch.Tensor:
        loader = BatchLoader(imbalanced, 8, training=True, seed=3, kind="none", balanced=balanced)
        drawn = []
        for _ in range(epochs):
            drawn.append(torch.cat([batch for _, batch in loader]))
        return torch.stack(drawn)

    drawn = labels(True)
    assert drawn.shape == (60, 14)
    shares = torch.bincount(drawn.flatten(), minlength=3) / drawn.numel()
    assert torch.allclose(shares, torch.full((3,), 1 / 3), atol=0.06)  # five standard deviations
    assert torch.equal(labels(True), drawn)
    again = BatchLoader(imbalanced, 8, training=True, seed=3, kind="none", balanced=True)
    again.epoch = 7  # an epoch is drawn without those before it
    assert torch.equal(torch.cat([batch for _, batch in again]), drawn[7])
    assert torch.bincount(labels(False, 1).flatten()).tolist() == [8, 4, 2]


@pytest.mark.parametrize("name", ["class_weights", "sampling"])
def test_each_changes_the_network_and_its_digest_and_is_recorded(imbalanced, name):
    """`none` and `natural` have the digest of before there was a choice."""
    usual, balanced = recipe_of(), recipe_of(**{name: BALANCED[name]})
    assert usual.digest("train") != balanced.digest("train")
    before = {key: value for key, value in asdict(usual).items() if key not in (*BALANCED, *ABSENT)}
    assert usual.digest("train") == sha256(json.dumps([before, "train"], sort_keys=True).encode()).hexdigest()
    assert not {"class_weights", "sampling"} & usual.explain().keys()
    assert balanced.explain()[name] == "balanced"
    trained = []
    for recipe in (usual, balanced):
        set_seed(5)
        model = create_custom_backbone(NAME, 3, size="tiny", img_size=32)
        val = BatchLoader(imbalanced, 14)
        loader = lambda seed, recipe=recipe: recipe.train_loader(imbalanced, seed)  # noqa: E731
        trained.append(fit(recipe, model, loader, val, purpose=("final",), device=torch.device("cpu")))
    first, second = (fitted.model.state_dict() for fitted in trained)
    assert not all(torch.equal(first[key], second[key]) for key in first)


def test_a_head_on_frozen_features_weights_its_rows_by_either():
    labels = np.array(LABELS)
    expected = class_weights(labels, 3)
    assert recipe_of().weights_of(labels, or_by_sampling=True) is None
    assert recipe_of(sampling="balanced").weights_of(labels) is None
    for name, value in BALANCED.items():
        np.testing.assert_array_equal(recipe_of(**{name: value}).weights_of(labels, or_by_sampling=True), expected)


def test_both_together_are_refused(base_main, tmp_path):
    done = base_main("--stages", "verify", "--class-weights", "balanced", "--sampling", "balanced", workspace=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("DBT_SAMPLING (--sampling): found 'balanced' beside DBT_CLASS_WEIGHTS")
