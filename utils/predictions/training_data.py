"""The training images of a member's weights, as stated by the user or recorded by the base pipeline.

A statement is one of `STATEMENTS` and applies to the full network; `Member.pretrained_on` is the statement on the
initial weights of the full network and of its fold networks. The training images of a derived member include those of
its parents.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from utils.core.artifacts import read_arrays
from utils.core.errors import LeakageError, UserError
from utils.core.workspace import SPLITS, Workspace
from utils.predictions.catalog import DISCOVER, IMPORTED, Catalog, Member
from utils.predictions.rows import MemberRows, Samples

NONE, TRAIN, TRAIN_VAL, ALL, FILE, UNKNOWN = STATEMENTS = ("none", "train", "train+val", "all", "file", "unknown")
"""`none`: no image of the workspace; `file`: the images in a list; `train` to `all`: all images of these splits."""
SPLITS_OF: dict[str, tuple[str, ...]] = {NONE: (), TRAIN: ("train",), TRAIN_VAL: ("train", "val"), ALL: SPLITS}
WIDEST_LAST = (NONE, TRAIN, FILE, TRAIN_VAL, ALL, UNKNOWN)
MARK = "unknown training data"
"""Mark in tables for a model with a member of unknown training data"""


class SampleStore(Protocol):
    """The part of the prediction store that this module needs; the store imports this module."""

    @property
    def workspace(self) -> Workspace:
        """Workspace of the members."""

    @property
    def catalog(self) -> Catalog:
        """Catalog of the members."""

    def samples(self, split: str) -> Samples:
        """The samples of a split."""


def combined(statements: Iterable[str]) -> str:
    """The widest of some statements, which is the statement on weights that were trained further or averaged."""
    return max(statements, key=WIDEST_LAST.index)


def lineage(catalog: Catalog, member: Member) -> list[Member]:
    """The member and all members in the catalog that it was derived from, directly or indirectly."""
    listed = {member.name: member}
    queue = list(member.parents)
    while queue:
        parent = catalog.members.get(queue.pop())
        if parent is not None and parent.name not in listed:
            listed[parent.name] = parent
            queue += parent.parents
    return list(listed.values())


def is_unknown(catalog: Catalog, member: Member) -> bool:
    """Whether the training data of the member, or of one that it was derived from, is unknown."""
    if any(UNKNOWN in (each.trained_on, each.pretrained_on) for each in lineage(catalog, member)):
        return True
    is_without_list = member.trained_on == FILE and member.source == "derived"  # the lists are those of its parents
    return is_without_list and not set(member.parents) <= catalog.members.keys()


def unknown_names(catalog: Catalog, names: Iterable[str]) -> list[str]:
    """Sorted names of the given members of the catalog whose training data is unknown."""
    return sorted({name for name in names if name in catalog.members and is_unknown(catalog, catalog.members[name])})


def unseen_splits(member: Member) -> tuple[str, ...]:
    """Splits that the full network was not trained on, by its statement; `unknown` counts as `train`."""
    if member.trained_on == FILE:
        return tuple(split for split, count in (member.training_list or {"rows": {}})["rows"].items() if not count)
    trained_splits = SPLITS_OF.get(member.trained_on, SPLITS_OF[TRAIN])
    return tuple(split for split in SPLITS if split not in trained_splits)


def fitted_rows(store: SampleStore, member: Member, split: str) -> frozenset[str]:
    """Sample ids of the images of a split that the full network, or one that it was derived from, was trained on.

    A list includes all images with the contents of a listed image. For `unknown`, these are the train images;
    `is_unknown` tells whether there may be others. Raises UserError if a list is missing or damaged.
    """
    parts = (_rows_of(store, each, each.trained_on, split) for each in lineage(store.catalog, member))
    return frozenset().union(*parts)


def pretraining_rows(store: SampleStore, member: Member) -> frozenset[str]:
    """Sample ids of the train images that the weights were trained on before any fold was held out."""
    return frozenset() if member.pretrained_on == NONE else _rows_of(store, member, member.pretrained_on, "train")


def has_train_rows(store: SampleStore, member: Member) -> bool:
    """Whether a member has out-of-sample predictions of some train images, by its fold networks or full network."""
    if member.oof is not None:
        return member.pretrained_on == NONE
    return predicts_unseen_train_rows(store, member)


def predicts_unseen_train_rows(store: SampleStore, member: Member) -> bool:
    """Whether the full network's predictions of some train images are out of sample, without fold networks.

    False for a member with out-of-fold predictions, which take precedence, and for imported and derived members, except
    those derived only by views.
    """
    if member.oof is not None or member.source == IMPORTED or (member.source == "derived" and not member.views):
        return False
    if member.trained_on != FILE:
        return member.trained_on == NONE
    return len(fitted_rows(store, member, "train")) < store.catalog.splits["train"]["n"]


def _rows_of(store: SampleStore, member: Member, statement: str, split: str) -> frozenset[str]:
    if statement == FILE and member.source != "derived":
        samples, listed = store.samples(split), listed_contents(store, member)
        pairs = zip(samples.sample_ids, samples.contents or (), strict=True)
        return frozenset(sample_id for sample_id, content in pairs if content in listed)
    is_trained_on = split in SPLITS_OF.get(statement, SPLITS_OF[TRAIN])
    return frozenset(store.samples(split).sample_ids) if is_trained_on else frozenset()


def listed_contents(store: SampleStore, member: Member) -> frozenset[str]:
    """SHA-256 of the images in the list of a `file` statement."""
    path = store.workspace.training_data(member.name)
    remedy = f"State it again: {command([member.name], 'FILE')}"
    if not path.is_file():
        raise UserError(f"{path}: missing; it lists the images that {member.name} was trained on. {remedy}")
    contents: np.ndarray = read_arrays(path, remedy=remedy)["contents"]
    return frozenset(contents.tolist())


def stated(catalog: Catalog, names: Iterable[str]) -> dict[str, list[str]]:
    """{member: its statements, its parents' and the digest of its list}, for digests of dependents; JSON-ready.

    Members of the base pipeline trained from random weights and members that the catalog lacks are omitted.
    """
    statements: dict[str, list[str]] = {}
    for name in sorted(set(names) & catalog.members.keys()):
        facts = [
            [each.trained_on, each.pretrained_on, str((each.training_list or {}).get("digest", ""))]
            for each in lineage(catalog, catalog.members[name])
        ]
        if any(fact != [TRAIN, NONE, ""] for fact in facts):
            statements[name] = [word for fact in facts for word in fact]
    return statements


def command(names: Iterable[str], statement: str) -> str:
    """The command that states the training data of some declared members."""
    values = [f"{name}={statement}" for name in names]
    return shlex.join([*DISCOVER, "--trained-on", *values])


def remedy(catalog: Catalog, names: Iterable[str]) -> str:
    """A sentence, without a full stop, that tells how to state the unknown training data of the named members."""
    family = [each for name in names if name in catalog.members for each in lineage(catalog, catalog.members[name])]
    declared = sorted({each.name for each in family if each.trained_on == UNKNOWN and each.source == "trained"})
    if not declared:  # derived members may remain after the members that they were derived from are removed
        removed = sorted({parent for each in family for parent in each.parents} - catalog.members.keys())
        sources = " ".join(f"{name}=SOURCE" for name in removed)
        return f"Add again: python ensemble_orchestrator.py discover --add {sources} --trained-on STATEMENT"
    others = ", ".join(statement for statement in STATEMENTS if statement not in (TRAIN, FILE, UNKNOWN))
    return (
        f"If it was the train images alone, type: {command(declared, TRAIN)}; otherwise {others}, or a file that lists "
        "the images, in place of train"
    )


def require_shared_splits(catalog: Catalog, parts: Mapping[str, Sequence[MemberRows]]) -> None:
    """Raise LeakageError if members' out-of-sample rows, {member: its rows}, have no common split."""
    splits = {name: {part.split for part in member_parts} for name, member_parts in parts.items()}
    if not splits or set.intersection(*splits.values()):
        return
    shown = ", ".join(
        f"{name} ({catalog.members[name].trained_on}) of {' and '.join(sorted(held)) or 'no split'}"
        for name, held in sorted(splits.items())
    )
    fewest = min(splits, key=lambda name: (len(splits[name]), name))
    raise LeakageError(
        f"no row is out of sample for all members: by what they were trained on, the out-of-sample rows are those of "
        f"{shown}. Leave one out, such as --set backbones.exclude=[{fewest}], or give it out-of-fold predictions"
    )


def require_some_known(catalog: Catalog, names: Iterable[str]) -> None:
    """Raise LeakageError if the training data of all named members is unknown, so that no row is out of sample."""
    names = list(names)
    unknown = unknown_names(catalog, names)
    if names and len(unknown) == len(set(names)):
        raise LeakageError(
            f"the training data of {', '.join(unknown)} is not stated, so no row counts as out of sample and "
            f"nothing can be fitted or recommended. {remedy(catalog, names)}"
        )
