"""A whole ensemble as one network: raw images to class probabilities, with preprocessing and combiner included.

Images are float32 (B, 3, S, S) in [0, 1], one input for each distinct resize rule of the members, or decoded uint8
(B, H, W, 3) of any size, one input for all members. Each network is stored and run once; images are normalised once for
each distinct preprocessing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from utils.networks.embeddings import EmbeddingExtractor
from utils.networks.image_preparation import Preparation
from utils.networks.preprocessing import Preprocessing


@dataclass(frozen=True)
class MemberNetworks:
    """The networks of one member, in evaluation mode on the CPU."""

    name: str
    networks: Sequence[nn.Module]
    """The full network, or the fold networks, whose probabilities are averaged."""
    preprocessing: Preprocessing
    columns: Sequence[int]
    """Indices of the outputs of the ensemble's classes, in the ensemble's class order."""
    embedder: nn.Module | None = None
    """The network that computes the embedding, if it is not in `networks`."""


class MemberModule(nn.Module):
    """One member: preprocessed images (B, 3, S, S) -> logits (B, C) and, with `embeds`, embeddings (B, D)."""

    columns: Tensor

    def __init__(self, member: MemberNetworks, *, embeds: bool) -> None:
        super().__init__()
        self.networks = nn.ModuleList(member.networks)
        self.embedder = member.embedder
        self.is_in_order = list(member.columns) == list(range(len(member.columns)))
        self.register_buffer("columns", torch.tensor(member.columns, dtype=torch.int64))
        self._outputs: EmbeddingExtractor | None = None
        if embeds:
            self._outputs = EmbeddingExtractor(self.embedder or self.networks[0], member.name, checks=False)
            with torch.no_grad():
                side = member.preprocessing.input_size
                self._outputs.probe(torch.zeros(2, 3, side, side))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Preprocessed images (B, 3, S, S) -> logits (B, C) and embeddings (B, D) or None.

        The logits of several networks are the logarithm of their mean probabilities.
        """
        embeddings = None
        if self._outputs is not None:
            logits, embeddings = self._outputs(images)
        if self._outputs is None or self.embedder is not None:
            logits = self.networks[0](images)
        logits = self._select(logits)
        if len(self.networks) > 1:
            parts = [logits, *(self._select(network(images)) for network in list(self.networks)[1:])]
            logits = torch.stack([torch.softmax(part, dim=1) for part in parts]).mean(dim=0).clamp_min(1e-30).log()
        return logits, embeddings

    def _select(self, logits: Tensor) -> Tensor:
        if self.is_in_order:
            return logits[:, : len(self.columns)]
        return logits.index_select(1, self.columns)


def by_resize_rule(preprocessings: Iterable[Preprocessing]) -> list[list[Preprocessing]]:
    """Group the distinct preprocessings by resize rule; a group shares one input; small images first."""
    groups: dict[Any, list[Preprocessing]] = {}
    for preprocessing in sorted(dict.fromkeys(preprocessings), key=lambda preprocessing: preprocessing.input_size):
        groups.setdefault(preprocessing.resizing(), []).append(preprocessing)
    return list(groups.values())


