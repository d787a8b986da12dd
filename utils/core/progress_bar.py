"""Progress bars with the remaining time, shown only on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from utils.core import messages


def is_shown() -> bool:
    """Whether standard error is a terminal that shows messages of level INFO."""
    return sys.stderr.isatty() and messages.shows_progress()


@contextmanager
def progress_bar(total: int, description: str, *, unit: str = "image") -> Iterator[Callable[[int], object]]:
    """A bar of `total` units, removed at the end; the context value is a function that counts units as done.

    Nothing is shown without a terminal. Log messages appear above the bar.
    """
    if not is_shown():
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=description, unit=unit, file=sys.stderr, leave=False, dynamic_ncols=True) as bar:
        yield bar.update
