"""Class probabilities of image files from an exported ensemble. Needs onnxruntime, NumPy and Pillow, and nothing else.

    python predict.py photo.jpg folder/ > predictions.csv
    python predict.py --model ../onnx/soft_voting_ensemble.onnx --json photo.jpg

The metadata of the ONNX file hold its input and its classes. This program is delivered with every export, so it imports
nothing of the project that wrote it.
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
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # Pillow's JPEG decoder also opens MPO
SUM_TOLERANCE = 0.01  # of probabilities in half precision
SIGN_TOLERANCE = 1e-6


class ExportedModel:
    """An exported ONNX file with its metadata.

    Raises ValueError for a file that `export` did not write, or that does not take images.
    """

    batch_size = 32

    def __init__(self, path: Path | str, *, threads: int = 0) -> None:
        import onnxruntime  # here, since the checks below are also used where onnxruntime is not installed

        self.path = path
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no base class of their own
            raise ValueError(
                f"{path}: cannot be opened by onnxruntime ({error}); expected an exported .onnx"
            ) from error
        metadata = self.session.get_modelmeta().custom_metadata_map
        try:
            self.classes: list[str] = json.loads(metadata["classes"])
            self.input: dict[str, Any] = json.loads(metadata["input"])
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{path}: its metadata lack the classes or the input; expected a file that export wrote"
            ) from error
        if self.input["kind"] not in ("float-nchw", "uint8-nhwc"):
            raise ValueError(f"{path}: takes {self.input['kind']}, not images; its README describes the input")

    def run(self, images: np.ndarray) -> np.ndarray:
        """Prepared images of one shape -> probabilities float32 (B, C). Raises ValueError for another output shape."""
        probabilities = self.session.run(["probabilities"], {self.input["name"]: images})[0]
        try:
            check_shape(probabilities, len(images), len(self.classes))
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}. Export the ensemble again") from error
        with np.errstate(over="ignore"):  # values beyond float32 become infinite, which `row_problems` reports
            return np.asarray(probabilities, dtype=np.float32)

    def prepare(self, path: Path) -> np.ndarray:
        """One image file as the model takes it. Raises ValueError for a file that cannot be decoded."""
        try:
            with open_image(path) as image:
                rgb = image.convert("RGB")
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path}: cannot be decoded ({error})") from error
        if self.input["kind"] == "uint8-nhwc":
            return np.asarray(rgb)
        return resize_and_crop(rgb, self.input["shorter_side"], self.input["img_size"])

    def run_by_shape(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Prepared images -> probabilities float32 (N, C); images of one shape share a batch."""
        probabilities = np.empty((len(images), len(self.classes)), dtype=np.float32)
        for rows in _rows_by_shape(images):
            probabilities[rows] = self.run(np.stack([images[row] for row in rows]))
        return probabilities

    def predict(self, paths: Sequence[Path]) -> np.ndarray:
        """Image files -> probabilities float32 (N, C); `row_problems` lists invalid rows."""
        batches = (paths[start : start + self.batch_size] for start in range(0, len(paths), self.batch_size))
        return np.concatenate([self.run_by_shape([self.prepare(path) for path in batch]) for batch in batches])


def check_shape(probabilities: Any, rows: int, classes: int) -> None:
    """Raise ValueError unless `probabilities` is an array of floats (rows, classes)."""
    is_array = isinstance(probabilities, np.ndarray)
    if is_array and probabilities.dtype.kind == "f" and probabilities.shape == (rows, classes):
        return
    actual = f"{probabilities.dtype} {probabilities.shape}" if is_array else type(probabilities).__name__
    raise ValueError(
        f"the probabilities of {rows} images are {actual}; expected floats ({rows}, {classes}), one row per image and "
        "one column per class"
    )


def row_problems(probabilities: np.ndarray) -> dict[int, str]:
    """{row: reason} of the invalid rows of floats (N, C): each must be finite, in [0, 1], and sum to 1."""
    values = probabilities.astype(np.float64)
    finite = np.asarray(np.isfinite(values).all(axis=1))
    values[~finite] = 0
    lowest, highest, sums = values.min(axis=1, initial=0), values.max(axis=1, initial=0), values.sum(axis=1)
    out_of_range = (lowest < -SIGN_TOLERANCE) | (highest > 1 + SUM_TOLERANCE)
    problems = {}
    for row in np.flatnonzero(~finite | out_of_range | (np.abs(sums - 1) > SUM_TOLERANCE)).tolist():
        if not finite[row]:
            problems[row] = "NaN or infinity among its probabilities"
        elif out_of_range[row]:
            worst = lowest[row] if lowest[row] < -SIGN_TOLERANCE else highest[row]
            problems[row] = f"its probabilities must be in [0, 1]; one is {worst:.4g}"
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
    """Resize the shorter side to `side` and crop the centre square of `size`: float32 (3, size, size) in [0, 1]."""
    width, height = image.size
    length = int(side * max(width, height) / min(width, height))
    resized = image.resize((side, length) if width <= height else (length, side), Image.Resampling.BILINEAR)
    left, top = (round((edge - size) / 2) for edge in resized.size)
    pixels = np.asarray(resized.crop((left, top, left + size, top + size)))
    return pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255)


def list_image_files(paths: Sequence[Path | str]) -> list[Path]:
    """The files, and every image below the folders. Raises ValueError for a path that does not exist, or no image."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"{path}: no such file or folder")
    if not files:
        raise ValueError(f"no image ({', '.join(SUFFIXES)}) in {', '.join(map(str, paths))}")
    return files


def _rows_by_shape(images: Sequence[np.ndarray]) -> Iterator[list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, image in enumerate(images):
        groups.setdefault(image.shape, []).append(row)
    yield from groups.values()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 1 where an error is printed. An image without a prediction has no row."""
    folder = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Class probabilities of image files from an exported ensemble.")
    parser.add_argument("images", nargs="+", help="image files, or folders of image files")
    parser.add_argument("--model", help="ONNX file (default: that of this export)")
    parser.add_argument("--json", action="store_true", help="write one JSON object per line instead of CSV")
    options = parser.parse_args(arguments)
    available = sorted([*folder.glob("*.onnx"), *(folder.parent / "onnx").glob("*.onnx")])
    try:
        if not options.model and not available:
            raise ValueError(
                f"no ONNX file in {folder.parent / 'onnx'}; name one with --model, or export with --formats onnx"
            )
        model = ExportedModel(options.model or available[0])
        files = list_image_files(options.images)
        probabilities = model.predict(files)
    except ValueError as error:
        print(f"predict: {error}", file=sys.stderr)
        return 1
    problems = row_problems(probabilities)
    table = csv.writer(sys.stdout, lineterminator="\n")
    if not options.json:
        table.writerow(["file", "class", *model.classes])
    for index, (path, row) in enumerate(zip(files, probabilities.tolist(), strict=True)):
        if index in problems:
            print(f"predict: {path}: {problems[index]}", file=sys.stderr)
            continue
        best = model.classes[int(np.argmax(row))]
        if options.json:
            by_class = dict(zip(model.classes, row, strict=True))
            print(json.dumps({"file": str(path), "class": best, "probabilities": by_class}, ensure_ascii=False))
        else:
            table.writerow([path, best, *(f"{value:.6g}" for value in row)])
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
