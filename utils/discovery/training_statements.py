"""`discover --trained-on`: statements of the user on the training data of declared networks.

A statement belongs to the weights: it is kept as long as the content of the checkpoint does not change. A list of
images is stored by content, so that it remains valid for another split of the same images.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.core.artifacts import digest_of, read_arrays, write_arrays
from utils.core.errors import UserError, did_you_mean, nearest_first
from utils.core.workspace import Workspace
from utils.predictions.catalog import Catalog, Member, Problem
from utils.predictions.image_splits import ImageSplit
from utils.predictions.training_data import FILE, STATEMENTS, TRAIN, UNKNOWN, combined, command

OPTION = "--trained-on"
CODE = "unknown_training_data"
UNMATCHED = "training_list"
TOLERATED = 0.1  # share of a list's lines that may match no image, for example images removed from the data
WORDS = tuple(statement for statement in STATEMENTS if statement != FILE)
DIGEST = re.compile(r"[0-9a-fA-F]{64}")
MOST_BYTES = 256 << 20
EXPECTED = f"expected {', '.join(WORDS)} or a file that lists images, for --add, or NAME=one of these"


@dataclass(frozen=True)
class Statement:
    """The statement on the training data of one network."""

    text: str
    """Text as typed, for messages"""
    trained_on: str
    file: Path | None
    """The list of a `file` statement"""


def parse(values: Sequence[str], added: Collection[str], declared: Collection[str]) -> dict[str, Statement]:
    """{network: statement} of the values of `--trained-on`: `STATEMENT` for the `added` networks, or `NAME=STATEMENT`.

    `declared` are all networks declared now or earlier. Raises UserError for an invalid value, for a network that was
    not declared, and for two statements on one network.
    """
    statements: dict[str, Statement] = {}
    for value in values:
        name, sign, statement_text = value.partition("=")
        is_named = bool(sign) and not Path(value).expanduser().is_file()
        if is_named and name not in declared:
            raise UserError(
                f"{OPTION} {value}: {name} is no network that was declared with --add"
                f"{nearest_first(name, sorted(declared), 'These were')}. What networks of the base "
                "pipeline were trained on is in their checkpoints; of imported predictions nothing is known"
            )
        if not is_named and not added:
            raise UserError(
                f"{OPTION} {value}: no network is added by this command. Name one that was declared: {OPTION} "
                f"NAME={value}; these were: {', '.join(sorted(declared)) or 'none'}"
            )
        statement = _statement(value, statement_text if is_named else value)
        for target in [name] if is_named else sorted(added):
            # A statement on a named network takes precedence over one on all added networks.
            if target in statements and is_named == ("=" in statements[target].text):
                raise UserError(f"{OPTION} {value}: {OPTION} {statements[target].text} is about {target} too")
            if target not in statements or is_named:
                statements[target] = statement
    return statements


def _statement(value: str, text: str) -> Statement:
    if text in WORDS:
        return Statement(value, text, None)
    path = Path(text).expanduser().absolute()
    if not path.is_file():
        near = did_you_mean(text, WORDS) or did_you_mean(path.name, [entry.name for entry in path.parent.glob("*")])
        raise UserError(f"{OPTION} {value}: {text!r} is no statement and no such file exists{near or ';'} {EXPECTED}")
    return Statement(value, FILE, path)


def with_statements(
    workspace: Workspace,
    splits: Mapping[str, ImageSplit],
    members: Mapping[str, Member],
    earlier: Catalog | None,
    statements: Mapping[str, Statement],
) -> tuple[dict[str, Member], list[str]]:
    """The members with their training data, and a message for each list of images; stores the lists.

    For a network trained by the base pipeline, the statement is about its initial weights. A network without a new
    statement keeps its earlier one as long as its weights do not change. Raises UserError for a list that names none of
    the images or cannot be read.
    """
    previous = earlier.members if earlier else {}
    stated: dict[str, Member] = {}
    messages = []
    for name, member in members.items():
        before = previous.get(name)
        if name in statements:
            member, message = _stated(workspace, splits, member, statements[name])
            messages += [message] if message else []
        elif member.trained_on == UNKNOWN and before is not None and _same_weights(member, before):
            member = replace(
                member,
                trained_on=before.trained_on,
                training_list=_recounted(workspace, splits, before),
                pretrained_on=before.pretrained_on,
            )
        stated[name] = member
    for name, member in stated.items():
        if member.source == "derived":
            stated[name] = _of_parents(member, stated, previous)
    return stated, messages


def _recounted(workspace: Workspace, splits: Mapping[str, ImageSplit], member: Member) -> dict[str, Any] | None:
    """The facts of a member's stored list for the current images of the splits."""
    path = workspace.training_data(member.name)
    if member.training_list is None or not path.is_file():
        return member.training_list
    remedy = f"State it again: {command([member.name], 'FILE')}"
    listed = frozenset(read_arrays(path, remedy=remedy)["contents"].tolist())
    return {**member.training_list, "rows": _listed_rows(splits, listed)}


def _listed_rows(splits: Mapping[str, ImageSplit], listed: Collection[str]) -> dict[str, int]:
    """{split: number of its images in a list}"""
    return {name: sum(content in listed for content in split.contents) for name, split in splits.items()}


def of_unknown_origin(members: Mapping[str, Member]) -> list[str]:
    """Members that the base pipeline trained from weights of unknown training data."""
    return [name for name, member in members.items() if member.pretrained_on == UNKNOWN]


