"""Fifteen full-size networks in one exported file: is it right, how fast is one image, what did making it take.

    python benchmarks/export_full.py            voting over all fifteen: about six minutes, 6 GB of memory
    python benchmarks/export_full.py --quick    the three cheapest of them, not the form to report

Networks have random weights; images are scikit-learn's digits, or those of `--data DIR`. Each file answers in a new
process by its own runtime and is compared with the eager ensemble. For the time of one image, bare eager networks and
the ONNX file take turns on one thread each. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from export_proofs import CLASSES, PARITY, part, prepared, proved, squares

from reporting import peak_bytes, report, row

IMAGES = 21
TURNS = 7
QUICK_NAMES = ("CustomGhostNetV2", "CustomMobileOne", "CustomRegNet")
INPUT = {"kind": "float-nchw", "name": "images", "img_size": 224, "shorter_side": 256}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; returns 0, also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="export_full.py", description="Exports of full-size ensembles.")
    parser.add_argument("--quick", action="store_true", help="three networks")
    parser.add_argument("--data", type=Path, help="folder of images in place of the digits")
    options = parser.parse_args(argv)
    with prepared("full", options.data, IMAGES) as (scratch, files):
        from models import BACKBONE_MAP

        names = QUICK_NAMES if options.quick else tuple(BACKBONE_MAP)
        rows, alone = measured(names, files, scratch)
    packages = ("torch", "onnx", "onnxruntime", "timm", "pillow")
    report("export_full", rows, quick=options.quick, packages=packages, eager_ms=alone)
    return 0


def measured(names: Sequence[str], files: Sequence[Path], scratch: Path) -> tuple[list[dict], dict[str, float]]:
    """Rows of both formats and of one image; the eager milliseconds of each network."""
    import torch

    from utils.combiners.heads import MeanOfProbabilities
    from utils.exporting import export_formats
    from utils.networks.ensemble_network import EnsembleNetwork

    level = peak_bytes()
    parts = [part(name, "full") for name in names]
    network = EnsembleNetwork(parts, MeanOfProbabilities())
    weights = sum(weight.numel() * weight.element_size() for weight in network.state_dict().values())
    images = squares(files, parts[0].preprocessing.input_size)
    first, classes = torch.from_numpy(images[:1]), [str(number) for number in range(CLASSES)]
    rows, paths, what = [], {}, f"voting over {len(names)} full networks, {weights / 1e6:.0f} MB"
    for kind in ("onnx", "torchscript"):
        start = time.perf_counter()
        done = export_formats.write_packaged_formats(
            network, "voting", [kind], scratch / "voting", first, {"input": INPUT}, classes
        )
        seconds, peak = time.perf_counter() - start, (peak_bytes() - level) / weights
        entry = done[kind]
        outcome = proved(kind, entry, scratch / "voting", images, None, None, None, network, scratch)
        print(f"{kind}: {seconds:.0f} s, {json.dumps(outcome)}", file=sys.stderr, flush=True)
        parity = outcome["parity"] or {"max_abs_diff": float("inf"), "label_flips": 0}
        held = outcome["passed"] and parity["max_abs_diff"] <= PARITY and not parity["label_flips"]
        size = f"{entry['size_mb']:.0f} MB, {parity['label_flips']} flips" if entry["status"] == "ok" else "no file"
        rows += [
            row(f"{kind}: {what}: largest difference, times 1e4", 1e4 * parity["max_abs_diff"], "", "1", held, size),
            row(f"{kind}: seconds to write and check it", seconds, "s", None, None, None),
            row(f"{kind}: peak memory above the imports so far, times the weights", peak, "", None, None, None),
        ]
        paths[kind] = scratch / "voting" / entry["path"] if entry["status"] == "ok" else None
    if paths["onnx"] is None:
        return [*rows, row("one image: eager over ONNX", None, "times", "at least 1", False, "no file")], {}
    alone, ours = in_turns(parts, paths["onnx"], images[:1])
    theirs = np.sum(list(alone.values()), axis=0)
    ratios = theirs / ours
    ratio = float(np.median(ratios))
    words = (
        f"{np.median(theirs):.0f} ms eager, {np.median(ours):.0f} ms ONNX; "
        f"{ratios.min():.2f} to {ratios.max():.2f} over {len(ratios)} turns"
    )
    rows.append(
        row(f"one image, {len(names)} full networks: eager over ONNX", ratio, "times", "at least 1", ratio >= 1, words)
    )
    return rows, {name: round(float(np.median(found)), 2) for name, found in alone.items()}


def in_turns(parts: Sequence[Any], path: Path, image: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Milliseconds of one image by each eager network and by the whole file, (TURNS,) each."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    prepared = (torch.from_numpy(image) - 0.45) / 0.22
    alone: dict[str, list[float]] = {member.name: [] for member in parts}
    ours: list[float] = []
    with torch.inference_mode():
        for turn in range(TURNS + 1):  # the first warms up
            for member in parts:
                spent = milliseconds(lambda member=member: torch.softmax(member.networks[0](prepared), dim=1))
                alone[member.name] += [spent] if turn else []
            spent = milliseconds(lambda: session.run(None, {"images": image}))
            ours += [spent] if turn else []
    return {name: np.array(found) for name, found in alone.items()}, np.array(ours)


def milliseconds(run: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())
