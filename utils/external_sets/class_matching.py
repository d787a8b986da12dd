"""Matches the classes of an external set with those of the workspace, by equal names or by the user's class map.

Names that differ only in case, separators or encoding are suggested, but never matched.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.core.display_text import format_count, join_names, printable
from utils.core.errors import UserError, did_you_mean

HEADER = ["external", "workspace"]
REFUSE, IGNORE, RESTRICT = TREATMENTS = ("refuse", "ignore", "restrict")
"""Treatments of classes that only one side has. `refuse`: an error; `ignore`: images of unknown classes are omitted and
absent classes can still be predicted; `restrict`: in addition, probabilities are restricted to the shared classes."""
MAX_LISTED = 50  # classes in a message
MAX_BYTES = 10_000_000  # size of a class map


@dataclass(frozen=True)
class ClassMatch:
    """The match of the classes of an external set with those of the workspace."""

    class_of: Mapping[str, str]
    """{class of the set: class of the workspace}"""
    dropped: Sequence[str]
    """Classes of the set that the class map excludes"""
    unknown: Mapping[str, str]
    """{class of the set that the workspace lacks: a class of the workspace with a similar name, or ""}"""
    absent: Sequence[str]
    """Classes of the workspace without images in the set"""

    @property
    def shared(self) -> tuple[str, ...]:
        """Classes of the workspace that have images, sorted."""
        return tuple(sorted(set(self.class_of.values())))


def match_classes(
    external: Sequence[str], workspace_classes: Sequence[str], class_map: Mapping[str, str]
) -> ClassMatch:
    """Match the classes of a set; `class_map`, {class of the set: class of the workspace or ""}, takes precedence."""
    class_of = {name: class_map.get(name, name) for name in external}
    dropped = [name for name, target in class_of.items() if not target]
    unknown = {
        name: _similar(name, workspace_classes)
        for name, target in class_of.items()
        if target and target not in workspace_classes
    }
    matched = {name: target for name, target in class_of.items() if target in workspace_classes}
    matched_classes = set(matched.values())
    return ClassMatch(matched, dropped, unknown, [name for name in workspace_classes if name not in matched_classes])


def _similar(name: str, workspace_classes: Sequence[str]) -> str:
    """The only class of the workspace whose name is equal up to case, separators and encoding; else ""."""
    equal = [other for other in workspace_classes if _folded(other) == _folded(name)]
    return equal[0] if len(equal) == 1 else ""


def _folded(name: str) -> str:
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", name).casefold())


def read_class_map(path: Path, external: Sequence[str], workspace_classes: Sequence[str]) -> dict[str, str]:
    """{class of the set: class of the workspace, or "" to exclude its images} of a CSV file `external,workspace`.

    Raises UserError that lists all problems: another header, an unknown name on either side, a class that is mapped
    twice, and names that are permuted in a cycle.
    """
    lines = _lines(path)
    if not lines or lines[0][1] != HEADER:
        header = ",".join(lines[0][1]) if lines else "nothing"
        raise UserError(
            f"--class-map {path}: begins with {printable(header)!r}; expected the header {','.join(HEADER)} and one "
            "line per class, such as 'Black spot,black_spot'; an empty second field leaves the images of a class out"
        )
    mapped: dict[str, str] = {}
    problems = []
    for line, values in lines[1:]:
        if len(values) != len(HEADER):
            problems.append(f"line {line}: {len(values)} field(s); expected external,workspace")
            continue
        name, target = values
        if name in mapped:
            problems.append(f"line {line}: {name!r} is mapped twice; expected one line per class")
        elif name not in external:
            hint = did_you_mean(name, external) or f"; it has {', '.join(external)}"
            problems.append(f"line {line}: {name!r} is no class of the external set{hint}")
        elif target and target not in workspace_classes:
            similar = _similar(target, workspace_classes)
            hint = (
                f"; did you mean {similar!r}?"
                if similar
                else did_you_mean(target, workspace_classes) or f"; it has {', '.join(workspace_classes)}"
            )
            problems.append(f"line {line}: {target!r} is no class of the workspace{hint}")
        mapped.setdefault(name, target)
    if circle := _circle(mapped):
        problems.append(
            f"{' -> '.join(circle)}: the names go in a circle, by which correct labels would be exchanged. Correct the "
            "labels of the set itself if they are wrong there"
        )
    if problems:
        raise UserError(f"--class-map {path}: {printable('; '.join(problems))}")
    return mapped


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """(line, values without surrounding spaces) of every record that is not blank."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes; a class map has one line per class")
        reader = csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""), strict=True)
        return [(reader.line_num, [value.strip() for value in values]) for values in reader if any(values)]
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"--class-map {path}: cannot be read ({reason}); expected a CSV file in UTF-8 with the header "
            f"{','.join(HEADER)}"
        ) from error


