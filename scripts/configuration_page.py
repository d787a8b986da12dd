"""Write docs/configuration.md and configs/schema.json from the models of the configuration; a test compares them.

python scripts/configuration_page.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from utils.core import config_schema  # noqa: E402
from utils.core.artifacts import write_text  # noqa: E402
from utils.operations import configuration  # noqa: E402

PAGE, SCHEMA = PROJECT / "docs" / "configuration.md", PROJECT / "configs" / "schema.json"
HEAD = """\
# Configuration

Every key of a configuration file. `scripts/configuration_page.py` writes this page from the models in
`utils/core/config_sections.py`; `config --explain KEY` prints one row, `config --schema` the JSON schema, which
[configs/schema.json](../configs/schema.json) holds too. A file need not be complete. Where it names any of `runs`,
every section with `enable` that it does not name (`runs.*`, `pruning`, `tta`, `distillation`) is off.
"""


def page() -> str:
    """The page as Markdown: one table for each section."""
    lines = [HEAD]
    for title, keys in _tables().items():
        lines += [f"## {title}", "", "| key | default | values | meaning |", "|---|---|---|---|"]
        lines += [f"| `{key.name}` | {_default(key)} | {key.range} | {key.meaning} |" for key in keys]
        lines.append("")
    return "\n".join(lines)


def schema() -> str:
    """The JSON schema as `config --schema` prints it."""
    return json.dumps(configuration.schema().document, indent=2) + "\n"


def _tables() -> dict[str, list[config_schema.Key]]:
    """{section of the first or, in `runs`, the second level: its keys}."""
    tables: dict[str, list[config_schema.Key]] = {}
    for key in config_schema.iterate_keys():
        parts = key.name.split(".")
        if not key.keys:
            title = parts[0] if len(parts) > 1 else "top"
            tables.setdefault(f"runs.{parts[1]}" if title == "runs" else title, []).append(key)
    return tables


def _default(key: config_schema.Key) -> str:
    text = configuration.as_yaml_value(key.default)
    return f"`{text}`" if len(text) <= 80 else "the specification's list"


def main() -> int:
    """Write both files."""
    for path, text in ((PAGE, page()), (SCHEMA, schema())):
        write_text(path, text)
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
