"""What looking at trained networks costs beyond running them: time, memory, a second run, discovery.

    python benchmarks/extraction.py                 photographs: crops of scikit-learn's two sample images
    python benchmarks/extraction.py --data DIR      your own: a folder with one folder of images per class
    python benchmarks/extraction.py --quick         a smaller form, not the one to report

Networks are the fifteen bundled architectures with random weights, saved as checkpoints in a temporary workspace. The
last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from reporting import clean_environment, report, row

PROJECT = Path(__file__).resolve().parents[1]
CONFIG = PROJECT / "configs" / "votes.yaml"
ORCHESTRATOR = PROJECT / "ensemble_orchestrator.py"
PIXELS = {"full": 224, "tiny": 32}
BATCH = 32
# The three of the memory row: the largest file (95 MB), and the two whose batches take most memory (1.4 and 1.5 GB).
LARGEST = ("CustomSwinTransformer", "CustomCoAtNet", "CustomMaxViT")
ARCHITECTURES = (
    "CustomCSPDarkNet",
    "CustomCoAtNet",
    "CustomConvNeXt",
    "CustomDeiTStyle",
    "CustomDenseNetHybrid",
    "CustomDynamicConvNet",
    "CustomEfficientNetV4",
    "CustomGhostNetV2",
    "CustomInceptionV4",
    "CustomMaxViT",
    "CustomMobileOne",
    "CustomRegNet",
    "CustomResNetMish",
    "CustomSwinTransformer",
    "CustomViTHybrid",
)
QUICK = ("CustomGhostNetV2", "CustomRegNet", *LARGEST)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all rows, each in processes of its own; returns 0, also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="extraction.py", description="What streaming costs beyond forward passes.")
    parser.add_argument("--data", metavar="DIR", type=Path, help="folder with one folder of images per class")
    parser.add_argument("--quick", action="store_true", help="a smaller form: five networks, 40 photographs")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--names", nargs="*", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.part:
        print(json.dumps(PARTS[options.part](options.folder, options.names)))
        return 0
    if options.data is not None and not options.data.is_dir():
        print(f"--data {options.data}: no such folder; expected one folder of images per class in it", file=sys.stderr)
        return 1
    names = QUICK if options.quick else ARCHITECTURES
    photographs = 40 if options.quick else 200
    with tempfile.TemporaryDirectory(prefix="extraction-") as folder:
        rows = [
            *full_rows(Path(folder), names, photographs, options.data),
            *tiny_rows(Path(folder), names, options.data),
            discovery_row(Path(folder), ARCHITECTURES, 20 if options.quick else 200, options.data),
        ]
    report("extraction", rows, quick=options.quick, packages=("torch", "timm", "numpy", "pillow"))
    return 0


# rows ----------------------------------------------------------------------------------------------------------------
def full_rows(folder: Path, names: Sequence[str], photographs: int, data: Path | None) -> list[dict[str, Any]]:
    """Time against bare forward passes, and memory of all members against that of three."""
    workspace = lay_out(folder / "full", photographs, 300, data)
    part("save", workspace, ["full", "0", *names])
    found = part("full", workspace, names)
    allowed = 1.10
    ratio = found["product"] / (found["decode"] + found["forward"])
    rows = [
        row(
            f"{len(names)} full members, {found['images']} photographs, {PIXELS['full']} px: streaming",
            ratio,
            f"of decode once + bare forward passes ({found['product']:.1f} s)",
            f"at most {allowed}",
            ratio <= allowed,
            f"{found['decode']:.1f} s + {found['forward']:.1f} s",
        ),
        row("outside its own forward passes (load, decode, write)", found["outside"], "s", None, None, None),
    ]
    shutil.rmtree(workspace / "split_dataset")
    lay_out(workspace, BATCH, 300, data)
    few = [name for name in LARGEST if name in names]
    peaks = [part("memory", workspace, chosen)["megabytes"] for chosen in (few, names)]
    more = peaks[1] / peaks[0] if all(peaks) else None
    holds = None if more is None else more <= allowed
    text = f"of that of {len(few)} ({peaks[0]} MB)"
    rows.append(row(f"peak memory of {len(names)} members", more, text, f"at most {allowed}", holds, f"{peaks[1]} MB"))
    shutil.rmtree(workspace)
    return rows


def tiny_rows(folder: Path, names: Sequence[str], data: Path | None) -> list[dict[str, Any]]:
    """Overhead per small member, and a second run that finds everything."""
    workspace = lay_out(folder / "tiny", 200, 64, data)
    part("save", workspace, ["tiny", "0", *names])
    found = part("full", workspace, names)
    overhead = 1000 * (found["product"] - found["decode"] - found["forward"]) / len(names)
    shutil.rmtree(workspace / "ensembles")
    command("discover", workspace)
    shutil.rmtree(workspace / "image_cache")
    first, second = (command("build-ensemble", workspace) for _ in range(2))
    allowed = 1 + 0.03 * first["seconds"]
    torch_use = "without torch" if not second["torch"] else "and it imported torch"
    holds = second["seconds"] <= allowed and not second["torch"]
    return [
        row(f"{len(names)} tiny members: overhead per member", overhead, "ms", "under 150", overhead < 150, None),
        row(
            "build-ensemble again, from the cache",
            second["seconds"],
            f"s, {torch_use}",
            f"at most {allowed:.2f} (1 s + 3% of the first)",
            holds,
            f"first {first['seconds']:.1f} s",
        ),
    ]


def discovery_row(folder: Path, names: Sequence[str], megabytes: int, data: Path | None) -> dict[str, Any]:
    """Discovery of large checkpoints whose digests are known."""
    workspace = lay_out(folder / "discovery", 8, 64, data)
    part("save", workspace, ["tiny", str(megabytes), *names])
    first, second = (command("discover", workspace)["seconds"] for _ in range(2))
    size = sum(path.stat().st_size for path in (workspace / "checkpoints").iterdir()) / 1e9
    what = f"discover again, {len(names)} members, {size:.1f} GB of checkpoints"
    return row(what, second, "s", "under 2", second < 2, f"first {first:.1f} s, {size / first:.2f} GB/s")


# a workspace ---------------------------------------------------------------------------------------------------------
def lay_out(workspace: Path, photographs: int, pixels: int, data: Path | None) -> Path:
    """Write `split_dataset`: the photographs in val, two per class in train and in test; returns the workspace."""
    images = _own_images(data, photographs) if data else _crops(photographs, pixels)
    places = {"val": photographs, "train": 4, "test": 4}
    for split, count in places.items():
        for number in range(count):
            name, write = next(images)
            target = workspace / "split_dataset" / split / name / f"{number:05d}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            write(target)
    return workspace


def _crops(photographs: int, pixels: int) -> Any:
    """(class, writer) of ever other crops of the two photographs, by turns.

    Each class holds crops of both: were it one photograph, a network with random weights could tell them apart with the
    names exchanged, and the product would refuse it.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_image

    rng = np.random.default_rng(photographs)
    scenes = [load_sample_image(f"{name}.jpg") for name in ("china", "flower")]
    while True:
        for name, scene in itertools.product(("first", "second"), scenes):
            top, left = (int(rng.integers(0, length - pixels)) for length in scene.shape[:2])
            crop = Image.fromarray(scene[top : top + pixels, left : left + pixels])
            yield name, lambda path, crop=crop: crop.save(path, quality=92)


