"""Every source file, read as a tree: nothing that would run data, no shell, no unpickling that is not guarded."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from conftest import PROJECT

FOLDERS = ("utils", "ensemble_system", "BASE-BACK/src", "scripts")
SOURCES = [PROJECT / "ensemble_orchestrator.py"]
SOURCES += sorted(path for folder in FOLDERS for path in (PROJECT / folder).rglob("*.py") if "tests" not in path.parts)
RUNNING = {"eval", "exec", "compile", "__import__"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
PICKLES = {"pickle", "dill", "cloudpickle", "shelve", "marshal"}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(tree: ast.AST) -> Iterator[tuple[str, dict[str, ast.expr], int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield dotted(node.func), {key.arg: key.value for key in node.keywords if key.arg}, node.lineno


def complaints(source: str) -> list[str]:
    """What a file does that none should."""
    tree = ast.parse(source)
    found = []
    for name, options, line in calls(tree):
        if name in RUNNING | SHELLS:
            found.append(f"line {line}: {name}")
        if name.endswith("torch.load") or (name == "load" and "weights_only" in options):
            safe = options.get("weights_only")
            if not (isinstance(safe, ast.Constant) and safe.value is True):
                found.append(f"line {line}: torch.load without weights_only=True")
        if isinstance(options.get("shell"), ast.Constant) and options["shell"].value:
            found.append(f"line {line}: a shell")
        if isinstance(options.get("allow_pickle"), ast.Constant) and options["allow_pickle"].value:
            found.append(f"line {line}: allow_pickle")
        if name.endswith("Image.open") and "formats" not in options:
            found.append(f"line {line}: Image.open of any format")
        if name == "yaml.load" and "Loader" not in options:
            found.append(f"line {line}: yaml.load without a loader")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES:
            found.append(f"line {node.lineno}: from {node.module}")
        if isinstance(node, ast.Attribute) and dotted(node.value) in PICKLES and node.attr != "UnpicklingError":
            found.append(f"line {node.lineno}: {dotted(node)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PROJECT).as_posix())
def test_no_source_runs_data(path):
    assert complaints(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "import os\nos.system(text)",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import subprocess\nsubprocess.run(line, shell=True)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import pickle\npickle.loads(content)",
        "from dill import loads",
        "from PIL import Image\nImage.open(path)",
    ],
)
def test_what_runs_data_is_seen(source):
    assert complaints(source)
