"""The section `tta`: views of test-time augmentation, used if they lower the log-loss of out-of-sample rows.

A member for which views are selected gets a derived member `<member>_tta`, which replaces it in every other ensemble;
`tta_ensemble` is the mean of all selected members with their views. `ensembles/tta/<member>.json` records each choice,
by which the next build recognises it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from utils.building import ensembles, fitting, view_outputs
from utils.building.builder_protocol import LEFT_OUT, Build, Builder, Session, summary_line
from utils.building.view_outputs import FULL_NETWORK, MemberViews
from utils.core.artifacts import digest_of, write_arrays, write_json
from utils.core.errors import UserError
from utils.numeric.metrics import accuracy, softmax
from utils.numeric.view_choice import ViewChoice, ViewOutputs, choose_views
from utils.predictions import catalog, training_data, view_members
from utils.predictions.catalog import Member
from utils.predictions.folds import crossfit_folds
from utils.predictions.row_groups import row_groups
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")

VERSION = 1  # incremented when the same networks and images would give a different choice
CONFIG_KEY = "tta"
NAME, METHOD = "tta_ensemble", "tta"
COUNTS = {"flip": 1, "five_crop": 5, "rotations": 3, "multi_scale": 2}
"""{group: number of its views}"""
NONE_HELPS = "no views lower the log-loss of out-of-sample rows by more than chance"


class ViewBuilder(Builder):
    """Selects views, derives the members that average over them, and saves the mean of all members."""

    config_key = CONFIG_KEY

    def names(self, session: Session) -> list[str]:
        """Return the single ensemble if the section is on."""
        return [NAME] if session.config.tta.enable else []

    def members(self, session: Session) -> Sequence[Member]:
        """Return the selected members, each with its views if it has any."""
        return view_members.preferred(session.catalog, session.config, session.plain_members)

    def left_out(self, session: Session) -> Mapping[str, str]:
        """Return the ensemble if views help no member."""
        if not session.config.tta.enable:
            return {}
        try:
            records = _records(session)
        except UserError:  # a damaged record is reported by `stale_reason`
            return {}
        if records is None or any(record["views"] for record in records.values()):
            return {}
        return {NAME: NONE_HELPS}

    def problems(self, session: Session) -> list[str]:
        """Return no problems: that no views help is a valid result."""
        return []

    def inputs_digest(self, session: Session, name: str) -> str:
        """Return the digest of the members with their views, and of everything that the choice of views depends on."""
        extra = _keys(session)
        return fitting.inputs_digest(session.config, session.store, self.members(session), METHOD, extra_inputs=extra)

    def stale_reason(self, session: Session, name: str, record: Mapping[str, Any]) -> str | None:
        """Return that a member's networks, images or the settings of the choice have changed; None if current."""
        if _records(session) is None:
            return "its networks, images or settings have changed since the views were chosen"
        return super().stale_reason(session, name, record)

    def build(self, session: Session, names: Sequence[str], *, force: bool) -> Build:
        """Run the networks on all views, select views, derive the members and save their mean."""
        store, plain = session.store, session.plain_members
        session.ensure(plain)
        reasons = {member.name: view_outputs.reason_without(store, member) for member in plain}
        able = [member for member in plain if reasons[member.name] is None]
        outputs = {member.name: view_outputs.measure(store, member, session.config.tta.views) for member in able}
        choices = _choices(store, outputs)
        keys = _keys(session)
        for member in plain:
            entry: dict[str, Any] = {"key": keys[member.name], "networks": view_members.networks_digest(member)}
            if member.name in choices:
                entry |= choices[member.name].as_record()
                entry["oof"] = _save_oof(store, member, choices[member.name], outputs[member.name])
            else:
                entry |= {"views": [], "reason": reasons[member.name]}
            write_json(store.workspace.view_choice(member.name), entry)
        listed = view_members.with_views(store.workspace, session.catalog)
        catalog.save(store.workspace, listed)
        session = replace(session.with_catalog(listed), members=tuple(_preferred(session, listed)))
        if self.left_out(session):
            return Build(session)
        members = self.members(session)
        session.ensure(members)
        rows = session.rows(members)
        recipe = ensembles.COMBINERS[METHOD].configured(session.config, fitting.member_facts(session.store, members))
        fitting.save(
            session.store,
            NAME,
            METHOD,
            fitting.fit(recipe, rows),
            members,
            rows,
            extra_inputs=keys,
            notes={"tta": {name: choice.as_record() for name, choice in choices.items()}},
        )
        return Build(session, (NAME,))

    def describe_one(self, session: Session, name: str, state: str) -> list[str]:
        """Return lines on the ensemble's scores, and on each member's views with their gain on out-of-sample rows."""
        if state.startswith(LEFT_OUT):
            lines = [f"{name:36} none        {NONE_HELPS}"]
        else:
            lines = [summary_line(session.workspace, name, state)]
        for member, record in (_records(session) or {}).items():
            lines.append(f"    {member}: {describe(record)}")
        return lines


