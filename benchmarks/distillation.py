"""A student taught by an ensemble, beside the same network trained alone and beside its teacher; what an epoch costs.

    python benchmarks/prepare.py --splits 10       once, for hours: the small zoos whose predictions teach

    python benchmarks/distillation.py                  handwritten digits; without prepared splits one is made first
    python benchmarks/distillation.py --data DIR       the splits that were prepared of these images
    python benchmarks/distillation.py --quick          a zoo of two poor networks, three epochs; not the one to report

Per split: the weighted ensemble of six networks is fitted on honest rows (out-of-fold and val); its cross-fitted
predictions of the train rows teach CustomMobileOne (`targets: oof`), val stops the training, and test, which nobody has
seen, judges. Each split is trained on several times, from other first weights, and their mean counts: one training says
little. Intervals are Student's t over the splits. What is finished is kept beside the splits, so that it goes on where
it stopped. One thread; CPU seconds are compared, so that a busy machine disturbs little. `--curves FILE.png` draws the
learning curves (needs matplotlib). The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

import prepare
from distillation_rows import ALONE, TEACHER, averaged, draw, score_rows
from reporting import report, row

PROJECT = Path(__file__).resolve().parents[1]
STUDENT = "CustomMobileOne"
SIDE = 32
TEMPERATURES, ALPHA, RATE = {"student": 4.0, "student at T = 2": 2.0}, 0.5, 0.001  # the first are the configuration's
VERSION = 2  # raised whenever the same splits would give other figures
CACHE = (5000, 4, 10)  # images, views, classes whose targets are to stay below two megabytes
TRAININGS = 2  # of each split


def main(argv: Sequence[str] | None = None) -> int:
    """Run all rows; returns 0, also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="distillation.py", description="A student beside its controls.")
    parser.add_argument("--data", metavar="DIR", type=Path, help="the images whose prepared splits are read")
    parser.add_argument("--splits", metavar="N", type=int, help="how many of the prepared splits (default: all)")
    parser.add_argument("--epochs", metavar="N", type=int, help="of each training (default: as the zoo had them)")
    parser.add_argument("--trainings", metavar="N", type=int, default=TRAININGS, help=f"of a split ({TRAININGS})")
    parser.add_argument("--curves", metavar="FILE", type=Path, help="draw the learning curves into this PNG")
    parser.add_argument("--quick", action="store_true", help="a zoo of two poor networks, three epochs")
    options = parser.parse_args(argv)
    found = prepare.ready(options.data, quick=options.quick)
    if found is None:
        return 1
    files = found.files[: options.splits]
    print(f"{found.folder}: {len(files)} splits, {found.age_hours:.1f} hours old, digest {found.digest}")
    data = _set_up(options.data)
    epochs = options.epochs or (3 if options.quick else _epochs_for(data))
    with ExitStack() as stack:
        _on_one_thread(stack)
        # All splits first: whoever stops it has as many of them as there was time for.
        seeds = range(1 if options.quick else options.trainings)
        of_seeds = [[_kept(path, data, epochs, seed, whole=options.data is None) for path in files] for seed in seeds]
        outcomes = [averaged(entries) for entries in zip(*of_seeds, strict=True)]
        rows = [*score_rows(outcomes), *cost_rows(files[0], data, whole=options.data is None), cache_row()]
    title = "handwritten digits" if options.data is None else options.data.name
    if options.curves:
        trained = f"{len(files)} splits, {len(seeds)} trainings each"
        draw(outcomes, options.curves, f"{STUDENT}, {title}, {trained}")
    report(
        "distillation",
        rows,
        quick=options.quick,
        packages=("numpy", "torch", "timm"),
        data=title,
        **(found.facts() | {"splits": len(files)}),
        epochs=epochs,
        trainings=len(seeds),
        scores=[entry["scores"] for entry in outcomes],
    )
    return 0


def _set_up(data: Path | None) -> Path:
    """The folder of the images; puts the project on the path, its networks small."""
    sys.path[:0] = [str(PROJECT), str(PROJECT / "scripts")]
    from demo import write_digits

    folder = prepare.ZOO / "images" if data is None else data.expanduser().resolve()
    if data is None:
        write_digits(folder)
    os.environ |= {"DBT_MODEL_SIZE": "tiny", "DBT_BASE_DIR": tempfile.mkdtemp(prefix="distillation-")}
    return folder


def _epochs_for(data: Path) -> int:
    from demo import count_images, epochs_for

    return epochs_for(count_images(data))


