"""Small networks of timm as people keep them: a folder with `config.json` and weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ARCHITECTURE = "test_resnet"


def save_folder(
    folder: Path,
    classes: Sequence[str],
    *,
    architecture: str = ARCHITECTURE,
    label_names: object = None,
    seed: int = 0,
    **arguments: Any,
) -> Any:
    """Write a network with random weights by timm's own `save_for_hf`; returns the network in evaluation mode.

    `label_names` is the class list of the configuration; None leaves it out.
    """
    import timm
    import torch
    from timm.models import save_for_hf

    torch.manual_seed(seed)
    network = timm.create_model(architecture, num_classes=len(classes), **arguments).eval()
    config = {} if label_names is None else {"label_names": label_names}
    save_for_hf(network, folder, model_config=config, safe_serialization=True)
    return network


def change_config(folder: Path, changes: Mapping[str, Any], *, remove: Sequence[str] = ()) -> None:
    """Change entries of a folder's `config.json`."""
    path = folder / "config.json"
    record = {name: value for name, value in json.loads(path.read_text()).items() if name not in remove}
    path.write_text(json.dumps(record | dict(changes)))
