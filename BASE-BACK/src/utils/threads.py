"""Number of torch's intra-op threads, by kind of work, network and image size only. Reads no settings.

Results are reproducible only with an equal number of threads, so the number does not depend on a machine's cores or
load; these determine the number of processes. A training records its number and keeps it when it resumes. The user's
`OMP_NUM_THREADS`, or `dataset.num_threads` of the ensemble system, overrides the table.

The size of a network is its number of parameters times (image size / 32)^2, which approximates the multiply-adds per
image. Milliseconds of CPU time of a training step on 16 or 32 images with one thread and with two (passive waiting in
OpenMP; torch 2.13, two cores shared with other programs, where the wall time of two threads was never lower):

    network                           size    one thread    two threads
    tiny networks, 32 px        0.06-0.2 M         18-40          29-67
    MobileNetV3-small, 64 px           6 M           137            232
    MobileNetV3-small, 128 px         24 M           309            412
    ResNet-18, 64 px                  45 M           271            298
    MobileNetV3-small, 224 px         75 M          1017            970
    ResNet-18, 128 px                179 M           808            803
    ResNet-18, 224 px                548 M          2156           2191
    CustomResNetMish, 224 px         863 M          3231           3260

From `LARGE` on, a second thread costs no CPU time and halves the wall time if a core is free. Passive waiting matters
more: beside two busy programs, a step of the tiny networks takes 0.5 to 6 s with two spinning threads and 0.03 to
0.06 s with two sleeping ones.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

LARGE = 5e7  # size of a network from which a second thread saves time
TABLE = {
    "base training": (1, 1),  # independent trainings: two processes of one thread are faster than one of two
    "streaming": (1, 2),
    "student": (1, 2),
    "end to end": (1, 2),
    "normalisation": (1, 2),  # BatchNorm statistics of soups
    "export checks": (1, 2),
}
"""Kind of work -> threads for networks (below `LARGE`, from `LARGE` on). Heads on stored outputs always use one."""
REQUESTED = "DBT_NUM_THREADS"
"""Environment variable with the user's number of threads; 0: none, regardless of `OMP_NUM_THREADS`."""
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
"""Waiting threads sleep: a spinning thread occupies the core of the thread that it waits for."""


def prepare_environment(requested: int | None = None) -> None:
    """Set the variables that OpenMP reads when torch is first imported, for this process and its children.

    `requested` is the user's number of threads, which overrides `OMP_NUM_THREADS`. Variables set by the user are kept.
    Without a number, operations outside the kinds of work of `TABLE` use one thread.
    """
    for name, value in PASSIVE.items():
        os.environ.setdefault(name, value)
    number = requested or requested_threads()
    os.environ[REQUESTED] = str(number or 0)
    os.environ["OMP_NUM_THREADS"] = str(number or 1)


def requested_threads() -> int | None:
    """The user's number of threads, or None."""
    text = os.environ.get(REQUESTED) or os.environ.get("OMP_NUM_THREADS") or ""
    text = text.partition(",")[0].strip()  # one number per level of nesting
    return int(text) or None if text.isdecimal() else None


def number_of_threads(work: str, n_parameters: int, img_size: int) -> int:
    """Number of threads for a kind of work of `TABLE`; `img_size` is the side length of the images in pixels."""
    small, large = TABLE[work]
    size = n_parameters * (img_size / 32) ** 2
    return requested_threads() or (large if size >= LARGE else small)


def threads_of_network(work: str, model: nn.Module, img_size: int, device: torch.device | str) -> int | None:
    """`number_of_threads` for a network; None on a GPU, whose kernels do not depend on it."""
    import torch

    if torch.device(device).type != "cpu":
        return None
    return number_of_threads(work, sum(parameter.numel() for parameter in model.parameters()), img_size)


@contextmanager
def intra_op_threads(number: int | None) -> Iterator[None]:
    """Run torch's operations with `number` intra-op threads inside the block; None keeps the current number.

    With a number, that is on a CPU, glibc reuses the memory of freed tensors inside the block.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        with _freed_memory_is_kept() if number else nullcontext():
            yield
    finally:
        torch.set_num_threads(before)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # names and numbers of <malloc.h>


@contextmanager
def _freed_memory_is_kept() -> Iterator[None]:
    """Make glibc allocate tensors of any size on its heap and keep freed memory; no effect on other C libraries.

    By default it maps every activation above 32 MB anew, and returns the freed top of the heap to the system, so that
    the kernel zeroes each page again for every layer: half of the CPU time of EfficientNet-Lite0 at 224 px (per image
    in batches of 8 on two threads: 31 ms, 13 ms with this; in batches of 32: 40 and 15 ms). After the block, large
    arrays are mapped again; the heap's free memory is returned only by `malloc_trim`, since blocks follow each other
    closely, one per batch.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        yield
        return
    library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    library.mallopt(M_MMAP_MAX, 0)
    try:
        yield
    finally:
        library.mallopt(M_MMAP_MAX, 2**16)
        library.mallopt(M_MMAP_THRESHOLD, 2**25)  # the upper limit of glibc's dynamic threshold
