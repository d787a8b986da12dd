"""Class probabilities of image files from an exported ensemble. Needs onnxruntime, NumPy and Pillow, and nothing else.

    python predict.py photo.jpg folder/ > predictions.csv
    python predict.py --model ../onnx/soft_voting_ensemble.onnx --json photo.jpg

The ONNX file says itself what it takes and what its classes are. This file is delivered with every export, so it may
not import anything of the project that wrote it.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # Pillow's JPEG decoder opens MPO as well
SUM_TOLERANCE = 0.01  # of probabilities in half precision
SIGN_TOLERANCE = 1e-6


class ExportedModel:
    """An exported ONNX file and what it says of itself. Raises ValueError for a file that no export of ours wrote."""

    batch_size = 32  # images at a time

    def __init__(self, path: Path | str, *, threads: int = 0) -> None:
        import onnxruntime  # here, since the checks below serve answers that no ONNX file gives as well

        self.path = path
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a class of its own for each way to be no model
            raise ValueError(
                f"{path}: cannot be opened by onnxruntime ({error}); expected an exported .onnx"
            ) from error
        said = self.session.get_modelmeta().custom_metadata_map
        try:
            self.classes: list[str] = json.loads(said["classes"])
            self.input: dict[str, Any] = json.loads(said["input"])
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{path}: does not say its classes and its input; expected a file that export wrote"
            ) from error
        if self.input["kind"] not in ("float-nchw", "uint8-nhwc"):
            raise ValueError(f"{path}: takes {self.input['kind']}, not images; feed it as its README says")

    def run(self, images: np.ndarray) -> np.ndarray:
        """Prepared images -> probabilities float32 (B, C). Raises ValueError for an output of another form."""
        answers = self.session.run(["probabilities"], {self.input["name"]: images})[0]
        try:
            check_shape(answers, len(images), len(self.classes))
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}. Export the ensemble again") from error
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is no answer
            return np.asarray(answers, dtype=np.float32)

    def prepare(self, path: Path) -> np.ndarray:
        """One file in the form that the model takes. Raises ValueError for one that cannot be decoded."""
        try:
            with open_image(path) as image:
                rgb = image.convert("RGB")
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path}: cannot be decoded ({error})") from error
        if self.input["kind"] == "uint8-nhwc":
            return np.asarray(rgb)
        return resize_and_crop(rgb, self.input["shorter_side"], self.input["img_size"])

    def run_each(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Prepared images, of any sizes where the model takes any -> probabilities float32 (N, C)."""
        found = np.empty((len(images), len(self.classes)), dtype=np.float32)
        for rows in _of_one_shape(images):
            found[rows] = self.run(np.stack([images[row] for row in rows]))
        return found

    def predict(self, paths: Sequence[Path]) -> np.ndarray:
        """Image files -> probabilities float32 (N, C); `row_problems` says which rows are none."""
        starts = range(0, len(paths), self.batch_size)
        parts = [self.run_each([self.prepare(path) for path in paths[at : at + self.batch_size]]) for at in starts]
        return np.concatenate(parts)


def check_shape(answers: Any, rows: int, classes: int) -> None:
    """Raise ValueError unless `answers` are floats (rows, classes)."""
    if isinstance(answers, np.ndarray) and answers.dtype.kind == "f" and answers.shape == (rows, classes):
        return
    form = f"{answers.dtype} {answers.shape}" if isinstance(answers, np.ndarray) else type(answers).__name__
    raise ValueError(
        f"the probabilities of {rows} images are {form}; expected floats ({rows}, {classes}), a row for each image and "
        "a column for each class"
    )


def row_problems(probabilities: np.ndarray) -> dict[int, str]:
    """{row: why it is no answer} of floats (N, C): each row must be finite, from 0 to 1, and sum to 1."""
    values = probabilities.astype(np.float64)
    finite = np.isfinite(values).all(axis=1)
    values[~finite] = 0
    lowest, highest, sums = values.min(axis=1, initial=0), values.max(axis=1, initial=0), values.sum(axis=1)
    out_of_range = (lowest < -SIGN_TOLERANCE) | (highest > 1 + SUM_TOLERANCE)
    problems = {}
    for row in np.flatnonzero(~finite | out_of_range | (np.abs(sums - 1) > SUM_TOLERANCE)).tolist():
        if not finite[row]:
            problems[row] = "NaN or infinity among its probabilities"
        elif out_of_range[row]:
            worst = lowest[row] if lowest[row] < -SIGN_TOLERANCE else highest[row]
            problems[row] = f"its probabilities must be from 0 to 1; one is {worst:.4g}"
        else:
            problems[row] = f"its probabilities sum to {sums[row]:.4g}; expected 1 within {SUM_TOLERANCE:g}"
    return problems


