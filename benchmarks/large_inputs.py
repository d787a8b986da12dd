"""Imported predictions of any size, and what one command on them costs; for the benchmarks of sizes and memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reporting import clean_environment

PROJECT = Path(__file__).resolve().parents[1]
FOLDS = 5


@dataclass(frozen=True)
class Cost:
    """What a command took."""

    seconds: float
    cpu_seconds: float
    megabytes: float
    """Highest resident size of the command's own process, in 10^6 bytes"""
    code: int
    """Exit code, -9 where the limit ended it"""
    output: str
    """The end of what it printed"""


def write_predictions(folder: Path, members: int, n_classes: int, rows: Mapping[str, int]) -> Path:
    """Write `folder/m<number>/<stem>.npz` of members that are right on most rows; `rows` are {stem: number of rows}.

    Part of the noise is common to all members, so that their mean is wrong on some rows however many they are, and
    searches of settings do not end at once. A folder that is there is kept.
    """
    if folder.exists():
        return folder
    classes = np.array([f"c{number:04d}" for number in range(n_classes)])
    width = max(2.0, float(np.sqrt(2 * np.log(n_classes))) + 1)  # the largest of the other classes' numbers
    for stem, count in rows.items():
        labels = np.arange(count) % n_classes
        ids = np.array([f"{classes[label]}/{stem}{row:06d}" for row, label in enumerate(labels)])
        fold = {"fold": np.arange(count) // n_classes % FOLDS} if stem == "oof" else {}
        if stem == "oof" and count < FOLDS * n_classes:
            fold = {"fold": np.arange(count) % FOLDS}
        common = np.random.default_rng([*map(ord, stem), count]).standard_normal((count, n_classes), dtype=np.float32)
        for member in range(members):
            rng = np.random.default_rng([member, *map(ord, stem), count])
            logits = common + rng.standard_normal((count, n_classes), dtype=np.float32)
            logits[np.arange(count), labels] += width
            place = folder / f"m{member:03d}"
            place.mkdir(parents=True, exist_ok=True)
            np.savez(place / f"{stem}.npz", logits=logits, labels=labels, sample_ids=ids, classes=classes, **fold)
    return folder


def cost_of(workspace: Path, *line: str, limit: float | None = None) -> Cost:
    """Run one command of the project in a process of its own; one that is at work after `limit` seconds is killed."""
    command = [sys.executable, str(PROJECT / "ensemble_orchestrator.py"), *line, "--workspace", str(workspace)]
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, env=clean_environment(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        alarm = threading.Timer(limit or threading.TIMEOUT_MAX, os.killpg, (process.pid, signal.SIGKILL))
        alarm.daemon = True
        alarm.start()
        _, status, usage = os.wait4(process.pid, 0)
        alarm.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()[-2000:]
    seconds, cpu = time.monotonic() - start, usage.ru_utime + usage.ru_stime
    return Cost(seconds, cpu, usage.ru_maxrss * 1024 / 1e6, process.returncode, text)
