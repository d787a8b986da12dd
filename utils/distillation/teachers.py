"""Who teaches a student, and what it says: of rows it has not seen, or of the very views that the student is shown."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.building import ensembles
from utils.building.ensembles import Ensemble
from utils.core.artifacts import digest_of
from utils.core.errors import UserError, did_you_mean
from utils.distillation.soft_targets import log_probabilities
from utils.ensemble_methods import SoftVoting
from utils.networks import memory
from utils.networks.construction import NetworkSpec
from utils.networks.embeddings import EmbeddingExtractor
from utils.numeric.metrics import softmax
from utils.predictions import catalog, extraction, fold_networks, streaming
from utils.predictions.catalog import IMPORTED, Member
from utils.predictions.rows import Rows
from utils.predictions.store import Store

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("disease_pipeline")

BEST = "best"
METHOD = "distilled"
PLACE = "distillation.teacher"

Shown = Callable[[int], Iterable[tuple["Tensor", "Tensor"]]]
"""Image size -> batches of (places int64 (B,), images float32 (B, 3, size, size)); the same views at any size."""


@dataclass(frozen=True)
class Teacher:
    """A saved ensemble, or a member alone, as the mean of itself."""

    name: str
    ensemble: Ensemble
    is_member: bool

    @property
    def reads_embeddings(self) -> bool:
        """Whether logits are not enough for it."""
        return bool(getattr(self.ensemble.combiner, "reads_embeddings", False))


def find(store: Store, name: str, *, besides: str) -> Teacher:
    """The teacher of a name: `best`, an ensemble with or without its ending, a member. `besides` is the student's own.

    Raises UserError for one that is unknown, not built, of other checkpoints or classes, or made of the student.
    """
    if name == BEST:
        name = _recommended(store, besides)
        logger.info("teacher: best is %s", name)
    saved = ensembles.names(store.workspace)
    full = next((one for one in (name, ensembles.NAMES.get(name)) if one in saved), None)
    if full is not None:
        found = Teacher(full, ensembles.load(store.workspace, full), is_member=False)
    elif name in store.catalog.members:
        found = Teacher(name, _alone(store, store.catalog.members[name]), is_member=True)
    else:
        known = [BEST, *saved, *store.catalog.members]
        can_be_built = [*ensembles.NAMES, *ensembles.NAMES.values(), *ensembles.COMBINERS]
        what = "not built. Build it: " + ensembles.build_command(name) if name in can_be_built else "unknown"
        near = "" if name in can_be_built else did_you_mean(name, [*known, *can_be_built])
        raise UserError(f"{PLACE} {name}: {what}{near}. There are: {', '.join(known)}")
    _check(store, found, besides)
    return found


def _recommended(store: Store, besides: str) -> str:
    """By the rule of `evaluate`, students left out."""
    members = {member.name: member for member in catalog.select(store.catalog, store.config) if member.name != besides}
    extraction.ensure(store, list(members.values()), ("val",))
    saved = {name: ensembles.load(store.workspace, name) for name in ensembles.names(store.workspace)}
    others = {name: one for name, one in saved.items() if one.method != METHOD}
    return str(ensembles.recommended(store, members, others)["name"])


def _alone(store: Store, member: Member) -> Ensemble:
    if not member.usable:
        raise UserError(f"{PLACE} {member.name}: it cannot be used; discover says why")
    oof = member.oof["sha256"] if member.oof else None
    return Ensemble(
        name=member.name,
        method="soft_voting",
        members=(member.name,),
        candidates=(member.name,),
        classes=store.catalog.classes,
        combiner=SoftVoting(),
        provenance=ensembles.network_provenance(store),
        inputs_digest=digest_of([member.digest, oof]),
        member_digests={member.name: member.digest},
        seed=store.config.seed,
    )


def _check(store: Store, teacher: Teacher, besides: str) -> None:
    one, members = teacher.ensemble, store.catalog.members
    again = f"Build it again: {ensembles.build_command(teacher.name)} --force"
    if one.classes != store.catalog.classes:
        raise UserError(
            f"{PLACE} {teacher.name}: it answers for the classes {', '.join(one.classes)}; the images are of "
            f"{', '.join(store.catalog.classes)}. {again}"
        )
    if besides in one.members:
        raise UserError(f"{PLACE} {teacher.name}: it is made of {besides}, the student itself. Name another teacher")
    missing, changed = fold_networks.missing_and_changed(members, one)
    for name in (*missing, *changed):
        state = "is no longer in the catalog" if name in missing else "has another checkpoint now"
        raise UserError(f"{PLACE} {teacher.name}: its member {name} {state}. {again}")


def members_of(store: Store, teacher: Teacher) -> list[Member]:
    """Those that answer, by name."""
    return [store.catalog.members[name] for name in teacher.ensemble.members]


def key(store: Store, teacher: Teacher) -> str:
    """Everything that its answers depend on beside the images; found without torch."""
    one = teacher.ensemble
    digests = {member.name: fold_networks.digest(member, one.inference) for member in members_of(store, teacher)}
    return digest_of([teacher.name, one.inputs_digest, digests])


def without_networks(store: Store, teacher: Teacher) -> list[str]:
    """Members known by their predictions alone, which cannot be shown an image."""
    return [member.name for member in members_of(store, teacher) if member.source == IMPORTED]


# what it says -------------------------------------------------------------------------------------------------------


def unseen(store: Store, teacher: Teacher, split: str, sample_ids: Sequence[str]) -> np.ndarray:
    """Cross-fitted log-probabilities float32 (N, C) of rows of a split; NaN where there are none."""
    found = np.full((len(sample_ids), len(store.catalog.classes)), np.nan, dtype=np.float32)
    if teacher.is_member:
        parts = store.out_of_sample_parts(members_of(store, teacher))[teacher.name]
        said = {
            sample_id: softmax(np.asarray(part.logits[row]))
            for part in parts
            if part.split == split
            for row, sample_id in enumerate(part.sample_ids.tolist())
        }
    else:
        own = ensembles.load_crossfit(store.workspace, teacher.name)
        said = {
            sample_id: row
            for (part, sample_id), row in zip(own.keys(), own.probabilities, strict=True)
            if part == split
        }
    for place, sample_id in enumerate(sample_ids):
        if sample_id in said:
            found[place] = log_probabilities(said[sample_id])
    return found


def of_split(store: Store, teacher: Teacher, split: str) -> tuple[Rows, np.ndarray]:
    """Its members' rows of a split and its probabilities (N, C) on them, as it answers at inference."""
    members, options = members_of(store, teacher), {"embeddings": True} if teacher.reads_embeddings else {}
    fold_networks.ensure(store, members, (split,), teacher.ensemble.inference)
    rows = fold_networks.aligned(store, members, split, teacher.ensemble.inference, **options)
    return rows, ensembles.predict(teacher.ensemble, rows)


