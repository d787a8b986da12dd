"""Networks of any origin: number of outputs, weights that do not fit, embeddings that explain the logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from utils.core.errors import UserError
from utils.networks import construction
from utils.networks.construction import EmbeddingExtractor, NetworkSpec, build_network, extra_outputs_problem

CLASSES = ("a", "b", "c", "d", "e")


class Foreign(nn.Module):
    """A network as the public base pipeline makes them: no timm method, an integer buffer, a stack as its head."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, stride=4)
        self.register_buffer("index", torch.arange(6))
        self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, num_classes))

    def features(self, x):
        return self.stem(x).mean((2, 3))[:, self.index]

    def forward(self, x):
        return self.head(self.features(x))


class TwoHeads(Foreign):
    """Two heads whose logits are averaged."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__(num_classes)
        self.head, self.head_dist = nn.Linear(6, num_classes), nn.Linear(6, num_classes)

    def forward(self, x):
        return (self.head(self.features(x)) + self.head_dist(self.features(x).tanh())) / 2


class Bottleneck(Foreign):
    """An earlier layer has as many outputs as there are classes, and one that does not matter comes last."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__(num_classes)
        self.squeeze = nn.Linear(6, num_classes)
        self.head = nn.Linear(num_classes, num_classes)
        self.auxiliary = nn.Linear(6, num_classes)

    def forward(self, x):
        logits = self.head(self.squeeze(self.features(x)).relu())
        self.auxiliary(self.features(x))
        return logits


class Shared(Foreign):
    """One head, called on two views and averaged."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__(num_classes)
        self.head = nn.Linear(6, num_classes)

    def forward(self, x):
        return (self.head(self.features(x)) + self.head(self.features(x.flip(3) ** 2))) / 2


class Hidden(Foreign):
    """The logits are scaled after the last layer, so no linear map of its input gives them."""

    def forward(self, x):
        return super().forward(x) * 3


class Methods(Foreign):
    """Has timm's method names, but its forward pass goes another way."""

    def forward_features(self, x):
        return self.features(x)

    def forward_head(self, x, pre_logits=False):
        return x if pre_logits else self.head(x)

    def get_classifier(self):
        return self.head[-1]


NETWORKS = {kind.__name__: kind for kind in (Foreign, TwoHeads, Bottleneck, Shared, Hidden, Methods)}


def factory(name, num_classes=1000):
    """Without size and image size, as upstream's."""
    return NETWORKS[name](num_classes) if name in NETWORKS else None


def spec(name, classes=CLASSES, **options):
    return NetworkSpec(name, Path(f"{name}_final.pth"), "full", 32, classes, **options)


def built_network(name, outputs=5):
    torch.manual_seed(0)
    return build_network(spec(name), NETWORKS[name](outputs).state_dict(), factory)


@pytest.fixture
def images():
    return torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_a_factory_without_sizes_and_integer_buffers(images):
    torch.manual_seed(3)
    original = Foreign(5).eval()
    original.index.copy_(torch.tensor([5, 4, 3, 2, 1, 0]))
    model = build_network(spec("Foreign"), original.state_dict(), factory)
    assert not model.training
    assert model.index.dtype == torch.int64
    with torch.inference_mode():
        assert torch.equal(model(images), original(images))


@pytest.mark.parametrize("classes", [CLASSES, CLASSES[:2]])
def test_the_weights_say_how_many_outputs_there_are(classes):
    model = build_network(spec("Foreign", classes), Foreign(13).state_dict(), factory)
    assert model.head[-1].out_features == 13


def test_where_the_last_matrix_misleads_the_shapes_decide():
    class HeadFirst(nn.Module):
        def __init__(self, num_classes=1000):
            super().__init__()
            self.head, self.stem = nn.Linear(8, num_classes), nn.Linear(4, 8)

    found = build_network(
        spec("HeadFirst"), HeadFirst(3).state_dict(), lambda name, num_classes: HeadFirst(num_classes)
    )
    assert found.head.out_features == 3


def test_a_bundled_network_takes_its_sizes_and_its_classes_from_the_file():
    from models import create_custom_backbone, create_custom_backbone_safe

    # Its two heads come before everything else in the file, so the last matrix is not the classifier.
    weights = create_custom_backbone("CustomDeiTStyle", 3, size="tiny", img_size=32).state_dict()
    asked = NetworkSpec("CustomDeiTStyle", Path("d.pth"), "tiny", 32, CLASSES[:3])
    assert build_network(asked, weights, create_custom_backbone_safe).num_classes == 3


@pytest.mark.parametrize("name", ["resnet10t", "deit_tiny_distilled_patch16_224"])
def test_a_timm_model_by_name(name, images):
    import timm

    torch.manual_seed(0)
    options = {"img_size": 32} if "deit" in name else {}
    original = timm.create_model(name, pretrained=False, num_classes=5, **options).eval()
    model = build_network(spec(name, source="timm"), original.state_dict())
    outputs = EmbeddingExtractor(model, name)
    with torch.inference_mode():
        outputs.probe(images[:2])
        logits, embeddings = outputs(images)
        torch.testing.assert_close(logits, original(images))
    assert embeddings.shape[1] == {"resnet10t": 512, "deit_tiny_distilled_patch16_224": 2 * 192}[name]


@pytest.mark.parametrize("name", ["resnet10", "hf-hub:timm/resnet10t.c3_in1k"])
def test_a_timm_model_that_is_not_installed_is_named_and_not_fetched(name):
    with pytest.raises(UserError, match=r"has no model '.*resnet10.*Name one of timm.list_models"):
        build_network(spec(name, source="timm"), Foreign(5).state_dict())


