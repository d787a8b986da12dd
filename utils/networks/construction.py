"""Networks of any origin: built around the weights of a file, and their logits and embeddings from one forward pass.

Nothing here knows BASE-BACK; whoever has its factory hands it over.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import logging
import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from utils.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger("disease_pipeline")

RETRAIN = "Train the backbone again, or leave it out with backbones.exclude"
MOUNT = "; where another BASE-BACK has trained it, mount that one: --base-back DIR"
TOLERANCE = 1e-4  # between the logits and the linear map of the embedding, relative to the largest logit above 1
MOST_HEADS = 4

# Bundled architectures that run faster on pixels kept together (channels last), measured once: AMD EPYC (Zen 4),
# torch 2.13, one thread, seconds with channels last / seconds without, the lower of three (full, 224 px, batches of
# 16) and of twelve (tiny, 32 px, batches of 64). In the table is what gains 5 % or more.
#                 full   tiny                      full   tiny                      full   tiny
#   CoAtNet       0.66   0.79     MaxViT           0.76   0.88     ConvNeXt         1.01   0.90
#   GhostNetV2    0.67   0.71     EfficientNetV4   0.82   0.78     ResNetMish       0.76   0.96
#   InceptionV4   0.74   0.64     MobileOne        0.82   0.65     DynamicConvNet   0.96   1.13
#   DenseNetHybrid 0.75  0.78     CSPDarkNet       0.85   0.88     DeiTStyle        1.00   1.02
#   RegNet        0.94   0.72     SwinTransformer  1.01   1.01     ViTHybrid        1.06   1.00
CHANNELS_LAST = {
    "full": {
        "CustomCSPDarkNet",
        "CustomCoAtNet",
        "CustomDenseNetHybrid",
        "CustomEfficientNetV4",
        "CustomGhostNetV2",
        "CustomInceptionV4",
        "CustomMaxViT",
        "CustomMobileOne",
        "CustomRegNet",
        "CustomResNetMish",
    },
    "tiny": {
        "CustomCSPDarkNet",
        "CustomCoAtNet",
        "CustomConvNeXt",
        "CustomDenseNetHybrid",
        "CustomEfficientNetV4",
        "CustomGhostNetV2",
        "CustomInceptionV4",
        "CustomMaxViT",
        "CustomMobileOne",
        "CustomRegNet",
    },
}


@dataclass(frozen=True)
class NetworkSpec:
    """What is needed to build one trained network and to prepare its images."""

    architecture: str
    """Name in BASE-BACK's `models`, or of a timm model."""
    checkpoint: Path
    size: str
    img_size: int
    classes: tuple[str, ...]
    """In the order of the network's outputs; outputs beyond them are surplus, cut once they are shown to be dead."""
    source: Literal["base_back", "timm"] = "base_back"


def build_network(
    spec: NetworkSpec, weights: Mapping[str, Any], factory: Callable[..., Any] | None = None
) -> nn.Module:
    """The network with its weights, in evaluation mode on the CPU.

    `factory(name, num_classes)` makes BASE-BACK's networks; it is given `size` and `img_size` where it takes them. The
    number of outputs is what the weights say (first dimension of the last matrix), whatever the settings or the class
    folders say. Raises UserError when the network cannot be built or the weights do not fit: names are never altered.
    """
    import torch

    others = [name for name, value in weights.items() if not isinstance(value, torch.Tensor)]
    if others or not weights:
        raise UserError(
            f"{spec.checkpoint}: no weights ({', '.join(map(str, others[:3])) or 'empty'}); expected a dictionary of "
            f"tensors, bare or as model_state_dict or state_dict. {RETRAIN}"
        )
    outputs = _outputs_of(weights) or len(spec.classes)
    model = construct_untrained(spec, outputs, factory)
    if (true := _true_outputs(model, weights, outputs)) is not None:
        model = construct_untrained(spec, true, factory)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{spec.checkpoint}: {_misfit(spec, model, weights)}. {RETRAIN}") from error
    return model.eval()


def _outputs_of(weights: Mapping[str, Tensor]) -> int | None:
    matrices = [value for name, value in weights.items() if name.endswith("weight") and value.ndim == 2]
    return int(matrices[-1].shape[0]) if matrices else None


def _true_outputs(model: nn.Module, weights: Mapping[str, Tensor], tried: int) -> int | None:
    """The number of outputs where the last matrix misled: everything fits but tensors with that first dimension."""
    own = model.state_dict()
    wrong = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if not wrong or not all(own[name].ndim and own[name].shape[0] == tried for name in wrong):
        return None
    found = {tuple(weights[name].shape[:1]) for name in wrong if own[name].shape[1:] == weights[name].shape[1:]}
    return int(next(iter(found))[0]) if len(found) == 1 and () not in found else None


