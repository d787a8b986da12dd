"""A training runs to the end of its schedule: val rows are measured, and decide nothing about the network."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from noise_datasets import logged, noise_datasets

from models import create_custom_backbone
from training.fitting import Fitted, fit, metrics_record
from training.recipe import Recipe
from utils import set_seed
from utils.datasets import BatchLoader, DecodedDataset

NAME = "CustomConvNeXt"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> tuple[DecodedDataset, DecodedDataset]:
    return noise_datasets(tmp_path_factory.mktemp("schedule"))


def train(images: tuple[DecodedDataset, DecodedDataset], **changes: object) -> tuple[Recipe, Fitted]:
    fixed = {"epochs_head": 2, "epochs_finetune": 8, "batch_size": 8, "augment": "none", "snapshots": 0}
    recipe = replace(Recipe.from_settings(NAME, ["0", "1", "2"], "split"), **(fixed | changes))
    set_seed(5)
    model = create_custom_backbone(NAME, 3, size="tiny", img_size=32)

    def loader(seed: int) -> BatchLoader:
        return BatchLoader(images[0], recipe.batch_size, training=True, seed=seed, kind=recipe.augment)

    return recipe, fit(recipe, model, loader, BatchLoader(images[1], 12), purpose=("final",), device=CPU)


def relabelled(dataset: DecodedDataset) -> DecodedDataset:
    """The same images with other labels."""
    copy = dataset.subset(range(len(dataset)))
    copy.targets = [(label + 1) % 3 for label in dataset.targets]
    return copy


def test_another_val_split_gives_the_same_network(images):
    """Its labels decide which epochs are the best ones, and nothing else."""
    trained = [train((images[0], val))[1] for val in (images[1], relabelled(images[1]))]
    first, second = trained
    assert [(stage.epoch, stage.accuracy) for stage in first.stages] != [
        (stage.epoch, stage.accuracy) for stage in second.stages
    ], "val must choose other epochs, or the test shows nothing"
    weights, others = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert [len(stage.rows) for stage in first.stages] == [len(stage.rows) for stage in second.stages] == [2, 8]


def test_a_val_loss_that_rises_at_the_end_is_logged_and_the_last_epoch_kept(images, caplog):
    caplog.set_level(logging.INFO)
    with logged(caplog):
        recipe, fitted = train(images, epochs_finetune=14, backbone_lr=2e-3)  # noise can only be memorised
    losses = [row[1] for row in fitted.stages[-1].rows]
    lowest = int(np.argmin(losses))
    assert losses[-1] > 1.1 * losses[lowest], "the loss on val must rise, or the test shows nothing"
    message = (
        f"{NAME}: the val loss rose from {losses[lowest]:.4f} in epoch {lowest + 1} to {losses[-1]:.4f} at the end"
    )
    assert f"{message}, epoch 14; the last epoch is kept" in caplog.text
    assert metrics_record(recipe, fitted)["final_val_loss"] == pytest.approx(losses[-1])


def test_a_training_that_diverges_fails_with_the_setting_that_mends_it(images):
    with pytest.raises(FloatingPointError, match=r"CustomConvNeXt: the training diverged: .* try lower rates"):
        train(images, epochs_finetune=3, backbone_lr=30.0)
