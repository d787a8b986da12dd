"""Snapshot ensembles: one training whose rate falls to nothing again and again, and a network kept from each fall.

Huang, Li, Pleiss, Liu, Hopcroft and Weinberger 2017, Snapshot Ensembles: Train 1, get M for free. The schedule is that
of Loshchilov and Hutter 2017, SGDR; the optimizer goes on over the restarts with what it knows of the gradients.
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

VERSION = 1  # raised whenever the same recipe would give other snapshots
ROLE = "cycle"  # what such a checkpoint says it is; the late epochs of fine-tuning say "snapshot"
PEAK = 2.5  # of the usual rate: far enough to leave a minimum, near enough for transformers


def cyclic_share(step: int, steps_per_cycle: int, warm_up: int = 0) -> float:
    """Share of the highest rate at an optimizer step, counted from 0: half a cosine in each cycle, from 1 towards 0.

    The first `warm_up` steps of the whole training, whose network is fresh, rise in a line instead.
    """
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step % steps_per_cycle) / steps_per_cycle)) / 2


def create_cyclic_scheduler(
    optimizer: torch.optim.Optimizer, epochs: int, steps_per_epoch: int, backbone_name: str, *, cycles: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """`cyclic_share` of the optimizer's rate in each of `cycles` equal parts of the epochs.

    Warm-up takes three epochs, a quarter of the first cycle at the most.
    """
    steps = max(1, epochs * steps_per_epoch // cycles)
    warm_up = min(WARMUP_EPOCHS * steps_per_epoch, steps // 4)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, partial(cyclic_share, steps_per_cycle=steps, warm_up=warm_up))


def snapshot_unit(recipe: Recipe) -> Unit:
    """The training of a backbone's snapshots: a fresh network like the trained one, as many cycles as the settings say.

    Its files go on behind the numbers that the late epochs of fine-tuning have or will have.
    """
    numbered = 0 if recipe.base_back else recipe.snapshots
    first = max(numbered, _late_snapshots(recipe.backbone)) + 1
    recipe = replace(
        recipe.like_trained(),
        epochs_head=0,
        epochs_finetune=settings.CYCLES * settings.EPOCHS_PER_CYCLE,
        snapshots=settings.CYCLES,
        head_lr=0.0,  # what takes no part is the same whatever the settings say, and so is the digest
    )
    return Unit("snapshots", recipe, recipe.digest("snapshots", VERSION), first=first)


def snapshot_phase(recipe: Recipe) -> Phase:
    """All cycles of the recipe that `snapshot_unit` made."""
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
    """Remove what an earlier training with more cycles left behind the last snapshot of this one."""
    last = unit.first + unit.recipe.snapshots - 1
    for number, path in _numbered(settings.CKPT_DIR, unit.recipe.backbone):
        if number > last and read_extra(path).get("stage") == ROLE:
            path.unlink()


def _late_snapshots(backbone: str) -> int:
    """The last number that is not a cycle's, in this workspace and where the trained checkpoints lie."""
    folders = dict.fromkeys((settings.TRAINED_DIR, settings.CKPT_DIR))
    found = (entry for folder in folders for entry in _numbered(folder, backbone))
    return max((number for number, path in found if read_extra(path).get("stage") != ROLE), default=0)


def _numbered(folder: Path, backbone: str) -> list[tuple[int, Path]]:
    found = [(path.stem.rpartition("_snapshot")[2], path) for path in folder.glob(f"{backbone}_snapshot*.pth")]
    return sorted((int(number), path) for number, path in found if number.isdigit())
