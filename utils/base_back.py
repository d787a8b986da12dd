"""The mount: import BASE-BACK's packages and this project's in one process, although both have a package `utils`.

    config, models, training, export    from BASE-BACK/src, even if other modules of these names are on the path
    utils.<module of this project>      this project's module
    utils.<any other module>            from BASE-BACK/src/utils
    utils.logger and ten more names     from BASE-BACK/src/utils/__init__.py, loaded once as `utils._base`

Importing `utils` only installs a finder. The folder is bound at the first use of a BASE-BACK name, after the command
line has put `--base-back` and `--workspace` into the environment, for the life of the process. Nothing is ever written
into a BASE-BACK other than the bundled one.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from utils.core.display_text import first_names
from utils.core.errors import UserError
from utils.core.messages import LOGGER_NAME, set_up_logging
from utils.core.workspace import Workspace

PROJECT = Path(os.path.abspath(__file__)).parents[1]
BUNDLED = PROJECT / "BASE-BACK"
PACKAGES = ("config", "models", "training", "export")
EXPORTS = (
    "logger", "smoke_checker", "DEVICE", "get_device", "set_seed", "get_optimal_workers", "OPTIMAL_WORKERS",
    "compute_file_sha256", "get_device_info", "DedupLogger", "SmokeCheckLogger",
)  # fmt: skip

_OURS = "utils"
_BASE_UTILS = "utils._base"
_BUNDLED_UTILS = "bundled_base_back_utils"
_BUNDLED_EXPORT = "bundled_base_back_export"


def locate(explicit: str | None = None) -> Path:
    """Return the absolute path of the BASE-BACK folder that `bind` would use, without loading or setting anything.

    Order: `explicit`, the environment variable BASE_BACK_DIR, `BASE-BACK` next to the project, the bundled one.
    Raises UserError if the requested folder is not a BASE-BACK, or if there is none.
    """
    requested = explicit or os.environ.get("BASE_BACK_DIR")
    if requested:
        folder = _absolute(requested)
        if not _is_base_back(folder):
            option = "--base-back" if explicit else "BASE_BACK_DIR (or --base-back)"
            raise UserError(
                f"{option} {requested}: not a BASE-BACK. Expected the folders src/config and src/utils in {folder}, "
                f"found {_contents(folder)}. Give the folder that holds src{_near(folder)}"
            )
        return folder
    candidates = (PROJECT.parent / "BASE-BACK", BUNDLED)
    for folder in candidates:
        if _is_base_back(folder):
            _require_own(folder)
            return folder
    contents = "; ".join(f"{folder}: {_contents(folder)}" for folder in candidates)
    raise UserError(
        f"no BASE-BACK found. Expected the folders src/config and src/utils, found {contents}. "
        "Give its folder with --base-back DIR or the environment variable BASE_BACK_DIR"
    )


def kind(path: str | os.PathLike[str]) -> Literal["bundled", "external"]:
    """Return whether the BASE-BACK folder `path` is the one that this project bundles."""
    return "bundled" if _same(path, BUNDLED) else "external"


def source_digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of the sorted relative paths and the bytes of `src/**/*.py` in the BASE-BACK folder `path`."""
    src = Path(path) / "src"
    files = sorted((file.relative_to(src).as_posix(), file) for file in src.rglob("*.py") if file.is_file())
    digest = hashlib.sha256()
    for name, file in files:
        content = file.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _require_own(folder: Path) -> None:
    """Raise UserError for a folder of another owner that was not named explicitly, since its code would be run."""
    trusted = {0, os.getuid(), os.stat(PROJECT).st_uid}
    for part in (folder, folder / "src", *sorted((folder / "src").glob("*"))):
        if (owner := os.stat(part).st_uid) not in trusted:
            raise UserError(
                f"{part}: belongs to user {owner}, and its Python modules would be run; expected a BASE-BACK of your "
                f"own. If you trust it: --base-back {shlex.quote(str(folder))}; for the bundled one: --base-back "
                f"{shlex.quote(str(BUNDLED))}"
            )


def _absolute(path: str | os.PathLike[str]) -> Path:
    # Symbolic links are kept: a linked BASE-BACK belongs to the workspace that contains the link.
    return Path(os.path.abspath(os.path.expanduser(path)))


