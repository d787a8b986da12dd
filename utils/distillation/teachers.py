"""The teacher of a student and its predictions: cross-fitted, of a split, or of the student's augmented views."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from utils import base_back
from utils.building import ensembles, listing, recommendation
from utils.building.command_hints import build_command
from utils.building.ensembles import Ensemble
from utils.core.artifacts import digest_of
from utils.core.errors import UserError, did_you_mean
from utils.distillation.open_networks import OpenNetworks
from utils.distillation.soft_targets import Targets, log_probabilities
from utils.ensemble_methods import SoftVoting
from utils.networks.construction import NetworkSpec
from utils.networks.preprocessing import Preprocessing
from utils.numeric.metrics import softmax
from utils.predictions import catalog, extraction, fold_networks, member_selection, streaming, training_data
from utils.predictions.catalog import IMPORTED, Member
from utils.predictions.rows import Rows
from utils.predictions.store import Store

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("disease_pipeline")

BEST = "best"
METHOD = "distilled"
CONFIG_KEY = "distillation.teacher"

ViewBatches = Callable[[Preprocessing], Iterable[tuple["Tensor", "Tensor"]]]
"""Preprocessing -> batches of (indices int64 (B,), images float32 (B, 3, S, S)); the same views for any preprocessing.

Each member receives the views at its own size, with its own interpolation, mean and deviation (see `ImageSource`)."""


@dataclass(frozen=True)
class Teacher:
    """A saved ensemble, or a single member wrapped as an ensemble."""

    name: str
    ensemble: Ensemble
    is_member: bool

    @property
    def reads_embeddings(self) -> bool:
        """Whether its combiner needs the members' embeddings in addition to their logits."""
        return bool(getattr(self.ensemble.combiner, "reads_embeddings", False))


def resolve(store: Store, name: str, *, excluded_member: str) -> Teacher:
    """The teacher with this name: `best`, an ensemble with or without its suffix, or a member.

    `excluded_member` is the student's member, which a teacher must not contain.

    Raises UserError for a teacher that is unknown, not built, has other checkpoints or classes, or contains the
    student.
    """
    if name == BEST:
        name = _recommended(store, excluded_member)
        logger.info("teacher: best is %s", name)
    saved = ensembles.names(store.workspace)
    full_name = next((each for each in (name, ensembles.NAMES.get(name)) if each in saved), None)
    if full_name is not None:
        teacher = Teacher(full_name, ensembles.load(store.workspace, full_name), is_member=False)
    elif name in store.catalog.members:
        teacher = Teacher(name, _single_member(store, store.catalog.members[name]), is_member=True)
    else:
        available = [BEST, *saved, *store.catalog.members]
        buildable = [*ensembles.NAMES, *ensembles.NAMES.values(), *ensembles.COMBINERS]
        problem = f"not built. Build it: {build_command(name)}." if name in buildable else "unknown"
        hint = "" if name in buildable else did_you_mean(name, [*available, *buildable], ".")
        raise UserError(f"{CONFIG_KEY} {name}: {problem}{hint} Available: {', '.join(available)}")
    _check(store, teacher, excluded_member)
    return teacher


def _recommended(store: Store, excluded_member: str) -> str:
    """The ensemble or member that `evaluate` recommends, excluding students."""
    selected = member_selection.select(store.catalog, store.config)
    members = {member.name: member for member in selected if member.name != excluded_member}
    extraction.ensure(store, list(members.values()), ("val",))
    saved = {name: ensembles.load(store.workspace, name) for name in listing.listed(store.workspace, store.config)}
    candidates = {name: ensemble for name, ensemble in saved.items() if ensemble.method != METHOD}
    return str(recommendation.recommended(store, members, candidates)["name"])


def _single_member(store: Store, member: Member) -> Ensemble:
    if not member.usable:
        raise UserError(f"{CONFIG_KEY} {member.name}: this member is not usable; discover reports why")
    oof = member.oof["sha256"] if member.oof else None
    statements = training_data.stated(store.catalog, [member.name])
    return Ensemble(
        name=member.name,
        method="soft_voting",
        members=(member.name,),
        candidates=(member.name,),
        classes=store.catalog.classes,
        combiner=SoftVoting(),
        provenance=ensembles.network_provenance(store, [member]),
        inputs_digest=digest_of([member.digest, oof, *([statements] if statements else [])]),
        member_digests={member.name: member.digest},
        seed=store.config.seed,
        training_data=statements,
    )


