"""The folder `custom/` of every export: README, model card, prediction program, description and reference rows."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.core.artifacts import write_arrays, write_json, write_text
from utils.exporting.hub_metadata import hub_header
from utils.exporting.parity_check import TOLERANCE, ReferenceBatches, named_arrays

PARITY_FILE = "parity.npz"
PREDICT_PROGRAM = Path(__file__).parents[1] / "inference" / "onnx_prediction.py"
"""Delivered as `custom/predict.py`; not imported here, since it needs onnxruntime."""
MAX_PARITY_BYTES = 64_000_000
ZIP_TIMESTAMP = (1980, 1, 1, 0, 0, 0)  # for every file in the zip, so that equal contents give equal bytes


def write_custom_folder(
    folder: Path,
    name: str,
    description: Mapping[str, Any],
    classes: Sequence[str],
    status: Mapping[str, Mapping[str, Any]],
    score: Mapping[str, Any] | None,
) -> None:
    """Write README, predict.py, model card, description and `<name>_custom.bin`, a zip of these, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "README.md", readme(name, description, classes, status))
    write_text(folder / "model_card.md", model_card(name, description, classes, status, score))
    write_json(folder / "ensemble.json", {**description, "classes": list(classes)})
    shutil.copyfile(PREDICT_PROGRAM, folder / "predict.py")
    with zipfile.ZipFile(folder / f"{name}_custom.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in ("README.md", "ensemble.json", "model_card.md", "predict.py"):
            archive.writestr(zipfile.ZipInfo(file, ZIP_TIMESTAMP), (folder / file).read_bytes(), zipfile.ZIP_DEFLATED)


def readme(
    name: str, description: Mapping[str, Any], classes: Sequence[str], status: Mapping[str, Mapping[str, Any]]
) -> str:
    """Text of README.md: how to use the files, their input and outputs, and the status of each format."""
    kind, outputs = description["input"]["kind"], ", ".join(description["outputs"])
    input_text = {"float-nchw": _float_inputs, "uint8-nhwc": _decoded_input, "member-logits": _logits_input}[kind]
    files = "\n".join(
        f"- `{format_name}`: {entry['status']}"
        + (f", `{entry['path']}`" if entry.get("path") else f" ({entry['reason']})")
        for format_name, entry in sorted(status.items())
    )
    members = ", ".join(member["name"] for member in description["members"])
    usage = (
        "```\npip install onnxruntime numpy pillow\npython predict.py photo.jpg folder/ > predictions.csv\n```\n\n"
        "`predict.py` runs the ONNX file in `../onnx`, or the one that `--model` names.\n"
        if kind != "member-logits"
        else "Pass `member_logits` to the ONNX or TorchScript file; `predict.py` runs files that take images.\n"
    )
    return (
        f"# {name}\n\n{usage}\n## Input and output\n\n{input_text(description['input'])}\n\nOutputs: {outputs}. "
        f"`probabilities` has the shape (batch, {len(classes)}), classes in the order of `class_mapping.json`. "
        "A TFLite file takes one image at a time; its outputs are called output_0, output_1 ... in this order.\n\n"
        f"Members: {members}.\n\n## Files\n\n{files}\n\n`export_status.json` holds the parity check of each format: "
        "its own runtime ran the files on real images, and the outputs were compared with the ensemble's.\n"
    )


def _float_inputs(description: Mapping[str, Any]) -> str:
    """Description of images in [0, 1], and of how each input is computed from a decoded image."""
    inputs = description["inputs"]
    if len(inputs) == 1:
        return (
            f"Input `{inputs[0]['name']}`: RGB images, float32 {_batch_shape(inputs[0])} in [0, 1]. "
            f"{_resize_text(inputs[0]['resizing'])} The files normalise the images."
        )
    lines = [
        f"- `{entry['name']}`: float32 {_batch_shape(entry)}. {_resize_text(entry['resizing'])}" for entry in inputs
    ]
    return (
        "Inputs: the same RGB images in [0, 1], once for each resize rule of the members, in this order (`predict.py` "
        "makes all of them from a file):\n\n" + "\n".join(lines) + "\n\nThe files normalise the images."
    )


def _batch_shape(entry: Mapping[str, Any]) -> str:
    return f"(batch, {', '.join(map(str, entry['shape'][1:]))})"


def _resize_text(rule: Mapping[str, Any]) -> str:
    """One or two sentences on a resize rule."""
    side = {"shorter-side": "the shorter side", "squash": "both sides", "pad": "the longer side"}[rule["resize"]]
    cut = f"pad to the square with RGB {tuple(rule['fill'])}" if rule["resize"] == "pad" else "crop the centre square"
    rounded = ", half pixels rounded down" if rule["crop_offset"] == "floor" else ""
    turned = "Apply the EXIF orientation. " if rule["exif"] == "apply" else ""
    return f"{turned}Resize {side} to {rule['resized']} px ({rule['interpolation']}) and {cut}{rounded}."


def _decoded_input(description: Mapping[str, Any]) -> str:
    text = (
        "Input `images`: decoded RGB images of any size, uint8 (batch, height, width, 3). The files resize, crop and "
        "normalise the images."
    )
    (entry,) = description["inputs"]
    if len(entry["resized_inside"]) > 1:
        return text
    (rule,) = entry["resized_inside"]
    size = rule["input_size"]
    return f"{text} A TFLite file takes squares (1, {size}, {size}, 3). {_resize_text(rule)}"


def _logits_input(description: Mapping[str, Any]) -> str:
    return (
        f"Input `{description['name']}`: the members' logits, float32 (batch, members, classes), members in the order "
        "below. The files do not contain the members' networks."
    )


def model_card(
    name: str,
    description: Mapping[str, Any],
    classes: Sequence[str],
    status: Mapping[str, Mapping[str, Any]],
    score: Mapping[str, Any] | None,
) -> str:
    """Text of model_card.md: the hub's header, then method, members, classes, scores, parity and limits."""
    lines = [hub_header(name, score), f"# Model card: {name}", "", f"- Method: {description['method']}"]
    lines += [f"- Networks per member: {'all fold networks' if description['inference'] == 'folds' else 'one'}"]
    lines += [f"- Classes ({len(classes)}): {', '.join(classes)}", "", "## Members", ""]
    lines += ["| name | architecture | size | image size |", "|---|---|---|---|"]
    lines += [
        f"| {m['name']} | {m['architecture']} | {m['size']} | {m['img_size'] or 'unknown'} |"
        for m in description["members"]
    ]
    lines += ["", "## Scores", ""]
    if score is None:
        lines.append("Not measured before the export. Run `python ensemble_orchestrator.py evaluate` to measure them.")
    else:
        values = ", ".join(f"{key} {score[key]:.4f}" for key in ("accuracy", "f1_macro", "log_loss", "ece"))
        lines.append(f"On {score['n_samples']} rows of {score['split']}: {values}.")
        if score.get("contaminated") or score.get("optimistic"):
            lines.append("The ensemble was fitted or selected on some of these rows, so the scores are optimistic.")
        if unknown := score.get("unknown_training_data"):
            lines.append(
                f"The training data of {', '.join(unknown)} is not stated and may include these rows, so the scores "
                "may be too high."
            )
    parities = [entry["parity"] for entry in status.values() if entry.get("parity")]
    parities = [parity for parity in parities if parity["tolerance"] == TOLERANCE]  # excludes reduced precision
    if parities:
        largest = max(parity["max_abs_diff"] or 0.0 for parity in parities)
        lines += [
            "",
            f"The probabilities of the exported files differ from the ensemble's by at most {largest:.2g} on "
            f"{parities[0]['rows']} real rows.",
        ]
    lines += [
        "",
        "## Limits",
        "",
        "The ensemble assigns one of the classes above to every image, also to images of none of them. The scores hold "
        "for images like those that it was evaluated on.",
        "",
    ]
    return "\n".join(lines)


def write_parity_rows(folder: Path, reference: ReferenceBatches, squares: Sequence[np.ndarray]) -> None:
    """Write `parity.npz`, up to 64 MB of reference rows, so that parity can be checked on another machine.

    `squares` are the centre squares of the same rows, uint8 (S, S, 3), for formats of a fixed image size.
    """
    arrays: dict[str, np.ndarray] = {"probabilities": reference.probabilities}
    total_bytes = 0
    for number, (batch, rows) in enumerate(zip(reference.batches, reference.rows, strict=True)):
        total_bytes += sum(array.nbytes for array in batch)
        if total_bytes > MAX_PARITY_BYTES and number:
            break
        arrays |= {**named_arrays(number, batch), f"rows_{number:04d}": rows}
    if squares:
        arrays["squares"] = np.stack(squares)
    write_arrays(folder / PARITY_FILE, arrays)
