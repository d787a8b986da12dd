"""Mistakes of typing and what was meant, for the test that asks for the answer and the benchmark that times it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Mistake(NamedTuple):
    """What was typed in a workspace `{folder}/work` beside `{folder}/photos/`, and what was meant."""

    typed: str
    meant: str
    code: int = 2

    def words(self, folder: Path) -> list[str]:
        """The command line in this folder, with its workspace where none is named."""
        words = [word.format(folder=folder) for word in self.typed.split()]
        return words if "--workspace" in words else [*words, "--workspace", str(folder / "work")]


MISTAKES = (
    Mistake("evalute", "'evaluate'"),
    Mistake("build_ensemble", "'build-ensemble'"),
    Mistake("fusiontrain", "'fusion-train'"),
    Mistake("statsu", "'status'"),
    Mistake("export --modelname soft_voting_ensemble", "'--model-name'"),
    Mistake("evaluate --split tset", "'test'"),
    Mistake("debug --section stak", "'stack'"),
    Mistake("predict photo.png --model-name recommended --sets rasp", "'raps'"),
    Mistake("status --set runs.moe.enabel=true", "'enable'"),
    Mistake("status --set moe.enable=true", "'runs.moe'"),
    Mistake("status --set runs.stacking.meta_learners=[xbg]", "'xgb'"),
    Mistake("status --set runs.score_ensemble.optimization_metric=acuracy", "'accuracy'"),
    Mistake("status --set seed", "KEY=VALUE"),
    Mistake("status --device gpu", "cuda"),
    Mistake("status --config configs/digit_demo.yaml", "'configs/digits_demo.yaml'"),
    Mistake("config --explain runs.stacking.xgb_config.max_dept", "'runs.stacking.xgb_config.max_depth'"),
    Mistake("config --explain topk", "'runs.moe.top_k'"),
    Mistake("evaluate --model-name soft_votng_ensemble", "'soft_voting_ensemble'", 1),
    Mistake("export --model-name recomended", "'recommended'", 1),
    Mistake("predict {folder}/photos/1/*.png --model-name baye", "'bayes'", 1),
    Mistake("export --formats onx", "'onnx'"),
    Mistake("build-ensemble --set backbones.include=[bays,forest]", "'bayes'", 1),
    Mistake("discover --remove baes", "'bayes'", 1),
    Mistake("predict {folder}/photo --model-name bayes", "/photos?", 1),
    Mistake("status --workspace {folder}/wrk", "/work?", 1),
    Mistake("evaluate --workspace {folder}/work/ensembles/models", "/work?", 1),
)


def first_line(stderr: str) -> str:
    """The first line of an answer that is more than a note."""
    return next((line for line in stderr.splitlines() if "| INFO |" not in line), "")
