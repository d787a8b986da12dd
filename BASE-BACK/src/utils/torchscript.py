"""TorchScript without torch's deprecation warnings: the specification requires the format."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torchscript_without_notices() -> Iterator[None]:
    """Suppress torch's deprecation warnings for tracing, scripting, saving or loading a network.

    Warnings of `torch.jit` are recognised by their message, since their category changes between releases:
    DeprecationWarning up to torch 2.13, FutureWarning from 2.14 on. Torch's warnings about wrong traces are suppressed
    too; the parity check of the written file catches wrong traces.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.")
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        yield


@contextmanager
def exporter_without_notices() -> Iterator[None]:
    """Suppress the deprecation warnings of the tracing ONNX exporter, which is used deliberately."""
    with torchscript_without_notices():
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category)
        warnings.filterwarnings("ignore", "Constant folding", category=UserWarning)
        yield
