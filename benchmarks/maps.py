"""Whether class-activation maps show what networks look at: deletion against a centred blob, and random weights.

    python benchmarks/maps.py --data DIR         photographs, one folder per class: fifteen backbones, a ViT of timm
    python benchmarks/maps.py --workspace DIR    also the networks and the recommended model of an evaluated workspace
    python benchmarks/maps.py                    scanned digits in place of photographs
    python benchmarks/maps.py --networks NAME    some of the networks by name
    python benchmarks/maps.py --quick            three networks, few images and epochs, not the ones to report

Each image is placed in a corner of a canvas of the colour of its border, so that its object is off the centre. Small
networks are trained on three quarters of the photographs, each in all four corners, and judged on the others.

Deletion (Petsiuk et al. 2018): parts of 5, 10, 20 and 30% of an image get the mean colour of all images, once where the
map is largest and once in a disc in the middle of the image. The figure is the mean over images and parts of how much
more of the predicted class's probability the map's part takes; its interval is Student's t over images.

Random weights (Adebayo et al. 2018): the rank correlation of a network's maps with those of the same architecture with
random weights, mean over images. Trained weights are kept in `benchmarks/zoo/maps` and used again. The last line of the
output is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prepare import CONFIG, PROJECT, ZOO, workspace_in
from reporting import interval, mean_with_interval, report, row

sys.path.insert(0, str(PROJECT))

SIDE, GRAIN = 64, 4  # pixels of the canvas; objects start at multiples of this
OBJECT = 0.6  # side of the photograph, as a fraction of the canvas
FRACTIONS = (0.05, 0.1, 0.2, 0.3)  # of the pixels that are deleted
HELD_OUT = 4  # one image of so many is judged
MOST_ALIKE = 0.5  # rank correlation with the maps of random weights
VIT = "vit_tiny_patch16_224"
QUICK = ("CustomResNetMish", "CustomViTHybrid", VIT)
SUFFIXES = (".jpg", ".jpeg", ".png")
Probabilities = Callable[[np.ndarray], np.ndarray]
"""Pictures uint8 (N, S, S, 3) -> probabilities (N, C)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; returns 0, also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="maps.py", description="Class-activation maps: deletion and random weights.")
    parser.add_argument("--data", metavar="DIR", type=Path, help="folder with one folder of photographs per class")
    parser.add_argument("--workspace", metavar="DIR", type=Path, help="also the networks of this evaluated workspace")
    parser.add_argument("--networks", metavar="NAME", nargs="+", help=f"of the backbones and {VIT} (default: all)")
    parser.add_argument("--quick", action="store_true", help="few networks, images and epochs: does it run at all")
    options = parser.parse_args(argv)
    pictures, labels = photographs(options.data) if options.data else digits()
    if options.quick:
        pictures, labels = pictures[::4], labels[::4]
    names = options.networks or (QUICK if options.quick else architectures())
    rows = network_rows(names, pictures, labels, epochs=1 if options.quick else 5)
    if options.workspace is not None:
        rows += workspace_rows(options.workspace, most=8 if options.quick else 120)
    report("maps", rows, quick=options.quick, packages=("torch", "timm", "numpy", "scipy"))
    return 0


# images --------------------------------------------------------------------------------------------------------------
def photographs(folder: Path) -> tuple[list[Any], np.ndarray]:
    """Images (N) of class folders, and their labels (N,)."""
    from utils.inference.onnx_prediction import open_image

    paths = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in SUFFIXES)
    classes = sorted({path.parent.name for path in paths})
    pictures = []
    for path in paths:
        with open_image(path) as image:
            pictures.append(image.convert("RGB"))
    return pictures, np.array([classes.index(path.parent.name) for path in paths])


def digits() -> tuple[list[Any], np.ndarray]:
    """Scanned digits of four classes, 120 of each, as images of 32 pixels."""
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits(n_class=4)
    chosen = np.sort(np.concatenate([np.flatnonzero(found.target == digit)[:120] for digit in range(4)]))
    pixels = np.rint(found.images[chosen] * (255 / 16)).astype(np.uint8)
    pictures = [Image.fromarray(each).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC) for each in pixels]
    return pictures, found.target[chosen].astype(np.int64)


