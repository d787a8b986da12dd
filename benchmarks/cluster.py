"""A Ray cluster of two machines beside this one: what a job costs, a hundred members on it, and a machine that is lost.

    python benchmarks/cluster.py            100 members, 4,000 images, 1,000 classes: about six minutes
    python benchmarks/cluster.py --quick    12 members, 200 images, 100 classes: a smoke test, not the form to report

Needs `pip install 'ray>=2.40,<3'`. Both machines of the cluster run here, with one core each. Networks are the smallest
bundled ones with random weights, images are noise; nothing learns from them. Soft voting over all members is built by
this machine's processes, by the cluster, and by the cluster while one of its machines is killed after a third of the
members. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from extraction import PIXELS, write_checkpoint  # noqa: E402
from reporting import clean_environment, report, row  # noqa: E402

CONFIG = PROJECT / "configs" / "votes.yaml"
ARCHITECTURE = "CustomRegNet"
STORE_BYTES = 500_000_000  # shared memory of each machine


@dataclass(frozen=True)
class Size:
    """What is measured."""

    members: int
    images: int
    """Of val and test together; train has one image per class"""
    classes: int
    jobs: int
    """Empty jobs, which measure the scheduler"""


FULL = Size(100, 4000, 1000, 2000)
QUICK = Size(12, 200, 100, 100)


@dataclass(frozen=True)
class Run:
    """One build of all members."""

    seconds: float
    digest: str
    """Of all predictions that it stored"""
    n_left: int | None = None
    """Members that were not there yet just before the machine was killed"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run all rows; returns the exit code."""
    parser = argparse.ArgumentParser(prog="cluster.py", description="A Ray cluster beside this machine's processes.")
    parser.add_argument("--quick", action="store_true", help="a smoke test, not the form to report")
    options = parser.parse_args(argv)
    if find_spec("ray") is None:
        print("cluster.py: ray is not installed. Install it: pip install 'ray>=2.40,<3'", file=sys.stderr)
        return 1
    size = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory(prefix="cluster-") as folder:
        workspace = Path(folder) / "workspace"
        os.environ["DBT_BASE_DIR"] = str(workspace)  # read with the settings of the base pipeline
        write_images(workspace, size)
        for number in range(size.members):
            write_checkpoint(workspace, f"member{number:03d}", ARCHITECTURE, "tiny", seed=number)
        run(workspace, "discover")
        sent = shared_bytes()
        here = build(workspace)
        with TwoMachines() as cluster:
            seconds_per_job = scheduling(cluster.address, size.jobs)
            there = build(workspace, cluster)
            after_loss = build(workspace, cluster, lose_after=size.members // 3)
    report(
        "cluster",
        rows(size, here, there, after_loss, seconds_per_job, sent),
        quick=options.quick,
        packages=("ray", "torch", "numpy"),
    )
    return 0


def rows(
    size: Size, here: Run, there: Run, after_loss: Run, seconds_per_job: tuple[float, float], sent: int
) -> list[dict[str, Any]]:
    """The rows of the report; `seconds_per_job` are those of this machine and of the cluster."""
    what = f"{size.members} members, {size.images:,} images, {size.classes:,} classes"
    written = size.members * size.images * size.classes * 4
    local, remote = (1000 * seconds for seconds in seconds_per_job)
    n_left = f"{after_loss.n_left} members were left"
    return [
        row(f"an empty job, mean of {size.jobs:,}", remote, "ms", None, None, f"{local:.3f} ms in this process"),
        row(
            f"{what}: on a cluster of two machines",
            there.seconds / here.seconds,
            f"times this machine ({there.seconds:.0f} s)",
            None,
            None,
            f"{here.seconds:.0f} s",
        ),
        row(
            f"{what}: one machine lost on the way",
            after_loss.seconds / there.seconds,
            f"times both ({after_loss.seconds:.0f} s; {n_left})",
            None,
            None,
            f"{there.seconds:.0f} s",
        ),
        row(
            "bytes of the predictions that differ from this machine's",
            float((there.digest != here.digest) + (after_loss.digest != here.digest)),
            "of two builds",
            "0",
            there.digest == after_loss.digest == here.digest,
            None,
        ),
        row(
            "sent to a machine for its members",
            sent / 1e6,
            "MB",
            None,
            None,
            f"{written / 1e6:,.0f} MB of logits, written where they are computed",
        ),
    ]


# a workspace ---------------------------------------------------------------------------------------------------------
def write_images(workspace: Path, size: Size) -> None:
    """Write `split_dataset`: one image per class in train and test, the others in val."""
    from PIL import Image

    rng, side = np.random.default_rng(0), PIXELS["tiny"]
    counts = {"train": size.classes, "val": size.images - size.classes, "test": size.classes}
    for split, count in counts.items():
        for number in range(count):
            folder = workspace / "split_dataset" / split / f"class{number % size.classes:04d}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{split}{number:05d}.png")


