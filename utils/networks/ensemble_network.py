"""A whole ensemble as one network: raw images to class probabilities, with preprocessing and combiner included.

Images are float32 (B, 3, S, S) in [0, 1], cropped to the networks' size, or uint8 (B, H, W, 3) of any size, as decoded.

Each member's network is held and run once; images are prepared once for each image size. In a trace the batch size
stays free, and so do height and width of uint8 images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import PIL
import torch
from torch import Tensor, nn

from utils import base_back
from utils.networks.embeddings import EmbeddingExtractor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CUT = 1.14  # the shorter side is resized to so many times the size of the centre crop
TALL_FIRST = 13  # Pillow release that resamples columns first if the height shrinks by more than twice the width
BITS = 22  # of the fixed-point weights by which Pillow resamples 8-bit images


@dataclass(frozen=True)
class MemberNetworks:
    """The networks that answer for one member, in evaluation mode on the CPU."""

    name: str
    networks: Sequence[nn.Module]
    """One, or the fold networks, whose probabilities are averaged."""
    img_size: int
    columns: Sequence[int]
    """Indices of the outputs that are the classes, in the ensemble's order."""
    embedder: nn.Module | None = None
    """The network that gives the embedding, if it is none of `networks`."""


class MemberModule(nn.Module):
    """One member: prepared images (B, 3, S, S) -> logits (B, C) and, with `embeds`, embeddings (B, D)."""

    columns: Tensor

    def __init__(self, part: MemberNetworks, *, embeds: bool) -> None:
        super().__init__()
        self.networks = nn.ModuleList(part.networks)
        self.embedder = part.embedder
        self.is_in_order = list(part.columns) == list(range(len(part.columns)))
        self.register_buffer("columns", torch.tensor(part.columns, dtype=torch.int64))
        self._outputs: EmbeddingExtractor | None = None
        if embeds:
            self._outputs = EmbeddingExtractor(self.embedder or self.networks[0], part.name, checks=False)
            with torch.no_grad():
                self._outputs.probe(torch.zeros(2, 3, part.img_size, part.img_size))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits of several networks are the logarithm of their mean probabilities."""
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


class Preparation(nn.Module):
    """Raw images -> normalised squares (B, 3, S, S), bit for bit as the base pipeline's evaluation transform.

    uint8 images are resampled as by the Pillow release that is installed when the network is built: with 22-bit weights
    along the rows, then along the columns (for some tall images in the other order, from release 13 on), rounded to 8
    bits after each; float64 represents all of this exactly. Without `resizes` images have their final size already.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, img_size: int, *, takes_uint8: bool, resizes: bool = True) -> None:
        super().__init__()
        self.img_size, self.takes_uint8, self.resizes = img_size, takes_uint8, resizes
        self.tall_first = int(PIL.__version__.partition(".")[0]) >= TALL_FIRST
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Raw images -> (B, 3, S, S)."""
        if not self.takes_uint8:
            return (images - self.mean) / self.std
        planes = images.permute(0, 3, 1, 2)
        pixels = self._resize_and_crop(planes.double()).float() if self.resizes else planes.float()
        return (pixels / 255 - self.mean) / self.std

    def _resize_and_crop(self, planes: Tensor) -> Tensor:
        """(B, 3, H, W) in float64 -> the centre crop of the resized image, integers (B, 3, S, S)."""
        shape = torch._shape_as_tensor(planes)  # a tensor, so that a trace keeps sizes free
        height, width = shape[2:3], shape[3:4]
        short, side = torch.minimum(height, width), int(self.img_size * CUT)
        rows = self._weights(planes[0, 0, :, 0], height, side * height // short)
        columns = self._weights(planes[0, 0, 0, :], width, side * width // short).transpose(0, 1)
        if not self.tall_first:
            return _rounded(rows @ _rounded(planes @ columns))
        fewer, narrower = height - side * height // short, width - side * width // short
        return _by_the_shorter_way()(planes, rows, columns, (fewer > 0) & (fewer > 2 * narrower))

    def _weights(self, line: Tensor, length: Tensor, resized: Tensor) -> Tensor:
        """Weights (S, length) that resize a `line` of pixels (length,) and crop its centre.

        `length` and `resized` have the shape (1,): the exporter to ONNX takes double scalars for floats.
        """
        left = resized - self.img_size
        start = left // 2 + (left % 2) * (left // 2 % 2)  # round(left / 2) as Python rounds: halves to even
        scale = length.double() / resized.double()
        support = torch.clamp(scale, min=1.0)
        crop = torch.arange(self.img_size, dtype=torch.float64) + 0.5
        centre = (crop + start.double()) * scale
        pixels = torch.cumsum(torch.ones_like(line), 0) - 1.0
        distance = (pixels[None] - centre[:, None] + 0.5) * torch.reciprocal(support)
        weights = torch.clamp(1.0 - distance.abs(), min=0.0)
        weights = weights / weights.sum(dim=1, keepdim=True)
        return torch.floor(0.5 + weights * 2.0**BITS)


def _rounded(sums: Tensor) -> Tensor:
    """Sums of pixels times 22-bit weights -> integers from 0 to 255."""
    return torch.clamp(torch.floor((sums + 2.0 ** (BITS - 1)) / 2.0**BITS), 0.0, 255.0)


@cache
def _by_the_shorter_way() -> Any:
    """The two passes in either order, as a scripted function, so that its branch survives tracing."""
    with base_back.load_bundled("torchscript").torchscript_without_notices():
        return torch.jit.script(_passes)


def _passes(planes: Tensor, rows: Tensor, columns: Tensor, tall: Tensor) -> Tensor:
    half, whole = 2097152.0, 4194304.0  # 2 ** (BITS - 1) and 2 ** BITS
    if bool(tall):
        down = torch.clamp(torch.floor((torch.matmul(rows, planes) + half) / whole), 0.0, 255.0)
        return torch.clamp(torch.floor((torch.matmul(down, columns) + half) / whole), 0.0, 255.0)
    across = torch.clamp(torch.floor((torch.matmul(planes, columns) + half) / whole), 0.0, 255.0)
    return torch.clamp(torch.floor((torch.matmul(rows, across) + half) / whole), 0.0, 255.0)


class EnsembleNetwork(nn.Module):
    """Members and combiner as one module: raw images -> probabilities (B, C) and the other `output_names`.

    `output_names`: `probabilities`; `logits` (B, C) of a single network without a combiner; `member_probabilities`
    (B, M, C) on request; `member_logits` (B, M, C) and `member_embeddings` (B, sum of D_m) with `member_outputs`, which
    the parity check of a discontinuous combiner needs.
    """

    input_names = ("images",)
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
        sizes = sorted({part.img_size for part in parts})
        if len(sizes) > 1 and not (takes_uint8 and resizes):
            raise ValueError(f"members of {sizes} px cannot share one prepared image")
        self.sizes = [part.img_size for part in parts]
        self.img_size = max(sizes)
        self.preparations = nn.ModuleDict(
            {str(size): Preparation(size, takes_uint8=takes_uint8, resizes=resizes) for size in sizes}
        )
        self.members = nn.ModuleList(MemberModule(part, embeds=embeds) for part in parts)
        self.combiner = combiner
        self.embeds, self.member_probabilities = embeds, member_probabilities
        self.member_outputs = member_outputs and combiner is not None
        names = ["probabilities", *([] if combiner is not None else ["logits"])]
        names += ["member_probabilities"] if member_probabilities else []
        if self.member_outputs:
            names += ["member_logits", *(["member_embeddings"] if embeds else [])]
        self.output_names = tuple(names)
        free = {0: "batch"} | ({1: "height", 2: "width"} if takes_uint8 and resizes else {})
        self.free_axes = {"images": free}
        self.eval()

    def forward(self, images: Tensor) -> Any:
        """The outputs in the order of `output_names`; a single one is returned without a tuple."""
        prepared = {int(size): prepare(images) for size, prepare in self.preparations.items()}
        parts = [member(prepared[size]) for size, member in zip(self.sizes, self.members, strict=True)]
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


class CombinerNetwork(nn.Module):
    """A combiner alone, for imported members: logits (B, M, C) -> probabilities (B, C)."""

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