def test_weights_that_do_not_fit_say_in_which_way():
    def said(weights, name="Foreign"):
        with pytest.raises(UserError) as caught:
            build_network(spec(name), weights, factory)
        return str(caught.value)

    weights = Foreign(5).state_dict()
    assert "'module.', as DataParallel saves" in said({f"module.{name}": value for name, value in weights.items()})
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 5)).state_dict()
    assert "another architecture: they share 0 of 7 names" in said(other)
    assert "1 name(s) are missing, first index" in said({k: v for k, v in weights.items() if k != "index"})
    assert "1 are not the network's, first ema" in said({"ema": torch.ones(1)} | weights)
    wider = weights | {"stem.bias": torch.zeros(7)}
    assert "1 have other shapes, first stem.bias is (7,), expected (6,)" in said(wider)
    assert "no weights (epoch); expected a dictionary of tensors" in said(weights | {"epoch": 3})
    assert "no weights (empty)" in said({})
    assert "the network Nothing cannot be built (see the log above)" in said(weights, "Nothing")


def linear_map(model, embeddings):
    """The logits that a network's last layers make of its embeddings."""
    if isinstance(model, TwoHeads):
        first, second = embeddings.split(6, dim=1)
        return (model.head(first) + model.head_dist(second)) / 2
    if isinstance(model, Shared):
        return sum(map(model.head, embeddings.split(6, dim=1))) / 2
    return (model.head[-1] if isinstance(model.head, nn.Sequential) else model.head)(embeddings)


@pytest.mark.parametrize(
    ("name", "outputs", "width"),
    [("Foreign", 5, 8), ("Foreign", 8, 8), ("TwoHeads", 5, 12), ("Bottleneck", 5, 5), ("Shared", 5, 12)],
)
def test_embeddings_are_what_the_last_layers_read(name, outputs, width, images):
    model = built_network(name, outputs)
    ways = EmbeddingExtractor(model, name)
    with torch.inference_mode():
        ways.probe(images[:2])
        logits, embeddings = ways(images)
        assert torch.equal(logits, model(images))
        assert embeddings.shape == (7, width)
        torch.testing.assert_close(linear_map(model, embeddings), logits, atol=1e-5, rtol=0)
    assert ways.count == outputs
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_early_layer_with_as_many_outputs_is_not_the_head(images):
    model = built_network("Foreign", 8)  # head.0 has 8 outputs as well
    ways = EmbeddingExtractor(model, "Foreign")
    with torch.inference_mode():
        ways.probe(images[:2])
        _, embeddings = ways(images)
        assert torch.equal(embeddings, F.relu(model.head[0](model.features(images))))


def test_methods_are_believed_only_where_they_give_the_logits(images):
    model = built_network("Methods")  # forward_head stops before the stack, get_classifier is its end
    ways = EmbeddingExtractor(model, "Methods")
    with torch.inference_mode():
        ways.probe(images[:2])
        logits, embeddings = ways(images)
        torch.testing.assert_close(model.head[-1](embeddings), logits)


def test_a_network_without_embeddings_is_named_once_and_keeps_its_logits(images, heard):
    model = built_network("Hidden")
    ways = EmbeddingExtractor(model, "Hidden_final.pth")
    with torch.inference_mode():
        ways.probe(images[:2])
        for _ in range(2):
            logits, embeddings = ways(images)
        assert torch.equal(logits, model(images))
    assert embeddings.shape == (7, 0)
    said = [record for record in heard.records if "no linear layer's outputs are its logits" in record.getMessage()]
    assert len({id(record) for record in said}) == 1


def test_a_network_that_goes_another_way_for_some_images_is_refused(images):
    class Moody(Foreign):
        def forward(self, x):
            return super().forward(x) * (1 if len(x) < 5 else 2)

    ways = EmbeddingExtractor(Moody(5).eval(), "Moody")
    with torch.inference_mode():
        ways.probe(images[:2])
        with pytest.raises(UserError, match="explain the logits of some images and not of others"):
            ways(images)


def test_what_is_no_tensor_of_logits_is_refused(images):
    class Pair(Foreign):
        def forward(self, x):
            return super().forward(x), None

    with pytest.raises(UserError, match="returns tuple; expected one tensor of logits"):
        EmbeddingExtractor(Pair(5).eval(), "Pair").probe(images)


def test_surplus_outputs_are_dead_or_not():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 13)) * 2
    assert "is the largest on" in extra_outputs_problem(logits, 10)
    logits[:, 10:] = logits[:, :10].min(axis=1, keepdims=True)  # never the largest, and yet alive
    weak = logits * 0.1
    assert "of the probability, 0.046 at most" in extra_outputs_problem(weak, 10)
    logits[:, 10:] -= 20
    assert extra_outputs_problem(logits, 10) is None


def test_label_smoothing_leaves_dead_outputs_that_are_called_dead():
    target = np.full((50, 13), 0.1 / 13)
    target[np.arange(50), np.arange(50) % 10] += 0.9
    assert extra_outputs_problem(np.log(target), 10) is None


def test_the_table_of_layouts_names_bundled_architectures_only():
    from models import BACKBONE_MAP, create_custom_backbone

    assert set().union(*construction.CHANNELS_LAST.values()) <= set(BACKBONE_MAP)
    assert construction.keeps_channels_last(create_custom_backbone("CustomRegNet", 3, size="tiny", img_size=32))
    assert not construction.keeps_channels_last(create_custom_backbone("CustomDeiTStyle", 3, size="tiny", img_size=32))
    assert not construction.keeps_channels_last(Foreign(3))


def test_out_of_memory_is_known_on_every_device():
    said = "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"
    assert construction.out_of_memory(RuntimeError(said))
    assert construction.out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert construction.out_of_memory(MemoryError())
    assert not construction.out_of_memory(RuntimeError("shapes cannot be multiplied"))
