"""Runs exported files of one format with its runtime, in a process without the networks that they were exported from.

    python runtimes.py JOB.json

The job names a format, its files, the input arrays and the file for the results. The script imports nothing from the
project, except for formats with weights only, which are loaded into rebuilt networks.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

RunFunction = Callable[..., Sequence[np.ndarray]]
"""Takes one array per input of the file, in order; returns its outputs."""


def open_onnx(path: Path, job: dict[str, Any]) -> tuple[RunFunction, dict[str, str]]:
    """Open a file in onnxruntime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if job.get("threads"):
        options.intra_op_num_threads = int(job["threads"])
    options.add_session_config_entry(
        "session.intra_op.allow_spinning", "0"
    )  # spinning would occupy other programs' cores
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = [node.name for node in session.get_inputs()]

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        outputs: list[np.ndarray] = session.run(job["outputs"], dict(zip(inputs, arrays, strict=True)))
        return outputs

    return run, {"onnxruntime": onnxruntime.__version__}


def open_torchscript(path: Path, job: dict[str, Any]) -> tuple[RunFunction, dict[str, str]]:
    """Open a file with torch.jit."""
    import torch

    network = torch.jit.load(str(path), map_location="cpu").eval()
    return _run_function(network), {"torch": str(torch.__version__)}


def open_exported_program(path: Path, job: dict[str, Any]) -> tuple[RunFunction, dict[str, str]]:
    """Open a file with torch.export."""
    import torch

    network = torch.export.load(path).module()
    return _run_function(network), {"torch": str(torch.__version__)}


def open_weights(path: Path, job: dict[str, Any]) -> tuple[RunFunction, dict[str, str]]:
    """Open a state dict or a checkpoint: build the catalog's networks and load all weights from the file."""
    import torch

    rebuilt = {name: job[name] for name in ("name", "signature", "environment", "project")}
    network = _build_network(json.dumps(rebuilt, sort_keys=True))
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        weights = load_file(path)
    else:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    network.load_state_dict(weights.get("model_state_dict", weights), strict=True)
    return _run_function(network), {"torch": str(torch.__version__)}


def open_tflite(path: Path, job: dict[str, Any]) -> tuple[RunFunction, dict[str, str]]:
    """Open a file with ai-edge-litert, else with TensorFlow's interpreter; its batch size is 1.

    Raises ValueError for a file of another batch size.
    """
    try:
        import ai_edge_litert as package
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        import tensorflow as package
        from tensorflow.lite import Interpreter
    interpreter = Interpreter(model_path=str(path), num_threads=int(job.get("threads") or 1))
    interpreter.allocate_tensors()
    first_input, *_ = interpreter.get_input_details()
    signature = interpreter.get_signature_list()
    runner = interpreter.get_signature_runner(next(iter(signature)))
    names, arguments = (
        sorted(details, key=_number_at_end) for details in (runner.get_output_details(), runner.get_input_details())
    )
    if len(first_input["shape"]) and int(first_input["shape"][0]) != 1:
        raise ValueError(f"{path}: the batch size is {first_input['shape'][0]}; expected 1")

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        outputs = runner(**dict(zip(arguments, arrays, strict=True)))
        return [outputs[name] for name in names]

    return run, {package.__name__: str(getattr(package, "__version__", "unknown"))}


def _number_at_end(name: str) -> int:
    """The number at the end of a name such as `output_10`, which determines the order; -1 without one."""
    digits = re.search(r"\d+$", name)
    return int(digits[0]) if digits else -1


def _run_function(network: Any) -> RunFunction:
    import torch

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            outputs = network(*map(torch.from_numpy, arrays))
        return [output.numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]

    return run


@cache
def _build_network(job_text: str) -> Any:
    """Build the networks of a job once; each file's weights replace all of them."""
    job = json.loads(job_text)
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
    source = exported_network.load_source(store, job["name"])
    return exported_network.assemble_network(store, source, exported_network.ExportSignature(**job["signature"]))


RUNTIMES: dict[str, Callable[[Path, dict[str, Any]], tuple[RunFunction, dict[str, str]]]] = {
    "state_dict": open_weights,
    "checkpoint": open_weights,
    "torchscript": open_torchscript,
    "exported_program": open_exported_program,
    "onnx": open_onnx,
    "onnx_fp16": open_onnx,
    "onnx_int8": open_onnx,
    "tflite": open_tflite,
}


def grouped_batches(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[np.ndarray, ...]]:
    """{batch: one array per input} of arrays named `batch_0000`, or `batch_0000/000` with several inputs."""
    batches: dict[str, tuple[np.ndarray, ...]] = {}
    for name in sorted(arrays):
        batch = name.partition("/")[0]
        batches[batch] = (*batches.get(batch, ()), arrays[name])
    return batches


def measure_latency_ms(run: RunFunction, batch: Sequence[np.ndarray], seconds: float = 1.0) -> float:
    """Median milliseconds of a run on a batch (an array per input), after a warm-up run; up to 50 runs or `seconds`."""
    run(*batch)
    durations: list[float] = []
    while not durations or (len(durations) < 50 and sum(durations) < seconds):
        start = time.perf_counter()
        run(*batch)
        durations.append(time.perf_counter() - start)
    return round(1000 * float(np.median(durations)), 3)


def main(job_path: str) -> None:
    """Run one job and write an .npz of outputs `<file's index>/<batch>/<output>` and `facts`, a JSON list per file.

    Raises RuntimeError naming a file that does not run.
    """
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    if job.get("threads") and job["format"] in ("state_dict", "checkpoint", "torchscript", "exported_program"):
        import torch

        torch.set_num_threads(int(job["threads"]))
    results: dict[str, Any] = {}
    facts: list[dict[str, Any]] = []
    with np.load(job["batches"]) as arrays:
        batches = grouped_batches(arrays)
    for index, path in enumerate(map(Path, job["files"])):
        try:
            run, versions = RUNTIMES[job["format"]](path, job)
            for name, batch in batches.items():
                outputs = zip(job["outputs"], run(*batch), strict=True)
                results |= {f"{index}/{name}/{output}": values for output, values in outputs}
            first_rows = [array[:1] for array in next(iter(batches.values()))]
            facts.append({"versions": versions, "latency_ms": measure_latency_ms(run, first_rows)})
        except Exception as error:
            raise RuntimeError(f"{path.name}: {type(error).__name__}: {error}") from error
    results["facts"] = np.array(json.dumps(facts))
    with Path(job["results"]).open("wb") as file:
        np.savez(file, **results)


if __name__ == "__main__":
    main(sys.argv[1])
