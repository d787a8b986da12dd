"""The schema of the configuration file: every key with its type; defaults are the specification's values.

`utils.core.config_file` finds and reads the file; code that receives a `Config` needs only this module.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, PrivateAttr, ValidationInfo
from pydantic_core import PydanticCustomError

from utils.core.errors import UserError

# What the specification's file and text print is accepted before its method is built; the families' tables add to it.
SPECIFIED: dict[str, tuple[str, ...]] = {
    "exports.formats": ("state_dict", "checkpoint", "torchscript", "onnx", "tflite", "tensorrt", "custom"),
    "runs.score_ensemble.methods": (
        *("soft_voting", "hard_voting", "logit_averaging", "weighted", "greedy_selection"),
        *("soft_voting_calibrated", "logit_averaging_calibrated", "best_single_calibrated"),
    ),
    "runs.model_soup.methods": ("uniform", "greedy", "wise_ft"),
    "runs.stacking.meta_learners": ("lr", "xgb", "rf", "mlp"),
    "runs.fusion.fusion_methods": ("concat_mlp", "attention", "bilinear", "cca_aligned"),
    "runs.meta_fuser.fuser_type": ("xgb", "mlp", "attention", "convex"),  # the last one is ours
    "pruning.methods": ("greedy_forward", "greedy_backward", "diversity_max", "clustering"),
}
FILE = "file"
"""The origin of a value that a configuration file states."""
A_LIST = "expected a list such as [a, b], or [] for none"
ALL = "all"
"""`backbones.include`: every member that is not derived and whose training data is known; `input_ensembles` of
`runs.meta_fuser`: every built ensemble that can be an input"""
A_NAME = "expected a name, without slashes, leading dot or outer spaces"
Metric = Literal["f1_macro", "accuracy", "log_loss", "brier"]
FitRows = Literal["honest", "val", "oof"]


def _check(expected: str, fits: Callable[[Any], bool], turn: Callable[[Any], Any] = lambda raw: raw) -> BeforeValidator:
    def check(raw: object) -> object:
        if not fits(turn(raw)):
            raise ValueError(expected)
        return turn(raw)

    return BeforeValidator(check)


def _real(raw: object) -> float:
    """A number, also one written as text (`1e-3` is text in YAML 1.1); NaN, which fits nowhere, for anything else."""
    try:
        number = float("nan" if isinstance(raw, bool) or not isinstance(raw, (int, float, str)) else raw)
    except (ValueError, OverflowError):
        return float("nan")
    return number if abs(number) < 2**53 else float("nan")


def _whole(raw: object) -> float:
    number = _real(raw)
    return int(number) if number == number // 1 else float("nan")


def _has_one_group(pattern: object) -> bool:
    try:
        return isinstance(pattern, str) and re.compile(pattern).groups == 1
    except (re.error, OverflowError, RecursionError):
        return False


def is_name(raw: object) -> bool:
    """Whether a member or an ensemble, and its folder, can have this name."""
    return isinstance(raw, str) and bool(re.fullmatch(r"(?![.\s])[^/\\\x00-\x1f]+(?<!\s)", raw))


def _names(raw: object, info: ValidationInfo) -> object:
    """Check a list of names and report all invalid items at once, each with its position."""
    if not isinstance(raw, (list, tuple)):
        raise ValueError(A_LIST)
    if not raw and info.data.get("enable"):
        raise ValueError("expected at least one name, or enable: false")
    twice = [(position, item, "expected each name once") for position, item in enumerate(raw) if item in raw[:position]]
    if problems := [(position, item, A_NAME) for position, item in enumerate(raw) if not is_name(item)] + twice:
        raise PydanticCustomError("items", "see the context", {"items": problems})
    return raw


def _names_or_all(raw: object, info: ValidationInfo) -> object:
    """`all`, or a list of names."""
    if isinstance(raw, str) and raw != ALL:
        raise ValueError(f"expected a list such as [a, b], or {ALL}")
    return raw if raw == ALL else _names(raw, info)


def _some_left(excluded: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    """Check that `exclude` leaves some of `include`; excluding names of `include` is what the specification advises."""
    included = info.data.get("include")
    if included and included != ALL and set(included) <= set(excluded):
        raise ValueError(f"expected at least one of the {len(included)} names of include left")
    return excluded


def _at_most_experts(top_k: int, info: ValidationInfo) -> int:
    if top_k > (experts := info.data.get("num_experts", top_k)):
        raise ValueError(f"expected at most num_experts, which is {experts}")
    return top_k


def _differs_from_student(assistant: str | None, info: ValidationInfo) -> str | None:
    if assistant is not None and assistant == info.data.get("student"):
        raise ValueError("expected another network than the student")
    return assistant


def _without_meta_fuser(inputs: tuple[str, ...] | str) -> tuple[str, ...] | str:
    if "meta_fuser" in inputs:
        raise ValueError("expected other ensembles: meta_fuser cannot be an input of itself")
    return inputs


Count = Annotated[int, _check("expected a whole number of at least 1", lambda number: number >= 1, _whole)]
Workers = Annotated[int, _check("expected a whole number of at least 0", lambda number: number >= 0, _whole)]
Seed = Annotated[int, _check("expected a whole number from 0 to 4294967295", lambda seed: 0 <= seed < 2**32, _whole)]
Positive = Annotated[float, _check("expected a number above 0", lambda number: number > 0, _real)]
Fraction = Annotated[float, _check("expected a number from 0 to 1", lambda number: 0 <= number <= 1, _real)]
Shrinkage = Annotated[float, _check("expected a number above 0, at most 1", lambda number: 0 < number <= 1, _real)]
Dropout = Annotated[float, _check("expected a number from 0 to below 1", lambda number: 0 <= number < 1, _real)]
Flag = Annotated[bool, _check("expected true or false, without quotes", lambda raw: isinstance(raw, bool))]
Text = Annotated[str, _check("expected text, in quotes", lambda raw: isinstance(raw, str) and raw.strip() != "")]
Name = Annotated[str, _check(A_NAME, is_name)]
NameOrNone = Annotated[str | None, _check(f"{A_NAME}, or null", lambda raw: raw is None or is_name(raw))]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
NamesOrAll = Annotated[tuple[str, ...] | Literal["all"], BeforeValidator(_names_or_all)]
Precisions = Annotated[tuple[Literal["fp32", "fp16", "int8"], ...], BeforeValidator(_names)]
Sizes = Annotated[tuple[Count, ...], _check(A_LIST, lambda raw: isinstance(raw, (list, tuple)))]
Device = Annotated[
    str,
    _check(
        "expected cuda, cuda:N, cpu or auto",
        lambda raw: isinstance(raw, str) and bool(re.fullmatch(r"cuda(:[0-9]{1,3})?|cpu|auto", raw)),
    ),
]
Pattern = Annotated[
    str | None,
    _check("expected null or a regex with exactly one group", lambda raw: raw is None or _has_one_group(raw)),
]
Batch = Annotated[int, _check("expected a whole number of at least 2", lambda number: number >= 2, _whole)]
Folder = Annotated[
    str | None,
    _check("expected a folder, or null", lambda raw: raw is None or (isinstance(raw, str) and raw.strip() != "")),
]
Threads = Annotated[
    int | None,
    _check(
        "expected a whole number of at least 1, or null for the number that the network decides",
        lambda number: number is None or number >= 1,
        lambda raw: None if raw is None else _whole(raw),
    ),
]
Limit = Annotated[
    float | None,
    _check(
        "expected a number above 0, or null for no limit",
        lambda number: number is None or number > 0,
        lambda raw: None if raw is None else _real(raw),
    ),
]


class Section(BaseModel):
    """A closed, frozen mapping of the file."""

    # Defaults are validated too: `num_experts: 1` alone does not go with the default of top_k.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


class Project(Section):
    name: Text = "disease_classification_ensemble"
    version: Text = "1.0"


class Dataset(Section):
    img_size: Count = 224
    batch_size: Count = 32
    num_workers: Workers = 16
    num_threads: Threads = None
    group_regex: Pattern = None


class Backbones(Section):
    """Which members are combined.

    Imported members are named in `include` like others; where it is left as printed here, all of them join. `all`
    includes every member that is not derived and whose training data is known.
    """

    include: NamesOrAll = (
        *("CustomConvNeXt", "CustomEfficientNetV4", "CustomGhostNetV2", "CustomResNetMish", "CustomCSPDarkNet"),
        *("CustomInceptionV4", "CustomViTHybrid", "CustomSwinTransformer", "CustomCoAtNet", "CustomRegNet"),
        *("CustomDenseNetHybrid", "CustomDeiTStyle", "CustomMaxViT", "CustomMobileOne", "CustomDynamicConvNet"),
    )
    exclude: Annotated[Names, AfterValidator(_some_left)] = ()

    @property
    def selected(self) -> tuple[str, ...]:
        """The names in `include` without `exclude`, in the file's order; none where it is `all`."""
        if isinstance(self.include, str):
            return ()
        return tuple(name for name in self.include if name not in self.exclude)


