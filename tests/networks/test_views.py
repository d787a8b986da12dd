"""Views of test-time augmentation: their shapes, what is averaged, and which images they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from head_networks import built_network

from utils.building.view_builder import COUNTS
from utils.core.config_values import VIEW_GROUPS as NAMES
from utils.core.errors import UserError
from utils.networks import views
from utils.networks.embeddings import EmbeddingExtractor
from utils.networks.ensemble_network import MemberModule, MemberNetworks
from utils.networks.preprocessing import Preprocessing
from utils.networks.views import VIEW_GROUPS, ViewAverage

SIDE = 32


@pytest.fixture
def images():
    return torch.randn(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def test_the_configuration_the_module_and_the_costs_name_the_same_groups():
    assert list(VIEW_GROUPS) == list(NAMES) == list(COUNTS)


@pytest.mark.parametrize("group", NAMES)
@pytest.mark.parametrize("side", [32, 33, 224])
def test_every_view_has_the_shape_of_the_image(group, side):
    made = VIEW_GROUPS[group](torch.rand(2, 3, side, side), side)
    assert len(made) == COUNTS[group]
    assert {view.shape for view in made} == {(2, 3, side, side)}


def test_rotations_and_flip_are_those_of_numpy(images):
    turned = VIEW_GROUPS["rotations"](images, SIDE)
    for quarters, view in enumerate(turned, start=1):
        np.testing.assert_array_equal(view.numpy(), np.rot90(images.numpy(), quarters, axes=(2, 3)))
    np.testing.assert_array_equal(VIEW_GROUPS["flip"](images, SIDE)[0].numpy(), images.numpy()[:, :, :, ::-1])


def test_crops_and_scales_keep_the_centre_in_its_place():
    ramp = torch.linspace(-1, 1, SIDE).expand(1, 3, SIDE, SIDE)
    centred = [VIEW_GROUPS["five_crop"](ramp, SIDE)[4], *VIEW_GROUPS["multi_scale"](ramp, SIDE)]
    slopes = [
        float((view[0, 0, 0, 17] - view[0, 0, 0, 14]) / (ramp[0, 0, 0, 17] - ramp[0, 0, 0, 14])) for view in centred
    ]
    assert slopes == pytest.approx([views.CROP, 1 / views.SCALES[0], 1 / views.SCALES[1]], rel=0.05)
    assert [float(view[0, 0, 0, 15:17].mean()) for view in centred] == pytest.approx([0, 0, 0], abs=0.05)


@pytest.mark.parametrize("name", ["Foreign", "TwoHeads", "Shared"])
def test_logits_and_embeddings_are_means_over_the_views(name, images):
    network = built_network(name, 5)
    average = ViewAverage(network, ("flip", "rotations"), SIDE).eval()
    outputs = EmbeddingExtractor(average, name)
    of_one = EmbeddingExtractor(network, name)
    with torch.inference_mode():
        seen = [images, *VIEW_GROUPS["flip"](images, SIDE), *VIEW_GROUPS["rotations"](images, SIDE)]
        expected = torch.stack([network(view) for view in seen]).mean(dim=0)
        torch.testing.assert_close(average(images), expected)
        for extractor in (outputs, of_one):
            extractor.probe(images[:2])
        logits, embeddings = outputs(images)
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(embeddings, torch.stack([of_one(view)[1] for view in seen]).mean(dim=0))


def test_a_traced_ensemble_member_averages_for_any_number_of_images(images):
    average = ViewAverage(built_network("Foreign", 5), NAMES, SIDE).eval()
    part = MemberNetworks("m", [average], Preprocessing.of_base_pipeline(SIDE), range(5))
    member = MemberModule(part, embeds=False).eval()
    with torch.no_grad():
        traced = torch.jit.trace(average, (images,))
        torch.testing.assert_close(traced(images[:2]), member(images[:2])[0])


@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (48, 48)])
def test_images_that_are_no_squares_of_the_side_are_refused(shape):
    average = ViewAverage(built_network("Foreign", 5), ("rotations",), SIDE)
    with pytest.raises(
        UserError, match=rf"{shape[0]} x {shape[1]} pixels; the views rotations are made of squares of 32"
    ):
        average(torch.zeros(1, 3, *shape))
