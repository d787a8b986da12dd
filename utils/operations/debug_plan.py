"""The table of the sections of `debug`, and estimates of what each reads, writes and costs."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.core import caches, estimates
from utils.core.config import Config
from utils.core.workspace import SPLITS, Workspace
from utils.predictions import catalog

VOTING_ONLY = (
    *("runs.score_ensemble.enable=true", "runs.score_ensemble.methods=[soft_voting,logit_averaging]"),
    *("runs.model_soup.enable=false", "runs.snapshot_ensemble.enable=false", "pruning.enable=false"),
)
"""Settings that build only the two simplest ensembles, for sections that need an ensemble."""
VOTING_ENSEMBLE = "soft_voting_ensemble"
MODELS = "ensembles/models"
MAX_FILES_LISTED = 12  # per section
WEIGHT_COPIES = 2  # in memory: the file and the network
ACTIVATIONS_PER_INPUT = 40  # floats in memory per input value
TRAINING_COPIES = 4  # weights, gradients and two moments of the optimizer


@dataclass(frozen=True)
class DebugSection:
    """One section of `debug`."""

    description: str
    steps: tuple[tuple[str, ...], ...]
    """Command lines, or `probe <name>` for a function of `debug_probes`; the section tests the last step."""
    settings: tuple[str, ...] = ()
    """Configuration values that the section needs, in the format of `--set`."""
    quick_settings: tuple[str, ...] = ()
    """Configuration values that shorten the section's trainings."""
    outputs: tuple[str, ...] = ()
    """Patterns relative to the sandbox; each must match a file afterwards."""
    reads: tuple[str, ...] = ("checkpoints",)
    """Kinds of files that it reads: checkpoints, folds, images."""
    per_member: bool = False
    """Whether `--arch` restricts it to one backbone; sections that build ensembles need several."""
    trains: bool = False
    prerequisites: tuple[str, ...] = ("discover",)
    """Sections that run before it."""


SECTIONS: dict[str, DebugSection] = {
    "discover": DebugSection(
        "scan of checkpoints, out-of-fold predictions and metrics",
        (("discover",),),
        outputs=("ensembles/ensemble_catalog.json",),
        reads=("checkpoints", "folds", "images"),
        prerequisites=(),
    ),
    "smoke": DebugSection(
        "load every member and run it on a few images",
        (("probe", "smoke"),),
        reads=("checkpoints", "images"),
        per_member=True,
    ),
    "kfold": DebugSection(
        "read out-of-fold predictions and compare them with the train split",
        (("probe", "kfold"),),
        reads=("folds", "images"),
        per_member=True,
    ),
    "extract_embeddings": DebugSection(
        "extract logits and embeddings of train, val and test",
        (("probe", "extract_embeddings"),),
        outputs=("ensembles/fusion_embeddings/*/val.npy", "ensembles/predictions/*/val/logits.npy"),
        reads=("checkpoints", "images"),
        per_member=True,
    ),
    "build_ensemble": DebugSection(
        "build voting and weighted ensembles, soups and pruned ensembles",
        (("build-ensemble",),),
        ("runs.score_ensemble.enable=true", "runs.model_soup.enable=true", "pruning.enable=true"),
        outputs=(f"{MODELS}/*/ensemble.json",),
        reads=("checkpoints", "folds", "images"),
    ),
    "stack": DebugSection(
        "fit meta-learners on out-of-fold predictions",
        (("stack",),),
        ("runs.stacking.enable=true",),
        ("runs.stacking.mlp_config.epochs=1", "runs.stacking.xgb_config.n_estimators=5"),
        outputs=(f"{MODELS}/stacking_*/ensemble.json",),
        reads=("checkpoints", "folds", "images"),
    ),
    "fusion_train": DebugSection(
        "train fusion heads on embeddings",
        (("fusion-train",),),
        ("runs.fusion.enable=true", "runs.moe.enable=false"),
        ("runs.fusion.fusion_config.epochs=1",),
        outputs=(f"{MODELS}/fusion_*/ensemble.json",),
        reads=("checkpoints", "folds", "images"),
        trains=True,
    ),
    "moe": DebugSection(
        "train the mixture of experts",
        (("fusion-train",),),
        (
            *("runs.fusion.enable=false", "runs.moe.enable=true"),
            *("runs.moe.num_experts=2", "runs.moe.top_k=1"),
        ),
        ("runs.moe.epochs=1",),
        outputs=(f"{MODELS}/moe/ensemble.json",),
        reads=("checkpoints", "folds", "images"),
        trains=True,
    ),
    "meta_fuse": DebugSection(
        "fit an ensemble of ensembles",
        (("build-ensemble",), ("stack",), ("meta-fuse",)),
        (
            *VOTING_ONLY,
            *("runs.stacking.enable=true", "runs.stacking.meta_learners=[lr]", "runs.meta_fuser.enable=true"),
            "runs.meta_fuser.input_ensembles=[soft_voting,logit_averaging,stacking_lr]",
        ),
        ("runs.meta_fuser.mlp_config.epochs=1",),
        outputs=(f"{MODELS}/meta_fuser/ensemble.json",),
        reads=("checkpoints", "folds", "images"),
    ),
    "recompute_bn": DebugSection(
        "recompute BatchNorm statistics of every member from train images",
        (("probe", "recompute_bn"),),
        reads=("checkpoints", "images"),
        per_member=True,
    ),
    "evaluate": DebugSection(
        "compute scores, ranking and recommendation",
        (("build-ensemble",), ("evaluate",)),
        VOTING_ONLY,
        outputs=("metrics_output/ensembles/ranking.json",),
        reads=("checkpoints", "folds", "images"),
    ),
    "distill": DebugSection(
        "distil soft voting into a student, for one epoch",
        (("build-ensemble",), ("distill",)),
        (*VOTING_ONLY, "distillation.enable=true", f"distillation.teacher={VOTING_ENSEMBLE}"),
        ("distillation.epochs=1", "distillation.student=CustomMobileOne"),
        outputs=(f"{MODELS}/distilled_*/ensemble.json",),
        reads=("checkpoints", "folds", "images"),
        trains=True,
    ),
    "export": DebugSection(
        "export one ensemble and check parity",
        (("build-ensemble",), ("export", "--model-name", VOTING_ENSEMBLE)),
        (*VOTING_ONLY, "exports.enable=true"),
        outputs=(f"deployment_models/{VOTING_ENSEMBLE}/export_status.json",),
        reads=("checkpoints", "folds", "images"),
    ),
}
"""Sections in the order of `--section all`."""
ALL, RESET = "all", "reset"


