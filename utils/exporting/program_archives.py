"""Checks that a `torch.export` archive (.pt2) has no executable contents, without unpickling or evaluating any of it.

`torch.export.load` unpickles the records that the archive declares as pickles, evaluates the text of sizes and guards
as Python, imports modules named in a tree of inputs, and looks up the functions of the graph by name anywhere below
`torch`. The archives that `export` writes need none of this: tensors are raw bytes, sizes are sums and products of
symbols, and the graph calls operators of `aten`.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MODEL, EXAMPLE = "models/model.json", "data/sample_inputs/model.pt"
PAYLOADS = {
    "data/weights/model_weights_config.json": re.compile(r"weight_\d{1,9}"),
    "data/constants/model_constants_config.json": re.compile(r"tensor_\d{1,9}"),
}
"""{record: pattern of the names of the files that it may list}"""
RECORD = re.compile(
    r"models/model\.json|data/sample_inputs/model\.pt|data/(weights/model_weights|constants/model_constants)_config\.json"
    r"|data/weights/weight_\d{1,9}|data/constants/tensor_\d{1,9}"
    r"|archive_format|archive_version|byteorder|\.data/(version|serialization_id)"
)
OPERATOR = re.compile(r"torch\.ops\.aten\.(?P<name>[A-Za-z_][A-Za-z0-9_]*)\.[A-Za-z0-9_]+")
REFUSED = {"save": "aten::save writes a file", "from_file": "aten::from_file maps a file and may write it"}
ARITHMETIC = re.compile(r"_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|eq|ne|lt|le|gt|ge|and_|or_)")
SYMBOL = r"Symbol\('[su]\d{1,9}'(, (positive|nonnegative|integer)=True){0,3}\)|[su]\d{1,9}"
SIZE = re.compile(
    rf"({SYMBOL}|\d{{1,18}}|Integer|Add|Mul|Max|Min|FloorDiv|CleanDiv|Mod|PythonMod|\*(?!\*)|[-+(), ]){{1,500}}"
)
"""The text of a size, such as `4*s77` or `Mul(Integer(4), Symbol('s77', integer=True))`: without names that Python
would look up, and without powers."""
TREE_TYPES = (None, "builtins.tuple", "builtins.list", "builtins.dict")
MAX_LEVELS = 64


def program_problem(path: Path) -> str | None:
    """The reason why an archive must not be loaded; None if it has only tensors and pure operators."""
    import torch

    try:
        reader = torch._C.PyTorchFileReader(str(path))
        names = reader.get_all_records()
        with zipfile.ZipFile(path) as archive:
            # Both readers must agree: torch falls back to the other one, which reads an older format.
            folders = {name.partition("/")[0] for name in archive.namelist()}
            in_zip = [name.partition("/")[2] for name in archive.namelist()]
            if len(folders) != 1 or sorted(in_zip) != sorted(names):
                return "its two lists of records differ"
            if unknown := [name for name in names if not RECORD.fullmatch(name)]:
                return f"it holds {unknown[0]!r}, unknown to torch.export"
            if duplicates := [name for name, count in Counter(map(str.casefold, names)).items() if count > 1]:
                return f"it holds {duplicates[0]!r} twice"
            texts = {name: reader.get_record(name) for name in (MODEL, EXAMPLE, *PAYLOADS)}
            for name, text in texts.items():
                if archive.read(f"{next(iter(folders))}/{name}") != text:
                    return f"{name}: its two readers find other contents"
        return next(_problems(texts), None)
    except (RuntimeError, KeyError, ValueError, zipfile.BadZipFile, RecursionError) as error:
        return f"it is not an archive of torch.export ({str(error).splitlines()[0][:200]})"


def _problems(texts: Mapping[str, bytes]) -> Iterator[str]:
    if texts[EXAMPLE]:
        yield f"{EXAMPLE}: holds a pickle"
    for name, allowed in PAYLOADS.items():
        for entry in json.loads(texts[name])["config"].values():
            if entry["use_pickle"] is not False or not allowed.fullmatch(entry["path_name"]):
                yield f"{name}: names a pickle"
    program = json.loads(texts[MODEL])
    if program.get("guards_code"):
        yield f"{MODEL}: holds guards, which are Python code"
    for problem in _problems_of(program, 0):
        yield f"{MODEL}: {problem}"


def _problems_of(value: Any, level: int) -> Iterator[str]:
    if level > MAX_LEVELS:
        yield f"is nested deeper than {MAX_LEVELS} levels"
    elif isinstance(value, list):
        for entry in value:
            yield from _problems_of(entry, level + 1)
    elif isinstance(value, dict):
        for key, entry in value.items():
            if isinstance(entry, str):
                if problem := _text_problem(key, entry):
                    yield problem
            else:
                yield from _problems_of(entry, level + 1)


def _text_problem(key: str, text: str) -> str | None:
    if key in ("target", "as_operator"):
        match = OPERATOR.fullmatch(text)
        if match is None and not ARITHMETIC.fullmatch(text):
            return f"{text[:80]!r} is no operator of aten"
        return REFUSED.get(match["name"]) if match else None
    if key == "expr_str" and not SIZE.fullmatch(text):
        return f"{text[:80]!r} is no size"
    if key in ("in_spec", "out_spec"):
        return _tree_problem(json.loads(text)[1])
    if key == "source_fn_stack":
        return "names functions in its metadata"
    return None


def _tree_problem(tree: Mapping[str, Any]) -> str | None:
    if tree["type"] not in TREE_TYPES:
        return f"its inputs or outputs hold the type {str(tree['type'])[:80]!r}"
    return next(filter(None, map(_tree_problem, tree["children_spec"])), None)
