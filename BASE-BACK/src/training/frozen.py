"""Linear heads on the features of a frozen pretrained network: the units of mode `frozen`.

No epochs are trained and the val split is not used. The head of each fold selects its L2 strength by cross-validation
within the training rows of the fold, so that out-of-fold predictions have no leakage; the final head does so within
the train split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import settings
from training.embeddings import compute, embeddings_of, missing_contents
from training.fitting import LAST
from training.linear_head import LinearHead, fit_head, log_loss
from training.pipeline import macro_scores, write_checkpoint
from training.pretrained import Pretrained, create_pretrained
from training.recipe import Recipe
from training.units import Outcome, Unit, checkpoint_path
from utils import DEVICE
from utils.datasets import DecodedDataset
from utils.splitting import fold_groups, split_contents
from utils.trunks import trunk_digest, whole_network

CHECKED_ROWS = 8  # images on which the saved network is compared with head and embeddings
AGREES = 1e-3 if DEVICE.type == "cpu" else 0.02  # relative to the largest logit; TF32 convolutions keep ten bits
EMBEDDED_SPLITS = {"fold": ("train", "val"), "oof": ("train",), "train": ("train", "val"), "test": ("test",)}
"""Kind of a unit -> the splits whose embeddings it needs."""
LEAST_SHARD = 32  # images; starting a process for fewer costs more than it saves


def with_embeddings(units: list[Unit], jobs: int) -> list[Unit]:
    """The units, preceded by units that compute the missing embeddings of frozen networks in up to `jobs` parts."""
    embedding: list[Unit] = []
    after: dict[str, tuple[str, ...]] = {}
    for name in dict.fromkeys(unit.recipe.backbone for unit in units if unit.recipe.is_frozen):
        waiting = [unit for unit in units if unit.recipe.backbone == name and unit.kind in EMBEDDED_SPLITS]
        splits = tuple(sorted({split for unit in waiting for split in EMBEDDED_SPLITS[unit.kind]}))
        contents = [content for split in splits for content in split_contents(settings.SPLIT_DIR, split)[2].values()]
        recipe = waiting[0].recipe if waiting else None
        missing = missing_contents(recipe.pretrained, contents) if recipe and recipe.pretrained else []
        if recipe is None or not missing:
            continue
        shards = max(1, min(jobs, len(missing) // LEAST_SHARD))
        parts = [
            Unit("embed", recipe, recipe.digest("embed", shard, shards), splits=splits, shard=shard, shards=shards)
            for shard in range(shards)
        ]
        embedding += parts
        after |= {unit.name: tuple(part.name for part in parts) for unit in waiting}
    return embedding + [replace(unit, after=(*after.get(unit.name, ()), *unit.after)) for unit in units]


def embed_unit(unit: Unit) -> Outcome:
    """Compute the embeddings of one part of the images."""
    network = _network(unit.recipe)
    counts = [compute(network, unit.recipe.dataset(split), unit.shard, unit.shards) for split in unit.splits]
    return Outcome((), {"images": sum(counts)})


def fold_head(unit: Unit, fold_of: np.ndarray, train: DecodedDataset) -> Outcome:
    """Fit the head on the train rows outside one fold of `fold_of` (N,), and save only its tensors."""
    recipe, network = unit.recipe, _network(unit.recipe)
    fitting = train.subset(np.flatnonzero(fold_of != unit.fold))
    seed = recipe.seed_for("fold", unit.fold, unit.folds, "head")
    head = _fit(recipe, network, fitting, seed)
    val = recipe.dataset("val")
    scores = _scores(head.logits(embeddings_of(network, val)[0]), np.array(val.targets))
    path = checkpoint_path(recipe.backbone, f"fold{unit.fold}")
    trunk = {"checkpoint": checkpoint_path(recipe.backbone, "final").name, "sha256": network.trunk_sha256}
    extra = recipe.explain() | _facts(head) | {"trunk": trunk, "fold": unit.fold, "folds": unit.folds}
    extra |= {"accuracy": scores["accuracy"], "seed": seed}
    write_checkpoint(path, {"model_state_dict": _tensors(network, head), "extra": extra})
    return Outcome((path,), {"val_accuracy": scores["accuracy"], "fold_seed": seed, "strength": head.strength})


def logits_of_head(recipe: Recipe, weights: Mapping[str, Tensor], dataset: DecodedDataset) -> np.ndarray:
    """Logits of every row, float32 (N, C), from the head's tensors `weights` and the network's embeddings."""
    network = _network(recipe)
    weight, bias = (weights[name].numpy() for name in _weight_and_bias(network))
    return LinearHead(weight, bias, 0.0, {}).logits(embeddings_of(network, dataset)[0])


def train_head(unit: Unit) -> Outcome:
    """Fit the head on all train rows and save the whole network, which is the deployed one."""
    recipe, network = unit.recipe, _network(unit.recipe)
    train, val = recipe.dataset("train"), recipe.dataset("val")
    head = _fit(recipe, network, train, recipe.seed_for("final", "head"))
    model = create_pretrained(network, len(recipe.classes))
    model.load_state_dict(whole_network(model.state_dict(), _tensors(network, head)))
    if trunk_digest(model.state_dict(), network.head) != network.trunk_sha256:
        raise ValueError(f"{network.path}: the weights changed while the training ran; run the command again")
    _compare(network, model.eval(), head, train.subset(np.arange(min(CHECKED_ROWS, len(train)))))
    scores = _scores(head.logits(embeddings_of(network, val)[0]), np.array(val.targets))
    metrics: dict[str, Any] = {
        "backbone_name": recipe.backbone,
        "best_accuracy": scores["accuracy"],
        **{f"final_{name}": scores[name] for name in ("accuracy", "precision", "recall")},
        "final_f1_score": scores["f1"],
        "final_val_loss": scores["loss"],
        "epochs_head": 0,
        "epochs_finetune": 0,
        **_facts(head),
        "visualization_paths": {},
        "visualization_summary": "plots are not made by this version",
    }
    path = checkpoint_path(recipe.backbone, "final")
    final = {key: value for key, value in metrics.items() if not key.startswith("visualization")}
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    write_checkpoint(path, {"model_state_dict": weights, "extra": final | recipe.explain()})
    _remove_earlier(recipe)
    return Outcome((path,), {"metrics": metrics, "history": {"head": [], "finetune": []}})


def test_head(recipe: Recipe, weights: Mapping[str, Tensor], test: DecodedDataset) -> dict[str, Any]:
    """Metrics of the final network on the test split, from the embeddings of its images."""
    scores = _scores(logits_of_head(recipe, weights, test), np.array(test.targets))
    return {f"test_{name}": value for name, value in scores.items()}


def _network(recipe: Recipe) -> Pretrained:
    assert recipe.pretrained is not None
    return recipe.pretrained


def _fit(recipe: Recipe, network: Pretrained, dataset: DecodedDataset, seed: int) -> LinearHead:
    groups = fold_groups(dataset.records, dataset.contents, 1)
    labels = np.array(dataset.targets, dtype=np.int64)
    factors = recipe.weights_of(labels, or_by_sampling=True)
    return fit_head(embeddings_of(network, dataset), labels, groups, len(recipe.classes), seed, factors)


def _weight_and_bias(network: Pretrained) -> tuple[str, str]:
    weight, bias = sorted(network.head, key=lambda name: not name.endswith("weight"))
    return weight, bias


def _tensors(network: Pretrained, head: LinearHead) -> dict[str, Tensor]:
    weight, bias = _weight_and_bias(network)
    return {weight: torch.from_numpy(head.weight.copy()), bias: torch.from_numpy(head.bias.copy())}


def _facts(head: LinearHead) -> dict[str, Any]:
    losses = {f"{strength:.6g}": loss for strength, loss in head.inner_losses.items()}
    return {
        "stage": "head",
        "strength": head.strength,
        "inner_log_losses": losses,
        "selection": LAST,
        "threads": torch.get_num_threads(),
    }


def _scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    names = ("accuracy", "precision", "recall", "f1")
    scores = dict(zip(names, macro_scores(logits.argmax(axis=1), labels, logits.shape[1]), strict=True))
    return {"loss": log_loss(logits, labels), **scores}


def _compare(network: Pretrained, model: Any, head: LinearHead, dataset: DecodedDataset) -> None:
    """Raise ValueError if the logits of the whole network differ from those of embeddings and head."""
    expected = head.logits(embeddings_of(network, dataset)[0])
    with torch.inference_mode():
        logits = model(dataset.crops(np.arange(len(dataset)))).numpy()
    difference = float(np.abs(logits - expected).max())
    if not difference <= AGREES * max(1.0, float(np.abs(expected).max())):
        raise ValueError(
            f"the network's logits differ by {difference:.3g} from those of its embeddings and head; remove "
            f"{settings.IMAGE_CACHE_DIR / 'embeddings'} and run the command again"
        )


def _remove_earlier(recipe: Recipe) -> None:
    """Remove the stage checkpoints of an earlier fine-tuning of the same name, which would not match this training."""
    for role in ("head_best", "finetune_best", "snapshot*"):
        for path in settings.CKPT_DIR.glob(f"{recipe.backbone}_{role}.pth"):
            path.unlink()
