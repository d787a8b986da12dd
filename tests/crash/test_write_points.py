"""Every write of a whole pipeline cut short, one after another: before, after and just ahead of the renaming, or by a
full disk. The process is gone at once, as by SIGKILL; the next one ends with what an undisturbed one leaves.

On imported members, which need no network, so that there is time for all of them. Every STRIDE-th write (9), each in
one of the four ways; `make crash` takes all writes in all ways (STRIDE=1).
"""

from __future__ import annotations

import errno
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from equality import differences, unfinished
from given_predictions import write
from in_process import run
from matplotlib.figure import Figure

from utils.evaluation import score_plots

STRIDE = int(os.environ.get("STRIDE", "9"))
GONE = 99
WAYS = ("before the write", "after the write", "before the renaming", "no room")
LINE = (
    *("pipeline", "--quiet", "--set", "runs.score_ensemble.methods=[soft_voting,weighted]"),
    *("--set", "runs.score_ensemble.pool=log_linear", "--set", "runs.model_soup.enable=false"),
    *("--set", "pruning.enable=false", "--set", "runs.fusion.enable=false"),
    *("--set", "runs.stacking.meta_learners=[mlp]", "--set", "runs.stacking.mlp_config.epochs=1"),
    *("--set", "runs.stacking.mlp_config.hidden_dims=[2]"),
    *("--set", "runs.meta_fuser.input_ensembles=[soft_voting,weighted]", "--set", "runs.meta_fuser.fuser_type=mlp"),
    *("--set", "runs.meta_fuser.mlp_config.epochs=1", "--set", "distillation.enable=false"),
    *("--set", "exports.enable=false"),
)
"""Each learner trained as little as can be: what matters is what is written."""


def in_child(work: Callable[[], int]) -> int:
    """Exit code of `work` in a fork of this process."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying(way: str, number: int) -> None:
    """From now on this process ends, or its disk is full, at its write `number`."""
    left = iter(range(number))
    make, fsync, replace = os.open, os.fsync, pathlib.Path.replace

    def is_due() -> bool:
        return next(left, None) is None

    def made(path, *arguments, **options):
        found = make(path, *arguments, **options)
        if way == WAYS[0] and ".partial" in str(path) and is_due():
            os._exit(GONE)
        return found

    def synced(handle):
        if way == WAYS[1] and is_due():
            os._exit(GONE)
        return fsync(handle)

    def replaced(self, target):
        if way == WAYS[2] and is_due():
            os._exit(GONE)
        if way == WAYS[3] and is_due():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(self, target)

    os.open, os.fsync, pathlib.Path.replace = made, synced, replaced


@pytest.fixture(scope="module")
def start(few_folds, tmp_path_factory) -> Path:
    """Two imported members."""
    folder = tmp_path_factory.mktemp("start")
    write(folder / "given", {"bayes": 1, "forest": 2})
    (folder / "w").mkdir()
    done = run("import-predictions", "--from", folder / "given", workspace=folder / "w")
    assert done.code == 0, done.stderr
    return folder / "w"


@pytest.fixture(scope="module")
def counted(start, tmp_path_factory) -> tuple[Path, int]:
    """What a run leaves that nobody disturbs, and how many files it renamed."""
    folder = Path(shutil.copytree(start, tmp_path_factory.mktemp("undisturbed") / "w"))
    found = []
    replace = pathlib.Path.replace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pathlib.Path, "replace", lambda self, target: (found.append(target), replace(self, target))[1])
        done = run(*LINE, workspace=folder)
    assert done.code == 0, done.stderr
    return folder, len(found)


@pytest.mark.parametrize("way", WAYS)
def test_every_write_cut_short(way, start, counted, tmp_path):
    undisturbed, writes = counted
    assert writes > 20
    turn = range(WAYS.index(way) * STRIDE, writes, STRIDE * len(WAYS))
    chosen = turn if STRIDE > 1 else range(writes)
    for number in chosen:
        folder = Path(shutil.copytree(start, tmp_path / f"w{number}"))

        def disturbed(folder=folder, number=number) -> int:
            dying(way, number)
            done = run(*LINE, workspace=folder)
            assert done.code == 0 or "No space left on device" in done.stderr, done.stderr
            return done.code

        code = in_child(disturbed)
        assert code in ((1, 4) if way == WAYS[3] else (GONE,)), (number, way, code)
        if way == WAYS[3]:
            assert unfinished(folder) == []
            assert not (folder / "ensembles" / ".lock").exists()
        assert in_child(lambda folder=folder: run(*LINE, workspace=folder).code) == 0
        assert differences(folder, undisturbed) == [], (number, way)
        shutil.rmtree(folder)
    print(f"\nwrites cut short, {way}: {len(chosen)} of {writes}")


def test_a_plot_cut_short_is_no_file(counted, tmp_path):
    """The runs above write no real plots."""
    folder = counted[0] / "metrics_output" / "ensembles" / "soft_voting_ensemble"
    picture = score_plots.Picture("reliability", json.loads((folder / "metrics.json").read_text()), tmp_path / "a.png")

    def disturbed() -> int:
        Figure.savefig = lambda self, path, **options: (Path(path).write_bytes(b"half"), os._exit(GONE))
        score_plots.draw(picture)
        return 0

    assert in_child(disturbed) == GONE
    assert not picture.path.exists()
