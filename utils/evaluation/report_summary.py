"""The report in words: what to use, how far to trust it, and where it fails; each sentence only of what is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.core.display_text import format_count, format_interval, format_number, format_percent, join_names
from utils.evaluation.report_data import ReportData
from utils.numeric.metrics import METRICS

ROWS = {"oof+val": "out-of-fold predictions of the train images and the val images", "val": "the val images"}
FEW = 500  # evaluated images, below which an interval is worth a sentence


def sentences(data: ReportData) -> list[str]:
    """The summary, most important first."""
    found = [_choice(data), _on_split(data), *_compared(data), _guards(data), _calibration(data), _weakest(data)]
    found += [_uncertainty(data), _cost(data), _other_winner(data)]
    return [sentence for sentence in found if sentence]


def warnings(data: ReportData) -> list[str]:
    """What a reader must know before believing any of it."""
    found = []
    contaminated = [row["name"] for row in data.ranking["rows"] if row.get("contaminated")]
    optimistic = [row["name"] for row in data.ranking["rows"] if row.get("optimistic")]
    if contaminated:
        found.append(f"Fitted on rows that are evaluated here, so never ranked: {join_names(contaminated)}.")
    if optimistic:
        whose = "everything here" if len(optimistic) == len(data.ranking["rows"]) else join_names(optimistic)
        found.append(f"Rows evaluated here took part in choosing {whose}, so the scores are optimistic.")
    dropped = (data.evaluated.get("overlap") or {}).get("dropped")
    if dropped:
        found.append(f"{format_count(dropped, 'row')} left out, since the same image is in train or val.")
    bounds = (data.evaluated.get("ci95") or {}).get("accuracy")
    rows = data.evaluated["n_samples"]
    if rows < FEW:
        wide = f": the accuracy is known to {format_interval([100 * bound for bound in bounds], 1)} %" if bounds else ""
        found.append(f"{format_count(rows, 'row')} of {data.split} are few{wide}. Small differences here mean nothing.")
    return [*found, *data.notes]


def _choice(data: ReportData) -> str:
    chosen = data.ranking["recommended"]
    evidence = chosen["evidence"]
    if chosen["name"] != data.focus:
        return f"{chosen['name']} is recommended, but its metrics are gone; this page is about {data.focus} instead."
    return (
        f"Use {data.focus}: {chosen['reason']}. That was decided on {format_count(evidence['n'], 'row')} that its "
        f"parts were not fitted on ({ROWS.get(evidence['rows'], evidence['rows'])}): log-loss "
        f"{format_number(evidence['log_loss'])} {format_interval(evidence['log_loss_ci95'])}, "
        f"accuracy {format_percent(evidence['accuracy'])}."
    )


def _on_split(data: ReportData) -> str:
    found = data.evaluated
    ranked = [row for row in data.ranking["rows"] if row["rank"] is not None]
    own = next((row["rank"] for row in ranked if row["name"] == data.focus), None)
    place = f" and stands at place {own} of {len(ranked)} by {_order(data)}" if own is not None else ""
    bounds = (found.get("ci95") or {}).get("accuracy")
    spread = f" (95 % interval {format_percent(bounds[0])} to {format_percent(bounds[1])})" if bounds else ""
    said = ", which had no say in that choice," if data.split == "test" else ""
    return (
        f"On the {format_count(found['n_samples'], 'row')} of {data.split}{said} it is right on "
        f"{format_percent(found['accuracy'])}{spread}{place}."
    )


def _order(data: ReportData) -> str:
    return str(data.ranking["order"][0]).replace("_", " ")


def _compared(data: ReportData) -> list[str]:
    found = []
    for kind, word in (("best_single", "the best single model"), ("soft_voting", "plain soft voting")):
        against = data.evaluated.get(f"vs_{kind}")
        if against and against.get("name") != data.focus:
            found.append(_measured_difference(against, f"{word} ({against['name']})"))
        elif kind in data.peers:
            other = data.peers[kind]
            gap = data.evaluated["accuracy"] - data.metrics[other]["accuracy"]
            found.append(
                f"Against {word} ({other}): {100 * gap:+.1f} points of accuracy; its interval is not measured."
            )
    return found


def _measured_difference(against: Mapping[str, Any], word: str) -> str:
    low, high = against["delta_ci95"] or (None, None)
    p = against.get("mcnemar_p")
    tested = f", McNemar's exact p {p:.3g}" if p is not None else ""
    gap = f"Against {word}: {100 * against['delta_accuracy']:+.1f} points of accuracy"
    if low is None:
        return f"{gap}{tested}."
    verdict = "it is better" if low > 0 else "it is worse" if high < 0 else "the two cannot be told apart here"
    return f"{gap} [{100 * low:+.1f}, {100 * high:+.1f}]{tested}: {verdict}."


def _guards(data: ReportData) -> str:
    verdict = data.record.get("verdict")
    return f"Held against the simple combinations on the honest rows, it {verdict}." if verdict else ""


def _calibration(data: ReportData) -> str:
    gap = data.evaluated["ece"]
    word = "well calibrated" if gap < 0.02 else "fairly calibrated" if gap < 0.05 else "not well calibrated"
    return (
        f"Its probabilities are {word}: on average they are off by {format_percent(gap)} (expected calibration error), "
        f"in the worst bin by {format_percent(data.evaluated['mce'])}."
    )


def _weakest(data: ReportData) -> str:
    classes = {name: own for name, own in data.evaluated["per_class"].items() if own["support"]}
    if len(classes) < 2:
        return ""
    name = min(classes, key=lambda key: (classes[key]["f1"], key))
    own = classes[name]
    if own["f1"] == 1:
        return "It makes no error at all on these rows."
    found = (
        f"It is weakest on class {name} (F1 {format_number(own['f1'], 3)}, recall {format_number(own['recall'], 3)}, "
        f"{format_count(own['support'], 'row')})"
    )
    pairs = confused(data)
    if not pairs:
        return f"{found}."
    often = "once" if pairs[0][2] == 1 else f"{pairs[0][2]} times"
    return f"{found}; its most frequent error is {pairs[0][0]} taken for {pairs[0][1]} ({often})."


def confused(data: ReportData, most: int = 10) -> list[tuple[str, str, int, int]]:
    """(true class, answer, how often, rows of the true class), most frequent first."""
    names = [name for name in data.classes if name in data.evaluated["per_class"]]
    table = data.evaluated["confusion_matrix"]
    cells = [
        (names[row], names[column], count, sum(line))
        for row, line in enumerate(table)
        for column, count in enumerate(line)
        if row != column and count
    ]
    return sorted(cells, key=lambda cell: (-cell[2], cell[0], cell[1]))[:most]


def _uncertainty(data: ReportData) -> str:
    found = []
    selective = data.evaluated.get("selective") or {}
    if selective.get("threshold") is not None and selective.get("wanted_error") is not None:
        found.append(
            f"answering only where it is at least {format_percent(selective['threshold'])} sure is meant to keep "
            f"errors at {format_percent(selective['wanted_error'])}"
        )
    sets = (data.evaluated.get("conformal") or {}).get("lac")
    if sets:
        found.append(
            f"conformal sets that should hold the true class in {format_percent(1 - sets['alpha'])} of cases did so in "
            f"{format_percent(sets.get('coverage'))}, with {format_number(sets.get('mean_size'), 2)} classes on average"
        )
    text = "; ".join(found)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _cost(data: ReportData) -> str:
    latency = ((data.evaluated.get("latency_ms") or {}).get("batch_1") or {}).get("p50")
    size = data.evaluated.get("size_mb")
    parts = [f"{format_number(latency, 1)} ms for one image"] if latency is not None else []
    parts += [f"{size:,.1f} MB of weights"] if size is not None else []
    members = len(data.evaluated["members"])
    return f"It runs {format_count(members, 'network')}: {' and '.join(parts)}." if parts else ""


def _other_winner(data: ReportData) -> str:
    first = data.ranking["rows"][0]
    if first["name"] == data.focus or first["rank"] is None:
        return ""
    metric = data.ranking["order"][0]
    own, other = data.evaluated[metric], data.metrics[first["name"]][metric] if first["name"] in data.metrics else None
    if other is None or metric not in METRICS:
        return ""
    figures = f"{_order(data)} {format_number(other)} against {format_number(own)}"
    return (
        f"{first['name']} comes first on {data.split} ({figures}). "
        f"It is not recommended for that: whoever picks the best of many on {data.split} picks luck as well."
    )
