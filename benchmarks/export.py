"""What exported ensembles are worth: parity of every kind in every runtime, speed beside eager members, time to export.

    python benchmarks/export.py                 every combiner over tiny members, fifteen of them for the times
    python benchmarks/export.py --quick         voting and trees alone, not the form to report
    python benchmarks/export.py --full --record FILE.json   the fifteen full networks one by one; goes on where it was

Networks have random weights, whose parity is no easier than that of trained ones; images are scikit-learn's digits, or
those of `--data DIR`. TFLite is measured where its tools are (DBT_TFLITE_PYTHON). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from reporting import report, row  # noqa: E402

PARITY, FASTER, ONNX_SECONDS, TFLITE_SECONDS, OVERHEAD = 1e-4, 2.0, 60.0, 360.0, 1.10
QUICK_KINDS = ("soft_voting", "hard_voting", "stacking_xgb")
SMALL = {
    "runs": {
        "stacking": {"mlp_config": {"hidden_dims": [16], "epochs": 5}, "xgb_config": {"n_estimators": 20}},
        "meta_fuser": {"fuser_type": "attention", "mlp_config": {"hidden_dims": [16], "epochs": 5}},
    }
}
CLASSES = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; returns 0, also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="export.py", description="Parity, speed and time of exports.")
    parser.add_argument("--quick", action="store_true", help="few kinds and members")
    parser.add_argument("--full", action="store_true", help="the fifteen full networks, one by one, without time limit")
    parser.add_argument("--record", type=Path, default=Path("export-full.json"), help="what --full has measured so far")
    parser.add_argument("--data", type=Path, help="folder of images in place of the digits")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="export-bench-") as name:
        scratch = Path(name)
        os.environ |= {"DBT_BASE_DIR": str(scratch / "workspace"), "DBT_MODEL_SIZE": "tiny"}
        import torch

        torch.set_num_threads(1)
        files = _image_files(options.data, scratch, 96)
        if options.full:
            rows = full(files, scratch, options.record)
        else:
            rows = [*kinds(files, scratch, quick=options.quick), *times(files, scratch, quick=options.quick)]
    report("export", rows, quick=options.quick, packages=("torch", "onnx", "onnxruntime", "timm", "pillow"))
    return 0


def kinds(files: Sequence[Path], scratch: Path, *, quick: bool) -> list[dict]:
    """Parity of every combiner over three tiny members, in each runtime."""
    import torch

    from utils import export_formats, tflite_conversion
    from utils.combiner import MemberFacts, seen_by
    from utils.config import validate
    from utils.ensemble_network import EnsembleNetwork
    from utils.ensembles import COMBINERS
    from utils.rows import Outputs

    names = ("CustomConvNeXt", "CustomMobileOne", "CustomViTHybrid")
    parts = [_part(name, "tiny") for name in names]
    images = _squares(files, parts[0].img_size)
    everything = EnsembleNetwork(parts, _everything(), embeds=True)
    with torch.inference_mode():
        logits, *embeddings = everything(torch.from_numpy(images))
    outputs = Outputs(logits.numpy().transpose(1, 0, 2), tuple(part.numpy() for part in embeddings))
    labels = outputs.logits.mean(axis=0).argmax(axis=1)
    labels[::4] = (labels[::4] + 1) % CLASSES
    facts = MemberFacts(names, np.full(3, 0.8), np.full(3, 1.0), np.full(3, 1.0))
    config = validate(SMALL, source=Path("of the benchmark"))
    tflite = tflite_conversion.missing() is None
    found: dict[str, float] = {}
    flips = 0
    for kind in sorted(QUICK_KINDS if quick else COMBINERS):
        combiner = COMBINERS[kind].configured(config, facts)
        seen = seen_by(combiner, outputs)
        combiner.fit(seen, labels, np.arange(len(labels)) % 5)
        jumps = bool(getattr(combiner, "jumps", False))
        network = EnsembleNetwork(parts, combiner.to_module(), embeds=combiner.reads_embeddings, member_outputs=jumps)
        network.parity_tolerance = 1.0  # type: ignore[assignment]
        staged = scratch / kind
        first = torch.from_numpy(images[:1])
        classes = [str(number) for number in range(CLASSES)]
        done = export_formats.package(network, kind, ["torchscript", "onnx"], staged, first, {}, classes)
        if tflite:
            done["tflite"] = export_formats.convert_to_tflite(
                lambda network=network, first=first: (network, first), kind, staged, scratch / "converter"
            )
        for name, entry in done.items():
            outcome = _proved(name, entry, staged, images, combiner, seen, outputs if jumps else None, network, scratch)
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
    from utils import export_formats, tflite_conversion
    from utils.ensemble_network import EnsembleNetwork
    from utils.exported_prediction import ExportedModel
    from utils.exported_runtimes import latency_ms
    from utils.heads import MeanOfProbabilities

    names = list(BACKBONE_MAP)[: 5 if quick else 15]
    parts = [_part(name, "tiny") for name in names]
    network = EnsembleNetwork(parts, MeanOfProbabilities())
    images = _squares(files, parts[0].img_size)
    first, classes = torch.from_numpy(images[:1]), [str(number) for number in range(CLASSES)]
    given = {"kind": "float-nchw", "name": "images", "img_size": 32, "shorter_side": 36}
    start = time.perf_counter()
    done = export_formats.package(network, "voting", ["onnx"], scratch / "voting", first, {"input": given}, classes)
    onnx_seconds = time.perf_counter() - start
    path = scratch / "voting" / done["onnx"]["path"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def eager(batch: np.ndarray) -> Any:
        prepared = (torch.from_numpy(batch) - 0.45) / 0.22
        with torch.inference_mode():
            return [torch.softmax(part.networks[0](prepared), dim=1) for part in parts]

    ours = latency_ms(lambda batch: session.run(None, {"images": batch}), images[:1])
    theirs = latency_ms(eager, images[:1])
    model = ExportedModel(path, threads=1)

    def bare() -> None:
        for begin in range(0, len(files), 32):
            batch = np.stack([model.prepare(file) for file in files[begin : begin + 32]])
            session.run(["probabilities"], {"images": batch})

    overhead = _best(lambda: model.predict(files)) / _best(bare)
    count, words = f"{len(names)} tiny members", f"{theirs:.2f} ms eager, {ours:.2f} ms ONNX"
    rows = [
        row(f"export of voting over {count} to ONNX", onnx_seconds, "s", "60", onnx_seconds < ONNX_SECONDS, None),
        row(f"one image, {count}: eager over ONNX", theirs / ours, "times", "2.0", theirs / ours >= FASTER, words),
        row("files to probabilities over bare onnxruntime", overhead, "times", "1.10", overhead <= OVERHEAD, None),
    ]
    if tflite_conversion.missing() is not None:
        return [*rows, row(f"export of voting over {count} to TFLite", None, "s", "360", None, "tools not installed")]
    start = time.perf_counter()
    entry = export_formats.convert_to_tflite(
        lambda: (network, first), "voting", scratch / "voting", scratch / "converter"
    )
    seconds = time.perf_counter() - start
    held = entry["status"] == "ok" and seconds < TFLITE_SECONDS
    return [*rows, row(f"export of voting over {count} to TFLite", seconds, "s", "360", held, entry["reason"])]


def full(files: Sequence[Path], scratch: Path, record: Path) -> list[dict]:
    """Each full network alone: parity in each runtime, one image beside eager, peak memory beside the file."""
    import torch

    from models import BACKBONE_MAP
    from utils import export_formats, tflite_conversion
    from utils.artifacts import read_json, write_json
    from utils.ensemble_network import EnsembleNetwork
    from utils.exported_runtimes import latency_ms

    known: dict[str, Any] = read_json(record, remedy="Remove it, then measure again") or {}
    for name in BACKBONE_MAP:
        if name in known:
            continue
        part = _part(name, "full")
        network = EnsembleNetwork([part], None)
        images = _squares(files[:21], part.img_size)
        staged, first = scratch / name, torch.from_numpy(images[:1])
        classes = [str(number) for number in range(CLASSES)]
        done = export_formats.package(network, name, ["torchscript", "onnx"], staged, first, {}, classes)
        if tflite_conversion.missing() is None:
            done["tflite"] = export_formats.convert_to_tflite(
                lambda network=network, first=first: (network, first), name, staged, scratch / "converter"
            )
        facts: dict[str, Any] = {}
        for kind, entry in done.items():
            outcome = _proved(kind, entry, staged, images, None, None, None, network, scratch)
            parity = outcome["parity"] or {}
            facts[kind] = {"reason": outcome["reason"], **parity, "latency_ms": outcome["latency_ms"]}

        def eager(batch: np.ndarray, network: Any = network) -> Any:
            with torch.inference_mode():
                return network(torch.from_numpy(batch))

        facts["eager_ms"] = latency_ms(eager, images[:1])
        known[name] = facts
        write_json(record, known)
        print(f"{name}: {json.dumps(facts)}", file=sys.stderr)
    rows = []
    for kind in ("torchscript", "onnx", "tflite"):
        found = [facts[kind].get("max_abs_diff", float("inf")) for facts in known.values() if kind in facts]
        if found:
            worst = max(found)
            what = f"{kind}: largest difference over {len(found)} full networks, times 1e4"
            rows.append(row(what, 1e4 * worst, "", "1", worst <= PARITY, None))
    in_onnx = sum(facts["onnx"]["latency_ms"] for facts in known.values())
    ratio = sum(facts["eager_ms"] for facts in known.values()) / in_onnx
    rows.append(row("one image, all full networks: eager time over ONNX", ratio, "times", "1.0", ratio >= 1, None))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return [*rows, row("peak memory of this process", peak, "GB", None, None, None)]


def _proved(
    name: str, entry: dict, staged: Path, images: np.ndarray, combiner: Any, seen: Any, outputs: Any, network: Any,
    scratch: Path,
) -> dict[str, Any]:  # fmt: skip
    """The certificate of one file."""
    import torch

    from utils import export_certificate, tflite_conversion

    failed = {"passed": False, "parity": None, "latency_ms": None}
    if entry["status"] != "ok":
        return failed | {"reason": entry["reason"]}
    if combiner is None:
        with torch.inference_mode():
            expected = torch.cat([network(part)[0] for part in torch.from_numpy(images).split(4)]).double().numpy()
    else:
        expected = combiner.predict_proba(seen)
    batches, rows = export_certificate.dealt(list(images), (1,) if name == "tflite" else export_certificate.BATCHES)
    probe = export_certificate.Probe(batches, rows, expected)
    if outputs is not None:
        own = outputs.embeddings if combiner.reads_embeddings else None
        probe = export_certificate.Probe(batches, rows, expected, outputs.logits, own, combiner)
    python = {"python": tflite_conversion.interpreter()} if name == "tflite" else {}
    try:
        files = [staged / entry["path"]]
        (answers,) = export_certificate.run_afresh(
            name, files, probe, network.output_names, scratch / "run", job={"threads": 1}, **python
        )
    except export_certificate.RunFailed as error:
        return failed | {"reason": str(error)}
    return export_certificate.compare(probe, answers) | {"latency_ms": answers.facts["latency_ms"]}


def _part(name: str, size: str) -> Any:
    """A network with random weights whose BatchNorm has seen some noise."""
    import torch

    from models import create_custom_backbone
    from utils.ensemble_network import MemberPart

    torch.manual_seed(0)
    network = create_custom_backbone(name, CLASSES, size=size)
    side = network.img_size
    with torch.no_grad():
        network.train()(torch.randn(8, 3, side, side))
    return MemberPart(name, [network.eval()], side, range(CLASSES))


def _everything() -> Any:
    from torch import nn

    class Everything(nn.Module):
        """Logits and each member's embeddings as they are."""

        def forward(self, logits: Any, embeddings: Any) -> Any:
            return (logits, *embeddings)

    return Everything()


def _squares(files: Sequence[Path], size: int) -> np.ndarray:
    """Files as float32 (N, 3, size, size) in [0, 1]."""
    from PIL import Image

    from utils.exported_prediction import centre_square

    return np.stack([centre_square(Image.open(file).convert("RGB"), int(size * 1.14), size) for file in files])


def _image_files(data: Path | None, scratch: Path, count: int) -> list[Path]:
    if data is not None:
        from utils.exported_prediction import image_files

        return image_files([data])[:count]
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = scratch / "images"
    folder.mkdir()
    for number, pixels in enumerate(load_digits().images[:count]):
        Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8)).save(folder / f"{number:03d}.png")
    return sorted(folder.iterdir())


def _best(run: Callable[[], Any]) -> float:
    found = []
    for _ in range(4):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found[1:])


if __name__ == "__main__":
    sys.exit(main())
