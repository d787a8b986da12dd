"""A network's logits and embeddings from one forward pass, for any architecture; probing locates the embedding."""

from __future__ import annotations

import logging
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

from utils.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger("disease_pipeline")

TOLERANCE = 1e-4  # between logits and linear map of the embedding; relative to the largest logit if that is above 1
MOST_HEADS = 4


class Head(NamedTuple):
    """One call of a linear layer whose output contributes to the logits."""

    layer: nn.Linear
    call: int
    """Index of the layer's call in a forward pass, from 0."""


class EmbeddingExtractor:
    """A network's logits (B, C) and embeddings (B, D) from one forward pass each.

    The embedding is the input of the last linear layer. `probe` locates it on a few images, in one of two ways: by
    timm's `forward_features`, `forward_head` and `get_classifier`, else as the inputs of the linear layers with C
    outputs whose mean output equals the logits to 1e-4, concatenated in the order of the calls. A network with neither
    has embeddings of width 0 and is logged once with a warning. With `checks`, the logits of every batch are compared
    with its embeddings; tracing requires `checks=False`. For a network that averages over views, logits and embeddings
    are means over the views.
    """

    def __init__(self, model: nn.Module, name: str, *, checks: bool = True) -> None:
        from utils.networks.views import ViewAverage

        self.model = model.network if isinstance(model, ViewAverage) else model
        self._views = model.views if isinstance(model, ViewAverage) else None
        self.name = name
        self.checks = checks
        self.count = 0
        """Number of logits C, set by `probe`."""
        self._heads: tuple[Head, ...] | None = None
        self._by_methods = False

    def probe(self, images: Tensor) -> None:
        """Locate the embedding on a few images (B, 3, H, W). Raises UserError if the network does not return logits."""
        calls: list[tuple[nn.Linear, Tensor]] = []
        logits = self._record_calls(images, self._linear_layers(), calls)
        if not hasattr(logits, "ndim") or logits.ndim != 2 or len(logits) != len(images):
            shape = tuple(logits.shape) if hasattr(logits, "shape") else type(logits).__name__
            raise UserError(f"{self.name}: the network returns {shape}; expected one tensor of logits (B, C)")
        self.count = logits.shape[1]
        self._by_methods = self._methods_agree(images, logits)
        self._heads = () if self._by_methods else _heads(calls, logits)
        if not self._by_methods and not self._heads:
            logger.warning(
                "%s: no linear layer's outputs are its logits, so it has no embeddings; fusion leaves it out, all "
                "else uses it",
                self.name,
            )

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) and embeddings (B, D), after `probe`. Raises UserError if they do not agree."""
        if self._views is None:
            return self._of_one_view(images)
        return _means([self._of_one_view(view) for view in self._views(images)])

    def _of_one_view(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self._by_methods:
            return logits_and_embeddings(self.model, images)
        heads = self._heads or ()
        calls: list[tuple[nn.Linear, Tensor]] = []
        logits = self._record_calls(images, list(dict.fromkeys(head.layer for head in heads)), calls)
        if not heads:
            return logits, logits.new_empty((len(logits), 0))
        input_of = dict(_numbered(calls))
        inputs = [input_of[head] for head in heads if head in input_of]
        if len(inputs) < len(heads) or (self.checks and not _reproduce(heads, inputs, logits)):
            raise UserError(f"{self.name}: its last linear layers explain the logits of some images and not of others")
        return logits, inputs[0] if len(inputs) == 1 else _concatenated(inputs)

    def _linear_layers(self) -> list[nn.Linear]:
        from torch import nn

        return [module for module in self.model.modules() if isinstance(module, nn.Linear)]

    def _record_calls(self, images: Tensor, layers: list[nn.Linear], calls: list[tuple[nn.Linear, Tensor]]) -> Tensor:
        """Run a forward pass; appends (layer, input) of every call of the layers with a matrix of features."""

        def record(layer: Any, arguments: tuple[Any, ...]) -> None:
            if arguments and arguments[0].ndim == 2 and len(arguments[0]) == len(images):
                calls.append((layer, arguments[0]))

        handles = [layer.register_forward_pre_hook(record) for layer in layers]
        try:
            logits: Tensor = self.model(images)
            return logits
        finally:
            for handle in handles:
                handle.remove()

    def _methods_agree(self, images: Tensor, logits: Tensor) -> bool:
        from torch import nn

        if not all(hasattr(self.model, name) for name in ("forward_features", "forward_head", "get_classifier")):
            return False
        get_classifier: Any = self.model.get_classifier
        if not isinstance(get_classifier(), nn.Module):  # networks with two heads return a pair
            return False
        try:
            recomputed, embeddings = logits_and_embeddings(self.model, images)
        except (RuntimeError, TypeError) as error:
            logger.debug("%s: forward_head gives no embedding (%s)", self.name, error)
            return False
        return embeddings.ndim == 2 and recomputed.shape == logits.shape and _near(recomputed, logits)


def logits_and_embeddings(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, C) and the input of the last layer (B, D) from one forward pass, with timm's methods."""
    network: Any = model
    embeddings = network.forward_head(network.forward_features(images), pre_logits=True)
    return network.get_classifier()(embeddings), embeddings


def _numbered(calls: list[tuple[nn.Linear, Tensor]]) -> list[tuple[Head, Tensor]]:
    counts: dict[int, int] = {}
    numbered = []
    for layer, features in calls:
        numbered.append((Head(layer, counts.get(id(layer), 0)), features))
        counts[id(layer)] = counts.get(id(layer), 0) + 1
    return numbered


def _heads(calls: list[tuple[nn.Linear, Tensor]], logits: Tensor) -> tuple[Head, ...]:
    """The smallest set of calls, later ones preferred, whose mean output equals the logits; () if there is none."""
    numbered = [(head, features) for head, features in _numbered(calls) if head.layer.out_features == logits.shape[1]]
    for size in range(1, min(len(numbered), MOST_HEADS) + 1):
        for subset in combinations(reversed(numbered), size):
            heads, inputs = zip(*reversed(subset), strict=True)
            if _reproduce(heads, list(inputs), logits):
                return heads
    return ()


def _reproduce(heads: tuple[Head, ...], inputs: list[Tensor], logits: Tensor) -> bool:
    import torch
    from torch.nn import functional as F

    # Computed from the weights, since the layer's output may have been modified in place.
    outputs = [
        F.linear(features, head.layer.weight, head.layer.bias) for head, features in zip(heads, inputs, strict=True)
    ]
    return _near(torch.stack(outputs).mean(dim=0), logits)


def _near(values: Tensor, logits: Tensor) -> bool:
    import torch

    # In half precision, the mean of two heads has a larger rounding error.
    tolerance = max(TOLERANCE, 4 * torch.finfo(logits.dtype).eps)
    return bool((values - logits).abs().max() <= tolerance * max(1.0, float(logits.abs().max())))


def _means(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    import torch

    logits, embeddings = zip(*parts, strict=True)
    return torch.stack(logits).mean(dim=0), torch.stack(embeddings).mean(dim=0)


def _concatenated(inputs: list[Tensor]) -> Tensor:
    import torch

    return torch.cat(inputs, dim=1)
