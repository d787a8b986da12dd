"""Checks of ONNX files of any origin before onnxruntime opens them; needs no other package.

The files that `export` writes have a graph of standard operators without loops, whose time is bounded by the sizes of
its tensors, and weights inside or in a file beside them. The file is a protocol buffer; field numbers are those of
`onnx.proto3` (ModelProto, GraphProto, FunctionProto, NodeProto, AttributeProto, TensorProto).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from utils.core.regular_files import open_regular

UNBOUNDED = ("Loop", "Scan", "SequenceMap")  # operators whose number of iterations depends on their input
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")  # of operators implemented by onnxruntime
MAX_BYTES = (1 << 31) - 1
MAX_LEVELS = 16  # nesting of graphs
GRAPH, FUNCTION = 7, 25  # fields of a model
NODES = {GRAPH: 1, FUNCTION: 7}
WEIGHTS, FUNCTION_DOMAIN = 5, 10
OPERATOR, ATTRIBUTE, DOMAIN = 4, 5, 7  # of a node
TENSORS, GRAPHS = (5, 10), (6, 11)  # of an attribute
EXTERNAL_DATA, KEY, VALUE = 13, 1, 2  # of a tensor, and of its entries
VARINT, FIXED_64, MESSAGE, FIXED_32 = 0, 1, 2, 5  # wire types
MAX_VARINT = 10  # bytes


def require_bounded(path: Path) -> None:
    """Raise ValueError for a file with loops, custom operators, or weights outside its folder; loads no weights."""
    try:
        with open_regular(path) as file:
            if path.stat().st_size > MAX_BYTES:
                raise ValueError(f"it has more than {MAX_BYTES} bytes, the most of a protocol buffer")
            _check_model(path, memoryview(file.read()))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}. Give an .onnx file that export wrote") from error


def _check_model(path: Path, model: memoryview) -> None:
    parts = [(field, part) for field, part in _messages(model) if field in NODES]
    function_domains = {_text(part, FUNCTION_DOMAIN) for field, part in parts if field == FUNCTION}
    if not any(field == GRAPH for field, _ in parts):
        raise ValueError("it is no ONNX file, since it has no graph")
    for field, part in parts:
        _check_graph(path, part, NODES[field], {*DOMAINS, *function_domains}, 0)


def _check_graph(path: Path, graph: memoryview, nodes: int, domains: set[str], level: int) -> None:
    if level > MAX_LEVELS:
        raise ValueError(f"its graphs are nested deeper than {MAX_LEVELS} levels")
    for field, part in _messages(graph):
        if field == nodes:
            _check_node(path, part, domains, level)
        elif field == WEIGHTS and nodes == NODES[GRAPH]:
            _check_tensor(path, part)


def _check_node(path: Path, node: memoryview, domains: set[str], level: int) -> None:
    operator, domain = _text(node, OPERATOR), _text(node, DOMAIN)
    if operator in UNBOUNDED:
        raise ValueError(f"its graph holds the operator {operator}; expected a graph without loops")
    if domain not in domains:
        raise ValueError(
            f"its operator {operator[:60]} is of the domain {domain[:60]!r}; expected those of {', '.join(DOMAINS[1:])}"
        )
    for field, attribute in _messages(node):
        if field != ATTRIBUTE:
            continue
        for kind, part in _messages(attribute):
            if kind in TENSORS:
                _check_tensor(path, part)
            elif kind in GRAPHS:
                _check_graph(path, part, NODES[GRAPH], domains, level + 1)


def _check_tensor(path: Path, tensor: memoryview) -> None:
    for field, entry in _messages(tensor):
        if field == EXTERNAL_DATA and _text(entry, KEY) == "location":
            location = _text(entry, VALUE)
            if not _is_beside(path, location):
                raise ValueError(f"weights in {location[:200]!r}; expected a regular file in the folder of the graph")


def _is_beside(path: Path, location: str) -> bool:
    """Whether external weights are a regular file in the folder of the graph, not a link."""
    parts = PurePosixPath(location).parts
    if len(parts) != 1 or parts[0] in ("..", "/") or "\0" in location:
        return False
    beside = path.parent / location
    return beside.is_file() and not beside.is_symlink()


def _text(message: memoryview, field: int) -> str:
    """The last value of a text field, which is the valid one in a protocol buffer; empty if there is none."""
    values = [part for number, part in _messages(message) if number == field]
    return bytes(values[-1]).decode("utf-8") if values else ""


def _messages(content: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(field, content) of all fields that are texts, bytes or messages. Raises ValueError for an invalid message."""
    position = 0
    while position < len(content):
        key, position = _varint(content, position)
        field, kind = key >> 3, key & 7
        size = {FIXED_64: 8, FIXED_32: 4}.get(kind, 0)
        if kind in (MESSAGE, VARINT):
            number, position = _varint(content, position)
            size = number if kind == MESSAGE else 0
        elif not size:
            raise ValueError("it is no ONNX file, or a damaged one")
        if size > len(content) - position:
            raise ValueError("it is no ONNX file, or one that is cut off")
        if kind == MESSAGE:
            yield field, content[position : position + size]
        position += size


def _varint(content: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for index in range(MAX_VARINT):
        if position + index >= len(content):
            break
        byte = content[position + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, position + index + 1
    raise ValueError("it is no ONNX file, or one that is cut off")
