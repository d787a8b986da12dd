"""What is exported: an ensemble or a single member, found by name, and its networks put together as one."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils.building import ensembles, recommendation
from utils.building.command_hints import build_command
from utils.combiners.protocol import Combiner
from utils.core.artifacts import digest_of
from utils.core.errors import UserError, did_you_mean
from utils.predictions import catalog, extraction, fold_networks, streaming
from utils.predictions.catalog import IMPORTED, Member
from utils.predictions.store import Store

if TYPE_CHECKING:
    from utils.networks.ensemble_network import CombinerNetwork, EnsembleNetwork, MemberNetworks

logger = logging.getLogger("disease_pipeline")

FLOAT_NCHW, UINT8_NHWC = "float-nchw", "uint8-nhwc"
VERSION = 1  # raised whenever the same inputs would give other files


@dataclass(frozen=True)
class ExportSource:
    """An ensemble, or a single member, on its way into files."""

    name: str
    method: str
    """Of the ensemble; `member` for a member alone."""
    members: tuple[Member, ...]
    classes: tuple[str, ...]
    combiner: Combiner | None
    inference: str
    inputs_digest: str

    @property
    def is_imported(self) -> bool:
        """Whether members are known by their predictions alone, so that the combiner is all there is to export."""
        return any(member.source == IMPORTED for member in self.members)

    @property
    def is_discontinuous(self) -> bool:
        """Whether the combiner's answer may change at a step, as of trees and votes."""
        return self.combiner is not None and self.combiner.is_discontinuous

    @property
    def reads_embeddings(self) -> bool:
        """Whether the combiner reads embeddings."""
        return self.combiner is not None and self.combiner.reads_embeddings


@dataclass(frozen=True)
class ExportSignature:
    """How the images come in and what comes out."""

    input: str = FLOAT_NCHW
    member_probabilities: bool = False


def load_source(store: Store, name: str) -> ExportSource:
    """The ensemble or member of this name, with its members as the catalog holds them.

    Raises UserError for an unknown name, with the nearest known one; for members that are gone or others than the
    ensemble was built from; and for predictions whose combiner cannot stand alone.
    """
    saved, members = ensembles.names(store.workspace), store.catalog.members
    if name not in saved and f"{name}_ensemble" in saved:
        name = f"{name}_ensemble"
    if name not in saved and name in members:
        member = members[name]
        if member.source == IMPORTED:
            raise UserError(f"{name}: imported predictions; there is no network to export. Export an ensemble of them")
        classes = store.catalog.classes
        return ExportSource(name, "member", (member,), classes, None, fold_networks.FULL, member.digest)
    if name not in saved:
        known = [*saved, *members]
        raise UserError(
            f"--model-name {name}: neither a saved ensemble nor a member. Build it: {build_command(name)}. "
            f"Known: {', '.join(known)}{did_you_mean(name, known)}"
        )
    ensemble = ensembles.load(store.workspace, name)
    again = f"Build it again: {build_command(name)} --force"
    missing, changed = fold_networks.missing_and_changed(members, ensemble)
    if missing:
        raise UserError(f"{name}: its member {', '.join(missing)} is not in the catalog any more. {again}")
    if changed:
        raise UserError(f"{name}: {changed[0]} is another network than the one it was built from. {again}")
    own = tuple(members[member] for member in ensemble.members)
    found = ExportSource(
        name, ensemble.method, own, ensemble.classes, ensemble.combiner, ensemble.inference, ensemble.inputs_digest
    )
    if found.is_imported and found.reads_embeddings:
        raise UserError(
            f"{name}: it reads the embeddings of imported members, and a combiner alone is exported for logits only"
        )
    return found


def require_current_checkpoints(store: Store, subject: ExportSource) -> None:
    """Raise UserError when a checkpoint that the export needs is gone, or not the one that discovery saw."""
    for member in subject.members if not subject.is_imported else ():
        for stage in _stages(subject, member):
            catalog.check_current(store.workspace, member, store.digests, stage=stage)
    store.digests.save()


def assemble_network(
    store: Store,
    subject: ExportSource,
    form: ExportSignature,
    *,
    resizes: bool = True,
) -> EnsembleNetwork | CombinerNetwork:
    """The subject as one network on the CPU, weights loaded.

    Raises UserError where members of unequal image size are to share one prepared image.
    """
    from utils.networks.ensemble_network import CombinerNetwork, EnsembleNetwork

    if subject.is_imported:
        assert subject.combiner is not None
        return CombinerNetwork(subject.combiner.to_module())
    sizes = {member.name: member.img_size for member in subject.members}
    if form.input == FLOAT_NCHW and len(set(sizes.values())) > 1:
        raise UserError(
            f"{subject.name}: its members look at images of unequal size ("
            + ", ".join(f"{name} {size} px" for name, size in sizes.items())
            + "). Export it with --input uint8-nhwc, which resizes inside"
        )
    return EnsembleNetwork(
        [_part(store, subject, member) for member in subject.members],
        None if subject.combiner is None else subject.combiner.to_module(),
        takes_uint8=form.input == UINT8_NHWC,
        embeds=subject.reads_embeddings,
        member_probabilities=form.member_probabilities,
        member_outputs=subject.is_discontinuous,
        resizes=resizes,
    )