def open_image(path: str | Path) -> Image.Image:
    """Open an image file; pixels are decoded when they are asked for.

    Raises UnidentifiedImageError, an OSError, for a file in none of the formats; it names the format of the file
    where Pillow knows it.
    """
    try:
        return Image.open(path, formats=FORMATS)
    except UnidentifiedImageError as error:
        if (name := format_of(path)) is None:
            raise
        expected = ", ".join(("MPO", *FORMATS))
        raise UnidentifiedImageError(f"its content is of the format {name}; expected one of {expected}") from error


def format_of(path: str | Path) -> str | None:
    """Pillow's name for the format that the first bytes of a file claim, if it is none of FORMATS; opens no decoder."""
    with open(path, "rb") as file:
        prefix = file.read(16)
    Image.init()
    for name in [name for name in Image.ID if name not in FORMATS]:
        accept = Image.OPEN[name][1]
        try:
            if accept is not None and accept(prefix):
                return name
        except Exception:  # of a prefix that is too short for this format
            continue
    return None


def resize_and_crop(image: Image.Image, side: int, size: int) -> np.ndarray:
    """Shorter side to `side`, the centre square of `size` cut out, in [0, 1]: float32 (3, size, size)."""
    width, height = image.size
    length = int(side * max(width, height) / min(width, height))
    resized = image.resize((side, length) if width <= height else (length, side), Image.Resampling.BILINEAR)
    left, top = (round((edge - size) / 2) for edge in resized.size)
    pixels = np.asarray(resized.crop((left, top, left + size, top + size)))
    return pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255)


def list_image_files(places: Sequence[Path | str]) -> list[Path]:
    """The files, and of folders every image below them. Raises ValueError for a place that is not there."""
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            found += sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
        elif place.is_file():
            found.append(place)
        else:
            raise ValueError(f"{place}: no such file or folder")
    if not found:
        raise ValueError(f"no image ({', '.join(SUFFIXES)}) in {', '.join(map(str, places))}")
    return found


def _of_one_shape(images: Sequence[np.ndarray]) -> Iterator[list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, image in enumerate(images):
        groups.setdefault(image.shape, []).append(row)
    yield from groups.values()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0, or 1 with a line on stderr for what is wrong. An image without an answer has no row."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Class probabilities of image files from an exported ensemble.")
    parser.add_argument("images", nargs="+", help="image files, or folders that hold some")
    parser.add_argument("--model", help="the ONNX file (default: the one beside this export)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line in place of CSV")
    options = parser.parse_args(arguments)
    beside = sorted([*here.glob("*.onnx"), *(here.parent / "onnx").glob("*.onnx")])
    try:
        if not options.model and not beside:
            raise ValueError(f"no ONNX file beside {here}; name one with --model, or export with --formats onnx")
        model = ExportedModel(options.model or beside[0])
        files = list_image_files(options.images)
        probabilities = model.predict(files)
    except ValueError as error:
        print(f"predict: {error}", file=sys.stderr)
        return 1
    problems = row_problems(probabilities)
    table = csv.writer(sys.stdout, lineterminator="\n")
    if not options.json:
        table.writerow(["file", "class", *model.classes])
    for number, (path, row) in enumerate(zip(files, probabilities.tolist(), strict=True)):
        if number in problems:
            print(f"predict: {path}: {problems[number]}", file=sys.stderr)
            continue
        best = model.classes[int(np.argmax(row))]
        if options.json:
            of = dict(zip(model.classes, row, strict=True))
            print(json.dumps({"file": str(path), "class": best, "probabilities": of}, ensure_ascii=False))
        else:
            table.writerow([path, best, *(f"{value:.6g}" for value in row)])
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
