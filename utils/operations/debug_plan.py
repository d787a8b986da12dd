"""What each section of `debug` runs, and what that would read, write and cost: a table and a look at the disk."""

from __future__ import annotations

from collections.abc import Iterator
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
"""The two simplest ensembles alone, for sections that need some ensemble to go on from."""
VOTING_ENSEMBLE = "soft_voting_ensemble"
MODELS = "ensembles/models"
MAX_FILES_LISTED = 12  # that a plan lists for each kind of file
WEIGHT_COPIES = 2  # of one member in memory: its file and its network
ACTIVATIONS_PER_INPUT = 40  # floats that a network keeps for each input value on the way
TRAINING_COPIES = 4  # weights, gradients and the optimizer's two


@dataclass(frozen=True)
class DebugSection:
    """One row of the table."""

    description: str
    steps: tuple[tuple[str, ...], ...]
    """Lines of the production command line, or `probe <name>` of `debug_probes`; the last is what is tried."""
    settings: tuple[str, ...] = ()
    """Values that the section needs in the configuration, as `--set` takes them."""
    quick_settings: tuple[str, ...] = ()
    """Values that keep a training of the section short."""
    outputs: tuple[str, ...] = ()
    """Files, as patterns below the sandbox, of which each must match one afterwards."""
    reads: tuple[str, ...] = ("checkpoints",)
    """Kinds of files of the workspace: checkpoints, folds, images."""
    per_member: bool = False
    """Whether `--arch` narrows it to one backbone; an ensemble of one would show nothing."""
    trains: bool = False
    prerequisites: tuple[str, ...] = ("discover",)
    """Sections that have to run before."""


SECTIONS: dict[str, DebugSection] = {
    "discover": DebugSection(
        "the scan of checkpoints, out-of-fold predictions and metrics",
        (("discover",),),
        outputs=("ensembles/ensemble_catalog.json",),
        reads=("checkpoints", "folds", "images"),
        prerequisites=(),
    ),
    "smoke": DebugSection(
        "every member loaded alone and run on a few images",
        (("probe", "smoke"),),
        reads=("checkpoints", "images"),
        per_member=True,
    ),
    "kfold": DebugSection(
        "out-of-fold predictions read and held against the train split",
        (("probe", "kfold"),),
        reads=("folds", "images"),
        per_member=True,
    ),
    "extract_embeddings": DebugSection(
        "logits and embeddings of train, val and test",
        (("probe", "extract_embeddings"),),
        outputs=("ensembles/fusion_embeddings/*/val.npy", "ensembles/predictions/*/val/logits.npy"),
        reads=("checkpoints", "images"),
        per_member=True,
    ),
    "build_ensemble": DebugSection(
        "votes, weights, soups and pruned ensembles",
        (("build-ensemble",),),
        ("runs.score_ensemble.enable=true", "runs.model_soup.enable=true", "pruning.enable=true"),
        outputs=(f"{MODELS}/*/ensemble.json",),
        reads=("checkpoints", "folds", "images"),
    ),
    "stack": DebugSection(
        "meta-learners on out-of-fold predictions",
        (("stack",),),
        ("runs.stacking.enable=true",),
        ("runs.stacking.mlp_config.epochs=1", "runs.stacking.xgb_config.n_estimators=5"),
        outputs=(f"{MODELS}/stacking_*/ensemble.json",),
        reads=("checkpoints", "folds", "images"),
    ),
    "fusion_train": DebugSection(
        "fusion heads on embeddings",
        (("fusion-train",),),
        ("runs.fusion.enable=true", "runs.moe.enable=false"),
        ("runs.fusion.fusion_config.epochs=1",),
        outputs=(f"{MODELS}/fusion_*/ensemble.json",),
        reads=("checkpoints", "folds", "images"),
        trains=True,
    ),
    "moe": DebugSection(
        "the mixture of experts",
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
        "an ensemble of ensembles",
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
        "BatchNorm statistics of every member anew, from train images",
        (("probe", "recompute_bn"),),
        reads=("checkpoints", "images"),
        per_member=True,
    ),
    "evaluate": DebugSection(
        "scores, ranking and recommendation",
        (("build-ensemble",), ("evaluate",)),
        VOTING_ONLY,
        outputs=("metrics_output/ensembles/ranking.json",),
        reads=("checkpoints", "folds", "images"),
    ),
    "distill": DebugSection(
        "a student of one epoch, taught by soft voting",
        (("build-ensemble",), ("distill",)),
        (*VOTING_ONLY, "distillation.enable=true", f"distillation.teacher={VOTING_ENSEMBLE}"),
        ("distillation.epochs=1", "distillation.student=CustomMobileOne"),
        outputs=(f"{MODELS}/distilled_*/ensemble.json",),
        reads=("checkpoints", "folds", "images"),
        trains=True,
    ),
    "export": DebugSection(
        "one ensemble as a package, loaded again and compared",
        (("build-ensemble",), ("export", "--model-name", VOTING_ENSEMBLE)),
        (*VOTING_ONLY, "exports.enable=true"),
        outputs=(f"deployment_models/{VOTING_ENSEMBLE}/export_status.json",),
        reads=("checkpoints", "folds", "images"),
    ),
}
"""In the order in which `--section all` runs them."""
ALL, RESET = "all", "reset"


