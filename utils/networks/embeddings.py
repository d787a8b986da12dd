"""A network's logits and embeddings from one forward pass; the embedding is found by looking, for any architecture."""

from __future__ import annotations

import logging
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

from utils.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger("disease_pipeline")

TOLERANCE = 1e-4  # between the logits and the linear map of the embedding, relative to the largest logit above 1
MOST_HEADS = 4


class Head(NamedTuple):
    """One call of a linear layer whose outputs make the logits."""

    layer: nn.Linear
    call: int
    """Which of the layer's calls in one forward pass, from 0."""


class EmbeddingExtractor:
    """A network's logits (B, C) and embeddings (B, D) from one forward pass each.

    The embedding is what the last linear layer reads. It is found on the first images, by one of two ways: timm's
    `forward_features`, `forward_head` and `get_classifier`; else the inputs of those linear layers with C outputs whose
    outputs, averaged where there are several, are the logits to 1e-4. Those inputs stand side by side in the order of
    the calls. A network with neither has embeddings of width 0, which is said once; its logits are as good as any.
    Without `checks` the logits are held against the embedding on the first images alone, as tracing needs it.
    """

    def __init__(self, model: nn.Module, name: str, *, checks: bool = True) -> None:
        self.model = model
        self.name = name
        self.checks = checks
        self.count = 0
        """Number of logits, known after `probe`."""
        self._heads: tuple[Head, ...] | None = None
        self._by_methods = False

    def probe(self, images: Tensor) -> None:
        """Find the way on a few images (B, 3, H, W). Raises UserError when the network gives no logits for them."""
        calls: list[tuple[nn.Linear, Tensor]] = []
        logits = self._listen(images, self._linear_layers(), calls)
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
        """Logits and embeddings of a batch, after `probe`. Raises UserError where the embedding belies the logits."""
        if self._by_methods:
            return logits_and_embeddings(self.model, images)
        heads = self._heads or ()
        calls: list[tuple[nn.Linear, Tensor]] = []
        logits = self._listen(images, list(dict.fromkeys(head.layer for head in heads)), calls)
        if not heads:
            return logits, logits.new_empty((len(logits), 0))
        seen = dict(_numbered(calls))
        inputs = [seen[head] for head in heads if head in seen]
        if len(inputs) < len(heads) or (self.checks and not _reproduce(heads, inputs, logits)):
            raise UserError(f"{self.name}: its last linear layers explain the logits of some images and not of others")
        return logits, inputs[0] if len(inputs) == 1 else _side_by_side(inputs)

    def _linear_layers(self) -> list[nn.Linear]:
        from torch import nn

        return [module for module in self.model.modules() if isinstance(module, nn.Linear)]

    def _listen(self, images: Tensor, layers: list[nn.Linear], calls: list[tuple[nn.Linear, Tensor]]) -> Tensor:
        """One forward pass; appends (layer, input) of every call of the layers on rows of features."""

        def note(layer: Any, arguments: tuple[Any, ...]) -> None:
            if arguments and arguments[0].ndim == 2 and len(arguments[0]) == len(images):
                calls.append((layer, arguments[0]))

        handles = [layer.register_forward_pre_hook(note) for layer in layers]
        try:
            return self.model(images)
        finally:
            for handle in handles:
                handle.remove()

    def _methods_agree(self, images: Tensor, logits: Tensor) -> bool:
        from torch import nn

        if not all(hasattr(self.model, name) for name in ("forward_features", "forward_head", "get_classifier")):
            return False
        if not isinstance(self.model.get_classifier(), nn.Module):  # two heads come as a pair
            return False
        try:
            found, embeddings = logits_and_embeddings(self.model, images)
        except (RuntimeError, TypeError) as error:
            logger.debug("%s: forward_head gives no embedding (%s)", self.name, error)
            return False
        return embeddings.ndim == 2 and found.shape == logits.shape and _near(found, logits)


def logits_and_embeddings(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, C) and the input of the last layer (B, D), by timm's method names, from one forward pass."""
    embeddings = model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
    return model.get_classifier()(embeddings), embeddings  # type: ignore[operator]


def _numbered(calls: list[tuple[nn.Linear, Tensor]]) -> list[tuple[Head, Tensor]]:
    counts: dict[int, int] = {}
    numbered = []
    for layer, read in calls:
        numbered.append((Head(layer, counts.get(id(layer), 0)), read))
        counts[id(layer)] = counts.get(id(layer), 0) + 1
    return numbered


def _heads(calls: list[tuple[nn.Linear, Tensor]], logits: Tensor) -> tuple[Head, ...]:
    """The fewest calls, later ones first, whose mean output is the logits; () when there are none."""
    numbered = [(head, read) for head, read in _numbered(calls) if head.layer.out_features == logits.shape[1]]
    for size in range(1, min(len(numbered), MOST_HEADS) + 1):
        for chosen in combinations(reversed(numbered), size):
            heads, inputs = zip(*reversed(chosen), strict=True)
            if _reproduce(heads, list(inputs), logits):
                return heads
    return ()


def _reproduce(heads: tuple[Head, ...], inputs: list[Tensor], logits: Tensor) -> bool:
    import torch
    from torch.nn import functional as F

    # From the weights, not from what the layer gave back, which may have been altered in place since.
    outputs = [F.linear(read, head.layer.weight, head.layer.bias) for head, read in zip(heads, inputs, strict=True)]
    return _near(torch.stack(outputs).mean(dim=0), logits)


def _near(found: Tensor, logits: Tensor) -> bool:
    import torch

    # Half precision rounds the mean of two heads; float32 does not.
    tolerance = max(TOLERANCE, 4 * torch.finfo(logits.dtype).eps)
    return bool((found - logits).abs().max() <= tolerance * max(1.0, float(logits.abs().max())))


def _side_by_side(inputs: list[Tensor]) -> Tensor:
    import torch

    return torch.cat(inputs, dim=1)
