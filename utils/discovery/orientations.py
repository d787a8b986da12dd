"""Photographs with a rotating EXIF orientation, and the members that apply or ignore it.

Loaders differ: torchvision, timm and the base pipeline read the stored pixels, Hugging Face image processors usually
receive upright images.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from utils import base_back
from utils.core.artifacts import FileDigests, digest_of
from utils.predictions.catalog import IMPORTED, Member, Problem
from utils.predictions.image_splits import ImageSplit

CODE = "exif_orientation"
VERSION = 1


def orientation_problems(
    splits: Mapping[str, ImageSplit], digests: FileDigests, members: Iterable[Member]
) -> list[Problem]:
    """A problem with the number of rotated photographs and the members by their rule; empty without any."""
    counted = {name: _turned(images, digests) for name, images in splits.items()}
    count = sum(entry["count"] for entry in counted.values())
    if not count:
        return []
    total = sum(len(images.sample_ids) for images in splits.values())
    first_name = next(f"{name}/{entry['first']}" for name, entry in counted.items() if entry["count"])
    names: dict[str, list[str]] = {"apply": [], "ignore": []}
    for member in members:
        if member.source != IMPORTED:
            names[(member.preprocessing or {}).get("exif", "ignore")].append(member.name)
    applying, ignoring = (sorted(names[rule]) for rule in ("apply", "ignore"))
    rules = [f"applied by {_listed(applying, not ignoring)}"] if applying else []
    rules += [f"ignored by {_listed(ignoring, not applying)}"] if ignoring else []
    message = (
        f"{count} of {total} images have an EXIF orientation that turns them, first {first_name}: {'; '.join(rules)}"
    )
    remedy = "nothing to do"
    if ignoring:
        remedy = (
            "networks trained on images as they are stored need nothing; python BASE-BACK/src/main.py --exif apply "
            "trains on upright ones"
        )
    return [Problem(CODE, "warning" if ignoring else "info", None, message, remedy)]


def _listed(names: list[str], is_all: bool) -> str:
    return "all members" if is_all else ", ".join(names)


def _turned(images: ImageSplit, digests: FileDigests) -> dict[str, Any]:
    """`count` and `first` of the rotated images of a split; cached by the images' digest."""
    key = digest_of([CODE, VERSION, images.digest])
    entry: dict[str, Any] | None = digests.facts(key)
    if entry is None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Image size .* exceeds limit")
            modules = [base_back.load_bundled(name) for name in ("image_files", "resizing")]
            pairs = zip(images.sample_ids, images.paths, strict=True)
            turned = [sample_id for sample_id, path in pairs if _is_turned(path, *modules)]
        entry = {"count": len(turned), "first": turned[0] if turned else None}
        digests.keep(key, entry)
    return entry


def _is_turned(path: Path, image_files: Any, resizing: Any) -> bool:
    """Whether the EXIF orientation of a file rotates or flips it; decodes no pixels. False for an unreadable file."""
    try:
        with image_files.open_image(path) as image:
            if image.format == "TIFF":
                return False  # the decoder applies the orientation for all members
            if image.format == "PNG" and "exif" not in image.info:
                return False  # reading further EXIF data would decode the image
            is_turned: bool = resizing.exif_orientation(image) != 1
            return is_turned
    except Exception:  # decoders of damaged files may raise anything; discover --verify and runs name the file
        return False
