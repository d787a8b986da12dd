"""The source of an export, a named ensemble or member, and its assembly into one network."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from utils.building import ensembles
from utils.building.command_hints import build_command
from utils.combiners.protocol import Combiner
from utils.core.artifacts import digest_of
from utils.core.errors import UserError
from utils.evaluation import recommended_names
from utils.networks.preprocessing import Preprocessing
from utils.predictions import catalog, fold_networks, streaming
from utils.predictions.catalog import IMPORTED, Member
from utils.predictions.store import Store

if TYPE_CHECKING:
    from utils.networks.ensemble_network import CombinerNetwork, EnsembleNetwork, MemberNetworks

    ExportNetwork = EnsembleNetwork | CombinerNetwork

logger = logging.getLogger("disease_pipeline")

FLOAT_NCHW, UINT8_NHWC = "float-nchw", "uint8-nhwc"
VERSION = 1  # incremented whenever the files for the same inputs change


@dataclass(frozen=True)
class ExportSource:
    """The ensemble or single member that an export is made from."""

    name: str
    method: str
    """Method of the ensemble; `member` for a single member."""
    members: tuple[Member, ...]
    classes: tuple[str, ...]
    combiner: Combiner | None
    """None for a single member."""
    inference: str
    """Networks that predict, as in `fold_networks`: `full` or `folds`."""
    inputs_digest: str

    @property
    def is_imported(self) -> bool:
        """Whether members have imported predictions and no networks, so that the files contain only the combiner."""
        return any(member.source == IMPORTED for member in self.members)

    @property
    def is_discontinuous(self) -> bool:
        """Whether the combiner's probabilities have discontinuities, like those of trees and votes."""
        return self.combiner is not None and self.combiner.is_discontinuous

    @property
    def reads_embeddings(self) -> bool:
        """Whether the combiner uses embeddings."""
        return self.combiner is not None and self.combiner.reads_embeddings


@dataclass(frozen=True)
class ExportSignature:
    """Inputs and outputs of the exported files."""

    input: str = FLOAT_NCHW
    """FLOAT_NCHW or UINT8_NHWC"""
    member_probabilities: bool = False
    """Whether the files also return each member's probabilities."""


def load_source(store: Store, name: str) -> ExportSource:
    """The ensemble or member of this name, with its members from the catalog.

    Raises UserError for an unknown name, with the closest available one; for members that are missing or differ from
    those that the ensemble was built from; and for imported predictions that cannot be exported.
    """
    saved, members = ensembles.names(store.workspace), store.catalog.members
    if name not in saved and f"{name}_ensemble" in saved:
        name = f"{name}_ensemble"
    if name not in saved and name in members:
        member = members[name]
        if member.source == IMPORTED:
            raise UserError(
                f"{name}: has imported predictions and no network to export. Export an ensemble of such members"
            )
        classes = store.catalog.classes
        return ExportSource(name, "member", (member,), classes, None, fold_networks.FULL, member.digest)
    if name not in saved:
        raise recommended_names.unknown_name(name, saved, members)
    ensemble = ensembles.load(store.workspace, name)
    remedy = f"Build it again: {build_command(name)} --force"
    missing, changed = fold_networks.missing_and_changed(members, ensemble)
    if missing:
        raise UserError(f"{name}: its member {', '.join(missing)} is no longer in the catalog. {remedy}")
    if changed:
        raise UserError(f"{name}: {changed[0]} has changed since the ensemble was built. {remedy}")
    source = ExportSource(
        name=name,
        method=ensemble.method,
        members=tuple(members[member] for member in ensemble.members),
        classes=ensemble.classes,
        combiner=ensemble.combiner,
        inference=ensemble.inference,
        inputs_digest=ensemble.inputs_digest,
    )
    if source.is_imported and source.reads_embeddings:
        raise UserError(
            f"{name}: reads the embeddings of imported members; a combiner without networks is exported only where it "
            "reads logits"
        )
    return source


def require_current_checkpoints(store: Store, source: ExportSource) -> None:
    """Raise UserError if a checkpoint that the export needs is missing or has changed since discovery."""
    for member in source.members if not source.is_imported else ():
        for stage in _stages(source, member):
            catalog.check_current(store.workspace, member, store.digests, stage=stage)
    store.digests.save()


def assemble_network(
    store: Store, source: ExportSource, signature: ExportSignature, *, resizes: bool = True
) -> ExportNetwork:
    """The source as one network on the CPU, with its weights loaded.

    Without `resizes`, uint8 images are expected in the network's size. Raises UserError for a member with a resize rule
    that the files cannot implement.
    """
    from utils.networks.ensemble_network import CombinerNetwork, EnsembleNetwork

    if source.is_imported:
        assert source.combiner is not None
        return CombinerNetwork(source.combiner.to_module())
    if signature.input == UINT8_NHWC:
        _require_known_resizing(source)
    return EnsembleNetwork(
        [_member_part(store, source, member) for member in source.members],
        None if source.combiner is None else source.combiner.to_module(),
        takes_uint8=signature.input == UINT8_NHWC,
        embeds=source.reads_embeddings,
        member_probabilities=signature.member_probabilities,
        member_outputs=source.is_discontinuous,
        resizes=resizes,
    )