class EnsembleNetwork(nn.Module):
    """Members and combiner as one module: raw images -> probabilities (B, C) and the other `output_names`.

    `input_names`: `images`, or `images_1`, `images_2`, ... for float images with several resize rules, in the order of
    `by_resize_rule`.

    `output_names`: `probabilities`; `logits` (B, C) of a single network without a combiner; `member_probabilities`
    (B, M, C) with the option of that name; `member_logits` (B, M, C) and `member_embeddings` (B, sum of D_m) with
    `member_outputs`, which the parity check of a discontinuous combiner needs.
    """

    onnx_opset = 17

    def __init__(
        self,
        parts: Sequence[MemberNetworks],
        combiner: nn.Module | None,
        *,
        takes_uint8: bool = False,
        embeds: bool = False,
        member_probabilities: bool = False,
        member_outputs: bool = False,
        resizes: bool = True,
    ) -> None:
        super().__init__()
        groups = by_resize_rule(part.preprocessing for part in parts)
        if takes_uint8 and not resizes and len(groups) > 1:
            raise ValueError(f"images resized by {len(groups)} rules cannot be one input")
        preprocessings = [preprocessing for group in groups for preprocessing in group]
        names = [_preparation_name(preprocessing, number) for number, preprocessing in enumerate(preprocessings)]
        self.preparations = nn.ModuleDict(
            {
                name: Preparation(preprocessing, takes_uint8=takes_uint8, resizes=resizes)
                for name, preprocessing in zip(names, preprocessings, strict=True)
            }
        )
        self.preparation_of_member = [names[preprocessings.index(part.preprocessing)] for part in parts]
        self.img_size = max(preprocessing.input_size for preprocessing in preprocessings)
        has_one_input = takes_uint8 or len(groups) == 1
        self.input_names = ("images",) if has_one_input else tuple(f"images_{n + 1}" for n in range(len(groups)))
        self.input_indices = [0 if has_one_input else n for n, group in enumerate(groups) for _ in group]
        self.members = nn.ModuleList(MemberModule(part, embeds=embeds) for part in parts)
        self.combiner = combiner
        self.embeds, self.member_probabilities = embeds, member_probabilities
        self.member_outputs = member_outputs and combiner is not None
        outputs = ["probabilities", *([] if combiner is not None else ["logits"])]
        outputs += ["member_probabilities"] if member_probabilities else []
        if self.member_outputs:
            outputs += ["member_logits", *(["member_embeddings"] if embeds else [])]
        self.output_names = tuple(outputs)
        free = {0: "batch"} | ({1: "height", 2: "width"} if takes_uint8 and resizes else {})
        self.free_axes = dict.fromkeys(self.input_names, free)
        self.eval()

    def forward(self, images: Tensor, *others: Tensor) -> Any:
        """Inputs in the order of `input_names` -> outputs in the order of `output_names`, as a tuple unless single."""
        inputs = (images, *others)
        prepared = {
            name: prepare(inputs[index])
            for (name, prepare), index in zip(self.preparations.items(), self.input_indices, strict=True)
        }
        parts = [member(prepared[name]) for name, member in zip(self.preparation_of_member, self.members, strict=True)]
        logits = torch.stack([member_logits for member_logits, _ in parts], dim=1)
        embeddings = [embedding for _, embedding in parts if embedding is not None]
        if self.combiner is None:
            outputs = [torch.softmax(logits[:, 0], dim=1), logits[:, 0]]
        else:
            outputs = [self.combiner(logits, embeddings) if self.embeds else self.combiner(logits)]
        if self.member_probabilities:
            outputs.append(torch.softmax(logits, dim=2))
        if self.member_outputs:
            outputs += [logits, *([torch.cat(embeddings, dim=1)] if self.embeds else [])]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _preparation_name(preprocessing: Preprocessing, number: int) -> str:
    """Part of the buffer names: the image size, with a number unless it is the base pipeline's preprocessing."""
    size = str(preprocessing.input_size)
    return size if preprocessing.is_base_pipeline else f"{size}_{number}"


class CombinerNetwork(nn.Module):
    """Only the combiner, for imported members: logits (B, M, C) -> probabilities (B, C)."""

    input_names = ("member_logits",)
    output_names = ("probabilities",)
    onnx_opset = 17

    def __init__(self, combiner: nn.Module) -> None:
        super().__init__()
        self.combiner = combiner
        self.free_axes = {"member_logits": {0: "batch"}}
        self.eval()

    def forward(self, member_logits: Tensor) -> Tensor:
        """Logits float32 (B, M, C) -> probabilities float32 (B, C)."""
        return self.combiner(member_logits)
