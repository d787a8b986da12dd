"""A long life of one workspace: `python tests/soak/run.py [--minutes 60] [--seed 0]`; `make soak MINUTES=20`.

Random commands, some of them killed, some beside readers or a second writer, and between them changes of the
configuration and of members, which are retrained, removed and added again. After each step `invariants` are checked,
and every 25 steps a workspace that is built from nothing must have equal bytes. The first violation ends the run with
1; its folder is kept. Equal seeds make equal choices; moments of kills are fractions of a second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve()
PROJECT = HERE.parents[2]
sys.path[:0] = [str(PROJECT), str(HERE.parents[1] / "support"), str(HERE.parent)]
os.environ |= {"OMP_NUM_THREADS": "1", "DBT_MODEL_SIZE": "tiny"}

import invariants  # noqa: E402
import steps  # noqa: E402
from equality import differences  # noqa: E402
from forked_commands import Ended, Running  # noqa: E402

LIMIT = 900.0  # seconds of one command on a busy machine
SETTLE = 25  # steps between comparisons with a workspace from nothing
LAST = ("evaluate", "audit")
"""Commands before a comparison: both read all ensembles, also those that were built after a pipeline."""
OF_THE_BUILD = ("overrides",)
"""Keys of records that tell how an ensemble was built: also one that a command with `--set` built before others."""
TRAININGS = {"first": "1", "longer": "2"}
"""{training: epochs of fine-tuning}"""


class ViolationError(Exception):
    """Something does not hold that must."""


def main(argv: Sequence[str] | None = None) -> int:
    """Soak; the exit code."""
    parser = argparse.ArgumentParser(prog="soak", description="Random commands, kills and changes on one workspace.")
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (default 60)")
    parser.add_argument("--steps", type=int, default=10**9, help="at most so many steps")
    parser.add_argument("--seed", type=int, default=0, help="of all choices")
    options = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    load_packages()
    prepare(folder)
    soak = Soak(folder, options.seed)
    end = time.monotonic() + 60 * options.minutes
    try:
        while time.monotonic() < end and soak.number < options.steps:
            soak.step()
        soak.settle()
    except (ViolationError, TimeoutError) as error:
        print(f"VIOLATION at step {soak.number}, seed {options.seed}: {error}\nkept: {folder}", flush=True)
        return 1
    counts = ", ".join(f"{what} {count}" for what, count in sorted(soak.counts.items()))
    print(f"soak: {soak.number} steps, seed {options.seed}, no violation ({counts})")
    shutil.rmtree(folder)
    return 0


def load_packages() -> None:
    """Import what commands need, so that their forks need not."""
    for name in ("torch", "timm", "scipy.optimize", "sklearn.linear_model", "onnxruntime", "safetensors.torch"):
        __import__(name)
    import torch

    torch.set_num_threads(1)  # a pool of threads does not survive a fork


def prepare(folder: Path) -> None:
    """Images and two trainings of each backbone, `folder/variants/<training>`, and the workspace with the first."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    place = folder / "trainings"
    for digit in range(3):
        (place / "Data" / str(digit)).mkdir(parents=True)
        for number in [index for index, target in enumerate(digits.target) if target == digit][:40]:
            image = Image.fromarray((digits.images[number] * 15).astype("uint8")).resize((32, 32))
            image.save(place / "Data" / str(digit) / f"{number:04d}.png")
    for training, epochs in TRAININGS.items():
        for name in ("checkpoints", "kfold_results", "metrics_output"):
            shutil.rmtree(place / name, ignore_errors=True)
        command = [
            *(sys.executable, str(PROJECT / "BASE-BACK" / "src" / "main.py"), "--workspace", str(place)),
            *("--data", str(place / "Data"), "--size", "tiny", "--folds", "2", "--epochs-head", "1", "--jobs", "1"),
            *("--epochs-finetune", epochs, "--backbones", *steps.BACKBONES, "--stages", "split", "kfold", "train"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the base pipeline ended with {done.returncode}: {done.stderr[-2000:]}")
        for name in ("checkpoints", "kfold_results", "metrics_output"):
            shutil.copytree(place / name, folder / "variants" / training / name)
    workspace = folder / "w"
    for name in ("Data", "split_dataset"):
        shutil.copytree(place / name, workspace / name)
    shutil.copytree(folder / "variants" / "first", workspace, dirs_exist_ok=True)


class Soak:
    """One workspace and what has happened to it."""

    def __init__(self, folder: Path, seed: int) -> None:
        """Configure and build the workspace `folder/w`, whose first steps are the commands in their order."""
        self.folder, self.workspace, self.number = folder, folder / "w", 0
        self.rng = random.Random(seed)
        self.user = steps.User(self.workspace, folder / "variants", self.rng)
        self.counts: Counter[str] = Counter()
        self.seconds: dict[tuple[str, ...], float] = {}
        self.is_clean = True
        self.images = self.workspace / "split_dataset" / "test"
        first = [word for value in steps.SMALL for word in ("--set", value)]
        self.command("pipeline", *first)
        self.check()

    def step(self) -> None:
        """One random thing, and the checks."""
        self.number += 1
        what = self.rng.choices(("command", "user", "edit"), (70, 20, 10))[0]
        if what == "user":
            self.tell(self.rng.choice(self.user.actions())())
        elif what == "edit":
            self.command("config", "--set", self.rng.choice(steps.EDITS))
        else:
            line = self.rng.choice(steps.WRITERS)
            way = self.rng.choices(
                ("alone", "killed", "stopped", "beside readers", "beside a writer"), (4, 4, 1, 2, 1)
            )[0]
            {"alone": self.command, "beside readers": self.beside_readers, "beside a writer": self.beside_a_writer}.get(
                way, self.stopped
            )(*line, **({"sent": signal.SIGKILL if way == "killed" else signal.SIGTERM} if "ed" in way else {}))
        self.check()
        if self.number % SETTLE == 0:
            self.settle()

    def tell(self, text: str, count: str = "changes by the user") -> None:
        self.counts[count] += 1
        print(f"{self.number:5} {text}", flush=True)

    def command(self, *line: str) -> Ended:
        """Run a command to its end; what `status` said before is compared with what it did."""
        before = self.status() if line[0] == "build-ensemble" and "--force" not in line else None
        ended = Running((*line, "--quiet", "--json"), self.workspace).wait(LIMIT)
        self.seconds[line] = ended.seconds
        self.judge(ended, was_stopped=False)
        if line[:2] == ("clean", "--confirm") or line == ("clean", "--temporary"):
            self.is_clean = self.is_clean or ended.code == 0
        if before is not None and ended.code in (0, 4):
            self.require(invariants.of_a_build(before, json.loads(ended.stdout)))
        self.tell(f"{ended.seconds:5.1f} s, ended with {ended.code}: {' '.join(line)[:100]}", "commands")
        return ended

    def stopped(self, *line: str, sent: int) -> None:
        """Start a command and stop it at any moment."""
        running = Running((*line, "--quiet"), self.workspace)
        time.sleep(self.rng.uniform(0, 1.1 * self.seconds.get(line, 3.0)))
        running.kill(sent)
        ended = running.wait(LIMIT)
        self.judge(ended, was_stopped=True)
        self.is_clean = self.is_clean and ended.code >= 0  # stopped by its own handler, it leaves nothing
        self.tell(f"{ended.seconds:5.1f} s, stopped by {sent}, ended with {ended.code}: {' '.join(line)}", "stopped")

    def beside_readers(self, *line: str) -> None:
        """A command while others read; the readers end as well as it does."""
        running = Running((*line, "--quiet"), self.workspace)
        while True:
            reader = tuple(word.format(images=self.images) for word in self.rng.choice(steps.READERS))
            ended = Running((*reader, "--quiet"), self.workspace).wait(LIMIT)
            self.judge(ended, was_stopped=False)
            self.counts["readers"] += 1
            if not running.is_running():
                break
        ended = running.wait(LIMIT)
        self.judge(ended, was_stopped=False)
        self.tell(f"{ended.seconds:5.1f} s beside readers, ended with {ended.code}: {' '.join(line)}", "commands")

    def beside_a_writer(self, *line: str) -> None:
        """Two commands that write: one of them may be refused by the name of the other."""
        both = [Running((*each, "--quiet"), self.workspace) for each in (line, self.rng.choice(steps.WRITERS))]
        for running in both:
            ended = running.wait(LIMIT)
            self.judge(ended, was_stopped=False)
            self.tell(f"beside a writer, ended with {ended.code}: {ended.text}", "commands")

    def judge(self, ended: Ended, *, was_stopped: bool) -> None:
        self.require(invariants.of_an_end(ended.text, ended.code, ended.stderr, was_stopped=was_stopped))
        if ended.code in (1, 2, 3, 4):
            self.counts["errors of the project's own"] += 1
            print(f"      {ended.code}: {ended.stderr.strip()[-300:]}", flush=True)

    def status(self) -> dict:
        """What `status --json` prints."""
        ended = Running(("status", "--json", "--quiet"), self.workspace).wait(LIMIT)
        if ended.code != 0:
            raise ViolationError(f"status ended with {ended.code}: {ended.stderr[-1500:]}")
        return json.loads(ended.stdout)

    def check(self) -> None:
        """All invariants of the workspace as it lies there."""
        self.require(invariants.of_files(self.workspace))
        self.require(invariants.of_status(self.workspace, self.status(), undisturbed=self.is_clean))
        self.counts["checks"] += 1

    def require(self, violations: Iterator[str]) -> None:
        if found := list(violations):
            raise ViolationError("; ".join(found))

    def settle(self) -> None:
        """After `clean` and `pipeline`, a workspace from nothing with the same configuration has equal bytes.

        All backbones and their soups are selected first: what is stored of others stays for the day that they are
        selected again, and a workspace from nothing has none of it.
        """
        self.user.add_again()
        self.command("config", *(word for value in steps.SELECT_ALL for word in ("--set", value)))
        for line in (
            ("discover",),
            ("clean", "--confirm", "--stale"),
            ("pipeline",),
            ("clean", "--confirm", "--stale"),
            ("clean", "--confirm", "--unlisted"),
        ):
            self.command(*line)
        for command in LAST:
            ended = self.command(command)
            if ended.code not in (0, 4):
                raise ViolationError(f"{command} after everything ended with {ended.code}: {ended.stderr[-1500:]}")
        self.is_clean = True
        self.check()
        fresh = self.folder / "fresh"
        shutil.rmtree(fresh, ignore_errors=True)
        for name in ("Data", "split_dataset"):
            shutil.copytree(self.workspace / name, fresh / name)
        for backbone in steps.BACKBONES:
            for path in steps.files_of(self.workspace, backbone):
                target = fresh / path.relative_to(self.workspace)
                target.parent.mkdir(exist_ok=True)
                shutil.copy2(path, target)
        (fresh / "ensembles").mkdir()
        shutil.copy(self.workspace / "ensembles" / "latency.json", fresh / "ensembles" / "latency.json")
        remembered = str(self.workspace / "ensembles" / "config.yaml")
        builds = (("pipeline", "--config", remembered), *steps.builds_by_option(self.workspace))
        for line in (*builds, *((command,) for command in LAST)):
            ended = Running((*line, "--quiet"), fresh).wait(LIMIT)
            self.judge(ended, was_stopped=False)
        wrong = [
            name
            for name in differences(self.workspace, fresh, OF_THE_BUILD)
            if self.counts_as_result(name) and not is_for_a_fit(name) and not is_of_earlier(name, fresh)
        ]
        if wrong:
            raise ViolationError(f"a workspace from nothing differs in {wrong}")
        self.tell("a workspace from nothing has equal bytes", "comparisons")

    @staticmethod
    def counts_as_result(name: str) -> bool:
        """Left out: exports and scores of val, which the fresh one was not asked for, and where values came from."""
        is_asked = not name.startswith("deployment_models/") and "_val." not in name and "index_val" not in name
        return is_asked and name not in (
            *("ensembles/config.yaml", "ensembles/exported_files.json"),
            # The base pipeline's own:
            *("checkpoints/.recovery_state.json", "checkpoints/recovery_status.txt"),
            "metrics_output/pipeline_summary.json",
        )


def is_for_a_fit(name: str) -> bool:
    """Whether a file holds what only fits read: outputs on train rows, and those of fold networks on val.

    `clean` takes them with a member that is gone for a while, and a fit that is current is not made again; those of a
    fit that the configuration no longer asks for stay, also when the member has other weights since.
    """
    outputs = ("ensembles/predictions/", "ensembles/fusion_embeddings/")
    return name.startswith(outputs) and ("train" in name or "/val/folds." in name)


def is_of_earlier(name: str, fresh: Path) -> bool:
    """Whether a file is of a model that was ranked once, and that the configuration no longer asks for.

    Its scores stay, in a folder that the fresh workspace lacks, and so do the predictions that were scored where a
    fuser reads the ensemble.
    """
    if name.startswith("metrics_output/ensembles/") and name.count("/") > 2:
        return not (fresh / name).parent.exists()
    return name.startswith("ensembles/models/") and "/predictions_" in name and not (fresh / name).exists()


if __name__ == "__main__":
    sys.exit(main())