def _check(store: Store, teacher: Teacher, excluded_member: str) -> None:
    ensemble, members = teacher.ensemble, store.catalog.members
    remedy = f"Build it again: {build_command(teacher.name)} --force"
    if ensemble.classes != store.catalog.classes:
        raise UserError(
            f"{CONFIG_KEY} {teacher.name}: it predicts the classes {', '.join(ensemble.classes)}; the images have the "
            f"classes {', '.join(store.catalog.classes)}. {remedy}"
        )
    if excluded_member in ensemble.members:
        raise UserError(
            f"{CONFIG_KEY} {teacher.name}: it contains {excluded_member}, the student itself. Set another teacher"
        )
    missing, changed = fold_networks.missing_and_changed(members, ensemble)
    for name in (*missing, *changed):
        state = "is no longer in the catalog" if name in missing else "has another checkpoint now"
        raise UserError(f"{CONFIG_KEY} {teacher.name}: its member {name} {state}. {remedy}")


def members_of(store: Store, teacher: Teacher) -> list[Member]:
    """The members of the teacher, in the ensemble's order."""
    return [store.catalog.members[name] for name in teacher.ensemble.members]


def inputs_digest(store: Store, teacher: Teacher) -> str:
    """Digest of everything that its predictions depend on except the images; needs no torch."""
    ensemble = teacher.ensemble
    digests = {member.name: fold_networks.digest(member, ensemble.inference) for member in members_of(store, teacher)}
    return digest_of([teacher.name, ensemble.inputs_digest, digests])


def members_without_network(store: Store, teacher: Teacher) -> list[str]:
    """Members with imported predictions only, which cannot predict other images."""
    return [member.name for member in members_of(store, teacher) if member.source == IMPORTED]


def size_mb(store: Store, teacher: Teacher) -> float | None:
    """Size of the networks that predict, in 10^6 bytes; None if a member has imported predictions only."""
    if members_without_network(store, teacher):
        return None
    return sum(n_bytes for n_bytes, _ in network_sizes(store, teacher)) / 1e6


def network_sizes(store: Store, teacher: Teacher) -> list[tuple[int, int]]:
    """(bytes of the checkpoint, input size in px) of each network that predicts."""
    specs = [
        member.network(store.workspace, stage=stage)
        for member in members_of(store, teacher)
        for stage in fold_networks.answering(member, teacher.ensemble.inference)
    ]
    return [(spec.checkpoint.stat().st_size, spec.img_size) for spec in specs]


# predictions ----------------------------------------------------------------------------------------------------------


def crossfit_log_probabilities(store: Store, teacher: Teacher, split: str, sample_ids: Sequence[str]) -> np.ndarray:
    """Cross-fitted log-probabilities, float32 (N, C), of rows of a split; NaN for rows without them."""
    log_probs = np.full((len(sample_ids), len(store.catalog.classes)), np.nan, dtype=np.float32)
    if teacher.is_member:
        parts = store.out_of_sample_parts(members_of(store, teacher))[teacher.name]
        by_id = {
            sample_id: softmax(np.asarray(part.logits[row]))
            for part in parts
            if part.split == split
            for row, sample_id in enumerate(part.sample_ids.tolist())
        }
    else:
        crossfit = ensembles.load_crossfit(store.workspace, teacher.name)
        by_id = {
            sample_id: probabilities
            for (part, sample_id), probabilities in zip(crossfit.keys(), crossfit.probabilities, strict=True)
            if part == split
        }
    for row, sample_id in enumerate(sample_ids):
        if sample_id in by_id:
            log_probs[row] = log_probabilities(by_id[sample_id])
    return log_probs


def predict_split(store: Store, teacher: Teacher, split: str) -> tuple[Rows, np.ndarray]:
    """Its members' rows of a split, and its probabilities (N, C) on them, computed as at inference."""
    members, inference = members_of(store, teacher), teacher.ensemble.inference
    fold_networks.ensure(store, members, (split,), inference)
    rows = fold_networks.aligned(store, members, split, inference, embeddings=teacher.reads_embeddings)
    return rows, ensembles.predict(teacher.ensemble, rows)


