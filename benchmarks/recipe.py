"""The recipe of the tiny networks: label smoothing, rate, length and which weights of a training are kept.

    python benchmarks/recipe.py                              all trials; trains for 35 minutes at most
    python benchmarks/recipe.py --trials usual "rate / 2"    some of them by name
    python benchmarks/recipe.py --minutes 0                  trains nothing and reports what is finished
    python benchmarks/recipe.py --quick                      one network, one split, two epochs; not the one to report

scikit-learn's handwritten digits, split into 300 train, 100 val and 1,397 test images by seeds that no other table
uses; six networks of the fifteen. One training gives several candidates: the weights at the best epoch on val of a
training that stops early, the same without early stopping, those of the last epoch, and exponential moving averages.
Accuracy is that of single networks on test; temperatures are fitted on val. What is finished is kept in
`benchmarks/zoo/recipe`, one file per training. One thread. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import prepare
from reporting import interval, report, row

PROJECT = Path(__file__).resolve().parents[1]
FOLDER = prepare.ZOO / "recipe"
SIDE = 32
TRAIN, VAL = 300, 100
FIRST_SEED = 7000  # of the splits; those of prepare.py count from 0
PATIENCE = 5  # epochs after the middle, as the base pipeline had it
HEAD_RATE = 1e-3
AVERAGED = {"average 1": 1.0, "average 4": 4.0}  # epochs over which a moving average of the weights extends
KEPT = ("early", "best", "last", *AVERAGED)
VERSION = 1  # raised whenever the same trial would give other figures
AGAIN = "Remove it, then run benchmarks/recipe.py again"


@dataclass(frozen=True)
class Trial:
    """A recipe; the defaults are those that the tiny networks had before this experiment."""

    epochs: int = 40
    """Of fine-tuning, after one epoch of head training."""
    rate: float = 2e-3
    peak: float = 5.0
    """Factor of the one-cycle schedule on the rate."""
    floor: float = 0.1
    """Share of the rate at which the transformers' cosine ends."""
    smoothing: tuple[float, float] = (0.1, 0.05)
    """Of the labels, for transformers and for the others."""
    weight_decay: float = 1e-4
    batch: int = 32
    augment: str = "no_flip"

    def values(self, *, transformer: bool) -> dict[str, Any]:
        """What of it decides the training of one kind of networks: equal values, equal weights."""
        values = asdict(self) | {"smoothing": self.smoothing[not transformer]}
        del values["peak" if transformer else "floor"]
        return values


