"""`runs.fusion.end_to_end`: the members' networks are trained further, together with the fusion head.

Every network of this fusion becomes a derived member, `ensembles/models/<fusion>/<member>.pth`; the base pipeline's
checkpoints are not changed. Networks and heads are trained on train rows, and val rows select the epoch, so that no
train row is out-of-sample for them.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from utils import base_back
from utils.building import embedding_rows, ensembles, fitting
from utils.building.builder_protocol import Session
from utils.building.ensembles import Crossfit
from utils.core import estimates
from utils.core.artifacts import digest_of, write_checkpoint
from utils.core.errors import LeakageError, UserError
from utils.discovery import discover
from utils.fusion_methods import COMBINERS, FusionStacker
from utils.networks.checkpoints import training_metadata
from utils.networks.construction import NetworkSpec
from utils.predictions import catalog, image_splits, streaming, training_data
from utils.predictions.catalog import IMPORTED, Member
from utils.predictions.rows import MemberOutputs, MemberRows
from utils.predictions.store import Store

if TYPE_CHECKING:
    from torch import Tensor

    from utils.training.joint_networks import JointMember
    from utils.training.joint_training import JointTrainingResult

logger = logging.getLogger("disease_pipeline")

VERSION = 1  # incremented when the same members and settings would give different networks
SPLITS = ("train", "val", "test")
OFF = "--set runs.fusion.end_to_end=false"


def require_networks(members: Sequence[Member]) -> None:
    """Raise UserError for members without a network to train, LeakageError for members that were trained on val."""
    imported = [member.name for member in members if member.source == IMPORTED]
    if imported:
        raise UserError(
            f"runs.fusion.end_to_end: {', '.join(imported)}: imported predictions, no network that could be trained. "
            f"Leave out: --set backbones.exclude=[{','.join(imported)}]; or train heads alone: {OFF}"
        )
    averaging = [member.name for member in members if member.views]
    if averaging:
        raise UserError(
            f"runs.fusion.end_to_end: {', '.join(averaging)}: averages over views (tta), and networks are trained on "
            f"one view. Train without them: --set tta.enable=false; or train heads alone: {OFF}"
        )
    fitted = [member.name for member in members if "val" not in training_data.unseen_splits(member)]
    if fitted:
        raise LeakageError(
            f"runs.fusion.end_to_end: val rows choose the epoch, and {', '.join(fitted)} was trained on them. "
            f"Leave out: --set backbones.exclude=[{','.join(fitted)}]; or train heads alone: {OFF}"
        )


def key(store: Store, members: Sequence[Member], name: str) -> str:
    """Return the digest of everything that the networks of a fusion depend on; needs no torch."""
    config = store.config
    return digest_of(
        [
            *(VERSION, ensembles.VERSION, name, [member.digest for member in members]),
            [store.catalog.splits[split]["digest"] for split in ("train", "val")],
            list(store.catalog.classes),
            config.digest(*COMBINERS[name].settings, "runs.fusion.end_to_end_epochs", "dataset.batch_size", "seed"),
            base_back.source_digest(base_back.locate()),
        ]
    )


def is_current(store: Store, members: Sequence[Member], name: str, record: Mapping[str, Any]) -> bool:
    """Return whether a saved fusion and its networks equal the result of a new training; needs no torch."""
    facts = record.get("end_to_end")
    networks = [store.catalog.members.get(catalog.end_to_end_member_name(name, member.name)) for member in members]
    if facts is None or None in networks:
        return False
    derived = [member for member in networks if member is not None]
    paths = [store.workspace.tuned_checkpoint(name, member.name) for member in members]
    return (
        {member.name: member.checkpoints[0]["sha256"] for member in derived} == facts["networks"]
        and all(map(store.digests.is_intact, paths))
        and record["inputs_digest"]
        == fitting.inputs_digest(store.config, store, derived, name, extra_inputs=key(store, members, name))
    )


def build(session: Session, members: Sequence[Member], name: str, force: bool) -> Session:
    """Train the networks, save them as derived members and the fusion over them; return the session with the networks.

    Raises UserError if the training is not possible.
    """
    from utils.training.joint_networks import FusionHeads, JointTrainingSettings
    from utils.training.joint_training import train

    store, config, settings = session.store, session.config, session.config.runs.fusion
    inputs_key = key(store, members, name)
    folder = store.workspace.end_to_end(name)
    if force:
        shutil.rmtree(folder, ignore_errors=True)
    session.ensure(members, SPLITS)
    facts = fitting.member_facts(store, members)
    basis = fitting.with_folds(store, embedding_rows.in_sample(store, members).rows)
    fitted, judged = basis.of_split("train"), basis.of_split("val")
    recipe = COMBINERS[name].configured(config, facts)
    assert isinstance(recipe, FusionStacker)
    logger.info("fitting the head of %s on %d rows of %d members", name, len(fitted.fold), len(members))
    recipe.fit(fitted.rows.outputs, fitted.rows.labels, fitted.fold)
    logger.info("training %d networks with %s: %s", len(members), name, _expected(store, members))
    head = FusionHeads(recipe.maps_module(), recipe.heads_to_train())
    tuned = train(
        _parts(store, members),
        head,
        JointTrainingSettings(
            settings.end_to_end_epochs, settings.fusion_config.lr, settings.label_smoothing, config.seed
        ),
        folder=folder,
        key=inputs_key,
        device=streaming.resolve_device(config.device),
        batch_size=config.dataset.batch_size,
    )
    weights = {member.name: _weights(store, member, tuned) for member in members}
    session, derived = _save_networks(session, members, name, weights)
    store = session.store
    val = fitting.with_folds(store, embedding_rows.of_val(store, derived).rows)
    rows = val.rows
    assert isinstance(rows.outputs, MemberOutputs), "rows with embeddings"
    probabilities = recipe.retrained(tuned.heads, rows.outputs, rows.labels, val.fold)
    fitting.save(
        store,
        name,
        name,
        fitting.evaluate_fit(
            recipe,
            Crossfit(probabilities.astype(np.float32), rows.labels, rows.sample_ids, rows.split, val.fold),
            val,
            fitting.measure_baselines(store, facts, judged),
        ),
        derived,
        val,
        extra_inputs=inputs_key,
        notes={"train_embeddings": _source(), "end_to_end": _facts(derived, tuned)},
    )
    shutil.rmtree(folder)
    return session


def summary_line(record: Mapping[str, Any]) -> str:
    """Return the terminal line on the result of a training."""
    facts = record["end_to_end"]
    first, best = facts["history"][0], facts["history"][facts["epoch"]]
    how = "together" if len(facts["blocks"]) == 1 else "one after the other"
    if facts["epoch"] == 0:
        return f"{len(facts['history']) - 1} epochs end to end, {how}: on val none is better than untouched networks"
    return (
        f"epoch {facts['epoch']} of {len(facts['history']) - 1} end to end, {how}: log-loss on val "
        f"{first['val_log_loss']:.4f} before, {best['val_log_loss']:.4f} after"
    )


def _source() -> dict[str, Any]:
    reason = "networks and head are trained together on the train images"
    return {"asked": "end_to_end", "chosen": "end_to_end", "reason": reason, "val_log_loss": {}, "members": {}}


def _expected(store: Store, members: Sequence[Member]) -> estimates.Estimate:
    config = store.config
    return estimates.estimate_training(
        [member.network(store.workspace).checkpoint.stat().st_size for member in members],
        len(store.images("train").paths),
        epochs=config.runs.fusion.end_to_end_epochs,
        kept=1,
        batch_size=config.dataset.batch_size,
        img_size=max(member.img_size or 0 for member in members),
        on_cuda=streaming.resolve_device(config.device) != "cpu",
        cores=1,  # networks are trained one after the other, as in a single training
    )


def _facts(derived: Sequence[Member], tuned: JointTrainingResult) -> dict[str, Any]:
    return {
        "epoch": tuned.epoch,
        "history": tuned.history,
        "blocks": tuned.blocks,
        "computed_twice": tuned.recomputed,
        "step_bytes": tuned.step_bytes,
        "threads": tuned.threads,
        "networks": {member.name: member.checkpoints[0]["sha256"] for member in derived},
    }


def _parts(store: Store, members: Sequence[Member]) -> list[JointMember]:
    """Return the networks with their images; every file is decoded once for all networks."""
    from utils.training.batch_schedule import NEVER, BatchSchedule
    from utils.training.image_source import ImageSource, augmentation_kind
    from utils.training.joint_networks import JointMember

    settings = store.config.dataset
    images = {split: store.images(split) for split in ("train", "val")}
    cache, threads = store.workspace.image_cache, image_splits.decoding_threads(settings.num_workers)
    preprocessings = [member.image_preprocessing for member in members]
    image_splits.decode(list(images.values()), preprocessings, image_cache=cache, threads=threads)

    def image_source(split: str, spec: NetworkSpec, kind: str) -> ImageSource:
        return ImageSource(images[split], spec.preprocessing, kind, image_cache=cache, threads=threads)

    parts = []
    device = streaming.resolve_device(store.config.device)
    for member in members:
        spec = member.network(store.workspace)
        kind = augmentation_kind(training_metadata(spec.checkpoint))
        rows = {split: store.rows(member, split, embeddings=True) for split in images}
        train = image_source("train", spec, kind)
        never = np.full(len(train), NEVER)
        parts.append(
            JointMember(
                name=member.name,
                architecture=member.architecture,
                spec=spec,
                class_order=[member.classes.index(name) for name in store.catalog.classes],
                batch_schedule=BatchSchedule(train, settings.batch_size, store.config.seed, never, device=device),
                validation_set=image_source("val", spec, kind),
                embeddings=(_tensor(rows["train"]), _tensor(rows["val"])),
            )
        )
    return parts


def _tensor(rows: MemberRows) -> Tensor:
    import torch

    return torch.from_numpy(np.array(rows.embeddings, dtype=np.float32))


def _weights(store: Store, member: Member, tuned: JointTrainingResult) -> Callable[[], Mapping[str, Any]]:
    """Return a function that loads a member's weights at the selected epoch, so that one set at a time is in memory."""
    if tuned.epoch:
        return lambda: tuned.weights(member.name)
    from utils.networks.checkpoints import read_checkpoint, state_dict_of

    return lambda: state_dict_of(read_checkpoint(member.network(store.workspace).checkpoint))


def _save_networks(
    session: Session, members: Sequence[Member], name: str, weights: Mapping[str, Callable[[], Mapping[str, Any]]]
) -> tuple[Session, list[Member]]:
    """Write the networks as checkpoints, add them to the catalog as derived members, and stream their rows.

    Returns the session with the new catalog, and the derived members.
    """
    workspace = session.workspace
    for member in members:
        path = workspace.tuned_checkpoint(name, member.name)
        extra = training_metadata(member.network(workspace).checkpoint) | {
            "backbone_name": member.architecture,
            "model_size": member.size,
            "img_size": member.img_size,
            **catalog.preprocessing_entry(member.architecture, member.image_preprocessing),
            "classes": list(member.classes),
            "stage": catalog.END_TO_END,
            "parents": [member.name],
            "selected_on": "val",
        }
        write_checkpoint(path, weights[member.name](), extra)
        logger.info("written: %s", path)
    names = [catalog.end_to_end_member_name(name, member.name) for member in members]
    train, digests = session.store.images("train"), session.store.digests
    content = discover.register_derived(session.config, workspace, digests, train, session.catalog, names)
    session = session.with_catalog(content)
    derived = [content.members[network] for network in names]
    session.ensure(derived)
    return session, derived
