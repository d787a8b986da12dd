"""Conversion of a network to a TFLite file with litert-torch, in a subprocess with limits on time and memory.

    python tflite_conversion.py PROGRAM.pt2 FILE.tflite BYTES

The tools are optional and large, so they may be in a separate environment: that of the interpreter in
DBT_TFLITE_PYTHON, or `.venv-tflite`, which `make tflite` creates. The network is passed as a traced program, so that
this environment needs only torch and the tools.
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
ENVIRONMENT = Path(__file__).resolve().parents[2] / ".venv-tflite"
"""Environment that `make tflite` creates in a clone."""
INSTALL = "make tflite"
CONVERTER, INTERPRETERS = "litert_torch", ("ai_edge_litert", "tensorflow")
TIMEOUT_SECONDS = 1800.0
MEMORY_FRACTION = 0.8


class ConversionError(Exception):
    """The converter failed, timed out or ran out of memory; the message ends with the last lines of its output."""


def python_interpreter() -> str:
    """The interpreter with the tools: that of DBT_TFLITE_PYTHON, else of `.venv-tflite` if it exists, else this one."""
    interpreter = ENVIRONMENT / "bin" / "python"
    return os.environ.get(PYTHON_VARIABLE) or (str(interpreter) if interpreter.is_file() else sys.executable)


def missing_tools() -> str | None:
    """The reason why TFLite files cannot be written here, with the command that installs the tools, or None."""
    python = python_interpreter()
    if python == sys.executable:
        installed = {name for name in (CONVERTER, *INTERPRETERS) if importlib.util.find_spec(name)}
    else:
        code = f"import importlib.util as u; print([n for n in {(CONVERTER, *INTERPRETERS)!r} if u.find_spec(n)])"
        try:
            process = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{PYTHON_VARIABLE} {python}: cannot be run ({error}). Install: {INSTALL}"
        installed = {name for name in (CONVERTER, *INTERPRETERS) if f"'{name}'" in process.stdout}
    missing = [
        *([CONVERTER] if CONVERTER not in installed else []),
        *([] if installed & set(INTERPRETERS) else INTERPRETERS[:1]),
    ]
    return f"{' and '.join(missing)} not installed for {python}. Install: {INSTALL}" if missing else None


def convert_network(
    network: nn.Module,
    sample: tuple[Tensor, ...],
    path: Path,
    scratch: Path,
    *,
    seconds: float = TIMEOUT_SECONDS,
) -> None:
    """Convert the network, traced on one `sample` of its inputs, to the file `path`.

    `scratch` is a folder for temporary files. Raises ConversionError with the last lines of the converter's output if
    it fails, exceeds `seconds` or is killed.
    """
    import torch

    from utils.core import subprocesses  # imported here, since the interpreter with the tools lacks this project

    scratch.mkdir(parents=True, exist_ok=True)
    program = scratch / "program.pt2"
    with torch.no_grad():
        torch.export.save(torch.export.export(network, sample), program)
    memory = int(MEMORY_FRACTION * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    command = subprocesses.script_command(python_interpreter(), __file__, str(program), str(path), str(memory))
    environment = subprocesses.watching_environment(os.environ)
    log = scratch / "converter.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=scratch, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            exit_code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise ConversionError(f"the converter did not end within {seconds:.0f} s: {_last_lines(log)}") from error
        finally:
            process.kill()
            process.wait()
            program.unlink(missing_ok=True)
    if exit_code != 0 or not path.is_file():
        raise ConversionError(f"the converter ended with {exit_code}: {_last_lines(log)}")


def _last_lines(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-6:]) or "no output"


def main(program: str, path: str, memory: str) -> None:
    """Convert `program` to `path` with at most `memory` bytes; run by the interpreter with the tools."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (int(memory), int(memory)))
    import litert_torch
    import torch

    exported = torch.export.load(program)
    sample, _ = exported.example_inputs
    litert_torch.convert(exported.module(), sample).export(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
