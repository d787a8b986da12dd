"""The networks of a teacher on their device: one at a time, while small ones stay open between passes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from utils import base_back
from utils.networks import memory
from utils.networks.construction import NetworkSpec, evaluation_format
from utils.networks.embeddings import EmbeddingExtractor
from utils.predictions import streaming

if TYPE_CHECKING:
    import torch
    from torch import nn

KEPT_BYTES = 64 * 2**20  # of checkpoints whose networks stay open


@dataclass
class OpenNetwork:
    """A network on its device, in evaluation mode."""

    model: nn.Module
    layout: torch.memory_format
    threads: int | None
    """Number of intra-op threads; None on a GPU"""
    outputs: EmbeddingExtractor

    @classmethod
    def of(cls, spec: NetworkSpec, device: str) -> OpenNetwork:
        """Build it from its checkpoint."""
        model = streaming.open_network(spec)
        layout = evaluation_format(model)
        model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
        rule = base_back.load_bundled("threads")
        threads = rule.threads_of_network("streaming", model, spec.img_size, device)
        return cls(model, layout, threads, EmbeddingExtractor(model, str(spec.checkpoint)))


@dataclass
class OpenNetworks:
    """The networks that are open in this process.

    Opening a small network takes a fifth of its pass over a thousand images.
    """

    _kept: dict[NetworkSpec, OpenNetwork] = field(default_factory=dict)
    _kept_bytes: int = 0

    @contextmanager
    def network(self, spec: NetworkSpec, device: str) -> Iterator[OpenNetwork]:
        """A network, whose memory is freed after the block unless it is kept."""
        if spec in self._kept:
            yield self._kept[spec]
            return
        network = OpenNetwork.of(spec, device)
        n_bytes = spec.checkpoint.stat().st_size
        if self._kept_bytes + n_bytes <= KEPT_BYTES:
            self._kept_bytes += n_bytes
            self._kept[spec] = network
            yield network
            return
        try:
            yield network
        finally:
            memory.safe_delete_model(network.model)
            reference = weakref.ref(network.model)
            del network
            memory.cleanup_memory([reference])
