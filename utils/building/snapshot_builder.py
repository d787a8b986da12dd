"""The section `runs.snapshot_ensemble`: the base pipeline trains cyclically, the plain mean of what it leaves is saved.

The training is the bundled pipeline's stage `snapshots`, in a process of its own, so that it resumes and knows what is
finished as every training does. What it was asked for stands in `ensembles/snapshots.json`, by which the result is
known the next time. Huang et al. 2017, Snapshot Ensembles: Train 1, get M for free.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from utils import base_back
from utils.building import ensembles, fitting
from utils.core import estimates, subprocesses
from utils.core.artifacts import digest_of, read_record, write_json
from utils.core.results import Result
from utils.discovery import discover
from utils.predictions import extraction, streaming
from utils.predictions.catalog import Member
from utils.predictions.extraction import STREAMED_SPLITS
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")

VERSION = 1  # raised whenever the same request would be answered by other snapshots
CONFIG_KEY = "runs.snapshot_ensemble"
NAME, METHOD = "snapshot_ensemble", "snapshot"
DECIDING = ("DBT_BATCH_SIZE", "DBT_BACKBONE_LR", "DBT_DEBUG_MODE", "DBT_DEBUG_BATCH_SIZE")
"""Variables that the weights depend on and that no checkpoint tells."""
AGAIN = "Remove it, then run build-ensemble again"


def snapshots(store: Store, members: Sequence[Member], force: bool) -> Result:
    """The mean of all snapshots of the selected backbones, which are trained where they are not yet.

    Finished trainings are kept, `force` or not: `main.py --stages snapshots --force` does them again. A backbone whose
    training fails is a failure of the result; the mean is then that of the others.
    """
    parents = _parents(members)
    if not parents:
        return Result("", {}, [f"{CONFIG_KEY}: none of the selected members is a network that BASE-BACK can train"])
    others = [member.name for member in members if member not in parents and member.source != "derived"]
    if others:
        logger.warning("%s: no snapshots of %s, which BASE-BACK cannot train anew", CONFIG_KEY, ", ".join(others))
    names, failures = _trained_before(store, parents), []
    if names is None:
        names, failures = _train(store, parents)
    found = [store.catalog.members[name] for name in names]
    failures += [
        f"{CONFIG_KEY}: {member.name} cannot be used; discover says why" for member in found if not member.usable
    ]
    usable = [member for member in found if member.usable]
    if not usable:
        return Result("", {}, failures)
    wanted = fitting.inputs_digest(store.config, store, usable, METHOD)
    is_fresh = force or ensembles.stored_digest(store.workspace, NAME) != wanted
    if is_fresh:
        extraction.ensure(store, usable, STREAMED_SPLITS)
        recipe = ensembles.COMBINERS[METHOD].configured(store.config, fitting.member_facts(store, usable))
        fitting.build(store, NAME, METHOD, recipe, usable, fitting.out_of_sample_rows(store, usable))
    state, key = ("built", "built") if is_fresh else ("up to date", "up_to_date")
    backbones = {parent for member in usable for parent in member.parents}
    text = f"{fitting.summary_line(store, NAME, state)}; {len(usable)} snapshots of {len(backbones)} backbone(s)"
    return Result(text, {key: [NAME]}, failures)


def reason_against(store: Store, members: Sequence[Member]) -> str | None:
    """Why the snapshot ensemble on disk is not what a build would make; None: it is. Needs no torch."""
    parents = _parents(members)
    names = _trained_before(store, parents) if parents else ()
    if names is None:
        return "its backbones, images or settings are others now, or a snapshot is gone"
    found = [store.catalog.members[name] for name in names if store.catalog.members[name].usable]
    wanted = fitting.inputs_digest(store.config, store, found, METHOD)
    return None if ensembles.stored_digest(store.workspace, NAME) == wanted else "its snapshots are others now"


def _parents(members: Sequence[Member]) -> list[Member]:
    """Members whose networks BASE-BACK can train anew: its own, under their own names."""
    return [member for member in members if member.source == "trained" and member.architecture == member.name]


def _trained_before(store: Store, parents: Sequence[Member]) -> list[str] | None:
    """Names of the snapshots when the last training was asked for the same and all its files are there."""
    record = read_record(store.workspace.snapshots, remedy=AGAIN, form={"members": list})
    if record is None or record["key"] != _key(store, parents):
        return None
    for name in record["members"]:
        member = store.catalog.members.get(name)
        path = store.workspace.base / member.checkpoints[0]["path"] if member else None
        if path is None or not store.digests.is_intact(path):
            return None
    return list(record["members"])


def _key(store: Store, parents: Sequence[Member]) -> str:
    """Everything that the snapshots depend on."""
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


# the training ------------------------------------------------------------------------------------------------------


def _train(store: Store, parents: Sequence[Member]) -> tuple[list[str], list[str]]:
    """Have the base pipeline train what is not finished, take the snapshots into the catalog: (names, failures)."""
    settings = store.config.runs.snapshot_ensemble
    logger.info(
        "training %d snapshot(s) of %d backbone(s), %d epochs each: %s where nothing is finished yet",
        *(settings.n_snapshots, len(parents), settings.epochs_per_cycle, _expected(store, parents)),
    )
    command = _command(store, parents)
    code, said, errors = subprocesses.run_program(command, _environment(store))
    summary = json.loads(said) if said.strip() else None
    if summary is None:
        said = " ".join(errors) or "nothing was said"
        return [], [f"{CONFIG_KEY}: training ended with code {code}: {said}. To see more: {shlex.join(command)}"]
    failures = [f"{CONFIG_KEY}: {unit}: {reason}" for unit, reason in summary["failed"].items()]
    lost = {unit.partition(" ")[0] for unit in summary["failed"]}
    names = [
        Path(file).stem
        for parent in parents
        if parent.name not in lost
        for file in summary["results"][parent.name]["snapshots"]["files"]
    ]
    _take_in(store, parents, names)
    if not failures:
        write_json(store.workspace.snapshots, {"key": _key(store, parents), "members": sorted(names)})
    return sorted(names), failures


def _take_in(store: Store, parents: Sequence[Member], names: Sequence[str]) -> None:
    """Bring the catalog up to what the training has written, replaced and removed."""
    before = [
        name
        for name, member in store.catalog.members.items()
        if member.source == "derived" and any(name.startswith(f"{parent.name}_snapshot") for parent in parents)
    ]
    train = store.images("train")
    store.catalog = discover.register_derived(
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
        img_size=max(parent.img_size for parent in parents),
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
    """The workspace's places for a training that writes into ours, and the device of the configuration."""
    workspace, device = store.workspace, store.config.device
    places = {
        "DBT_SPLIT_DIR": str(workspace.split_dir),
        "DBT_TRAINED_DIR": str(workspace.checkpoints),
        "DBT_IMAGE_CACHE_DIR": str(workspace.image_cache),
        "DBT_PARENT": str(os.getpid()),
    }
    if base_back.kind(base_back.locate()) == "external":  # whose checkpoints do not tell their size
        places["DBT_IMG_SIZE"] = os.environ.get("DBT_IMG_SIZE") or str(base_back.settings().IMG_SIZE)
    if device == "cpu":
        places["CUDA_VISIBLE_DEVICES"] = ""
    elif device.startswith("cuda:"):
        number = int(device.partition(":")[2])
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        places["CUDA_VISIBLE_DEVICES"] = visible[number] if number < len(visible) and visible[number] else str(number)
    return os.environ | places
