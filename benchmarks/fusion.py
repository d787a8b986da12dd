"""What training fusion heads costs beyond its arithmetic, how much memory it takes, and the closed-form shared space.

    python benchmarks/fusion.py                 random embeddings and networks; crops of scikit-learn's two photographs
    python benchmarks/fusion.py --data DIR      your own images: a folder with one folder of images per class
    python benchmarks/fusion.py --quick         a smaller form, not the one to report

Heads are trained on one thread, the ways by turns; the lowest processor seconds of each count, so that a busy machine
disturbs little. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import extraction
from reporting import clean_environment, report, row

CLASSES, MEMBERS = 13, 15
OUTSIDE = 5.0  # per cent of a training that may pass outside forward, backward and step
MORE_MEMORY = 1.10
SECONDS_OF_CCA = 20.0
HEADS = {"narrow": (240, (64,)), "wide": (1024, (512, 256))}
"""Numbers that a head reads, and its hidden widths."""
TURNS = 15


def main(argv: Sequence[str] | None = None) -> int:
    """Run all rows; returns 0, also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="fusion.py", description="Fusion heads: time, memory, shared space.")
    parser.add_argument("--data", metavar="DIR", type=Path, help="your own images in one folder per class")
    parser.add_argument("--quick", action="store_true", help="few rows and small networks: does it run at all")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--names", nargs="*", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.part:
        print(json.dumps(memory(options.folder, options.names)))
        return 0
    sys.path.insert(0, str(extraction.PROJECT))
    rows = []
    for name, (width, hidden) in HEADS.items():
        rows += head_rows(name, width, hidden, rows=1000 if options.quick else 10_000, epochs=2 if options.quick else 5)
    rows.append(shared_space_row(rows=1000 if options.quick else 10_000, width=64 if options.quick else 256))
    with tempfile.TemporaryDirectory(prefix="fusion-") as folder:
        rows.append(memory_row(Path(folder), "tiny" if options.quick else "full", options.data))
    report("fusion", rows, quick=options.quick, packages=("torch", "numpy", "scipy", "scikit-learn"))
    return 0


# heads ---------------------------------------------------------------------------------------------------------------
def head_rows(name: str, width: int, hidden: tuple[int, ...], *, rows: int, epochs: int) -> list[dict[str, Any]]:
    """A head trained on rows in memory: seconds outside its arithmetic, and the same through a DataLoader."""
    import torch

    from utils.combiners.fusion_learner import WEIGHT_DECAY, HeadLearner
    from utils.combiners.trained_heads import HeadShape
    from utils.predictions.rows import MemberOutputs

    inputs, labels = _embeddings(rows + rows // 5, width)
    fresh, truth, inputs, labels = inputs[rows:], labels[rows:], inputs[:rows], labels[:rows]
    shape = HeadShape("concat_mlp", (width,), hidden, CLASSES, 0)
    options = {"epochs": epochs, "lr": 0.001, "weight_decay": WEIGHT_DECAY, "seed": 0}

    learner = HeadLearner("concat_mlp", hidden, epochs, options["lr"], 0.3, 0.0, seeds=1, seed=0)
    outputs = MemberOutputs(np.empty((1, rows, CLASSES), dtype=np.float32), (inputs.numpy(),))

    def ours() -> Any:
        return learner.fit(outputs, labels.numpy(), {"rank": 0, "epochs": epochs}).modules()[0]

    def loader() -> Any:
        return _through_loader(lambda: shape.head(0.3), inputs, labels, **options)

    def score(module: Any) -> float:
        with torch.no_grad():
            return float((module.eval()(fresh).argmax(dim=1) == truth).float().mean())

    def bare() -> Any:
        return _arithmetic(lambda: shape.head(0.3), inputs, labels, **options)

    ways = {"ours": ours, "loader": loader, "bare": bare}
    seconds, modules = dict.fromkeys(ways, float("inf")), {}
    for turn in range(TURNS + 1):  # the first warms up
        for way, run in ways.items():
            start = time.thread_time()
            modules[way] = run()
            if turn:
                seconds[way] = min(seconds[way], time.thread_time() - start)
    own, other = seconds["ours"], seconds["loader"]
    outside = 100 * (1 - seconds["bare"] / own)
    scores = {way: score(module) for way, module in modules.items()}
    what = f"{name} head, {width} -> {' -> '.join(map(str, hidden))} -> {CLASSES}, {rows:,} rows, {epochs} epochs"
    beside = f"{other:.2f} s; correct {100 * scores['ours']:.1f}% and {100 * scores['loader']:.1f}%"
    return [
        row(
            f"{what}: outside forward, backward and step",
            outside,
            f"% of {own:.2f} s",
            f"at most {OUTSIDE:g}",
            outside <= OUTSIDE,
            None,
        ),
        row(f"{what}: time", own / other, "times that of a DataLoader of a TensorDataset", None, None, beside),
    ]


def _embeddings(rows: int, width: int) -> tuple[Any, Any]:
    """Rows (N, W) of classes that overlap, and their labels."""
    import torch

    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, rows)
    values = rng.normal(size=(CLASSES, width))[labels] / width**0.25 + rng.normal(size=(rows, width))
    return torch.from_numpy(values.astype(np.float32)), torch.from_numpy(labels)


