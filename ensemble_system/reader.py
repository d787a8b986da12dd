"""A workspace as typed objects: its ranking, scores and predictions, read from the files of docs/contract.md.

Nothing is written, and nothing of the project's own package `utils` is imported into the caller's process:
`Workspace.predict` runs the command line in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd  # type: ignore[import-untyped]
    from numpy.typing import NDArray

Split = Literal["test", "val", "out_of_sample"]
PROGRAM = Path(__file__).with_name("__main__.py")
LEFT_OUT = 4
"""Exit code of `predict` where some images have no prediction; their rows say why."""


class CommandError(RuntimeError):
    """A command ended with an error; the text is its last message."""


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of one model for the images of one split."""

    model: str
    split: Split
    sample_ids: NDArray[np.str_]
    """`(N,)`: the paths of the images below the folder of the split, such as `rust/0001.jpg`."""
    labels: NDArray[np.int64]
    """`(N,)`: numbers of the true classes."""
    classes: tuple[str, ...]
    probabilities: NDArray[np.float64]
    """`(N, C)`."""

    def to_frame(self) -> pd.DataFrame:
        """One row per image: `label`, `predicted`, and a column for each class; needs pandas."""
        import pandas as pd

        frame = pd.DataFrame(
            self.probabilities, index=pd.Index(self.sample_ids, name="sample_id"), columns=self.classes
        )
        frame.insert(0, "label", [self.classes[label] for label in self.labels])
        frame.insert(1, "predicted", [self.classes[best] for best in self.probabilities.argmax(axis=1)])
        return frame


@dataclass(frozen=True)
class Ranking(Sequence[dict[str, Any]]):
    """The rows of `ranking.json`, the best first; each is a dictionary with the keys that docs/contract.md lists."""

    split: str
    n: int
    """Images of the split."""
    rows: tuple[dict[str, Any], ...]
    recommended: str | None
    recommended_fast: str | None

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def to_frame(self) -> pd.DataFrame:
        """One row per model with its figures; intervals and comparisons stay in `rows`. Needs pandas."""
        import pandas as pd

        plain = [{key: value for key, value in row.items() if not isinstance(value, (dict, list))} for row in self.rows]
        return pd.DataFrame(plain).set_index("name")


@dataclass(frozen=True)
class ImagePrediction:
    """What `predict` says about one image."""

    path: str
    predicted: str | None
    """Name of the class; None where the image cannot be read."""
    probability: float | None
    probabilities: dict[str, float] | None
    conformal_set: tuple[str, ...] | None
    """Classes that contain the true one with the coverage that `evaluate` calibrated; None where it has not."""
    abstain: bool | None
    disagreement: float | None
    """Mutual information of the members' predictions, in nats."""
    error: str | None


