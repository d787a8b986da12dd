"""The command lines that build an ensemble, for messages that name the next command to type."""

from __future__ import annotations

COMMAND_OF = {
    "stacking": "stack",
    "distilled": "distill",
    "meta": "meta-fuse",
    **dict.fromkeys(("fusion", "moe", "cascade"), "fusion-train"),
}
"""{first word of an ensemble's name: command}; `build-ensemble` builds the others."""


def build_command(name: str) -> str:
    """Return the command line that builds the ensemble of this name."""
    return f"python ensemble_orchestrator.py {COMMAND_OF.get(name.split('_')[0], 'build-ensemble')}"


def rebuild_hint(name: str) -> str:
    """Return the sentence that states how to rebuild an ensemble whose files are damaged."""
    return f"Build {name} again: {build_command(name)} --force"
