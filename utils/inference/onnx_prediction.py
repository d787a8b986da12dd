"""Class probabilities of image files from an exported ensemble. Needs only onnxruntime, NumPy and Pillow.

    python predict.py photo.jpg folder/ > predictions.csv
    python predict.py --model ../onnx/soft_voting_ensemble.onnx --json photo.jpg

The metadata of the ONNX file describe its inputs and classes. This program is delivered with every export, so it
imports nothing from the project that wrote it.
"""

from __future__ import annotations

import argparse
import csv
import errno
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # Pillow's JPEG decoder also opens MPO
SUM_TOLERANCE = 0.01  # for probabilities in half precision
SIGN_TOLERANCE = 1e-6
RESIZES = ("shorter-side", "squash", "pad")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_OFFSETS = ("round", "floor")
EXIF_RULES = ("ignore", "apply")
MAX_SIDE = 8192  # largest size in pixels in a file's metadata
MAX_RESIZED = 1 << 26  # pixels of a resized image, and of all inputs for one image
BATCH_BYTES = 1 << 28  # limit of preprocessed images in memory
ORIENTATION = 0x0112  # EXIF tag
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> transposition that makes the image upright; other orientations are upright."""
InputArrays = tuple[np.ndarray, ...]
"""One image in the format of a file: one array per input."""
_bounded: list[int] = []  # limit of the process's allocator in bytes, once it is set


@dataclass(frozen=True)
class ResizeRule:
    """The rule that computes the square of `input_size` px from a decoded image, with Pillow's arithmetic."""

    input_size: int
    resized: int
    """Target length in px of the shorter side (`shorter-side`), both sides (`squash`) or the longer side (`pad`)."""
    resize: str = "shorter-side"
    interpolation: str = "bilinear"
    crop_offset: str = "round"
    """Rounding of half pixels: `round` or `floor`."""
    exif: str = "ignore"
    fill: tuple[int, int, int] = (0, 0, 0)
    """RGB of the padding."""

    @classmethod
    def from_metadata(cls, entry: Any) -> ResizeRule:
        """Create the rule from metadata of any origin. Raises ValueError for unknown values."""
        names = [field.name for field in fields(cls)]
        if not isinstance(entry, dict) or set(entry) != set(names):
            raise ValueError(f"a resize rule is {str(entry)[:60]}; expected {', '.join(names)}")
        choices = {"resize": RESIZES, "interpolation": INTERPOLATIONS, "crop_offset": CROP_OFFSETS, "exif": EXIF_RULES}
        for name, values in choices.items():
            if entry[name] not in values:
                raise ValueError(f"{name} is {str(entry[name])[:60]!r}; expected one of {', '.join(values)}")
        for name in ("input_size", "resized"):
            if type(entry[name]) is not int or not 1 <= entry[name] <= MAX_SIDE:
                raise ValueError(f"{name} is {str(entry[name])[:60]}; expected a whole number from 1 to {MAX_SIDE}")
        fill = entry["fill"]
        if not isinstance(fill, list) or len(fill) != 3 or any(type(v) is not int or not 0 <= v < 256 for v in fill):
            raise ValueError(f"fill is {str(fill)[:60]}; expected three whole numbers from 0 to 255")
        return cls(**entry | {"fill": tuple(fill)})

    def target_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after resizing an image. Raises ValueError beyond MAX_RESIZED pixels."""
        long, short = max(width, height), min(width, height)
        if self.resize == "squash":
            return self.resized, self.resized
        if self.resize == "pad":
            ratio = long / self.resized
            return max(1, round(width / ratio)), max(1, round(height / ratio))
        length = int(self.resized * long / short)
        if self.resized * length > MAX_RESIZED:
            raise ValueError(
                f"{width} x {height} pixels, and still {self.resized * length} with its shorter side at {self.resized}"
            )
        return (self.resized, length) if width <= height else (length, self.resized)

    def square(self, rgb: Image.Image) -> np.ndarray:
        """The centre square, uint8 (input_size, input_size, 3), of an RGB image, upright if `exif` is `apply`."""
        image = rgb.resize(self.target_size(*rgb.size), Image.Resampling[self.interpolation.upper()])
        left, top = (self._start(length) for length in image.size)
        if min(image.size) >= self.input_size:
            return np.asarray(image.crop((left, top, left + self.input_size, top + self.input_size)))
        canvas = Image.new("RGB", (self.input_size, self.input_size), self.fill)
        canvas.paste(image, (-left, -top))
        return np.asarray(canvas)

    def _start(self, length: int) -> int:
        """Offset of the square along a side; negative if the side is shorter than the square."""
        excess = length - self.input_size
        if self.crop_offset == "floor":
            return excess // 2
        return -(-excess // 2) if excess < 0 else round(excess / 2)


@dataclass(frozen=True)
class ImageInput:
    """One input of a file: resized squares, float32 (B, 3, S, S) in [0, 1], or decoded pixels, uint8 (B, H, W, 3)."""

    name: str
    rule: ResizeRule | None
    """None for decoded pixels of any size."""
    exif: str

    def array(self, sources: Mapping[str, Image.Image]) -> np.ndarray:
        """The input for one image; `sources` is {EXIF rule: its pixels}."""
        if self.rule is None:
            return np.asarray(sources[self.exif])
        return self.rule.square(sources[self.exif]).transpose(2, 0, 1).astype(np.float32) / np.float32(255)


def read_inputs(metadata: Any) -> list[ImageInput]:
    """The inputs described by `input` in a file's metadata, which may be of any origin.

    Raises ValueError for a form or a value that `export` does not write, and for sizes beyond MAX_RESIZED.
    """
    if not isinstance(metadata, dict) or not isinstance(metadata.get("kind"), str):
        raise ValueError("its metadata lack the kind of its input; expected a file that export wrote")
    kind = metadata["kind"]
    if kind not in ("float-nchw", "uint8-nhwc"):
        raise ValueError(f"takes {kind[:60]}, not images; its README describes the input")
    entries = metadata.get("inputs", [metadata])  # exports of earlier versions have a single input
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"its inputs are {str(entries)[:60]}; expected a list of inputs")
    inputs = [_read_input(kind, entry) for entry in entries]
    if sum(described.rule.input_size**2 for described in inputs if described.rule is not None) > MAX_RESIZED:
        raise ValueError(f"its inputs hold more than {MAX_RESIZED} pixels of one image")
    return inputs


def _read_input(kind: str, entry: Any) -> ImageInput:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ValueError(f"an input is {str(entry)[:60]}; expected a name and how it is made from an image")
    if kind == "uint8-nhwc":
        exif = entry.get("exif", "ignore")
        if exif not in EXIF_RULES:
            raise ValueError(f"exif is {str(exif)[:60]!r}; expected one of {', '.join(EXIF_RULES)}")
        return ImageInput(entry["name"], None, exif)
    earlier = {"input_size": entry.get("img_size"), "resized": entry.get("shorter_side"), "resize": "shorter-side"}
    earlier |= {"interpolation": "bilinear", "crop_offset": "round", "exif": "ignore", "fill": [0, 0, 0]}
    rule = ResizeRule.from_metadata(entry.get("resizing", earlier))
    return ImageInput(entry["name"], rule, rule.exif)


class ExportedModel:
    """An exported ONNX file with its metadata.

    Raises ValueError for a file that `export` did not write, or that does not take images.
    """

    def __init__(self, path: Path | str, *, threads: int = 0, max_bytes: int | None = None) -> None:
        """Open a file; `max_bytes` limits allocations of its graph, for this and later files of the process."""
        import onnxruntime  # imported here, since the checks below are also used without onnxruntime

        self.path = path
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # errors are raised too; logging could print escape sequences from the file
        if max_bytes is not None:
            _bound_memory(max_bytes)
            options.add_session_config_entry("session.use_env_allocators", "1")
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common base class
            raise ValueError(
                f"{path}: cannot be opened by onnxruntime ({error}); expected an exported .onnx"
            ) from error
        metadata = self.session.get_modelmeta().custom_metadata_map
        try:
            self.classes: list[str] = json.loads(metadata["classes"])
            described = json.loads(metadata["input"])
        except (KeyError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}: its metadata lack the classes or the input; expected a file that export wrote"
            ) from error
        try:
            _check_classes(self.classes)
            self.inputs = read_inputs(described)
            self._check_inputs()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _check_inputs(self) -> None:
        """Raise ValueError unless the inputs of the graph match the metadata."""
        nodes = {node.name: (node.type, node.shape) for node in self.session.get_inputs()}
        names = [described.name for described in self.inputs]
        outputs = [node.name for node in self.session.get_outputs()]
        if "probabilities" not in outputs:
            raise ValueError(f"its graph gives {', '.join(outputs)[:200]}; expected probabilities")
        if sorted(names) != sorted(nodes):
            raise ValueError(f"its graph takes {', '.join(nodes)}, its metadata describe {', '.join(names)[:200]}")
        for described in self.inputs:
            element, shape = nodes[described.name]
            size = None if described.rule is None else described.rule.input_size
            expected = [None, None, None, 3] if size is None else [None, 3, size, size]
            expected_element = "tensor(uint8)" if size is None else "tensor(float)"
            fits = len(shape) == 4 and all(
                actual == side or not isinstance(actual, int) or side is None
                for actual, side in zip(shape, expected, strict=True)
            )
            if element != expected_element or not fits:
                raise ValueError(
                    f"{described.name} is {element} {shape}; its metadata describe {expected_element} {expected}"
                )

    @property
    def batch_size(self) -> int:
        """Number of images whose inputs are in memory at a time."""
        image_bytes = sum(12 * described.rule.input_size**2 for described in self.inputs if described.rule is not None)
        return max(1, min(32, BATCH_BYTES // max(1, image_bytes)))

    def run(self, images: InputArrays) -> np.ndarray:
        """Preprocessed images, one batch per input -> probabilities, float32 (B, C).

        Raises ValueError for another output shape, and if the graph cannot be run.
        """
        feed = {described.name: array for described, array in zip(self.inputs, images, strict=True)}
        try:
            probabilities = self.session.run(["probabilities"], feed)[0]
        except Exception as error:  # onnxruntime's errors have no common base class
            raise ValueError(
                f"{self.path}: onnxruntime cannot run it ({str(error)[:400]}). Export the ensemble again"
            ) from error
        try:
            check_shape(probabilities, len(images[0]), len(self.classes))
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}. Export the ensemble again") from error
        with np.errstate(over="ignore"):  # values beyond float32 become infinite and are reported by `row_problems`
            return np.asarray(probabilities, dtype=np.float32)

    def prepare(self, path: Path) -> InputArrays:
        """Preprocess one image file. Raises ValueError for a file that cannot be decoded."""
        try:
            with warnings.catch_warnings():
                # Of Pillow's two pixel limits, only the higher one, which is an error, applies, as in training.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                return self._prepared(path)
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path}: cannot be decoded ({error})") from error

    def _prepared(self, path: Path) -> InputArrays:
        with open_image(path) as image:
            for described in self.inputs:
                if described.rule is not None:
                    described.rule.target_size(*image.size)  # checked before decoding, which allocates the memory
            rgb = image.convert("RGB")
            sources = {"ignore": rgb}
            if any(described.exif == "apply" for described in self.inputs):
                method = TRANSPOSITIONS.get(exif_orientation(image))
                sources["apply"] = rgb if method is None else rgb.transpose(method)
        return tuple(described.array(sources) for described in self.inputs)

    def run_by_shape(self, images: Sequence[InputArrays]) -> np.ndarray:
        """Preprocessed images -> probabilities, float32 (N, C); images of equal shape share a batch."""
        rows_of_shape: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for row, arrays in enumerate(images):
            rows_of_shape.setdefault(tuple(array.shape for array in arrays), []).append(row)
        probabilities = np.empty((len(images), len(self.classes)), dtype=np.float32)
        for rows in rows_of_shape.values():
            probabilities[rows] = self.run(tuple(map(np.stack, zip(*(images[row] for row in rows), strict=True))))
        return probabilities

    def predict(self, paths: Sequence[Path]) -> np.ndarray:
        """Image files -> probabilities, float32 (N, C); `row_problems` lists invalid rows."""
        batches = (paths[start : start + self.batch_size] for start in range(0, len(paths), self.batch_size))
        return np.concatenate([self.run_by_shape([self.prepare(path) for path in batch]) for batch in batches])


def _bound_memory(max_bytes: int) -> None:
    """Limit the bytes of all sessions that use the process's allocator; only the first call has an effect."""
    import onnxruntime

    if _bounded:
        return
    info = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(info, onnxruntime.OrtArenaCfg(max_bytes, -1, -1, -1))
    _bounded.append(max_bytes)


