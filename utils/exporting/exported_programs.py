"""Programs in an export's files: whether one may run here, decided before any library opens it.

A TorchScript archive is a program: `torch.jit.load` runs `__setstate__` methods, and its operators may write files. A
TFLite file may hold TensorFlow's operators, which may as well. State dicts, checkpoints and ONNX files hold data.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.core.artifacts import read_record, write_json
from utils.core.errors import UserError
from utils.core.workspace import Workspace
from utils.exporting.export_folder import entry_files, file_sha256

TORCHSCRIPT = "torchscript"
PROGRAMS = (TORCHSCRIPT, "tflite")
"""Formats whose files run only with a recorded digest or --trust."""
REMEDY = "Move it away; exports made before then need --trust, or to be exported again"
REFUSED_NAMES = {
    "save": "aten::save writes a file",
    "from_file": "aten::from_file maps a file and may write it",
    "rpc_async": "prim::rpc_async calls other processes",
    "rpc_remote": "prim::rpc_remote calls other processes",
    "rpc_sync": "prim::rpc_sync calls other processes",
    "classes": "torch.classes holds C++ classes, which may do anything",
}
"""{name: reason}. `getattr` and methods reach operators as well, so the name alone decides."""
NAME = re.compile(rb"[A-Za-z_][A-Za-z0-9_]*")
OPERATOR = re.compile(rb"ops\.(aten|prim)\.[A-Za-z_][A-Za-z0-9_]*")
"""How TorchScript writes an operator that has no name in `torch`; other namespaces belong to extensions."""
ATTRIBUTE = re.compile(rb"getattr\([^\"'\\#\n]*, \"[^\"\\\n]*\"\)")
"""How it writes an attribute whose name is no identifier; without escapes, so that the name can be read."""
RECORD = re.compile(
    r"(?P<code>code/[^.]{1,300}\.py)|code/[^.]{1,300}\.py\.debug_pkl|(?P<pickle>(data|constants|traced_inputs)\.pkl)"
    r"|(data|constants|traced_inputs)/\d{1,9}|byteorder|\.format_version|\.storage_alignment"
    r"|(\.data/)?version|\.data/serialization_id|extra/[^/]{1,300}"
)
"""Records of an archive as torch 2 writes them; older forms keep code elsewhere."""


def record_files(workspace: Workspace, name: str, status: Mapping[str, Mapping[str, Any]]) -> None:
    """Add the digests of the files that this workspace has just written for the export `name`.

    `status` {format: entry}. The record lies in the workspace, not in the export's folder, which travels.
    """
    digests = _recorded(workspace)
    for entry in status.values():
        digests |= {digest: f"{name}/{file}" for file, digest in (entry.get("files") or {}).items()}
    write_json(workspace.exported_files, {"files": digests})


def require_runnable(
    workspace: Workspace, folder: Path, status: Mapping[str, Mapping[str, Any]], *, trust: bool
) -> None:
    """Raise UserError where the export in `folder` holds a program that may not run here.

    A program runs when the workspace's record has its digest, or with `trust`. One whose operators touch files or other
    processes runs in neither case.
    """
    digests = _recorded(workspace)
    for name in PROGRAMS:
        entry = status.get(name) or {}
        for path in (folder / file for file in entry_files(folder, entry)):
            if name == TORCHSCRIPT and (problem := torchscript_problem(path)):
                raise UserError(
                    f"{path}: {problem}; expected operators that only compute. It is not run, not even with --trust. "
                    "Remove the folder, or export the ensemble again with --force"
                )
            digest = file_sha256(path)
            if not trust and digest not in digests:
                raise UserError(
                    f"{path}: a program with SHA-256 {digest}, which {workspace.exported_files} does not list; "
                    "expected a file that this workspace exported. Export it again with --force, or, if you trust "
                    "whoever wrote it, type: python ensemble_orchestrator.py export --verify "
                    f"{shlex.quote(str(folder))} --trust"
                )


def torchscript_problem(path: Path) -> str | None:
    """Why a TorchScript archive must not be loaded; None where nothing in it reaches files or other processes.

    The records are read by torch's own archive reader, so that what is checked is what `torch.jit.load` would get;
    nothing is compiled and nothing is unpickled.
    """
    import torch

    try:
        archive = torch._C.PyTorchFileReader(str(path))
        names = archive.get_all_records()
        foreign = [name for name in names if not RECORD.fullmatch(name)]
        # The reader finds records whatever their case, so two such names could hide one another.
        doubled = [name for name, count in Counter(map(str.casefold, names)).items() if count > 1]
        if foreign or doubled:
            return f"it holds {foreign[0]!r}, unknown to TorchScript" if foreign else f"it holds {doubled[0]!r} twice"
        for name in names:
            match = RECORD.fullmatch(name)
            if match and (match["code"] or match["pickle"]):
                for problem in _problems(archive.get_record(name), is_code=match["code"] is not None):
                    return f"{name}: {problem}"
    except RuntimeError as error:
        return f"it is no TorchScript archive ({str(error).splitlines()[0]})"
    return None


def _problems(text: bytes, *, is_code: bool) -> Iterator[str]:
    """What a record names that must not run; of a pickle only the C++ classes, since all else comes from the code."""
    for match in NAME.finditer(text):
        name = match[0].decode("ascii")
        if name in REFUSED_NAMES and (is_code or name == "classes"):
            yield REFUSED_NAMES[name]
        if is_code and name == "ops" and not OPERATOR.match(text, match.start()):
            line = text[match.start() :].split(b"\n", 1)[0][:80].decode("ascii", "backslashreplace")
            yield f"{line!r} is an operator of an extension"
        if is_code and name == "getattr" and not ATTRIBUTE.match(text, match.start()):
            yield "getattr of a name that is not written out"


def _recorded(workspace: Workspace) -> dict[str, str]:
    """{SHA-256: the file that was exported}"""
    found = read_record(workspace.exported_files, remedy=REMEDY, form={"files": dict})
    return dict(found["files"]) if found else {}