def _require_known_resizing(source: ExportSource) -> None:
    """Raise UserError for a member whose images cannot be resized from decoded pixels inside the files."""
    from utils.networks.image_preparation import resampling_problem

    expected = {member.name: member.image_preprocessing for member in source.members}
    reasons = {name: resampling_problem(preprocessing) for name, preprocessing in expected.items()}
    first = next(iter(expected.values()))
    # Decoded pixels have no EXIF orientation, so the decoding program applies one rule for all members.
    reasons |= {
        name: "differs from another member in whether the EXIF orientation is applied"
        for name, preprocessing in expected.items()
        if preprocessing.exif != first.exif
    }
    for name, reason in reasons.items():
        if reason is not None:
            raise UserError(
                f"{source.name}: {name} {reason} ({expected[name].describe()}), which the files cannot do inside. "
                "Export it with --input float-nchw, whose images predict.py resizes"
            )


def _member_part(store: Store, source: ExportSource, member: Member) -> MemberNetworks:
    from utils.networks.ensemble_network import MemberNetworks

    specs = {stage: member.network(store.workspace, stage=stage) for stage in _stages(source, member)}
    networks = {stage: streaming.open_network(spec) for stage, spec in specs.items()}
    embedder = networks.pop(None) if source.inference == fold_networks.FOLDS and source.reads_embeddings else None
    columns = [member.classes.index(name) for name in source.classes]
    return MemberNetworks(member.name, list(networks.values()), member.image_preprocessing, columns, embedder)


def _stages(source: ExportSource, member: Member) -> tuple[str | None, ...]:
    """Stages of the member's checkpoints that are needed; None is its full network."""
    return fold_networks.answering(member, source.inference, embeddings=source.reads_embeddings)


def describe_network(
    source: ExportSource, signature: ExportSignature, network: ExportNetwork, digest: str
) -> dict[str, Any]:
    """Metadata of the files: members, input, outputs and digests, JSON-ready."""
    from utils.networks.ensemble_network import CombinerNetwork

    members: list[dict[str, Any]] = [
        {
            "name": member.name,
            "architecture": member.architecture,
            "size": member.size,
            "img_size": member.img_size,
            "source": member.source,
            "digest": member.digest,
        }
        for member in source.members
    ]
    network_input: dict[str, Any]
    if isinstance(network, CombinerNetwork):
        shape = [None, len(members), len(source.classes)]
        network_input = {"kind": "member-logits", "name": "member_logits", "shape": shape, "dtype": "float32"}
    else:
        for entry, member in zip(members, source.members, strict=True):
            entry["preprocessing"] = member.image_preprocessing.as_record()
        network_input = _describe_images(source, signature, network)
    return {
        "ensemble": source.name,
        "method": source.method,
        "members": members,
        "inference": source.inference,
        "jumps": source.is_discontinuous,
        "input": network_input,
        "outputs": list(network.output_names),
        "inputs_digest": source.inputs_digest,
        "source_digest": digest,
    }


def _describe_images(source: ExportSource, signature: ExportSignature, network: EnsembleNetwork) -> dict[str, Any]:
    """`input` in the metadata of files that take images; with a single resize rule, its keys also describe the rule."""
    from utils.networks.ensemble_network import by_resize_rule

    groups = by_resize_rule(member.image_preprocessing for member in source.members)
    is_float = signature.input == FLOAT_NCHW
    facts: dict[str, Any] = {
        "kind": signature.input,
        "dtype": "float32" if is_float else "uint8",
        "range": [0, 1] if is_float else [0, 255],
    }
    inputs: list[dict[str, Any]] = []
    if is_float:
        for name, (preprocessing, *_) in zip(network.input_names, groups, strict=True):
            size = preprocessing.input_size
            entry = {"name": name, "shape": [None, 3, size, size], "dtype": "float32", "range": [0, 1]}
            inputs.append(entry | {"resizing": _resize_rule(preprocessing)})
    else:
        shape, exif = [None, None, None, 3], groups[0][0].exif
        inputs.append({"name": "images", "shape": shape, "dtype": "uint8", "range": [0, 255], "exif": exif})
        inputs[0]["resized_inside"] = [_resize_rule(preprocessing) for preprocessing, *_ in groups]
    if len(inputs) == 1:
        facts |= {"name": inputs[0]["name"], "shape": inputs[0]["shape"], "img_size": network.img_size}
    if len(groups) == 1:
        preprocessing = groups[0][0]
        sides = {"shorter-side": "shorter_side", "squash": "both_sides", "pad": "longer_side"}
        ending = "padding to the square" if preprocessing.resize == "pad" else "the centre square"
        facts[sides[preprocessing.resize]] = preprocessing.resized
        facts["resampling"] = f"Pillow {preprocessing.interpolation}, then {ending}"
        if len(groups[0]) == 1:
            facts["normalised_inside"] = {"mean": list(preprocessing.mean), "std": list(preprocessing.std)}
    return facts | {"inputs": inputs}


def _resize_rule(preprocessing: Preprocessing) -> dict[str, Any]:
    rule = asdict(preprocessing.resizing())
    return rule | {"fill": list(rule["fill"])}


def source_digest(source: ExportSource, signature: ExportSignature, onnx_exporter: str = "tracing") -> str:
    """Digest of everything that determines the contents of the files."""
    members = {member.name: fold_networks.digest(member, source.inference) for member in source.members}
    facts = [VERSION, source.name, source.inputs_digest, members, list(source.classes), vars(signature)]
    return digest_of([*facts, *([] if onnx_exporter == "tracing" else [onnx_exporter])])


def require_member_limit(source: ExportSource, limit: int | None) -> None:
    """Raise UserError if the source has more members than `limit`; None means no limit."""
    if limit is not None and len(source.members) > limit:
        raise UserError(
            f"{source.name}: {len(source.members)} members, --max-members allows {limit}. Members cannot be removed "
            "from a fitted combiner; export a pruned ensemble, whose size pruning.target_size sets, or distill it"
        )