def _same(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _is_base_back(folder: Path) -> bool:
    return all(os.path.isdir(folder / "src" / name) for name in ("config", "utils"))


def _contents(folder: Path) -> str:
    if not folder.is_dir():
        return "a file" if folder.exists() else "no such folder"
    inner = folder / "src" if (folder / "src").is_dir() else folder
    names = sorted(entry.name for entry in inner.iterdir())
    return (first_names(names, 6) or "nothing") + (" in src" if inner != folder else "")


def _near(folder: Path) -> str:
    """Return a hint if BASE-BACK is one folder above or below `folder`; "" otherwise."""
    for candidate in (folder.parent, folder / "BASE-BACK"):
        if _is_base_back(candidate):
            return f"; did you mean {candidate}?"
    return ""


def bind(explicit: str | None = None, workspace: str | None = None) -> Path:
    """Set the BASE-BACK folder and the workspace of this process and its children; return the absolute folder.

    Idempotent; loads none of BASE-BACK's modules. Raises UserError if another folder is bound, if the settings of
    another workspace are loaded, or if a module named like one of BASE-BACK's packages was imported from elsewhere.
    """
    folder = _FINDER.folder
    if folder is None:
        folder = locate(explicit)
        _refuse_other_modules(folder)
    else:
        requested = explicit or os.environ.get("BASE_BACK_DIR")
        if requested and not _same(_absolute(requested), folder):
            raise UserError(
                f"BASE-BACK {folder} is mounted in this process, so {_absolute(requested)} cannot be mounted as well. "
                "Start a new process for it"
            )
    _set_workspace(folder, workspace)
    if _FINDER.folder is None:
        os.environ["BASE_BACK_DIR"] = str(folder)
        if kind(folder) == "external":
            # A spawned child may load a BASE-BACK module from sys.path before this loader prevents compiled files.
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        sys.modules[_OURS].__path__.append(str(folder / "src" / "utils"))
        _extend_search_path(folder / "src")
        # A mounted BASE-BACK logs to stdout and opens files in the working directory unless a handler exists.
        if not logging.getLogger(LOGGER_NAME).handlers:
            set_up_logging()
        _warn_of_hidden_modules(folder)
        _FINDER.folder = folder
    return folder


def load(name: str) -> ModuleType:
    """Import one module of the mounted BASE-BACK by its import name, such as "models" or "utils.datasets".

    Raises UserError, which names folder, module and cause, if it cannot be imported.
    """
    folder = bind()
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, ValueError) as error:
        if isinstance(error, ValueError):
            remedy = "Correct the environment variable that it names"
        elif isinstance(error, OSError):
            remedy = f"The workspace is {os.environ['DBT_BASE_DIR']}; choose a writable one with --workspace DIR"
        elif error.name and error.name.partition(".")[0] not in (*PACKAGES, _OURS):
            remedy = f"Install what this BASE-BACK needs: pip install {error.name.partition('.')[0]}"
        else:
            remedy = "Mount a complete BASE-BACK with --base-back DIR"
        raise UserError(f"{name} of the BASE-BACK {folder} cannot be loaded: {error}. {remedy}") from error


def load_bundled(name: str) -> ModuleType:
    """Import a module of the bundled BASE-BACK's `utils` that reads no settings, such as "samples", for any mount.

    If the bundled BASE-BACK is mounted, this is the mounted module, so that no file is loaded twice.
    """
    if kind(bind()) == "bundled":
        return load(f"{_OURS}.{name}")
    package = sys.modules.setdefault(_BUNDLED_UTILS, ModuleType(_BUNDLED_UTILS))
    package.__path__ = [str(BUNDLED / "src" / "utils")]
    return importlib.import_module(f"{_BUNDLED_UTILS}.{name}")


def leave_workspace_unchanged() -> None:
    """Prevent settings that are loaded from now on from creating folders in the workspace."""
    _FINDER.makes_no_folders = True