def _on_one_thread(stack: ExitStack) -> None:
    import torch
    from threadpoolctl import threadpool_limits

    stack.enter_context(threadpool_limits(limits=1))
    torch.set_num_threads(1)


# one split -----------------------------------------------------------------------------------------------------------


def _kept(path: Path, data: Path, epochs: int, seed: int, *, whole: bool) -> dict[str, Any]:
    """The outcome of one training on a split, from beside it where it is there already."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    file = path.parent / "distillation" / f"{path.stem}-v{VERSION}-{epochs}-{seed}.json"
    if file.is_file():
        known = json.loads(file.read_text())
        if known["digest"] == digest:
            return known  # type: ignore[no-any-return]
    start = time.process_time()
    outcome = taught(prepare.read(path), data, epochs, seed, whole=whole) | {"digest": digest}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(outcome))
    print(
        f"{path.stem}, {seed}: {time.process_time() - start:.0f} CPU s, {_words(outcome)}", file=sys.stderr, flush=True
    )
    return outcome


def _words(outcome: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{who} {found['accuracy']:.4f} / {found['log_loss']:.4f}" for who, found in outcome["scores"].items()
    )


def taught(split: Mapping[str, np.ndarray], data: Path, epochs: int, seed: int, *, whole: bool) -> dict[str, Any]:
    """What became of one training on one split.

    `{scores: {who: {accuracy, log_loss, ece}}, agreement: {who: share}}` on test, `history` by epoch, and of the
    teacher's targets `entropy` and the scores `oof`, on train.
    """
    from utils.distillation_controls import agreement, scores
    from utils.distilling import Course, logits_of, train
    from utils.metrics import softmax

    teacher, labels = _teacher(split), split["test_labels"]
    album, known = _albums(split, data, whole=whole), ~np.isnan(teacher["train"]).any(axis=1)
    said, history = {TEACHER: teacher["test"]}, {}

    def say(_: int) -> np.ndarray:
        return teacher["train"]

    for who, temperature in {ALONE: None, **TEMPERATURES}.items():
        alpha = 0.0 if temperature is None else ALPHA
        lessons = _lessons(album["train"], "oof" if alpha else None, known, batch=_batch(album), seed=seed)
        course = Course(STUDENT, epochs, RATE, temperature or 1.0, alpha, seed=seed)
        model = _fresh(len(split["classes"]), seed)
        done = train(model, course, lessons, say if alpha else None, album["val"], device="cpu")
        said[who] = softmax(logits_of(model, album["test"], "cpu", done.weights))
        history[who] = done.history
    probabilities = np.exp(teacher["train"][known].astype(np.float64))
    return {
        "scores": {who: scores(said[who], labels) for who in (ALONE, *TEMPERATURES, TEACHER)},
        "agreement": {who: agreement(said[who], said[TEACHER]) for who in (ALONE, *TEMPERATURES)},
        "history": history,
        "entropy": float(-(probabilities * np.log(probabilities)).sum(axis=1).mean()),
        "oof": scores(probabilities, album["train"].images.labels[known]),
    }


def _teacher(split: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Log-probabilities (N, C) of the train rows by copies that did not see them, probabilities of the test rows."""
    from utils.combiner import MemberFacts, fit_crossfitted
    from utils.config_file import load
    from utils.distillation_targets import log_probabilities
    from utils.weighting import WeightedPool

    members = tuple(split["members"].tolist())
    unknown = np.full(len(members), np.nan)
    config = load(prepare.CONFIG, overrides=["device=cpu"])
    recipe = WeightedPool.configured(config, MemberFacts(members, unknown, unknown, unknown))
    unseen = fit_crossfitted(recipe, split["logits"], split["labels"], split["fold"])
    recipe.fit(split["logits"], split["labels"], split["fold"])
    row_of = {key: row for row, key in enumerate(split["sample_ids"].tolist()) if split["split"][row] == "train"}
    targets = np.full((len(split["train_ids"]), unseen.shape[1]), np.nan, dtype=np.float32)
    for place, sample_id in enumerate(split["train_ids"].tolist()):
        if sample_id in row_of:
            targets[place] = log_probabilities(unseen[row_of[sample_id]])
    return {"train": targets, "test": recipe.predict_proba(split["test_logits"])}


