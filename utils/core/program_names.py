"""Names of the programs as the user types them: scripts of a clone, or commands of an installed package.

Messages, help and the report use the clone's names. In an installed package, `as_typed` replaces them by the names of
its commands.
"""

from __future__ import annotations

import re
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
INSTALLED = PROJECT.name == "project" and (PROJECT.parent / "__main__.py").is_file()
"""Whether this copy of the project belongs to the installed package `ensemble_system`."""
COMMANDS = {
    "python ensemble_orchestrator.py": "ensemble-system",
    "ensemble_orchestrator.py": "ensemble-system",
    "python BASE-BACK/src/main.py": "ensemble-system-train",
    "make demo DATA=": "ensemble-system demo --data ",
    "make demo": "ensemble-system demo",
    "make tflite": 'pip install "ensemble-system[tflite]"',
}
"""Commands of a clone -> commands of an installed package."""
_WORDS = re.compile(rf"(?<![\w/.-])({'|'.join(map(re.escape, COMMANDS))})(?!\w)")


def as_typed(text: str) -> str:
    """The text with the commands in it as the user types them here."""
    if not INSTALLED:
        return text
    text = text.replace(f"{PROJECT}/BASE-BACK", "BASE-BACK")
    return _WORDS.sub(lambda match: COMMANDS[match[0]], text)
