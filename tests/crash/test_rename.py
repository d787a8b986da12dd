"""`discover --rename` cut short at every write and every removal: nothing is lost, and the same line ends it.

Every STRIDE-th (9) of them; `make crash` takes all (STRIDE=1).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from in_process import run
from named_members import VOTES, imported, stored
from test_write_points import GONE, STRIDE, WAYS, dying, in_child

LINE = ("discover", "--rename", "a.npz=a", "--quiet")


@pytest.fixture(scope="module")
def start(few_folds, tmp_path_factory) -> Path:
    return imported(tmp_path_factory.mktemp("start"), "a.npz", "forest")


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory) -> dict[Path, bytes]:
    folder = Path(shutil.copytree(start, tmp_path_factory.mktemp("undisturbed") / "w"))
    assert run(*LINE, workspace=folder).code == 0
    return stored(folder)


def dying_at_removal(number: int) -> None:
    """From now on this process ends when it would take its file or folder `number` off the disk."""
    left = iter(range(number))

    def ending(original):
        def call(*arguments, **options):
            if next(left, None) is None:
                os._exit(GONE)
            return original(*arguments, **options)

        return call

    os.rmdir, os.unlink = ending(os.rmdir), ending(os.unlink)


@pytest.mark.parametrize("way", [*WAYS[:3], "at a removal"])
def test_a_renaming_cut_short_loses_nothing_and_the_same_line_ends_it(way, start, undisturbed, tmp_path):
    for number in range(0, 200, STRIDE):
        folder = Path(shutil.copytree(start, tmp_path / f"w{number}"))

        def disturbed(folder=folder, number=number) -> int:
            dying_at_removal(number) if way == "at a removal" else dying(way, number)
            return run(*LINE, workspace=folder).code

        code = in_child(disturbed)
        if code == 0:
            break
        assert code == GONE
        cleaned = Path(shutil.copytree(folder, tmp_path / f"c{number}"))
        assert in_child(lambda folder=cleaned: run("clean", "--confirm", workspace=folder).code) == 0
        assert stored(cleaned) in (stored(start), undisturbed)
        assert in_child(lambda folder=cleaned: run("build-ensemble", *VOTES, workspace=folder).code) == 0
        again = in_child(lambda folder=folder: run(*LINE, workspace=folder).code)
        assert again in (0, 1)  # 1: the records of the old name, by which the same line goes on, were gone already
        assert in_child(lambda folder=folder: run("clean", "--confirm", workspace=folder).code) == 0
        assert stored(folder) == undisturbed
        shutil.rmtree(folder)
        shutil.rmtree(cleaned)
    assert 9 <= number < 100