def construct_untrained(spec: NetworkSpec, outputs: int, factory: Callable[..., Any] | None) -> nn.Module:
    """A fresh network with that many outputs. Raises UserError where it cannot be built."""
    if spec.source == "timm":
        return _construct_timm(spec, outputs)
    if factory is None:
        raise UserError(f"{spec.checkpoint}: {spec.architecture} is BASE-BACK's, and none is mounted")
    takes = inspect.signature(factory).parameters
    options = {name: value for name, value in (("size", spec.size), ("img_size", spec.img_size)) if name in takes}
    model = factory(spec.architecture, outputs, **options)
    if model is None:
        reason = getattr(factory, "last_error", None) or "see the log above"
        raise UserError(f"{spec.checkpoint}: the network {spec.architecture} cannot be built ({reason})")
    return model


def _construct_timm(spec: NetworkSpec, outputs: int) -> nn.Module:
    import timm

    from utils.core.errors import did_you_mean

    # Names such as hf-hub:... would go to the network; only what the installed timm knows is built.
    if not timm.is_model(spec.architecture):
        raise UserError(
            f"{spec.checkpoint}: timm {timm.__version__} has no model {spec.architecture!r}"
            f"{did_you_mean(spec.architecture, timm.list_models())}. Name one of timm.list_models()"
        )
    known = timm.get_pretrained_cfg(spec.architecture)
    fixed = known is not None and known.fixed_input_size and known.input_size[-1] != spec.img_size
    options = {"img_size": spec.img_size} if fixed else {}
    try:
        return timm.create_model(spec.architecture, pretrained=False, num_classes=outputs, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"{spec.checkpoint}: timm cannot build {spec.architecture} for {outputs} classes and {spec.img_size} px "
            f"({error}). {RETRAIN}"
        ) from error


def _misfit(spec: NetworkSpec, model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """In which way weights do not fit a network."""
    own = model.state_dict()
    common = own.keys() & weights.keys()
    kind = f"{spec.architecture} ({spec.size}, {spec.img_size} px)"
    if not common and all(name.startswith("module.") for name in weights):
        return (
            f"all names begin with 'module.', as DataParallel saves them, so they do not fit {kind}; save "
            "model.module.state_dict()"
        )
    if len(common) < 0.5 * max(len(own), len(weights)):
        return (
            f"the weights of another architecture: they share {len(common)} of {len(own)} names with {kind}; "
            f"first of theirs: {next(iter(weights))}{MOUNT if spec.source == 'base_back' else ''}"
        )
    absent, surplus = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in common and own[name].shape != weights[name].shape
    ]
    parts = [
        f"{len(absent)} name(s) are missing, first {absent[0]}" if absent else "",
        f"{len(surplus)} are not the network's, first {surplus[0]}" if surplus else "",
        f"{len(shapes)} have other shapes, first {shapes[0]}" if shapes else "",
    ]
    return f"the weights do not fit {kind}: {'; '.join(part for part in parts if part)}"


def keeps_channels_last(model: nn.Module) -> bool:
    """Whether CHANNELS_LAST lists this network: one of the bundled architectures, in its own size."""
    return getattr(model, "architecture", None) in CHANNELS_LAST.get(str(getattr(model, "size", None)), ())


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


def extra_outputs_problem(logits: np.ndarray, kept: int) -> str | None:
    """Why the columns of `logits` (N, C) beyond the first `kept` cannot be cut; None when they are dead.

    Dead: never the largest of a row, and their mean softmax mass is at most twice what a label smoothing of 0.1 leaves
    on classes without images (upstream's largest), or 0.001 where that is less.
    """
    columns = logits.shape[1]
    winners = logits.argmax(axis=1)
    if (won := int((winners >= kept).sum())) > 0:
        return f"a surplus output is the largest on {won} of {len(logits)} rows (first: output {winners.max()})"
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    mass = float((weights[:, kept:].sum(axis=1) / weights.sum(axis=1)).mean())
    allowed = max(1e-3, 0.2 * (columns - kept) / columns)
    return f"they hold {mass:.3f} of the probability, {allowed:.3f} at most is allowed" if mass > allowed else None


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception of a forward pass says that memory ran out."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(re.search(r"DefaultCPUAllocator|out of memory", str(error)))


def safe_delete_model(model: nn.Module) -> None:
    """Free a network's parameters and buffers at once, even where something still refers to it."""
    import torch

    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype)


def trim_memory() -> None:
    """Give freed memory back to the system, where the C library can (glibc).

    Batches of one network leave holes that those of the next do not fill: without it fifteen full networks, one at a
    time, took 1.15 times the memory of the largest three, with it 1.06.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def cleanup_memory(left: Iterable[weakref.ref[nn.Module]] | None = None) -> None:
    """Collect garbage and give the CUDA cache back, between any two networks.

    `left` are networks that should be gone. Where they are, and there is no CUDA device, garbage is not collected: that
    takes longer than a small network runs, and is needed only where references in a ring keep one alive.
    """
    import torch

    on_cuda = torch.cuda.is_available()
    if left is None or on_cuda or any(network() is not None for network in left):
        gc.collect()
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
