"""What is no regular file where a command expects one: no hang, no bug, no traceback, and the path is named."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import onnx_files
import pytest
from given_predictions import write
from in_process import run
from PIL import Image

from utils.core import parsed_files

pytestmark = pytest.mark.usefixtures("few_folds")

SECONDS = 120  # a hang, on however busy a machine
VOTES = (
    *("--set", "runs.score_ensemble.methods=[soft_voting,weighted]", "--set", "pruning.enable=false"),
    *("--set", "runs.model_soup.enable=false", "--set", "device=cpu"),
)


def make_socket(path: Path) -> None:
    place = Path.cwd()
    os.chdir(path.parent)  # an address has at most about a hundred characters
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(place)


def make_link_to_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


KINDS: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a socket": make_socket,
    "a folder": Path.mkdir,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a FIFO": make_link_to_fifo,
    "an empty file": Path.touch,
}
STATUS, EVALUATE = ("status",), ("evaluate", "--model-name", "weighted_ensemble")
IMPORT = ("import-predictions", "--from", "{base}/given")
FROM_EXPORT = ("predict", "--from-export", "{base}/model.onnx", "{base}/photos")
ANSWERS = (*FROM_EXPORT, "--to", "{base}/answers")
PLACES: dict[str, tuple[str, ...]] = {
    "given/forest/oof.npz": IMPORT,
    "given/forest/val.npz": IMPORT,
    "given/forest": IMPORT,
    "settings.yaml": ("status", "--config", "{base}/settings.yaml"),
    "model.onnx": FROM_EXPORT,
    "photos/b.png": FROM_EXPORT,
    "answers": ANSWERS,
    "answers ": (*ANSWERS[:-1], "{base}/answers ", "--append"),
    "workspace/ensembles/ensemble_catalog.json": STATUS,
    "workspace/ensembles/digests.json": STATUS,
    "workspace/ensembles/config.yaml": STATUS,
    "workspace/ensembles/.lock": ("build-ensemble", *VOTES),
    "workspace/ensembles/latency.json": EVALUATE,
    "workspace/ensembles/predictions/forest/val/logits.npy": EVALUATE,
    "workspace/ensembles/predictions/forest/val/record.json": STATUS,
    "workspace/ensembles/oof_predictions/forest.npz": EVALUATE,
    "workspace/ensembles/models/weighted_ensemble/ensemble.json": STATUS,
    "workspace/ensembles/models/weighted_ensemble/combiner.safetensors": EVALUATE,
    "workspace/ensembles/models/weighted_ensemble/crossfit.npz": EVALUATE,
    "workspace/metrics_output/ensembles/ranking.json": STATUS,
    "workspace/metrics_output/ensembles/weighted_ensemble/metrics.json": EVALUATE,
    "workspace/ensembles/report/index.html": ("evaluate", "--force"),
    "workspace/checkpoints/.recovery_state.json": ("clean",),
}
"""{path: command that reads or writes it}"""


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("odd")
    write(base / "given")
    (base / "workspace" / "checkpoints").mkdir(parents=True)
    (base / "photos").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (9, 9)).save(base / "photos" / name)
    onnx_files.constant(base / "model.onnx", [0.25, 0.75])
    for line in (("import-predictions", "--from", base / "given"), ("build-ensemble", *VOTES), ("evaluate",)):
        done = run(*line, workspace=base / "workspace")
        assert done.code == 0, done.stderr
    return base


def attack(template: Path, base: Path, place: str, kind: str) -> None:
    shutil.copytree(template, base)
    path = base / place
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    KINDS[kind](path)
    parsed_files.forget()
    line = [word.format(base=base) for word in PLACES[place]]
    workspace = None if line[0] == "predict" else base / "workspace"

    def hangs(*_: object) -> None:
        raise AssertionError(f"{place} is {kind}: {line[0]} hangs")

    previous = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        done = run(*line, workspace=workspace)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    description = f"{place} is {kind}: {line[0]} ended with {done.code}: {done.stderr[-800:]}"
    assert done.code in (0, 1, 2, 3, 4), description
    assert "Traceback" not in done.stdout + done.stderr, description
    is_named = str(path.parent) in done.stderr or "member forest: no predictions for val" in done.stderr
    assert done.code == 0 or is_named, description
    shutil.rmtree(base)


@pytest.mark.parametrize("place", PLACES)
def test_a_fifo_and_a_link_to_nothing(template, tmp_path, place):
    for number, kind in enumerate(("a FIFO", "a link to nothing")):
        attack(template, tmp_path / str(number), place, kind)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_every_other_kind(template, tmp_path, place):
    for number, kind in enumerate(KINDS):
        attack(template, tmp_path / str(number), place, kind)
