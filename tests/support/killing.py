"""Runs of the project's programs that are killed at any moment, and what they have left by then."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path


def digests(workspace: Path) -> dict[str, str]:
    """Every checkpoint and out-of-fold file of a workspace."""
    files = [*workspace.glob("checkpoints/*.pth"), *workspace.glob("kfold_results/*.npz")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def events(workspace: Path, watched: Path | None = None) -> set[tuple[str, int]]:
    """Files of trainings with their times: each saved epoch and each checkpoint makes a new one."""
    found = set()
    folder = watched or workspace / "checkpoints" / ".progress"
    for path in [*folder.glob("[!.]*.pth"), *workspace.glob("checkpoints/*.pth")]:
        try:
            found.add((path.name, path.stat().st_mtime_ns))
        except FileNotFoundError:  # finished while we looked
            continue
    return found


def run_and_kill_repeatedly(
    times: int,
    command: list[str],
    environment: dict[str, str],
    workspace: Path,
    rng: random.Random,
    watched: Path | None = None,
) -> Iterator[bool]:
    """Kill so many runs of a short training; yields after each whether it was killed, and ends after one that was not.

    On a busy machine such a training may end before this process sees its files.
    """
    for _ in range(times):
        ended = run_and_kill(command, environment, workspace, rng, watched)
        assert ended in (None, 0)
        yield ended is None
        if ended is not None:
            return


def run_and_kill(
    command: list[str],
    environment: dict[str, str],
    workspace: Path,
    rng: random.Random,
    watched: Path | None = None,
) -> int | None:
    """Start a run and kill it with all its processes after a few files, at any moment; its exit code if it ended.

    `watched` is where trainings save their progress, unless it is the base pipeline's place.
    """
    count, delay = rng.randint(1, 4), rng.uniform(0, 0.15)
    seen = events(workspace, watched)
    fresh: set[tuple[str, int]] = set()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while len(fresh) < count and process.poll() is None:
        time.sleep(0.005)
        fresh |= events(workspace, watched) - seen
    time.sleep(delay)
    ended = process.poll()
    if ended is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return ended