def _same_weights(member: Member, before: Member) -> bool:
    now, then = (each.checkpoints[0]["sha256"] if each.checkpoints else None for each in (member, before))
    return now is not None and now == then


def _of_parents(member: Member, members: Mapping[str, Member], previous: Mapping[str, Member]) -> Member:
    """A derived member with the widest statement of its parents; if a parent is missing, its earlier one counts too."""
    sources = [members[name] for name in member.parents if name in members]
    before = previous.get(member.name)
    if len(sources) < len(member.parents) and before is not None and before.digest == member.digest:
        sources.append(before)
    return replace(member, trained_on=combined([TRAIN, *(source.trained_on for source in sources)]))


def _stated(
    workspace: Workspace, splits: Mapping[str, ImageSplit], member: Member, statement: Statement
) -> tuple[Member, str | None]:
    if member.pretrained_on == UNKNOWN:  # trained in this workspace, from weights of other origin
        if statement.file is not None:
            raise UserError(
                f"{OPTION} {statement.text}: {member.name} was trained here on other weights, of which a list is not "
                f"supported; expected {', '.join(WORDS)}"
            )
        trained_on = combined([TRAIN, statement.trained_on])
        return replace(member, pretrained_on=statement.trained_on, trained_on=trained_on), None
    if statement.file is None:
        return replace(member, trained_on=statement.trained_on, training_list=None), None
    entries = read_list(statement.file)
    contents = {content for split in splits.values() for content in split.contents}
    contents_of_id: dict[str, set[str]] = {}
    for split in splits.values():
        for sample_id, content in zip(split.sample_ids, split.contents, strict=True):
            contents_of_id.setdefault(sample_id, set()).add(content)
    digests = {entry.lower() for entry in entries if DIGEST.fullmatch(entry)}
    ids = [entry for entry in entries if not DIGEST.fullmatch(entry)]
    listed = digests.union(*(contents_of_id[entry] for entry in ids if entry in contents_of_id))
    strangers = [entry for entry in ids if entry not in contents_of_id] + sorted(digests - contents)
    unmatched = len(strangers)
    if not listed & contents:
        first = entries[0] if entries else "it is empty"
        raise UserError(
            f"{OPTION} {statement.text}: {statement.file}: none of its {len(entries)} lines names an image of the "
            f"workspace; the first: {first[:80]}. Expected sample ids such as {splits['train'].sample_ids[0]}, the "
            f"path below the folder of the split, or SHA-256 of files. If it saw none of the images: {OPTION} "
            f"{member.name}=none"
        )
    rows = _listed_rows(splits, listed)
    facts = {"digest": digest_of(sorted(listed)), "rows": rows, "unmatched": unmatched}
    facts |= {"lines": len(entries), "unmatched_line": strangers[0][:80] if strangers else None}
    write_arrays(workspace.training_data(member.name), {"contents": np.array(sorted(listed))})
    shown = ", ".join(f"{rows[name]} of {len(split.contents)} of {name}" for name, split in splits.items())
    message = f"{member.name}: trained on {shown}; {unmatched} of {len(entries)} lines name no image of the workspace"
    return replace(member, trained_on=FILE, training_list=facts), message


def read_list(path: Path) -> list[str]:
    """The first column of a text or CSV file, without its header and without duplicates.

    Raises UserError for a file that is not UTF-8 text, or too large.
    """
    remedy = "Write one sample id or SHA-256 per line"
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path}: more than {MOST_BYTES >> 20} MB; expected a list of images. {remedy}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = [cells[0].strip() for cells in csv.reader(text.splitlines()) if cells and cells[0].strip()]
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise UserError(f"{path}: cannot be read as a list of images ({error}). {remedy}") from error
    has_heading = bool(lines) and "/" not in lines[0] and not DIGEST.fullmatch(lines[0])
    return list(dict.fromkeys(lines[1:] if has_heading else lines))


def problems(members: Mapping[str, Member], sample_id: str) -> list[Problem]:
    """A warning for each network whose training data is not stated, or whose list matches few images.

    `sample_id` is an example from the workspace, to show the format of a list's lines.
    """
    unmatched = [
        Problem(
            UNMATCHED,
            "warning",
            name,
            f"{facts['unmatched']} of the {facts['lines']} lines of its list of training images name no image of the "
            f"workspace, first {facts['unmatched_line']}; images that are not listed count as unseen",
            f"If these images are in the workspace, list them as {sample_id}, the path below the folder of the split, "
            f"or by SHA-256, and type: {command([name], 'FILE')}",
        )
        for name, member in members.items()
        if (facts := member.training_list) is not None
        and facts["unmatched"] > TOLERATED * (facts.get("lines") or math.inf)  # missing in older catalogs
    ]
    return unmatched + [
        Problem(
            CODE,
            "warning",
            name,
            "its training data is not stated, so it is scored but neither ranked nor recommended",
            f"If it was the train images alone: {command([name], TRAIN)}; or none, train+val, all, or a file",
        )
        for name, member in members.items()
        if member.trained_on == UNKNOWN and member.source == "trained"
    ]


def summary_lines(members: Mapping[str, Member]) -> list[str]:
    """A line on the members that were trained on other images than those of train, if there are any."""
    other_members = [
        f"{name} {member.trained_on}" for name, member in sorted(members.items()) if member.trained_on != TRAIN
    ]
    return [f"trained on other images than those of train: {', '.join(other_members)}"] if other_members else []
