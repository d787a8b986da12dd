"""Everything that determines the weights of one training, as one value with one digest."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from config import settings
from training.pipeline import read_extra
from training.pretrained import Pretrained
from utils.checkpoint_manager import CheckpointManager
from utils.class_balance import class_weights
from utils.datasets import BatchLoader, DecodedDataset
from utils.resizing import evaluation_record

TRAINING_VERSION = 3  # incremented whenever the same recipe gives other weights
FACTS = ("model_size", "img_size", "augment", "group_regex")
"""Keys of a checkpoint's record that describe how its network was built and trained."""


@dataclass(frozen=True)
class Recipe:
    """One backbone trained on one split."""

    backbone: str
    model_size: str
    img_size: int
    classes: tuple[str, ...]
    split_digest: str
    """Digest of the ids and contents of the train and val images."""
    epochs_head: int
    epochs_finetune: int
    head_lr: float
    backbone_lr: float
    batch_size: int
    weight_decay: float
    augment: str
    group_regex: str | None
    snapshots: int
    seed: int
    version: int = TRAINING_VERSION
    base_back: str | None = None
    """Digest of the code of the other BASE-BACK that defines the network; None: this BASE-BACK defines it."""
    pretrained: Pretrained | None = None
    """The timm network and its weights; None for a network of BASE-BACK."""
    exif: str = "ignore"
    """Whether a network of BASE-BACK applies the EXIF orientation of photographs: `apply` or `ignore`."""
    class_weights: str = "none"
    sampling: str = "natural"

    @classmethod
    def from_settings(
        cls,
        backbone: str,
        classes: list[str],
        split_digest: str,
        base_back: str | None = None,
        pretrained: Pretrained | None = None,
    ) -> Recipe:
        """The recipe of one backbone by the settings of this process."""
        debug = settings.DEBUG_MODE
        recipe = cls(
            backbone=backbone,
            model_size=settings.MODEL_SIZE,
            img_size=settings.IMG_SIZE,
            classes=tuple(classes),
            split_digest=split_digest,
            epochs_head=settings.DEBUG_EPOCHS_HEAD if debug else settings.EPOCHS_HEAD,
            epochs_finetune=settings.DEBUG_EPOCHS_FINETUNE if debug else settings.EPOCHS_FINETUNE,
            head_lr=settings.HEAD_LR,
            backbone_lr=settings.BACKBONE_LR,
            batch_size=settings.DEBUG_BATCH_SIZE if debug else settings.BATCH_SIZE,
            weight_decay=settings.WEIGHT_DECAY,
            augment=settings.AUGMENT,
            group_regex=settings.GROUP_REGEX,
            snapshots=settings.SNAPSHOTS,
            seed=settings.SEED,
            base_back=base_back,
            exif="ignore" if base_back else settings.EXIF or "ignore",
            class_weights=settings.CLASS_WEIGHTS,
            sampling=settings.SAMPLING,
        )
        return recipe if pretrained is None else recipe._on(pretrained)

    def _on(self, pretrained: Pretrained) -> Recipe:
        """The recipe for a timm network; settings without effect on it get fixed values, for a stable digest."""
        recipe = replace(self, pretrained=pretrained, model_size="full", img_size=pretrained.img_size, exif="ignore")
        if pretrained.mode == "frozen":
            unused: dict[str, Any] = {
                "epochs_head": 0,
                "epochs_finetune": 0,
                "head_lr": 0.0,
                "backbone_lr": 0.0,
                "weight_decay": 0.0,
            }
            return replace(recipe, **unused, batch_size=1, snapshots=0, augment="none")
        if pretrained.mode == "scratch":
            return replace(recipe, backbone_lr=settings.BACKBONE_LRS["full"])
        head, finetune = settings.PRETRAINED_EPOCHS_HEAD, settings.PRETRAINED_EPOCHS_FINETUNE
        return replace(recipe, epochs_head=head, epochs_finetune=finetune, backbone_lr=settings.PRETRAINED_LR)

    @property
    def is_frozen(self) -> bool:
        """Whether only a linear head on frozen features is fitted."""
        return self.pretrained is not None and self.pretrained.mode == "frozen"

    @property
    def is_pretrained(self) -> bool:
        """Whether training starts from pretrained weights."""
        return self.pretrained is not None and self.pretrained.mode != "scratch"

    @property
    def preprocessing(self) -> dict[str, Any] | None:
        """The preprocessing record of the network; None: the base pipeline's evaluation transform."""
        if self.pretrained is not None:
            return self.pretrained.preprocessing
        return None if self.exif == "ignore" else evaluation_record(self.img_size, self.exif)

    def dataset(self, split: str) -> DecodedDataset:
        """One split with the preprocessing of the network."""
        return DecodedDataset.of_split(split, self.img_size, preprocessing=self.preprocessing)

    def train_loader(self, dataset: DecodedDataset, seed: int) -> BatchLoader:
        """Training batches of a data set, shuffled or sampled with class balance, and augmented."""
        options: dict[str, Any] = {"kind": self.augment, "balanced": self.sampling == "balanced"}
        return BatchLoader(dataset, self.batch_size, training=True, seed=seed, **options)

    def weights_of(self, labels: Sequence[int] | np.ndarray, *, or_by_sampling: bool = False) -> np.ndarray | None:
        """Class weights (C,) of the loss for rows with these labels; None if all rows have equal weight.

        `or_by_sampling`: also return weights if the recipe balances by sampling, for a fit that uses each row once.
        """
        balanced = self.class_weights == "balanced" or (or_by_sampling and self.sampling == "balanced")
        return class_weights(labels, len(self.classes)) if balanced else None

    def like_trained(self) -> Recipe:
        """The recipe for a network to add to the trained ones, with the same construction and preprocessing.

        Size, image size, augmentation, group and EXIF rule are those of the backbone's checkpoint, else those of most
        other checkpoints, timm networks excluded; without checkpoints those of the settings. The learning rate is that
        of the size.
        """
        names = ("img_size", "augment", "group_regex") if self.base_back else (*FACTS, "exif")
        manager = CheckpointManager(settings.TRAINED_DIR)
        latest = manager.get_latest_backbone_checkpoint(self.backbone)
        others = sorted(settings.TRAINED_DIR.glob("*_final.pth"))
        for paths in ([latest] if latest else [], others):
            extras = [extra for extra in map(read_extra, paths) if set(FACTS) <= extra.keys()]
            extras = [extra for extra in extras if extra["model_size"] in settings.BACKBONE_LRS and "mode" not in extra]
            extras = [{"exif": (extra.get("preprocessing") or {}).get("exif", "ignore"), **extra} for extra in extras]
            if extras:
                values = Counter(tuple(extra[name] for name in names) for extra in extras).most_common(1)[0][0]
                recipe = replace(self, **dict(zip(names, values, strict=True)))
                return replace(recipe, backbone_lr=settings.BACKBONE_LRS[recipe.model_size])
        return self

    def digest(self, *parts: object) -> str:
        """Digest of the recipe and of `parts`, which identify one of its units: ("fold", 2, 5)."""
        values = asdict(self) | self._balance()
        for name in {"class_weights", "sampling"} - self._balance().keys():
            del values[name]
        if self.base_back is None:
            del values["base_back"]  # keeps the digests from before this field existed
        if self.exif == "ignore":
            del values["exif"]
        if self.pretrained is None:
            del values["pretrained"]
        else:
            decay = {"layer_decay": settings.LAYER_DECAY} if self.is_pretrained else {}
            values["pretrained"] = self.pretrained.as_record() | decay
        text = json.dumps([values, *parts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def seed_for(self, *parts: object) -> int:
        """A seed below 2**31 for one purpose, such as ("fold", 2), independent of what ran before in this process."""
        text = json.dumps([self.seed, self.backbone, *parts])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1

    def explain(self) -> dict[str, object]:
        """The record in a checkpoint that suffices to build its network and to preprocess its images."""
        facts: dict[str, object] = {
            "backbone_name": self.backbone,
            "classes": list(self.classes),
            "model_size": self.model_size,
            "img_size": self.img_size,
            "augment": self.augment,
            "group_regex": self.group_regex,
            "split_digest": self.split_digest,
        }
        facts |= {"base_back": "external"} if self.base_back else {}
        facts |= {"preprocessing": self.preprocessing} if self.preprocessing else {}
        return facts | self._balance() | (self.pretrained.explain() if self.pretrained else {})

    def _balance(self) -> dict[str, str]:
        """How classes are balanced; empty without balancing, which keeps the digests from before the option existed."""
        defaults = {"class_weights": "none", "sampling": "natural"}
        return {name: getattr(self, name) for name, value in defaults.items() if getattr(self, name) != value}
