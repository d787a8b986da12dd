"""The installable package: what it holds, and what its commands do beside a user's own modules."""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import PROJECT, write_digits

import ensemble_system
from utils.core import program_names

pytest.importorskip("hatchling")
INSIDE = "ensemble_system/project/"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_it_holds_the_files_of_the_project_that_git_knows_and_no_others(wheel):
    if not (PROJECT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no git repository")
    parts = ["BASE-BACK/src", "configs", "ensemble_orchestrator.py", "ensemble_system", "utils"]
    listed = subprocess.run(["git", "ls-files", *parts], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert sorted(name.removeprefix(INSIDE) for name in names) == sorted(listed.splitlines())
    assert all(name.startswith("ensemble_system/") for name in names)


def test_its_version_is_that_of_the_package_and_of_the_list_of_changes(wheel):
    version = ensemble_system.__version__
    assert wheel.name.startswith(f"ensemble_system-{version}-")
    assert f"version: {version}\n" in (PROJECT / "CITATION.cff").read_text(encoding="utf-8")
    assert tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dynamic"] == ["version"]


def test_only_an_installed_package_shows_its_own_commands(monkeypatch):
    text = "next: python ensemble_orchestrator.py evaluate; my_ensemble_orchestrator.py; make demo DATA=..."
    assert program_names.as_typed(text) == text
    monkeypatch.setattr(program_names, "INSTALLED", True)
    assert program_names.as_typed(text) == (
        "next: ensemble-system evaluate; my_ensemble_orchestrator.py; ensemble-system demo --data ..."
    )
    main = f"python {PROJECT}/BASE-BACK/src/main.py --stages split"
    assert program_names.as_typed(main) == "ensemble-system-train --stages split"


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Run a command of the package, installed read-only into an environment that sees this one's requirements alone."""
    folder = tmp_path_factory.mktemp("installed")
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, capture_output=True)
    python = str(environment / "bin" / "python")
    packages = Path(
        subprocess.run(
            [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    (packages / "requirements.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--ignore-installed", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    package = packages / "ensemble_system"
    files = [package, *package.rglob("*")]
    for path in files:
        path.chmod(0o555 if path.is_dir() else 0o444)
    place = folder / "work"
    place.mkdir()
    for name in ("utils", "config", "models"):  # a user's own modules, which nobody of ours may run
        (place / f"{name}.py").write_text("raise SystemExit('a module of the user was imported')\n", encoding="utf-8")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("DBT_")}

    def run(program: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [str(environment / "bin" / program), *words]
        return subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True, check=False)

    run.place = place
    yield run
    assert sorted(package.rglob("*")) == sorted(files[1:])
    for path in files:
        path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.slow
def test_the_commands_show_help_and_version_with_their_own_names(installed):
    for command in (["ensemble-system"], ["python", "-m", "ensemble_system"]):
        shown = installed(*command, "--help")
        assert shown.returncode == 0, shown.stderr
        assert "usage: ensemble-system [-h]" in shown.stdout
        assert "ensemble_orchestrator.py" not in shown.stdout
        assert installed(*command, "--version").stdout == f"ensemble-system {ensemble_system.__version__}\n"
    training = installed("ensemble-system-train", "--help").stdout
    assert "usage: ensemble-system-train [-h]" in training
    assert "main.py" not in training
    assert "COMPREPLY" in installed("ensemble-system", "completion", "bash").stdout


@pytest.mark.slow
def test_the_working_directory_is_the_workspace_and_hints_name_the_command(installed):
    done = installed("ensemble-system", "evaluate")
    assert done.returncode == 1
    assert "ensemble-system-train" in done.stderr or "ensemble-system discover" in done.stderr
    assert str(installed.place) in done.stderr
    assert "ensemble_orchestrator.py" not in done.stderr.replace("ensemble_orchestrator.log", "")


@pytest.mark.slow
def test_the_quick_demo_and_an_exported_file_that_predicts(installed):
    images = write_digits(installed.place / "digits", (0, 1, 2), 20)
    demo = installed("ensemble-system", "demo", "--quick", "--data", str(images), "--workspace", "work", "--json")
    assert demo.returncode in (0, 4), demo.stderr
    assert Path(json.loads(demo.stdout)["report"]).is_file()
    assert re.search(r"^\$ ensemble-system pipeline", demo.stderr, re.MULTILINE)
    exported = next((installed.place / "work" / "deployment_models").glob("*/onnx/*.onnx"))
    done = installed("ensemble-system", "predict", "--from-export", str(exported), str(images / "0"), "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["images"]) == 20
