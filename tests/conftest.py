"""Fixtures: real images, really trained tiny networks, and the guard that keeps tests inside their own folders."""

from __future__ import annotations

import atexit
import fcntl
import gc
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import own_folders
import pytest
import warm

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))
if (PROJECT / ".git").exists():  # not in copies, which `mutants` changes twice within a second
    # Python keeps compiled files unless told otherwise; without them every worker compiles all tests, and every program
    # that a test starts some 400 modules.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
# Settings are read once, by the first test file that imports a base module, which is while pytest collects.
SETTINGS_FOLDER = tempfile.mkdtemp(prefix="settings-")
atexit.register(shutil.rmtree, SETTINGS_FOLDER, ignore_errors=True)
# One thread each, here and in every process that a test starts: two workers on two cores would wait for one another at
# every parallel loop, which made the suite three times as long. Where a test asks for two, they do not wait actively.
os.environ |= {"DBT_BASE_DIR": SETTINGS_FOLDER, "DBT_MODEL_SIZE": "tiny", "OMP_NUM_THREADS": "1"}
os.environ |= {"OMP_WAIT_POLICY": "passive"}
# No test downloads a network, nor takes one that its user has downloaded.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": SETTINGS_FOLDER}


def has_room(folder: Path) -> bool:
    """Whether a folder can hold the files of a run, and programs among them."""
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return False
    system = os.statvfs(folder)
    return not system.f_flag & os.ST_NOEXEC and system.f_bavail * system.f_frsize >= BYTES_OF_RUN


IN_MEMORY, BYTES_OF_RUN = Path("/dev/shm"), 8_000_000_000
if has_room(IN_MEMORY):  # a run writes twelve gigabytes, most of them removed after their test
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(IN_MEMORY))

subprocess.Popen = warm.Popen  # type: ignore[misc]  # here and in the product, which starts programs of its own

import utils  # noqa: E402, F401  (installs the mount)
from utils.core.array_archives import physical_memory  # noqa: E402
from utils.core.engines import cores  # noqa: E402
from utils.core.worker_processes import SPAWN  # noqa: E402

BYTES_PER_WORKER = 3_000_000_000
WITHOUT_TORCH = (
    "import sys; from ensemble_orchestrator import main; code = main(sys.argv[1:]); "
    "assert 'torch' not in sys.modules; sys.exit(code)"
)
"""The orchestrator's command line for `python -c`, which fails where a command has loaded torch."""
COSTLY_FIXTURES = frozenset({"trained", "synthetic", "built", "own_copy", "base_main", "orchestrator"})
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install 'ray>=2.40,<3'")
ZOO_BACKBONES = ("CustomConvNeXt", "CustomResNetMish", "CustomViTHybrid")
ZOO_CLASSES = (0, 1, 2, 3)
ZOO_PER_CLASS = 70
ZOO_FOLDS = 2
ZOO_OPTIONS = ("--size", "tiny", "--folds", str(ZOO_FOLDS), "--epochs-head", "1", "--epochs-finetune", "4")


@pytest.hookimpl(tryfirst=True, optionalhook=True)  # unknown with -p no:xdist
def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores, as tests wait for the programs that they start; 3 GB of memory for each."""
    return max(1, min(cores() + 1, physical_memory() // BYTES_PER_WORKER))


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need trained networks, commands or spawned workers, which `make test-fast` leaves out."""
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        spawns = any(isinstance(value, str) and value == SPAWN for value in parameters)
        if spawns or not COSTLY_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.costly)


def pytest_collection_finish() -> None:
    """What is imported stays: the garbage collector need not look at half a million objects again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def project_stays_clean() -> Iterator[None]:
    """Whatever the tests write lies in temporary folders."""
    with own_folders.kept_clean(PROJECT):
        yield


def write_digits(folder: Path, classes: tuple[int, ...] = ZOO_CLASSES, per_class: int = ZOO_PER_CLASS) -> Path:
    """Scanned digits of scikit-learn as PNG files, `<digit>/<number>.png`."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for digit in classes:
        (folder / str(digit)).mkdir(parents=True, exist_ok=True)
        for number in np.flatnonzero(digits.target == digit)[:per_class]:
            pixels = np.rint(digits.images[number] * (255 / 16)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / str(digit) / f"{number:04d}.png")
    return folder


def run_python(
    *arguments: str, environment: dict[str, str] | None = None, cwd: Path | None = None, afresh: bool = False
):
    """Run a program of the project with this interpreter; returns the completed process.

    A script starts where torch is imported already (`warm`), unless that is not wanted (`afresh`).
    """
    options = ("-u",) if afresh else ()
    left_out = ("DBT_", "BASE_BACK_DIR", "OMP_WAIT_POLICY")  # programs choose the last themselves
    clean = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
    variables = clean | {"PYTHONWARNINGS": "error::ResourceWarning"} | (environment or {})
    return subprocess.run(
        [sys.executable, *options, *arguments],
        cwd=cwd or PROJECT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def small_forests() -> Iterator[None]:
    """For tests that do not depend on the number of trees: fits of forests took most of their time."""
    from utils.combiners import forest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forest, "TREES", 10)
        yield


