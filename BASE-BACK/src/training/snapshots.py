"""Snapshot ensembles: one training with a cyclic learning rate, and one network saved at the end of each cycle.

Huang, Li, Pleiss, Liu, Hopcroft and Weinberger 2017, Snapshot Ensembles: Train 1, get M for free. The schedule is that
of Loshchilov and Hutter 2017, SGDR; the optimizer keeps its state over the restarts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from config import settings
from training.fitting import Phase
from training.pipeline import WARMUP_EPOCHS, read_extra
from training.recipe import Recipe
from training.units import Unit

VERSION = 1  # incremented whenever the same recipe gives other snapshots
ROLE = "cycle"  # `stage` in these checkpoints; "snapshot" in those of the last epochs of fine-tuning
PEAK = 2.5  # times the usual rate: high enough to leave a minimum, low enough for transformers


def cyclic_share(step: int, steps_per_cycle: int, warm_up: int = 0) -> float:
    """Fraction of the peak learning rate at an optimizer step, counted from 0: in each cycle a cosine from 1 towards 0.

    The first `warm_up` steps of the training are a linear warm-up instead.
    """
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step % steps_per_cycle) / steps_per_cycle)) / 2


def create_cyclic_scheduler(
    optimizer: torch.optim.Optimizer, epochs: int, steps_per_epoch: int, backbone_name: str, *, cycles: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """A scheduler that applies `cyclic_share` to the optimizer's rate, with `cycles` equal cycles.

    Warm-up takes three epochs, but at most a quarter of the first cycle.
    """
    steps = max(1, epochs * steps_per_epoch // cycles)
    warm_up = min(WARMUP_EPOCHS * steps_per_epoch, steps // 4)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, partial(cyclic_share, steps_per_cycle=steps, warm_up=warm_up))


def snapshot_unit(recipe: Recipe) -> Unit:
    """The unit that trains a backbone's snapshots: a new network like the trained one, for CYCLES cycles.

    Its files are numbered after those of the last epochs of fine-tuning, whether these exist yet or not.
    """
    numbered = 0 if recipe.base_back else recipe.snapshots
    first = max(numbered, _late_snapshots(recipe.backbone)) + 1
    recipe = replace(
        recipe.like_trained(),
        epochs_head=0,
        epochs_finetune=settings.CYCLES * settings.EPOCHS_PER_CYCLE,
        snapshots=settings.CYCLES,
        head_lr=0.0,  # settings without effect get fixed values, for a stable digest
    )
    return Unit("snapshots", recipe, recipe.digest("snapshots", VERSION), first=first)


def snapshot_phase(recipe: Recipe) -> Phase:
    """The phase with all cycles of the recipe of a `snapshot_unit`."""
    cycles = recipe.snapshots
    return Phase(
        name="cycles",
        epochs=recipe.epochs_finetune,
        rate=recipe.backbone_lr * PEAK,
        schedule=partial(create_cyclic_scheduler, cycles=cycles),
        kept=cycles,
        every=recipe.epochs_finetune // cycles,
    )


def remove_surplus_snapshots(unit: Unit) -> None:
    """Remove the snapshots of an earlier training with more cycles."""
    last = unit.first + unit.recipe.snapshots - 1
    for number, path in _numbered(settings.CKPT_DIR, unit.recipe.backbone):
        if number > last and read_extra(path).get("stage") == ROLE:
            path.unlink()


def _late_snapshots(backbone: str) -> int:
    """The highest number of a snapshot of fine-tuning, in CKPT_DIR and TRAINED_DIR; 0 without any."""
    folders = dict.fromkeys((settings.TRAINED_DIR, settings.CKPT_DIR))
    snapshots = (entry for folder in folders for entry in _numbered(folder, backbone))
    return max((number for number, path in snapshots if read_extra(path).get("stage") != ROLE), default=0)


def _numbered(folder: Path, backbone: str) -> list[tuple[int, Path]]:
    numbered = [(path.stem.rpartition("_snapshot")[2], path) for path in folder.glob(f"{backbone}_snapshot*.pth")]
    return sorted((int(number), path) for number, path in numbered if number.isdigit())
