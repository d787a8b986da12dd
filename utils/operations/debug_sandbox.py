"""Where `debug` works: a folder of its own, with a small zoo that is really trained, or beside the trained members."""

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
"""Two families with their ways of normalising, and one that is both."""
CLASSES = ("bright", "dark")
IMAGES_PER_CLASS = 8
IMAGE_SIZE = 32
SECONDS, MEGABYTES, MEMORY_MB = 10, 12, 400
"""What making the zoo takes on two cores."""
SYNTHETIC_SETTINGS = (
    *("dataset.img_size=32", "dataset.batch_size=4", "dataset.num_workers=0", "dataset.group_regex=null"),
    *("backbones.exclude=[]", "runs.score_ensemble.fit_rows=honest", "runs.stacking.fit_rows=honest"),
    *("distillation.batch_size=4", "exports.formats=[state_dict,checkpoint,torchscript,onnx]"),
    "pruning.cost_budget.max_latency_ms=100000",
)
"""Configuration of the synthetic workspace, on top of the user's; a busy machine is no reason for a section to fail."""


@dataclass(frozen=True)
class Sandbox:
    """One of the two places below `debug_tmp/`, and how a command is sent there."""

    folder: Path
    is_synthetic: bool
    options: tuple[str, ...]
    """Common options that lead a command into it."""
    backbones: tuple[str, ...]
    """What the zoo holds; empty for the workspace at hand, whose members the configuration names."""

    def environment(self) -> dict[str, str]:
        """Of commands in it: the synthetic one listens to none of the base pipeline's variables.

        Its networks are so small that a second thread costs more than it helps, on a busy machine twice the seconds.
        """
        if not self.is_synthetic:
            return dict(os.environ)
        heard = {key: value for key, value in os.environ.items() if not key.startswith("DBT_")}
        return {key: value for key, value in heard.items() if key != "BASE_BACK_DIR"} | {"OMP_NUM_THREADS": "1"}


def folder_of(workspace: Workspace) -> Path:
    """Everything that `debug` writes lies in it."""
    return workspace.root / FOLDER_NAME


def choose_sandbox(workspace: Workspace, *, fast: bool, arch: str | None) -> Sandbox:
    """The synthetic workspace with `fast`, or where nothing is trained; else an output beside the trained members."""
    if fast or not has_members(workspace):
        folder = folder_of(workspace) / "synthetic"
        names = tuple(sorted({*BACKBONES, *([arch] if arch else [])}))
        options = ("--workspace", str(folder), "--base-back", str(base_back.BUNDLED))
        return Sandbox(folder, True, options, names)
    folder = folder_of(workspace) / "workspace"
    return Sandbox(folder, False, ("--workspace", str(workspace.base), "--output", str(folder)), ())


def has_members(workspace: Workspace) -> bool:
    """Whether the base pipeline has left a checkpoint."""
    return workspace.checkpoints.is_dir() and any(workspace.checkpoints.glob("*.pth"))


def require_sandbox(workspace: Workspace) -> None:
    """ConfigError unless everything of ours goes into a sandbox."""
    if workspace.root.parent.name != FOLDER_NAME:
        raise ConfigError(f"--inside: {workspace.root} is no sandbox of debug; expected a folder in {FOLDER_NAME}/")


def prepare_sandbox(sandbox: Sandbox) -> None:
    """Make what is missing of it: images, then networks trained for one epoch and two folds by the bundled pipeline.

    Raises UserError where the training fails.
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
    variables = {"DBT_BATCH_SIZE": "4", "DBT_PARENT": str(os.getpid())}
    code, _, last = subprocesses.run_program(command, sandbox.environment() | variables)
    if code:
        said = "; ".join(last) or "nothing"
        raise UserError(
            f"{sandbox.folder}: the base pipeline ended with {code} while training {', '.join(sandbox.backbones)}; it "
            f"said: {said}. Start anew: python ensemble_orchestrator.py debug --section reset --confirm"
        )


def write_images(folder: Path) -> None:
    """Sixteen images of 32 pixels in two classes that a network can learn in one epoch; what is there is kept."""
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
    """Remove all that `debug` has left, failed exports and caches included: (files, bytes).

    Raises UserError with what would go unless `confirm`, and where the folder is a symbolic link.
    """
    folder = folder_of(workspace)
    if folder.is_symlink():
        raise UserError(f"{folder}: a symbolic link; expected a folder of debug's own. Remove the link")
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
