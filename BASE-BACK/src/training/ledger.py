"""The record of finished units, by digest: `checkpoints/.recovery_state.json`, rewritten after every unit."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import settings
from utils.files import compute_file_sha256, read_json, write_json

if TYPE_CHECKING:
    from training.units import Outcome, Unit


class Ledger:
    """Finished units with their digests, results and files.

    A unit counts as finished when the recorded digest equals its digest and its files are unchanged.
    """

    def __init__(self) -> None:
        self.path = settings.CKPT_DIR / ".recovery_state.json"
        state = read_json(self.path, units=dict, results=dict, completed_backbones=list) or {}
        self.units: dict[str, dict[str, Any]] = state.get("units", {})
        for name, entry in self.units.items():
            if not _is_entry(entry):
                raise ValueError(
                    f"{self.path}: damaged, its unit {name!r} is not what this pipeline writes; remove the file and "
                    "run the pipeline again, which trains anew"
                )
        self._foreign = {key: value for key, value in state.items() if key != "units"}
        # Backbones that another pipeline has trained in this workspace stay recorded.
        trained_here = {name.split(" ")[0] for name in self.units if name.endswith(" train")}
        self._others = {name: result for name, result in state.get("results", {}).items() if name not in trained_here}
        self._others_completed = [name for name in state.get("completed_backbones", []) if name not in trained_here]

    def is_finished(self, unit: Unit) -> bool:
        """Whether the unit is recorded with its digest and its files are on disk, unchanged."""
        entry = self.units.get(unit.name)
        if not entry or entry["digest"] != unit.digest:
            return False
        return all(_is_same(settings.BASE_DIR / name, *facts) for name, facts in entry["files"].items())

    def add(self, unit: Unit, outcome: Outcome, seconds: float) -> None:
        """Record a finished unit."""
        self.units[unit.name] = {
            "digest": unit.digest,
            "seconds": round(seconds, 3),
            "files": {path.relative_to(settings.BASE_DIR).as_posix(): _facts(path) for path in outcome.files},
            "result": outcome.result,
        }
        self.save()

    def forget(self, unit: Unit) -> None:
        """Remove a unit's entry before the unit runs again, so that a killed run does not leave the old entry."""
        if self.units.pop(unit.name, None) is not None:
            self.save()

    def result(self, backbone: str, kind: str) -> dict[str, Any] | None:
        """The result of a unit, for example of ("CustomConvNeXt", "train"); None if it is not finished."""
        entry = self.units.get(f"{backbone} {kind}")
        return entry["result"] if entry else None

    def seconds(self, backbone: str) -> float:
        """Seconds spent on all finished units of one backbone."""
        return sum(entry["seconds"] for name, entry in self.units.items() if name.split(" ")[0] == backbone)

    def save(self) -> None:
        """Write the units and, for other readers of the file, the completed backbones with their results."""
        backbones = sorted({name.split(" ")[0] for name in self.units})
        results = {}
        for backbone in backbones:
            trained = self.result(backbone, "train")
            if trained is None:
                continue
            oof = self.result(backbone, "oof")
            results[backbone] = {
                "accuracy": trained["metrics"]["final_accuracy"],
                "history": trained["history"],
                "metrics": trained["metrics"] | (self.result(backbone, "test") or {}),
                "kfold_cv": kfold_summary(oof["fold_accuracies"]) if oof else None,
                "training_time_seconds": round(self.seconds(backbone), 3),
            }
        completed = [name for name in results if self.result(name, "test") is not None]
        others = [name for name in self._others_completed if name not in results]
        state = self._foreign | {
            "completed_backbones": others + completed,
            "results": self._others | results,
            "units": self.units,
            "timestamp": datetime.now().astimezone().isoformat(),
        }
        write_json(self.path, state)


def kfold_summary(accuracies: list[float]) -> dict[str, float]:
    """Mean and population standard deviation of the fold accuracies."""
    mean = sum(accuracies) / len(accuracies)
    variance = sum((accuracy - mean) ** 2 for accuracy in accuracies) / len(accuracies)
    return {"mean": mean, "std": variance**0.5}


def _is_entry(entry: Any) -> bool:
    """Whether an entry has a digest, seconds, a result, and files with size, modification time and digest each."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "digest": str,
        "seconds": (int, float),
        "result": dict,
        "files": dict,
    }
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), kind) for key, kind in kinds.items()):
        return False
    files = entry["files"]
    return all(isinstance(facts, list) and len(facts) == 3 for facts in files.values())


def _facts(path: Path) -> list[Any]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, compute_file_sha256(path)]


def _is_same(path: Path, size: int, modified: int, digest: str) -> bool:
    if not path.is_file() or path.stat().st_size != size:
        return False
    return path.stat().st_mtime_ns == modified or compute_file_sha256(path) == digest
