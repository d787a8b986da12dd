"""Class-activation maps of the report's example images: made on request and stored in a record next to the page.

The page is rendered from the record, which contains small pictures. The record is used only for the model, weights and
images that it was made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.activation_maps.background import background_sentence
from utils.core.artifacts import digest_of, read_record, write_json
from utils.core.errors import UserError
from utils.core.record_forms import Each, Form
from utils.evaluation.report import report_audit, thumbnails
from utils.evaluation.report.example_images import ExampleImage
from utils.evaluation.report.report_data import ReportData
from utils.evaluation.report.thumbnails import Thumbnail
from utils.predictions import catalog
from utils.predictions.catalog import IMPORTED, Member
from utils.predictions.store import Store

VERSION = 3  # incremented when the same networks would give different pictures
AGAIN = "Remove it, then run evaluate --maps again"
PICTURE: Form = {"uri": str, "width": int, "height": int, "outside_centre": float}
MAPS: Form = {"key": str, "pictures": Each(PICTURE), "without": Each(str)}


@dataclass(frozen=True)
class ExampleMaps:
    """Maps of the example images of a report, for the class that the model predicts."""

    pictures: Mapping[str, Thumbnail]
    """{`image_key`: the picture} of the images that have a map"""
    outside_centre: float | None
    """Mean fraction of the mass of the maps outside the central half of the image; None without a map"""
    without: Mapping[str, str]
    """{member: why it has no map}"""

    def of(self, item: ExampleImage) -> Thumbnail | None:
        """Return the picture of an image; None if there is none."""
        return self.pictures.get(image_key(item))


def image_key(item: ExampleImage) -> str:
    """Return the key of an image and its predicted class in the record."""
    return digest_of([item.split, item.sample_id, item.predicted])


def read(data: ReportData) -> ExampleMaps | None:
    """Read the maps of the example images; None without a record of this model. Raises UserError if it is damaged."""
    record = _current_record(data)
    if record is None:
        return None
    shown = [key for key in dict.fromkeys(map(image_key, data.examples)) if key in record["pictures"]]
    entries = {key: record["pictures"][key] for key in shown}
    pictures = {key: Thumbnail(entry["uri"], entry["width"], entry["height"]) for key, entry in entries.items()}
    outside = float(np.mean([entry["outside_centre"] for entry in entries.values()])) if entries else None
    return ExampleMaps(pictures, outside, record["without"])


def background_warning(data: ReportData, maps: ExampleMaps | None) -> str:
    """Return a warning that the model uses the background, if its maps and the audit agree; "" otherwise."""
    if maps is None or maps.outside_centre is None:
        return ""
    audit = report_audit.current_record(data.workspace, data.catalog)
    subject = "The ensemble" if data.record else data.focus
    sentence = background_sentence(subject, maps.outside_centre, audit["probes"] if audit else [])
    return f"{sentence}." if sentence else ""


def update(store: Store, data: ReportData) -> None:
    """Write the record, unless it already has a map of every example image; networks are loaded one after another.

    Raises UserError for networks that changed since discovery, and for unreadable images.
    """
    items = {image_key(item): item for item in data.examples}
    record = _current_record(data)
    if record is not None and (record["without"].get(data.focus) or items.keys() <= record["pictures"].keys()):
        return
    from utils.activation_maps.map_maker import MapMaker
    from utils.activation_maps.overlays import overlay
    from utils.networks.class_maps import NoMapError

    members = _members(data)
    for member in members:
        if member.source != IMPORTED:
            catalog.check_current(store.workspace, member, store.digests)
    paths = {key: store.workspace.split_dir / item.split / item.sample_id for key, item in items.items()}
    keys = [key for key, path in paths.items() if path.is_file()]
    pictures: dict[str, dict[str, Any]] = {}
    try:
        maker = MapMaker(store, data.focus, members)
        contents = [store.digests.of(paths[key]) for key in keys]
        targets = np.array([items[key].predicted for key in keys], dtype=np.int64)
        maps = maker.maps([paths[key] for key in keys], contents, targets) if keys else []
        without = dict(maker.refused)
    except NoMapError as error:
        maps, without = [], {data.focus: error.reason}
    for key, activation_map in zip(keys, maps, strict=False):  # empty if no network has a map
        small = thumbnails.of_pixels(overlay(activation_map))
        pictures[key] = {
            **{"uri": small.uri, "width": small.width, "height": small.height},
            "outside_centre": round(activation_map.outside_centre, 6),
        }
    write_json(
        store.workspace.report_maps(data.split), {"key": record_key(data), "pictures": pictures, "without": without}
    )


def _members(data: ReportData) -> tuple[Member, ...]:
    """Return the members whose networks predict for the focus."""
    return tuple(member for member in data.members if data.record or member.name == data.focus)


def _current_record(data: ReportData) -> dict[str, Any] | None:
    record = read_record(data.workspace.report_maps(data.split), remedy=AGAIN, form=MAPS)
    if record is None or record["key"] != record_key(data):
        return None
    path = data.workspace.report_maps(data.split)
    for entry in record["pictures"].values():
        if not entry["uri"].startswith("data:image/"):
            raise UserError(f"{path}: {entry['uri'][:40]!r} is no picture; expected data:image/... {AGAIN}")
    return record


def record_key(data: ReportData) -> str:
    """Return the digest of the model and the images for which a record is valid."""
    networks = [[member.name, member.digest] for member in _members(data)]
    return digest_of([VERSION, data.focus, networks, data.record.get("weights"), data.catalog.splits])
