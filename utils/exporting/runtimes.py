"""Exported files of one format, run by its runtime in a process that has never seen the networks they were made from.

    python exported_runtimes.py JOB.json

The job names a format, its files, the arrays to run and where the answers go. Nothing of the project is imported but
where the format is bare weights, which are put into networks that are built anew.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RunFunction = Callable[[np.ndarray], Sequence[np.ndarray]]


def open_onnx(path: Path, job: dict[str, Any]) -> tuple[RunFunction, dict[str, str]]:
    """By onnxruntime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if job.get("threads"):
        options.intra_op_num_threads = int(job["threads"])
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    names = job["outputs"]
    return lambda batch: session.run(names, {given.name: batch}), {"onnxruntime": onnxruntime.__version__}


def open_torchscript(path: Path, job: dict[str, Any]) -> tuple[RunFunction, dict[str, str]]:
    """By torch.jit."""
    import torch

    network = torch.jit.load(str(path), map_location="cpu").eval()
    return _by_torch(network), {"torch": str(torch.__version__)}


def open_weights(path: Path, job: dict[str, Any]) -> tuple[RunFunction, dict[str, str]]:
    """A state dict or a full checkpoint: networks are built by the catalog, then take every weight from the file."""
    import torch

    network = _built_anew(job)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        weights = load_file(path)
    else:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    network.load_state_dict(weights.get("model_state_dict", weights), strict=True)
    return _by_torch(network), {"torch": str(torch.__version__)}


def open_tflite(path: Path, job: dict[str, Any]) -> tuple[RunFunction, dict[str, str]]:
    """By ai-edge-litert, else by TensorFlow's interpreter; one image at a time, as the file has a fixed batch."""
    try:
        import ai_edge_litert as package
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        import tensorflow as package
        from tensorflow.lite import Interpreter  # type: ignore[no-redef]
    interpreter = Interpreter(model_path=str(path), num_threads=int(job.get("threads") or 1))
    interpreter.allocate_tensors()
    (given,) = interpreter.get_input_details()
    signature = interpreter.get_signature_list()
    runner = interpreter.get_signature_runner(next(iter(signature)))
    places = sorted(runner.get_output_details(), key=lambda name: int(name.rsplit("_", 1)[-1]))
    (argument,) = runner.get_input_details()
    if len(given["shape"]) and int(given["shape"][0]) != 1:
        raise ValueError(f"{path}: takes {given['shape'][0]} images at a time; expected 1")

    def run(batch: np.ndarray) -> list[np.ndarray]:
        found = runner(**{argument: batch})
        return [found[name] for name in places]

    return run, {package.__name__: str(getattr(package, "__version__", "unknown"))}


def _by_torch(network: Any) -> RunFunction:
    import torch

    def run(batch: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            found = network(torch.from_numpy(batch))
        return [part.numpy() for part in (found if isinstance(found, tuple) else (found,))]

    return run


def _built_anew(job: dict[str, Any]) -> Any:
    os.environ |= job["environment"]
    sys.path.insert(0, job["project"])
    from utils import base_back
    from utils.core.config import Config
    from utils.exporting import exported_network
    from utils.predictions import catalog
    from utils.predictions.store import Store

    base_back.bind()
    workspace = base_back.open_workspace()
    store = Store(Config(), workspace, catalog.read(workspace))
    subject = exported_network.load_source(store, job["name"])
    return exported_network.assemble_network(store, subject, exported_network.ExportSignature(**job["form"]))


RUNTIMES: dict[str, Callable[[Path, dict[str, Any]], tuple[RunFunction, dict[str, str]]]] = {
    "state_dict": open_weights,
    "checkpoint": open_weights,
    "torchscript": open_torchscript,
    "onnx": open_onnx,
    "onnx_fp16": open_onnx,
    "onnx_int8": open_onnx,
    "tflite": open_tflite,
}


def measure_latency_ms(run: RunFunction, one: np.ndarray, seconds: float = 1.0) -> float:
    """Median milliseconds of one run over a batch, after one that is not counted."""
    run(one)
    found: list[float] = []
    while not found or (len(found) < 50 and sum(found) < seconds):
        start = time.perf_counter()
        run(one)
        found.append(time.perf_counter() - start)
    return round(1000 * float(np.median(found)), 3)


def main(place: str) -> None:
    """Run one job: the answers become `<file's place>/<batch>/<output>` of an .npz; `facts` is JSON, one for each file.

    Raises RuntimeError that names the file which does not run.
    """
    job = json.loads(Path(place).read_text(encoding="utf-8"))
    if job.get("threads") and job["format"] in ("state_dict", "checkpoint", "torchscript"):
        import torch

        torch.set_num_threads(int(job["threads"]))
    arrays: dict[str, np.ndarray] = {}
    facts: list[dict[str, Any]] = []
    with np.load(job["probe"]) as given:
        probe = {name: given[name] for name in sorted(given.files)}
    for place, file in enumerate(map(Path, job["files"])):
        try:
            run, versions = RUNTIMES[job["format"]](file, job)
            for name, batch in probe.items():
                found = zip(job["outputs"], run(batch), strict=True)
                arrays |= {f"{place}/{name}/{output}": part for output, part in found}
            facts.append({"versions": versions, "latency_ms": measure_latency_ms(run, next(iter(probe.values()))[:1])})
        except Exception as error:
            raise RuntimeError(f"{file.name}: {type(error).__name__}: {error}") from error
    arrays["facts"] = np.array(json.dumps(facts))
    with Path(job["answers"]).open("wb") as file:
        np.savez(file, **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
