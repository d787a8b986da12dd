"""Runs networks on images, one network in memory at a time, and yields logits and embeddings batch by batch.

Pixels come from the image cache, so that each image is decoded once for networks of any preprocessing.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils import base_back
from utils.core.errors import UserError
from utils.networks.checkpoints import read_checkpoint
from utils.networks.construction import RETRAIN, NetworkSpec, build_network, evaluation_format, extra_outputs_problem
from utils.networks.embeddings import EmbeddingExtractor
from utils.networks.memory import cleanup_memory, out_of_memory, safe_delete_model, trim_memory
from utils.networks.shared_trunks import network_weights
from utils.predictions.image_splits import ImageSplit, normalise, open_images

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger("disease_pipeline")

PROBE_ROWS = 2
LARGEST_BATCH = 4096  # larger batches are no faster on a GPU; the pixels of one batch stay below a gigabyte


class ExtraOutputsError(UserError):
    """A network predicts extra outputs beyond the classes."""


@dataclass(frozen=True)
class OutputBatch:
    """Outputs for consecutive rows of one split."""

    split: str
    start: int
    logits: np.ndarray
    """float32 (B, C)"""
    embeddings: np.ndarray
    """float32 (B, D); D is 0 for a network without embeddings"""
    batch_size: int
    """Batch size that memory allowed"""
    threads: int | None = None
    """Number of torch's threads; None on a GPU"""


def open_network(spec: NetworkSpec, weights: Mapping[str, Any] | None = None) -> nn.Module:
    """Build the network and load its weights, in evaluation mode on the CPU; `weights` replace those of the file.

    For a member with views, the network averages over them. Raises UserError if the weights do not fit, or the
    checkpoint belongs to another BASE-BACK than the mounted one.
    """
    if weights is None:
        record = read_checkpoint(spec.checkpoint)
        _require_base_back(spec, record)
        weights = network_weights(spec.checkpoint, record)
    factory = None if spec.source == "timm" else base_back.load("models").create_custom_backbone_safe
    network = build_network(spec, weights, factory)
    return average_over_views(network, spec, spec.views) if spec.views else network


def average_over_views(
    network: nn.Module, spec: NetworkSpec, groups: Sequence[str], *, with_original: bool = True
) -> nn.Module:
    """Wrap the network to average its logits over groups of views, in evaluation mode."""
    from utils.networks.views import ViewAverage

    return ViewAverage(network, groups, spec.img_size, with_original=with_original).eval()


def _require_base_back(spec: NetworkSpec, record: Mapping[str, Any]) -> None:
    extra = record.get("extra")
    is_external = spec.source != "timm" and isinstance(extra, dict) and extra.get("base_back") == "external"
    if is_external and base_back.kind(base_back.locate()) == "bundled":
        raise UserError(
            f"{spec.checkpoint}: its network is another BASE-BACK's, and the bundled one is mounted. Mount the one it "
            "was trained with: --base-back DIR"
        )


def stream(
    spec: NetworkSpec,
    splits: Sequence[ImageSplit],
    *,
    batch_size: int,
    device: str,
    image_cache: Path,
    decoding_threads: int = 1,
    val: ImageSplit | None = None,
    opener: Callable[[NetworkSpec], nn.Module] | None = None,
    must_be_finite: bool = True,
) -> Iterator[OutputBatch]:
    """Logits and embeddings of one network on the given splits, batch by batch, in the order of the rows.

    On the CPU, batches have `batch_size` images; on CUDA, the batch size is doubled as long as memory allows. It is
    halved when memory runs out. A network with more outputs than classes is first run on `val`, or the val split in
    `splits`, to check that it never predicts the extra outputs, which are then removed. `opener` builds the network
    (by default `open_network`), which is freed when the iterator ends. Raises UserError for unreadable images, weights
    that do not fit, fewer outputs than classes, extra outputs that are predicted, a single image that does not fit into
    memory, and, with `must_be_finite`, logits that are not finite.
    """
    if not splits:
        return

    def opened(images: ImageSplit) -> Any:
        return open_images(images, spec.preprocessing, image_cache=image_cache, threads=decoding_threads)

    pixels = [opened(images) for images in splits]
    passing = _Pass(spec, (opener or open_network)(spec), batch_size, device, must_be_finite)
    try:
        passing.probe(pixels[0])
        if passing.outputs.count > len(spec.classes):
            val = next((images for images in splits if images.split == "val"), val)
            _require_removable_outputs(passing, val, opened)
        for images, split_pixels in zip(splits, pixels, strict=True):
            yield from passing.over(images, split_pixels)
    finally:
        safe_delete_model(passing.model)
        reference = weakref.ref(passing.model)
        del passing
        cleanup_memory([reference])
        trim_memory()


