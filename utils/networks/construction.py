"""Builds networks and loads their weights, with the factory of BASE-BACK or with timm.

The caller passes the factory of the mounted BASE-BACK.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from utils import base_back
from utils.core.errors import UserError
from utils.networks.preprocessing import Preprocessing

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

logger = logging.getLogger("disease_pipeline")

RETRAIN = "Train the backbone again, or leave it out with backbones.exclude"
MOUNT = "; where another BASE-BACK has trained it, mount that one: --base-back DIR"

# Bundled architectures that run faster in channels-last memory format, measured once: AMD EPYC (Zen 4), torch 2.13,
# one thread, seconds with channels last / seconds without, the lower of three (full, 224 px, batches of 16) and of
# twelve (tiny, 32 px, batches of 64). The table lists those that gain 5% or more.
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
    """Everything needed to build one trained network and to preprocess its images."""

    architecture: str
    """Name in BASE-BACK's `models`, or name of a timm model."""
    checkpoint: Path
    size: str
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    """Class names in the order of the outputs; extra outputs are removed if the network never predicts them."""
    source: Literal["base_back", "timm"] = "base_back"
    views: tuple[str, ...] = ()
    """Groups of views over which its logits are averaged; empty: only the image."""

    @property
    def img_size(self) -> int:
        """Side length of the square input in px."""
        return self.preprocessing.input_size


def build_network(
    spec: NetworkSpec, weights: Mapping[str, Any], factory: Callable[..., Any] | None = None
) -> nn.Module:
    """Build the network and load its weights, in evaluation mode on the CPU.

    `factory(name, num_classes)` builds BASE-BACK's networks; it also receives `size` and `img_size` if it accepts them.
    The number of outputs comes from the weights (first dimension of the last matrix), not from the configuration or the
    class folders. Raises UserError if the network cannot be built or the weights do not fit; tensors are not renamed.
    """
    import torch

    not_tensors = [name for name, value in weights.items() if not isinstance(value, torch.Tensor)]
    if not_tensors or not weights:
        raise UserError(
            f"{spec.checkpoint}: no weights ({', '.join(map(str, not_tensors[:3])) or 'empty'}); expected a dictionary "
            f"of tensors, bare or as model_state_dict or state_dict. {RETRAIN}"
        )
    n_outputs = _last_matrix_rows(weights) or len(spec.classes)
    model = construct_untrained(spec, n_outputs, factory)
    if (corrected := _corrected_outputs(model, weights, n_outputs)) is not None:
        model = construct_untrained(spec, corrected, factory)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{spec.checkpoint}: {_misfit(spec, model, weights)}. {RETRAIN}") from error
    return model.eval()


def _last_matrix_rows(weights: Mapping[str, Tensor]) -> int | None:
    matrices = [value for name, value in weights.items() if name.endswith("weight") and value.ndim == 2]
    return int(matrices[-1].shape[0]) if matrices else None


def _corrected_outputs(model: nn.Module, weights: Mapping[str, Tensor], n_outputs: int) -> int | None:
    """The right number of outputs, if only tensors with the first dimension `n_outputs` do not fit; else None."""
    state = model.state_dict()
    misfits = [name for name in state if name in weights and state[name].shape != weights[name].shape]
    if not misfits or not all(state[name].ndim and state[name].shape[0] == n_outputs for name in misfits):
        return None
    rows = {tuple(weights[name].shape[:1]) for name in misfits if state[name].shape[1:] == weights[name].shape[1:]}
    return int(next(iter(rows))[0]) if len(rows) == 1 and () not in rows else None


def construct_untrained(spec: NetworkSpec, n_outputs: int, factory: Callable[..., Any] | None) -> nn.Module:
    """A newly initialised network with `n_outputs` outputs. Raises UserError if it cannot be built."""
    if spec.source == "timm":
        return _construct_timm(spec, n_outputs)
    if factory is None:
        raise UserError(f"{spec.checkpoint}: {spec.architecture} is BASE-BACK's, and none is mounted")
    parameters = inspect.signature(factory).parameters
    options = {name: value for name, value in (("size", spec.size), ("img_size", spec.img_size)) if name in parameters}
    model: nn.Module | None = factory(spec.architecture, n_outputs, **options)
    if model is None:
        reason = getattr(factory, "last_error", None) or "see the log above"
        raise UserError(f"{spec.checkpoint}: the network {spec.architecture} cannot be built ({reason})")
    return model


def timm_model_name(architecture: str) -> str:
    """timm's name of an architecture: `resnet18` for `resnet18` and for `resnet18+stages` (a head on all stages)."""
    name: str = base_back.load_bundled("stage_features").timm_name(architecture)
    return name


def _construct_timm(spec: NetworkSpec, n_outputs: int) -> nn.Module:
    import timm

    from utils.core.errors import did_you_mean

    architecture = timm_model_name(spec.architecture)
    # Names such as hf-hub:... would start a download; only models that the installed timm lists are built.
    if not timm.is_model(architecture):
        raise UserError(
            f"{spec.checkpoint}: timm {timm.__version__} has no model {architecture!r}"
            f"{did_you_mean(architecture, timm.list_models(), '.')} Name one of timm.list_models()"
        )
    stages = base_back.load_bundled("stage_features")
    try:
        model: nn.Module = stages.create_timm(architecture, n_outputs, spec.img_size)
        if spec.architecture != architecture:
            model = stages.StageFeatures(model, n_outputs, spec.img_size)
        return model
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"{spec.checkpoint}: timm cannot build {spec.architecture} for {n_outputs} classes and {spec.img_size} px "
            f"({error}). {RETRAIN}"
        ) from error


def _misfit(spec: NetworkSpec, model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """The reason why the weights do not fit the network."""
    state = model.state_dict()
    common = state.keys() & weights.keys()
    kind = f"{spec.architecture} ({spec.size}, {spec.img_size} px)"
    if not common and all(name.startswith("module.") for name in weights):
        return (
            f"all names begin with 'module.', as DataParallel saves them, so they do not fit {kind}; save "
            "model.module.state_dict()"
        )
    if len(common) < 0.5 * max(len(state), len(weights)):
        return (
            f"the weights of another architecture: they share {len(common)} of {len(state)} names with {kind}; "
            f"first of theirs: {next(iter(weights))}{MOUNT if spec.source == 'base_back' else ''}"
        )
    missing, unexpected = sorted(state.keys() - weights.keys()), sorted(weights.keys() - state.keys())
    shapes = [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(state[name].shape)}"
        for name in state
        if name in common and state[name].shape != weights[name].shape
    ]
    parts = [
        f"{len(missing)} name(s) are missing, first {missing[0]}" if missing else "",
        f"{len(unexpected)} are not the network's, first {unexpected[0]}" if unexpected else "",
        f"{len(shapes)} have other shapes, first {shapes[0]}" if shapes else "",
    ]
    return f"the weights do not fit {kind}: {'; '.join(part for part in parts if part)}"


def evaluation_format(model: nn.Module) -> torch.memory_format:
    """The memory format for evaluating a network: channels last if that is faster, else contiguous.

    It is faster for timm networks and for the bundled architectures in CHANNELS_LAST.
    """
    import torch

    if getattr(model, "architecture", None) in CHANNELS_LAST.get(str(getattr(model, "size", None)), ()):
        return torch.channels_last
    layout: torch.memory_format = base_back.load_bundled("memory_layout").memory_format(model, is_trained=False)
    return layout


def extra_outputs_problem(logits: np.ndarray, n_classes: int) -> str | None:
    """The reason why outputs beyond the first `n_classes` of `logits` (N, C) cannot be removed; None if they can.

    They can be removed if they are never the largest of a row and their mean softmax mass is at most twice the mass
    that label smoothing of 0.1 (the largest in the public base pipeline) leaves on classes without images, or 0.001 if
    that is more.
    """
    n_outputs = logits.shape[1]
    predicted = logits.argmax(axis=1)
    if (n_rows := int((predicted >= n_classes).sum())) > 0:
        return f"an extra output is the largest on {n_rows} of {len(logits)} rows (first: output {predicted.max()})"
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    mass = float((weights[:, n_classes:].sum(axis=1) / weights.sum(axis=1)).mean())
    allowed = max(1e-3, 0.2 * (n_outputs - n_classes) / n_outputs)
    return f"they hold {mass:.3f} of the probability, {allowed:.3f} at most is allowed" if mass > allowed else None
