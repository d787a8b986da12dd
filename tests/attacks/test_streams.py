"""Standard streams that are closed, full, broken, or of another encoding: results are kept, and nothing is a bug."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT
from hostile_onnx import valid
from in_process import run
from PIL import Image

NAME = "na\u00efve \u65e5\u672c.png"
ESCAPES = "red\x1b[31m\x9b2J\u202egnp.png"
PROGRAM = [sys.executable, str(PROJECT / "ensemble_orchestrator.py")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    valid(folder / "model.onnx")
    for name in (NAME, ESCAPES):
        (folder / name[:3]).mkdir()
        Image.fromarray(np.zeros((9, 9, 3), dtype=np.uint8)).save(folder / name[:3] / name)
    (folder / "workspace").mkdir()
    return folder


def started(words, stdout, **options):
    """A run in a process of its own, since the streams of this one belong to pytest."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DBT_")}
    environment |= {"PYTHONWARNINGS": "error", **options.pop("environment", {})}
    done = subprocess.run(
        [*PROGRAM, *map(str, words)], stdout=stdout, stderr=subprocess.PIPE, env=environment, check=False, **options
    )
    text = done.stderr.decode("utf-8", "replace")
    assert "Traceback" not in text
    assert "Exception ignored" not in text
    return done.returncode, text, done.stdout


HELP = ("predict", "--help")
STATUS = ("status", "--workspace", "{folder}/workspace")
PREDICT = ("predict", "--from-export", "{folder}/model.onnx", "{folder}/na\u00ef", "--json")
COMMANDS = {"help": HELP, "status": STATUS, "predict": PREDICT}


def words(command, folder):
    return [word.replace("{folder}", str(folder)) for word in COMMANDS[command]]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_reader_that_has_gone_away_is_no_error(folder, command):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        code, text, _ = started(words(command, folder), writing)
    finally:
        os.close(writing)
    assert code == 0
    assert "Broken pipe" not in text


@pytest.mark.parametrize("command", ["status", "predict"])
def test_a_full_disk_below_standard_output_is_an_error_with_its_remedy(folder, command):
    with Path("/dev/full").open("wb") as full:
        code, text, _ = started(words(command, folder), full)
    assert code == 1
    assert "standard output: cannot be written (No space left on device)" in text
    assert "run it again with its output elsewhere" in text


@pytest.mark.parametrize("descriptor", ["1", "2"])
@pytest.mark.parametrize("command", ["status", "predict"])
def test_a_closed_stream_is_nobody_s(folder, command, descriptor):
    line = ["sh", "-c", f'exec "$@" {descriptor}>&-', "sh", *PROGRAM, *words(command, folder)]
    done = subprocess.run(line, capture_output=True, check=False)
    assert done.returncode == 0
    assert b"Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_that_the_terminal_lacks_are_written_out(folder, encoding):
    line = ("predict", "--from-export", folder / "model.onnx", folder / "na\u00ef")
    code, _, output = started(line, subprocess.PIPE, environment={"PYTHONIOENCODING": encoding})
    assert code == 0
    assert NAME.encode(encoding, "backslashreplace") in output


def test_names_do_not_command_the_terminal(folder, tmp_path):
    (tmp_path / "\x1b[2Jempty").mkdir()
    runs = [
        run("predict", "--from-export", folder / "model.onnx", folder / "red", tmp_path / "\x1b[2Jempty"),
        run("predict", "--from-export", folder / "\x1b[31mmodel.onnx", folder / "red"),
        run("predict", "--from-export", folder / "model.onnx", folder / "red", "--to", tmp_path / "\x1b[31m.csv"),
        run("status", "--workspace", tmp_path / "\x1b[2Jempty"),
        run("import-predictions", "--from", tmp_path / "\x1b[2Jnowhere", workspace=tmp_path / "\x1b[2Jempty"),
        run("discover", "--config", tmp_path / "\x1b[2J.yaml"),
        run("discover", "--\x1b[2J"),
    ]
    assert [done.code for done in runs] == [4, 1, 0, 0, 1, 2, 2]
    for done in runs:
        shown = done.stdout + done.stderr
        assert not set(shown) & {"\x1b", "\x9b", "\u202e"}
        assert "\\x1b[" in shown
    assert ESCAPES in (tmp_path / "\x1b[31m.csv").read_text()  # a file keeps the names, by which it is joined


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device here")
@pytest.mark.parametrize(("output", "code"), [("full", 1), ("broken", 0)])
def test_the_delivered_program_ends_in_words(folder, output, code):
    program = PROJECT / "utils" / "inference" / "onnx_prediction.py"
    words = [sys.executable, str(program), str(folder / NAME[:3]), "--model", str(folder / "model.onnx")]
    if output == "full":
        stdout = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, stdout = os.pipe()
        os.close(reader)
    done = subprocess.run(words, stdout=stdout, stderr=subprocess.PIPE, check=False)
    os.close(stdout)
    stderr = done.stderr.decode()
    assert done.returncode == code, stderr
    assert "Traceback" not in stderr
    assert ("standard output cannot be written" in stderr) == (output == "full")