def _own_images(data: Path, photographs: int) -> Any:
    """(class, writer) of the images in class folders, by turns; again from the start where there are too few.

    Each class is given images of all, for the same reason as the crops.
    """
    suffixes = (".jpg", ".jpeg", ".png", ".bmp")
    classes = sorted(path for path in data.iterdir() if path.is_dir())
    files = {folder.name: sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes) for folder in classes}
    files = {name: found for name, found in files.items() if found}
    if len(files) < 2:
        raise SystemExit(f"--data {data}: {len(files)} class folder(s) with images; two are needed")
    number = 0
    while True:
        for turn, name in enumerate(files):
            found = list(files.values())[(turn + number) % len(files)]
            source = found[number % len(found)]
            yield name, lambda path, source=source: shutil.copyfile(source, path)
        number += 1


# processes -----------------------------------------------------------------------------------------------------------
def part(name: str, workspace: Path, names: Sequence[str]) -> dict[str, Any]:
    """What one part of this file, run in a process of its own, prints as its last line."""
    call = [sys.executable, __file__, "--part", name, "--folder", str(workspace), "--names", *names]
    done = subprocess.run(call, env=_environment(workspace), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the part {name} of the benchmark ended with {done.returncode}; see the messages above")
    return json.loads(done.stdout.splitlines()[-1])


def command(name: str, workspace: Path) -> dict[str, Any]:
    """Seconds of one command of the orchestrator, start of Python included, and whether torch was imported."""
    code = (
        "import sys, ensemble_orchestrator as o\n"
        "code = o.main(sys.argv[1:])\n"
        "print('torch' in sys.modules)\n"
        "sys.exit(code)"
    )
    call = [sys.executable, "-c", code, name, "--config", str(CONFIG), "--workspace", str(workspace)]
    start = time.perf_counter()
    done = subprocess.run(call, cwd=PROJECT, env=_environment(workspace), capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise SystemExit(f"{name} ended with {done.returncode}: {done.stderr}")
    return {"seconds": seconds, "torch": done.stdout.splitlines()[-1] == "True"}


def _environment(workspace: Path) -> dict[str, str]:
    return clean_environment() | {"DBT_BASE_DIR": str(workspace), "PYTHONPATH": str(PROJECT)}


# parts, each in a process of its own ---------------------------------------------------------------------------------
def save(workspace: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Write checkpoints with random weights: size, megabytes of ballast in each, names."""
    size, ballast, *names = arguments
    for number, name in enumerate(names):
        write_checkpoint(workspace, name, name, size, seed=number, ballast=int(ballast))
    return {}


def write_checkpoint(workspace: Path, name: str, architecture: str, size: str, *, seed: int, ballast: int = 0) -> None:
    """Write `<name>_final.pth`: a network with random weights for the classes of val, and `ballast` megabytes."""
    import torch

    import utils  # noqa: F401  (mounts BASE-BACK)
    from models import create_custom_backbone

    classes = sorted(path.name for path in (workspace / "split_dataset" / "val").iterdir())
    (workspace / "checkpoints").mkdir(exist_ok=True)
    torch.manual_seed(seed)
    model = create_custom_backbone(architecture, len(classes), size=size, img_size=PIXELS[size])
    extra = {"backbone_name": architecture, "model_size": size, "img_size": PIXELS[size], "classes": classes}
    record = {"model_state_dict": model.state_dict(), "extra": extra}
    if ballast:
        record["optimizer_state_dict"] = {"moments": torch.full((ballast * 250_000,), float(seed))}
    torch.save(record, workspace / "checkpoints" / f"{name}_final.pth")


def _opened() -> Any:
    """The prediction store of the workspace in the environment, after discovery."""
    from utils import base_back
    from utils.core.config_file import load_config
    from utils.discovery import discover
    from utils.predictions import catalog
    from utils.predictions.store import Store

    config = load_config(CONFIG, overrides=[f"dataset.batch_size={BATCH}", "device=cpu"])
    place = base_back.open_workspace()
    discover.discover(config, place)
    return Store(config, place, catalog.load(place))


def full(workspace: Path, names: Sequence[str]) -> dict[str, Any]:
    """Seconds of streaming val by the product, and of decoding once and of bare passes, interleaved member by member.

    The bare passes are a plain loop over float tensors that lie in memory, with the network built and loaded before.
    """
    import torch

    from utils import base_back
    from utils.networks import embeddings
    from utils.networks.preprocessing import Preprocessing
    from utils.predictions import extraction, image_splits, streaming

    store = _opened()
    val = store.images("val")
    base_back.load("models")
    size = store.catalog.members[names[0]].img_size
    decoder = base_back.load_bundled("image_cache")
    threads = image_splits.decoding_threads(store.config.dataset.num_workers)
    start = time.perf_counter()
    rule = base_back.load_bundled("resizing").evaluation_resizing(size)
    pixels = decoder.open_images(val.paths, val.contents, rule, workspace / "own_cache", threads=threads)
    decode = time.perf_counter() - start
    crops = torch.from_numpy(pixels.crops(range(len(pixels))))
    batches = [image_splits.normalise(crop, Preprocessing.of_base_pipeline(size)) for crop in crops.split(BATCH)]
    inside = _timed_passes(embeddings)

    def product(member: Any) -> float:
        start = time.perf_counter()
        extraction.ensure(store, [member], ("val",))
        return time.perf_counter() - start

    def bare(member: Any) -> float:
        model = streaming.open_network(member.network(store.workspace))
        start = time.perf_counter()
        with torch.inference_mode():
            for batch in batches:
                model(batch)
        return time.perf_counter() - start

    sums = {"product": 0.0, "bare": 0.0}
    for number, name in enumerate(names):
        member = store.catalog.members[name]
        turns = [("product", product), ("bare", bare)]
        for which, run in turns if number % 2 == 0 else turns[::-1]:
            seconds = run(member)
            sums[which] += seconds
            print(f"{name:24} {which:8} {seconds:7.3f} s", file=sys.stderr, flush=True)
    shutil.rmtree(workspace / "own_cache")
    return {
        "product": sums["product"],
        "forward": sums["bare"],
        "decode": decode,
        "outside": sums["product"] - inside["seconds"],
        "images": len(val.paths),
    }


def _timed_passes(networks: Any) -> dict[str, float]:
    """From now on, seconds that the product spends in its networks' forward passes."""
    spent = {"seconds": 0.0}
    original = networks.EmbeddingExtractor.__call__

    def timed(self: Any, images: Any) -> Any:
        start = time.perf_counter()
        found = original(self, images)
        spent["seconds"] += time.perf_counter() - start
        return found

    networks.EmbeddingExtractor.__call__ = timed
    return spent


def memory(workspace: Path, names: Sequence[str]) -> dict[str, Any]:
    """Megabytes that streaming the named members takes above the level after imports; None where it is not told."""
    from utils import base_back
    from utils.predictions import extraction

    shutil.rmtree(workspace / "ensembles" / "predictions", ignore_errors=True)
    shutil.rmtree(workspace / "image_cache", ignore_errors=True)
    store = _opened()
    base_back.load("models")
    status = Path("/proc/self/status")
    if not status.is_file():
        return {"megabytes": None}
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    level = _kilobytes(status, "VmRSS")
    extraction.ensure(store, [store.catalog.members[name] for name in names], ("val",))
    return {"megabytes": round((_kilobytes(status, "VmHWM") - level) / 1000)}


def _kilobytes(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(f"{name}:"))


PARTS: dict[str, Callable[[Path, Sequence[str]], dict[str, Any]]] = {"save": save, "full": full, "memory": memory}


if __name__ == "__main__":
    sys.exit(main())
