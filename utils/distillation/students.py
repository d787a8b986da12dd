"""The student network: its names, its size, its initial weights and its checkpoint."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from utils import base_back
from utils.core.artifacts import write_checkpoint
from utils.core.errors import UserError, did_you_mean
from utils.core.links import require_no_symlink
from utils.distillation.initial_weights import INITIAL_WEIGHTS_KEY, MEMBER, PretrainedWeights, find_pretrained
from utils.networks import checkpoints
from utils.networks.construction import NetworkSpec, construct_untrained
from utils.networks.preprocessing import Preprocessing
from utils.predictions import streaming
from utils.predictions.catalog import IMPORTED, LAST_EPOCH, TIMM, Member, preprocessing_entry
from utils.predictions.store import Store

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger("disease_pipeline")

CONFIG_KEY = "distillation.student"
ROLE = "distilled"
SHORT_NAMES = {"MobileOne": "mobile"}  # the name in the specification


@dataclass(frozen=True)
class Student:
    """A network that is trained with a teacher."""

    name: str
    """Name in the configuration: a backbone of BASE-BACK or a timm model."""
    architecture: str
    """Architecture in the catalog's notation."""
    size: str
    preprocessing: Preprocessing
    reference: Member | None
    """The trained member whose size, preprocessing and augmentation it uses; None: those of the settings."""
    pretrained: PretrainedWeights | None = None
    """Its pretrained initial weights, whose preprocessing it uses; None for random weights or a member's."""

    @property
    def img_size(self) -> int:
        """Side length of the square input in px."""
        return self.preprocessing.input_size

    @property
    def member(self) -> str:
        """Name of the derived member."""
        return f"{self.name}_{ROLE}"

    @property
    def ensemble(self) -> str:
        """Name of the ensemble that consists of that member."""
        return ensemble_name(self.name)

    def identity(self) -> list[Any]:
        """The part of it that determines the weights, JSON-ready."""
        identity = [self.architecture, self.size, self.img_size, self.reference.digest if self.reference else None]
        return identity + ([self.pretrained.sha256] if self.pretrained else [])

    def network_spec(self, store: Store) -> NetworkSpec:
        """The specification of the network."""
        options: dict[str, Any] = {"source": "timm"} if self.architecture.startswith(TIMM) else {}
        path = store.workspace.derived_checkpoint(self.name, ROLE)
        name = self.architecture.removeprefix(TIMM)
        return NetworkSpec(name, path, self.size, self.preprocessing, store.catalog.classes, **options)


def ensemble_name(student: str) -> str:
    """`distilled_mobile` for CustomMobileOne, `distilled_convnext` for CustomConvNeXt; timm's names are kept.

    The prefix `timm:` is omitted.
    """
    student = student.removeprefix(TIMM)
    if not student.startswith("Custom"):
        return f"distilled_{student}"
    backbone = student.removeprefix("Custom")
    return f"distilled_{SHORT_NAMES.get(backbone, backbone.lower())}"


def resolve(store: Store, name: str) -> Student:
    """The student with this name, with the preprocessing of its backbone's member, else that of most members.

    A name that BASE-BACK does not have is assumed to be timm's, with or without its prefix; `require_architecture`
    checks it. A timm network with pretrained initial weights has their preprocessing, at an input size that suits the
    images. Only the search for pretrained weights needs torch.
    """
    settings = base_back.settings()
    name = name.removeprefix(TIMM)
    is_base_back = name in _backbones()
    trained = [member for member in store.catalog.members.values() if member.source == "trained"]
    reference = _same_architecture(trained, name) or _most_common(trained)
    if not is_base_back and (pretrained := find_pretrained(store, name)) is not None:
        return Student(name, TIMM + name, "full", pretrained.preprocessing, reference, pretrained)
    size = reference.size if reference else getattr(settings, "MODEL_SIZE", "full")
    if reference is not None:
        preprocessing = reference.image_preprocessing
    else:
        preprocessing = Preprocessing.of_base_pipeline(int(settings.IMG_SIZE))
    architecture = name if is_base_back else TIMM + name
    return Student(name, architecture, size if is_base_back else "full", preprocessing, reference)


def _same_architecture(trained: list[Member], name: str) -> Member | None:
    """The trained member of this name, else the first by name with this architecture."""
    members = [member for member in trained if name in (member.name, member.architecture.removeprefix(TIMM))]
    return min(members, key=lambda member: (member.name != name, member.name), default=None)


