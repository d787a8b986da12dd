"""The settings of all figures: matplotlib's defaults, independent of the user's `matplotlibrc`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from utils.core.errors import UserError


@contextmanager
def library_defaults(settings: Mapping[Any, Any] = MappingProxyType({})) -> Iterator[None]:
    """Draw within the block with matplotlib's defaults and `settings`; the previous settings are restored afterwards.

    Raises UserError if matplotlib cannot be imported, as with a damaged `matplotlibrc`.
    """
    try:
        import matplotlib
    except (ValueError, OSError) as error:
        raise UserError(
            f"matplotlib cannot be imported ({error}); expected a readable matplotlibrc in the working directory, in "
            "~/.config/matplotlib or where MATPLOTLIBRC says. Remove or repair it, then run the command again"
        ) from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield
