"""Decides when a model depends on the background: if its maps and the shortcut probes of the audit agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from utils.core.display_text import join_names

MOST_OUTSIDE = 0.5  # share of the maps' mass outside the central square with half of the area
BACKGROUND_PROBES = ("border pixels", "background colours")
"""Shortcut probes of the audit that use only the background"""


def background_sentence(subject: str, outside: float, probes: Sequence[Mapping[str, Any]]) -> str:
    """Sentence that the subject looks at the background, without a full stop; empty unless maps and audit agree.

    `outside` is the mean fraction of the maps' mass outside the central square, `probes` are those of `audit.json`.
    """
    telling = [
        f"{probe['name']} alone predict the class of {probe['accuracy']:.0%} of the images"
        for probe in probes
        if probe["name"] in BACKGROUND_PROBES and probe["stands_out"]
    ]
    if outside <= MOST_OUTSIDE or not telling:
        return ""
    return f"{subject} looks at the background: in the audit, {join_names(telling)}"
