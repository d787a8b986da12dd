"""A student taught by an ensemble, beside the same network trained alone and beside its teacher; what an epoch costs.

    python benchmarks/prepare.py --splits 10 --networks    once, for hours: the small zoos that teach

    python benchmarks/distillation.py                  handwritten digits; without prepared splits one is made first
    python benchmarks/distillation.py --data DIR       the splits that were prepared of these images
    python benchmarks/distillation.py --quick          a zoo of two poor networks, three epochs; not the one to report

Per split: the weighted ensemble of six networks is fitted on honest rows (out-of-fold and val) and teaches
CustomMobileOne by each kind of targets: `oof`, its cross-fitted predictions of the train rows; `views` and
`consistent`, its answers to the views that the student is shown, where the networks of the splits were kept. Training
ends with its schedule, and test, which nobody has seen, judges. A split may be trained on several times
(`--trainings`), from other first weights, and their mean counts. Intervals are Student's over the splits. What is
finished is kept beside them, so that it goes on where it stopped. One thread; CPU seconds are compared, so that a
busy machine disturbs little. `--curves FILE.png` draws the learning curves (needs matplotlib). The last line of the
output is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
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
TEMPERATURE, ALPHA, RATE, VIEWS = 4.0, 0.5, 0.001, 4  # as the configuration has them
KINDS = ("oof", "views", "consistent")
VERSION = 3  # raised whenever the same splits would give other figures
TURNS = 5  # of which the quickest epoch counts
CACHE = (5000, 4, 10)  # images, views, classes whose targets are to stay below two megabytes


def main(argv: Sequence[str] | None = None) -> int:
    """Run all rows; returns 0, also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="distillation.py", description="A student beside its controls.")
    parser.add_argument("--data", metavar="DIR", type=Path, help="the images whose prepared splits are read")
    parser.add_argument("--splits", metavar="N", type=int, help="how many of the prepared splits (default: all)")
    parser.add_argument("--epochs", metavar="N", type=int, help="of each training (default: as the zoo had them)")
    parser.add_argument("--trainings", metavar="N", type=int, default=1, help="of each split (default: 1)")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, help="of targets (default: all, or those without networks)"
    )
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
        seeds, whole = range(options.trainings), options.data is None
        kinds = options.kinds or (KINDS if all(_networks(path).is_dir() for path in files) else KINDS[:1])
        of_seeds = [[_kept(path, data, epochs, seed, kinds, whole=whole) for path in files] for seed in seeds]
        outcomes = [averaged(entries) for entries in zip(*of_seeds, strict=True)]
        rows = [*score_rows(outcomes), *cost_rows(files[0], data, whole=whole), cache_row()]
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
        scores=[{who: found["scores"] for who, found in entry.items()} for entry in outcomes],
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


def _networks(path: Path) -> Path:
    """The checkpoints of the members of a prepared split."""
    return prepare.networks_of(path.parent, int(path.stem.removeprefix("split")))


