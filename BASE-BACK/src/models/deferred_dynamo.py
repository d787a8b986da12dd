"""Import torchvision without `torch._dynamo`, which takes as long to import as torch and which few programs use.

torchvision, which timm needs, calls one function of it, to decide whether RoI align may be compiled; timm uses one
decorator of it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

PACKAGE = "torch._dynamo"
UTILS = f"{PACKAGE}.utils"


@contextmanager
def deferred_dynamo() -> Iterator[None]:
    """Within the block, imports of `torch._dynamo` get stand-ins whose two functions import the package when called.

    Any other attribute of a stand-in is that of the real package, which is imported then. Without effect if the
    package or torchvision is already imported.
    """
    if PACKAGE in sys.modules or "torchvision" in sys.modules:
        yield
        return
    stand_ins = {name: _StandIn(name) for name in (PACKAGE, UTILS)}
    stand_ins[PACKAGE].__dict__["disable"] = _disable
    stand_ins[UTILS].__dict__["is_compile_supported"] = _is_compile_supported
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        _remove(stand_ins)


class _StandIn(ModuleType):
    """A module that imports the real one for attributes that it does not have."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system asks for these
            raise AttributeError(name)
        _remove({found: module for found, module in sys.modules.items() if isinstance(module, _StandIn)})
        return getattr(importlib.import_module(self.__name__), name)


def _remove(stand_ins: Mapping[str, ModuleType]) -> None:
    for name, module in stand_ins.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]


def _is_compile_supported(device_type: str) -> bool:
    from torch._dynamo.utils import is_compile_supported

    return bool(is_compile_supported(device_type))


def _disable(fn: Any = None, recursive: bool = True, **_: Any) -> Any:
    """What `torch.compiler.disable` calls; torch's own form of it imports the package when `fn` is called."""
    return torch._disable_dynamo(fn, recursive)
