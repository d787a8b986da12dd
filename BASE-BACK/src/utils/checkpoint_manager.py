"""The record of finished backbones in `checkpoints/.recovery_state.json`, plain JSON that is replaced atomically."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from config import settings
from utils.files import atomic_path, read_json, write_json

STATE = ".recovery_state.json"
SUMMARY = "recovery_status.txt"
ROLES = ("final", "finetune_best", "head_best")  # latest stage first


class CheckpointManager:
    """Reads and writes the recovery state of one checkpoint folder, by default CKPT_DIR.

    Results and progress are JSON values; other values raise TypeError, a damaged state file ValueError.
    """

    def __init__(self, checkpoint_dir: Path | str | None = None) -> None:
        self.checkpoint_dir = Path(settings.CKPT_DIR if checkpoint_dir is None else checkpoint_dir)

    def load_pipeline_state(self) -> dict[str, Any]:
        """{completed_backbones, results, timestamp}; an empty state if nothing has been saved."""
        empty: dict[str, Any] = {"completed_backbones": [], "results": {}, "timestamp": None}
        return empty | (
            read_json(self.checkpoint_dir / STATE, completed_backbones=list, results=dict, kfold_progress=dict) or {}
        )

    def save_pipeline_state(self, state: dict[str, Any]) -> None:
        """Replace the state, with the current time."""
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(self.checkpoint_dir / STATE, state | {"timestamp": stamp})

    def get_completed_backbones(self) -> list[str]:
        """Names of the finished backbones, in the order of completion."""
        return list(self.load_pipeline_state()["completed_backbones"])

    def get_next_backbone_to_train(self) -> str | None:
        """The first of BACKBONES that is not finished; None if all are."""
        done = set(self.get_completed_backbones())
        return next((name for name in settings.BACKBONES if name not in done), None)

    def mark_backbone_complete(self, name: str, results: dict[str, Any]) -> None:
        """Record a finished backbone with its results and remove its fold progress."""
        state = self.load_pipeline_state()
        if name not in state["completed_backbones"]:
            state["completed_backbones"].append(name)
        state["results"][name] = results
        state.get("kfold_progress", {}).pop(name, None)
        self.save_pipeline_state(state)

    def get_recovery_status(self) -> dict[str, Any]:
        """{completed, remaining, next, timestamp}: ordered names, ordered names, a name or None, time of saving."""
        state = self.load_pipeline_state()
        completed = list(state["completed_backbones"])
        remaining = [name for name in settings.BACKBONES if name not in completed]
        following = remaining[0] if remaining else None
        return {"completed": completed, "remaining": remaining, "next": following, "timestamp": state["timestamp"]}

    def reset_recovery(self) -> None:
        """Clear the record; checkpoints stay."""
        (self.checkpoint_dir / STATE).unlink(missing_ok=True)

    def export_recovery_summary(self, output_file: Path | str | None = None) -> Path:
        """Write the status as text, by default to `recovery_status.txt` in the checkpoint folder; returns the path."""
        status = self.get_recovery_status()
        path = Path(output_file) if output_file else self.checkpoint_dir / SUMMARY
        lines = [f"saved: {status['timestamp'] or 'nothing yet'}"]
        lines += [f"{word}: {', '.join(status[word]) or 'none'}" for word in ("completed", "remaining")]
        with atomic_path(path) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def get_latest_backbone_checkpoint(self, name: str) -> Path | None:
        """The checkpoint of a backbone's latest stage: final, else finetune_best, else head_best, else None."""
        paths = (self.checkpoint_dir / f"{name}_{role}.pth" for role in ROLES)
        return next((path for path in paths if path.is_file()), None)

    def save_kfold_progress(self, name: str, progress: dict[str, Any]) -> None:
        """Record the progress of a backbone's folds."""
        state = self.load_pipeline_state()
        state.setdefault("kfold_progress", {})[name] = progress
        self.save_pipeline_state(state)

    def load_kfold_progress(self, name: str) -> dict[str, Any] | None:
        """The progress that `save_kfold_progress` recorded last, or None."""
        return self.load_pipeline_state().get("kfold_progress", {}).get(name)
