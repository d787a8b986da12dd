"""The time that `evaluate --data` adds to the forward passes of the networks.

    python benchmarks/external.py                    three tiny networks and their votes on 10,000 digits of 32 px
    python benchmarks/external.py --workspace DIR    the recommended model of an evaluated workspace on 1,000 images
    python benchmarks/external.py --images N         that many images instead of 10,000 or 1,000
    python benchmarks/external.py --quick            one network, 200 images: a smoke test

The images are those of the test split, each with noise of its own. Everything runs in one process, after a few images
that load the packages and measure latencies; the figure is the time outside of forward passes divided by that inside.
Rows below it name the parts. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from prepare import BASE_SOURCE, PROJECT, workspace_in
from reporting import clean_environment, report, row

sys.path.insert(0, str(PROJECT))

VOTES = PROJECT / "configs" / "votes.yaml"
BACKBONES = ("CustomResNetMish", "CustomEfficientNetV4", "CustomViTHybrid")
MOST = 0.1  # of the forward passes
IMAGES, FEWER, FEW = 10_000, 1_000, 20
SET = "benchmark_of_external"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; returns 0, also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="external.py", description="What evaluate --data adds to forward passes.")
    parser.add_argument("--workspace", metavar="DIR", type=Path, help="an evaluated workspace instead of digits")
    parser.add_argument("--images", metavar="N", type=int, help="images of the external set")
    parser.add_argument("--quick", action="store_true", help="one network, few images: a smoke test")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="external-") as name:
        folder = Path(name)
        if options.workspace is not None:
            config = options.workspace / "ensembles" / "config.yaml"
            measured = (options.workspace.name, options.workspace, config, folder / "images", options.images or FEWER)
        else:
            names = BACKBONES[:1] if options.quick else BACKBONES
            prepare(folder / "tiny", names, per_class=20 if options.quick else 90)
            count = options.images or (200 if options.quick else IMAGES)
            measured = (f"{len(names)} tiny networks", folder / "tiny", VOTES, folder / "images", count)
        rows = cost_rows(*measured)
    report("external", rows, quick=options.quick, packages=("torch", "numpy", "pillow"))
    return 0


def prepare(workspace: Path, names: Sequence[str], *, per_class: int) -> None:
    """A workspace of digits with trained networks, votes and an evaluation."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for digit in range(10):
        (workspace / "Data" / str(digit)).mkdir(parents=True)
        for number in np.flatnonzero(digits.target == digit)[:per_class]:
            pixels = np.rint(digits.images[number] * (255 / 16)).astype(np.uint8)
            image = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)
            image.save(workspace / "Data" / str(digit) / f"{number:04d}.png")
    training = ("--size", "tiny", "--folds", "2", "--epochs-head", "1", "--epochs-finetune", "2", "--jobs", "1")
    orchestrator = str(PROJECT / "ensemble_orchestrator.py")
    for command in (
        (str(BASE_SOURCE / "main.py"), "--backbones", *names, *training),
        *(
            (orchestrator, verb, "--config", str(VOTES), "--quiet")
            for verb in ("discover", "build-ensemble", "evaluate")
        ),
    ):
        words = [sys.executable, *command, "--workspace", str(workspace)]
        done = subprocess.run(words, capture_output=True, text=True, env=clean_environment())
        if done.returncode:
            sys.exit(f"{' '.join(words)}\n{done.stderr[-2000:]}")


def write_set(workspace: Any, folder: Path, count: int) -> None:
    """Images of the test split as class folders, each with noise of its own, so that no two are equal."""
    from PIL import Image

    from utils.inference.onnx_prediction import open_image

    by_class = [sorted(of_class.iterdir()) for of_class in sorted((workspace.split_dir / "test").iterdir())]
    sources = [path for turn in zip_longest(*by_class) for path in turn if path is not None]  # of each class in turn
    random = np.random.default_rng(0)
    for number in range(count):
        source = sources[number % len(sources)]
        place = folder / source.parent.name
        place.mkdir(parents=True, exist_ok=True)
        with open_image(source) as opened:
            pixels = np.asarray(opened.convert("RGB")).astype(np.int16)
        noisy = np.clip(pixels + random.integers(-8, 9, size=pixels.shape), 0, 255).astype(np.uint8)
        suffix = source.suffix if source.suffix.lower() in (".png", ".jpg", ".jpeg") else ".png"
        Image.fromarray(noisy).save(place / f"{number:06d}{suffix}")


def cost_rows(what: str, folder: Path, config_file: Path, images: Path, count: int) -> list[dict[str, Any]]:
    """Seconds inside and outside of forward passes, and where the latter go."""
    from utils.core.config_file import load_config
    from utils.evaluation.report import report_page
    from utils.external_sets import command, evaluate_external, external_inputs
    from utils.networks import embeddings

    config = load_config(config_file, overrides=["device=cpu"])
    workspace = workspace_in(folder)
    write_set(workspace, images, count)
    write_set(workspace, images.with_name("few"), FEW)
    score = partial(command.evaluate, config, workspace, name=SET, model_name="recommended")
    score(data=str(images.with_name("few")))
    spent: dict[str, float] = {}
    undo = [
        timed(embeddings.EmbeddingExtractor, "__call__", "forward", spent),
        timed(evaluate_external, "read_labelled_images", "list and hash", spent),
        timed(external_inputs, "unreadable_images", "decode", spent),
        timed(external_inputs, "evaluation_on_test", "own test split", spent),
        timed(external_inputs, "gather_external", "predictions", spent),
        timed(evaluate_external, "_scored", "scores", spent),
        timed(report_page, "write", "report", spent),
    ]
    start = time.perf_counter()
    try:
        score(data=str(images), force=True)
    finally:
        for each in undo:
            each()
        shutil.rmtree(workspace.external_set(SET).parent, ignore_errors=True)
    total = time.perf_counter() - start
    forward = spent.pop("forward")
    spent["predictions"] -= forward
    outside = total - forward
    spent["anything else"] = outside - sum(spent.values())
    title = f"{what}, {count:,} images"
    parts = [row(f"{title}: {name}", seconds, "s", None, None, None) for name, seconds in spent.items()]
    decoded = outside - spent["decode"]
    beside = f"{decoded / forward:.3f} without decoding; {forward:.1f} s in {total:.1f} s"
    goal = f"at most {MOST}"
    return [
        row(f"{title}: outside of forward passes", outside / forward, "", goal, outside <= MOST * forward, beside),
        *parts,
    ]


def timed(owner: Any, name: str, part: str, spent: dict[str, float]) -> Callable[[], None]:
    """From now on, count the seconds of a function; returns what ends this."""
    original = getattr(owner, name)
    spent[part] = 0.0

    def measured(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*arguments, **options)
        finally:
            spent[part] += time.perf_counter() - start

    setattr(owner, name, measured)
    return lambda: setattr(owner, name, original)


if __name__ == "__main__":
    sys.exit(main())
