"""Make the project's own Python environment, or say at once that it is ready.

    python3 scripts/environment.py [--environment DIR] [--requirements FILE] [--newest]

Standard library only, and written for Python 3.7 or newer, so that an old interpreter can still say what is missing.
The environment holds a record of what it was made from. A record that fits means nothing to do; a record that says
`installing` belongs to a run that was interrupted, and that environment is made anew.

With `--newest` it is what a fresh machine gets today: the newest interpreter here, no package of the system, and the
newest release of everything within its range, which the package index is asked for every time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEAST = (3, 11)
NAMES = ("python3.14", "python3.13", "python3.12", "python3.11")
RECORD = "environment.json"
LARGE = ("torch", "torchvision")  # gigabytes: taken from the system where it has suitable ones

VERSION_PROBE = "import sys; print('%d.%d' % sys.version_info[:2])"
PACKAGE_PROBE = """
import importlib.metadata, importlib.util, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name) if importlib.util.find_spec(name) else None
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""
REMEDIES = (
    (
        r"no space left|errno 28|disk quota",
        "The disk is full. Free some gigabytes (torch with its CUDA libraries takes up to 8 GB) and run the same "
        "command again.",
    ),
    (
        r"retrying|connection|timed? ?out|name resolution|unreachable|ssl|proxy",
        "The package index did not answer. Check the network and, where one is needed, the proxy, then run the same "
        "command again; what was downloaded is kept.",
    ),
    (
        r"no matching distribution|requires-python|requires a different python",
        "No release fits: either the package index cannot be reached, or a package has none for this Python yet. "
        "Another interpreter can be named: make clean-environment setup PYTHON=python3.12",
    ),
)
OTHER_REMEDY = (
    "Check the network and the free disk space, then run the same command again; "
    "`make clean-environment` starts from nothing."
)


class SetupError(Exception):
    """The environment cannot be made; the text says what was tried and what to do."""


def say(text: str) -> None:
    print(f"environment: {text}", flush=True)


def quiet(command: list[str]) -> subprocess.CompletedProcess:
    """Run `command` and keep its output; one that cannot be started counts as failed (127)."""
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, stdout=str(error))


def version_of(python: str) -> str | None:
    """`3.13` for an interpreter that runs, None for one that does not (a broken link, another tool's stand-in)."""
    answer = quiet([python, "-I", "-S", "-c", VERSION_PROBE])
    return answer.stdout.strip() if answer.returncode == 0 else None


