"""Checks of a declared network before it is added: its architecture, its classes, and a run on a blank image."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils import base_back
from utils.core.errors import UserError, did_you_mean, nearest_first
from utils.core.workspace import Workspace
from utils.discovery import preprocessing_sources
from utils.networks.checkpoints import LEAVE_OUT
from utils.networks.construction import RETRAIN, NetworkSpec
from utils.networks.preprocessing import Preprocessing
from utils.predictions import streaming
from utils.predictions.catalog import TIMM, VERIFY, Problem
from utils.predictions.inspection import FEWEST_ROWS

ASSUMED_PREPROCESSING = "preprocessing_assumed"
ASSUMED_CLASSES = "classes_assumed"
TOLERATED = 0.05  # largest gain of accuracy by a permutation of the classes for which the assumed order is accepted
FIT = "Name the architecture that these weights belong to, or another file"


def in_declaration(where: str, error: UserError) -> UserError:
    """The error about a checkpoint, with remedies for a network that has not been added yet."""
    message = str(error).replace(RETRAIN, FIT).replace(LEAVE_OUT, "declare another file")
    return UserError(f"{where}: {message}")


def require_architecture(architecture: str, where: str) -> None:
    """Raise UserError for a name, or a tag after the dot, that the installed timm does not list."""
    import timm

    if not timm.is_model(architecture):
        near = did_you_mean(architecture, timm.list_models())
        raise UserError(f"{where}: timm {timm.__version__} has no model {architecture!r}{near}")
    try:
        timm.get_pretrained_cfg(architecture)
    except RuntimeError:
        names = timm.list_pretrained(f"{architecture.partition('.')[0]}.*")
        raise UserError(
            f"{where}: timm {timm.__version__} has no pretrained tag {architecture!r}"
            f"{nearest_first(architecture, names, 'Tags')}"
        ) from None


def require_number(
    workspace: Workspace, classes: Sequence[str], count: int, *, where: str, what: str, architecture: str, weights: str
) -> None:
    """Raise UserError for a network whose number of outputs differs from the number of classes."""
    if count == len(classes):
        return
    main = base_back.BUNDLED / "src" / "main.py"
    shown = main.relative_to(Path.cwd()) if main.is_relative_to(Path.cwd()) else main
    words = ["python", str(shown), "--backbones", f"{TIMM}{architecture}", "--weights", weights]
    command = shlex.join([*words, "--workspace", str(workspace.base)])
    has = "no classifier" if count == 0 else f"a classifier for {count} classes"
    raise UserError(
        f"{where}: {what}: {has}; the workspace has {len(classes)} ({', '.join(classes[:8])}"
        f"{' ...' if len(classes) > 8 else ''}). Train a classifier for them on these weights: {command}"
    )


def run_on_blank(spec: NetworkSpec, global_pool: str | None, where: str) -> int:
    """Run the network on a blank image; returns its output count. Raises UserError if it cannot be built or run."""
    import torch

    try:
        network = streaming.open_network(spec)
    except UserError as error:
        raise in_declaration(where, error) from error
    built = _pooling(network)
    if None not in (global_pool, built) and global_pool != built:
        raise UserError(
            f"{where}: its global_pool is {global_pool!r}; timm builds {spec.architecture} with {built!r}, which gives "
            "other outputs. Add its predictions instead: import-predictions"
        )
    size = spec.preprocessing.input_size
    try:
        with torch.inference_mode():
            logits = network(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{where}: {spec.architecture} takes no image of {size} px ({reason}). Give the size that it was "
            "trained at: --preprocess input_size=PIXELS"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise UserError(f"{where}: {spec.architecture} gives no row of logits; expected a classifier")
    return int(logits.shape[1])


def classes_problem(name: str, classes: Sequence[str]) -> Problem:
    """The warning about a network without class names."""
    message = f"no file names its outputs; the order of the class folders is assumed: {', '.join(classes[:12])}"
    remedy = f"{VERIFY} measures whether that order is right"
    return Problem(ASSUMED_CLASSES, "warning", name, message, remedy)


def preprocessing_problems(name: str, preprocessing: Preprocessing) -> list[Problem]:
    """A warning if neither the user nor a file states the preprocessing of the weights."""
    if not preprocessing_sources.is_guess(preprocessing):
        return []
    source = "timm's for its own weights of the architecture is used"
    if preprocessing.source == preprocessing_sources.ASSUMED:
        source = "the base pipeline's is assumed"
    message = f"its preprocessing is not stated; {source}: {preprocessing.describe()}"
    remedy = (
        f"state it: python ensemble_orchestrator.py discover --preprocess {name}:KEY=VALUE ...; {VERIFY} compares it "
        "with other common rules"
    )
    return [Problem(ASSUMED_PREPROCESSING, "warning", name, message, remedy)]


def with_class_order_checked(
    problems: Sequence[Problem], measured: Mapping[str, Mapping[str, Any] | None]
) -> list[Problem]:
    """The problems, updated by the check of assumed class orders; `measured` is {member: result of `measure`}.

    The warning becomes an info if no permutation of the classes is more accurate by more than TOLERATED.
    """
    updated = []
    for problem in problems:
        facts = measured.get(problem.member or "") or {}
        is_right = facts.get("n", 0) >= FEWEST_ROWS and facts["matched"] - facts["accuracy"] <= TOLERATED
        if problem.code == ASSUMED_CLASSES and is_right:
            message = f"{problem.message}; accuracy {facts['accuracy']:.4f} on {facts['n']} val images confirms it"
            problem = replace(problem, severity="info", message=message, remedy="nothing to do")
        updated.append(problem)
    return updated


def _pooling(network: Any) -> str | None:
    """The kind of global pooling of a timm network; None if it has no such attribute."""
    layer = getattr(network, "global_pool", None)
    layer = getattr(getattr(network, "head", None), "global_pool", None) if layer is None else layer
    kind = layer if isinstance(layer, str) else getattr(layer, "pool_type", None)
    return kind if isinstance(kind, str) and kind else None
