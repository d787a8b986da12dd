"""What a fresh clone needs before anything else: the environment, the verbs, and the two lists of requirements."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "environment.py"
VERBS = [
    *("help", "setup", "demo", "test", "test-fast", "test-slow", "test-browser", "test-newest"),
    *("test-extras", "test-all"),
    *("crash", "soak", "fuzz", "mutate", "bench", "gpu", "lint", "docs", "wheel", "tflite", "clean-environment"),
]


def requirement_lines(file: str = "requirements.txt") -> list[str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def environment_script():
    spec = importlib.util.spec_from_file_location("environment_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ensurepip(tmp_path_factory) -> Path:
    """A folder with a module in the place of ensurepip, which is slow: it links to the pip that is here."""
    folder, pip = tmp_path_factory.mktemp("ensurepip"), importlib.util.find_spec("pip").submodule_search_locations[0]
    code = f"import os, sysconfig\nos.symlink({pip!r}, os.path.join(sysconfig.get_path('purelib'), 'pip'))\n"
    (folder / "ensurepip.py").write_text(code, encoding="utf-8")
    return folder


def set_up(
    folder: Path, *options: str, python_path: Path | str | None = None, wheels: Path | None = None, check: bool = True
) -> subprocess.CompletedProcess:
    """Run the script for `folder/.venv` and `folder/requirements.txt`, without any package index but `wheels`."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHONPATH"))}
    variables |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    if python_path:
        variables["PYTHONPATH"] = str(python_path)
    if wheels:
        variables["PIP_FIND_LINKS"] = wheels.as_uri()
    command = [sys.executable, SCRIPT, *options, "--environment", folder / ".venv"]
    command += ["--requirements", folder / "requirements.txt"]
    answer = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert not check or answer.returncode == 0, answer.stderr
    return answer