class Exports(Section):
    enable: Flag = True
    formats: Names = ("state_dict", "checkpoint", "torchscript", "onnx", "tflite")
    precision: Precisions = ("fp32",)
    input: Literal["float-nchw", "uint8-nhwc"] = "float-nchw"
    max_members: Count | None = None


class ScoreEnsemble(Section):
    enable: Flag = True
    methods: Names = ("soft_voting", "hard_voting", "logit_averaging", "weighted")
    optimize_weights: Flag = True
    optimization_metric: Metric = "f1_macro"
    pool: Literal["auto", "linear", "log_linear"] = "auto"
    fit_rows: FitRows = "honest"
    temperature: Literal["auto", "off", "per_member"] = "auto"
    calibration: Literal["temperature", "auto"] = "temperature"


class ModelSoup(Section):
    enable: Flag = True
    methods: Names = ("uniform", "greedy")
    recompute_bn: Flag = True


class SnapshotEnsemble(Section):
    enable: Flag = False
    n_snapshots: Count = 5
    epochs_per_cycle: Count = 10


class StackingMlp(Section):
    hidden_dims: Sizes = (256, 128)
    epochs: Count = 50
    lr: Positive = 0.001
    dropout: Dropout = 0.3


class StackingXgb(Section):
    n_estimators: Count = 100
    max_depth: Count = 6
    learning_rate: Shrinkage = 0.1


