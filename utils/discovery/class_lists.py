"""Class lists of networks, matched by name with the classes of the workspace."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from utils.core.display_text import first_names
from utils.core.errors import UserError, did_you_mean

PLACEHOLDER = re.compile(r"(?:label|class)_\d+", re.IGNORECASE)
"""Names that Hugging Face and exports use for outputs of unknown classes."""
MOST_SHOWN = 12


def class_list(value: Any, where: str) -> tuple[str, ...] | None:
    """Class names in the order of the outputs, from a list or a dictionary {index: name}; None for placeholders.

    Raises UserError, whose message starts with `where`, for an invalid value, a missing index or a duplicate name.
    """
    if isinstance(value, Mapping):
        keys = [str(key) for key in value]
        if sorted(keys, key=lambda key: (len(key), key)) != [str(index) for index in range(len(keys))]:
            raise UserError(
                f"{where}: the indices {_shown(keys)}; expected one name for each output from 0 on. Correct the file"
            )
        value = [entry for _, entry in sorted(value.items(), key=lambda item: int(item[0]))]
    if not isinstance(value, list) or not value or not all(isinstance(name, str) and name for name in value):
        raise UserError(f"{where}: {str(value)[:60]!r}; expected a list of class names. Correct the file")
    repeated = [name for name, count in Counter(value).items() if count > 1]
    if repeated:
        raise UserError(f"{where}: {_shown(sorted(repeated))} occurs more than once. Correct the file")
    return None if all(PLACEHOLDER.fullmatch(name) for name in value) else tuple(value)


def require_match(names: Sequence[str], classes: Sequence[str], where: str) -> None:
    """Raise UserError unless `names` are the workspace's `classes`, in any order.

    Names that differ in case or separators are different; the message suggests the class that was probably meant.
    """
    if sorted(names) == sorted(classes):
        return
    unknown = [name for name in names if name not in classes]
    without = [name for name in classes if name not in names]
    hints = [f"{name!r} is no class of the workspace{_near(name, without)}" for name in unknown[:3]]
    if not unknown:
        hints = [f"no output for {_shown(without)}"]
    number = f"{len(names)} classes; the workspace has {len(classes)}. " if len(names) != len(classes) else ""
    raise UserError(
        f"{where}: {number}{'; '.join(hints)}. The network's classes: {_shown(names)}. The workspace's: "
        f"{_shown(classes)}. Correct the names there or the names of the class folders; a network of other classes "
        "cannot be a member"
    )


def _near(name: str, classes: Sequence[str]) -> str:
    plain = {_plain(other): other for other in classes}
    if _plain(name) in plain:
        return f"; did you mean {plain[_plain(name)]!r}?"
    return did_you_mean(name, classes)


def _plain(name: str) -> str:
    """A name with case and separators removed."""
    return re.sub(r"[\W_]+", "", name).casefold()


def _shown(names: Sequence[str]) -> str:
    return first_names([str(name)[:60] for name in names], MOST_SHOWN)
