"""Networks built around the weights of a checkpoint, by the factory of BASE-BACK or by timm.

Nothing here imports BASE-BACK: the caller passes its factory.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from utils.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger("disease_pipeline")

RETRAIN = "Train the backbone again, or leave it out with backbones.exclude"
MOUNT = "; where another BASE-BACK has trained it, mount that one: --base-back DIR"

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
