"""Single commands killed at random moments and typed again: what is there at the end is what an undisturbed run leaves.

One kill of each; `make crash` does a quarter of KILLS of each (KILLS=48). A moment is a seeded fraction of the time
that the command takes here. Trainings are killed in tests/distillation/test_student_builder.py and
tests/building/test_end_to_end.py.
"""

from __future__ import annotations

import importlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from equality import differences, unfinished
from forked_commands import KILLED, Running
from given_predictions import write
from in_process import run as run_here
from warm import LARGE

KILLS, SEED = int(os.environ.get("KILLS", "4")), int(os.environ.get("SEED", "0"))
LIMIT = 600.0  # seconds, on however busy a machine
QUIET = ("--quiet", "--device", "cpu", "--set", "dataset.num_workers=0", "--set", "pruning.enable=false")
MEMBERS = ("--set", "backbones.include=[CustomResNetMish,CustomViTHybrid]", "--set", "dataset.img_size=32")
VOTES = (*MEMBERS, "--set", "runs.score_ensemble.methods=[soft_voting]", "--set", "runs.model_soup.enable=false")
FORMATS = ("state_dict", "onnx") if "KILLS" in os.environ else ("onnx",)
"""A state dict is checked by a program that imports torch anew, three times."""
COMMANDS: dict[str, tuple[str, ...]] = {
    "import-predictions": ("import-predictions", "--from", "{given}", "--quiet"),
    "predict --append": (
        *("predict", "--model-name", "soft_voting_ensemble", "{given}/../many", "--to", "{workspace}/answers.csv"),
        *("--append", "--probabilities", *QUIET[:5]),
    ),
    "export": ("export", "--model-name", "soft_voting_ensemble", "--formats", *FORMATS, *QUIET[:3]),
}
LATENCY = "ensembles/latency.json"
PHOTOS = 300  # several blocks of answers


def run(line: tuple[str, ...], workspace: Path, given: Path, kill_after: float | None = None) -> tuple[int, float]:
    """Exit code and seconds of a command, which is killed with all its processes if it runs after some seconds."""
    running = Running(tuple(word.format(given=given, workspace=workspace) for word in line), workspace)
    if kill_after is not None:
        time.sleep(kill_after)
        running.kill(signal.SIGKILL)
    ended = running.wait(LIMIT)
    assert ended.code in ((0, KILLED) if kill_after is not None else (0,)), ended.stderr
    return ended.code, ended.seconds


@pytest.fixture(scope="module")
def start(synthetic, few_folds, tmp_path_factory) -> Path:
    """`given` predictions, an `empty` workspace, and a trained `built` one with an ensemble and photographs."""
    folder = tmp_path_factory.mktemp("start")
    write(folder / "given")
    (folder / "empty").mkdir()
    built = Path(shutil.copytree(synthetic, folder / "built"))
    photo = next((built / "split_dataset" / "test").glob("*/*.png"))
    (folder / "many").mkdir()
    for number in range(PHOTOS):
        shutil.copy(photo, folder / "many" / f"{number:04d}.png")
    for line in (("discover", *QUIET[:3]), ("build-ensemble", *VOTES, *QUIET)):
        done = run_here(*line, workspace=built)
        assert done.code == 0, done.stderr
    for name in LARGE:  # here and above, so that no fork needs to import them
        importlib.import_module(name)
    return folder


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """(workspace, seconds) of each command, by its name, made at its first use."""
    made: dict[str, tuple[Path, float]] = {}

    def of(name: str) -> tuple[Path, float]:
        if name not in made:
            folder = tmp_path_factory.mktemp("undisturbed") / "w"
            shutil.copytree(start / ("empty" if name == "import-predictions" else "built"), folder)
            made[name] = folder, run(COMMANDS[name], folder, start / "given")[1]
        return made[name]

    return of


@pytest.mark.parametrize("number", range(max(1, KILLS // 4)))
@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_goes_on_to_the_same_end(name, number, start, undisturbed, tmp_path):
    expected, seconds = undisturbed(name)
    after = random.Random(f"{SEED} {name} {number}").uniform(0, 1) * seconds
    workspace = Path(shutil.copytree(start / ("empty" if name == "import-predictions" else "built"), tmp_path / "w"))
    if (expected / LATENCY).exists():
        shutil.copy(expected / LATENCY, workspace / LATENCY)  # with which both have to begin
    code, _ = run(COMMANDS[name], workspace, start / "given", kill_after=after)
    run(COMMANDS[name], workspace, start / "given")
    run(("clean", "--temporary", "--quiet"), workspace, start / "given")
    assert differences(workspace, expected) == [], f"killed after {after:.2f} of {seconds:.2f} s"
    assert unfinished(workspace) == []
    assert not (workspace / "ensembles" / ".lock").exists()
    print(f"\n{name}, kill {number + 1}, seed {SEED}: after {after:.2f} of {seconds:.2f} s, ended with {code}; equal")
