"""Cache of the report's figures, and figures that are drawn together in several processes."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, ParamSpec

import numpy as np

from utils.core import engines
from utils.core.artifacts import digest_of

P = ParamSpec("P")

MAX_KEPT = 64  # figures of each kind that are kept in memory


def drawn_once(draw: Callable[P, str]) -> Callable[P, str]:
    """Cache a figure: return the SVG of an earlier call with equal arguments if there is one.

    A pipeline writes the page after every stage that changes a part of it, and drawing takes most of that time.
    """
    drawn: dict[str, str] = {}

    def keep(key: str, svg: str) -> None:
        if len(drawn) >= MAX_KEPT:
            drawn.clear()
        drawn[key] = svg

    @wraps(draw)
    def figure(*args: P.args, **kwargs: P.kwargs) -> str:
        key = json.dumps([args, kwargs], default=_plain)
        if key in drawn:
            return drawn[key]
        if _requests is not None:
            # Text of users is escaped, so that none equals it.
            placeholder = f"<!-- figure {draw.__name__} {digest_of(key)} -->"
            _requests[placeholder] = _Request(draw.__module__, draw.__name__, args, kwargs, partial(keep, key))
            return placeholder
        svg = draw(*args, **kwargs)
        keep(key, svg)
        return svg

    return figure


@dataclass(frozen=True)
class _Request:
    """A figure that is drawn later."""

    module: str
    name: str
    """Function of the module that draws it"""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keep: Callable[[str], None]
    """Caches the SVG."""


_requests: dict[str, _Request] | None = None
"""{placeholder: figure} within `drawn_together`"""


def _plain(value: Any) -> Any:
    """Convert an argument of a figure that JSON cannot represent to a list or a dictionary."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return sorted(value) if isinstance(value, set) else vars(value)


@contextmanager
def drawn_together() -> Iterator[Callable[[str], str]]:
    """Within the block, figures are placeholders; the context value is a function that fills them into a page.

    The figures are drawn when the page is filled, in several processes if they take long.
    """
    global _requests
    requests: dict[str, _Request] = {}
    _requests = requests
    try:
        yield partial(_filled, requests)
    finally:
        _requests = None


def _filled(requests: Mapping[str, _Request], page: str) -> str:
    jobs = [(request.module, request.name, request.args, request.kwargs) for request in requests.values()]
    drawn = engines.Local().map(_draw, jobs, description="figures", n_processes=engines.cores())
    for (placeholder, request), svg in zip(requests.items(), drawn, strict=True):
        request.keep(svg)
        page = page.replace(placeholder, svg)
    return page


def _draw(job: tuple[str, str, tuple[Any, ...], dict[str, Any]]) -> str:
    """Draw a figure by the name of its function, since functions without their decorator cannot be pickled."""
    module, name, args, kwargs = job
    svg: str = getattr(importlib.import_module(module), name).__wrapped__(*args, **kwargs)
    return svg
