"""The whole on five points: 3, 6 and 12 trained members at 1,000 images, 6 members at 500 and at 1,797.

    python benchmarks/pipeline.py            scikit-learn's handwritten digits; trains the members once, then 10 minutes
    python benchmarks/pipeline.py --quick    two members on 120 and 240 images, not the form to report
    python benchmarks/pipeline.py --against 2d52cc4    12 members at 1,000 images, beside the same of another commit

Small members (32 px, two folds) are trained once per number of images and kept in `benchmarks/zoo/pipeline`, out of
git. At each point `pipeline` runs into an empty folder and then once more, every family on that can be built, without
tflite. How the time grows with members and with images is the slope of its logarithm. The last line of the output is
one JSON object.

`--against` takes another commit's files from git and runs both pipelines in turn, each with its own configuration of
the demo, on the same members; the recommended ensembles' test log-losses stand beside the ratios of the times and of
the processor seconds, which other programs change less.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reporting import clean_environment, report, row

PROJECT = Path(__file__).resolve().parents[1]
CONFIG = Path("configs", "digits_demo.yaml")
ZOO = PROJECT / "benchmarks" / "zoo" / "pipeline"
BACKBONES = (
    *("CustomConvNeXt", "CustomViTHybrid", "CustomMobileOne", "CustomResNetMish", "CustomRegNet", "CustomGhostNetV2"),
    *("CustomEfficientNetV4", "CustomDenseNetHybrid", "CustomDeiTStyle", "CustomInceptionV4", "CustomCSPDarkNet"),
    "CustomDynamicConvNet",
)
POINTS = ((3, 1000), (6, 1000), (12, 1000), (6, 500), (6, 1797))
QUICK_POINTS = ((2, 120), (3, 120))  # a fusion needs two members
FORMATS = "exports.formats=[state_dict,checkpoint,torchscript,onnx]"
ALLOWED = "at most 1 + 3% of the first, no torch"
MEMBERS, IMAGES, TURNS = 12, 1000, 2  # beside another commit
LEFT_OUT = 4  # finished without some requested part


def main(argv: Sequence[str] | None = None) -> int:
    """Run all points; returns 0, also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="pipeline.py", description="The whole pipeline on five points.")
    parser.add_argument("--quick", action="store_true", help="few members and images, not the form to report")
    parser.add_argument("--against", metavar="COMMIT", help="run this commit's pipeline in turn with that of the files")
    options = parser.parse_args(argv)
    points = QUICK_POINTS if options.quick else POINTS
    folder = ZOO.with_name("pipeline-quick") if options.quick else ZOO
    if options.against:
        return compare(options.against, folder, quick=options.quick)
    for images in sorted({images for _, images in points}):
        members = BACKBONES[: max(count for count, own in points if own == images)]
        train(folder / f"digits{images}", images, members, epochs=1 if options.quick else 4)
    found = [measure(folder / f"digits{images}", count) | {"images": images} for count, images in points]
    report("pipeline", rows(found), quick=options.quick, packages=("torch", "numpy", "scikit-learn"), points=found)
    return 0


def compare(commit: str, folder: Path, *, quick: bool) -> int:
    """Run this pipeline and that of another commit in turn; returns 0, also where a goal is missed."""
    members, images = QUICK_POINTS[0] if quick else (MEMBERS, IMAGES)
    workspace = folder / f"digits{images}"
    train(workspace, images, BACKBONES[:members], epochs=1 if quick else 4)
    runs: dict[str, list[dict[str, Any]]] = {"here": [], commit: []}
    with tempfile.TemporaryDirectory(prefix="pipeline-") as name:
        projects = {"here": PROJECT, commit: project_of(commit, Path(name, "project"))}
        for turn in range(1 if quick else TURNS):
            for version, project in projects.items():
                output = Path(name, f"output-{version}-{turn}")
                run = pipeline(workspace, output, BACKBONES[:members], project=project)
                name, losses = recommended(output)
                runs[version].append(run | {"log_loss": losses[name]})
    table = comparison_rows(f"{members} members, {images:,} images", runs["here"], runs[commit], commit)
    packages = ("torch", "numpy", "scikit-learn")
    report("pipeline-against", table, quick=quick, packages=packages, commit=commit, runs=runs)
    return 0


def comparison_rows(
    size: str, here: Sequence[dict[str, Any]], there: Sequence[dict[str, Any]], commit: str
) -> list[dict[str, Any]]:
    """Median seconds and the recommended ensembles' log-loss, beside those of the other commit."""
    (seconds, seconds_there), (cpu, cpu_there), (loss, loss_there) = (
        [statistics.median(run[key] for run in runs) for runs in (here, there)]
        for key in ("seconds", "cpu_seconds", "log_loss")
    )
    ratio = seconds / seconds_there
    other = f"{loss_there:.4f} at {commit}"
    return [
        row(f"{size}: pipeline", ratio, "of the other's time", "at most 0.5", ratio <= 0.5, None),
        row(f"{size}: seconds", seconds, "s", None, None, f"{seconds_there:.1f} s at {commit}"),
        row(
            f"{size}: processor seconds",
            cpu / cpu_there,
            "of the other's",
            None,
            None,
            f"{cpu:.0f} s, {cpu_there:.0f} s",
        ),
        row("recommended ensemble, test log-loss", loss, "nats", "no higher", loss <= loss_there, other),
    ]