def off_centre(picture: Any, corner: int, side: int, shift: int) -> np.ndarray:
    """A picture in a corner (0 to 3) of a canvas of its border's mean colour: uint8 (S, S, 3)."""
    from PIL import Image

    inner = round(OBJECT * side)
    pixels = np.asarray(picture.resize((inner, inner), Image.Resampling.LANCZOS))
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    canvas = np.empty((side, side, 3), np.uint8)
    canvas[:] = np.rint(border.mean(axis=0))
    top, left = (side - inner - shift if on_far_side else shift for on_far_side in (corner // 2, corner % 2))
    canvas[top : top + inner, left : left + inner] = pixels
    return canvas


# networks that are trained here --------------------------------------------------------------------------------------
def architectures() -> tuple[str, ...]:
    """All backbones of the base pipeline, and the vision transformer of timm."""
    from utils import base_back

    return (*base_back.load("models").BACKBONE_MAP, VIT)


def network_rows(
    names: Sequence[str], pictures: Sequence[Any], labels: np.ndarray, *, epochs: int
) -> list[dict[str, Any]]:
    """Both figures of each architecture."""
    import torch

    from utils.networks.class_maps import ClassMaps

    torch.set_num_threads(1)  # of small networks, as `BASE-BACK/src/utils/threads.py` has it
    order = np.random.default_rng(0).permutation(len(pictures))
    judged, fitted = order[::HELD_OUT], np.setdiff1d(order, order[::HELD_OUT])
    shifts = np.random.default_rng(1).integers(0, 2, size=(len(pictures), 4)) * GRAIN
    train = np.stack([off_centre(pictures[i], corner, SIDE, shifts[i, corner]) for i in fitted for corner in range(4)])
    test = np.stack([off_centre(pictures[i], i % 4, SIDE, shifts[i, i % 4]) for i in judged])
    fill = train.mean(axis=(0, 1, 2))
    rows = []
    for name in names:
        networks = [built(name, int(labels.max()) + 1, seed) for seed in (0, 1)]
        fit_once(name, networks[0], train, np.repeat(labels[fitted], 4), epochs)
        answer = answers_of(networks[0])
        given = answer(test)
        targets = given.argmax(axis=1)
        found = []
        for network in networks:
            mapper = ClassMaps(network, name)
            mapper.probe(tensor(test[:2]))
            found.append(mapper(tensor(test), torch.from_numpy(targets)).numpy())
        said = f"accuracy {np.mean(targets == labels[judged]):.2f}"
        rows.append(deletion_row(name, test, found[0], given, answer, fill, said))
        rows.append(randomisation_row(name, *found))
        print(*(entry["peer"] for entry in rows[-2:]), name, sep="; ", file=sys.stderr, flush=True)
    return rows


def built(name: str, classes: int, seed: int) -> Any:
    """A small network with random weights, for images of `SIDE` pixels."""
    import timm
    import torch

    from utils import base_back

    torch.manual_seed(seed)
    if name == VIT:
        return timm.create_model(VIT, num_classes=classes, img_size=SIDE, patch_size=8, depth=6).eval()
    return base_back.load("models").create_custom_backbone_safe(name, classes, size="tiny", img_size=SIDE).eval()


def fit_once(name: str, network: Any, pictures: np.ndarray, labels: np.ndarray, epochs: int) -> None:
    """Train, or load what the same training gave before."""
    import torch

    from utils.core.artifacts import digest_of

    data = [hashlib.sha256(array.tobytes()).hexdigest() for array in (pictures, labels)]
    path = ZOO / "maps" / f"{name}-{digest_of([data, epochs, torch.__version__])[:12]}.pth"
    if path.is_file():
        network.load_state_dict(torch.load(path, weights_only=True))
        return
    fit(network, pictures, labels, epochs)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), path)


def fit(network: Any, pictures: np.ndarray, labels: np.ndarray, epochs: int) -> None:
    """Train with AdamW and a rate that falls to 0 along a cosine."""
    import torch

    torch.manual_seed(0)
    batch, random = 32, np.random.default_rng(0)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(pictures) // batch))
    network.train()
    for _ in range(epochs):
        order = random.permutation(len(pictures))
        for start in range(0, len(order) - batch + 1, batch):
            rows = order[start : start + batch]
            optimizer.zero_grad()
            logits = network(tensor(pictures[rows]))
            torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[rows]), label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()
    network.eval()


