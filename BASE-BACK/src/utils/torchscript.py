"""TorchScript without torch's notices that it is deprecated: it is a format that the specification asks for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torchscript_without_notices() -> Iterator[None]:
    """Trace, script, save or load a network, and show nothing of torch's plans for TorchScript.

    A notice of `torch.jit` is recognized by its message, as its category changes with the release: DeprecationWarning
    up to torch 2.13, FutureWarning from 2.14 on. A wrong trace, of which torch warns as well, is caught by whoever
    opens the file again and compares its answers.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.")
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        yield


@contextmanager
def exporter_without_notices() -> Iterator[None]:
    """Write ONNX by the tracing exporter, which is chosen on purpose, and show nothing of its age."""
    with torchscript_without_notices():
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category)
        warnings.filterwarnings("ignore", "Constant folding", category=UserWarning)
        yield