def _circle(mapped: Mapping[str, str]) -> list[str]:
    """Names that form a cycle of at least two; empty if there is none."""
    for start in mapped:
        names, target = [start], mapped[start]
        while target in mapped and target not in names:
            names.append(target)
            target = mapped[target]
        if target == start and len(names) > 1:
            return [*names, start]
    return []


def require_treatment(
    match: ClassMatch,
    counts: Mapping[str, int],
    own_counts: Mapping[str, int],
    treatment: str,
    source: str,
    command: str,
) -> None:
    """Raise UserError if classes that only one side has are not allowed by `treatment`, or if too few are shared.

    `counts` is {class of the set: images}, `own_counts` {class of the workspace: test images}. The message lists them
    with counts, and, for each treatment that would be accepted, `command` (without `--missing`) with that treatment.
    """
    lines = _listed(match, counts, own_counts)
    if not match.class_of:
        raise UserError(
            "\n".join([f"evaluate --data {source}: no class of the workspace in it", *lines, *_map_hint(match)])
        )
    if treatment == RESTRICT and len(match.shared) < 2:
        raise UserError(
            "\n".join(
                [
                    f"evaluate --data {source} --missing restrict: one shared class ({match.shared[0]}), of which "
                    "every answer would be right; expected two. Keep all classes as possible answers: --missing ignore",
                    *lines,
                ]
            )
        )
    if treatment != REFUSE or not lines:
        return
    treatments = [
        "  leave out images of other classes, and keep all classes of the workspace as possible answers:",
        f"    {command} --missing {IGNORE}",
    ]
    if len(match.shared) > 1:
        treatments += [
            "  also restrict the probabilities to the shared classes (on the test split too):",
            f"    {command} --missing {RESTRICT}",
        ]
    problem = f"evaluate --data {source}: its classes are not those of the workspace"
    raise UserError("\n".join([problem, *lines, *_map_hint(match), *treatments]))


def _listed(match: ClassMatch, counts: Mapping[str, int], own_counts: Mapping[str, int]) -> list[str]:
    unknown = [
        f"{printable(name)} ({format_count(counts[name], 'image')}{f'; did you mean {near}?' if near else ''})"
        for name, near in match.unknown.items()
    ]
    absent = [f"{printable(name)} ({format_count(own_counts[name], 'test image')})" for name in match.absent]
    return [
        *([f"  not in the workspace: {join_names(unknown, MAX_LISTED)}"] if unknown else []),
        *([f"  without an image in the set: {join_names(absent, MAX_LISTED)}"] if absent else []),
    ]


def _map_hint(match: ClassMatch) -> list[str]:
    if not match.unknown:
        return []
    examples = [(name, near) for name, near in match.unknown.items() if near] or [(next(iter(match.unknown)), "")]
    return [
        "  classes of other names: --class-map FILE, a CSV file of the lines",
        *(f"    {printable(_csv_line(values))}" for values in (HEADER, *examples[:MAX_LISTED])),
    ]


def _csv_line(values: Sequence[str]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="").writerow(values)
    return stream.getvalue()