def _kept(
    path: Path, data: Path, epochs: int, seed: int, kinds: Sequence[str], *, whole: bool
) -> dict[str, dict[str, Any]]:
    """{who: outcome} of one training of each on a split, from beside it what is there already."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    found: dict[str, dict[str, Any]] = {}
    room = None
    for who in (ALONE, *kinds, TEACHER):
        file = path.parent / "distillation" / f"{path.stem}-v{VERSION}-{epochs}-{seed}-{who}.json"
        if file.is_file() and (known := json.loads(file.read_text()))["digest"] == digest:
            found[who] = known
            continue
        start = time.process_time()
        room = room or Classroom(prepare.read(path), data, _networks(path), whole=whole)
        found[who] = room.teacher() if who == TEACHER else room.student(who, epochs, seed)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(found[who] | {"digest": digest}))
        said = ", ".join(f"{name} {value:.4f}" for name, value in found[who]["scores"].items())
        print(
            f"{path.stem}, {seed}, {who}: {time.process_time() - start:.0f} CPU s, {said}", file=sys.stderr, flush=True
        )
    return found


class Classroom:
    """A split with its images, and the ensemble that teaches on it."""

    def __init__(self, split: Mapping[str, np.ndarray], data: Path, networks: Path, *, whole: bool) -> None:
        self.split, self.networks = split, networks
        self.sources = _sources(split, data, whole=whole)
        self.combiner, self.unseen = _teacher(split)
        self.said = self.combiner.predict_proba(split["test_logits"])

    def teacher(self) -> dict[str, Any]:
        """`scores` {accuracy, log_loss, ece} on test; of its cross-fitted targets the same, `oof`, and `entropy`."""
        from utils.distillation.controls import scores

        known = ~np.isnan(self.unseen).any(axis=1)
        targets = np.exp(self.unseen[known].astype(np.float64))
        return {
            "scores": scores(self.said, self.split["test_labels"]),
            "oof": scores(targets, self.split["train_labels"][known]),
            "entropy": float(-(targets * np.log(targets)).sum(axis=1).mean()),
        }

    def student(self, who: str, epochs: int, seed: int) -> dict[str, Any]:
        """`scores` and `agreement` with the teacher on test, `history` by epoch; `who`: a kind of targets, or alone."""
        from utils.distillation.controls import agreement, scores
        from utils.distillation.student_training import StudentTrainingSettings, predict_logits, train
        from utils.numeric.metrics import softmax

        known = ~np.isnan(self.unseen).any(axis=1)
        batch_schedule = _batch_schedule(self.sources["train"], who, known, batch=_batch(self.sources), seed=seed)
        teach = None if who == ALONE else (lambda _: self.unseen) if who == "oof" else self._asked(batch_schedule)
        settings = StudentTrainingSettings(
            STUDENT, epochs, RATE, TEMPERATURE, 0.0 if who == ALONE else ALPHA, seed=seed
        )
        model = _fresh(len(self.split["classes"]), seed)
        done = train(model, settings, batch_schedule, teach, self.sources["val"], device="cpu")
        answers = softmax(predict_logits(model, self.sources["test"], "cpu", done.weights))
        return {
            "scores": scores(answers, self.split["test_labels"]),
            "agreement": agreement(answers, self.said),
            "history": done.history,
        }

    def _asked(self, batch_schedule: Any) -> Callable[[int], np.ndarray]:
        """Epoch -> what the teacher says of the views of that epoch; once for those that come back."""
        import torch

        from utils.distillation.soft_targets import log_probabilities
        from utils.networks.construction import NetworkSpec
        from utils.networks.preprocessing import Preprocessing
        from utils.predictions import streaming

        classes, kept = tuple(self.split["classes"].tolist()), {}
        paths = [self.networks / f"{name}_final.pth" for name in self.split["members"].tolist()]
        preprocessing = Preprocessing.of_base_pipeline(SIDE)
        specs = [NetworkSpec(path.stem.removesuffix("_final"), path, "tiny", preprocessing, classes) for path in paths]
        members = [streaming.open_network(spec).eval() for spec in specs]

        def answered(epoch: int) -> np.ndarray:
            logits = np.empty((len(members), len(batch_schedule.image_source), len(classes)), dtype=np.float32)
            for batch, images in batch_schedule.loader(epoch, preprocessing):
                with torch.no_grad():
                    logits[:, batch.rows.numpy()] = torch.stack([member(images) for member in members]).numpy()
            return log_probabilities(self.combiner.predict_proba(logits))

        def teach(epoch: int) -> np.ndarray:
            if not batch_schedule.n_views:
                return answered(epoch)
            number = epoch % batch_schedule.n_views
            if number not in kept:
                kept[number] = answered(epoch)
            return kept[number]

        return teach


def _teacher(split: Mapping[str, np.ndarray]) -> tuple[Any, np.ndarray]:
    """The fitted combiner, and log-probabilities (N, C) of the train rows by copies that did not see them."""
    from utils.combiners.protocol import MemberFacts, fit_crossfitted
    from utils.combiners.weighting import WeightedPool
    from utils.core.config_file import load_config
    from utils.distillation.soft_targets import log_probabilities

    members = tuple(split["members"].tolist())
    unknown = np.full(len(members), np.nan)
    config = load_config(prepare.CONFIG, overrides=["device=cpu"])
    recipe = WeightedPool.configured(config, MemberFacts(members, unknown, unknown, unknown))
    unseen = fit_crossfitted(recipe, split["logits"], split["labels"], split["fold"])
    recipe.fit(split["logits"], split["labels"], split["fold"])
    row_of = {key: row for row, key in enumerate(split["sample_ids"].tolist()) if split["split"][row] == "train"}
    targets = np.full((len(split["train_ids"]), unseen.shape[1]), np.nan, dtype=np.float32)
    for place, sample_id in enumerate(split["train_ids"].tolist()):
        if sample_id in row_of:
            targets[place] = log_probabilities(unseen[row_of[sample_id]])
    return recipe, targets


def _sources(split: Mapping[str, np.ndarray], data: Path, *, whole: bool) -> dict[str, Any]:
    """The images of the three splits; `whole` where they must not be mirrored."""
    from utils.networks.preprocessing import Preprocessing
    from utils.predictions.image_splits import ImageSplit
    from utils.training.image_source import ImageSource

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
        preprocessing = Preprocessing.of_base_pipeline(SIDE)
        found[name] = ImageSource(images, preprocessing, kind, image_cache=prepare.ZOO / "image_cache")
    return found


def _batch_schedule(image_source: Any, who: str, known: np.ndarray, *, batch: int, seed: int = 0) -> Any:
    from utils.distillation.target_sources import unaugmented_frequency
    from utils.training.batch_schedule import BatchSchedule

    unaugmented = unaugmented_frequency(image_source, who, known, ALPHA)
    return BatchSchedule(
        image_source,
        batch,
        seed,
        unaugmented,
        n_views=VIEWS if who == "views" else 0,
        is_shared=who in ("views", "consistent"),
    )


def _batch(sources: Mapping[str, Any]) -> int:
    """As the zoo's networks had it."""
    from demo import FEW_IMAGES

    return 32 if sum(len(source) for source in sources.values()) < FEW_IMAGES else 64


