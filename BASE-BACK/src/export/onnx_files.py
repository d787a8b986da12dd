"""ONNX files by either of torch's exporters: `tracing`, or `dynamo`, which converts a `torch.export` program.

Tracing is the default: dynamo takes thirty times as long on fifteen tiny networks and seven times as long on full-size
ones, since its first step, `torch.export`, already takes longer than tracing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from config import settings
from export import programs
from utils import logger
from utils.torchscript import exporter_without_notices

TRACING, DYNAMO = "tracing", "dynamo"
LARGEST_IN_ONE_FILE = 1_900_000_000  # bytes; a protocol buffer is limited to 2 GB
OLDEST_DYNAMO_OPSET = 18  # dynamo emits operators of this opset; converting them to older opsets is incomplete
SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata key of a node written by dynamo: the modules that the node belongs to, outermost first."""


def write_onnx(
    network: nn.Module, example: tuple[Tensor, ...], path: Path, metadata: Mapping[str, Any], *, data_name: str
) -> None:
    """Write a network in evaluation mode as an ONNX file with a free batch size.

    The network's attributes `input_names`, `output_names`, `free_axes`, `onnx_opset` and `onnx_exporter` override the
    settings. Weights too large for one file are written to `data_name` in the same folder. `example` is a batch of two
    rows for each input.
    """
    configured = settings.EXPORT_CONFIG["onnx"]
    opset = getattr(network, "onnx_opset", configured.get("opset_version", 13))
    uses_dynamo = exporter_of(network) == DYNAMO
    if uses_dynamo and (reason := programs.refusal(network)):
        logger.warning(f"{path.parent}: the ONNX file is written by the tracing exporter, not by dynamo: {reason}")
        uses_dynamo = False
    opset = max(opset, OLDEST_DYNAMO_OPSET) if uses_dynamo else opset
    metadata = {**metadata, "opset": opset, "exporter": f"torch {torch.__version__}, dynamo={uses_dynamo}"}
    (path.parent / data_name).unlink(missing_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=".onnx.") as folder:
        written = Path(folder) / "written.onnx"
        if uses_dynamo:
            _save(_convert(network, example, opset), written, path.parent / data_name, network)
        else:
            _trace(network, example, opset, written, path.parent / data_name)
        # Concatenated protocol buffer messages are merged, so metadata is appended without parsing the file again.
        with written.open("ab") as file:
            file.write(_metadata_model(metadata).SerializeToString())
        written.replace(path)


def exporter_of(network: nn.Module) -> str:
    """The exporter for a network: its attribute `onnx_exporter`, else that of the settings."""
    return str(getattr(network, "onnx_exporter", settings.EXPORT_CONFIG["onnx"].get("exporter", TRACING)))


def names_of(network: nn.Module, attribute: str, default: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a network's inputs or outputs: its attribute, else `default`."""
    return tuple(getattr(network, attribute, default))


def _trace(network: nn.Module, example: tuple[Tensor, ...], opset: int, path: Path, data: Path) -> None:
    """Export by tracing, which folds BatchNorm into convolutions."""
    import onnx

    inputs, outputs = names_of(network, "input_names", ("input",)), names_of(network, "output_names", ("output",))
    free = getattr(network, "free_axes", {name: {0: "batch"} for name in inputs})
    with exporter_without_notices(), torch.no_grad():
        torch.onnx.export(  # to a path: weights too large for one file are written beside it
            network,
            example,
            str(path),
            dynamo=False,
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes=free | {name: {0: "batch"} for name in outputs},
        )
    if _is_too_large(network):
        _save(onnx.load(str(path)), path, data, network)


def _convert(network: nn.Module, example: tuple[Tensor, ...], opset: int) -> Any:
    """The `onnx.ModelProto` of dynamo; of the metadata of its nodes only their modules are kept."""
    inputs, outputs = names_of(network, "input_names", ("input",)), names_of(network, "output_names", ("output",))
    program = programs.capture(network, example)
    with exporter_without_notices(), torch.no_grad():
        converted = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(outputs),
            verbose=False,
        )
    assert converted is not None
    model = converted.model_proto
    graph = model.graph
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_param = re.sub(rf"\b{symbol}\b", "batch", dimension.dim_param)
    for number, node in enumerate(graph.node):
        node.name = node.name or f"node_{number}"
        scopes = [entry for entry in node.metadata_props if entry.key == SCOPES]
        del node.metadata_props[:]
        node.metadata_props.extend(scopes)
        node.doc_string = ""
    for message in (model, graph, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        del message.metadata_props[:]
        message.doc_string = ""
    return model


def _is_too_large(network: nn.Module) -> bool:
    return sum(tensor.nbytes for tensor in network.state_dict().values()) > LARGEST_IN_ONE_FILE


def _save(model: Any, path: Path, data: Path, network: nn.Module) -> None:
    """Write a model; the weights of a large one go into `data`."""
    from onnx.external_data_helper import convert_model_to_external_data, write_external_data_tensors

    if _is_too_large(network):
        convert_model_to_external_data(model, all_tensors_to_one_file=True, location=data.name)
        write_external_data_tensors(model, str(data.parent))
    path.write_bytes(model.SerializeToString())


def _metadata_model(metadata: Mapping[str, Any]) -> Any:
    """A model that holds nothing but the metadata of an ONNX file."""
    import onnx

    model = onnx.ModelProto()
    for name, value in metadata.items():
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
        model.metadata_props.add(key=name, value=text)
    return model