class Stacking(Section):
    enable: Flag = True
    meta_learners: Names = ("lr", "xgb", "mlp")
    mlp_config: StackingMlp = StackingMlp()
    xgb_config: StackingXgb = StackingXgb()
    fit_rows: Literal["honest", "oof"] = "honest"
    fallback: Flag = True
    inference_members: Literal["auto", "full", "folds"] = "auto"


class FusionHead(Section):
    hidden_dims: Sizes = (512, 256)
    epochs: Count = 40
    lr: Positive = 0.001
    dropout: Dropout = 0.3


class Fusion(Section):
    enable: Flag = True
    extract_embeddings: Flag = True
    fusion_methods: Names = ("concat_mlp", "attention", "bilinear", "cca_aligned")
    fusion_config: FusionHead = FusionHead()
    end_to_end: Flag = False
    end_to_end_epochs: Count = 4
    train_embeddings: Literal["auto", "val", "aligned", "in_sample"] = "auto"
    seeds: Count = 1
    label_smoothing: Dropout = 0.0


class Moe(Section):
    enable: Flag = False
    num_experts: Count = 5
    top_k: Annotated[Count, AfterValidator(_at_most_experts)] = 2
    gating_hidden_dim: Count = 128
    epochs: Count = 30


class Cascade(Section):
    """Members run one after the other until they are confident enough.

    `max_accuracy_loss` is the allowed loss in accuracy compared with running all `max_members`.
    """

    enable: Flag = False
    max_members: Count = 5
    max_accuracy_loss: Fraction = 0.005


class MetaMlp(Section):
    hidden_dims: Sizes = (128, 64)
    epochs: Count = 30
    lr: Positive = 0.001


class MetaFuser(Section):
    enable: Flag = True
    input_ensembles: Annotated[NamesOrAll, AfterValidator(_without_meta_fuser)] = (
        *("soft_voting", "logit_averaging", "stacking_xgb", "fusion_concat_mlp"),
    )
    fuser_type: Name = "xgb"
    mlp_config: MetaMlp = MetaMlp()


class Runs(Section):
    score_ensemble: ScoreEnsemble = ScoreEnsemble()
    model_soup: ModelSoup = ModelSoup()
    snapshot_ensemble: SnapshotEnsemble = SnapshotEnsemble()
    stacking: Stacking = Stacking()
    fusion: Fusion = Fusion()
    moe: Moe = Moe()
    cascade: Cascade = Cascade()
    meta_fuser: MetaFuser = MetaFuser()


