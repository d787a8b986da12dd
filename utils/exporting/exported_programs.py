"""Decides whether a program in an export's files may run here, before any library opens it.

A TorchScript archive is a program: `torch.jit.load` runs `__setstate__` methods, and its operators may write files.
TensorFlow operators in a TFLite file may write files too, and `torch.export.load` unpickles and evaluates parts of its
archive (`program_archives`). State dicts, checkpoints and ONNX files contain only data.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.core.artifacts import read_record, write_json
from utils.core.errors import UserError
from utils.core.workspace import Workspace
from utils.exporting.export_folder import entry_files, file_sha256
from utils.exporting.program_archives import program_problem

TORCHSCRIPT, EXPORTED_PROGRAM = "torchscript", "exported_program"
PROGRAMS = (TORCHSCRIPT, EXPORTED_PROGRAM, "tflite")
"""Formats whose files run only with a recorded digest or --trust."""
REMEDY = "Move it away; earlier exports then need --trust, or to be exported again"
REFUSED_NAMES = {
    "save": "aten::save writes a file",
    "from_file": "aten::from_file maps a file and may write it",
    "rpc_async": "prim::rpc_async calls other processes",
    "rpc_remote": "prim::rpc_remote calls other processes",
    "rpc_sync": "prim::rpc_sync calls other processes",
    "classes": "torch.classes holds C++ classes, which may run any code",
}
"""{name: reason}. `getattr` and methods can also reach operators, so only the name is checked."""
NAME = re.compile(rb"[A-Za-z_][A-Za-z0-9_]*")
OPERATOR = re.compile(rb"ops\.(aten|prim)\.[A-Za-z_][A-Za-z0-9_]*")
"""An operator without a name in `torch`, in TorchScript; other namespaces belong to extensions."""
ATTRIBUTE = re.compile(rb"getattr\([^\"'\\#\n]*, \"[^\"\\\n]*\"\)")
"""An attribute whose name is not an identifier, in TorchScript; without escapes, so that the name can be read."""
RECORD = re.compile(
    r"(?P<code>code/[^.]{1,300}\.py)|code/[^.]{1,300}\.py\.debug_pkl|(?P<pickle>(data|constants|traced_inputs)\.pkl)"
    r"|(data|constants|traced_inputs)/\d{1,9}|byteorder|\.format_version|\.storage_alignment"
    r"|(\.data/)?version|\.data/serialization_id|extra/[^/]{1,300}"
)
"""Records of an archive written by torch 2; older versions store code elsewhere."""


def record_files(workspace: Workspace, name: str, status: Mapping[str, Mapping[str, Any]]) -> None:
    """Record the digests of the files in `status`, {format: entry}, that were just written for the export `name`.

    The record is stored in the workspace, since an export's folder may be copied to other machines.
    """
    digests = _recorded(workspace)
    for entry in status.values():
        digests |= {digest: f"{name}/{file}" for file, digest in (entry.get("files") or {}).items()}
    write_json(workspace.exported_files, {"files": digests})


def require_runnable(
    workspace: Workspace, folder: Path, status: Mapping[str, Mapping[str, Any]], *, trust: bool
) -> None:
    """Raise UserError if the export in `folder` contains a program that may not run here.

    A program may run if the workspace's record has its digest, or with `trust`. A program whose operators access files
    or other processes may never run.
    """
    digests = _recorded(workspace)
    for name in PROGRAMS:
        entry = status.get(name) or {}
        for path in (folder / file for file in entry_files(folder, entry)):
            if name in ARCHIVES and (problem := ARCHIVES[name](path)):
                raise UserError(
                    f"{path}: {problem}; expected operators that only compute. It is never run, not even with --trust. "
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
    """The reason why a TorchScript archive must not be loaded; None if nothing in it accesses files or processes.

    torch's archive reader reads the records, as in `torch.jit.load`; nothing is compiled or unpickled.
    """
    import torch

    try:
        archive = torch._C.PyTorchFileReader(str(path))
        names = archive.get_all_records()
        unknown = [name for name in names if not RECORD.fullmatch(name)]
        # The reader ignores case, so one of two names that differ only in case would not be checked.
        duplicates = [name for name, count in Counter(map(str.casefold, names)).items() if count > 1]
        if unknown:
            return f"it holds {unknown[0]!r}, unknown to TorchScript"
        if duplicates:
            return f"it holds {duplicates[0]!r} twice"
        for name in names:
            match = RECORD.fullmatch(name)
            if match and (match["code"] or match["pickle"]):
                for problem in _problems(archive.get_record(name), is_code=match["code"] is not None):
                    return f"{name}: {problem}"
    except RuntimeError as error:
        return f"it is not a TorchScript archive ({str(error).splitlines()[0]})"
    return None


ARCHIVES: dict[str, Callable[[Path], str | None]] = {
    TORCHSCRIPT: torchscript_problem,
    EXPORTED_PROGRAM: program_problem,
}
"""{format: function that returns the reason why an archive must not be loaded, or None}"""


def _problems(text: bytes, *, is_code: bool) -> Iterator[str]:
    """Reasons why a record must not run; in a pickle, only C++ classes matter, since operators are in the code."""
    for match in NAME.finditer(text):
        name = match[0].decode("ascii")
        if name in REFUSED_NAMES and (is_code or name == "classes"):
            yield REFUSED_NAMES[name]
        if is_code and name == "ops" and not OPERATOR.match(text, match.start()):
            line = text[match.start() :].split(b"\n", 1)[0][:80].decode("ascii", "backslashreplace")
            yield f"{line!r} is an operator of an extension"
        if is_code and name == "getattr" and not ATTRIBUTE.match(text, match.start()):
            yield "getattr of a name that is not a plain string"


def _recorded(workspace: Workspace) -> dict[str, str]:
    """{SHA-256: path of the exported file}"""
    record = read_record(workspace.exported_files, remedy=REMEDY, form={"files": dict})
    return dict(record["files"]) if record else {}