@pytest.fixture(scope="module")
def short_paths() -> Iterator[None]:
    """For tests that do not depend on the number of strengths of the ridge: logistic stackers have three of seven."""
    from utils import stacking_methods
    from utils.combiners import logistic

    learner = partial(logistic.LogisticLearner, strengths=logistic.STRENGTHS[::3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacking_methods, "LogisticLearner", learner)
        yield


@pytest.fixture(scope="module")
def short_searches() -> Iterator[None]:
    """For tests of learners and builders that depend on what is searched and not on how finely."""
    import short_fits

    with short_fits.short_searches():
        yield


@pytest.fixture(scope="module")
def few_fits() -> Iterator[None]:
    """For tests of commands that depend on neither the number of fits and timings nor on their values."""
    import short_fits

    with short_fits.few_fits():
        yield


@pytest.fixture(scope="module")
def few_folds() -> Iterator[None]:
    """For tests that do not depend on the number of cross-fitting folds: nested fits of five took most of a build.

    Three of them, as settings would be selected on single rows with two.
    """
    from utils.predictions import folds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folds, "CROSSFIT_FOLDS", 3)
        yield


@pytest.fixture(scope="module")
def without_figures() -> Iterator[None]:
    """For tests that look at no figure: drawing took most of `evaluate` on few rows."""
    from in_process import empty_figures

    with empty_figures():
        yield


@pytest.fixture(scope="session")
def base_main() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the base pipeline's command line: base_main("--stages", "split", workspace=...).

    One process at a time unless `--jobs` says otherwise: the other core is the other worker's.
    """

    def run(*options: str, workspace: Path, environment: dict[str, str] | None = None):
        script = str(PROJECT / "BASE-BACK" / "src" / "main.py")
        variables = {"DBT_AUGMENT": "no_flip", "DBT_BATCH_SIZE": "32"} | (environment or {})
        jobs = () if "--jobs" in options else ("--jobs", "1")
        return run_python(script, "--workspace", str(workspace), *options, *jobs, environment=variables)

    return run


@pytest.fixture(scope="session")
def orchestrator() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the orchestrator's command line: orchestrator("discover", workspace=...).

    In this process, which has imported torch already; in one of its own where that is asked for (`apart`), as another
    BASE-BACK needs it, or where it starts in another folder.
    """
    from in_process import run as run_here

    def run(*options: str, workspace: Path | None = None, cwd: Path | None = None, apart: bool = False):
        if cwd is None and not apart:
            done = run_here(*options, workspace=workspace)
            return subprocess.CompletedProcess(options, done.code, done.stdout, done.stderr)
        place = ("--workspace", str(workspace)) if workspace else ()
        return run_python(str(PROJECT / "ensemble_orchestrator.py"), *options, *place, cwd=cwd)

    return run


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first process of a test run fills; the others wait for it and share it."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = shared / name, shared / f"{name}.done"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, base_main) -> Path:
    """A workspace as the base pipeline leaves it: 280 digits of four classes, three tiny backbones, two folds.

    Shared by all tests: read it, never write into it.
    """

    def make(workspace: Path) -> None:
        write_digits(workspace / "Data")
        done = base_main("--backbones", *ZOO_BACKBONES, *ZOO_OPTIONS, workspace=workspace)
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "trained", make)


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of `debug --fast`: sixteen images of two classes, three tiny backbones, one epoch, two folds.

    Shared by all tests: read it, never write into it.
    """
    from utils.operations import debug_sandbox

    def make(place: Path) -> None:
        debug_sandbox.prepare_sandbox(debug_sandbox.Sandbox(place, True, (), debug_sandbox.BACKBONES))

    return made_once(tmp_path_factory, "synthetic", make)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, trained: Path, orchestrator) -> Path:
    """A copy of the trained workspace after `pipeline`, without the folder that was split.

    Shared: read it, never write into it.
    """

    def make(workspace: Path) -> None:
        shutil.copytree(trained, workspace, dirs_exist_ok=True, ignore=shutil.ignore_patterns("Data"))
        done = orchestrator("pipeline", "--config", "configs/votes.yaml", workspace=workspace)
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "built", make)


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """`caplog` that hears the project's logger, which does not propagate."""
    logger = logging.getLogger("disease_pipeline")
    level = logger.level
    logger.setLevel(logging.INFO)  # whatever an earlier test left
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)


@pytest.fixture
def own_copy(tmp_path: Path, built: Path) -> Path:
    """A copy of the built workspace to change or break."""
    return Path(shutil.copytree(built, tmp_path / "workspace"))
