"""What exported ensembles are worth: parity of every kind in every runtime, speed beside eager members, time to export.

    python benchmarks/export.py                 every combiner over tiny members, fifteen of them for the times
    python benchmarks/export.py --quick         voting and trees alone, not the form to report

Networks have random weights, whose parity is no easier than that of trained ones; `export_full.py` has the full ones.
Images are scikit-learn's digits, or those of `--data DIR`. TFLite is measured where its tools are (DBT_TFLITE_PYTHON).
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from export_proofs import CLASSES, PARITY, part, prepared, proved, squares

from reporting import report, row

FASTER, ONNX_SECONDS, TFLITE_SECONDS, OVERHEAD, EXPORTER_RATIO = 2.0, 60.0, 360.0, 1.10, 2.0
FULL_NAMES = ("CustomConvNeXt", "CustomSwinTransformer")
QUICK_KINDS = ("soft_voting", "hard_voting", "stacking_xgb")
SMALL = {
    "runs": {
        "stacking": {"mlp_config": {"hidden_dims": [16], "epochs": 5}, "xgb_config": {"n_estimators": 20}},
        "meta_fuser": {"fuser_type": "attention", "mlp_config": {"hidden_dims": [16], "epochs": 5}},
    }
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; returns 0, also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="export.py", description="Parity, speed and time of exports.")
    parser.add_argument("--quick", action="store_true", help="few kinds and members")
    parser.add_argument("--data", type=Path, help="folder of images in place of the digits")
    options = parser.parse_args(argv)
    with prepared("tiny", options.data, 96) as (scratch, files):
        rows = [*kinds(files, scratch, quick=options.quick), *times(files, scratch, quick=options.quick)]
        rows += exporters(scratch, quick=options.quick)
    report("export", rows, quick=options.quick, packages=("torch", "onnx", "onnxruntime", "timm", "pillow"))
    return 0


def kinds(files: Sequence[Path], scratch: Path, *, quick: bool) -> list[dict]:
    """Parity of every combiner over three tiny members, in each runtime."""
    import torch

    from utils.building.ensembles import COMBINERS
    from utils.combiners.protocol import MemberFacts, combiner_inputs
    from utils.core.config import validate
    from utils.exporting import export_formats, tflite_conversion
    from utils.networks.ensemble_network import EnsembleNetwork
    from utils.predictions.rows import MemberOutputs

    names = ("CustomConvNeXt", "CustomMobileOne", "CustomViTHybrid")
    parts = [part(name, "tiny") for name in names]
    images = squares(files, parts[0].preprocessing.input_size)
    everything = EnsembleNetwork(parts, _everything(), embeds=True)
    with torch.inference_mode():
        logits, *embeddings = everything(torch.from_numpy(images))
    outputs = MemberOutputs(logits.numpy().transpose(1, 0, 2), tuple(part.numpy() for part in embeddings))
    labels = outputs.logits.mean(axis=0).argmax(axis=1)
    labels[::4] = (labels[::4] + 1) % CLASSES
    facts = MemberFacts(names, np.full(3, 0.8), np.full(3, 1.0), np.full(3, 1.0))
    config = validate(SMALL, source=Path("of the benchmark"))
    tflite = tflite_conversion.missing_tools() is None
    found: dict[str, float] = {}
    flips = 0
    for kind in sorted(QUICK_KINDS if quick else COMBINERS):
        combiner = COMBINERS[kind].configured(config, facts)
        seen = combiner_inputs(combiner, outputs)
        combiner.fit(seen, labels, np.arange(len(labels)) % 5)
        is_discontinuous = combiner.is_discontinuous
        network = EnsembleNetwork(
            parts, combiner.to_module(), embeds=combiner.reads_embeddings, member_outputs=is_discontinuous
        )
        network.parity_tolerance = 1.0  # type: ignore[assignment]
        staged = scratch / kind
        first = torch.from_numpy(images[:1])
        classes = [str(number) for number in range(CLASSES)]
        done = export_formats.write_packaged_formats(network, kind, ["torchscript", "onnx"], staged, first, {}, classes)
        if tflite:
            done["tflite"] = export_formats.write_tflite(
                lambda network=network, first=first: (network, first), kind, staged, scratch / "converter"
            )
        for name, entry in done.items():
            outcome = proved(
                name, entry, staged, images, combiner, seen, outputs if is_discontinuous else None, network, scratch
            )
            print(f"{kind:24} {name:12} {outcome['reason'] or outcome['parity']}", file=sys.stderr)
            parity = outcome["parity"] or {"max_abs_diff": float("inf"), "label_flips": 0}
            found[name] = max(found.get(name, 0.0), parity["max_abs_diff"])
            flips += parity["label_flips"] + (not outcome["passed"])
    rows = [
        row(f"{name}: largest difference over all kinds, times 1e4", 1e4 * worst, "", "1", worst <= PARITY, None)
        for name, worst in found.items()
    ]
    return [*rows, row("label flips and failed files over all kinds and runtimes", flips, "", "0", flips == 0, None)]


def times(files: Sequence[Path], scratch: Path, *, quick: bool) -> list[dict]:
    """Voting over fifteen tiny members: time to export, one image beside eager members, files beside bare sessions."""
    import onnxruntime
    import torch

    from models import BACKBONE_MAP
    from utils.combiners.heads import MeanOfProbabilities
    from utils.exporting import export_formats, tflite_conversion
    from utils.exporting.runtimes import measure_latency_ms
    from utils.inference.onnx_prediction import ExportedModel
    from utils.networks.ensemble_network import EnsembleNetwork

    names = list(BACKBONE_MAP)[: 5 if quick else 15]
    parts = [part(name, "tiny") for name in names]
    network = EnsembleNetwork(parts, MeanOfProbabilities())
    images = squares(files, parts[0].preprocessing.input_size)
    first, classes = torch.from_numpy(images[:1]), [str(number) for number in range(CLASSES)]
    given = {"kind": "float-nchw", "name": "images", "img_size": 32, "shorter_side": 36}
    start = time.perf_counter()
    done = export_formats.write_packaged_formats(
        network, "voting", ["onnx"], scratch / "voting", first, {"input": given}, classes
    )
    onnx_seconds = time.perf_counter() - start
    path = scratch / "voting" / done["onnx"]["path"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def eager(batch: np.ndarray) -> Any:
        prepared = (torch.from_numpy(batch) - 0.45) / 0.22
        with torch.inference_mode():
            return [torch.softmax(part.networks[0](prepared), dim=1) for part in parts]

    ours = measure_latency_ms(lambda batch: session.run(None, {"images": batch}), [images[:1]])
    theirs = measure_latency_ms(eager, [images[:1]])
    model = ExportedModel(path, threads=1)

    def bare() -> None:
        for begin in range(0, len(files), 32):
            batch = np.stack([model.prepare(file)[0] for file in files[begin : begin + 32]])
            session.run(["probabilities"], {"images": batch})

    overhead = _best(lambda: model.predict(files)) / _best(bare)
    count, words = f"{len(names)} tiny members", f"{theirs:.2f} ms eager, {ours:.2f} ms ONNX"
    rows = [
        row(f"export of voting over {count} to ONNX", onnx_seconds, "s", "60", onnx_seconds < ONNX_SECONDS, None),
        row(f"one image, {count}: eager over ONNX", theirs / ours, "times", "2.0", theirs / ours >= FASTER, words),
        row("files to probabilities over bare onnxruntime", overhead, "times", "1.10", overhead <= OVERHEAD, None),
    ]
    if tflite_conversion.missing_tools() is not None:
        return [*rows, row(f"export of voting over {count} to TFLite", None, "s", "360", None, "tools not installed")]
    start = time.perf_counter()
    entry = export_formats.write_tflite(lambda: (network, first), "voting", scratch / "voting", scratch / "converter")
    seconds = time.perf_counter() - start
    held = entry["status"] == "ok" and seconds < TFLITE_SECONDS
    return [*rows, row(f"export of voting over {count} to TFLite", seconds, "s", "360", held, entry["reason"])]


def exporters(scratch: Path, *, quick: bool) -> list[dict]:
    """Processor time to write each network as ONNX by dynamo, over that by tracing, on one thread."""
    from export import onnx_files, programs
    from models import BACKBONE_MAP

    what = "dynamo over tracing, processor time"
    if reason := programs.refusal(part("CustomMobileOne", "tiny").networks[0]):
        return [row(f"ONNX: {what}", None, "times", f"{EXPORTER_RATIO}", None, reason)]
    rows = []
    for size, names in (("tiny", list(BACKBONE_MAP)[: 3 if quick else 15]), ("full", FULL_NAMES[: 1 if quick else 2])):
        seconds: dict[str, float] = {}
        write_processor_seconds(onnx_files, "CustomMobileOne", "tiny", scratch)  # imports and first uses
        for name in names:
            found = write_processor_seconds(onnx_files, name, size, scratch)
            print(f"{size} {name:24} {found}", file=sys.stderr)
            seconds = {exporter: seconds.get(exporter, 0.0) + spent for exporter, spent in found.items()}
        ratio = seconds["dynamo"] / seconds["tracing"]
        words = f"{seconds['dynamo']:.1f} s by dynamo, {seconds['tracing']:.1f} s by tracing"
        label = f"ONNX of {len(names)} {size} networks: {what}"
        rows.append(row(label, ratio, "times", f"{EXPORTER_RATIO}", ratio <= EXPORTER_RATIO, words))
    return rows


def write_processor_seconds(onnx_files: Any, name: str, size: str, scratch: Path) -> dict[str, float]:
    """{exporter: processor seconds} of writing one network."""
    import torch

    network = part(name, size).networks[0]
    found = {}
    for exporter in ("tracing", "dynamo"):
        network.onnx_exporter = exporter
        example = (torch.rand(2, 3, network.img_size, network.img_size),)
        start = time.process_time()
        onnx_files.write_onnx(network, example, scratch / "it.onnx", {}, data_name="it.onnx.data")
        found[exporter] = time.process_time() - start
    return found


def _everything() -> Any:
    from torch import nn

    class Everything(nn.Module):
        """Logits and each member's embeddings as they are."""

        def forward(self, logits: Any, embeddings: Any) -> Any:
            return (logits, *embeddings)

    return Everything()


def _best(run: Callable[[], Any]) -> float:
    found = []
    for _ in range(4):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found[1:])


if __name__ == "__main__":
    sys.exit(main())