USUAL = Trial()
TRIALS = {
    "usual": USUAL,
    "no smoothing": replace(USUAL, smoothing=(0.0, 0.0)),
    "smoothing 0.1": replace(USUAL, smoothing=(0.1, 0.1)),
    "rate / 2": replace(USUAL, rate=1e-3),
    "rate * 2": replace(USUAL, rate=4e-3),
    "to zero": replace(USUAL, floor=0.0),
    "decay 0.05": replace(USUAL, weight_decay=0.05),
    "35 epochs": replace(USUAL, epochs=35),
    "32 epochs": replace(USUAL, epochs=32),
    "batches of 16": replace(USUAL, batch=16),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing within the time, then report; returns 0."""
    parser = argparse.ArgumentParser(prog="recipe.py", description="The recipe of the tiny networks.")
    parser.add_argument("--trials", nargs="+", choices=TRIALS, metavar="NAME", help=f"of {', '.join(TRIALS)}")
    parser.add_argument("--splits", type=int, default=3, metavar="N", help="splits of the digits (default: 3)")
    parser.add_argument("--minutes", type=float, default=35, metavar="N", help="stop training after (default: 35)")
    parser.add_argument("--quick", action="store_true", help="one network, one split, two epochs")
    options = parser.parse_args(argv)
    trials = {name: TRIALS[name] for name in options.trials or TRIALS}
    backbones, splits = prepare.BACKBONES, options.splits
    if options.quick:
        trials, backbones, splits = {"usual": replace(USUAL, epochs=2)}, prepare.BACKBONES[:1], 1
    _set_up()
    deadline = time.monotonic() + 60 * options.minutes
    trained: dict[str, dict[int, dict[str, dict[str, Any]]]] = {name: {} for name in trials}
    for split in range(splits):  # a split is finished in all trials before the next, so that trials are paired
        for backbone in backbones:
            for name, trial in trials.items():
                outcome = outcome_of(trial, backbone, split, may_train=time.monotonic() < deadline)
                if outcome is not None:
                    trained[name].setdefault(split, {})[backbone] = outcome
    rows = [entry for name, of_splits in trained.items() for entry in rows_of(name, of_splits, trained)]
    report("recipe", rows, quick=options.quick, packages=("numpy", "torch", "timm"), splits=splits)
    return 0


def _set_up() -> None:
    """The project on the path, its networks small, one thread."""
    sys.path.insert(0, str(PROJECT))
    from utils.operations.demo import write_digits

    os.environ |= {
        "DBT_MODEL_SIZE": "tiny",
        "DBT_BASE_DIR": tempfile.mkdtemp(prefix="recipe-"),
        "DBT_IMAGE_CACHE_DIR": str(prepare.ZOO / "image_cache"),
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_digits(prepare.ZOO / "images")
    import torch

    from utils import base_back

    torch.set_num_threads(1)
    base_back.bind()


# one training --------------------------------------------------------------------------------------------------------


@cache
def datasets(split: int) -> dict[str, Any]:
    """The images of {train, val, test} of a split, stratified by class."""
    from sklearn.model_selection import train_test_split

    from utils.datasets import DecodedDataset
    from utils.samples import content_digests, scan

    classes, samples = scan(prepare.ZOO / "images")
    digests = content_digests(samples)
    contents = [digests[sample.sample_id][2] for sample in samples]
    labels = np.array([sample.label for sample in samples])
    seed = FIRST_SEED + split
    fitting, test = train_test_split(
        np.arange(len(samples)), train_size=TRAIN + VAL, stratify=labels, random_state=seed
    )
    train, val = train_test_split(fitting, train_size=TRAIN, stratify=labels[fitting], random_state=seed)
    everything = DecodedDataset(samples, classes, contents, SIDE)
    return {name: everything.subset(rows) for name, rows in (("train", train), ("val", val), ("test", test))}


def outcome_of(trial: Trial, backbone: str, split: int, *, may_train: bool) -> dict[str, Any] | None:
    """What `train` returns, from its file where it was trained before; None where it may not be trained now."""
    from training.pipeline import TRANSFORMERS
    from utils.core.artifacts import digest_of, read_arrays, write_arrays

    values = trial.values(transformer=backbone in TRANSFORMERS)
    path = FOLDER / f"{digest_of([VERSION, values, backbone, split])[:16]}.npz"
    if path.is_file():
        return read_arrays(path, remedy=AGAIN)
    if not may_train:
        return None
    start = time.process_time()
    outcome = train(trial, backbone, split)
    outcome["seconds"] = np.array(time.process_time() - start)
    write_arrays(path, outcome)
    scores = scores_of(outcome, "last")
    print(
        f"split {split}, {backbone}, {values}: {outcome['seconds']:.0f} CPU s, last epoch {scores['accuracy']:.4f}",
        file=sys.stderr,
        flush=True,
    )
    return outcome


def train(trial: Trial, backbone: str, split: int) -> dict[str, np.ndarray]:
    """`<kept>/val` and `<kept>/test`: logits (N, C) of each candidate of one training; `<kept>/epochs` it ran."""
    import torch

    from models import create_custom_backbone
    from utils.datasets import BatchLoader

    parts, classes = datasets(split), len(datasets(split)["train"].classes)
    seed = FIRST_SEED + split
    torch.manual_seed(seed)
    model = create_custom_backbone(backbone, classes, size="tiny", img_size=SIDE)
    loader = BatchLoader(parts["train"], trial.batch, training=True, seed=seed, kind=trial.augment)
    head = list(model.get_classifier().parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is each for each in head))
    _Phase(trial, model, backbone, loader, 1, HEAD_RATE).epoch()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    phase = _Phase(trial, model, backbone, loader, trial.epochs, trial.rate)
    scores: list[tuple[float, float]] = []
    of_records: dict[int, dict[str, Any]] = {}
    for epoch in range(trial.epochs):
        phase.epoch()
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        logits = torch.from_numpy(logits_of(model, parts["val"]))
        targets = torch.tensor(parts["val"].targets)
        accuracy = float((logits.argmax(dim=1) == targets).float().mean())
        scores.append((accuracy, -float(phase.criterion(logits, targets))))
        if scores[-1] > max(scores[:-1], default=(-1.0, 0.0)):
            of_records[epoch] = weights
    stopped, best = stopped_early(scores)
    candidates = {
        "early": (stopped, of_records[best]),
        "best": (trial.epochs - 1, of_records[max(of_records)]),
        "last": (trial.epochs - 1, weights),
    }
    for name, average in phase.averages.items():
        candidates[name] = (trial.epochs - 1, average.module.state_dict())
    outcome: dict[str, np.ndarray] = {}
    logits_of_weights: dict[int, dict[str, np.ndarray]] = {}
    for name, (epoch, weights) in candidates.items():
        if id(weights) not in logits_of_weights:
            model.load_state_dict(weights)
            logits_of_weights[id(weights)] = {part: logits_of(model, parts[part]) for part in ("val", "test")}
        outcome |= {f"{name}/{part}": logits for part, logits in logits_of_weights[id(weights)].items()}
        outcome[f"{name}/epochs"] = np.array(epoch + 1)
    return outcome | {f"labels/{part}": np.array(parts[part].targets) for part in ("val", "test")}


def stopped_early(scores: Sequence[tuple[float, float]]) -> tuple[int, int]:
    """The epoch after which a training stops, and the best one by then, of (accuracy, -loss) on val by epoch.

    It stops where `PATIENCE` epochs have brought nothing better, counted from the middle of the schedule.
    """
    best = 0
    for epoch, score in enumerate(scores):
        best = epoch if score > scores[best] else best
        if epoch - max(best, len(scores) // 2) >= PATIENCE:
            return epoch, best
    return len(scores) - 1, best


class _Phase:
    """Epochs under one schedule; `averages` follow the weights after each step."""

    def __init__(self, trial: Trial, model: Any, backbone: str, loader: Any, epochs: int, rate: float) -> None:
        import torch
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        from training.pipeline import RATE_FACTORS, TRANSFORMERS

        self.model, self.loader = model, loader
        transformer = backbone in TRANSFORMERS
        self.criterion = torch.nn.CrossEntropyLoss(label_smoothing=trial.smoothing[not transformer])
        rate *= RATE_FACTORS.get(backbone, 1.0)
        self.optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=trial.weight_decay, fused=True)
        steps = epochs * len(loader)
        if transformer:
            warm = max(1, min(3 * len(loader), steps // 4))
            self.schedule: Any = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer, lambda step: _cosine(step, warm, steps, trial.floor)
            )
        else:
            total = max(steps, 2) + 1
            self.schedule = torch.optim.lr_scheduler.OneCycleLR(
                self.optimizer,
                trial.peak * rate,
                total_steps=total,
                pct_start=max(0.2, 2 / total),
                div_factor=20,
                final_div_factor=50,
            )
        self.averages = {
            name: AveragedModel(
                model, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / (length * len(loader) + 1)), use_buffers=True
            )
            for name, length in AVERAGED.items()
        }

    def epoch(self) -> None:
        """Train one epoch."""
        from training.pipeline import train_epoch_optimized

        train_epoch_optimized(self.model, self.loader, self.optimizer, self.criterion, scheduler=self)

    def step(self) -> None:
        """After each step of the optimizer: the next rate, and the averages."""
        self.schedule.step()
        for average in self.averages.values():
            average.update_parameters(self.model)


def _cosine(step: int, warm: int, steps: int, floor: float) -> float:
    if step < warm:
        return (step + 1) / warm
    progress = min(1.0, (step - warm) / max(1, steps - warm))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def logits_of(model: Any, dataset: Any) -> np.ndarray:
    """Logits float32 (N, C) in evaluation mode."""
    import torch

    from utils.datasets import BatchLoader

    model.eval()
    with torch.inference_mode():
        return torch.cat([model(images) for images, _ in BatchLoader(dataset, 256)]).numpy()


# rows ----------------------------------------------------------------------------------------------------------------


def scores_of(outcome: Mapping[str, np.ndarray], kept: str) -> dict[str, float]:
    """Test accuracy and log-loss of one candidate, the latter after a temperature fitted on val."""
    from utils.numeric.metrics import accuracy, log_loss, softmax
    from utils.numeric.temperature import fit_temperature

    temperature = fit_temperature(outcome[f"{kept}/val"], outcome["labels/val"])
    probabilities = softmax(outcome[f"{kept}/test"] / temperature)
    labels = outcome["labels/test"]
    return {"accuracy": accuracy(probabilities, labels), "log_loss": log_loss(probabilities, labels)}


def pooled_scores(outcomes: Sequence[Mapping[str, np.ndarray]], kept: str) -> dict[str, float]:
    """Of the mean of the candidates' probabilities, each with its temperature."""
    from utils.numeric.metrics import accuracy, log_loss, softmax
    from utils.numeric.temperature import fit_temperature

    labels = outcomes[0]["labels/test"]
    mean = np.mean(
        [softmax(each[f"{kept}/test"] / fit_temperature(each[f"{kept}/val"], each["labels/val"])) for each in outcomes],
        axis=0,
    )
    return {"accuracy": accuracy(mean, labels), "log_loss": log_loss(mean, labels)}


def rows_of(
    name: str, of_splits: Mapping[int, Mapping[str, Any]], trained: Mapping[str, Mapping[int, Mapping[str, Any]]]
) -> list[dict]:
    """Rows of a trial: per candidate mean accuracy and its difference to the usual recipe, both stopped early."""
    rows = []
    if not any(of_splits.values()):
        return [row(f"{name}: not trained within the time", None, "", None, None, None)]
    usual = trained.get("usual", {})
    for kept in KEPT:
        pairs = [(split, backbone) for split, outcomes in of_splits.items() for backbone in outcomes]
        scores = {pair: scores_of(of_splits[pair[0]][pair[1]], kept) for pair in pairs}
        epochs = np.mean([float(of_splits[split][backbone][f"{kept}/epochs"]) for split, backbone in pairs])
        shared = [(s, b) for s, b in pairs if b in usual.get(s, {})]
        gains = [scores[s, b]["accuracy"] - scores_of(usual[s][b], "early")["accuracy"] for s, b in shared]
        gain = ""
        if gains and (name, kept) != ("usual", "early"):
            bounds = interval(gains)
            gain = f", {np.mean(gains):+.4f} beside usual, early" + (
                f" [{bounds[0]:+.4f}, {bounds[1]:+.4f}] over {len(gains)}" if bounds else ""
            )
        pooled = [pooled_scores(list(outcomes.values()), kept) for outcomes in of_splits.values()]
        losses = np.mean([each["log_loss"] for each in scores.values()])
        what = (
            f"log-loss {losses:.4f}; pooled {np.mean([p['accuracy'] for p in pooled]):.4f}, "
            f"{np.mean([p['log_loss'] for p in pooled]):.4f}; {epochs:.1f} epochs{gain}"
        )
        mean = float(np.mean([each["accuracy"] for each in scores.values()]))
        rows.append(row(f"{name}, {kept}: accuracy of {len(pairs)} networks", mean, "", None, None, what))
    return rows


if __name__ == "__main__":
    sys.exit(main())
