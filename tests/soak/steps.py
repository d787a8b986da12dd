"""What may happen to a workspace: commands that write, commands that read, and what its user does between them."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

BACKBONES = ("CustomConvNeXt", "CustomResNetMish", "CustomViTHybrid")
SMALL = (
    *(
        "device=cpu",
        "dataset.num_workers=0",
        "dataset.img_size=32",
        "dataset.batch_size=16",
        "dataset.group_regex=null",
    ),
    *("backbones.include=all", "backbones.exclude=[]", "exports.enable=false", "exports.formats=[state_dict]"),
    *("runs.score_ensemble.methods=[soft_voting,weighted]", "runs.model_soup.methods=[uniform]"),
    *("runs.stacking.meta_learners=[lr]", "runs.stacking.fit_rows=honest", "runs.score_ensemble.fit_rows=honest"),
    *("runs.fusion.fusion_methods=[concat_mlp]", "runs.fusion.fusion_config.epochs=1"),
    *("runs.meta_fuser.input_ensembles=[soft_voting,weighted]", "runs.meta_fuser.fuser_type=mlp"),
    *("runs.meta_fuser.mlp_config.epochs=1", "pruning.methods=[greedy_forward]", "pruning.target_size=2"),
    *("pruning.cost_budget.max_latency_ms=100000", "distillation.enable=false", "distillation.epochs=1"),
)
"""Values of the first configuration: every stage is short."""
EDITS = (
    *("runs.score_ensemble.methods=[soft_voting]", "runs.score_ensemble.methods=[soft_voting,weighted]"),
    *("runs.score_ensemble.methods=[soft_voting,hard_voting,greedy_selection,weighted]", "seed=43", "seed=42"),
    *("runs.score_ensemble.optimization_metric=log_loss", "runs.score_ensemble.optimization_metric=f1_macro"),
    *("runs.model_soup.enable=false", "runs.model_soup.enable=true", "pruning.enable=false", "pruning.enable=true"),
    *("pruning.methods=[greedy_forward,clustering]", "pruning.methods=[greedy_backward]", "pruning.target_size=3"),
    *("runs.stacking.meta_learners=[lr]", "runs.stacking.meta_learners=[lr,rf]", "runs.fusion.enable=false"),
    *("runs.fusion.enable=true", "runs.meta_fuser.fuser_type=convex", "runs.meta_fuser.fuser_type=mlp"),
    *("backbones.exclude=[]", "backbones.exclude=[CustomViTHybrid]", "runs.cascade.enable=true"),
    *("runs.cascade.enable=false", "runs.score_ensemble.temperature=off", "runs.score_ensemble.temperature=auto"),
)
SELECT_ALL = ("backbones.exclude=[]", "runs.model_soup.enable=true")
WRITERS: tuple[tuple[str, ...], ...] = (
    *(("discover",), ("discover", "--verify"), ("build-ensemble",), ("build-ensemble", "--force"), ("stack",)),
    *(("fusion-train",), ("meta-fuse",), ("evaluate",), ("evaluate", "--split", "val"), ("evaluate", "--force")),
    *(("audit",), ("pipeline",), ("clean", "--confirm"), ("clean", "--confirm", "--stale"), ("clean", "--temporary")),
    *(("clean", "--confirm", "--unlisted"), ("clean", "--confirm", "--cache"), ("evaluate", "--class-conditional")),
    ("export", "--model-name", "soft_voting_ensemble", "--formats", "onnx", "state_dict"),
    ("build-ensemble", "--set", "runs.score_ensemble.methods=[logit_averaging]"),
)
READERS: tuple[tuple[str, ...], ...] = (
    *(("status", "--json"), ("status",), ("config",), ("clean",)),
    ("predict", "--model-name", "soft_voting_ensemble", "--format", "jsonl", "{images}"),
    ("evaluate", "--model-name", "soft_voting_ensemble"),
)
"""`evaluate` writes and has to wait its turn, or is refused by the name of the writer."""
Action = Callable[[], str]


class User:
    """What somebody does to the files of the workspace, without a command."""

    def __init__(self, workspace: Path, variants: Path, rng: random.Random) -> None:
        """`variants` holds `<training>/{checkpoints,kfold_results}/...` of the same backbones, trained otherwise."""
        self.workspace, self.variants, self.rng = workspace, variants, rng

    def actions(self) -> list[Action]:
        """All of them."""
        return [self.retrain, self.remove, self.add_again, self.touch]

    def retrain(self) -> str:
        """Put another training of a backbone in place of the one that is there."""
        name = self.rng.choice(BACKBONES)
        variant = self.rng.choice(sorted(path.name for path in self.variants.iterdir()))
        for path in files_of(self.variants / variant, name):
            _replace(path, self.workspace / path.relative_to(self.variants / variant))
        return f"{name} retrained: {variant}"

    def remove(self) -> str:
        """Delete the files of a backbone, unless it is the last but one."""
        there = [name for name in BACKBONES if (self.workspace / "checkpoints" / f"{name}_final.pth").exists()]
        if len(there) < len(BACKBONES):
            return "no member removed"
        name = self.rng.choice(there)
        for path in list(files_of(self.workspace, name)):
            path.unlink()
        return f"{name} removed"

    def add_again(self) -> str:
        """Put removed backbones back."""
        for name in BACKBONES:
            if not (self.workspace / "checkpoints" / f"{name}_final.pth").exists():
                for path in files_of(self.variants / "first", name):
                    _replace(path, self.workspace / path.relative_to(self.variants / "first"))
        return "all members are there again"

    def touch(self) -> str:
        """Give a checkpoint another time and the same content."""
        paths = sorted((self.workspace / "checkpoints").glob("Custom*_final.pth"))
        path = self.rng.choice(paths)
        os.utime(path)
        return f"{path.name} touched"


def builds_by_option(workspace: Path) -> Iterator[tuple[str, ...]]:
    """Commands that built what is there with values for themselves alone, which the configuration does not keep."""
    for line in WRITERS:
        if line[0] == "build-ensemble" and "--set" in line:
            (name,) = line[-1].partition("=[")[2].removesuffix("]").split(",")
            if (workspace / "ensembles" / "models" / f"{name}_ensemble" / "ensemble.json").is_file():
                yield line


def files_of(folder: Path, backbone: str) -> Iterator[Path]:
    """What the base pipeline wrote of one backbone."""
    for place in ("checkpoints", "kfold_results", "metrics_output"):
        for path in sorted((folder / place).glob(f"{backbone}_*")):
            last = path.stem.split("_")[-1]
            is_ours = place == "checkpoints" and not last.startswith(("final", "fold", "best", "snapshot"))
            if path.is_file() and not is_ours:
                yield path


def _replace(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    temporary = target.with_name(f"{target.name}.coming")
    shutil.copy(source, temporary)
    temporary.replace(target)
