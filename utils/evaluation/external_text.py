"""Output of `evaluate --data`: the models on the external set and on the test split, and what no longer holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from utils.core.display_text import (
    first_names,
    format_count,
    format_interval,
    format_number,
    format_percent,
    join_names,
    printable,
)
from utils.evaluation.table_formats import aligned_lines

MAX_NAMED = 5
HEADER = (
    "rank",
    "name",
    "kind",
    "accuracy [95%]",
    "on test",
    "change [95%]",
    "F1 macro",
    "log-loss",
    "ECE",
    "OOD AUROC",
)


def as_text(record: Mapping[str, Any], scored: Sequence[str]) -> str:
    """Return a table of all models, then sentences on the recommended model, or on the only one in `scored`."""
    focus = scored[0] if len(scored) == 1 else focus_of(record)
    return "\n".join([*about_the_set(record), *_table(record), *_about_the_model(record, focus)])


def focus_of(record: Mapping[str, Any]) -> str:
    """Return the model that the sentences describe: the recommended one if it is scored, else the first."""
    names = [row["name"] for row in record["rows"]]
    return str(record["recommended"] if record["recommended"] in names else names[0])


def about_the_set(record: Mapping[str, Any]) -> list[str]:
    """Return lines on the scored images, the matching of classes and the images that were left out."""
    classes, left_out = record["classes"], record["left_out_images"]
    n_classes = sum(count > 0 for count in classes["counts"].values())
    lines = [
        f"external set {record['set']}: {format_count(record['n'], 'image')} of "
        f"{n_classes} {'class' if n_classes == 1 else 'classes'}, ordered by {record['order'][0]} "
        f"({printable(record['source'])})"
    ]
    if classes["mapped"]:
        pairs = [f"{name} as {target}" for name, target in classes["mapped"].items()]
        lines.append(f"  classes by the class map: {printable(join_names(pairs))}")
    if left_out["copies"]:
        pairs = [f"{image} = {same}" for image, same in left_out["copies"].items()]
        lines.append(
            f"  left out: {format_count(len(left_out['copies']), 'image')} of train or val: "
            f"{printable(first_names(pairs, MAX_NAMED))}"
        )
    if left_out["of_other_classes"]:
        names = [*classes["unknown"], *classes["dropped"]]
        lines.append(
            f"  left out: {format_count(left_out['of_other_classes'], 'image')} of other classes: "
            f"{printable(join_names(names))}"
        )
    if classes["absent"]:
        how = (
            "probabilities are restricted to the other classes, on the test split too"
            if record["missing"] == "restrict"
            else "they remain possible answers"
        )
        lines.append(f"  without images in the set: {printable(join_names(classes['absent']))}; {how}")
    if record["also_in_test"]:
        lines.append(f"  {format_count(record['also_in_test'], 'image')} of the set are in the own test split too")
    return lines


def _table(record: Mapping[str, Any]) -> list[str]:
    lines: list[Sequence[str]] = [HEADER]
    for row in record["rows"]:
        model = record["models"][row["name"]]
        accuracy = model["drop"]["accuracy"]
        area = (model["ood_auroc"] or {}).get("energy")
        lines.append(
            (
                "-" if row["rank"] is None else str(row["rank"]),
                row["name"],
                row["kind"],
                f"{row['accuracy']:.4f}{_bounds((row['ci95'] or {}).get('accuracy'))}",
                f"{accuracy['test']:.4f}",
                f"{accuracy['change']:+.4f}{_bounds(accuracy['ci95'], sign='+')}",
                *(f"{row[key]:.4f}" for key in ("f1_macro", "log_loss", "ece")),
                format_number(None if area is None else area["auroc"], 3),
            )
        )
    return aligned_lines(lines, right=(0,))


def _bounds(interval: Sequence[float] | None, sign: str = "") -> str:
    return "" if interval is None else f" [{interval[0]:{sign}.4f}, {interval[1]:{sign}.4f}]"


def _about_the_model(record: Mapping[str, Any], name: str) -> list[str]:
    is_recommended = name == record["recommended"]
    lines = [f"{name}{', which is recommended by out-of-sample rows alone' if is_recommended else ''}:"]
    lines += [f"  {sentence}" for sentence in sentences(record, name)]
    return lines


def sentences(record: Mapping[str, Any], name: str) -> list[str]:
    """Return sentences on the changes for one model; the report shows them too."""
    model = record["models"][name]
    return [
        _change_of_accuracy(model["drop"]["accuracy"], model["test_n"]),
        *_dropping_classes(model["classes"]),
        _calibration(model["calibration"]),
        *_promises(model["promises"]),
        *_shift(model["ood_auroc"]),
    ]


def _change_of_accuracy(accuracy: Mapping[str, Any], test_n: int) -> str:
    interval, difference = accuracy["ci95"], accuracy["change"]
    figures = (
        f"{format_percent(accuracy['test'])} on {format_count(test_n, 'test image')}, "
        f"{format_percent(accuracy['external'])} here, change {100 * difference:+.1f}"
    )
    if interval is None:
        return f"accuracy: {figures} points; too few rows for an interval"
    verdict = "drops" if interval[1] < 0 else "rises" if interval[0] > 0 else "changes no more than chance explains"
    return f"accuracy {verdict}: {figures} [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}] points"


def _dropping_classes(classes: Sequence[Mapping[str, Any]]) -> list[str]:
    dropping = [
        f"{printable(entry['class'])} {format_percent(entry['test'], 0)} -> {format_percent(entry['external'], 0)}"
        for entry in classes
        if entry["drops"]
    ]
    if dropping:
        return [f"recall drops in {join_names(dropping)}"]
    if classes and all(entry["ci95"] is None for entry in classes):
        return ["recall of single classes: too few rows for an interval"]
    return ["recall drops in no class beyond chance"] if classes else []


def _calibration(calibration: Mapping[str, Any]) -> str:
    before, after = calibration["ece"], calibration["calibrated_ece"]
    text = f"calibration error (ECE) {before['test']:.3f} on test, {before['external']:.3f} here"
    if after["external"] is None:
        return text
    return f"{text}; at the temperature that out-of-sample rows fit {after['test']:.3f} and {after['external']:.3f}"


def _promises(promises: Mapping[str, Any]) -> list[str]:
    lines = []
    if promises["conformal"]:
        lac = promises["conformal"]["lac"]
        lines.append(
            f"conformal sets promised to hold the class of {format_percent(lac['promised'], 0)}: "
            f"{format_percent(lac['test'])} on test, {format_percent(lac['external'])} here"
        )
    selective = promises["selective"]
    if selective:
        test, here = (_answered(selective[side]) for side in ("test", "external"))
        lines.append(
            f"answers promised to err in at most {format_percent(selective['target_risk'], 0)}: {test} on test, "
            f"{here} here"
        )
    return lines


def _answered(side: Mapping[str, Any]) -> str:
    if side["error"] is None:
        return "none given"
    return f"{format_percent(side['error'])} of the {format_percent(side['answered'], 0)} that are answered"


def _shift(areas: Mapping[str, Any] | None) -> list[str]:
    if not areas:
        return []
    area = areas["energy"]
    return [
        f"OOD scores tell these images from those of test with AUROC {area['auroc']:.3f} "
        f"{format_interval(area['ci95'], 3)}; 0.5 is no difference"
    ]