def require_architecture(name: str) -> None:
    """Raise UserError for a name unknown to BASE-BACK and timm."""
    name = name.removeprefix(TIMM)
    if name in _backbones():
        return
    import timm

    if not timm.is_model(name):
        available = [*_backbones(), *timm.list_models()]
        raise UserError(
            f"{CONFIG_KEY} {name}: neither a backbone of BASE-BACK nor a model of timm {timm.__version__}"
            f"{did_you_mean(name, available, '.')} BASE-BACK has {', '.join(_backbones())}"
        )


def _backbones() -> list[str]:
    settings = base_back.settings()
    return list(getattr(settings, "ALL_BACKBONES", settings.BACKBONES))


def _most_common(trained: list[Member]) -> Member | None:
    """The first member by name with the most frequent size and image size; timm members only if there is no other."""
    members = [member for member in trained if not member.architecture.startswith(TIMM)] or trained
    if not members:
        return None
    most_common_sizes = Counter((member.size, member.img_size) for member in members).most_common(1)[0][0]
    return next(
        member
        for member in sorted(members, key=lambda member: member.name)
        if (member.size, member.img_size) == most_common_sizes
    )


def training_facts(store: Store, student: Student) -> dict[str, str]:
    """The entries on augmentation and split in the checkpoint of the reference member."""
    if student.reference is None:
        return {}
    facts = checkpoints.training_metadata(store.workspace.base / student.reference.checkpoints[0]["path"])
    facts.pop("base_back", None)  # the student belongs to the currently mounted BASE-BACK
    return facts


def initial_network(
    store: Store, student: Student, members: Sequence[Member] = (), *, seed: int | None = None
) -> nn.Module:
    """The network with its initial weights: random ones of `seed` (default: the configuration's), pretrained ones with
    a new head, or those of the member among the teacher's `members` that has the same architecture.

    Raises UserError if it cannot be constructed, or there is no such member.
    """
    import torch

    from utils.training.batch_schedule import derived_seed

    spec = student.network_spec(store)
    torch.manual_seed(derived_seed(store.config.seed if seed is None else seed, student.name, "weights"))
    if student.pretrained is not None:
        return student.pretrained.network(spec)
    factory = None if spec.source == "timm" else base_back.load("models").create_custom_backbone_safe
    network = construct_untrained(spec, len(spec.classes), factory)
    if store.config.distillation.initial_weights == MEMBER:
        member = initial_member(student, members, spec.classes)
        network.load_state_dict(streaming.open_network(replace(member.network(store.workspace), views=())).state_dict())
    return network


def initial_member(student: Student, members: Sequence[Member], classes: Sequence[str]) -> Member:
    """The teacher's member with the student's initial weights. Raises UserError if none has its architecture."""
    for member in members:
        shape = (member.architecture, member.size, member.img_size)
        is_alike = shape == (student.architecture, student.size, student.img_size)
        if member.source != IMPORTED and is_alike and tuple(member.classes) == tuple(classes):
            return member
    names = ", ".join(f"{member.name} ({member.architecture}, {member.img_size} px)" for member in members)
    raise UserError(
        f"{INITIAL_WEIGHTS_KEY}: {MEMBER} needs a member of the teacher with the student's architecture "
        f"({student.architecture}, {student.size}, {student.img_size} px); found {names}. Set another teacher or "
        f"student, or {INITIAL_WEIGHTS_KEY} to random"
    )


def write_student(store: Store, student: Student, weights: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write the checkpoint `<student>_distilled.pth` in the base pipeline's format, with `facts` in its `extra`."""
    require_no_symlink(store.workspace.derived_checkpoints)
    is_external = base_back.kind(base_back.locate()) == "external" and not student.architecture.startswith(TIMM)
    extra = {
        "backbone_name": student.architecture,
        "classes": list(store.catalog.classes),
        "model_size": student.size,
        "img_size": student.img_size,
        **preprocessing_entry(student.architecture, student.preprocessing),
        **({"weights": student.pretrained.as_record()} if student.pretrained else {}),
        "stage": ROLE,
        "selection": LAST_EPOCH,
        **({"base_back": "external"} if is_external else {}),
        **facts,
    }
    path = store.workspace.derived_checkpoint(student.name, ROLE)
    write_checkpoint(path, weights, extra)
    logger.info("written: %s", path)
