"""All fifteen architectures: shapes, gradients, tracing with a free batch, embeddings, sizes."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

NAMES = (
    *("CustomConvNeXt", "CustomEfficientNetV4", "CustomGhostNetV2", "CustomResNetMish", "CustomCSPDarkNet"),
    *("CustomInceptionV4", "CustomViTHybrid", "CustomSwinTransformer", "CustomCoAtNet", "CustomRegNet"),
    *("CustomDenseNetHybrid", "CustomDeiTStyle", "CustomMaxViT", "CustomMobileOne", "CustomDynamicConvNet"),
)
every = pytest.mark.parametrize("name", NAMES)
# timm checks shapes in Python; what a trace keeps of that is what the runs at other batch sizes test.
traces = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")


def build(name: str, classes: int = 5, size: str = "tiny", img_size: int | None = None) -> nn.Module:
    from models import create_custom_backbone

    torch.manual_seed(0)
    return create_custom_backbone(name, classes, size=size, img_size=img_size)


def images(count: int, side: int) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def assert_every_parameter_learns(model: nn.Module, side: int, count: int) -> None:
    model.train()
    logits = model(images(count, side))
    nn.functional.cross_entropy(logits, torch.arange(count)).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without, without
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def assert_traced_at_two_runs_at_any_batch(model: nn.Module, side: int, batches: tuple[int, ...]) -> None:
    model.eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, images(2, side), check_trace=False)  # as the exporter; compared below
        for batch in batches:
            torch.testing.assert_close(traced(images(batch, side)), model(images(batch, side)), atol=1e-5, rtol=1e-5)


def test_the_map_holds_the_fifteen_in_the_order_of_the_settings():
    from config.settings import ALL_BACKBONES
    from models import BACKBONE_MAP

    assert tuple(BACKBONE_MAP) == tuple(ALL_BACKBONES) == NAMES
    assert all(architecture.__name__ == name for name, architecture in BACKBONE_MAP.items())


@every
def test_tiny_is_tiny_and_gives_logits_in_both_modes(name):
    model = build(name, 7)
    assert 0.05e6 <= parameters(model) <= 1e6
    for mode in (True, False):
        logits = model.train(mode)(images(3, 32))
        assert isinstance(logits, torch.Tensor)
        assert logits.shape == (3, 7)
    assert not hasattr(model, "backbone")
    assert (model.size, model.img_size, model.architecture, model.num_classes) == ("tiny", 32, name, 7)


@every
def test_every_parameter_of_tiny_gets_a_gradient(name):
    assert_every_parameter_learns(build(name), 32, 2)


@traces
@every
def test_tiny_is_traced_at_batch_two_and_run_at_others(name):
    assert_traced_at_two_runs_at_any_batch(build(name), 32, (1, 2, 3, 17))


@every
def test_embeddings_give_the_logits_through_the_last_layer(name):
    model = build(name).eval()
    with torch.no_grad():
        embeddings = model.forward_head(model.forward_features(images(4, 32)), pre_logits=True)
        assert embeddings.shape == (4, model.num_features)
        torch.testing.assert_close(model.get_classifier()(embeddings), model(images(4, 32)))
    linear = [module for module in model.get_classifier().modules() if isinstance(module, nn.Linear)]
    assert linear
    assert all(layer.out_features == 5 for layer in linear)


@every
def test_weights_depend_on_the_seed_alone_and_survive_a_state_dictionary(name):
    first, second = build(name).eval(), build(name).eval()
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    torch.manual_seed(9)
    from models import create_custom_backbone

    other = create_custom_backbone(name, 5, size="tiny")
    other.load_state_dict(first.state_dict())
    with torch.no_grad():
        assert torch.equal(other.eval()(images(2, 32)), first(images(2, 32)))


@every
def test_a_last_batch_of_one_image_trains(name):
    """BatchNorm needs more than one value a channel: no map of a tiny network may shrink to one pixel."""
    assert torch.isfinite(build(name).train()(images(1, 32))).all()


@every
def test_building_draws_from_the_generator_of_torch_alone(name):
    python, numbers = random.getstate(), np.random.get_state()[1].tolist()
    build(name)
    assert random.getstate() == python
    assert np.random.get_state()[1].tolist() == numbers


@every
def test_tiny_takes_larger_images(name):
    with torch.no_grad():
        assert build(name, img_size=64).eval()(images(2, 64)).shape == (2, 5)


@every
def test_full_has_the_size_of_a_real_network_and_learns_at_224_pixels(name):
    model = build(name, 13, size="full")
    assert 5e6 <= parameters(model) <= 40e6
    if name == "CustomConvNeXt":
        assert parameters(model) > 13e6
    assert model.img_size == 224
    assert_every_parameter_learns(model, 224, 1)


@pytest.mark.slow
@traces
@every
def test_full_is_traced_at_batch_two_and_run_at_others(name):
    assert_traced_at_two_runs_at_any_batch(build(name, 13, size="full"), 224, (1, 2, 3))


@pytest.mark.parametrize("name", ["CustomViTHybrid", "CustomCoAtNet"])
def test_hybrids_have_batch_norm_in_their_stems(name):
    assert any(isinstance(module, nn.BatchNorm2d) for module in build(name).modules())


def test_the_distillation_token_has_a_head_of_its_own_and_logits_are_averaged():
    model = build("CustomDeiTStyle").eval()
    heads = [module for module in model.get_classifier().modules() if isinstance(module, nn.Linear)]
    assert len(heads) == 2
    with torch.no_grad():
        embeddings = model.forward_head(model.forward_features(images(2, 32)), pre_logits=True)
        parts = embeddings.chunk(2, dim=1)
        mean = (heads[0](parts[0]) + heads[1](parts[1])) / 2
        torch.testing.assert_close(mean, model(images(2, 32)))


def test_a_routed_convolution_equals_a_convolution_with_each_images_own_kernel():
    from models.blocks import RoutedConv2d

    torch.manual_seed(0)
    layer = RoutedConv2d(6, 8, experts=3).eval()
    x = torch.randn(4, 6, 9, 9)
    with torch.no_grad():
        shares = layer.routing(x)  # (B, experts)
        found = layer(x)
        kernels = layer.experts.weight.view(3, 8, 6, 3, 3)
        for row in range(4):
            kernel = torch.einsum("e,eoihw->oihw", shares[row], kernels)
            expected = nn.functional.conv2d(x[row : row + 1], kernel, padding=1)
            torch.testing.assert_close(found[row : row + 1], expected, atol=1e-5, rtol=1e-5)


def test_mobile_one_can_be_folded_into_plain_convolutions():
    from timm.utils.model import reparameterize_model

    model = build("CustomMobileOne").train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    model(3 * images(16, 32) + 1)  # running means and variances away from 0 and 1
    model.eval()
    folded = reparameterize_model(model).eval()
    assert parameters(folded) < parameters(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        torch.testing.assert_close(folded(images(3, 32)), model(images(3, 32)), atol=1e-4, rtol=1e-4)


def test_an_unknown_name_is_answered_with_the_nearest_and_the_known_ones():
    from models import create_custom_backbone, create_custom_backbone_safe

    with pytest.raises(ValueError, match="did you mean 'CustomConvNeXt'") as caught:
        create_custom_backbone("CustomConvNext", 3)
    assert all(name in str(caught.value) for name in NAMES)
    assert create_custom_backbone_safe("CustomConvNext", 3) is None
    assert "CustomConvNext" in create_custom_backbone_safe.last_error
    assert create_custom_backbone_safe("CustomConvNeXt", 3, size="tiny") is not None
    assert create_custom_backbone_safe.last_error is None


@pytest.mark.parametrize(
    "options", [{"size": "huge"}, {"size": "tiny", "img_size": 33}, {"size": "tiny", "img_size": 0}]
)
def test_sizes_that_cannot_work_are_refused(options):
    from models import create_custom_backbone

    with pytest.raises(ValueError, match=r"size"):
        create_custom_backbone("CustomSwinTransformer", 3, **options)


@pytest.mark.parametrize(
    ("setting", "asked", "found"),
    [
        (("tiny", 48), {}, ("tiny", 48)),
        (("tiny", 48), {"size": "tiny"}, ("tiny", 48)),
        (("tiny", 48), {"size": "full"}, ("full", 224)),
        (("full", 160), {"size": "tiny"}, ("tiny", 32)),
        (("full", 160), {"img_size": 64}, ("full", 64)),
        (("full", 160), {"size": "tiny", "img_size": 64}, ("tiny", 64)),
    ],
)
def test_what_is_not_asked_for_comes_from_the_settings_of_the_same_size(monkeypatch, setting, asked, found):
    from config import settings
    from models.backbone import resolve_sizes

    monkeypatch.setattr(settings, "MODEL_SIZE", setting[0])
    monkeypatch.setattr(settings, "IMG_SIZE", setting[1])
    assert resolve_sizes(asked.get("size"), asked.get("img_size")) == found


def test_a_refused_image_size_names_the_allowed_ones():
    with pytest.raises(ValueError, match=r"img_size=48 does not fit .* allowed are 32 or more, in steps of 32 pixels"):
        build("CustomSwinTransformer", img_size=48)


@pytest.mark.parametrize(
    "name", ["CustomViTHybrid", "CustomSwinTransformer", "CustomCoAtNet", "CustomDeiTStyle", "CustomMaxViT"]
)
def test_attention_refuses_images_of_another_size_than_it_was_built_for(name):
    with pytest.raises(ValueError, match=r"img_size=32, found images of \(64, 64\) pixels"):
        build(name)(images(1, 64))


def test_the_windows_divide_every_map_of_swin():
    """At 224 pixels the maps have sides 56, 28, 14 and 7, at 160 pixels 40, 20, 10 and 5."""
    from models import CustomSwinTransformer

    for size, img_size, window in (("tiny", 32, 4), ("tiny", 64, 4), ("full", 64, 2), ("full", 160, 5)):
        network = CustomSwinTransformer(3, size=size, img_size=img_size).network
        assert {block.window_size for layer in network.layers for block in layer.blocks} == {(window, window)}


@pytest.mark.parametrize("classes", [0, -1, True, 2.0])
def test_a_number_of_classes_that_cannot_be_is_refused(classes):
    with pytest.raises(ValueError, match="num_classes"):
        build("CustomConvNeXt", classes)


def test_activations_are_new_modules_by_name():
    from models import get_activation_fn

    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(get_activation_fn("mish")(x), x * torch.tanh(nn.functional.softplus(x)))
    with pytest.raises(ValueError, match="did you mean 'gelu'"):
        get_activation_fn("gellu")