def sections_to_run(section: str) -> list[str]:
    """Names of the sections to run for `--section`, prerequisites first."""
    if section == ALL:
        return list(SECTIONS)
    return [*SECTIONS[section].prerequisites, section]


def missing_commands(section: DebugSection, commands: Container[str]) -> list[str]:
    """Commands of its steps that are not in `commands`."""
    return [step[0] for step in section.steps if step[0] != "probe" and step[0] not in commands]


def plan_section(section: DebugSection, config: Config, workspace: Workspace, arch: str | None) -> dict[str, Any]:
    """Estimate what a section reads from the workspace and what it costs, from file sizes only.

    Returns `{reads: [{path, bytes}], images, megabytes_read, seconds, megabytes_written, memory_mb, missing: [..]}`.
    """
    checkpoints = catalog.checkpoint_files(workspace)
    names = [arch] if arch and section.per_member else list(config.backbones.selected or checkpoints)
    finals = {name: checkpoints[name]["final"] for name in names if "final" in checkpoints.get(name, {})}
    files: list[Path] = list(finals.values()) if "checkpoints" in section.reads else []
    missing = [] if finals else [f"a final checkpoint of {', '.join(names[:3])}"]
    if "folds" in section.reads:
        folds = [workspace.base_oof(name) for name in finals]
        files += [path for path in folds if path.is_file()]
        if section.reads[0] == "folds" and not any(path.is_file() for path in folds):
            missing.append("out-of-fold predictions (kfold_results/*_oof_predictions.npz)")
    images = {split: sum(1 for _ in (workspace.split_dir / split).glob("*/*")) for split in SPLITS}
    if "images" in section.reads and not all(images.values()):
        missing += [f"images in {workspace.split_dir / split}" for split, count in images.items() if not count]
    sizes = [path.stat().st_size for path in finals.values()]
    n_images = sum(images.values()) if "images" in section.reads else 0
    batch_size, img_size = config.dataset.batch_size, config.dataset.img_size
    if section.trains:
        expected = estimates.estimate_training(
            sizes[:1], images["train"], epochs=1, kept=1, batch_size=batch_size, img_size=img_size
        )
    else:
        expected = estimates.estimate_extraction(
            sizes, n_images, to_decode=n_images, batch_size=batch_size, img_size=img_size
        )
    values = batch_size * 3 * img_size**2
    copies = TRAINING_COPIES if section.trains else WEIGHT_COPIES
    memory = copies * max(sizes, default=0) + 4 * values * ACTIVATIONS_PER_INPUT
    file_sizes = [path.stat().st_size for path in files]
    return {
        "reads": [{"path": str(path), "bytes": size} for path, size in zip(files, file_sizes, strict=True)],
        "images": images if "images" in section.reads else {},
        "megabytes_read": sum(file_sizes) / 1e6,
        "seconds": expected.seconds,
        "megabytes_written": expected.megabytes,
        "memory_mb": memory / 1e6,
        "missing": missing,
    }


def format_plan(name: str, plan: dict[str, Any], sandbox: Path) -> Iterator[str]:
    """Lines that describe the plan of one section."""
    section = SECTIONS[name]
    yield f"{name}: {section.description}"
    for step in plan["steps"]:
        yield f"    runs    {step}"
    for item in plan["reads"][:MAX_FILES_LISTED]:
        yield f"    reads   {item['path']}  {caches.format_bytes(item['bytes'])}"
    if len(plan["reads"]) > MAX_FILES_LISTED:
        yield f"    reads   {len(plan['reads']) - MAX_FILES_LISTED} more files"
    if plan["images"]:
        yield f"    reads   images: {', '.join(f'{split} {count}' for split, count in plan['images'].items())}"
    for pattern in section.outputs:
        yield f"    writes  {sandbox / pattern}"
    yield (
        f"    costs   about {max(1, plan['seconds']):.0f} s, {max(1, plan['memory_mb']):.0f} MB of memory in "
        f"addition to the libraries, {max(1, plan['megabytes_written']):.0f} MB of disk"
    )
    for item in plan["missing"]:
        yield f"    missing {item}"