def describe(record: Mapping[str, Any]) -> str:
    """Return text on the views of a member, from its recorded choice."""
    if not record["views"]:
        return f"without views: {why_without(record)}"
    interval = record["log_loss_gain_ci95"]
    bounds = "" if interval is None else f" [{interval[0]:+.4f}, {interval[1]:+.4f}]"
    gain = f"cross-fitted gain in calibrated log-loss {record['log_loss_gain']:+.4f}{bounds}"
    return f"{', '.join(record['views'])} ({forward_passes(record['views'])} forward passes for an image); {gain}"


def forward_passes(views: Sequence[str]) -> int:
    """Return the number of forward passes per image: the image itself and the views of these groups."""
    return 1 + sum(COUNTS[group] for group in views)


def why_without(record: Mapping[str, Any]) -> str:
    """Return why a member is used without views; "" if it has some."""
    if record["views"]:
        return ""
    if record.get("reason"):
        return str(record["reason"])
    if record["chosen_on_all_rows"]:
        unstable = ", ".join(record["chosen_on_all_rows"])
        return f"{unstable} would be chosen on all rows, others without one or two of the folds"
    return NONE_HELPS


def _preferred(session: Session, listed: catalog.Catalog) -> list[Member]:
    return view_members.preferred(listed, session.config, session.plain_members)


def _keys(session: Session) -> dict[str, str]:
    """Return {member: digest of everything that the choice of its views depends on}, without images or checkpoints."""
    store, members = session.store, session.plain_members
    splits = [store.catalog.splits[split]["digest"] for split in ("train", "val")]
    rule = store.config.digest("tta", "dataset.group_regex", "seed")
    networks = {member.name: view_members.networks_digest(member) for member in members}
    stated = training_data.stated(store.catalog, networks)
    common = [VERSION, view_outputs.VERSION, splits, list(store.catalog.classes), rule]
    all_networks = networks if store.config.tta.scope == "ensemble" else {}
    return {name: digest_of([*common, digest, all_networks, stated.get(name)]) for name, digest in networks.items()}


def _records(session: Session) -> dict[str, dict[str, Any]] | None:
    """Return {selected member: its recorded choice}; None if one is missing or has other inputs."""
    records = {}
    for name, key in _keys(session).items():
        record = view_members.record_of(session.workspace, name)
        if record is None or record["key"] != key:
            return None
        records[name] = record
    return records


def _choices(store: Store, outputs: Mapping[str, MemberViews]) -> dict[str, ViewChoice]:
    """Return {member: its views}, selected per member, or one choice for all on the rows that all members share."""
    if store.config.tta.scope == "member":
        return {name: choose_views(shared_outputs(store, [part])) for name, part in outputs.items()}
    if not outputs:
        return {}
    return dict.fromkeys(outputs, choose_views(shared_outputs(store, list(outputs.values()))))


def shared_outputs(store: Store, parts: Sequence[MemberViews]) -> ViewOutputs:
    """Return the outputs of members on the rows that all of them have.

    Raises UserError if they share no row.
    """
    listed = [part.keys() for part in parts]
    shared = set.intersection(*map(set, listed))
    keys = [key for key in listed[0] if key in shared]
    if not keys:
        raise UserError(
            "tta: no row is out of sample for all members, and tta.scope is ensemble. Let each member's rows decide: "
            "--set tta.scope=member"
        )
    rows = []
    for names in listed:
        row_of = {key: row for row, key in enumerate(names)}
        rows.append([row_of[key] for key in keys])
    logits = {
        group: np.stack([part.logits[group][indices] for part, indices in zip(parts, rows, strict=True)])
        for group in parts[0].logits
    }
    fold_of = crossfit_folds(store)
    return ViewOutputs(
        logits=logits,
        counts=COUNTS,
        labels=parts[0].labels[rows[0]],
        folds=np.array([fold_of[key] for key in keys]),
        groups=row_groups(store, keys),
    )


def _save_oof(store: Store, member: Member, choice: ViewChoice, outputs: MemberViews) -> dict[str, Any] | None:
    """Write the member's out-of-fold predictions with its views; return their catalog entry, None without any."""
    rows = np.flatnonzero(outputs.network != FULL_NETWORK)
    if not choice.views or not len(rows):
        return None
    parts = {name: logits[None, rows] for name, logits in outputs.logits.items()}
    labels, folds = outputs.labels[rows], outputs.network[rows]
    logits = ViewOutputs(parts, COUNTS, labels, folds).mean_logits(choice.views)[0].astype(np.float32)
    path = store.workspace.view_oof(member.name)
    arrays = {
        "logits": logits,
        "labels": labels,
        "sample_ids": outputs.sample_ids[rows],
        "fold": folds,
        "classes": np.array(store.catalog.classes),
    }
    write_arrays(path, arrays)
    return {
        "path": store.workspace.relative(path),
        "sha256": store.digests.of(path),
        "rows": len(rows),
        "folds": len(np.unique(folds)),
        "accuracy": accuracy(softmax(logits), labels),
    }
