"""How often the functions of `utils.core.artifacts` read each file, for tests that nothing is parsed twice."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from utils.core import artifacts

READERS = {
    function.__code__: name
    for name, function in vars(artifacts).items()
    if name in ("read_json", "open_array", "read_arrays", "read_tensors")
}
_counters: list[Counter[Path]] = []
_last: list[tuple[FrameType | None, str]] = [(None, "")]


def _observe(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook, which Python can add and never remove: it counts while a counter is there."""
    if event != "open" or not _counters or not isinstance(arguments[0], (str, Path)):
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code not in READERS:
        frame = frame.f_back
    if frame is None or (frame is _last[0][0] and str(arguments[0]) == _last[0][1]):
        return  # no reader, or a reader that opens its file for the header and for the content
    _last[0] = (frame, str(arguments[0]))
    for counter in _counters:
        counter[Path(arguments[0])] += 1


sys.addaudithook(_observe)


@contextmanager
def counted_reads() -> Iterator[Counter[Path]]:
    """{file: how often it was parsed or opened as an array} of the block; digests and plain reads are not counted."""
    counter: Counter[Path] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)
        _last[0] = (None, "")