class Workspace:
    """A folder that the commands have written to; made by `open`."""

    def __init__(self, folder: Path, output: Path) -> None:
        self.folder = folder
        self.output = output

    def __repr__(self) -> str:
        return f"Workspace({str(self.folder)!r})"

    def ranking(self, split: Literal["test", "val"] = "test") -> Ranking:
        """Members and ensembles in the order of `evaluate`. Raises FileNotFoundError before `evaluate` has run."""
        record = _record(self._scores / _by_split("ranking", split), f"evaluate --split {split}")
        names = [(record.get(key) or {}).get("name") for key in ("recommended", "recommended_fast")]
        return Ranking(record["split"], record["n"], tuple(record["rows"]), *names)

    def metrics(self, name: str, split: Literal["test", "val"] = "test") -> dict[str, Any]:
        """The `metrics.json` of a member or an ensemble. Raises KeyError for a name that has none."""
        name = self._resolve(name)
        files = [self._scores / place / _by_split("metrics", split) for place in (name, f"members/{name}")]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise KeyError(f"{name}: no scores on {split}; there are {', '.join(self._scored(split)) or 'none'}")
        return _record(file, "evaluate")

    def predictions(self, name: str, split: Split = "test") -> Predictions:
        """Stored probabilities of a member or an ensemble; those of a member are the softmax of its logits.

        `out_of_sample` are the cross-fitted predictions of an ensemble for the train and val images: each comes from a
        copy that was fitted without that image. Raises KeyError where nothing is stored.
        """
        import numpy as np

        name = self._resolve(name)
        ensemble, member = self.output / "ensembles/models" / name, self.output / "ensembles/predictions" / name / split
        file = ensemble / ("crossfit.npz" if split == "out_of_sample" else f"predictions_{split}.npz")
        if file.is_file():
            with np.load(file, allow_pickle=False) as arrays:
                ids, labels, probabilities = (arrays[key] for key in ("sample_ids", "labels", "probabilities"))
                classes = arrays["classes"].tolist()
        elif (member / "logits.npy").is_file():
            ids, labels, logits = (
                np.load(member / f"{key}.npy", allow_pickle=False) for key in ("sample_ids", "labels", "logits")
            )
            shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
            probabilities = shifted / shifted.sum(axis=1, keepdims=True)
            classes = _record(member / "record.json", "discover --verify")["classes"]
        else:
            raise KeyError(f"{name}: no predictions of {split} in {self.output / 'ensembles'}; `evaluate` stores them")
        return Predictions(name, split, ids, labels, tuple(classes), probabilities.astype(np.float64))

    def predict(
        self, paths: Iterable[str | os.PathLike[str]], model: str = "recommended", *, python: str = sys.executable
    ) -> list[ImagePrediction]:
        """Classify image files, or the images of folders, with a model of the workspace, in a process of its own.

        An image that cannot be read has an `error`. Raises CommandError with the message of the command where it fails.
        """
        listed = "\0".join(os.fspath(path) for path in paths)
        with tempfile.TemporaryDirectory(prefix="ensemble-system-") as scratch:
            answers = Path(scratch) / "answers.jsonl"
            command = [python, str(PROGRAM), "predict", "-", "--model-name", model, "--workspace", str(self.folder)]
            command += ["--output", str(self.output)] if self.output != self.folder else []
            command += ["--to", str(answers), "--probabilities", "--quiet"]
            done = subprocess.run(command, input=listed + "\0", capture_output=True, text=True, check=False)
            if done.returncode not in (0, LEFT_OUT):
                raise CommandError(f"predict ended with {done.returncode}: {done.stderr.strip()}")
            rows = map(json.loads, answers.read_text(encoding="utf-8").splitlines())
            return [_image_prediction(row) for row in rows]

    @property
    def _scores(self) -> Path:
        return self.output / "metrics_output" / "ensembles"

    def _scored(self, split: str) -> list[str]:
        files = [*self._scores.glob(f"*/{_by_split('metrics', split)}")]
        files += self._scores.glob(f"members/*/{_by_split('metrics', split)}")
        return sorted(file.parent.name for file in files)

    def _resolve(self, name: str) -> str:
        """The model that `recommended` or `recommended_fast` names, as the commands have it."""
        if name not in ("recommended", "recommended_fast"):
            return name
        chosen: str | None = getattr(self.ranking(), name)
        if chosen is None:
            raise KeyError(f"{name}: the ranking names no model")
        return chosen


def open(folder: str | os.PathLike[str] = ".", *, output: str | os.PathLike[str] | None = None) -> Workspace:
    """Open a workspace; `output` is the folder that was given to `--output`, if one was.

    Raises FileNotFoundError for a folder that holds nothing of the ensemble system.
    """
    workspace = Path(folder).expanduser().absolute()
    place = Path(output).expanduser().absolute() if output is not None else workspace
    if not (place / "ensembles").is_dir():
        raise FileNotFoundError(f"{place}: no workspace; expected the folder `ensembles`, which `discover` makes")
    return Workspace(workspace, place)


def _record(file: Path, command: str) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file; `{command}` writes it") from None
    return record


def _by_split(stem: str, split: str) -> str:
    return f"{stem}.json" if split == "test" else f"{stem}_{split}.json"


def _image_prediction(row: dict[str, Any]) -> ImagePrediction:
    chosen = row.get("set")
    return ImagePrediction(
        path=row["path"],
        predicted=row["class"],
        probability=row["probability"],
        probabilities=row.get("probabilities"),
        conformal_set=None if chosen is None else tuple(chosen),
        abstain=row["abstain"],
        disagreement=row["disagreement"],
        error=row["error"],
    )