@contextmanager
def network_on_device(
    spec: NetworkSpec, device: str
) -> Iterator[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """One network on a device, configured as in `stream`: yields (forward, place).

    `place` moves normalised images (B, 3, H, W) to the device, in the network's memory format; `forward` returns the
    logits (B, C) of these images.
    """
    import torch

    passing = _Pass(spec, open_network(spec), 1, device)
    # Timings are recorded with torch's current number of threads.
    passing.threads = None if passing.on_cuda else torch.get_num_threads()

    def forward(images: Tensor) -> Tensor:
        with torch.inference_mode(), passing._precision():
            logits: Tensor = passing.model(images)
            return logits

    try:
        yield forward, lambda images: images.to(device=device, memory_format=passing.layout)
    finally:
        safe_delete_model(passing.model)
        if passing.on_cuda:
            cleanup_memory()


@dataclass
class _Pass:
    """One network on its device, with the state of a pass over images."""

    spec: NetworkSpec
    model: nn.Module
    batch_size: int
    device: str
    must_be_finite: bool = True
    threads: int | None = field(default=None, init=False)
    """Number of torch's threads during forward passes; None: the current number"""
    buffer: Any = field(default=None, init=False)
    """Pixels of a batch on the CPU, float32, reused by the next batch"""

    def __post_init__(self) -> None:
        import torch

        self.on_cuda = torch.device(self.device).type == "cuda"
        self.growing = self.on_cuda
        self.layout = evaluation_format(self.model)
        self.model = self.model.to(device=self.device, memory_format=self.layout)  # type: ignore[call-overload]
        self.outputs = EmbeddingExtractor(self.model, str(self.spec.checkpoint))
        rule = base_back.load_bundled("threads")
        self.threads = rule.threads_of_network("streaming", self.model, self.spec.img_size, self.device)

    def probe(self, pixels: Any) -> None:
        """Determine the number of outputs and the embedding on the first rows of a split."""
        import torch

        with torch.inference_mode(), self._precision():
            try:
                self.outputs.probe(self._load(pixels, range(min(PROBE_ROWS, len(pixels)))))
            # Errors that networks raise for unsupported image sizes.
            except (RuntimeError, ValueError, TypeError, AssertionError) as error:
                if out_of_memory(error):
                    raise self._too_large() from error
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(
                    f"{self.spec.checkpoint}: {self.spec.architecture} fails on images of {self.spec.img_size} px "
                    f"({reason}); expected the size that it was trained with. {RETRAIN}"
                ) from error
        if self.outputs.count < len(self.spec.classes):
            raise UserError(
                f"{self.spec.checkpoint}: {self.outputs.count} outputs for {len(self.spec.classes)} classes. {RETRAIN}"
            )

    def over(self, images: ImageSplit, pixels: Any, *, cut: bool = True) -> Iterator[OutputBatch]:
        """Run all rows of a split; on CUDA, a batch is started before the results of the previous one are fetched."""
        waiting: tuple[int, Tensor, Tensor] | None = None
        start, total = 0, len(images.paths)
        while start < total:
            rows = range(start, min(start + self.batch_size, total))
            outputs = self._forward(pixels, rows)
            if outputs is None:
                continue
            if waiting is not None:
                yield self._fetch(images, waiting, cut)
            waiting = (start, *outputs)
            start = rows.stop
            if not self.on_cuda:
                yield self._fetch(images, waiting, cut)
                waiting = None
            elif self.growing and len(rows) == self.batch_size:
                self.batch_size = min(2 * self.batch_size, LARGEST_BATCH)
        if waiting is not None:
            yield self._fetch(images, waiting, cut)

    def _forward(self, pixels: Any, rows: range) -> tuple[Tensor, Tensor] | None:
        """Logits and embeddings of the rows; None if memory ran out and a smaller batch size has been set."""
        import torch

        try:
            with torch.inference_mode(), self._precision():
                return self.outputs(self._load(pixels, rows))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if len(rows) == 1:
                raise self._too_large() from error
        # Outside the except block, where the traceback would keep the tensors of the failed attempt alive.
        self.batch_size, self.growing, self.buffer = max(1, len(rows) // 2), False, None
        logger.warning(
            "%s: out of memory with %d images at a time; continuing with %d",
            self.spec.checkpoint.name,
            len(rows),
            self.batch_size,
        )
        cleanup_memory()
        return None

    def _fetch(self, images: ImageSplit, outputs: tuple[int, Tensor, Tensor], cut: bool) -> OutputBatch:
        start, logits, embeddings = outputs
        columns = len(self.spec.classes) if cut else self.outputs.count
        logits_array, embeddings_array = (t.float().cpu().numpy() for t in (logits[:, :columns], embeddings))
        batch = OutputBatch(images.split, start, logits_array, embeddings_array, self.batch_size, self.threads)
        if self.must_be_finite:
            _check_finite(self.spec, images, batch)
        return batch

    def _load(self, pixels: Any, rows: range) -> Tensor:
        """Normalised pixels of the rows on the device, float32 (B, 3, H, W) in the network's memory format."""
        import torch

        crops = torch.from_numpy(pixels.crops(rows))
        if self.on_cuda:
            # torch reuses pinned blocks after the copy from them has ended.
            pinned = crops.pin_memory().to(self.device, non_blocking=True)
            return normalise(pinned, self.spec.preprocessing, layout=self.layout)
        if self.buffer is None or len(self.buffer) < len(crops):
            shape = (len(crops), 3, self.spec.img_size, self.spec.img_size)
            self.buffer = torch.empty(shape, memory_format=self.layout)
        return normalise(crops, self.spec.preprocessing, layout=self.layout, out=self.buffer[: len(crops)])

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """Autocast to bfloat16 on CUDA; on the CPU, set the network's number of threads."""
        import torch

        on_gpu = torch.autocast("cuda", dtype=torch.bfloat16) if self.on_cuda else nullcontext()
        with base_back.load_bundled("threads").intra_op_threads(self.threads), on_gpu:
            yield

    def _too_large(self) -> UserError:
        return UserError(
            f"{self.spec.checkpoint}: out of memory with a single image of {self.spec.img_size} px on {self.device}. "
            "Free memory there, choose another --device, or leave it out with backbones.exclude"
        )


def _require_removable_outputs(passing: _Pass, val: ImageSplit | None, opened: Callable[[ImageSplit], Any]) -> None:
    """Raise ExtraOutputsError if an output beyond the classes is predicted on val, UserError without val rows."""
    spec = passing.spec
    counts = f"{spec.checkpoint}: {passing.outputs.count} outputs for {len(spec.classes)} classes"
    if val is None:
        raise UserError(f"{counts}, and no val split to check that the extra outputs are never predicted. {RETRAIN}")
    logits = np.concatenate([batch.logits for batch in passing.over(val, opened(val), cut=False)])
    if reason := extra_outputs_problem(logits, len(spec.classes)):
        raise ExtraOutputsError(f"{counts}, and the extra outputs are predicted: on the val rows {reason}. {RETRAIN}")
    logger.warning("%s; the extra outputs are never predicted on the %d val rows and are cut", counts, len(logits))


def _check_finite(spec: NetworkSpec, images: ImageSplit, batch: OutputBatch) -> None:
    bad = np.flatnonzero(~np.isfinite(batch.logits).all(axis=1))
    if bad.size:
        sample_id = images.sample_ids[batch.start + int(bad[0])]
        raise UserError(
            f"{spec.checkpoint}: {bad.size} of {len(batch.logits)} rows of a batch have NaN or infinite logits, first "
            f"{images.split}/{sample_id}. Train the backbone again, or leave it out with backbones.exclude"
        )


def resolve_device(requested: str) -> str:
    """`cuda`, `cuda:N`, `cpu` or `auto` -> an available device; warns if the CPU replaces a requested one.

    Raises UserError for the index of a missing CUDA device.
    """
    if requested == "cpu":
        return requested
    import torch

    if torch.cuda.is_available():
        device = "cuda:0" if requested in ("auto", "cuda") else requested
        if int(device.split(":")[1]) >= torch.cuda.device_count():
            raise UserError(f"device {requested}: this machine has {torch.cuda.device_count()} CUDA device(s)")
        return device
    if requested != "auto":
        logger.warning("device %s: no CUDA device here, the CPU is used", requested)
    return "cpu"