def tensor(pictures: np.ndarray) -> Any:
    """Pictures uint8 (N, S, S, 3) -> float32 (N, 3, S, S), about -1 to 1."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).float() / 127.5 - 1


def answers_of(network: Any) -> Probabilities:
    """The probabilities that a network gives, in batches."""
    import torch

    def answer(pictures: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            parts = [network(tensor(pictures[start : start + 64])) for start in range(0, len(pictures), 64)]
        return np.asarray(torch.cat(parts).softmax(dim=1), dtype=np.float64)

    return answer


# figures -------------------------------------------------------------------------------------------------------------
def deletion_row(
    name: str,
    pictures: np.ndarray,
    maps: np.ndarray,
    given: np.ndarray,
    answer: Probabilities,
    fill: np.ndarray,
    said: str,
) -> dict[str, Any]:
    """How much more of the predicted class's probability the map's part takes than the disc in the middle.

    `maps` (N, h, w) are enlarged to the pictures' size; `given` (N, C) are the probabilities of whole pictures.
    """
    targets, rows = given.argmax(axis=1), np.arange(len(pictures))
    side = pictures.shape[1]
    from_middle = np.square(np.arange(side) - (side - 1) / 2)
    disc = np.broadcast_to(-(from_middle[:, None] + from_middle[None]), (len(pictures), side, side))
    drops = {}
    for form, importance in (("map", enlarged(maps, side)), ("middle", disc)):
        parts = [answer(deleted(pictures, importance, fraction, fill))[rows, targets] for fraction in FRACTIONS]
        drops[form] = given[rows, targets] - np.mean(parts, axis=0)
    gains = drops["map"] - drops["middle"]
    bounds = interval(gains.tolist())
    beside = f"{mean_with_interval(gains.tolist(), '.3f')}; map {drops['map'].mean():.3f}, middle "
    beside += f"{drops['middle'].mean():.3f}; {len(pictures)} images, {said}"
    holds = bounds is not None and bounds[0] > 0
    return row(f"{name}: deletion, map less middle", gains.mean(), "of 1", "interval above 0", holds, beside)


def randomisation_row(name: str, trained: np.ndarray, random: np.ndarray) -> dict[str, Any]:
    """Rank correlation of the maps (N, h, w) of trained weights with those of random ones."""
    from scipy.stats import spearmanr

    found = [
        0.0 if np.ptp(one) == 0 or np.ptp(other) == 0 else float(spearmanr(one.ravel(), other.ravel()).statistic)
        for one, other in zip(trained, random, strict=True)
    ]
    bounds = interval(found)
    holds = bounds is not None and bounds[1] < MOST_ALIKE
    what = f"{name}: rank correlation with maps of random weights"
    return row(what, float(np.mean(found)), "", f"below {MOST_ALIKE}", holds, mean_with_interval(found, ".3f"))


def enlarged(maps: np.ndarray, side: int) -> np.ndarray:
    """Maps (N, h, w) -> (N, S, S), bilinear."""
    import torch
    from torch.nn import functional as F

    grids = torch.from_numpy(np.ascontiguousarray(maps))[:, None].float()
    return np.asarray(F.interpolate(grids, size=(side, side), mode="bilinear", align_corners=False)[:, 0])


def deleted(pictures: np.ndarray, importance: np.ndarray, fraction: float, fill: np.ndarray) -> np.ndarray:
    """The pictures with the most important pixels (N, S, S), a fraction of each picture, in the colour `fill` (3,)."""
    count = round(fraction * importance[0].size)
    flat = pictures.reshape(len(pictures), -1, 3).copy()
    # Stable, so that ties are broken alike for all.
    places = np.argsort(-importance.reshape(len(pictures), -1), axis=1, kind="stable")[:, :count]
    flat[np.arange(len(pictures))[:, None], places] = np.rint(fill).astype(np.uint8)
    return flat.reshape(pictures.shape)


# networks of a workspace ---------------------------------------------------------------------------------------------
def workspace_rows(folder: Path, *, most: int) -> list[dict[str, Any]]:
    """Deletion for each network of a workspace and the recommended model, on its val and test images off the centre."""

    from utils.activation_maps.map_maker import MapMaker
    from utils.core.config_file import load_config
    from utils.evaluation import recommended_names
    from utils.inference.classifier import WorkspaceClassifier, content_digests
    from utils.inference.onnx_prediction import open_image
    from utils.predictions import catalog
    from utils.predictions.store import Store

    config = load_config(CONFIG, overrides=["device=cpu"])
    workspace = workspace_in(folder)
    store = Store(config, workspace, catalog.load(workspace))
    splits = [store.images(split) for split in ("val", "test")]
    sources = [path for images in splits for path in images.paths][:most]
    pictures = [open_image(path).convert("RGB") for path in sources]
    names = [member.name for member in store.catalog.members.values() if member.source == "trained" and member.usable]
    recommended = recommended_names.resolve(store, recommended_names.RECOMMENDED)
    rows = []
    with tempfile.TemporaryDirectory(prefix="maps-") as name:
        scratch = Path(name)
        for model in dict.fromkeys((*names, recommended)):
            classifier = WorkspaceClassifier(store, model)
            maker = MapMaker(store, model, classifier.members)
            canvas = round(max(member.image_preprocessing.resized for member in classifier.members))
            placed = np.stack([off_centre(picture, i % 4, canvas, 0) for i, picture in enumerate(pictures)])

            def answer(images: np.ndarray, classifier: WorkspaceClassifier = classifier) -> np.ndarray:
                return classifier.predict_block(saved(scratch, images), lambda _: None).probabilities

            given = answer(placed)
            paths = saved(scratch, placed)
            found = maker.maps(paths, content_digests(paths)[0], given.argmax(axis=1))
            maps = np.stack([each.mass for each in found])
            rows.append(deletion_row(model, placed, maps, given, answer, placed.mean(axis=(0, 1, 2)), folder.name))
    return rows


def saved(folder: Path, pictures: np.ndarray) -> list[Path]:
    """Write the pictures as PNG files; returns their paths."""
    from PIL import Image

    paths = [folder / f"{number:04d}.png" for number in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    return paths


if __name__ == "__main__":
    sys.exit(main())