def _albums(split: Mapping[str, np.ndarray], data: Path, *, whole: bool) -> dict[str, Any]:
    """The images of the three splits; `whole` where they must not be mirrored."""
    from utils.lessons import Album
    from utils.streaming import ImageSplit

    of_val = split["split"] == "val"
    parts = {
        "train": (split["train_ids"], split["train_labels"]),
        "val": (split["sample_ids"][of_val], split["labels"][of_val]),
        "test": (split["test_ids"], split["test_labels"]),
    }
    found = {}
    for name, (ids, labels) in parts.items():
        paths = tuple(data / sample_id for sample_id in ids.tolist())
        contents = tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
        classes = tuple(split["classes"].tolist())
        images = ImageSplit(name, classes, tuple(ids.tolist()), labels, paths, contents, name)
        kind = "no_flip" if whole else "full"
        found[name] = Album(images, SIDE, kind, image_cache=prepare.ZOO / "image_cache")
    return found


def _lessons(album: Any, kind: str | None, known: np.ndarray, *, batch: int, seed: int = 0, views: int = 0) -> Any:
    from utils.distillation_teaching import plainness
    from utils.lessons import Lessons

    plain = plainness(album, kind, known, ALPHA) if kind else np.full(len(album), "never")
    return Lessons(album, batch, seed, plain, views=views)


def _batch(album: Mapping[str, Any]) -> int:
    """As the zoo's networks had it."""
    from demo import FEW_IMAGES

    return 32 if sum(len(part) for part in album.values()) < FEW_IMAGES else 64


def _fresh(classes: int, seed: int = 0) -> Any:
    import torch

    from utils import base_back

    torch.manual_seed(seed)
    return base_back.load("models").create_custom_backbone(STUDENT, classes, size="tiny", img_size=SIDE)


# rows ----------------------------------------------------------------------------------------------------------------


def cost_rows(path: Path, data: Path, *, whole: bool) -> list[dict]:
    """CPU seconds of an epoch with cached targets against one of the base pipeline's plain training."""
    from utils import base_back
    from utils.distilling import Course, train

    split = prepare.read(path)
    albums, classes = _albums(split, data, whole=whole), len(split["classes"])
    album, batch = albums["train"], _batch(albums)
    base_back.bind()
    from training import create_optimized_optimizer, get_loss_function_for_backbone, train_epoch_optimized
    from utils.datasets import BatchLoader, DecodedDataset
    from utils.samples import Sample

    images = album.images
    samples = [Sample(*each) for each in zip(images.paths, images.sample_ids, images.labels.tolist(), strict=True)]
    loader = BatchLoader(
        DecodedDataset(samples, images.classes, images.contents, SIDE), batch, training=True, kind=album.kind
    )
    one = albums["val"]
    model = _fresh(classes)
    optimizer = create_optimized_optimizer(model, RATE, STUDENT)
    criterion = get_loss_function_for_backbone(STUDENT, classes)

    def plain() -> None:
        train_epoch_optimized(model, loader, optimizer, criterion)

    def cached(kind: str) -> None:
        views = 4 if kind == "views" else 0
        lessons = _lessons(album, kind, np.ones(len(album), bool), batch=batch, views=views)
        table = np.full((len(album), classes), -np.log(classes), dtype=np.float32)
        lessons.drawn(0)  # drawn once for all epochs where views come back
        start = time.process_time()
        train(
            model,
            Course(STUDENT, 1, RATE, TEMPERATURES["student"], ALPHA, 0),
            lessons,
            lambda _: table,
            one,
            device="cpu",
        )
        times[kind].append(time.process_time() - start - exam)

    from utils.distilling import logits_of

    plain()  # warm
    start = time.process_time()
    logits_of(model, one, "cpu")
    exam = time.process_time() - start
    times: dict[str, list[float]] = {"plain": [], "oof": [], "views": []}
    for _ in range(3):
        start = time.process_time()
        plain()
        times["plain"].append(time.process_time() - start)
        for kind in ("oof", "views"):
            cached(kind)
    base = min(times["plain"])
    found = [row("epoch of plain training", base, "CPU s", None, None, None)]
    for kind in ("oof", "views"):
        ratio = min(times[kind]) / base
        found.append(
            row(f"epoch with cached targets ({kind}), in such epochs", ratio, "", "<= 1.15", ratio <= 1.15, None)
        )
    return found


def cache_row() -> dict:
    """Megabytes of the targets of many images in some views, as they are kept."""
    from utils import distillation_targets

    images, views, classes = CACHE
    rng = np.random.default_rng(0)
    targets = distillation_targets.log_probabilities(rng.dirichlet(np.full(classes, 0.1), size=(views, images)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "targets.npz"
        distillation_targets.save(path, "key", distillation_targets.pack(targets))
        size = path.stat().st_size / 1e6
    what = f"cached targets, {images} images x {views} views x {classes} classes"
    return row(what, size, "MB", "< 2", size < 2, None)


if __name__ == "__main__":
    sys.exit(main())
