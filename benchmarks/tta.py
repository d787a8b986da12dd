"""Whether the choice of views for test-time augmentation gains where views are needed, and harms where they are not.

    python benchmarks/tta.py                    digits: upright, turned by random angles, flipped, mirrored
    python benchmarks/tta.py --workspace DIR    also a workspace that `discover` has listed: its selected networks
    python benchmarks/tta.py --quick            fewer images and re-splits, not the ones to report

One network per set of images is trained with fold networks. In the set flipped it learns upright images alone, and
half of those that it has not seen are flipped; in the set mirrored half of all images are, so that it has learned both
forms. The out-of-sample rows, in the set flipped those of val alone, are split in two again and again: views are chosen
on one half by the rule of `build-ensemble`, and the other half judges the choice, after a temperature of the first half
for both sides. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prepare import BASE_SOURCE, CONFIG, PROJECT, workspace_in
from reporting import clean_environment, interval, report, row

BACKBONE = "CustomResNetMish"
FLIPPED = "flipped"
SETS = ("upright", "turned", FLIPPED, "mirrored")
PLANTED = ("turned", FLIPPED)
DIGITS = (1, 2, 3, 4, 5)
WITHOUT_MIRROR = (1, 2, 3, 4, 7)
"""Of these none is the mirror image of another, as 5 is of 2."""
MOST_HARMED = 1  # of 20 re-splits
FOLDS = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run all rows; returns 0, also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="tta.py", description="Test-time augmentation: gain and harm.")
    parser.add_argument("--workspace", metavar="DIR", type=Path, help="also the networks of this workspace")
    parser.add_argument("--quick", action="store_true", help="few images: does it run at all")
    options = parser.parse_args(argv)
    sys.path.insert(0, str(PROJECT))
    splits = 4 if options.quick else 20
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="tta-") as folder:
        for name in SETS:
            workspace = Path(folder) / name
            write = write_given_splits if name == FLIPPED else write_images
            write(workspace / "Data", name, per_class=30 if options.quick else 120)
            train(workspace, epochs=1 if options.quick else 8, folds=name != FLIPPED)
            rows += rows_of(name, workspace, splits, planted=name in PLANTED and not options.quick)
    if options.workspace is not None:
        rows += rows_of(options.workspace.name, options.workspace, splits, planted=False, every_network=True)
    report("tta", rows, quick=options.quick, packages=("torch", "numpy", "scipy"))
    return 0


# images and networks -------------------------------------------------------------------------------------------------
def write_images(folder: Path, kind: str, *, per_class: int) -> None:
    """Scanned digits 1 to 5 at 32 pixels: as they are, turned by random angles, or mirrored by chance."""
    from PIL import Image

    random = np.random.default_rng(0)
    for digit in DIGITS:
        (folder / str(digit)).mkdir(parents=True)
        for number, image in scans(digit, per_class):
            angle, mirrored = random.uniform(0, 360), random.random() < 0.5
            if kind == "turned":
                image = image.rotate(angle, Image.Resampling.BILINEAR)
            elif kind == "mirrored" and mirrored:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            image.save(folder / str(digit) / f"{number:04d}.png")


def write_given_splits(folder: Path, kind: str, *, per_class: int) -> None:
    """Half of the digits as they are for training; of the others, for val and test, every second one is flipped."""
    from PIL import Image

    for digit in WITHOUT_MIRROR:
        for place, (number, image) in enumerate(scans(digit, per_class)):
            split = "train" if place < per_class // 2 else "test" if place % 10 in (0, 1) else "val"
            if split != "train" and place % 2:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            (folder / split / str(digit)).mkdir(parents=True, exist_ok=True)
            image.save(folder / split / str(digit) / f"{number:04d}.png")


def scans(digit: int, count: int) -> Iterator[tuple[int, Any]]:
    """(number, image of 32 pixels) of the first scans of a digit."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number in np.flatnonzero(digits.target == digit)[:count]:
        pixels = np.rint(digits.images[number] * (255 / 16)).astype(np.uint8)
        yield int(number), Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)