def choose_interpreter(newest: bool = False) -> str:
    """The running interpreter if it is new enough, else the newest suitable one on PATH.

    With `newest` the running interpreter is chosen only where PATH has no newer one.
    """
    running = sys.version_info[:2]
    if running >= LEAST and not newest:
        return sys.executable
    for name in NAMES:
        version = name[len("python") :]
        if running >= LEAST and tuple(map(int, version.split("."))) <= running:
            return sys.executable
        path = shutil.which(name)
        # A name on PATH proves little: version managers leave stand-ins for versions that are switched off.
        if path and version_of(path) == version:
            return path
    raise SetupError(
        f"Python {LEAST[0]}.{LEAST[1]} or newer is needed; {sys.executable} is "
        f"{sys.version_info[0]}.{sys.version_info[1]}, and none of {', '.join(NAMES)} on PATH runs. "
        "On Debian or Ubuntu: sudo apt install python3.12 python3.12-venv (see which versions `apt-cache search "
        "'^python3\\.[0-9]+$'` offers), or name another one: make setup PYTHON=/path/to/python3"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The record


def requirements_digest(requirements: Path) -> str:
    return hashlib.sha256(requirements.read_bytes()).hexdigest()


def read_record(environment: Path) -> dict | None:
    """What the environment was made from; None where this script has not made it."""
    try:
        return json.loads((environment / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {"state": "installing"}


def write_record(environment: Path, **record: str) -> None:
    temporary = environment / (RECORD + ".partial")
    temporary.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(environment / RECORD)


def is_ready(environment: Path, requirements: Path) -> bool:
    """True when the record is complete, the requirements are the same and the interpreter still is the recorded one.

    The interpreter is asked, not assumed: an upgrade of the system can put another version behind the same link.
    Only major.minor counts, as packages survive a patch release.
    """
    record = read_record(environment) or {}
    return (
        record.get("state") == "complete"
        and record.get("requirements_sha256") == requirements_digest(requirements)
        and record.get("python") == version_of(str(environment / "bin" / "python"))
    )


# ---------------------------------------------------------------------------------------------------------------------
# A torch that the system has


def ranges(requirements: Path) -> dict[str, str]:
    """Package name in lower case -> its version range as written, comments dropped."""
    found = {}
    for line in requirements.read_text(encoding="utf-8").splitlines():
        match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*([<>=!][^#;]*)?", line)
        if match:
            found[match.group(1).lower()] = (match.group(2) or "").strip()
    return found


def within(version: str, wanted: str) -> bool:
    """True when a version such as `2.13.0+cpu` lies in a range such as `>=2.6,<2.15`.

    Local parts (`+cpu`) do not count; a pre-release (`2.6.0a0`) lies below its release.
    """
    parsed = re.match(r"(\d+(?:\.\d+)*)(.*)", version)
    if not parsed:
        return False
    before_release = re.match(r"\.?(a|b|rc|dev)", parsed.group(2)) is not None

    def key(text: str, pre: bool = False) -> tuple:
        numbers = [int(part) for part in text.split(".")]
        return (*numbers, *[0] * (6 - len(numbers)), 0 if pre else 1)

    have = key(parsed.group(1), before_release)
    for operator, bound in re.findall(r"(>=|<=|==|!=|<|>)\s*(\d+(?:\.\d+)*)", wanted):
        limit = key(bound)
        if operator == "<" and not have[:-1] < limit[:-1]:
            return False
        fits = {">=": have >= limit, "<=": have <= limit, "==": have == limit, "!=": have != limit, ">": have > limit}
        if not fits.get(operator, True):
            return False
    return True


def suitable_on_system(python: str, requirements: Path) -> dict[str, str]:
    """Versions of the large packages as `python` sees them; empty unless all are there and within their ranges."""
    wanted = ranges(requirements)
    if not set(LARGE) <= set(wanted):
        return {}
    answer = quiet([python, "-c", PACKAGE_PROBE, *LARGE])
    if answer.returncode:
        return {}
    found = json.loads(answer.stdout.splitlines()[-1])
    return found if all(found[name] and within(found[name], wanted[name]) for name in LARGE) else {}


# ---------------------------------------------------------------------------------------------------------------------
# Making and filling


def create(python: str, environment: Path, requirements: Path, newest: bool = False) -> None:
    """An environment without pip; it sees the system's packages only where the system's torch is suitable.

    With `newest` it never sees them.
    """
    inside = str(environment / "bin" / "python")
    bare = [python, "-m", "venv", "--without-pip"]
    # The environment itself is asked what it sees: for an interpreter that already lives in an environment, or with
    # folders of its own, that differs from what the interpreter sees.
    for options in [[]] if newest else [["--system-site-packages"], []]:
        answer = quiet([*bare, *options, str(environment)])
        if answer.returncode:
            raise SetupError(f"{python} -m venv failed:\n{answer.stdout.strip()}\n{venv_remedy(python)}")
        shared = suitable_on_system(inside, requirements) if options else {}
        if shared:
            say("this system's " + " and ".join(f"{name} {shared[name]}" for name in LARGE) + " are used")
            return


def venv_remedy(python: str) -> str:
    return f"On Debian or Ubuntu: sudo apt install python{version_of(python)}-venv   then run the same command again."


def add_pip(python: str, environment: Path) -> None:
    """Pip inside the environment: by ensurepip, else by virtualenv, else by the system's pip, else an error."""
    inside = str(environment / "bin" / "python")
    if quiet([inside, "-m", "pip", "--version"]).returncode == 0:
        return
    if quiet([inside, "-m", "ensurepip", "--upgrade", "--default-pip"]).returncode == 0:
        return
    config = (environment / "pyvenv.cfg").read_text(encoding="utf-8")
    shared = ["--system-site-packages"] if re.search(r"include-system-site-packages\s*=\s*true", config) else []
    if quiet([python, "-m", "virtualenv", *shared, str(environment)]).returncode == 0:
        return
    answer = quiet([python, "-m", "pip", "--python", inside, "install", "--quiet", "pip"])
    if answer.returncode == 0:
        return
    raise SetupError(
        f"{python} has no ensurepip (Debian and Ubuntu keep it in a package of its own), no virtualenv, "
        f"and no pip that could stand in ({(answer.stdout.strip().splitlines() or ['no output'])[-1]}).\n"
        + venv_remedy(python)
    )


def install(environment: Path, requirements: Path, newest: bool = False) -> None:
    """Pip with its own progress on the screen; its last error lines and a remedy when it fails.

    With `newest` a release that is there already gives way to a newer one.
    """
    command = [str(environment / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    command += ["--no-input", *(["--upgrade", "--upgrade-strategy", "eager"] if newest else [])]
    command += ["-r", str(requirements)]
    last: deque[str] = deque(maxlen=12)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as pip:
        for line in pip.stderr or ():
            sys.stderr.write(line)
            sys.stderr.flush()
            last.append(line.rstrip())
    if pip.returncode == 0:
        return
    words = "\n".join(last)
    remedy = next((text for signs, text in REMEDIES if re.search(signs, words, re.IGNORECASE)), OTHER_REMEDY)
    free = shutil.disk_usage(environment).free / 1e9
    raise SetupError(
        f"pip could not install {requirements.name} (exit {pip.returncode}; {free:.1f} GB free here). Its last lines:\n"
        + "\n".join(f"    {line}" for line in last)
        + f"\n{remedy}"
    )


def prepare(environment: Path, requirements: Path, newest: bool = False) -> None:
    """Bring the environment to the requirements; does nothing when it is there already, unless `newest` asks for more.

    With `newest`, an environment of an older interpreter than the newest one here is made anew.
    """
    if not newest and is_ready(environment, requirements):
        say(f"{environment.name} is ready")
        return
    inside = str(environment / "bin" / "python")
    record, version = read_record(environment), version_of(inside)
    expected = version_of(choose_interpreter(newest)) if newest else version
    if record is not None and not (record.get("state") == "complete" and record.get("python") == version == expected):
        say(f"{environment.name} is unfinished or belongs to another Python; it is made anew")
        shutil.rmtree(environment)
    elif record is None and environment.exists():
        if version is None or tuple(map(int, version.split("."))) < LEAST:
            raise SetupError(
                f"{environment} was not made by this project, and its Python is {version or 'missing or broken'}; "
                f"{LEAST[0]}.{LEAST[1]} or newer is needed. Move it away, or remove it: make clean-environment"
            )
        say(f"{environment.name} was made by hand; what is missing is added")
    python = inside
    digest = requirements_digest(requirements)
    if not environment.exists():
        python = choose_interpreter(newest)
        say(f"making {environment.name} with Python {version_of(python)} ({python})")
        environment.mkdir(parents=True)
        write_record(environment, state="installing")
        create(python, environment, requirements, newest)
    write_record(environment, state="installing")
    add_pip(python, environment)
    say(f"installing {requirements.name}; the first time takes some minutes")
    install(environment, requirements, newest)
    write_record(environment, state="complete", python=version_of(inside) or "", requirements_sha256=digest)
    say(f"{environment.name} is ready")


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the project's Python environment, or say that it is ready.")
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv", help="folder (default: .venv)")
    parser.add_argument("--requirements", type=Path, default=ROOT / "requirements.txt", help="what it has to hold")
    parser.add_argument(
        "--newest",
        action="store_true",
        help="by the newest Python here, with the newest releases, nothing of the system",
    )
    chosen = parser.parse_args()
    try:
        prepare(Path(os.path.abspath(chosen.environment)), chosen.requirements, chosen.newest)
    except KeyboardInterrupt:
        print("\nenvironment: interrupted; the same command starts again", file=sys.stderr)
        return 130
    except (SetupError, OSError) as error:
        print(f"environment: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
