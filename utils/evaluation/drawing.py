"""The settings under which every figure is drawn: matplotlib's own, whatever the user's `matplotlibrc` says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from utils.core.errors import UserError


@contextmanager
def library_defaults(settings: Mapping[Any, Any] = MappingProxyType({})) -> Iterator[None]:
    """Draw within the block under matplotlib's defaults and `settings`; afterwards all is as before.

    Raises UserError where matplotlib cannot be imported, which a damaged `matplotlibrc` prevents.
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