def train(workspace: Path, *, epochs: int, folds: bool) -> None:
    """Train the network, and three fold networks where wanted, without mirroring images at random, and list them."""
    options = ("--size", "tiny", "--folds", "3", "--epochs-head", "1", "--epochs-finetune", str(epochs), "--jobs", "1")
    environment = clean_environment() | {"DBT_AUGMENT": "no_flip", "DBT_BATCH_SIZE": "32"}
    main_script, orchestrator = BASE_SOURCE / "main.py", PROJECT / "ensemble_orchestrator.py"
    place = ("--workspace", str(workspace))
    for command in (
        (str(main_script), *place, "--backbones", BACKBONE, *options),
        (str(orchestrator), "discover", *place, "--config", str(CONFIG), "--quiet"),
    ):
        if not folds:  # nothing before the training
            shutil.rmtree(workspace / "kfold_results", ignore_errors=True)
            for path in (workspace / "checkpoints").glob(f"{BACKBONE}_fold*"):
                path.unlink()
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")


# figures -------------------------------------------------------------------------------------------------------------
def rows_of(
    name: str, workspace: Path, splits: int, *, planted: bool, every_network: bool = False
) -> list[dict[str, Any]]:
    """The choice on all rows of each network, and what re-splits gain and lose by choosing."""
    from utils.building.view_builder import describe
    from utils.numeric.view_choice import choose_views

    rows = []
    for member, outputs in outputs_of(workspace, every_network=every_network).items():
        what = f"{name}, {member}" if every_network else name
        choice = choose_views(outputs)
        gain = f"{what}: cross-fitted gain in calibrated log-loss on {len(outputs.labels)} rows"
        low = None if choice.gain_interval is None else choice.gain_interval[0]
        goal, holds = ("interval above 0", low is not None and low > 0) if planted else (None, None)
        rows.append(row(gain, choice.gain, "nats", goal, holds, describe(choice.as_record())))
        found = [resplit(outputs, seed) for seed in range(splits)]
        gains, used = np.array([each[0] for each in found]), [bool(each[1]) for each in found]
        bounds = interval(gains.tolist())
        spread = f"mean {gains.mean():+.4f} [{bounds[0]:+.4f}, {bounds[1]:+.4f}]" if bounds else None
        rows.append(row(f"{what}: re-splits in which views are chosen", sum(used), f"of {splits}", None, None, spread))
        harmed, limit = int((gains < 0).sum()), f"at most {MOST_HARMED} of 20"
        is_harmless = harmed <= MOST_HARMED * splits / 20
        rows.append(row(f"{what}: re-splits that lose by the choice", harmed, f"of {splits}", limit, is_harmless, None))
    return rows


def resplit(outputs: Any, seed: int) -> tuple[float, tuple[str, ...]]:
    """(gain in calibrated log-loss on the other half, views that one half of the rows chooses)."""
    from utils.numeric.means import unit_indices
    from utils.numeric.metrics import log_loss_per_row, log_softmax, softmax
    from utils.numeric.temperature import fit_temperature
    from utils.numeric.view_choice import ViewOutputs, choose_views

    units = unit_indices(len(outputs.labels), outputs.groups)
    place = np.random.default_rng(seed).permutation(units.max() + 1)[units]
    chooses = place % 2 == 0
    half = ViewOutputs(
        {name: logits[:, chooses] for name, logits in outputs.logits.items()},
        outputs.counts,
        outputs.labels[chooses],
        place[chooses] // 2 % FOLDS,
        units[chooses],
    )
    views = choose_views(half).views
    losses = []
    for some in ((), views):
        scores = log_softmax(outputs.mean_logits(some)[0])
        temperature = fit_temperature(scores[chooses], outputs.labels[chooses])
        judged = softmax(scores[~chooses] / temperature)
        losses.append(float(log_loss_per_row(judged, outputs.labels[~chooses]).mean()))
    return losses[0] - losses[1], views


def outputs_of(folder: Path, *, every_network: bool) -> dict[str, Any]:
    """{network: its out-of-sample outputs by groups of views}"""
    from utils.building import view_builder, view_outputs
    from utils.core.config_file import load_config
    from utils.core.config_values import VIEW_GROUPS
    from utils.predictions import catalog, extraction
    from utils.predictions.store import Store

    config = load_config(CONFIG, overrides=["device=cpu"])
    workspace = workspace_in(folder)
    store = Store(config, workspace, catalog.load(workspace))
    members = [member for member in store.catalog.members.values() if member.source == "trained" and member.usable]
    members = members if every_network else [store.catalog.members[BACKBONE]]
    found = {}
    for member in members:
        extraction.ensure(store, [member], ("val",))
        if view_outputs.reason_without(store, member) is None:
            part = view_outputs.measure(store, member, VIEW_GROUPS)
            found[member.name] = view_builder.shared_outputs(store, [part])
    return found


if __name__ == "__main__":
    sys.exit(main())
