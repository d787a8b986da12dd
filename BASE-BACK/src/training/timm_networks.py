"""timm networks by name, built for a number of classes and an input size, with local weights."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

import torch
from torch import Tensor, nn

from utils.pretrained_weights import WHEELS, PretrainedFile, WeightsError, fitted_weights, in_order
from utils.stage_features import StageFeatures, create_timm, timm_name

TIMM = "timm:"
"""Prefix of the architecture of a network that timm builds."""
NOISE_AGREES = 1e-3  # relative to the largest logit: tolerance between classifier(embedding) and the network's logits
WHEEL_CLASSES = 1000


def require_architecture(architecture: str) -> None:
    """Raise ValueError for an architecture, or a tag of its weights, that the installed timm does not know."""
    import timm

    name = timm_name(architecture)
    if timm.is_model(name):
        try:
            timm.get_pretrained_cfg(name)
        except RuntimeError as error:
            plain = name.partition(".")[0]
            tags = ", ".join(timm.list_pretrained(f"{plain}.*")) or f"none; write {plain}"
            raise ValueError(f"timm {timm.__version__} has no weights of the tag {name!r}; it has {tags}") from error
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(
        f"timm {timm.__version__} has no model {name!r}{hint} Names: python -c 'import timm; print(timm.list_models())'"
    )


def build_timm(architecture: str, num_classes: int, img_size: int) -> nn.Module:
    """Build a network with random weights; `ARCH+stages` has a head on all stages of timm's ARCH.

    Raises ValueError if timm cannot build it for this input size.
    """
    model = _build_plain(timm_name(architecture), num_classes, img_size)
    return _with_stages(model, architecture, num_classes, img_size)


def _with_stages(model: nn.Module, architecture: str, num_classes: int, img_size: int) -> nn.Module:
    if architecture == timm_name(architecture):
        return model
    return StageFeatures(model, num_classes, img_size)


def _build_plain(name: str, num_classes: int, img_size: int) -> nn.Module:
    try:
        network = create_timm(name, num_classes, img_size)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"{name}: timm cannot build it for {num_classes} classes and {img_size} px ({error}); choose another input "
            "size with --img-size"
        ) from error
    modules: Any = network.modules()  # attributes of timm's modules are unknown to mypy
    for module in modules:
        if hasattr(module, "fused_attn"):  # fused attention needs ONNX opset 14
            module.fused_attn = False
    return network


def require_input_size(architecture: str, num_classes: int, img_size: int) -> None:
    """Raise ValueError for an input size that the architecture does not support, by running one black image."""
    model = build_timm(architecture, num_classes, img_size).eval()
    try:
        with torch.inference_mode():
            logits = model(torch.zeros(1, 3, img_size, img_size))
    except (RuntimeError, ValueError, AssertionError, IndexError, ZeroDivisionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{architecture}: refuses images of {img_size} x {img_size} px ({reason}); choose another input size with "
            "--img-size"
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        raise ValueError(f"{architecture}: not an image classifier; expected logits (B, {num_classes})")


def default_input_size(architecture: str) -> tuple[int, bool]:
    """(side length in px of the inputs of timm's default weights, whether the size is fixed at construction)."""
    import timm

    defaults = timm.get_pretrained_cfg(timm_name(architecture))
    return (224, False) if defaults is None else (int(defaults.input_size[-1]), bool(defaults.fixed_input_size))


def head_names(model: Any) -> list[str]:
    """Names of the classifier's tensors in the state dict: `classifier.weight`, `head.fc.bias`."""
    classifier = model.get_classifier()
    heads = classifier if isinstance(classifier, (tuple, list)) else [classifier]
    prefixes = [name for name, module in model.named_modules() if any(module is head for head in heads)]
    return [name for name in model.state_dict() if any(name.startswith(f"{prefix}.") for prefix in prefixes)]


def build_pretrained(architecture: str, num_classes: int, img_size: int, file: PretrainedFile) -> nn.Module:
    """Build a network with the weights of a file; a head with another number of classes is replaced by a new one.

    A new head is zero, so that all classes have the same probability (Kolesnikov et al. 2020, Big Transfer): with few
    classes, timm's initial values give ten times that loss.

    Raises `WeightsError` if the weights do not fit, or the folder's `config.json` names another architecture.
    """
    model = _build_plain(timm_name(architecture), num_classes, img_size)
    loaded = _load(model, timm_name(architecture), file)
    network = _with_stages(model, architecture, num_classes, img_size)
    state = network.state_dict()
    for name in head_names(network):
        if network is not model or name not in loaded:
            state[name].zero_()
    return network


def _load(model: nn.Module, architecture: str, file: PretrainedFile) -> set[str]:
    """Load the weights of a file; returns the names of the loaded tensors."""
    base = architecture.partition(".")[0]
    if file.config and file.config["architecture"].partition(".")[0] != base:
        raise WeightsError(
            f"{file.path.parent / 'config.json'}: names {file.config['architecture']!r}; expected {base!r}. Name it: "
            f"--backbones {TIMM}{file.config['architecture']}"
        )
    expected = model.state_dict()
    weights = file.weights
    if base in WHEELS and not weights.keys() & expected.keys():
        with torch.device("meta"):
            reference = _build_plain(base, WHEEL_CLASSES, 224).state_dict()
        weights = in_order(weights, reference) or weights
    else:
        weights = _filtered(model, base, weights)
    renamed = PretrainedFile(file.path, weights, file.config, file.preprocessing)
    fitting = fitted_weights(architecture, renamed, expected, head_names(model))
    model.load_state_dict(fitting, strict=False)
    return set(fitting)


def _filtered(model: nn.Module, architecture: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Apply timm's filter of the architecture: tensors renamed, position embeddings resized to the network's size."""
    import timm

    module = importlib.import_module(timm.models.model_entrypoint(architecture).__module__)
    rule = getattr(module, "checkpoint_filter_fn", None)
    if rule is None or (weights.keys() == model.state_dict().keys() and not _resized(model, weights)):
        return weights
    try:
        filtered: dict[str, Tensor] = rule(weights, model)
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError):  # weights of another architecture
        return weights
    return filtered


def _resized(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    expected, heads = model.state_dict(), head_names(model)
    return any(tensor.shape != weights[name].shape for name, tensor in expected.items() if name not in heads)


def embed(model: Any, images: Tensor) -> Tensor:
    """Embeddings (B, D) of normalised images (B, 3, S, S): the inputs of the network's classifier."""
    embeddings: Tensor = model.forward_head(model.forward_features(images), pre_logits=True)
    return embeddings


def require_linear_head(model: Any, architecture: str, img_size: int) -> nn.Linear:
    """The network's linear classifier of its embedding, after filling it with noise for the check.

    Raises ValueError if the logits are not a linear function of the embedding, so that no regression can fit the head.
    """
    classifier = model.get_classifier()
    problem = f"its classifier is a {type(classifier).__name__}"
    if isinstance(classifier, nn.Linear) and classifier.bias is not None:
        model.eval()
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, 3, img_size, img_size, generator=generator)
        with torch.no_grad():
            classifier.weight.normal_(generator=generator)  # a zero head would pass the check with any network
            classifier.bias.normal_(generator=generator)
            logits, embeddings = model(images), embed(model, images)
            if embeddings.ndim == 2 and embeddings.shape[1] == classifier.in_features:
                difference = (classifier(embeddings) - logits).abs().max()
                if difference <= NOISE_AGREES * max(1.0, float(logits.abs().max())):
                    return classifier
        problem = "its logits are not a linear map of one embedding"
    raise ValueError(f"{architecture}: {problem}, so no head can be fitted on frozen features; use --mode finetune")
