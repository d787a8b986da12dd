"""Networks of another BASE-BACK: its modules replace none of this pipeline's, and nothing is written to its folder.

Its modules import one another relatively and fall back to absolute names. They are loaded as a private package; while
it is loading, the absolute names refer to its modules too.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from config import settings

PACKAGE = "external_base_back"
ABSOLUTE = ("config", "utils", "models", "training", "export")


class ExternalError(ValueError):
    """The other BASE-BACK cannot be used; the message names its folder and its contents."""


def external_models(folder: Path) -> ModuleType:
    """The package `models` of `folder/src`, loaded once per process; raises `ExternalError` with the reason."""
    source = folder / "src"
    if not list(source.glob("models/__init__.py")) + list(source.glob("models.py")):
        raise ExternalError(
            f"{folder}: no src/models/__init__.py; expected the folder of a BASE-BACK (--base-back DIR)"
        )
    loaded = sys.modules.get(PACKAGE)
    if loaded is not None and list(loaded.__path__) != [str(source)]:
        raise ExternalError(f"{folder}: {loaded.__path__[0]} is loaded in this process; start another process")
    sys.dont_write_bytecode = True  # not reset: its functions may import more modules later
    os.environ["DBT_BASE_DIR"] = str(settings.BASE_DIR)  # its settings create folders below this one
    if loaded is None:
        spec = importlib.util.spec_from_loader(PACKAGE, loader=None, is_package=True)
        assert spec is not None
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
        sys.modules[PACKAGE].__path__ = [str(source)]
    try:
        with _their_names(source), redirect_stdout(sys.stderr):
            return importlib.import_module(f"{PACKAGE}.models")
    except Exception as error:  # third-party code may raise anything
        raise ExternalError(f"{source / 'models'}: cannot be imported ({type(error).__name__}: {error})") from error


@contextmanager
def _their_names(source: Path) -> Iterator[None]:
    """Inside the block, `import config` and the other absolute names import the other BASE-BACK's modules."""
    replaced_modules = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in ABSOLUTE}
    for name in replaced_modules:
        del sys.modules[name]
    sys.path.insert(0, str(source))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(source))
        for name in [name for name in sys.modules if name.partition(".")[0] in ABSOLUTE]:
            del sys.modules[name]
        sys.modules.update(replaced_modules)


def external_names(folder: Path) -> list[str]:
    """The architectures of the other BASE-BACK, in its order."""
    architectures = getattr(external_models(folder), "BACKBONE_MAP", None)
    if not architectures:
        raise ExternalError(f"{folder}: its models package has no BACKBONE_MAP; expected {{name: class}}")
    return list(architectures)


def create_external(folder: Path, name: str, num_classes: int) -> nn.Module:
    """A network of the other BASE-BACK with random weights; raises `ExternalError` if it cannot be built."""
    create = getattr(external_models(folder), "create_custom_backbone_safe", None)
    if create is None:
        raise ExternalError(f"{folder}: its models package has no create_custom_backbone_safe(name, num_classes)")
    with redirect_stdout(sys.stderr):
        model = create(name, num_classes)
    if model is None:
        raise ExternalError(
            f"{folder}: create_custom_backbone_safe({name!r}, {num_classes}) gave None; see its log line"
        )
    return model


def source_digest(folder: Path) -> str:
    """Digest of the code that builds the other BASE-BACK's networks: every file of `src/models`."""
    source = folder / "src"
    files = sorted(source.glob("models/**/*.py")) + sorted(source.glob("models.py"))
    parts = [[path.relative_to(source).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def last_linear_layers(model: nn.Module, num_classes: int, img_size: int, device: torch.device) -> list[nn.Linear]:
    """All linear layers with `num_classes` outputs that a forward pass uses: a classifier may have two heads.

    Raises ValueError when there is none.
    """
    used: list[nn.Linear] = []

    def note(layer: nn.Module, _: tuple[Tensor, ...]) -> None:
        if layer not in used:
            used.append(layer)  # type: ignore[arg-type]

    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == num_classes]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, img_size, img_size, device=device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if not used:
        raise ValueError(
            f"{type(model).__name__}: no linear layer with {num_classes} outputs runs, so there is no head to train "
            "alone; set --epochs-head 0"
        )
    return used
