"""Checkpoints with only the head of a network, which refer to the checkpoint with its trunk.

The fold networks of a frozen training share one trunk: each has the tensors of the whole network, except for its head.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils import base_back
from utils.core.errors import UserError
from utils.networks.checkpoints import read_checkpoint, state_dict_of

TRAIN_AGAIN = "Put both files of one training there, or run K-fold for it again"


def trunk_of(path: Path, record: Mapping[str, Any]) -> dict[str, str] | None:
    """`{checkpoint, sha256}` of the trunk that a checkpoint's record names; None for a checkpoint of a whole network.

    Raises UserError for an invalid entry.
    """
    extra = record.get("extra")
    trunk = extra.get("trunk") if isinstance(extra, dict) else None
    if trunk is None:
        return None
    values = [trunk.get(key) for key in ("checkpoint", "sha256")] if isinstance(trunk, dict) else []
    names = [value for value in values if isinstance(value, str) and value]
    if len(names) < 2 or Path(names[0]).name != names[0]:
        raise UserError(
            f"{path}: extra.trunk is {str(trunk)[:60]!r}; expected the name of a checkpoint in the same folder and the "
            f"digest of its trunk. {TRAIN_AGAIN}"
        )
    return {"checkpoint": names[0], "sha256": names[1]}


def network_weights(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a checkpoint's whole network.

    Raises UserError naming both files if the trunk is missing, differs from the one that the head was fitted on, or has
    other shapes.
    """
    weights = state_dict_of(record)
    trunk = trunk_of(path, record)
    if trunk is None:
        return weights
    file = path.with_name(trunk["checkpoint"])
    if not file.is_file():
        raise UserError(f"{path}: holds a head alone, and {file}, which held its trunk, is gone. {TRAIN_AGAIN}")
    whole_network = state_dict_of(read_checkpoint(file))
    trunks = base_back.load_bundled("trunks")
    digest = trunks.trunk_digest(whole_network, weights.keys())
    if digest != trunk["sha256"]:
        raise UserError(
            f"{path}: its head was fitted on the trunk {trunk['sha256'][:12]}, and {file} holds {digest[:12]}. "
            f"{TRAIN_AGAIN}"
        )
    try:
        network: dict[str, Any] = trunks.whole_network(whole_network, weights)
    except ValueError as error:
        raise UserError(f"{path}: does not fit {file}: {error}. {TRAIN_AGAIN}") from error
    return network
