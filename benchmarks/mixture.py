"""Mixture of experts: what running two of five networks saves, and what it costs in accuracy.

    python benchmarks/mixture.py               crops of scikit-learn's two sample images; handwritten digits
    python benchmarks/mixture.py --data DIR    your own images, and the splits that were prepared of them
    python benchmarks/mixture.py --quick       tiny networks and a poor zoo, not the form to report

Time: five full-size networks with random weights, batches of 32, one thread, all in memory. A random gate, spread
evenly over the experts, reads the cheapest; rows are grouped by expert as the product groups them. All five and the
chosen ones take turns batch by batch. Accuracy: mixtures fitted on the honest rows of prepared splits (see
benchmarks/prepare.py; one is made where there is none) and scored on their test rows. The last line of the output is
one JSON object.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import prepare
from extraction import BATCH, PIXELS, lay_out
from reporting import report, row

PROJECT = Path(__file__).resolve().parents[1]
EXPERTS = ("CustomConvNeXt", "CustomMobileOne", "CustomRegNet", "CustomResNetMish", "CustomSwinTransformer")
TOP_K, CLASSES, WIDTH = 2, 10, 16
MOST, POINTS = 0.55, 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Run all rows; returns 0, also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="mixture.py", description="What a sparse mixture of experts saves and costs.")
    parser.add_argument("--data", metavar="DIR", type=Path, help="folder with one folder of images per class")
    parser.add_argument("--quick", action="store_true", help="tiny networks, a zoo of two poor ones")
    options = parser.parse_args(argv)
    found = prepare.ready(options.data, quick=options.quick)
    if found is None:
        return 1
    sys.path.insert(0, str(PROJECT))
    import torch

    torch.set_num_threads(1)
    size, batches, turns = ("tiny", 1, 1) if options.quick else ("full", 2, 2)
    rows = [*time_rows(size, batches, turns, options.data), *accuracy_rows(found)]
    report("mixture", rows, quick=options.quick, packages=("torch", "timm", "numpy"), **found.facts())
    return 0


# time ----------------------------------------------------------------------------------------------------------------
def time_rows(size: str, batches: int, turns: int, data: Path | None) -> list[dict[str, Any]]:
    """The chosen experts against all five, and against the mean cost of those chosen."""
    from utils.combiners.routing import run_sparse
    from utils.moe_methods import MixtureOfExperts

    answer, pictures = _opened(size), _pictures(batches * BATCH, PIXELS[size], data)
    for member in range(len(EXPERTS)):
        answer(member, pictures[0][:2])  # warms up
    reader = int(np.argmin([_clocked(answer, member, pictures[0][:4])[0] for member in range(len(EXPERTS))]))
    gate = even_gate(np.concatenate([answer(reader, pixels) for pixels in pictures]), reader)
    mixture, shape = MixtureOfExperts(model=gate), (len(EXPERTS), BATCH, CLASSES)

    def chosen(pixels: Any) -> np.ndarray:
        return run_sparse(mixture, lambda member, rows: answer(member, pixels[rows]), shape)[1]

    shares = np.stack([chosen(pixels).mean(axis=1) for pixels in pictures])  # and warms up for these sizes
    alone, sparse = np.full((batches, len(EXPERTS), 2), np.inf), np.full((batches, 2), np.inf)
    for turn in range(turns):
        for number, pixels in enumerate(pictures):
            sparse[number] = np.minimum(sparse[number], _clocked(chosen, pixels))
            spent = [_clocked(answer, member, pixels) for member in range(len(EXPERTS))]
            alone[number] = np.minimum(alone[number], spent)
            print(f"turn {turn}, batch {number}: {sparse[number][0]:.2f} s", file=sys.stderr, flush=True)
    every, own, ideal = alone.sum(axis=(0, 1)), sparse.sum(axis=0), (shares[:, :, None] * alone).sum(axis=(0, 1))
    ratio, grouped, milliseconds = own / every, own / ideal, 1000 / (batches * BATCH)
    what = f"top {TOP_K} of {len(EXPERTS)} {size} networks, {PIXELS[size]} px, batch {BATCH}"
    named = zip(EXPERTS, shares.mean(axis=0), strict=True)
    spread = ", ".join(f"{name.removeprefix('Custom')} {share:.0%}" for name, share in named)
    beside = f"{milliseconds * own[0]:.1f} ms, all {milliseconds * every[0]:.1f} ms; CPU time {ratio[1]:.3f}"
    mean = f"{milliseconds * ideal[0]:.1f} ms in full batches; CPU time {grouped[1]:.3f}"
    return [
        row(f"{what}: time", ratio[0], "of running all", f"at most {MOST}", bool(ratio[0] <= MOST), beside),
        row(f"{what}: time", grouped[0], "of the mean cost of those run", None, None, mean),
        row(f"{what}: run", float(shares.sum(axis=1).mean()), "networks per image", None, None, spread),
    ]


def _opened(size: str) -> Callable[[int, Any], np.ndarray]:
    """Five networks in memory: (member, pixels) -> logits."""
    import torch

    import utils  # noqa: F401  (mounts BASE-BACK)
    from models import create_custom_backbone
    from utils.networks.construction import evaluation_format

    networks, layouts = [], []
    for number, name in enumerate(EXPERTS):
        torch.manual_seed(number)
        network = create_custom_backbone(name, CLASSES, size=size, img_size=PIXELS[size]).eval()
        layouts.append(evaluation_format(network))
        networks.append(network.to(memory_format=layouts[-1]))

    def answer(member: int, pixels: Any) -> np.ndarray:
        with torch.inference_mode():
            return networks[member](pixels.to(memory_format=layouts[member])).numpy()

    return answer


def even_gate(logits: np.ndarray, reader: int) -> Any:
    """A gate with random weights whose scores on the reader's logits (N, C) have mean 0 and deviation 1 per expert."""
    from utils.combiners.gates import KIND, SparseGate
    from utils.combiners.stacking_features import features

    rng = np.random.default_rng(0)
    seen = features(logits[None], KIND)
    first = rng.normal(size=(logits.shape[1], WIDTH)) / seen.std(axis=0)[:, None]
    bias = -seen.mean(axis=0) @ first
    last = rng.normal(size=(WIDTH, len(EXPERTS)))
    raw = np.maximum(seen @ first + bias, 0) @ last
    last, last_bias = last / raw.std(axis=0), -raw.mean(axis=0) / raw.std(axis=0)
    first, bias, last, last_bias = (values.astype(np.float32) for values in (first, bias, last, last_bias))
    return SparseGate(np.arange(len(EXPERTS)), reader, TOP_K, (first, last), (bias, last_bias))


