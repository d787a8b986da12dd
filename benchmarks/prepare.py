"""Zoos for the benchmarks that need one per split: six small networks, three folds, the images split 60/20/20 anew.

    python benchmarks/prepare.py --splits 10              scikit-learn's handwritten digits
    python benchmarks/prepare.py --splits 10 --data DIR   your own images, one folder per class
    python benchmarks/prepare.py --splits 10 --data DIR --pretrained      heads on EfficientNet-Lite0, 1 and 2 instead
    python benchmarks/prepare.py --quick                  two networks, two folds, one epoch; not the ones to report

What the networks answered is kept, one file per split in `benchmarks/zoo/<data>`; the networks are not, unless
`--networks` asks for it (three megabytes per split). Typed again it goes on where it stopped, and does nothing for a
split that is there. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reporting import clean_environment

PROJECT = Path(__file__).resolve().parents[1]
BASE_SOURCE = PROJECT / "BASE-BACK" / "src"
CONFIG = PROJECT / "configs" / "digits_demo.yaml"
ZOO = PROJECT / "benchmarks" / "zoo"
SHARES = (0.6, 0.2, 0.2)
SPLITS = ("train", "val", "test")
BACKBONES = (
    *("CustomConvNeXt", "CustomViTHybrid", "CustomSwinTransformer", "CustomResNetMish", "CustomMobileOne"),
    "CustomRegNet",
)
WORKSPACE_FOLDERS = (
    *("split_dataset", "checkpoints", "metrics_output", "kfold_results", "deployment_models", "image_cache"),
    "logs",
)
LEFT_OUT = 4  # exit code of a training that had to leave an unreadable image out
AGAIN = "Remove it, then run benchmarks/prepare.py again"


@dataclass(frozen=True)
class Prepared:
    """Where the splits of one data set lie, and what they are."""

    folder: Path
    files: tuple[Path, ...]
    """One per split, in the order of their seeds."""

    @property
    def digest(self) -> str:
        """Of all that the files hold."""
        found = [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.files]
        return hashlib.sha256("".join(found).encode()).hexdigest()[:12]

    @property
    def age_hours(self) -> float:
        """Since the oldest of the files was written."""
        return (time.time() - min(path.stat().st_mtime for path in self.files)) / 3600

    def facts(self) -> dict[str, Any]:
        """`{splits, digest, age_hours}`, ready for JSON."""
        return {"splits": len(self.files), "digest": self.digest, "age_hours": round(self.age_hours, 1)}


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the splits that are missing; returns the exit code."""
    parser = argparse.ArgumentParser(prog="prepare.py", description="One small zoo per split, and its answers.")
    parser.add_argument("--splits", metavar="N", type=int, default=1, help="how many (default: 1)")
    parser.add_argument("--data", metavar="DIR", type=Path, help="folder with one folder of images per class")
    parser.add_argument("--jobs", metavar="N", help="trainings side by side (default: the usable cores)")
    parser.add_argument("--pretrained", action="store_true", help="the members of the photographs' demo")
    parser.add_argument("--quick", action="store_true", help="two networks, two folds, one epoch")
    parser.add_argument("--networks", action="store_true", help="keep the networks of the splits that are made now")
    parser.add_argument("--keep", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.keep:
        keep(options.keep)
        return 0
    if options.splits < 1:
        print(f"--splits {options.splits}: expected a whole number from 1", file=sys.stderr)
        return 1
    if options.data is not None and not options.data.is_dir():
        print(f"--data {options.data}: no such folder; expected one folder of images per class in it", file=sys.stderr)
        return 1
    if options.pretrained and options.data is None:
        print("--pretrained: needs --data, photographs in one folder per class", file=sys.stderr)
        return 1
    kind = {"quick": options.quick, "pretrained": options.pretrained}
    found = prepare(options.splits, options.data, networks=options.networks, jobs=options.jobs, **kind)
    print(f"{found.folder}: {len(found.files)} splits, {found.age_hours:.1f} hours old, digest {found.digest}")
    print(json.dumps({"prepared": str(found.folder), **found.facts()}))
    return 0


def prepare(
    splits: int,
    data: Path | None,
    *,
    quick: bool,
    pretrained: bool = False,
    networks: bool = False,
    jobs: str | None = None,
) -> Prepared:
    """The splits of seeds 0 to `splits` - 1, trained where they are missing. Raises SystemExit where a step fails."""
    folder = folder_of(data, quick=quick, pretrained=pretrained)
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(splits):
        if not file_of(folder, seed).is_file():
            start = time.monotonic()
            _train(folder, seed, data, quick=quick, pretrained=pretrained, networks=networks, jobs=jobs)
            print(f"split {seed}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return found(data, quick=quick, pretrained=pretrained)


def found(data: Path | None, *, quick: bool, pretrained: bool = False) -> Prepared:
    """The splits that are there; `files` is empty where there are none."""
    folder = folder_of(data, quick=quick, pretrained=pretrained)
    return Prepared(folder, tuple(sorted(folder.glob("split*.npz"))))


def ready(data: Path | None, *, quick: bool, pretrained: bool = False) -> Prepared | None:
    """The splits that are there, or one that is made now, in words; None, in words too, where `data` is no folder."""
    if data is not None and not data.is_dir():
        print(f"--data {data}: no such folder; expected one folder of images per class in it", file=sys.stderr)
        return None
    there = found(data, quick=quick, pretrained=pretrained)
    if there.files:
        return there
    print("no prepared splits: one is made first, which takes minutes", file=sys.stderr, flush=True)
    return prepare(1, data, quick=quick, pretrained=pretrained)


def read(path: Path) -> dict[str, Any]:
    """The arrays of one split, as `keep` wrote them; needs the project on the path. Raises UserError where damaged."""
    from utils.core.artifacts import read_arrays

    return read_arrays(path, remedy=AGAIN)


def folder_of(data: Path | None, *, quick: bool, pretrained: bool = False) -> Path:
    """One folder per data set, named after it and its place; pretrained members and the quick form have their own."""
    name = "digits"
    if data is not None:
        place = data.expanduser().resolve()
        name = f"{place.name}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:8]}"
    return ZOO / (name + "-pretrained" * pretrained + "-quick" * quick)


def file_of(folder: Path, seed: int) -> Path:
    """What is kept of one split."""
    return folder / f"split{seed:03d}.npz"


def workspace_in(folder: Path) -> Any:
    """The `Workspace` of which everything lies in one folder."""
    from utils.core.workspace import Workspace

    return Workspace(folder, *(folder / name for name in WORKSPACE_FOLDERS))


def networks_of(folder: Path, seed: int) -> Path:
    """The folder of the checkpoints of one split, where they were kept."""
    return folder / f"networks{seed:03d}"


def _train(
    folder: Path, seed: int, data: Path | None, *, quick: bool, pretrained: bool, networks: bool, jobs: str | None
) -> None:
    sys.path.insert(0, str(PROJECT))
    from utils.operations.demo import FEW_IMAGES, count_images, write_digits

    is_digits = data is None
    if data is None:
        data = ZOO / "images"
        write_digits(data)
    images = count_images(data)
    workspace = folder / f"workspace{seed:03d}"
    workspace.mkdir(exist_ok=True)
    environment = clean_environment() | {
        "DBT_BASE_DIR": str(workspace),
        "DBT_RAW_DIR": str(data.expanduser().resolve()),
        "DBT_SEED": str(seed),
        "DBT_MODEL_SIZE": "tiny",
        "DBT_BATCH_SIZE": "32" if images < FEW_IMAGES else "64",
    }
    if pretrained:  # embeddings are kept by content: one pass over the images for all splits
        environment["DBT_IMAGE_CACHE_DIR"] = str(folder / "image_cache")
    ratios = ", ".join(f"{split}_ratio={share}" for split, share in zip(SPLITS, SHARES, strict=True))
    split = f"from utils.splitting import prepare_optimized_datasets as split; split({ratios})"
    _run(["-c", split], environment | {"PYTHONPATH": str(BASE_SOURCE)})
    training = [str(BASE_SOURCE / "main.py"), *_training_options(images, is_digits, quick, pretrained)]
    _run([*training, *(("--jobs", jobs) if jobs else ())], environment)
    _run([str(PROJECT / "ensemble_orchestrator.py"), "discover", "--config", str(CONFIG)], environment)
    if networks:
        networks_of(folder, seed).mkdir(exist_ok=True)
        for checkpoint in (workspace / "checkpoints").glob("*_final.pth"):
            shutil.copy(checkpoint, networks_of(folder, seed))
    _run([__file__, "--keep", str(file_of(folder, seed))], environment | {"PYTHONPATH": str(PROJECT)})
    shutil.rmtree(workspace)


def _training_options(images: int, is_digits: bool, quick: bool, pretrained: bool) -> list[str]:
    """Options of `main.py`, which follow its name."""
    from utils.operations.demo import LITE_NUMBERS, epochs_for, pretrained_options

    folds = ["--folds", "2" if quick else "3"]
    if pretrained:
        options = pretrained_options(LITE_NUMBERS[:1] if quick else LITE_NUMBERS)
        return ["--stages", "kfold", "train", *options[options.index("--backbones") :], *folds]
    return [
        *("--stages", "kfold", "train", "--size", "tiny"),
        *("--backbones", *(BACKBONES[:2] if quick else BACKBONES), *folds),
        *("--epochs-head", "1", "--epochs-finetune", "1" if quick else str(epochs_for(images))),
        *("--augment", "no_flip" if is_digits else "full"),
    ]


def _run(arguments: Sequence[str], environment: dict[str, str]) -> None:
    call = [sys.executable, *arguments]
    code = subprocess.run(call, env=environment, stdout=sys.stderr, check=False, cwd=PROJECT).returncode
    if code not in (0, LEFT_OUT):
        raise SystemExit(f"{' '.join(arguments[:4])} ended with {code}; typed again, prepare.py goes on from here")


def keep(file: Path) -> None:
    """Write what the members of the workspace in the environment answered.

    Honest rows: `logits` (M, N, C), `labels`, `sample_ids`, `split`, `fold` (N,). Then `test_logits` (M, T, C) and, for
    what not to do, `train_logits` of the networks that have seen the rows; labels and ids with the same beginnings.
    """
    import numpy as np

    from utils import base_back
    from utils.building import fitting
    from utils.core.artifacts import write_arrays
    from utils.core.config_file import load_config
    from utils.predictions import catalog, extraction, member_selection
    from utils.predictions.rows import align
    from utils.predictions.store import Store

    config, place = load_config(CONFIG, overrides=["device=cpu", "backbones.include=all"]), base_back.open_workspace()
    known = catalog.load(place)
    members = member_selection.select(known, config)
    store = Store(config, place, known)
    extraction.ensure(store, members, SPLITS)
    honest = fitting.out_of_sample_rows(store, members, kind="honest")
    arrays = {
        "members": np.array(honest.rows.members),
        "classes": np.array(honest.rows.classes),
        "logits": honest.rows.logits,
        "labels": honest.rows.labels,
        "sample_ids": honest.rows.sample_ids,
        "split": honest.rows.split,
        "fold": honest.fold,
    }
    for split in ("test", "train"):
        rows = align({member.name: [store.rows(member, split)] for member in members}, known.classes)
        arrays |= {f"{split}_logits": rows.logits, f"{split}_labels": rows.labels, f"{split}_ids": rows.sample_ids}
    write_arrays(file, arrays)


if __name__ == "__main__":
    sys.exit(main())
