"""Pages of the site that follow the program: one for each command, from the table that the parser is made of.

They are written into docs/generated/ when the site is built, with copies of the pages that lie outside docs/.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.commands import COMMANDS, COMMON_OPTIONS

PROJECT = Path(__file__).resolve().parents[1]
PROJECT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")


def write(folder: Path) -> None:
    """Write all generated pages below `folder`, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "commands").mkdir(parents=True)
    (folder / "project").mkdir()
    for name in COMMANDS:
        (folder / "commands" / f"{name}.md").write_text(command_page(name), encoding="utf-8")
    (folder / "commands" / "index.md").write_text(index_page(), encoding="utf-8")
    for name in PROJECT_PAGES:
        shutil.copy(PROJECT / name, folder / "project" / name)


def command_page(name: str) -> str:
    """What a command does, an example, and its options with their defaults."""
    command = COMMANDS[name]
    lines = [f"# {name}", "", f"{command.help[0].upper()}{command.help[1:]}.", ""]
    lines += ["```bash", f"python ensemble_orchestrator.py {command.example}", "```", ""]
    if command.one_of:
        lines += [f"One of {', '.join(f'`{option}`' for option in command.one_of)} is required.", ""]
    if command.arguments:
        lines += ["## Options", "", *_option_table(command.arguments), ""]
    return "\n".join([*lines, "## Options of every command", "", *_option_table(COMMON_OPTIONS), ""])


def index_page() -> str:
    """The pages of all commands."""
    rows = [f"| [{name}]({name}.md) | {_cell(command.help)} |" for name, command in COMMANDS.items()]
    listed = ["```{toctree}", ":hidden:", "", *COMMANDS, "```"]
    return "\n".join(
        ["# Options of the commands", "", "| command | what it does |", "|---|---|", *rows, "", *listed, ""]
    )


def _option_table(options: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield from ("| option | meaning |", "|---|---|")
    for option, settings in options.items():
        text = settings.get("help", "")
        if text == "==SUPPRESS==":
            continue
        value = settings.get("metavar") or "|".join(settings.get("choices") or ())
        typed = f"{option} {value}" if value and option.startswith("-") else option
        shown = _cell(text % {"default": None, **settings})
        yield f"| {_code(typed)} | {shown} |"


def _code(text: str) -> str:
    return f"`{text.replace('|', chr(92) + '|')}`"


def _cell(text: str) -> str:
    return re.sub(r"([<>|*_\[\]{}])", r"\\\1", text)


def with_site_links(text: str, name: str) -> str:
    """The source of the page `name`; links to pages outside docs/ lead to their copies, and other files are named."""
    root = "../" * name.count("/")
    own = name.rpartition("/")[2] + ".md" if name.startswith("generated/project/") else ""

    def led(match: re.Match[str]) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        if own in PROJECT_PAGES:  # a copy, whose links start at the project's folder
            if target.startswith("docs/"):
                return f"[{words}]({root}{target.removeprefix('docs/')}{anchor})"
            outside = target
        elif target.startswith("../" * (name.count("/") + 1)):
            outside = target.removeprefix("../" * (name.count("/") + 1))
        else:
            return match[0]
        if outside in PROJECT_PAGES:
            return f"[{words}]({root}generated/project/{outside}{anchor})"
        return f"{words} (`{outside}`)" if words.strip("`") != outside else f"`{outside}`"

    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!http|#)([^)#]+)(#[^)]*)?\)", led, text)
