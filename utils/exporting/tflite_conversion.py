"""A network as a TFLite file: converted by litert-torch in a process of its own, under limits of time and memory.

    python tflite_conversion.py PROGRAM.pt2 FILE.tflite BYTES

The tools are optional and heavy, so they may live in an environment of their own, which DBT_TFLITE_PYTHON names. What
is handed over is a traced program, so that the other environment needs torch and litert-torch, and nothing of ours.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

PYTHON_VARIABLE = "DBT_TFLITE_PYTHON"
INSTALL = (
    "python3 -m venv tflite-env && tflite-env/bin/pip install torch litert-torch, then name it: "
    f"export {PYTHON_VARIABLE}=$PWD/tflite-env/bin/python"
)
CONVERTER, INTERPRETERS = "litert_torch", ("ai_edge_litert", "tensorflow")
TIMEOUT_SECONDS = 1800.0
MEMORY_FRACTION = 0.8


class ConversionError(Exception):
    """The converter crashed, hung or ran out of memory; the text is the end of what it said."""


def python_interpreter() -> str:
    """The Python that has the tools: the one that DBT_TFLITE_PYTHON names, else this one."""
    return os.environ.get(PYTHON_VARIABLE) or sys.executable


def missing_tools() -> str | None:
    """Why TFLite cannot be written here, with the line that installs what lacks; None where it can."""
    python = python_interpreter()
    if python == sys.executable:
        found = {name for name in (CONVERTER, *INTERPRETERS) if importlib.util.find_spec(name)}
    else:
        code = f"import importlib.util as u; print([n for n in {(CONVERTER, *INTERPRETERS)!r} if u.find_spec(n)])"
        try:
            done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{PYTHON_VARIABLE} {python}: cannot be run ({error}). {INSTALL}"
        found = {name for name in (CONVERTER, *INTERPRETERS) if f"'{name}'" in done.stdout}
    lacking = [
        *([CONVERTER] if CONVERTER not in found else []),
        *([] if found & set(INTERPRETERS) else INTERPRETERS[:1]),
    ]
    return f"{' and '.join(lacking)} not installed for {python}. Install: {INSTALL}" if lacking else None


def convert_network(
    network: nn.Module,
    sample: Tensor,
    path: Path,
    scratch: Path,
    *,
    seconds: float = TIMEOUT_SECONDS,
) -> None:
    """Write `path` from the network, traced on one `sample`; `scratch` is a folder for what goes over.

    Raises ConversionFailed with the last lines of the converter where it fails, hangs or is killed.
    """
    import torch

    scratch.mkdir(parents=True, exist_ok=True)
    program = scratch / "program.pt2"
    with torch.no_grad():
        torch.export.save(torch.export.export(network, (sample,)), program)
    memory = int(MEMORY_FRACTION * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    code = f"import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path({__file__!r}, run_name='__main__')"
    command = [python_interpreter(), "-c", code, Path(__file__).name, str(program), str(path), str(memory)]
    log = scratch / "converter.log"
    with log.open("wb") as said:
        process = subprocess.Popen(command, cwd=scratch, stdout=said, stderr=subprocess.STDOUT)
        try:
            code_of_end = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise ConversionError(f"the converter did not end within {seconds:.0f} s: {_end(log)}") from error
        finally:
            process.kill()
            process.wait()
            program.unlink(missing_ok=True)
    if code_of_end != 0 or not path.is_file():
        raise ConversionError(f"the converter ended with {code_of_end}: {_end(log)}")


def _end(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-6:]) or "it said nothing"


def main(program: str, path: str, memory: str) -> None:
    """Convert, in the process that has the tools."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (int(memory), int(memory)))
    import litert_torch
    import torch

    given = torch.export.load(program)
    (sample,), _ = given.example_inputs
    litert_torch.convert(given.module(), (sample,)).export(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
