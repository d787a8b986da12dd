"""Hypothesis strategies for everything that comes from outside: each gives bytes or a document to be read."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from utils.core.config import Config

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 10**30, 1e308, -1e308, 5e-324]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=20),
    st.sampled_from(["", ".", "..", "../../evil", "/etc/passwd", "a/b", "\x00", "soft_voting", "CustomConvNeXt"]),
)
"""Values where another kind is expected."""
VALUES = st.recursive(
    ODD,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=12,
)


def _places(document: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [place]
    if isinstance(document, dict):
        for key in document:
            found += _places(document[key], (*place, key))
    elif isinstance(document, list):
        for position, item in enumerate(document[:6]):
            found += _places(item, (*place, position))
    return found


@st.composite
def documents(draw: Callable[..., Any], valid: Any) -> Any:
    """A valid JSON document with up to four of its parts replaced, renamed, doubled or gone."""
    document = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.sampled_from(_places(document)))
        if not place:
            if draw(st.integers(0, 19)) == 0:
                return draw(VALUES)
            continue
        parent = document
        for key in place[:-1]:
            parent = parent[key]
        key = place[-1]
        way = draw(st.sampled_from(["other", "other", "gone", "renamed", "doubled"]))
        if way == "other":
            parent[key] = draw(VALUES)
        elif way == "gone":
            del parent[key]
        elif way == "renamed" and isinstance(parent, dict):
            parent[draw(st.one_of(st.text(max_size=10), st.just("../../evil")))] = parent.pop(key)
        elif isinstance(parent, list):
            parent.append(parent[key])
    return document


@st.composite
def spoilt(draw: Callable[..., Any], valid: bytes) -> bytes:
    """The bytes of a valid file with some flipped, put in, or cut off."""
    raw = bytearray(valid)
    for _ in range(draw(st.integers(1, 5))):
        if not raw:
            break
        at = draw(st.integers(0, len(raw) - 1))
        way = draw(st.sampled_from(["flip", "flip", "put in", "cut", "number"]))
        if way == "flip":
            raw[at] = draw(st.integers(0, 255))
        elif way == "put in":
            raw[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif way == "number" and at + 8 <= len(raw):
            raw[at : at + 8] = struct.pack("<q", draw(st.sampled_from([-1, 0, 2**31 - 1, 2**40, 2**63 - 1])))
        elif draw(st.integers(0, 3)) == 0:
            del raw[at:]
    return bytes(raw)


def configurations() -> st.SearchStrategy[bytes]:
    """Configuration files: arbitrary text and bytes, spoilt printed values, keys with other values."""
    valid = Config().as_dict()
    names = st.sampled_from([*Config.model_fields, "runs", "moe", "enable", "methods", "<<"])
    loose = st.dictionaries(names, VALUES, max_size=5)
    as_yaml = st.one_of(documents(valid), loose).map(lambda value: json.dumps(value).encode())
    marks = st.text(alphabet="&*!|>[]{}:,-#%@`'\"\n\t 01eE._ab<", max_size=120).map(str.encode)
    return st.one_of(as_yaml, as_yaml, marks, st.text(max_size=80).map(lambda text: text.encode("utf-8", "replace")),
                     st.binary(max_size=80), as_yaml.flatmap(spoilt))  # fmt: skip


DTYPES = st.sampled_from(["<f4", "<f8", "<f2", "<i8", "<u1", "<U5", "|S4", "<c8", "|b1", "<M8[s]", ">f8"])


@st.composite
def predictions(draw: Callable[..., Any], valid: dict[str, np.ndarray]) -> bytes:
    """A prediction file: arrays of another kind, shape or content, or the bytes of an archive spoilt."""
    arrays = dict(valid)
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(arrays))) if arrays else "logits"
        way = draw(st.sampled_from(["gone", "kind", "shape", "value", "rows", "more"]))
        array = arrays.get(name, np.zeros(3))
        if way == "gone":
            arrays.pop(name, None)
        elif way == "kind":
            arrays[name] = np.zeros(array.shape, dtype=draw(DTYPES))
        elif way == "shape":
            arrays[name] = np.zeros(draw(st.lists(st.integers(0, 5), max_size=4)), dtype=array.dtype)
        elif way == "value" and array.size and array.dtype.kind in "fi":
            changed = array.astype(float)
            changed.flat[draw(st.integers(0, array.size - 1))] = draw(
                st.sampled_from([np.nan, np.inf, -np.inf, 1e308, -1e308, 1e-320, -7.0, 0.5, 1e18])
            )
            arrays[name] = changed if array.dtype.kind == "f" or draw(st.booleans()) else array
        elif way == "rows":
            arrays[name] = array[: draw(st.integers(0, 4))] if array.ndim else array
        elif way == "more":
            arrays[draw(st.sampled_from(["probabilities", "embeddings", "fold", "x", "../x"]))] = array
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))) as archive:
        for name, array in arrays.items():
            held = io.BytesIO()
            np.lib.format.write_array(held, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(f"{name}.npy", held.getvalue())
    raw = buffer.getvalue()
    return draw(st.one_of(st.just(raw), spoilt(raw)))


@st.composite
def tensors(draw: Callable[..., Any], valid: bytes) -> bytes:
    """A safetensors file: its header's document changed, its length field, or its bytes."""
    length = struct.unpack("<Q", valid[:8])[0]
    header, body = json.loads(valid[8 : 8 + length]), valid[8 + length :]
    changed = json.dumps(draw(documents(header))).encode()
    declared_length = draw(st.one_of(st.just(len(changed)), st.integers(0, 2**64 - 1)))
    return draw(st.one_of(st.just(struct.pack("<Q", declared_length) + changed + body), spoilt(valid)))