def shared_bytes() -> int:
    """Bytes of what a machine needs to stream members: the prediction store with its catalog and lists of images."""
    import ray.cloudpickle

    from utils import base_back
    from utils.core.config_file import load_config
    from utils.predictions import catalog
    from utils.predictions.store import Store

    place = base_back.open_workspace()
    store = Store(load_config(CONFIG), place, catalog.load(place))
    for split in ("val", "test"):
        store.images(split)
    return len(ray.cloudpickle.dumps(store))


# builds --------------------------------------------------------------------------------------------------------------
class TwoMachines:
    """A Ray cluster of two machines with one core each, both here."""

    def __enter__(self) -> TwoMachines:
        from ray.cluster_utils import Cluster

        machine = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
        self._cluster = Cluster(initialize_head=True, head_node_args={**machine, "include_dashboard": False})
        self._second = self._cluster.add_node(**machine)
        self._cluster.wait_for_nodes()
        self.address = self._cluster.address
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.shutdown()

    def lose_one(self) -> None:
        """Kill the second machine, its workers included, without a word to the others."""
        self._cluster.remove_node(self._second, allow_graceful=False)


def build(workspace: Path, cluster: TwoMachines | None = None, *, lose_after: int | None = None) -> Run:
    """Build soft voting anew; with a cluster on its machines, one of which is lost after so many members."""
    for name in ("predictions", "models"):
        shutil.rmtree(workspace / "ensembles" / name, ignore_errors=True)
    engine = ["--engine", "ray", "--address", cluster.address] if cluster else []
    settings = ("runs.score_ensemble.methods=[soft_voting]", "backbones.include=all")
    options = (*engine, *(part for each in settings for part in ("--set", each)))
    start, n_left = time.monotonic(), None
    with started(workspace, "build-ensemble", *options) as (process, messages):
        # Members are counted by their files: messages come in the order of the members, not in that of their ends.
        while cluster and lose_after is not None and n_left is None and process.poll() is None:
            if _n_stored(workspace) >= lose_after:
                n_left = len(list((workspace / "checkpoints").glob("*.pth"))) - _n_stored(workspace)
                cluster.lose_one()
            time.sleep(0.05)
        finish(process, messages, "build-ensemble")
    return Run(time.monotonic() - start, _digest(workspace), n_left)


def run(workspace: Path, command: str) -> None:
    """Run a command of the orchestrator. Raises SystemExit where it fails."""
    with started(workspace, command) as (process, messages):
        finish(process, messages, command)


@contextmanager
def started(workspace: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """Start a command of the orchestrator; yields its process and the file that its messages go to."""
    command = [sys.executable, str(PROJECT / "ensemble_orchestrator.py"), *arguments]
    command += ["--config", str(CONFIG), "--workspace", str(workspace), "--device", "cpu"]
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(command, env=clean_environment(), stdout=subprocess.DEVNULL, stderr=messages)
        yield process, messages


def finish(process: subprocess.Popen[bytes], messages: IO[bytes], command: str) -> None:
    """Wait for a command. Raises SystemExit with its messages where it fails."""
    if process.wait() != 0:
        messages.seek(0)
        text = messages.read().decode(errors="replace")
        raise SystemExit(f"{command} ended with {process.returncode}:\n{text}")


def _n_stored(workspace: Path) -> int:
    return len(list((workspace / "ensembles" / "predictions").glob("*/val/logits.npy")))


def _digest(workspace: Path) -> str:
    """Return the digest of all predictions; temporary files of killed workers, which `clean` removes, do not count."""
    digest = hashlib.sha256()
    for path in sorted((workspace / "ensembles" / "predictions").rglob("[!.]*.npy")):
        digest.update(str(path.relative_to(workspace)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


# the scheduler -------------------------------------------------------------------------------------------------------
def scheduling(address: str, count: int) -> tuple[float, float]:
    """Seconds of an empty job in this process and on the cluster, mean of `count` after a first one."""
    from utils.core import engines

    means = []
    for name, place in (("local", None), ("ray", address)):
        with engines.using(name, place):
            list(engines.current().map(abs, [0], threads_per_job=1))
            start = time.perf_counter()
            list(engines.current().map(abs, range(count), threads_per_job=1))
            means.append((time.perf_counter() - start) / count)
    return means[0], means[1]


if __name__ == "__main__":
    raise SystemExit(main())
