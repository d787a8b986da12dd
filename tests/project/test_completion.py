"""`completion`: a script that the shell itself accepts and that completes commands and options."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from in_process import run

ASK = "COMP_WORDS=({words}); COMP_CWORD={last}; _shtab_ensemble_system; printf '%s\\n' \"${{COMPREPLY[@]}}\""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    done = run("completion", "bash")
    assert done.code == 0, done.stderr
    file = tmp_path_factory.mktemp("completion") / "ensemble-system"
    file.write_text(done.stdout, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("ensemble-system build", {"build-ensemble"}),
        ("ensemble-system predict --from", {"--from-export"}),
        ("ensemble-system completion z", {"zsh"}),
    ],
)
def test_bash_completes_commands_options_and_values(script, words, expected):
    ask = ASK.format(words=words, last=len(words.split()) - 1)
    answer = subprocess.run(["bash", "-c", f". {script}; {ask}"], capture_output=True, text=True, check=True)
    assert set(answer.stdout.split()) == expected, answer.stderr


def test_the_document_holds_the_script(script):
    document = run("completion", "bash", "--json").document
    assert document["shell"] == "bash"
    assert document["script"] == script.read_text(encoding="utf-8").rstrip("\n")


def test_zsh_reads_its_script(tmp_path):
    done = run("completion", "zsh")
    assert done.stdout.startswith("#compdef ensemble-system")
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    (tmp_path / "_ensemble-system").write_text(done.stdout, encoding="utf-8")
    subprocess.run(["zsh", "-n", str(tmp_path / "_ensemble-system")], check=True)