def bundled_export() -> ModuleType:
    """Return the bundled BASE-BACK's `export` for any mount; exports call its `export_and_package_model`.

    If another BASE-BACK is mounted, its modules are temporarily removed from `sys.modules` while the bundled ones are
    loaded for the first time. The bundled modules keep their imports, and the names refer to the mounted ones again.
    """
    if kind(bind()) == "bundled":
        return load("export")
    if _BUNDLED_EXPORT not in sys.modules:
        names = [name for name in sys.modules if name.partition(".")[0] in ("config", "export")]
        names += [name for name in sys.modules if name.startswith(f"{_OURS}.") and _is_mounted(sys.modules[name])]
        mounted_modules = {name: sys.modules.pop(name) for name in names}
        mounted_at, _FINDER.folder = _FINDER.folder, BUNDLED
        os.environ["BASE_BACK_DIR"] = str(BUNDLED)
        package = sys.modules[_OURS]
        path = list(package.__path__)
        package.__path__[:] = [*path[:1], str(BUNDLED / "src" / "utils")]
        loaded_before = set(sys.modules)
        try:
            sys.modules[_BUNDLED_EXPORT] = importlib.import_module("export")
        finally:
            for name in set(sys.modules) - loaded_before - {_BUNDLED_EXPORT}:
                if _is_in(sys.modules[name], BUNDLED):
                    sys.modules[f"{_BUNDLED_EXPORT}.{name}"] = sys.modules.pop(name)
            _FINDER.folder, package.__path__[:] = mounted_at, path
            os.environ["BASE_BACK_DIR"] = str(mounted_at)
            sys.modules.update(mounted_modules)
    return sys.modules[_BUNDLED_EXPORT]


def _is_mounted(module: ModuleType) -> bool:
    return _FINDER.folder is not None and _is_in(module, _FINDER.folder)


def _is_in(module: ModuleType, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and os.path.realpath(file).startswith(os.path.realpath(folder / "src") + os.sep)


def settings() -> ModuleType:
    """Return `config.settings` of the mounted BASE-BACK, read once per process; the bundled one needs no torch."""
    return load("config.settings")


def open_workspace(output: str | None = None) -> Workspace:
    """Return the workspace of the mounted BASE-BACK; loads its settings, but not torch.

    For `output`, see `Workspace.from_settings`.
    """
    return Workspace.from_settings(settings(), output)


def _set_workspace(folder: Path, workspace: str | None) -> None:
    """Set DBT_BASE_DIR to the absolute workspace. Raises UserError if loaded settings name another one."""
    requested = _absolute(workspace or os.environ.get("DBT_BASE_DIR") or folder.parent)
    loaded = getattr(sys.modules.get("config.settings"), "BASE_DIR", None)
    if workspace and loaded is not None and not _same(requested, loaded):
        raise UserError(
            f"the settings of workspace {loaded} are loaded in this process, so workspace {requested} cannot be used "
            "as well. Start a new process for it"
        )
    os.environ["DBT_BASE_DIR"] = str(requested)


def _refuse_other_modules(folder: Path) -> None:
    src = os.path.realpath(folder / "src")
    others = []
    for name in PACKAGES:
        if (module := sys.modules.get(name)) is None:
            continue
        file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), "no file")
        if not os.path.realpath(file).startswith(src + os.sep):
            others.append(f"{name} ({file})")
    if others:
        raise UserError(
            f"BASE-BACK {folder} cannot be mounted: {', '.join(others)} was imported from elsewhere before. "
            "Import utils first, or import these in another process"
        )


def _warn_of_hidden_modules(folder: Path) -> None:
    """Warn about modules of BASE-BACK's `utils` that cannot be imported, because this project's have the same names."""
    ours = {path.stem for path in _modules(PROJECT / _OURS)}
    hidden = [path for path in _modules(folder / "src" / "utils") if path.stem in ours]
    if hidden:
        logging.getLogger(LOGGER_NAME).warning(
            "BASE-BACK %s: %s cannot be imported, because this project's package `utils` has modules of the same names",
            folder,
            ", ".join(f"src/utils/{path.name}{'/' if path.is_dir() else ''}" for path in hidden),
        )


def _modules(package: Path) -> list[Path]:
    """Return the files and folders of a package that an import statement can name, sorted."""
    return sorted(
        path
        for path in package.iterdir()
        if path.stem.isidentifier()
        and path.stem != "__init__"
        and (any(path.glob("*.py")) if path.is_dir() else path.suffix == ".py")
    )


def _extend_search_path(src: Path) -> None:
    """Let spawned children find BASE-BACK: they inherit sys.path, but not the finder.

    `src` is inserted after the project, whose `utils` comes first, and before the first later entry with a module of
    one of BASE-BACK's names; at the end if there is none.
    """
    entries = [os.path.abspath(entry) for entry in sys.path]
    if str(src) in entries:
        return
    if str(PROJECT) not in entries:
        sys.path.append(str(PROJECT))
        entries.append(str(PROJECT))
    first = entries.index(str(PROJECT)) + 1
    hiding = (index for index in range(first, len(entries)) if _answers(entries[index]))
    sys.path.insert(next(hiding, len(entries)), str(src))


