"""Sandboxes of `debug`: a synthetic workspace with small networks, or an output folder for the trained members."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils import base_back
from utils.core import artifacts, caches, locks, subprocesses
from utils.core.errors import ConfigError, UserError
from utils.core.workspace import Workspace

FOLDER_NAME, LOCK_NAME = "debug_tmp", ".lock"
BACKBONES = ("CustomConvNeXt", "CustomResNetMish", "CustomViTHybrid")
"""A network with LayerNorm, one with BatchNorm, and a hybrid."""
CLASSES = ("bright", "dark")
IMAGES_PER_CLASS = 8
IMAGE_SIZE = 32
SECONDS, MEGABYTES, MEMORY_MB = 10, 12, 400
"""Cost of creating the synthetic workspace on two cores."""
SYNTHETIC_SETTINGS = (
    *("dataset.img_size=32", "dataset.batch_size=4", "dataset.num_workers=0", "dataset.group_regex=null"),
    *("backbones.exclude=[]", "runs.score_ensemble.fit_rows=honest", "runs.stacking.fit_rows=honest"),
    *("distillation.batch_size=4", "exports.formats=[state_dict,checkpoint,torchscript,onnx]"),
    "pruning.cost_budget.max_latency_ms=100000",
)
"""Configuration of the synthetic workspace, which overrides the user's. The latency limit never fails a section."""


@dataclass(frozen=True)
class Sandbox:
    """A folder below `debug_tmp/`, and the options that make commands use it."""

    folder: Path
    is_synthetic: bool
    options: tuple[str, ...]
    """Common options of commands in the sandbox."""
    backbones: tuple[str, ...]
    """Backbones of the synthetic workspace; empty for trained members, which the configuration names."""

    def environment(self) -> dict[str, str]:
        """Environment of commands in the sandbox.

        In the synthetic workspace, the base pipeline's variables are removed, and one thread is used, since its
        networks are too small for a second thread.
        """
        if not self.is_synthetic:
            return dict(os.environ)
        variables = {key: value for key, value in os.environ.items() if not key.startswith("DBT_")}
        variables.pop("BASE_BACK_DIR", None)
        return variables | {"OMP_NUM_THREADS": "1"}


def folder_of(workspace: Workspace) -> Path:
    """The folder of all outputs of `debug`."""
    return workspace.root / FOLDER_NAME


def choose_sandbox(workspace: Workspace, *, fast: bool, arch: str | None) -> Sandbox:
    """The synthetic workspace with `fast` or without trained members, else an output folder for the trained members."""
    if fast or not has_members(workspace):
        folder = folder_of(workspace) / "synthetic"
        names = tuple(sorted({*BACKBONES, *([arch] if arch else [])}))
        options = ("--workspace", str(folder), "--base-back", str(base_back.BUNDLED))
        return Sandbox(folder, True, options, names)
    folder = folder_of(workspace) / "workspace"
    return Sandbox(folder, False, ("--workspace", str(workspace.base), "--output", str(folder)), ())


def has_members(workspace: Workspace) -> bool:
    """Whether the workspace has a checkpoint of the base pipeline."""
    return workspace.checkpoints.is_dir() and any(workspace.checkpoints.glob("*.pth"))


def require_sandbox(workspace: Workspace) -> None:
    """Raise ConfigError unless the workspace's outputs are in a sandbox."""
    if workspace.root.parent.name != FOLDER_NAME:
        raise ConfigError(f"--inside: {workspace.root} is not a sandbox of debug; expected a folder in {FOLDER_NAME}/")


def prepare_sandbox(sandbox: Sandbox) -> None:
    """Create the sandbox; in a synthetic one, missing images and networks, trained for one epoch and two folds.

    Raises UserError if the base pipeline's training fails.
    """
    sandbox.folder.mkdir(parents=True, exist_ok=True)
    if not sandbox.is_synthetic:
        return
    write_images(sandbox.folder / "Data")
    program = str(base_back.BUNDLED / "src" / "main.py")
    command = [
        *(sys.executable, program, "--workspace", str(sandbox.folder), "--data", str(sandbox.folder / "Data")),
        *("--size", "tiny", "--folds", "2", "--epochs-head", "1", "--epochs-finetune", "1", "--jobs", "2"),
        *("--backbones", *sandbox.backbones, "--stages", "split", "kfold", "train"),
    ]
    variables = {"DBT_BATCH_SIZE": "4"}
    exit_code, _, last_lines = subprocesses.run_program(command, sandbox.environment() | variables)
    if exit_code:
        output = "; ".join(last_lines) or "none"
        raise UserError(
            f"{sandbox.folder}: the base pipeline ended with exit code {exit_code} while training "
            f"{', '.join(sandbox.backbones)}; last output: {output}. Remove the sandbox and try again: "
            "python ensemble_orchestrator.py debug --section reset --confirm"
        )


def write_images(folder: Path) -> None:
    """Write sixteen images of 32 x 32 pixels in two separable classes; existing files are kept."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for shift, name in zip((128, 0), CLASSES, strict=True):
        for number in range(IMAGES_PER_CLASS):
            path = folder / name / f"{number}.png"
            pixels = rng.integers(0, 128, (IMAGE_SIZE, IMAGE_SIZE, 3)) + shift
            if not path.exists():
                with artifacts.replacing(path) as temporary:
                    Image.fromarray(pixels.astype(np.uint8)).save(temporary)


def remove_sandboxes(workspace: Workspace, *, confirm: bool) -> tuple[int, int]:
    """Remove all outputs of `debug`; returns (number of files, bytes).

    Raises UserError with these numbers unless `confirm`, and if the folder is a symbolic link.
    """
    folder = folder_of(workspace)
    if folder.is_symlink():
        raise UserError(f"{folder}: a symbolic link; expected a folder that debug created. Remove the link")
    items = [item for item in caches.list_children(folder) if item.name != LOCK_NAME]
    count, size = sum(1 for _ in caches.walk_files(folder)), sum(item.size for item in items)
    if items and not confirm:
        raise UserError(
            f"{folder}: {count} files, {caches.format_bytes(size)}; nothing is removed without --confirm: "
            "python ensemble_orchestrator.py debug --section reset --confirm"
        )
    if items:
        with locks.writer_lock(folder / LOCK_NAME, "debug"):
            for item in items:
                caches.remove(item)
        folder.rmdir()
    return count, size