def _fresh(classes: int, seed: int = 0) -> Any:
    import torch

    from utils import base_back

    torch.manual_seed(seed)
    return base_back.load("models").create_custom_backbone(STUDENT, classes, size="tiny", img_size=SIDE)


# rows ----------------------------------------------------------------------------------------------------------------


def cost_rows(path: Path, data: Path, *, whole: bool) -> list[dict]:
    """CPU seconds of an epoch with cached targets against one of the base pipeline's plain training."""
    from utils import base_back
    from utils.distillation.student_training import StudentTrainingSettings, train

    split = prepare.read(path)
    sources, classes = _sources(split, data, whole=whole), len(split["classes"])
    image_source, batch = sources["train"], _batch(sources)
    base_back.bind()
    from training import create_optimized_optimizer, get_loss_function_for_backbone, train_epoch_optimized
    from utils.datasets import BatchLoader, DecodedDataset
    from utils.samples import Sample

    images = image_source.images
    samples = [Sample(*each) for each in zip(images.paths, images.sample_ids, images.labels.tolist(), strict=True)]
    loader = BatchLoader(
        DecodedDataset(samples, images.classes, images.contents, SIDE),
        batch,
        training=True,
        kind=image_source.augmentation,
    )
    one = sources["val"]
    model = _fresh(classes)
    optimizer = create_optimized_optimizer(model, RATE, STUDENT)
    criterion = get_loss_function_for_backbone(STUDENT, classes)

    def plain() -> None:
        train_epoch_optimized(model, loader, optimizer, criterion)

    def cached(kind: str) -> None:
        batch_schedule = _batch_schedule(image_source, kind, np.ones(len(image_source), bool), batch=batch)
        batch_schedule.is_shared = False
        table = np.full((len(image_source), classes), -np.log(classes), dtype=np.float32)
        batch_schedule.epoch_views(0)  # drawn once for all epochs where views come back
        start = time.process_time()
        train(
            model,
            StudentTrainingSettings(STUDENT, 1, RATE, TEMPERATURE, ALPHA, 0),
            batch_schedule,
            lambda _: table,
            one,
            device="cpu",
        )
        times[kind].append(time.process_time() - start - validation_seconds)

    from utils.distillation.student_training import predict_logits

    plain()  # warm
    start = time.process_time()
    predict_logits(model, one, "cpu")
    validation_seconds = time.process_time() - start
    times: dict[str, list[float]] = {"plain": [], "oof": [], "views": []}
    for _ in range(TURNS):
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
    from utils.distillation import soft_targets

    images, views, classes = CACHE
    rng = np.random.default_rng(0)
    targets = soft_targets.log_probabilities(rng.dirichlet(np.full(classes, 0.1), size=(views, images)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "targets.npz"
        soft_targets.save(path, "key", soft_targets.pack(targets))
        size = path.stat().st_size / 1e6
    what = f"cached targets, {images} images x {views} views x {classes} classes"
    return row(what, size, "MB", "< 2", size < 2, None)


if __name__ == "__main__":
    sys.exit(main())
