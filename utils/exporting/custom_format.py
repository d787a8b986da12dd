"""What lies in `custom/` of every export: how to use it, a program that does, and what the ensemble is."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.core.artifacts import write_arrays, write_json, write_text
from utils.exporting.parity_check import TOLERANCE, ReferenceBatches

PARITY_FILE = "parity.npz"
PREDICT_PROGRAM = Path(__file__).parents[1] / "inference" / "onnx_prediction.py"
"""Delivered as predict.py, and imported by nobody here, since it needs onnxruntime."""
MAX_PARITY_BYTES = 64_000_000
ZIP_TIMESTAMP = (1980, 1, 1, 0, 0, 0)  # of every file in the zip, so that equal content gives equal bytes


def write_custom_folder(
    folder: Path,
    name: str,
    description: Mapping[str, Any],
    classes: Sequence[str],
    status: Mapping[str, Mapping[str, Any]],
    score: Mapping[str, Any] | None,
) -> None:
    """Fill `folder` with README, predict.py, model card, description and `<name>_custom.bin`, their zip."""
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
    """How to use the files."""
    given, outputs = description["input"], ", ".join(description["outputs"])
    takes = {
        "float-nchw": f"RGB images, float32 (batch, 3, {given.get('img_size')}, {given.get('img_size')}) from 0 to 1: "
        f"shorter side resized to {given.get('shorter_side')} px (bilinear), centre square cut out. Normalisation is "
        "inside.",
        "uint8-nhwc": "RGB images as they are decoded, uint8 (batch, height, width, 3), of any size. Resizing, cutting "
        f"and normalisation are inside. A TFLite file takes (1, {given.get('img_size')}, {given.get('img_size')}, 3): "
        f"resize the shorter side to {given.get('shorter_side')} px (bilinear) and cut the centre square out first.",
        "member-logits": "the members' logits, float32 (batch, members, classes), members in the order below. The "
        "networks themselves are not part of it.",
    }[given["kind"]]
    files = "\n".join(
        f"- `{format_name}`: {entry['status']}"
        + (f", `{entry['path']}`" if entry.get("path") else f" ({entry['reason']})")
        for format_name, entry in sorted(status.items())
    )
    members = ", ".join(member["name"] for member in description["members"])
    use = (
        "```\npip install onnxruntime numpy pillow\npython predict.py photo.jpg folder/ > predictions.csv\n```\n\n"
        "`predict.py` takes the ONNX file in `../onnx`, or the one that `--model` names.\n"
        if given["kind"] != "member-logits"
        else f"Feed the input `{given['name']}` to the ONNX or TorchScript file; `predict.py` is for images.\n"
    )
    return (
        f"# {name}\n\n{use}\n## Input and output\n\nInput `{given['name']}`: {takes}\n\nOutputs: {outputs}. "
        f"`probabilities` is (batch, {len(classes)}), classes in the order of `class_mapping.json`. "
        "A TFLite file takes one image at a time and calls its outputs output_0, output_1 ... in this order.\n\n"
        f"Members: {members}.\n\n## Files\n\n{files}\n\n`export_status.json` holds the proof of each: it was opened "
        "again by its own runtime and compared on real images.\n"
    )


def model_card(
    name: str,
    description: Mapping[str, Any],
    classes: Sequence[str],
    status: Mapping[str, Mapping[str, Any]],
    score: Mapping[str, Any] | None,
) -> str:
    """What the ensemble is, how well it does, and what it is not for."""
    lines = [f"# Model card: {name}", "", f"- Method: {description['method']}"]
    lines += [
        f"- Members answer by: {'their fold networks' if description['inference'] == 'folds' else 'one network each'}"
    ]
    lines += [f"- Classes ({len(classes)}): {', '.join(classes)}", "", "## Members", ""]
    lines += ["| name | architecture | size | image size |", "|---|---|---|---|"]
    lines += [
        f"| {m['name']} | {m['architecture']} | {m['size']} | {m['img_size'] or 'unknown'} |"
        for m in description["members"]
    ]
    lines += ["", "## Scores", ""]
    if score is None:
        lines.append("Not measured before the export; `python ensemble_orchestrator.py evaluate` does.")
    else:
        figures = ", ".join(f"{key} {score[key]:.4f}" for key in ("accuracy", "f1_macro", "log_loss", "ece"))
        lines.append(f"On {score['n_samples']} rows of {score['split']}: {figures}.")
        if score.get("contaminated") or score.get("optimistic"):
            lines.append("These rows had a part in making it, so the scores flatter it.")
    checked = [entry["parity"] for entry in status.values() if entry.get("parity")]
    checked = [parity for parity in checked if parity["tolerance"] == TOLERANCE]  # those of fewer bits differ by more
    if checked:
        worst = max(parity["max_abs_diff"] or 0.0 for parity in checked)
        lines += ["", f"Exported files differ from it by {worst:.2g} at most on {checked[0]['rows']} real rows."]
    lines += [
        "",
        "## Limits",
        "",
        "It knows the classes above and answers with one of them whatever it is shown. Scores hold for images like "
        "those it was tested on.",
        "",
    ]
    return "\n".join(lines)


def write_parity_rows(folder: Path, probe: ReferenceBatches, squares: Sequence[np.ndarray]) -> None:
    """Keep the rows of the certificate, so that it can be had again on another machine; as many as take 64 MB.

    `squares` are the same rows cut to size, uint8 (S, S, 3), where a format takes them so.
    """
    arrays: dict[str, np.ndarray] = {"probabilities": probe.probabilities}
    taken = 0
    for number, (batch, rows) in enumerate(zip(probe.batches, probe.rows, strict=True)):
        taken += batch.nbytes
        if taken > MAX_PARITY_BYTES and number:
            break
        arrays |= {f"batch_{number:04d}": batch, f"rows_{number:04d}": rows}
    if squares:
        arrays["squares"] = np.stack(squares)
    write_arrays(folder / PARITY_FILE, arrays)