def _check_classes(classes: Any) -> None:
    """Raise ValueError unless the classes are distinct strings."""
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("its classes are no list of names; expected a file that export wrote")
    if not classes or "" in classes or len(set(classes)) < len(classes):
        raise ValueError("its classes lack a name, or two have the same; expected one name for each column")
    try:
        "".join(classes).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"its classes are no text ({error})") from error


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
    """{row: reason} of the invalid rows of floats (N, C): values must be finite, in [0, 1], and sum to 1."""
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
    """Open an image file; pixels are decoded on access.

    Raises UnidentifiedImageError, an OSError, for a file in none of FORMATS, naming its format if Pillow knows it.
    Raises OSError for anything but a regular file, which could block forever.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "a folder, a FIFO or a device; expected a regular file", str(path))
    try:
        return Image.open(path, formats=FORMATS)
    except UnidentifiedImageError as error:
        if (name := format_of(path)) is None:
            raise
        expected = ", ".join(("MPO", *FORMATS))
        raise UnidentifiedImageError(f"its content is of the format {name}; expected one of {expected}") from error


def format_of(path: str | Path) -> str | None:
    """Pillow's name of the format by the first bytes of a file, if it is not in FORMATS; opens no decoder."""
    with open(path, "rb") as file:
        prefix = file.read(16)
    Image.init()
    for name in [name for name in Image.ID if name not in FORMATS]:
        accept = Image.OPEN[name][1]
        try:
            if accept is not None and accept(prefix):
                return name
        except Exception:  # the prefix is too short for this format
            continue
    return None


