"""The section `runs.snapshot_ensemble`: BASE-BACK trains with a cyclic schedule; the ensemble averages the snapshots.

The training is the bundled pipeline's stage `snapshots` in a separate process, so that it can be resumed like every
training. `ensembles/snapshots.json` records the request, by which the next build recognises the result. Huang et al.
(2017), Snapshot Ensembles: Train 1, get M for free.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils import base_back
from utils.building import ensembles, fitting
from utils.building.builder_protocol import Build, Builder, Session, summary_line
from utils.core import estimates, subprocesses
from utils.core.artifacts import digest_of, write_json
from utils.core.parsed_files import record_once
from utils.discovery import discover
from utils.predictions import streaming
from utils.predictions.catalog import Catalog, Member
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")

VERSION = 1  # incremented when the same request would give different snapshots
CONFIG_KEY = "runs.snapshot_ensemble"
NAME, METHOD = "snapshot_ensemble", "snapshot"
DECIDING = ("DBT_BATCH_SIZE", "DBT_BACKBONE_LR", "DBT_DEBUG_MODE", "DBT_DEBUG_BATCH_SIZE")
"""Environment variables that the weights depend on and that checkpoints do not record."""
AGAIN = "Remove it, then run build-ensemble again"


class SnapshotBuilder(Builder):
    """The mean of all snapshots of the selected backbones, which are trained if they are missing.

    Finished trainings are kept even with `force`; `main.py --stages snapshots --force` repeats them. If the training of
    a backbone fails, it is reported as a failure, and the mean is that of the other backbones.
    """

    config_key = CONFIG_KEY

    def names(self, session: Session) -> list[str]:
        """Return the single ensemble if BASE-BACK can train a selected backbone."""
        is_on = session.config.runs.snapshot_ensemble.enable
        return [NAME] if is_on and parents_of(session.plain_members) else []

    def check(self, session: Session) -> None:
        """Warn about selected members that cannot have snapshots."""
        parents = parents_of(session.plain_members)
        others = [m.name for m in session.plain_members if m not in parents and m.source != "derived"]
        if parents and others:
            logger.warning("%s: no snapshots of %s, which BASE-BACK cannot train anew", CONFIG_KEY, ", ".join(others))

    def problems(self, session: Session) -> list[str]:
        """Return that there is no backbone to train, or the snapshots that discovery refuses."""
        parents = parents_of(session.plain_members)
        if not parents:
            return [f"{CONFIG_KEY}: none of the selected members is a network that BASE-BACK can train"]
        snapshots = [session.catalog.members[name] for name in _recorded(session.store, parents) or ()]
        return [_unusable(member) for member in snapshots if not member.usable]

    def inputs_digest(self, session: Session, name: str) -> str:
        """Return the digest of the usable snapshots of the last training."""
        names = _recorded(session.store, parents_of(session.plain_members)) or ()
        return _digest(session, [session.catalog.members[name] for name in names])

    def stale_reason(self, session: Session, name: str, record: Mapping[str, Any]) -> str | None:
        """Return that the training or its snapshots have changed; None if the ensemble is current."""
        if _recorded(session.store, parents_of(session.plain_members)) is None:
            return "its backbones, images or settings have changed since the build, or a snapshot is gone"
        return None if record["inputs_digest"] == self.inputs_digest(session, name) else "its snapshots have changed"

    def build(self, session: Session, names: Sequence[str], *, force: bool) -> Build:
        """Train missing snapshots, add them to the catalog and save their mean."""
        parents = parents_of(session.plain_members)
        snapshots = _recorded(session.store, parents)
        failures: list[str] = []
        if snapshots is None:
            session, snapshots, failures = _train(session, parents)
        members = [session.catalog.members[name] for name in snapshots]
        failures += [_unusable(member) for member in members if not member.usable]
        usable = [member for member in members if member.usable]
        if not usable:
            return Build(session, failed=(NAME,), failures=tuple(failures))
        is_built = force or ensembles.stored_digest(session.workspace, NAME) != _digest(session, members)
        if is_built:
            session.ensure(usable)
            facts = fitting.member_facts(session.store, usable)
            recipe = ensembles.COMBINERS[METHOD].configured(session.config, facts)
            rows = session.rows(usable)
            fitting.save(session.store, NAME, METHOD, fitting.fit(recipe, rows), usable, rows)
        return Build(session, (NAME,) if is_built else (), failures=tuple(failures))

    def describe_one(self, session: Session, name: str, state: str) -> list[str]:
        """Return the line of the ensemble with its number of snapshots."""
        record = ensembles.record_of(session.workspace, name) or {}
        snapshots = [session.catalog.members[member] for member in record["members"]]
        backbones = {parent for member in snapshots for parent in member.parents}
        counts = f"{len(snapshots)} snapshots of {len(backbones)} backbone(s)"
        return [f"{summary_line(session.workspace, name, state)}; {counts}"]


def _unusable(member: Member) -> str:
    return f"{CONFIG_KEY}: {member.name} cannot be used; run discover, which prints the reason"


def _digest(session: Session, snapshots: Sequence[Member]) -> str:
    usable = [member for member in snapshots if member.usable]
    return fitting.inputs_digest(session.config, session.store, usable, METHOD)


def parents_of(members: Sequence[Member]) -> list[Member]:
    """Return the members that BASE-BACK can train again: its trained networks, named by their architecture."""
    return [member for member in members if member.source == "trained" and member.architecture == member.name]


def _recorded(store: Store, parents: Sequence[Member]) -> list[str] | None:
    """Return the names of the snapshots of the last training; None if its request differs or files are missing."""
    record = record_once(store.workspace.snapshots, remedy=AGAIN, form={"members": list})
    if record is None or record["key"] != _key(store, parents):
        return None
    for name in record["members"]:
        member = store.catalog.members.get(name)
        path = store.workspace.base / member.checkpoints[0]["path"] if member else None
        if path is None or not store.digests.is_intact(path):
            return None
    return list(record["members"])


def _key(store: Store, parents: Sequence[Member]) -> str:
    """Return the digest of everything that the snapshots depend on."""
    settings = store.config.runs.snapshot_ensemble
    code = [base_back.source_digest(folder) for folder in dict.fromkeys((base_back.BUNDLED, base_back.locate()))]
    return digest_of(
        [
            *(VERSION, settings.n_snapshots, settings.epochs_per_cycle, store.config.seed, code),
            {member.name: member.digest for member in parents},
            [store.catalog.splits[split]["digest"] for split in ("train", "val")],
            {name: os.environ.get(name) for name in DECIDING},
        ]
    )


# training ------------------------------------------------------------------------------------------------------------


def _train(session: Session, parents: Sequence[Member]) -> tuple[Session, list[str], list[str]]:
    """Run unfinished trainings in the base pipeline and add the snapshots to the catalog.

    Returns the session with the new catalog, the names of the snapshots, and the failures.
    """
    store = session.store
    settings = store.config.runs.snapshot_ensemble
    logger.info(
        "training %d snapshot(s) of %d backbone(s), %d epochs each: %s where nothing is finished yet",
        *(settings.n_snapshots, len(parents), settings.epochs_per_cycle, _expected(store, parents)),
    )
    command = _command(store, parents)
    code, output, errors = subprocesses.run_program(command, _environment(store))
    summary = json.loads(output) if output.strip() else None
    if summary is None:
        message = " ".join(errors) or "it printed nothing"
        failure = f"{CONFIG_KEY}: training ended with code {code}: {message}. To see more: {shlex.join(command)}"
        return session, [], [failure]
    failures = [f"{CONFIG_KEY}: {unit}: {reason}" for unit, reason in summary["failed"].items()]
    lost = {unit.partition(" ")[0] for unit in summary["failed"]}
    names = [
        Path(file).stem
        for parent in parents
        if parent.name not in lost
        for file in summary["results"][parent.name]["snapshots"]["files"]
    ]
    session = session.with_catalog(_updated_catalog(store, parents, names))
    if not failures:
        write_json(store.workspace.snapshots, {"key": _key(store, parents), "members": sorted(names)})
    return session, sorted(names), failures


def _updated_catalog(store: Store, parents: Sequence[Member], names: Sequence[str]) -> Catalog:
    """Return the catalog with the snapshots that the training wrote or replaced, without those that it removed."""
    before = [
        name
        for name, member in store.catalog.members.items()
        if member.source == "derived" and any(name.startswith(f"{parent.name}_snapshot") for parent in parents)
    ]
    train = store.images("train")
    return discover.register_derived(
        store.config, store.workspace, store.digests, train, store.catalog, [*before, *names]
    )


def _expected(store: Store, parents: Sequence[Member]) -> estimates.Estimate:
    settings, base = store.config.runs.snapshot_ensemble, base_back.settings()
    files = [store.workspace.base / parent.checkpoints[0]["path"] for parent in parents]
    return estimates.estimate_training(
        [path.stat().st_size for path in files if path.is_file()],
        store.catalog.splits["train"]["n"],
        epochs=settings.n_snapshots * settings.epochs_per_cycle,
        kept=settings.n_snapshots,
        batch_size=base.BATCH_SIZE,
        img_size=max(parent.img_size or 0 for parent in parents),
        on_cuda=streaming.resolve_device(store.config.device) != "cpu",
    )


def _command(store: Store, parents: Sequence[Member]) -> list[str]:
    settings, mounted = store.config.runs.snapshot_ensemble, base_back.locate()
    return [
        *(sys.executable, str(base_back.BUNDLED / "src" / "main.py"), "--stages", "snapshots"),
        *("--backbones", *(parent.name for parent in parents)),
        *("--snapshots", str(settings.n_snapshots), "--epochs-per-cycle", str(settings.epochs_per_cycle)),
        *("--seed", str(store.config.seed), "--workspace", str(store.workspace.root), "--json"),
        *(("--base-back", str(mounted)) if base_back.kind(mounted) == "external" else ()),
    ]


def _environment(store: Store) -> dict[str, str]:
    """Return the environment variables of the training: the workspace's folders and the configured device."""
    workspace, device = store.workspace, store.config.device
    variables = {
        "DBT_SPLIT_DIR": str(workspace.split_dir),
        "DBT_TRAINED_DIR": str(workspace.checkpoints),
        "DBT_IMAGE_CACHE_DIR": str(workspace.image_cache),
    }
    if base_back.kind(base_back.locate()) == "external":  # whose checkpoints do not record the image size
        variables["DBT_IMG_SIZE"] = os.environ.get("DBT_IMG_SIZE") or str(base_back.settings().IMG_SIZE)
    if device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    elif device.startswith("cuda:"):
        number = int(device.partition(":")[2])
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        variables["CUDA_VISIBLE_DEVICES"] = (
            visible[number] if number < len(visible) and visible[number] else str(number)
        )
    return os.environ | variables
