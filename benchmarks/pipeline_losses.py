"""Test log-loss of the recommended ensemble beside that of another commit, on images that no member saw.

    python benchmarks/pipeline_losses.py                     beside commit 2d52cc4, four turns: half an hour
    python benchmarks/pipeline_losses.py --against COMMIT    beside another one
    python benchmarks/pipeline_losses.py --turns 8           narrower intervals
    python benchmarks/pipeline_losses.py --quick             two members on few images, one turn; not the form to report

The members are the twelve of `pipeline.py`, trained on 800 of scikit-learn's handwritten digits. All others are val and
test: as many val images as the members' workspace has, drawn anew in each turn, and about 900 test images, not 100. A
turn has its own seed of the configuration as well, so that the differences hold what both choose at random. Both
commits run in turn with their own configuration of the demo, from `discover` to `evaluate`. Where git does not have the
commit, its figures are null. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pipeline

from reporting import clean_environment, interval, mean_with_interval, report, row

STAGES = ("discover", "build-ensemble", "stack", "fusion-train", "meta-fuse", "evaluate")
COMMIT, TURNS = "2d52cc4", 4
TRAINED = ("checkpoints", "kfold_results", "metrics_output")
"""Folders of a workspace that hold what the base pipeline wrote about its members."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run all turns; returns 0, also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="pipeline_losses.py", description="Log-losses beside another commit's.")
    parser.add_argument("--against", metavar="COMMIT", default=COMMIT, help="(default: %(default)s)")
    parser.add_argument("--turns", type=int, default=TURNS, help="(default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="two members, few images, one turn; not the form to report"
    )
    options = parser.parse_args(argv)
    members, images = pipeline.QUICK_POINTS[0] if options.quick else (pipeline.MEMBERS, pipeline.IMAGES)
    zoo = pipeline.ZOO.with_name("pipeline-quick") if options.quick else pipeline.ZOO
    trained, names = zoo / f"digits{images}", pipeline.BACKBONES[:members]
    pipeline.train(trained, images, names, epochs=1 if options.quick else 4)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="pipeline-losses-") as folder:
        projects = {"here": pipeline.PROJECT}
        if has_commit(options.against):
            projects[options.against] = pipeline.project_of(options.against, Path(folder, "project"))
        else:
            print(f"{options.against}: git does not have this commit, so that nothing is compared", file=sys.stderr)
        for turn in range(1 if options.quick else options.turns):
            workspace = Path(folder, f"workspace-{turn}")
            write_workspace(
                workspace, trained, zoo.parent / "images", seed=turn, limit=images if options.quick else None
            )
            for version, project in projects.items():
                result = run(project, workspace, Path(folder, f"output-{version}-{turn}"), names, seed=turn)
                print(f"turn {turn}, {version}: {json.dumps(result)}", file=sys.stderr, flush=True)
                found.append(result | {"version": version, "turn": turn})
    report(
        "pipeline_losses",
        rows(found, options.against),
        quick=options.quick,
        packages=("torch", "numpy", "scikit-learn"),
        commit=options.against,
        turns=found,
    )
    return 0


def has_commit(name: str) -> bool:
    """Whether git has this commit; False outside of git."""
    command = ["git", "rev-parse", "--quiet", "--verify", f"{name}^{{commit}}"]
    done = subprocess.run(
        command, cwd=pipeline.PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
    )
    return done.returncode == 0


def write_workspace(workspace: Path, trained: Path, images: Path, *, seed: int, limit: int | None = None) -> None:
    """A workspace with the members and train images of `trained`, and all other images drawn into val and test.

    `limit` leaves out test images beyond so many.
    """
    samples = json.loads((trained / "split_dataset" / "split_manifest.json").read_text(encoding="utf-8"))["samples"]
    everything = sorted(path.relative_to(images).as_posix() for path in images.glob("*/*.png"))
    val, test = draw(samples, everything, seed)
    for split, chosen in (("train", samples["train"]), ("val", val), ("test", test[:limit])):
        for name in chosen:
            path = workspace / "split_dataset" / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(images / name)
    for name in TRAINED:
        shutil.copytree(trained / name, workspace / name)


def draw(samples: Mapping[str, Sequence[str]], everything: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Val and test of all images `class/name` outside of train; of each class val has as many as in `samples`."""
    train, random = set(samples["train"]), np.random.default_rng(seed)
    val, test = [], []
    for label in sorted({name.split("/")[0] for name in everything}):
        others = [name for name in everything if name.startswith(f"{label}/") and name not in train]
        wanted = sum(name.startswith(f"{label}/") for name in samples["val"])
        drawn = set(random.choice(len(others), wanted, replace=False).tolist())
        val += [name for place, name in enumerate(others) if place in drawn]
        test += [name for place, name in enumerate(others) if place not in drawn]
    order = random.permutation(len(test))  # any first part of the test images has all classes
    return val, [test[place] for place in order]


def run(project: Path, workspace: Path, output: Path, members: Sequence[str], *, seed: int) -> dict[str, Any]:
    """Run the stages of the program in `project`. Raises SystemExit where one fails.

    Returns the recommended ensemble, its test log-loss and {ensemble: test log-loss}.
    """
    for stage in STAGES:
        call = [
            *(sys.executable, "ensemble_orchestrator.py", stage, "--quiet", "--device", "cpu"),
            *("--config", str(project / pipeline.CONFIG), "--workspace", str(workspace), "--output", str(output)),
            *("--set", f"backbones.include=[{','.join(members)}]", "--set", f"seed={seed}"),
        ]
        done = subprocess.run(call, env=clean_environment(), stdout=subprocess.DEVNULL, check=False, cwd=project)
        if done.returncode not in (0, pipeline.LEFT_OUT):
            raise SystemExit(f"{stage} of {project} ended with {done.returncode}; see the messages above")
    chosen, losses = pipeline.recommended(output)
    return {"recommended": chosen, "log_loss": losses[chosen], "losses": losses}


def rows(found: Sequence[Mapping[str, Any]], commit: str) -> list[dict[str, Any]]:
    """The recommended ensembles' mean log-loss with its goal, then that of every ensemble of both versions.

    A goal is missed where the interval of the differences by turn is above 0, or, of one turn, the difference.
    """
    here, there = ([entry for entry in found if entry["version"] == version] for version in ("here", commit))
    names = [
        name
        for name in here[0]["losses"]
        if all(name in entry["losses"] for entry in (*here, *there)) and "soup" not in name
    ]
    picked = [("the recommended", [entry["log_loss"] for entry in here], [entry["log_loss"] for entry in there])]
    picked += [(name, *([entry["losses"][name] for entry in side] for side in (here, there))) for name in names]
    table = []
    for name, own, other in picked:
        goal = "no higher: the interval of the difference reaches 0" if name == "the recommended" else None
        unit, holds = f"nats, {len(own)} turns", None
        if other:
            differences = np.subtract(own, other).tolist()
            lowest, _ = interval(differences) or (differences[0], differences[0])
            unit = f"nats, difference {mean_with_interval(differences, '+.4f')}"
            holds = lowest <= 0 if goal else None
        beside = f"{np.mean(other):.4f} at {commit}" if other else None
        table.append(row(f"test log-loss of {name}", float(np.mean(own)), unit, goal, holds, beside))
    return table


if __name__ == "__main__":
    sys.exit(main())