def wheel(folder: Path, name: str, version: str) -> Path:
    """A wheel with one empty module."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", f"version = {version!r}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def inside(folder: Path, code: str) -> str:
    python = folder / ".venv" / "bin" / "python"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


# ---------------------------------------------------------------------------------------------------------------------
# The lists


def test_the_two_lists_of_requirements_are_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = project["optional-dependencies"]
    listed = project["dependencies"] + groups["pretrained"] + groups["test"]
    assert [line.split("#")[0].strip() for line in requirement_lines()] == listed


def test_make_tflite_installs_the_extra_and_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    torch = next(line for line in project["dependencies"] if line.startswith("torch>"))
    listed = [torch, *project["optional-dependencies"]["tflite"]]
    assert [line.split("#")[0].strip() for line in requirement_lines("scripts/requirements-tflite.txt")] == listed


def test_every_requirement_is_a_range_with_its_reason():
    for line in [*requirement_lines(), *requirement_lines("scripts/requirements-tflite.txt")]:
        assert re.fullmatch(r"[a-z0-9-]+>=[0-9.]+,<[0-9.]+ +# \w.{5,}", line), line


def test_the_python_that_is_asked_for_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    least = ".".join(map(str, environment_script().LEAST))
    assert project["requires-python"] == f">={least}"


def test_no_host_index_or_local_build_is_named():
    for name in ("requirements.txt", "pyproject.toml", "Makefile", ".ci/run", "scripts/environment.py"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|--(extra-)?index|--find-links|[=<>][0-9.]+\+cpu", text), name


def test_every_folder_of_the_default_workspace_is_kept_out_of_git():
    settings = (ROOT / "BASE-BACK/src/config/settings.py").read_text(encoding="utf-8")
    folders = set(re.findall(r'BASE_DIR / "([A-Za-z_]+)"', settings)) | {"ensembles", "debug_tmp", "workspaces"}
    assert {"Data", "checkpoints", "deployment_models"} <= folders
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {f"/{name}/" for name in folders} <= set(ignored)


# ---------------------------------------------------------------------------------------------------------------------
# The environment


def test_an_environment_is_made_once_and_follows_its_requirements(tmp_path):
    folder = tmp_path / "my clone"
    folder.mkdir()
    first = wheel(folder, "tiny_one", "1.0")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"tiny_one @ {first.as_uri()}\n", encoding="utf-8")
    made = set_up(folder)
    assert "making .venv with Python" in made.stdout
    assert inside(folder, "import tiny_one; print(tiny_one.version)") == "1.0"
    record = json.loads((folder / ".venv/environment.json").read_text(encoding="utf-8"))
    assert record["state"] == "complete"
    assert record["python"] == f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert re.fullmatch("[0-9a-f]{64}", record["requirements_sha256"])
    assert "include-system-site-packages = false" in (folder / ".venv/pyvenv.cfg").read_text(encoding="utf-8")

    first.unlink()  # a second installation would now fail
    before = {path: path.lstat().st_mtime_ns for path in (folder / ".venv").rglob("*")}
    again = set_up(folder)
    assert again.stdout == "environment: .venv is ready\n"
    assert {path: path.lstat().st_mtime_ns for path in (folder / ".venv").rglob("*")} == before

    second = wheel(folder, "tiny_two", "2.0")
    requirements.write_text(f"tiny_two @ {second.as_uri()}\n", encoding="utf-8")
    assert "making" not in set_up(folder).stdout
    assert inside(folder, "import tiny_one, tiny_two; print(tiny_two.version)") == "2.0"


def test_an_interrupted_environment_is_made_anew(tmp_path, ensurepip):
    environment = tmp_path / ".venv"
    (environment / "lib").mkdir(parents=True)
    (environment / "lib" / "half_a_package.py").touch()
    (environment / "environment.json").write_text('{"state": "installing"}', encoding="utf-8")
    (tmp_path / "requirements.txt").touch()
    answer = set_up(tmp_path, python_path=ensurepip)
    assert "made anew" in answer.stdout
    assert not (environment / "lib" / "half_a_package.py").exists()
    assert inside(tmp_path, "print('runs')") == "runs"


def test_a_record_fits_only_as_a_whole(tmp_path):
    script, requirements, environment = environment_script(), tmp_path / "requirements.txt", tmp_path / ".venv"
    requirements.write_text("numpy>=2\n", encoding="utf-8")
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(sys.executable)
    fits = {
        "state": "complete",
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "requirements_sha256": hashlib.sha256(b"numpy>=2\n").hexdigest(),
    }
    script.write_record(environment, **fits)
    assert script.is_ready(environment, requirements)
    for key, value in (("state", "installing"), ("python", "3.10"), ("requirements_sha256", "0" * 64)):
        script.write_record(environment, **fits | {key: value})
        assert not script.is_ready(environment, requirements), key
    (environment / script.RECORD).write_text(json.dumps(fits)[:20], encoding="utf-8")
    assert script.read_record(environment) == {"state": "installing"}
    script.write_record(environment, **fits)
    (environment / "bin" / "python").unlink()
    assert not script.is_ready(environment, requirements)


def test_a_failed_installation_shows_the_words_of_pip_and_a_remedy_and_stays_unfinished(tmp_path, ensurepip):
    (tmp_path / "requirements.txt").write_text("no-such-package-here>=1\n", encoding="utf-8")
    answer = set_up(tmp_path, python_path=ensurepip, check=False)
    assert answer.returncode == 1
    assert "    ERROR: No matching distribution found for no-such-package-here>=1" in answer.stderr
    assert "GB free here" in answer.stderr
    assert "package index cannot be reached" in answer.stderr
    assert environment_script().read_record(tmp_path / ".venv") == {"state": "installing"}


def test_a_missing_ensurepip_is_answered_with_the_package_to_install(tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in ("ensurepip", "virtualenv", "pip"):
        (hidden / f"{name}.py").write_text(f"raise ImportError('no {name} here')\n", encoding="utf-8")
    (tmp_path / "requirements.txt").touch()
    answer = set_up(tmp_path, python_path=hidden, check=False)
    assert answer.returncode == 1
    assert f"sudo apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv" in answer.stderr
    assert "no pip here" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_folder_that_is_no_environment_is_not_touched(tmp_path):
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "requirements.txt").touch()
    answer = set_up(tmp_path, check=False)
    assert answer.returncode == 1
    assert "was not made by this project" in answer.stderr
    assert [path.name for path in (tmp_path / ".venv").iterdir()] == ["notes.txt"]


def torch_of_the_system(folder: Path, version: str) -> Path:
    """A folder in which torch and torchvision seem to be installed; writes the requirements beside it."""
    for name, release in (("torch", version), ("torchvision", "0.28.0")):
        information = folder / "system" / f"{name}-{release}.dist-info"
        information.mkdir(parents=True)
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n"
        (information / "METADATA").write_text(text, encoding="utf-8")
        (folder / "system" / f"{name}.py").touch()
    (folder / "requirements.txt").write_text("torch>=2.6,<2.15  # so\ntorchvision>=0.21,<0.30\n", encoding="utf-8")
    return folder / "system"


def test_a_suitable_torch_of_the_system_is_used(tmp_path, ensurepip):
    answer = set_up(tmp_path, python_path=f"{torch_of_the_system(tmp_path, '2.13.0+cpu')}{os.pathsep}{ensurepip}")
    assert "this system's torch 2.13.0+cpu and torchvision 0.28.0 are used" in answer.stdout
    assert "include-system-site-packages = true" in (tmp_path / ".venv/pyvenv.cfg").read_text(encoding="utf-8")


@pytest.mark.parametrize("version", ["2.5.1", "2.15.0"])
def test_an_unsuitable_torch_of_the_system_is_shut_out(tmp_path, monkeypatch, version):
    monkeypatch.setenv("PYTHONPATH", str(torch_of_the_system(tmp_path, version)))
    environment_script().create(sys.executable, tmp_path / ".venv", tmp_path / "requirements.txt")
    assert "include-system-site-packages = false" in (tmp_path / ".venv/pyvenv.cfg").read_text(encoding="utf-8")


def test_the_newest_environment_shuts_out_the_system(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(torch_of_the_system(tmp_path, "2.13.0+cpu")))
    environment_script().create(sys.executable, tmp_path / ".venv", tmp_path / "requirements.txt", newest=True)
    assert "include-system-site-packages = false" in (tmp_path / ".venv/pyvenv.cfg").read_text(encoding="utf-8")


def test_the_newest_environment_follows_the_releases_within_the_ranges(tmp_path, ensurepip):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel(wheels, "tiny", "1.0")
    (tmp_path / "requirements.txt").write_text("tiny>=1,<3\n", encoding="utf-8")
    set_up(tmp_path, "--newest", python_path=ensurepip, wheels=wheels)
    assert inside(tmp_path, "import tiny; print(tiny.version)") == "1.0"
    for version in ("2.0", "3.0"):
        wheel(wheels, "tiny", version)
    options = {"python_path": ensurepip, "wheels": wheels}
    assert set_up(tmp_path, **options).stdout == "environment: .venv is ready\n"
    assert "made anew" not in set_up(tmp_path, "--newest", **options).stdout
    assert inside(tmp_path, "import tiny; print(tiny.version)") == "2.0"


@pytest.fixture
def newer_interpreter(tmp_path, monkeypatch):
    """The script, and a python3.99 on PATH that is this interpreter but for the version that it gives."""
    script, folder = environment_script(), tmp_path / "bin"
    folder.mkdir()
    interpreter = folder / "python3.99"
    lines = ("#!/bin/sh", 'if [ "$1" = -I ]; then echo 3.99; exit; fi', f'exec "{sys.executable}" "$@"')
    interpreter.write_text("\n".join(lines) + "\n", encoding="utf-8")
    interpreter.chmod(0o755)
    monkeypatch.setattr(script, "NAMES", ("python3.99", f"python{sys.version_info[0]}.{sys.version_info[1]}"))
    monkeypatch.setenv("PATH", str(folder))
    return script, interpreter


def test_the_newest_interpreter_is_the_running_one_unless_path_has_a_newer_one(newer_interpreter):
    script, interpreter = newer_interpreter
    assert script.choose_interpreter() == sys.executable
    assert script.choose_interpreter(newest=True) == str(interpreter)
    interpreter.write_text("#!/bin/sh\nexit 127\n", encoding="utf-8")
    assert script.choose_interpreter(newest=True) == sys.executable


def test_the_newest_environment_is_made_anew_for_a_newer_interpreter(
    newer_interpreter, ensurepip, tmp_path, capsys, monkeypatch
):
    script, interpreter = newer_interpreter
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PYTHONPATH", str(ensurepip))
    environment, requirements = tmp_path / ".venv", tmp_path / "requirements.txt"
    requirements.touch()
    hidden = interpreter.rename(tmp_path / "hidden")
    script.prepare(environment, requirements, newest=True)
    script.prepare(environment, requirements, newest=True)
    assert "made anew" not in capsys.readouterr().out
    hidden.rename(interpreter)
    script.prepare(environment, requirements, newest=True)
    assert f"made anew\nenvironment: making .venv with Python 3.99 ({interpreter})" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("2.6", True),
        ("2.6.0", True),
        ("2.14.9+cu130", True),
        ("2.9.0a0+145a3a7", True),
        ("2.5.1", False),
        ("2.6.0a0", False),
        ("2.15.0", False),
        ("2.15.0a0", False),
        ("2.15", False),
        ("10.1", False),
        ("main", False),
    ],
)
def test_versions_are_compared_by_number(version, fits):
    assert environment_script().within(version, ">=2.6,<2.15") is fits


def test_an_old_interpreter_looks_for_a_newer_one_that_runs(tmp_path, monkeypatch):
    script = environment_script()
    stand_in = tmp_path / "python3.99"
    stand_in.write_text("#!/bin/sh\necho 'python3.99: command not found' >&2\nexit 127\n", encoding="utf-8")
    stand_in.chmod(0o755)
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    monkeypatch.setattr(script, "LEAST", (99, 0))
    monkeypatch.setattr(script, "NAMES", ("python3.99", name))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        script.SetupError, match=r"Python 99\.0 or newer is needed; .* is 3\.\d+, and none of"
    ) as caught:
        script.choose_interpreter()
    assert "sudo apt install python3" in str(caught.value)
    (tmp_path / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    (tmp_path / name).chmod(0o755)
    assert script.choose_interpreter() == str(tmp_path / name)


# ---------------------------------------------------------------------------------------------------------------------
# The verbs


@pytest.fixture
def clone(tmp_path):
    """The Makefile with scripts that show what they are given."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    folder = tmp_path / "a clone"
    (folder / "scripts").mkdir(parents=True)
    (folder / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    (folder / ".venv" / "bin" / "python").symlink_to(sys.executable)
    show = "import json, sys\nprint(json.dumps(sys.argv))\n"
    for name in ("scripts/environment.py", "ensemble_orchestrator.py"):
        (folder / name).write_text(show, encoding="utf-8")
    return folder


def run_make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Without what a `make` that runs these tests hands on."""
    handed_on = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "DATA", "QUICK", "ARGS", "PYTHON"}
    variables = {name: value for name, value in os.environ.items() if name not in handed_on}
    command = ["make", *arguments, f"PYTHON={sys.executable}"]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


def make(folder: Path, *arguments: str) -> list[str]:
    done = run_make(folder, *arguments)
    done.check_returncode()
    return done.stdout.splitlines()


def test_make_alone_lists_the_verbs(clone):
    listed = [match.group(1) for line in make(clone) if (match := re.match(r"  make ([a-z-]+)  +\w", line))]
    assert listed == VERBS


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], []),
        (["QUICK=1"], ["--quick"]),
        (["QUICK=0"], []),
        (["DATA=/tmp/my leaves"], ["--data", "/tmp/my leaves"]),
        (
            ['DATA=/tmp/it\'s $5 "each"', "QUICK=1", "ARGS=--seed 3"],
            ["--quick", "--data", '/tmp/it\'s $5 "each"', "--seed", "3"],
        ),
        (["DATA=/tmp/$(shell touch canary)`touch canary`"], ["--data", "/tmp/$(shell touch canary)`touch canary`"]),
    ],
)
def test_demo_sets_up_first_and_hands_its_variables_on(clone, arguments, expected):
    environment, demo = map(json.loads, make(clone, "demo", *arguments))
    assert environment == ["scripts/environment.py"]
    assert demo == ["ensemble_orchestrator.py", "demo", *expected]
    assert not (clone / "canary").exists()


def shows_its_arguments(path: Path, name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(f'#!/bin/sh\necho {name} "$@"\n', encoding="utf-8")
    path.chmod(0o755)


def test_the_newest_environment_is_brought_up_to_date_and_runs_the_fast_tests(clone):
    shows_its_arguments(clone / ".venv-newest" / "bin" / "python", "newest")
    shows_its_arguments(clone / ".venv" / "bin" / "python", "usual")
    environment, tests = make(clone, "test-newest", "ARGS=-k export")
    assert json.loads(environment) == ["scripts/environment.py", "--newest", "--environment", ".venv-newest"]
    usual = make(clone, "test", "ARGS=-k export")[-1]
    assert usual.startswith("usual -m pytest ")
    assert tests == usual.replace("usual", "newest")


def test_test_all_runs_every_kind_of_test_one_after_another(clone):
    shows_its_arguments(clone / ".venv-newest" / "bin" / "python", "newest")
    shows_its_arguments(clone / ".venv" / "bin" / "python", "usual")
    shows_its_arguments(clone / "scripts" / "chromium.sh", "chromium")
    lines = [line for line in make(clone, "test-all", "-j4") if not line.startswith("[")]
    fast, slow, chromium, browser, newest, extras = lines
    assert extras.strip() == "usual tests/extras/run.py"
    assert fast == newest.replace("newest", "usual")
    assert (chromium, slow.split(" -m ")[-1].strip(), browser.split(" -m ")[-1].strip()) == (
        "chromium",
        "slow",
        "browser",
    )


@pytest.mark.parametrize(("failing", "code"), [("", 0), ("pytest", 2), ("gpu.py", 2)])
def test_gpu_runs_the_tests_that_need_one_and_then_the_benchmark(clone, failing, code):
    shows_its_arguments(clone / ".venv" / "bin" / "python", "usual")
    with (clone / ".venv" / "bin" / "python").open("a", encoding="utf-8") as file:
        file.write(f'case "$*" in *"{failing or "nothing"}"*) exit 1;; esac\n')
    done = run_make(clone, "gpu", "QUICK=1", "ARGS=--device cpu")
    assert done.returncode == code
    environment, tests, benchmark = done.stdout.splitlines()
    assert json.loads(environment) == ["scripts/environment.py"]
    assert tests == "usual -m pytest -q -rs -m gpu"
    assert benchmark == "usual benchmarks/gpu.py --quick --device cpu"


def test_clean_environment_removes_the_environments_alone(clone):
    shows_its_arguments(clone / ".venv-newest" / "bin" / "python", "newest")
    make(clone, "clean-environment")
    assert sorted(path.name for path in clone.iterdir()) == ["Makefile", "ensemble_orchestrator.py", "scripts"]
