"""What is read after a build: ONNX files, records of exports, answers, the recovery state; and command lines."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import damage
import numpy as np
import onnx
import onnx_files
from hypothesis import strategies as st
from in_process import run
from onnx import helper
from PIL import Image

from utils.commands import COMMANDS, COMMON_OPTIONS
from utils.core.errors import UserError
from utils.inference.output_files import PredictionFile, RecordFormat

RULE = {"input_size": 8, "resized": 8, "resize": "shorter-side", "interpolation": "bilinear", "crop_offset": "round"}
METADATA = {
    "classes": list(onnx_files.CLASSES),
    "input": {
        "kind": "float-nchw",
        "inputs": [{"name": "images", "resizing": RULE | {"exif": "ignore", "fill": [0] * 3}}],
    },
}
RECORDS = ("export_status.json", "metadata.json", "checksums.json", "class_mapping.json")
STATE = {"units": {"a train": {"files": {"a_final.pth": [1, 2, "0" * 64]}, "digest": "x", "result": {"accuracy": 0.5}}}}
NAMES = ("plain.jpg", 'quote".jpg', "com,ma.jpg", "new\nline.jpg")
LEFT_OUT = {"demo", "debug", "pipeline", "completion"}
"""Commands that train for minutes, or run others that are drawn themselves."""
ELSEWHERE = {"--workspace", "--output", "--base-back", "--engine", "--address", "--mlflow", "--tensorboard"}
"""Options that name a place outside the workspace of the case, or a machine."""
WORDS = (
    *(
        "",
        "-1",
        "0",
        "0.5",
        "nan",
        "1e999",
        "x",
        "all",
        "[1]",
        "a=b",
        "a.b=[",
        "seed=x",
        "--",
        "*",
        "é",
        "\udcff",
        "\x1b[2J",
    ),
    *(
        "soft_voting_ensemble",
        "recommended",
        "test",
        "val",
        "csv",
        "onnx",
        "forest",
        "x" * 5000,
        "a\nb",
        "-",
        "=",
        "%s",
        "{}",
    ),
)
Readers = dict[str, tuple[Any, Callable[[Any], None]]]


def readers(folder: Path, built: Path, typed: Callable[[int, str], None]) -> Readers:
    """{kind: (strategy, what is done with an example)}; `typed` judges how a command ended."""
    return {
        "onnx files": onnx_file(folder / "model.onnx", folder / "photo.png", typed),
        "records of exports": export_records(built, typed),
        "answers": answers(folder / "answers"),
        "recovery states": recovery_state(built, typed),
        "command lines": command_lines(built, typed),
    }


def onnx_file(path: Path, photo: Path, typed: Callable[[int, str], None]) -> tuple[Any, Callable[[Any], None]]:
    """A valid file with other metadata, or with other bytes."""
    Image.fromarray(np.full((10, 9, 3), 200, dtype=np.uint8)).save(photo)
    onnx_files.constant(path, [0.25, 0.75])
    valid = path.read_bytes()

    def look(example: tuple[str, Any]) -> None:
        way, content = example
        path.write_bytes(valid if way == "metadata" else content)
        if way == "metadata":
            model = onnx.load(path)
            del model.metadata_props[:]
            found = content if isinstance(content, dict) else {"input": content}
            texts = {str(key): value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}
            helper.set_model_props(model, {_encodable(key): _encodable(value) for key, value in texts.items()})
            path.write_bytes(model.SerializeToString())
        done = run("predict", "--quiet", "--from-export", path, photo)
        typed(done.code, done.stderr)

    strategy = st.one_of(
        st.tuples(st.just("metadata"), cases.documents(METADATA)), st.tuples(st.just("bytes"), cases.spoilt(valid))
    )
    return strategy, look


def export_records(built: Path, typed: Callable[[int, str], None]) -> tuple[Any, Callable[[Any], None]]:
    """Each record of an export, met by the commands that read it."""
    damage.export_by_hand(built)
    folder = built / damage.EXPORT
    valid = {name: (folder / name).read_bytes() for name in RECORDS}

    def look(example: tuple[str, Any]) -> None:
        name, document = example
        (folder / name).write_text(json.dumps(document))
        try:
            for line in (("export", "--verify", damage.EXPORT), ("export", "--compare")):
                done = run(*line, "--quiet", workspace=built)
                typed(done.code, done.stderr)
        finally:
            for record, content in valid.items():
                (folder / record).write_bytes(content)

    each = [st.tuples(st.just(name), cases.documents(json.loads(content))) for name, content in valid.items()]
    return st.one_of(*each), look


def answers(path: Path) -> tuple[Any, Callable[[Any], None]]:
    """A file of answers that `--append` goes on with: an error changes nothing in it."""
    forms = {form: RecordFormat(form, ("ant", "b,ee")) for form in ("csv", "jsonl")}
    valid = {}
    for form, records in forms.items():
        file = PredictionFile(path, records, "m@1", append=False, replace=True, requested=set(NAMES))
        file.add([records.format_record(_answer(name)) for name in NAMES])
        file.close()
        valid[form] = path.read_bytes()

    def look(example: tuple[str, bytes]) -> None:
        form, content = example
        path.write_bytes(content)
        try:
            file = PredictionFile(path, forms[form], "m@1", append=True, replace=False, requested=set(NAMES))
        except UserError:
            assert path.read_bytes() == content, "an error that changes the file"
            return
        file.add([forms[form].format_record(_answer(name)) for name in NAMES if name not in file.done])
        file.close()

    return st.one_of(*(st.tuples(st.just(form), cases.spoilt(content)) for form, content in valid.items())), look


def _answer(name: str) -> dict[str, Any]:
    found = {"path": name, "class": "ant", "probability": 0.5, "set": ["ant"], "abstain": False, "model": "m@1"}
    return found | {"disagreement": None, "error": None, "probabilities": [0.5, 0.5]}


def recovery_state(built: Path, typed: Callable[[int, str], None]) -> tuple[Any, Callable[[Any], None]]:
    """The base pipeline's record of finished trainings."""
    file = built / "checkpoints" / ".recovery_state.json"

    def look(document: Any) -> None:
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(document))
        done = run("clean", "--quiet", workspace=built)
        shutil.rmtree(file.parent)
        typed(done.code, done.stderr)

    return cases.documents(STATE), look


def command_lines(built: Path, typed: Callable[[int, str], None]) -> tuple[Any, Callable[[Any], None]]:
    """Commands with options and values that do not belong together, typed in the workspace."""
    words = st.one_of(st.sampled_from(WORDS), st.text(st.characters(exclude_characters="/\\.\0"), max_size=8))

    @st.composite
    def lines(draw: Callable[..., Any]) -> list[str]:
        name = draw(st.sampled_from(sorted(COMMANDS.keys() - LEFT_OUT)))
        options = [option for option in (*COMMANDS[name].arguments, *COMMON_OPTIONS) if option.startswith("--")]
        line = [name] if draw(st.integers(0, 19)) else [draw(words)]
        for _ in range(draw(st.integers(0, 4))):
            line.append(draw(st.sampled_from([option for option in options if option not in ELSEWHERE])))
            line += draw(st.lists(words, max_size=2))
        return line

    def look(line: list[str]) -> None:
        place = Path.cwd()
        kept = built.parent / "kept"
        shutil.copytree(built, kept)
        os.chdir(built)
        try:
            done = run(*line, workspace=built)
            typed(done.code, done.stderr)
            assert "Traceback" not in done.stderr, done.stderr[-2000:]
        finally:
            os.chdir(place)
            shutil.rmtree(built)
            kept.rename(built)

    return lines(), look


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