def _answers(entry: str) -> bool:
    return any((spec := PathFinder.find_spec(name, [entry])) and spec.loader for name in PACKAGES)


class _Loader(SourceFileLoader):
    """Loads one BASE-BACK file."""

    def set_data(self, path: str, data: Any, *, _mode: int = 0o666) -> None:
        """Write compiled code only for the bundled sources; an external folder is never written to."""
        if _FINDER.folder is not None and kind(_FINDER.folder) == "bundled":
            super().set_data(path, data, _mode=_mode)

    def exec_module(self, module: ModuleType) -> None:
        """Run the file and restore the log level of the command line, which BASE-BACK may change."""
        logger = logging.getLogger(LOGGER_NAME)
        level = logger.level
        with _without_new_folders() if module.__name__.startswith("config") else nullcontext():
            super().exec_module(module)
        if level != logging.NOTSET:
            logger.setLevel(level)


@contextmanager
def _without_new_folders() -> Iterator[None]:
    """Context in which settings that create folders in the workspace are loaded.

    No folder is created if this program writes to another folder or must leave the workspace unchanged; folders that
    cannot be created are skipped. This program does not need them: its writers create missing folders.
    """
    workspace, output = os.environ["DBT_BASE_DIR"], os.environ.get("DBT_ENSEMBLE_DIR")
    is_only_read = bool(_FINDER.makes_no_folders or (output and not _same(_absolute(output), workspace)))
    mkdir = os.mkdir

    def make(path: Any, *arguments: Any, **options: Any) -> None:
        is_inside = _absolute(os.fsdecode(path)).is_relative_to(workspace)
        if is_inside and is_only_read:
            return
        try:
            mkdir(path, *arguments, **options)
        except OSError as error:
            if not is_inside or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            logging.getLogger(LOGGER_NAME).debug("%s: not made by BASE-BACK's settings (%s)", path, error.strerror)

    os.mkdir = make
    try:
        yield
    finally:
        os.mkdir = mkdir


class _Finder:
    """Finder of BASE-BACK's modules only."""

    folder: Path | None = None
    makes_no_folders: bool = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a BASE-BACK module, or None. Raises UserError if binding fails."""
        top, _, below = fullname.partition(".")
        if top not in PACKAGES and top != _OURS:
            return None
        if not below:
            return None if top == _OURS else self._package(fullname)
        if top == _OURS and "." not in below:
            return self._below_utils(fullname)
        if self.folder is None or path is None:
            return None
        src = f"{self.folder / 'src'}{os.sep}"
        return _spec_in(fullname, [entry for entry in path if entry.startswith(src)])

    def _package(self, name: str) -> ModuleSpec:
        src = bind() / "src"
        spec = _spec_in(name, [str(src)])
        if spec is None:
            # Returning None would let a module of this name in the working directory replace BASE-BACK's.
            raise ModuleNotFoundError(f"the mounted BASE-BACK has no package {name!r} in {src}", name=name)
        return spec

    def _below_utils(self, fullname: str) -> ModuleSpec | None:
        ours = PathFinder.find_spec(fullname, [str(PROJECT / _OURS)])
        if ours is not None and ours.loader is not None:
            return None
        folder = (self.folder or locate()) / "src" / "utils"
        if fullname == _BASE_UTILS:
            # Not a package: its relative imports refer to `utils`, so that each of its files has one module object.
            loader = _Loader(fullname, str(folder / "__init__.py"))
            spec = spec_from_file_location(fullname, loader.path, loader=loader, submodule_search_locations=None)
        else:
            spec = _spec_in(fullname, [str(folder)])
        if spec is not None:
            bind()
        return spec


def _spec_in(fullname: str, folders: Sequence[str]) -> ModuleSpec | None:
    specs = (FileFinder(folder, (_Loader, SOURCE_SUFFIXES)).find_spec(fullname) for folder in folders)
    return next((spec for spec in specs if spec is not None), None)


_FINDER = _Finder()


def install() -> None:
    """Insert the finder at the start of sys.meta_path, without searching or loading anything."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def exported(name: str) -> Any:
    """`__getattr__` of the package `utils`: return one of BASE-BACK's eleven names (EXPORTS), loaded at first use.

    Raises AttributeError for every other name, without binding.
    """
    if name not in EXPORTS:
        raise AttributeError(f"module 'utils' has no attribute {name!r}")
    value = getattr(importlib.import_module(_BASE_UTILS), name)
    setattr(sys.modules[_OURS], name, value)
    return value
