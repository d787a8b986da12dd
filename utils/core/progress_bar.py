"""Progress bars with the time left, where a person looks: on a terminal, and there only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from utils.core import messages


def is_shown() -> bool:
    """Whether standard error is a terminal and messages of the level INFO are shown there."""
    return sys.stderr.isatty() and messages.shows_progress()


@contextmanager
def progress_bar(total: int, what: str, *, unit: str = "image") -> Iterator[Callable[[int], object]]:
    """A bar of `total` units, which disappears at the end; the value counts further units as done.

    Without a terminal nothing is shown. Log messages appear above the bar.
    """
    if not is_shown():
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit=unit, file=sys.stderr, leave=False, dynamic_ncols=True) as bar:
        yield bar.update