def sections_to_run(section: str) -> list[str]:
    """The sections to run for `--section`, those before that are needed first."""
    if section == ALL:
        return list(SECTIONS)
    return [*SECTIONS[section].prerequisites, section]


def missing_commands(section: DebugSection, commands: object) -> list[str]:
    """Commands of its steps that the table of commands does not have."""
    return [step[0] for step in section.steps if step[0] != "probe" and step[0] not in commands]  # type: ignore[operator]


def plan_section(section: DebugSection, config: Config, workspace: Workspace, arch: str | None) -> dict[str, Any]:
    """What the section would read of the workspace, and what it would cost; looks at sizes and opens nothing.

    `{reads: [{path, bytes}], megabytes_read, seconds, megabytes_written, memory_mb, missing: [..]}`.
    """
    names = [arch] if arch and section.per_member else list(config.backbones.selected)
    found = catalog.checkpoint_files(workspace)
    own = {name: found[name]["final"] for name in names if "final" in found.get(name, {})}
    files: list[Path] = list(own.values()) if "checkpoints" in section.reads else []
    missing = [] if own else [f"a final checkpoint of {', '.join(names[:3])}"]
    if "folds" in section.reads:
        folds = [workspace.base_oof(name) for name in own]
        files += [path for path in folds if path.is_file()]
        if section.reads[0] == "folds" and not any(path.is_file() for path in folds):
            missing.append("out-of-fold predictions (kfold_results/*_oof_predictions.npz)")
    images = {split: sum(1 for _ in (workspace.split_dir / split).glob("*/*")) for split in SPLITS}
    if "images" in section.reads and not all(images.values()):
        missing += [f"images in {workspace.split_dir / split}" for split, count in images.items() if not count]
    sizes = [path.stat().st_size for path in own.values()]
    counted = sum(images.values()) if "images" in section.reads else 0
    cost = {"batch_size": config.dataset.batch_size, "img_size": config.dataset.img_size}
    if section.trains:
        expected = estimates.estimate_training(sizes[:1], images["train"], epochs=1, kept=1, **cost)
    else:
        expected = estimates.estimate_extraction(sizes, counted, to_decode=counted, **cost)
    values = config.dataset.batch_size * 3 * config.dataset.img_size**2
    copies = TRAINING_COPIES if section.trains else WEIGHT_COPIES
    memory = copies * max(sizes, default=0) + 4 * values * ACTIVATIONS_PER_INPUT
    read = [{"path": str(path), "bytes": path.stat().st_size} for path in files]
    return {
        "reads": read,
        "images": images if "images" in section.reads else {},
        "megabytes_read": sum(item["bytes"] for item in read) / 1e6,
        "seconds": expected.seconds,
        "megabytes_written": expected.megabytes,
        "memory_mb": memory / 1e6,
        "missing": missing,
    }


def format_plan(name: str, plan: dict[str, Any], sandbox: Path) -> Iterator[str]:
    """The plan of one section for a person."""
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
        f"    costs   about {max(1, plan['seconds']):.0f} s, {max(1, plan['memory_mb']):.0f} MB of memory beside the "
        f"libraries, {max(1, plan['megabytes_written']):.0f} MB of disk"
    )
    for what in plan["missing"]:
        yield f"    misses  {what}"