def shown(store: Store, teacher: Teacher, count: int, show: Shown) -> np.ndarray:
    """Log-probabilities float32 (N, C) of `count` images as they are shown; one network is in memory at a time."""
    one, classes = teacher.ensemble, store.catalog.classes
    logits = np.empty((len(one.members), count, len(classes)), dtype=np.float32)
    embeddings: list[np.ndarray] = []
    for place, member in enumerate(members_of(store, teacher)):
        order = [member.classes.index(name) for name in classes]
        stages = fold_networks.answering(member, one.inference)
        mean = fold_networks.FoldMean(count, len(classes))
        for stage in stages:
            catalog.check_current(store.workspace, member, store.digests, *([stage] if stage else []))
            spec = member.network(store.workspace, stage=stage)
            found, read = _run(store, spec, count, show, keeps_embeddings=teacher.reads_embeddings and stage is None)
            if stage is None:
                logits[place] = found[:, order]
                embeddings += [read] if read is not None else []
            else:
                mean.add(found[:, order])
        if stages != (None,):
            logits[place] = mean.mean(len(stages))
            if teacher.reads_embeddings:  # always the full network's: every fold network has a space of its own
                _, read = _run(store, member.network(store.workspace), count, show, keeps_embeddings=True)
                embeddings.append(read)  # type: ignore[arg-type]
    rows = Rows(
        members=one.members,
        classes=classes,
        split=np.full(count, "train"),
        sample_ids=np.arange(count).astype(str),
        labels=np.full(count, -1),
        logits=logits,
        out_of_sample=np.zeros(count, dtype=bool),
        inference=one.inference,
    )
    if teacher.reads_embeddings:
        given: Mapping[str, Any] = {"embeddings": tuple(embeddings)}
        rows = replace(rows, **given)
    return log_probabilities(ensembles.predict(one, rows))


def _run(
    store: Store, spec: NetworkSpec, count: int, show: Shown, *, keeps_embeddings: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Logits (N, C) of one network, and what its last layer reads (N, D) where it is asked for."""
    import torch

    device = streaming.resolve_device(store.config.device)
    on_cuda = torch.device(device).type == "cuda"
    logits = np.empty((count, len(spec.classes)), dtype=np.float32)
    embeddings: np.ndarray | None = None
    model = streaming.open_network(spec).to(device)
    outputs: EmbeddingExtractor | None = None
    try:
        outputs = EmbeddingExtractor(model, str(spec.checkpoint))
        for places, images in show(spec.img_size):
            # Around the network alone: images made in inference mode could teach nobody.
            with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16) if on_cuda else nullcontext():
                placed = images.to(device)
                if keeps_embeddings:
                    if embeddings is None:
                        outputs.probe(placed)
                    answer, read = outputs(placed)
                else:
                    answer, read = model(placed), None
            logits[places.numpy()] = answer[:, : len(spec.classes)].float().cpu().numpy()
            if read is not None:
                embeddings = np.empty((count, read.shape[1]), np.float32) if embeddings is None else embeddings
                embeddings[places.numpy()] = read.float().cpu().numpy()
    finally:
        memory.safe_delete_model(model)
        left = weakref.ref(model)
        del model
        outputs = None  # refers to it
        memory.cleanup_memory([left])
    return logits, embeddings


def size_mb(store: Store, teacher: Teacher) -> float | None:
    """10^6 bytes of the networks that answer; None where some are known by predictions alone."""
    if without_networks(store, teacher):
        return None
    files = []
    for member in members_of(store, teacher):
        stages = fold_networks.answering(member, teacher.ensemble.inference)
        files += [member.network(store.workspace, stage=stage).checkpoint for stage in stages]
    return sum(file.stat().st_size for file in files) / 1e6
