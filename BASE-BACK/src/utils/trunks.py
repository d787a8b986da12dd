"""Networks as trunk and head: a fold checkpoint of frozen training contains only the head's tensors.

In its `model_state_dict` the head's tensors have the names of the whole network, and `extra["trunk"]` is
`{"checkpoint": <file name of the whole network>, "sha256": <trunk_digest of its other tensors>}`. Reads no settings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor


def trunk_digest(weights: Mapping[str, Tensor], head: Collection[str]) -> str:
    """SHA-256 of the names, types, shapes and bytes of all tensors of a network except those named in `head`.

    It does not depend on the order of the dictionary.
    """
    total = hashlib.sha256()
    for name in sorted(weights.keys() - set(head)):
        tensor = weights[name].detach().cpu().contiguous()
        total.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def whole_network(weights: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a whole network with its head replaced by `head`.

    Raises ValueError if the head has tensors that the network lacks, or of other shapes.
    """
    for name, tensor in head.items():
        if name not in weights or weights[name].shape != tensor.shape:
            expected = list(weights[name].shape) if name in weights else "no such tensor"
            raise ValueError(f"head tensor {name} has the shape {list(tensor.shape)}; the network has {expected}")
    return {**weights, **head}
