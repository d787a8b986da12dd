"""Which backbones a pipeline has finished, in `checkpoints/.recovery_state.json`: JSON alone, replaced as a whole."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from config import settings
from utils.files import atomic_path, read_json, write_json

STATE = ".recovery_state.json"
SUMMARY = "recovery_status.txt"
ROLES = ("final", "finetune_best", "head_best")  # the most finished first


class CheckpointManager:
    """Reads and writes the recovery state of one checkpoint folder; None is CKPT_DIR.

    Results and progress are plain JSON values; anything else raises TypeError, and a damaged state file ValueError.
    """

    def __init__(self, checkpoint_dir: Path | str | None = None) -> None:
        self.checkpoint_dir = Path(settings.CKPT_DIR if checkpoint_dir is None else checkpoint_dir)

    def load_pipeline_state(self) -> dict[str, Any]:
        """{completed_backbones, results, timestamp}; an empty one where nothing has been saved."""
        empty: dict[str, Any] = {"completed_backbones": [], "results": {}, "timestamp": None}
        return empty | (
            read_json(self.checkpoint_dir / STATE, completed_backbones=list, results=dict, kfold_progress=dict) or {}
        )

    def save_pipeline_state(self, state: dict[str, Any]) -> None:
        """Replace the state, with the present time."""
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(self.checkpoint_dir / STATE, state | {"timestamp": stamp})

    def get_completed_backbones(self) -> list[str]:
        """Names in the order in which they were finished."""
        return list(self.load_pipeline_state()["completed_backbones"])

    def get_next_backbone_to_train(self) -> str | None:
        """The first of BACKBONES that is not finished; None when all are."""
        done = set(self.get_completed_backbones())
        return next((name for name in settings.BACKBONES if name not in done), None)

    def mark_backbone_complete(self, name: str, results: dict[str, Any]) -> None:
        """Note a finished backbone with its results; its fold progress is no longer needed."""
        state = self.load_pipeline_state()
        if name not in state["completed_backbones"]:
            state["completed_backbones"].append(name)
        state["results"][name] = results
        state.get("kfold_progress", {}).pop(name, None)
        self.save_pipeline_state(state)

    def get_recovery_status(self) -> dict[str, Any]:
        """{completed, remaining, next, timestamp}: lists of names in their order, and when that was saved."""
        state = self.load_pipeline_state()
        completed = list(state["completed_backbones"])
        remaining = [name for name in settings.BACKBONES if name not in completed]
        following = remaining[0] if remaining else None
        return {"completed": completed, "remaining": remaining, "next": following, "timestamp": state["timestamp"]}

    def reset_recovery(self) -> None:
        """Forget what is finished; checkpoints stay."""
        (self.checkpoint_dir / STATE).unlink(missing_ok=True)

    def export_recovery_summary(self, output_file: Path | str | None = None) -> Path:
        """Write the status as text, by default into `recovery_status.txt` beside the checkpoints; returns the path."""
        status = self.get_recovery_status()
        path = Path(output_file) if output_file else self.checkpoint_dir / SUMMARY
        lines = [f"saved: {status['timestamp'] or 'nothing yet'}"]
        lines += [f"{word}: {', '.join(status[word]) or 'none'}" for word in ("completed", "remaining")]
        with atomic_path(path) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def get_latest_backbone_checkpoint(self, name: str) -> Path | None:
        """The most finished checkpoint of a backbone: final, else finetune_best, else head_best, else None."""
        paths = (self.checkpoint_dir / f"{name}_{role}.pth" for role in ROLES)
        return next((path for path in paths if path.is_file()), None)

    def save_kfold_progress(self, name: str, progress: dict[str, Any]) -> None:
        """Note how far the folds of a backbone are."""
        state = self.load_pipeline_state()
        state.setdefault("kfold_progress", {})[name] = progress
        self.save_pipeline_state(state)

    def load_kfold_progress(self, name: str) -> dict[str, Any] | None:
        """What `save_kfold_progress` noted last; None where it noted nothing."""
        return self.load_pipeline_state().get("kfold_progress", {}).get(name)
