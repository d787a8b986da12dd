"""The report's section on example images, with their class-activation maps if these were made."""

from __future__ import annotations

from typing import Any

from utils.core.display_text import format_percent
from utils.evaluation.report.example_images import ExampleImage
from utils.evaluation.report.example_maps import ExampleMaps
from utils.evaluation.report.report_data import ReportData
from utils.evaluation.report.thumbnails import Thumbnail, thumbnail
from utils.predictions.catalog import IMPORTED

KINDS = {
    "wrong": "Confident errors",
    "disagreement": "Most disputed",
    "mislabelled": "Likely mislabelled",
}


def images(data: ReportData, maps: ExampleMaps | None) -> list[dict[str, Any]]:
    """Return the example images by kind, with thumbnails if there are images, and class-activation maps if made."""
    groups = []
    for kind, title in KINDS.items():
        items = [_image(data, item, maps) for item in data.examples if item.kind == kind]
        if items:
            groups.append({"kind": kind, "title": title, "images": items})
    return groups


def maps_notes(data: ReportData, maps: ExampleMaps | None) -> list[str]:
    """Return sentences on the maps and on members without one; without maps, the command that makes them."""
    if maps is None:
        has_networks = data.catalog.has_images and any(member.source != IMPORTED for member in data.members)
        hint = "evaluate --maps adds class-activation maps to these images."
        return [hint] if has_networks and data.examples else []
    missing = [f"{name} has no map: {reason}." for name, reason in sorted(maps.without.items())]
    if maps.outside_centre is None:
        return missing
    weighted = ", by the weights of the ensemble" if data.record.get("weights") else ""
    return [
        f"Second pictures are class-activation maps: where the networks of {data.focus} look for the class that it "
        f"predicts, the lighter the more{weighted}; in grey what the network with the largest input sees. On average "
        f"{format_percent(maps.outside_centre, 0)} of their mass lies outside the central half of the image.",
        *missing,
    ]


def _image(data: ReportData, item: ExampleImage, maps: ExampleMaps | None) -> dict[str, Any]:
    label, predicted = data.classes[item.label], data.classes[item.predicted]
    image = Thumbnail(None, problem="")
    if data.catalog.has_images:
        image = thumbnail(data.workspace.split_dir / item.split / item.sample_id)
    predictions = [
        {
            "member": prediction.member,
            "predicted": data.classes[prediction.predicted],
            "probability": format_percent(prediction.probability, 0),
            "agrees": prediction.predicted == item.label,
        }
        for prediction in item.member_predictions
    ]
    agreeing = sum(prediction.predicted == item.label for prediction in item.member_predictions)
    caption = f"label {label}; {data.focus} predicts {predicted} ({format_percent(item.probability, 0)})"
    if item.predicted != item.label:
        caption += f", {label} has {format_percent(item.label_probability, 0)}"
    summary = f"{agreeing} of {len(predictions)} members predict {label}" if predictions else ""
    return {
        "id": f"{item.split}/{item.sample_id}",
        "caption": caption,
        "summary": summary,
        "disagreement": "" if item.disagreement is None else f"disagreement {item.disagreement:.2f} nats",
        "thumbnail": image,
        "alt": f"Image {item.sample_id}, {caption}",
        "map": maps.of(item) if maps else None,
        "map_alt": f"Class-activation map of image {item.sample_id} for {predicted}",
        "predictions": predictions,
    }