def _pictures(count: int, pixels: int, data: Path | None) -> list[Any]:
    """Normalised images float32 (32, 3, H, W), batch by batch."""
    import torch

    from utils.core.artifacts import FileDigests
    from utils.networks.preprocessing import Preprocessing
    from utils.predictions import image_splits

    with tempfile.TemporaryDirectory(prefix="mixture-") as name:
        place = lay_out(Path(name), count, 300 if pixels > 64 else 64, data)
        images = image_splits.list_images(place / "split_dataset", "val", FileDigests(place / "digests.json"))
        preprocessing = Preprocessing.of_base_pipeline(pixels)
        decoded = image_splits.open_images(images, preprocessing, image_cache=place / "cache", threads=1)
        order = np.random.default_rng(1).permutation(count)  # they are sorted by class
        return [
            image_splits.normalise(part, preprocessing) for part in torch.from_numpy(decoded.crops(order)).split(BATCH)
        ]


def _clocked(once: Callable[..., Any], *arguments: Any) -> np.ndarray:
    """Seconds of wall time and of the processor."""
    start, spent = time.perf_counter(), time.process_time()
    once(*arguments)
    return np.array([time.perf_counter() - start, time.process_time() - spent])


# accuracy ------------------------------------------------------------------------------------------------------------
def accuracy_rows(found: prepare.Prepared) -> list[dict[str, Any]]:
    """Test accuracy of the sparse mixture against the dense one and a cascade, mean over the splits."""
    outcomes = []
    for path in found.files:
        start = time.process_time()
        outcomes.append(outcome(prepare.read(path)))
        print(f"{path.stem}: {time.process_time() - start:.0f} s of CPU", file=sys.stderr, flush=True)
    mean = {way: np.mean([each[way] for each in outcomes], axis=0) for way in outcomes[0]}
    splits = f"{len(outcomes)} split{'s' * (len(outcomes) > 1)} of {found.folder.name}"
    behind = 100 * (mean["dense"][0] - mean["moe"][0])
    rows = [
        row(
            f"{splits}: test accuracy of the sparse mixture",
            behind,
            "points below the dense one",
            f"at most {POINTS}",
            bool(behind <= POINTS),
            f"{mean['moe'][0]:.4f} against {mean['dense'][0]:.4f}",
        )
    ]
    for way, (accuracy, loss, experts) in mean.items():
        beside = f"log-loss {loss:.4f}, {experts:.2f} networks per image"
        rows.append(row(f"{splits}: {way}", float(accuracy), "test accuracy", None, None, beside))
    return rows


def outcome(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float, float]]:
    """{way: test accuracy, test log-loss, networks run per test image} of one split."""
    from utils.building.ensembles import COMBINERS
    from utils.combiners.protocol import MemberFacts
    from utils.combiners.routing import routed_members
    from utils.core.config_file import load_config
    from utils.numeric.metrics import accuracy, log_loss

    config = load_config(prepare.CONFIG, overrides=[f"runs.moe.top_k={TOP_K}", f"runs.moe.num_experts={len(EXPERTS)}"])
    names = tuple(arrays["members"].tolist())
    facts = MemberFacts(names, *(np.full(len(names), np.nan) for _ in range(3)))
    moe, cascade = (COMBINERS[name].configured(config, facts) for name in ("moe", "cascade"))
    found = {}
    for way, recipe in {"moe": moe, "dense": moe.dense(), "cascade": cascade}.items():
        recipe.fit(arrays["logits"], arrays["labels"], arrays["fold"])
        probabilities, truth = recipe.predict_proba(arrays["test_logits"]), arrays["test_labels"]
        experts = routed_members(recipe, arrays["test_logits"]).sum(axis=0).mean()
        found[way] = (accuracy(probabilities, truth), log_loss(probabilities, truth), float(experts))
    return found


if __name__ == "__main__":
    sys.exit(main())
