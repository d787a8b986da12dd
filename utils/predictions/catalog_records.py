"""The schema of the catalog file, validated on reading, since the file may be of any origin and contains paths."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from utils.core.config_values import ViewGroup, is_name
from utils.core.display_text import first_names
from utils.core.errors import UserError
from utils.networks.preprocessing import Preprocessing

SPLITS = ("train", "val", "test")
MOST_PROBLEMS = 3


def _plain(name: str) -> str:
    """Member names become folder names, so they must not lead out of the workspace."""
    if not is_name(name):
        raise ValueError("expected a name without slashes that does not begin with a dot")
    return name


def _of_file(path: str) -> str:
    if "\0" in path:
        raise ValueError("expected a path, which holds no null character")
    return path


def _of_preprocessing(record: dict[str, Any]) -> dict[str, Any]:
    try:
        Preprocessing.from_record(record, "a record", remedy="Run `python ensemble_orchestrator.py discover` again")
    except UserError as error:
        raise ValueError(str(error)) from error
    return record


Name = Annotated[str, AfterValidator(_plain)]
File = Annotated[str, AfterValidator(_of_file)]
Record = Annotated[dict[str, Any], AfterValidator(_of_preprocessing)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _BaseBack(_Part):
    path: str
    kind: str
    digest: str


class _Split(_Part):
    n: int
    digest: str


class _Checkpoint(_Part):
    path: File
    stage: str
    sha256: str


class _Oof(_Part):
    path: File
    sha256: str
    rows: int
    folds: int
    accuracy: float | None


class _TrainingList(_Part):
    digest: str
    rows: dict[str, int]
    unmatched: int
    lines: int | None = None
    unmatched_line: str | None = None


class _Member(_Part):
    source: Literal["trained", "imported", "derived"]
    architecture: str
    size: str
    img_size: int | None
    classes: list[str]
    checkpoints: list[_Checkpoint]
    exports: list[str]
    metrics: str | None
    oof: _Oof | None
    recorded_accuracy: float | None
    recorded_test_accuracy: float | None = None
    digest: str
    usable: bool
    parents: list[Name]
    trained_on: Literal["none", "train", "train+val", "all", "file", "unknown"] = "train"
    training_list: _TrainingList | None = None
    trunk: dict[Literal["checkpoint", "sha256"], str] | None = None
    pretrained_on: Literal["none", "train", "train+val", "all", "file", "unknown"] = "none"
    preprocessing: Record | None = None
    selection: Literal["last", "val"] = "val"
    views: list[ViewGroup] = []


class _Problem(_Part):
    code: str
    severity: str
    member: str | None
    message: str
    remedy: str


class _Form(_Part):
    base_back: _BaseBack
    classes: list[str]
    splits: dict[Literal["train", "val", "test"], _Split]
    members: dict[Name, _Member]
    problems: list[_Problem]


def check(record: Any) -> None:
    """Raise ValueError naming the entries of a catalog that do not match the schema."""
    try:
        form = _Form.model_validate(record)
    except ValidationError as error:
        reasons = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ValueError(first_names(reasons, MOST_PROBLEMS, "; ")) from error
    if missing := [split for split in SPLITS if split not in form.splits]:
        raise ValueError(f"splits: no {', '.join(missing)}")
    if without := [name for name, m in form.members.items() if m.source != "imported" and not m.checkpoints]:
        raise ValueError(f"members.{without[0]}: no checkpoint")
    if beyond := [name for name, m in form.members.items() if m.source != "imported" and m.img_size is None]:
        raise ValueError(f"members.{beyond[0]}: no img_size")
    if sizes := [n for n, m in form.members.items() if m.preprocessing and m.preprocessing["input_size"] != m.img_size]:
        raise ValueError(f"members.{sizes[0]}: preprocessing.input_size differs from img_size")
    if others := [name for name, m in form.members.items() if m.usable and sorted(m.classes) != sorted(form.classes)]:
        raise ValueError(f"members.{others[0]}: other classes than the catalog's")