def _part(store: Store, subject: ExportSource, member: Member) -> MemberNetworks:
    from utils.networks.ensemble_network import MemberNetworks

    assert member.img_size is not None
    specs = {stage: member.network(store.workspace, stage=stage) for stage in _stages(subject, member)}
    networks = {stage: streaming.open_network(spec) for stage, spec in specs.items()}
    embedder = networks.pop(None) if subject.inference == fold_networks.FOLDS and subject.reads_embeddings else None
    columns = [member.classes.index(name) for name in subject.classes]
    return MemberNetworks(member.name, list(networks.values()), member.img_size, columns, embedder)


def _stages(subject: ExportSource, member: Member) -> tuple[str | None, ...]:
    """Which of a member's checkpoints are needed; None is its own."""
    return fold_networks.answering(member, subject.inference, embeddings=subject.reads_embeddings)


def describe_network(
    subject: ExportSource,
    form: ExportSignature,
    network: EnsembleNetwork | CombinerNetwork,
) -> dict[str, Any]:
    """What a file should say of itself, ready for JSON."""
    from utils.networks.ensemble_network import CUT, MEAN, STD, CombinerNetwork

    members = [
        {
            "name": member.name,
            "architecture": member.architecture,
            "size": member.size,
            "img_size": member.img_size,
            "source": member.source,
            "digest": member.digest,
        }
        for member in subject.members
    ]
    given: dict[str, Any]
    if isinstance(network, CombinerNetwork):
        shape = [None, len(members), len(subject.classes)]
        given = {"kind": "member-logits", "name": "member_logits", "shape": shape, "dtype": "float32"}
    else:
        size = network.img_size
        float_input = form.input == FLOAT_NCHW
        given = {
            "kind": form.input,
            "name": "images",
            "dtype": "float32" if float_input else "uint8",
            "shape": [None, 3, size, size] if float_input else [None, None, None, 3],
            "range": [0, 1] if float_input else [0, 255],
            "img_size": size,
            "shorter_side": int(size * CUT),
            "resampling": "Pillow bilinear, then the centre square",
            "normalised_inside": {"mean": list(MEAN), "std": list(STD)},
        }
    return {
        "ensemble": subject.name,
        "method": subject.method,
        "members": members,
        "inference": subject.inference,
        "jumps": subject.is_discontinuous,
        "input": given,
        "outputs": list(network.output_names),
        "inputs_digest": subject.inputs_digest,
        "source_digest": source_digest(subject, form),
    }


def source_digest(subject: ExportSource, form: ExportSignature) -> str:
    """Of everything that decides the files: equal digests, equal files."""
    members = {member.name: fold_networks.digest(member, subject.inference) for member in subject.members}
    return digest_of([VERSION, subject.name, subject.inputs_digest, members, list(subject.classes), vars(form)])


def recommended_name(store: Store) -> str:
    """Name of the recommended ensemble or member, by honest rows alone. Raises UserError where nothing is built."""
    saved = {name: ensembles.load(store.workspace, name) for name in ensembles.names(store.workspace)}
    chosen = {member.name: member for member in catalog.select(store.catalog, store.config)}
    own = {name: member for name, member in chosen.items() if _answers_alone(member, store)}
    current = {
        name: ensemble
        for name, ensemble in saved.items()
        if not any(fold_networks.missing_and_changed(store.catalog.members, ensemble))
    }
    extraction.ensure(store, list(own.values()), ("val",))
    found: str = recommendation.recommended(store, own, current)["name"]
    return found


def _answers_alone(member: Member, store: Store) -> bool:
    return member.source != "derived" or member.name in store.config.backbones.selected


def require_member_limit(subject: ExportSource, most: int | None) -> None:
    """Raise UserError when the source has more than `most` members; None is no limit."""
    if most is not None and len(subject.members) > most:
        raise UserError(
            f"{subject.name}: {len(subject.members)} members, --max-members allows {most}. Members cannot be left out "
            "of a fitted combiner; export a pruned ensemble, whose size pruning.target_size sets, or distill it"
        )