class CostBudget(Section):
    max_latency_ms: Limit = 100.0
    max_size_mb: Limit = 500.0


class Pruning(Section):
    enable: Flag = True
    methods: Names = ("greedy_forward", "greedy_backward", "diversity_max", "clustering")
    target_size: Count = 7
    pick: Literal["best", "knee", "fastest"] = "best"
    cost_budget: CostBudget = CostBudget()


class Distillation(Section):
    enable: Flag = True
    teacher: Name = "meta_fuser"
    student: Name = "CustomMobileOne"
    temperature: Positive = 4.0
    alpha: Fraction = 0.5
    epochs: Count = 50
    lr: Positive = 0.001
    batch_size: Batch = 32
    targets: Literal["auto", "oof", "consistent", "views"] = "auto"
    views: Count = 4
    mix: Literal["auto", "none", "mixup", "cutmix", "both"] = "auto"
    initial_weights: Literal["auto", "random", "member", "pretrained"] = "auto"
    seeds: Count = 1
    unlabeled_dir: Folder = None
    assistant: Annotated[NameOrNone, AfterValidator(_differs_from_student)] = None


class Cache(Section):
    quota_gb: Limit = 20.0


class Config(Section):
    """The whole file; `source` is its path and not one of the values."""

    project: Project = Project()
    device: Device = "cuda"
    seed: Seed = 42
    dataset: Dataset = Dataset()
    backbones: Backbones = Backbones()
    exports: Exports = Exports()
    runs: Runs = Runs()
    pruning: Pruning = Pruning()
    distillation: Distillation = Distillation()
    cache: Cache = Cache()
    _source: Path = PrivateAttr(default=Path("built-in configuration"))
    _origins: Mapping[str, str] = PrivateAttr(default_factory=dict)
    _overrides: tuple[str, ...] = PrivateAttr(default=())
    _is_remembered: bool = PrivateAttr(default=False)

    @property
    def source(self) -> Path:
        """The file as the user named it, for messages."""
        return self._source

    @property
    def origins(self) -> Mapping[str, str]:
        """{dotted key: where its value is from}: `FILE`, or `KEY=VALUE` of the command line; the rest are defaults."""
        return self._origins

    @property
    def overrides(self) -> tuple[str, ...]:
        """`KEY=VALUE` of each `--set` that the workspace does not remember; recorded with what the command builds."""
        return self._overrides

    @property
    def is_remembered(self) -> bool:
        """Whether it is the workspace's own, so that what was built with a `--set` stays as it was built."""
        return self._is_remembered

    def at(self, key: str) -> Any:
        """The section or value at a dotted key such as `runs.moe.top_k`. Raises KeyError if there is none."""
        value: Any = self
        for name in key.split("."):
            if not isinstance(value, Section) or name not in type(value).model_fields:
                raise KeyError(f"the configuration has no {key}")
            value = getattr(value, name)
        return value

    def as_dict(self) -> dict[str, Any]:
        """All values in plain types, in the specification's order."""
        return self.model_dump(mode="json")

    def digest(self, *keys: str) -> str:
        """SHA-256 in hexadecimal of the values at these keys, in any order, or of all values without a key."""
        values = {key: self.at(key) for key in keys} if keys else {"": self}
        plain = {key: value.model_dump() if isinstance(value, Section) else value for key, value in values.items()}
        return hashlib.sha256(json.dumps(plain, sort_keys=True, allow_nan=False).encode()).hexdigest()


def validate(values: dict[str, Any], *, source: Path, origins: Mapping[str, str] = MappingProxyType({})) -> Config:
    """Validate plain values; the Config keeps its `source` and `origins`. Raises pydantic's ValidationError."""
    config = Config.model_validate(values)
    config._source, config._origins = source, dict(origins)
    return config


def of_workspace(config: Config, *, overrides: Sequence[str] = (), is_remembered: bool = False) -> Config:
    """The configuration with what a workspace knows about it: see `Config.overrides` and `Config.is_remembered`."""
    known = config.model_copy()
    known._overrides, known._is_remembered = tuple(overrides), is_remembered
    return known


def require_enabled(config: Config, key: str) -> None:
    """Raise UserError, with the line to add, if the section at `key` is disabled."""
    if not config.at(f"{key}.enable"):
        raise UserError(
            f"{config.source}: {key} is disabled; run again with --set {key}.enable=true, "
            f"or write `enable: true` under {key} in the file"
        )
