"""A CUDA device that computes on the CPU: its tensors are tagged, transfers and synchronisations are counted.

Code written for a GPU runs under it where there is none. As on a GPU, a computation on tensors of the device and of the
host raises RuntimeError, and so does `numpy()` of a tensor of the device. Autocast changes nothing, as it concerns
tensors that are really on a GPU.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from utils.predictions import image_splits

DEVICE = torch.device("cuda", 0)
SYNCHRONISING = {Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__}
ACROSS_DEVICES = {Tensor.copy_, Tensor.__getitem__, Tensor.__setitem__, torch._has_compatible_shallow_copy_type}
"""Functions that take tensors of the host beside those of the device."""


class FakeCuda(TorchFunctionMode):
    """The device.

    `counts` has `to device`, `to host`, `synchronisations` and `events`, each by number of calls, how many of the
    first were `from pageable memory`, and the `bytes to device`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        arguments: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(options or {})
        first = arguments[0] if arguments else None
        if function == Tensor.device.__get__ and is_on_device(first):
            return DEVICE
        if function == Tensor.is_cuda.__get__:
            return is_on_device(first)
        if function == Tensor.data.__set__:
            function(*arguments)
            return tag(first, is_on_device(arguments[1]))
        if function in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._moved(function, arguments, options)
        if function == Tensor.pin_memory:
            first.on_fake_pinned = True
            return first
        if function == torch._C._nn._parse_to:  # of `Module.to`: the device is a value here
            return function(*arguments, **options)
        if function == Tensor.numpy and is_on_device(first):
            raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu()")
        if function in SYNCHRONISING and is_on_device(first):
            self.counts["synchronisations"] += 1
        return self._computed(function, arguments, options)

    def _moved(self, function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
        """`to`, `cpu` and `cuda`; a tensor that changes its device is copied."""
        source, *others = arguments
        target = options.pop("device", None)
        if function == Tensor.cpu:
            target = "cpu"
        elif function == Tensor.cuda:
            target, others = "cuda", []
        elif others and isinstance(others[0], str | torch.device):
            target, others[0] = others[0], torch.device("cpu")
        elif others and isinstance(others[0], Tensor):
            target = others[0].device
        result = Tensor.to(source, *others, **options) if function == Tensor.to else source
        was_there = is_on_device(source)
        is_there = was_there if target is None else torch.device(target).type == "cuda"
        if is_there != was_there:
            self.counts["to device" if is_there else "to host"] += 1
            if is_there:
                self.counts["from pageable memory"] += not getattr(source, "on_fake_pinned", False)
                self.counts["bytes to device"] += source.nbytes
            result = result.clone() if result is source else result
        return tag(result, is_there) if result is not source else result

    def _computed(self, function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Any other function; what it returns is where its tensors are, or where the option `device` says."""
        is_made_there = False
        if options.get("device") is not None:
            is_made_there = torch.device(options["device"]).type == "cuda"
            options["device"] = "cpu"
        tensors = list(_tensors((arguments, options)))
        places = {is_on_device(tensor) for tensor in tensors if tensor.dim() > 0}
        if len(places) > 1 and function not in ACROSS_DEVICES:
            raise RuntimeError(f"Expected all tensors to be on the same device in {function}, but found cuda:0 and cpu")
        result = function(*arguments, **options)
        if is_made_there or (any(map(is_on_device, tensors)) and "device" not in options):
            for tensor in _tensors(result):
                tag(tensor, True)
        return result


def is_on_device(tensor: Any) -> bool:
    """Whether a tensor is on the fake device."""
    return getattr(tensor, "on_fake_cuda", False)


def tag(tensor: Any, is_there: bool) -> Any:
    """Note where a tensor is; returns it."""
    tensor.on_fake_cuda = is_there
    return tensor


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


class Event:
    """`torch.cuda.Event`, by the clock."""

    def __init__(self, counts: Counter[str], **_: Any) -> None:
        self.counts, self.time = counts, 0.0

    def record(self) -> None:
        self.counts["events"] += 1
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end.time - self.time)


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch, *, memory: int = 8 * 2**30) -> Iterator[FakeCuda]:
    """A block with one device of so many bytes, as `torch.cuda` tells."""
    device = FakeCuda()
    facts = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "fake",
        "get_device_properties": lambda *_: SimpleNamespace(total_memory=memory, name="fake"),
        "mem_get_info": lambda *_: (memory, memory),
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda: None,
        "synchronize": lambda *_: device.counts.update(["synchronisations"]),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "get_rng_state_all": list,
        "set_rng_state_all": lambda states: None,
        "manual_seed_all": lambda seed: None,
        "Event": partial(Event, device.counts),
        "device": lambda *_: nullcontext(),
    }
    with monkeypatch.context() as patched, device:
        for name, value in facts.items():
            patched.setattr(torch.cuda, name, value)
        # A cache of its own: a real device of the same name must not be handed what the fake has made.
        patched.setattr(image_splits, "channel_constants", cache(image_splits.channel_constants.__wrapped__))
        yield device