def predict_views(
    store: Store,
    teacher: Teacher,
    count: int,
    batches: ViewBatches,
    open_networks: OpenNetworks,
    *,
    embeddings: bool = False,
) -> Targets:
    """Predictions of `count` augmented images, optionally with embeddings.

    Raises UserError if embeddings are requested and no member has any.
    """
    reads_embeddings = embeddings or teacher.reads_embeddings
    ensemble, classes = teacher.ensemble, store.catalog.classes
    logits = np.empty((len(ensemble.members), count, len(classes)), dtype=np.float32)
    of_members: list[np.ndarray] = []
    for index, member in enumerate(members_of(store, teacher)):
        class_order = [member.classes.index(name) for name in classes]
        stages = fold_networks.answering(member, ensemble.inference, embeddings=reads_embeddings)
        mean = fold_networks.FoldMean(count, len(classes))
        for stage in stages:
            catalog.check_current(store.workspace, member, store.digests, *([stage] if stage else []))
            spec = member.network(store.workspace, stage=stage)
            keeps_embeddings = reads_embeddings and stage is None
            network_logits, member_embeddings = _run(
                store, spec, count, batches, open_networks, keeps_embeddings=keeps_embeddings
            )
            if member_embeddings is not None:
                of_members.append(member_embeddings)
            if stage is not None:
                mean.add(network_logits[:, class_order])
            elif ensemble.inference == fold_networks.FULL:
                logits[index] = network_logits[:, class_order]
        if ensemble.inference == fold_networks.FOLDS:
            logits[index] = mean.mean(sum(stage is not None for stage in stages))
    rows = Rows(
        members=ensemble.members,
        classes=classes,
        split=np.full(count, "train"),
        sample_ids=np.arange(count).astype(str),
        labels=np.full(count, -1),
        logits=logits,
        out_of_sample=np.zeros(count, dtype=bool),
        inference=ensemble.inference,
    )
    if teacher.reads_embeddings:
        rows = replace(rows, embeddings=tuple(of_members))
    log_probs = log_probabilities(ensembles.predict(ensemble, rows))
    if not embeddings:
        return Targets(log_probs)
    joined = np.concatenate(of_members, axis=1)
    if not joined.shape[1]:
        raise UserError(
            f"distillation.feature_weight: no network of {teacher.name} has embeddings to match; set it to 0"
        )
    return Targets(log_probs, joined)


def _run(
    store: Store,
    spec: NetworkSpec,
    count: int,
    batches: ViewBatches,
    open_networks: OpenNetworks,
    *,
    keeps_embeddings: bool,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Logits (N, C) of one network, and its embeddings (N, D) with `keeps_embeddings`, else None."""
    import torch

    device = streaming.resolve_device(store.config.device)
    on_cuda = torch.device(device).type == "cuda"
    logits = np.empty((count, len(spec.classes)), dtype=np.float32)
    embeddings: np.ndarray | None = None
    rule = base_back.load_bundled("threads")
    with open_networks.network(spec, device) as network:
        for indices, images in batches(spec.preprocessing):
            # Only around the network: images created in inference mode could not be used for training.
            precision = torch.autocast("cuda", dtype=torch.bfloat16) if on_cuda else nullcontext()
            with torch.inference_mode(), rule.intra_op_threads(network.threads), precision:
                device_images = images.to(device=device, memory_format=network.layout)
                if keeps_embeddings:
                    if embeddings is None:
                        network.outputs.probe(device_images)
                    batch_logits, batch_embeddings = network.outputs(device_images)
                else:
                    batch_logits, batch_embeddings = network.model(device_images), None
            rows = indices.numpy()
            logits[rows] = batch_logits[:, : len(spec.classes)].float().cpu().numpy()
            if batch_embeddings is not None:
                if embeddings is None:
                    embeddings = np.empty((count, batch_embeddings.shape[1]), np.float32)
                embeddings[rows] = batch_embeddings.float().cpu().numpy()
    return logits, embeddings
