"""Who a student is: its names, the size it takes from the networks beside it, a fresh network, its checkpoint."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils import base_back
from utils.core.artifacts import require_no_symlink, write_checkpoint
from utils.core.errors import UserError, did_you_mean
from utils.networks import checkpoints
from utils.networks.construction import NetworkSpec, construct_untrained
from utils.predictions.catalog import TIMM, Member
from utils.predictions.store import Store

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger("disease_pipeline")

PLACE = "distillation.student"
ROLE = "distilled"
SPOKEN = {"MobileOne": "mobile"}  # as the specification prints it


@dataclass(frozen=True)
class Student:
    """A network that is to be taught."""

    name: str
    """As the configuration has it: one of BASE-BACK's backbones, or a model of timm."""
    architecture: str
    """As the catalog has it."""
    size: str
    img_size: int
    like: Member | None
    """Whose size, image size and augmentation it takes; None: the settings'."""

    @property
    def member(self) -> str:
        """Name of the derived member."""
        return f"{self.name}_{ROLE}"

    @property
    def ensemble(self) -> str:
        """Name of the ensemble of that one member."""
        return ensemble_name(self.name)

    def identity(self) -> list[Any]:
        """What of it decides the weights, JSON-ready."""
        return [self.architecture, self.size, self.img_size, self.like.digest if self.like else None]

    def spec(self, store: Store) -> NetworkSpec:
        """How to build it."""
        options: dict[str, Any] = {"source": "timm"} if self.architecture.startswith(TIMM) else {}
        path = store.workspace.derived_checkpoint(self.name, ROLE)
        name = self.architecture.removeprefix(TIMM)
        return NetworkSpec(name, path, self.size, self.img_size, store.catalog.classes, **options)


def ensemble_name(student: str) -> str:
    """`distilled_mobile` of CustomMobileOne, `distilled_convnext` of CustomConvNeXt; timm's names stay as they are."""
    if not student.startswith("Custom"):
        return f"distilled_{student}"
    spoken = student.removeprefix("Custom")
    return f"distilled_{SPOKEN.get(spoken, spoken.lower())}"


def find(store: Store, name: str) -> Student:
    """The student of a name, sized like the same backbone's own network, else like most members; needs no torch.

    A name that BASE-BACK does not have is taken to be timm's; `require_known` looks.
    """
    settings = base_back.settings()
    trained = [member for member in store.catalog.members.values() if member.source == "trained"]
    own = store.catalog.members.get(name)
    like = own if own in trained else _most_common(trained)
    is_ours = name in _backbones()
    size = like.size if like else getattr(settings, "MODEL_SIZE", "full")
    img_size = like.img_size if like and like.img_size else int(settings.IMG_SIZE)
    return Student(name, name if is_ours else TIMM + name, size if is_ours else "full", img_size, like)


def require_known(name: str) -> None:
    """Raise UserError for a name that neither BASE-BACK nor timm has."""
    if name in _backbones():
        return
    import timm

    if not timm.is_model(name):
        known = [*_backbones(), *timm.list_models()]
        raise UserError(
            f"{PLACE} {name}: neither a backbone of BASE-BACK nor a model of timm {timm.__version__}"
            f"{did_you_mean(name, known)}. BASE-BACK has {', '.join(_backbones())}"
        )


def _backbones() -> list[str]:
    settings = base_back.settings()
    return list(getattr(settings, "ALL_BACKBONES", settings.BACKBONES))


def _most_common(trained: list[Member]) -> Member | None:
    """The first by name of those whose size and image size most have; BASE-BACK's own before declared networks."""
    members = [member for member in trained if not member.architecture.startswith(TIMM)] or trained
    if not members:
        return None
    most = Counter((member.size, member.img_size) for member in members).most_common(1)[0][0]
    return next(
        member for member in sorted(members, key=lambda member: member.name) if (member.size, member.img_size) == most
    )


def said_of_training(store: Store, student: Student) -> dict[str, str]:
    """What the checkpoint that it is like says of how its images are shown and dealt out."""
    if student.like is None:
        return {}
    found = checkpoints.training_metadata(store.workspace.base / student.like.checkpoints[0]["path"])
    found.pop("base_back", None)  # the student is of whichever is mounted now
    return found


def fresh(store: Store, student: Student) -> nn.Module:
    """The network with its first weights, the same every time. Raises UserError where it cannot be built."""
    import torch

    from utils.training.image_views import seed_of

    spec = student.spec(store)
    factory = None if spec.source == "timm" else base_back.load("models").create_custom_backbone_safe
    torch.manual_seed(seed_of(store.config.seed, student.name, "weights"))
    return construct_untrained(spec, len(spec.classes), factory)


def write(store: Store, student: Student, weights: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """The checkpoint `<student>_distilled.pth` in the base pipeline's form; `facts` stand in its `extra` as well."""
    require_no_symlink(store.workspace.derived_checkpoints)
    mounted = base_back.kind(base_back.locate()) == "external" and not student.architecture.startswith(TIMM)
    extra = {
        "backbone_name": student.architecture,
        "classes": list(store.catalog.classes),
        "model_size": student.size,
        "img_size": student.img_size,
        "stage": ROLE,
        "selected_on": "val",
        **({"base_back": "external"} if mounted else {}),
        **facts,
    }
    path = store.workspace.derived_checkpoint(student.name, ROLE)
    write_checkpoint(path, weights, extra)
    logger.info("written: %s", path)