def project_of(commit: str, folder: Path) -> Path:
    """The files of a commit of this repository, below `folder`."""
    command = ["git", "archive", "--format=tar", commit]
    archive = subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def recommended(output: Path) -> tuple[str, dict[str, float]]:
    """Name of the recommended ensemble, and {model: log-loss on test}, of the ranking below `output`."""
    ranking = json.loads(next(output.rglob("ranking.json")).read_text(encoding="utf-8"))
    return ranking["recommended"]["name"], {entry["name"]: entry["log_loss"] for entry in ranking["rows"]}


def rows(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds of both runs at each point, and their growth."""
    table = []
    for point in found:
        size = f"{point['members']} members, {point['images']:,} images"
        failed = f"; left out: {'; '.join(point['left_out'])}" if point["left_out"] else ""
        table.append(row(f"{size}: pipeline", point["first"], "s", None, None, f"{point['stages']} stages{failed}"))
        holds = point["second"] <= 1 + 0.03 * point["first"] and not point["torch"]
        torch_use = "imported torch" if point["torch"] else "without torch"
        table.append(row(f"{size}: second run", point["second"], f"s, {torch_use}", ALLOWED, holds, None))
    for name in ("members", "images"):
        slope = growth(found, name)
        if slope is not None:
            holds = slope <= 1.1
            table.append(
                row(f"growth with {name}", slope, "power of them that time follows", "at most 1.1", holds, None)
            )
    return table


def growth(found: Sequence[dict[str, Any]], name: str) -> float | None:
    """Slope of log seconds over log `name`, on the most points that are equal otherwise; None for fewer than two."""
    import numpy as np

    other = "images" if name == "members" else "members"
    alike = [[point for point in found if point[other] == value] for value in {point[other] for point in found}]
    line = max(alike, key=len)
    if len(line) < 2:
        return None
    slope, _ = np.polyfit(np.log([point[name] for point in line]), np.log([point["first"] for point in line]), 1)
    return float(slope)


def train(workspace: Path, images: int, members: Sequence[str], *, epochs: int) -> None:
    """A workspace with so many digits and these networks; what is there is kept."""
    data = workspace / "Data"
    if not data.is_dir():
        sys.path.insert(0, str(PROJECT))
        from utils.operations.demo import write_digits

        everything = ZOO.parent / "images"
        workspace.mkdir(parents=True, exist_ok=True)
        write_digits(everything)
        partial = workspace / "Data.partial"
        shutil.rmtree(partial, ignore_errors=True)
        for path in sorted(everything.glob("*/*.png"), key=lambda path: path.name)[:images]:
            (partial / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, partial / path.parent.name / path.name)
        partial.rename(data)
    command = [
        *(sys.executable, str(PROJECT / "BASE-BACK" / "src" / "main.py"), "--workspace", str(workspace)),
        *("--stages", "split", "kfold", "train", "--size", "tiny", "--folds", "2", "--augment", "no_flip"),
        *("--epochs-head", "1", "--epochs-finetune", str(epochs), "--backbones", *members),
    ]
    start = time.monotonic()
    done = subprocess.run(command, env=clean_environment(), stdout=sys.stderr, check=False, cwd=PROJECT)
    if done.returncode not in (0, LEFT_OUT):
        raise SystemExit(f"training {len(members)} members on {images} images ended with {done.returncode}")
    print(f"{workspace}: members ready after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def measure(workspace: Path, count: int) -> dict[str, Any]:
    """Seconds of `pipeline` into an empty folder and of a second run, start of Python included."""
    with tempfile.TemporaryDirectory(prefix="pipeline-") as output:
        first, second = (pipeline(workspace, Path(output), BACKBONES[:count]) for _ in range(2))
    return {
        "members": count,
        "first": first["seconds"],
        "second": second["seconds"],
        "torch": second["torch"],
        "stages": first["stages"],
        "left_out": first["left_out"],
    }


def pipeline(workspace: Path, output: Path, members: Sequence[str], *, project: Path = PROJECT) -> dict[str, Any]:
    """One run of the program in `project`: seconds, whether torch was imported, stages, and what was left out."""
    arguments = [
        *(
            "pipeline",
            "--json",
            "--quiet",
            "--config",
            str(project / CONFIG),
            "--device",
            "cpu",
            "--workspace",
            str(workspace),
        ),
        *("--output", str(output), "--set", f"backbones.include=[{','.join(members)}]", "--set", FORMATS),
    ]
    code = (
        "import sys; import ensemble_orchestrator as program; code = program.main(sys.argv[1:]); "
        "print('torch' in sys.modules); sys.exit(code)"
    )
    start, cpu_start = time.perf_counter(), cpu_seconds_of_children()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=clean_environment() | {"PYTHONPATH": str(project)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        cwd=project,
    )
    seconds, cpu_seconds = time.perf_counter() - start, cpu_seconds_of_children() - cpu_start
    if done.returncode not in (0, LEFT_OUT):
        raise SystemExit(f"pipeline with {len(members)} members ended with {done.returncode}; see the messages above")
    *_, document, torch = done.stdout.splitlines()
    results = json.loads(document)
    print(f"{len(members):3} members, {workspace.name}: {seconds:7.2f} s", file=sys.stderr, flush=True)
    stages = len([name for name in results if name != "failures"])
    facts = {"torch": torch == "True", "stages": stages, "left_out": results["failures"]}
    return {"seconds": seconds, "cpu_seconds": cpu_seconds} | facts


def cpu_seconds_of_children() -> float:
    """Processor seconds of all processes that have ended and were waited for, with their own children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