def exif_orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, that remains to be applied to a decoded image; 1 (upright) if the tag is damaged.

    Pillow's TIFF decoder applies the orientation itself; the image is then upright.
    """
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged metadata do not affect the pixels
        return 1
    return value if value in TRANSPOSITIONS else 1


def list_image_files(paths: Sequence[Path | str]) -> list[Path]:
    """The files, and all images below the folders. Raises ValueError for a missing path, or if there is no image."""
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 1 if an error is printed. An image without a prediction has no row."""
    folder = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Class probabilities of image files from an exported ensemble.")
    parser.add_argument("images", nargs="+", help="image files, or folders of image files")
    parser.add_argument("--model", help="ONNX file (default: that of this export)")
    parser.add_argument("--json", action="store_true", help="write one JSON object per line instead of CSV")
    options = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for names that the terminal's encoding cannot represent
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
    for index, problem in problems.items():
        print(f"predict: {files[index]}: {problem}", file=sys.stderr)
    rows = [
        (path, row) for index, (path, row) in enumerate(zip(files, probabilities, strict=True)) if index not in problems
    ]
    try:
        _print_rows(model.classes, rows, as_json=options.json)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's flush on exit
        if isinstance(error, BrokenPipeError):  # the reader stopped reading, as in `| head`
            return 0
        print(f"predict: standard output cannot be written: {error.strerror or error}", file=sys.stderr)
        return 1
    return 1 if problems else 0


def _print_rows(classes: Sequence[str], rows: Sequence[tuple[Path, np.ndarray]], *, as_json: bool) -> None:
    table = csv.writer(sys.stdout, lineterminator="\n")
    if not as_json:
        table.writerow(["file", "class", *classes])
    for path, row in rows:
        best = classes[int(np.argmax(row))]
        if as_json:
            by_class = dict(zip(classes, row.tolist(), strict=True))
            print(json.dumps({"file": str(path), "class": best, "probabilities": by_class}, ensure_ascii=False))
        else:
            table.writerow([path, best, *(f"{value:.6g}" for value in row.tolist())])


if __name__ == "__main__":
    sys.exit(main())