def _arithmetic(
    make: Callable[[], Any], inputs: Any, labels: Any, *, epochs: int, lr: float, weight_decay: float, seed: int
) -> Any:
    """Forward, loss, backward and step as often as a training has them, on batches that lie ready in memory."""
    import torch
    from torch import nn

    from utils.numeric.batched_training import BATCH_SIZE

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    module = make().train()
    count = len(inputs) // BATCH_SIZE
    batches = list(zip(inputs.tensor_split(count), labels.tensor_split(count), strict=True))
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    for _ in range(epochs):
        for values, truth in batches:
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(module(values), truth).backward()
            optimizer.step()
    torch.set_num_threads(threads)
    return module


def _through_loader(
    make: Callable[[], Any], inputs: Any, labels: Any, *, epochs: int, lr: float, weight_decay: float, seed: int
) -> Any:
    """The same training as people write it: a DataLoader of a TensorDataset, a scheduler, the default optimizer."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from utils.numeric.batched_training import BATCH_SIZE

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    module = make().train()
    batches = DataLoader(TensorDataset(inputs, labels), batch_size=BATCH_SIZE, shuffle=True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    for _ in range(epochs):
        for values, truth in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(values), truth).backward()
            optimizer.step()
            schedule.step()
    torch.set_num_threads(threads)
    return module


# the shared space ----------------------------------------------------------------------------------------------------
def shared_space_row(*, rows: int, width: int) -> dict[str, Any]:
    """Generalised canonical correlations of fifteen members that share some of what they say."""
    from utils.combiners.embedding_maps import LEAST_RIDGE, SHARED
    from utils.numeric.cca import shared_space

    rng = np.random.default_rng(0)
    common = rng.normal(size=(rows, 40))
    views = [
        (common @ rng.normal(size=(40, width)) + 4 * rng.normal(size=(rows, width))).astype(np.float32)
        for _ in range(MEMBERS)
    ]
    start, used = time.perf_counter(), time.process_time()
    found = shared_space(views, SHARED, min_shrinkage=LEAST_RIDGE)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    assert found.correlations[:40].min() > found.correlations[40:].max(), "the forty shared variates come first"
    what = f"generalised CCA, {MEMBERS} members x {rows:,} rows x {width} numbers, {SHARED} variates"
    unit = f"s ({used:.1f} s of processors)"
    return row(what, seconds, unit, f"under {SECONDS_OF_CCA:g}", seconds < SECONDS_OF_CCA, None)


# memory --------------------------------------------------------------------------------------------------------------
def memory_row(folder: Path, size: str, data: Path | None) -> dict[str, Any]:
    """Peak of `fusion-train` over networks with random weights: fifteen beside three that include the largest."""
    # Few photographs of small networks would do, were not chance names of classes exchanged among fifteen of them.
    photographs, pixels = (extraction.BATCH, 300) if size == "full" else (200, 64)
    workspace = extraction.lay_out(folder / size, photographs, pixels, data)
    extraction.part("save", workspace, [size, "0", *extraction.ARCHITECTURES])
    peaks = [_part(workspace, names)["megabytes"] for names in (extraction.LARGEST, extraction.ARCHITECTURES)]
    more = peaks[1] / peaks[0] if all(peaks) else None
    holds = None if more is None else more <= MORE_MEMORY
    what = f"fusion-train, peak memory of {len(extraction.ARCHITECTURES)} {size} members"
    text = f"of that of {len(extraction.LARGEST)} ({peaks[0]} MB)"
    return row(what, more, text, f"at most {MORE_MEMORY}", holds, f"{peaks[1]} MB")


def _part(workspace: Path, names: Sequence[str]) -> dict[str, Any]:
    call = [sys.executable, __file__, "--part", "memory", "--folder", str(workspace), "--names", *names]
    environment = clean_environment() | {"DBT_BASE_DIR": str(workspace), "PYTHONPATH": str(extraction.PROJECT)}
    done = subprocess.run(call, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the part memory of the benchmark ended with {done.returncode}; see the messages above")
    return json.loads(done.stdout.splitlines()[-1])


def memory(workspace: Path, names: Sequence[str]) -> dict[str, Any]:
    """Megabytes that `fusion-train` of the named members takes above the level after imports; None: not measured."""
    import sklearn.covariance  # noqa: F401  (so that what is imported later does not count)
    import torch  # noqa: F401

    from utils import base_back
    from utils.building import build_commands
    from utils.core.config_file import load_config
    from utils.discovery import discover

    shutil.rmtree(workspace / "ensembles", ignore_errors=True)
    shutil.rmtree(workspace / "image_cache", ignore_errors=True)
    overrides = [f"dataset.batch_size={extraction.BATCH}", "device=cpu", "runs.fusion.enable=true"]
    overrides += [f"backbones.include=[{','.join(names)}]", "runs.fusion.fusion_config.epochs=2"]
    config, place = load_config(extraction.CONFIG, overrides=overrides), base_back.open_workspace()
    discover.discover(config, place)
    base_back.load("models")
    status = Path("/proc/self/status")
    if not status.is_file():
        return {"megabytes": None}
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    level = extraction._kilobytes(status, "VmRSS")
    build_commands.fusion_train(config, place)
    return {"megabytes": round((extraction._kilobytes(status, "VmHWM") - level) / 1000)}


if __name__ == "__main__":
    sys.exit(main())
