"""All settings of the base pipeline; environment variables are read once, when this module is first imported.

Importing creates no folders. A variable with an invalid value raises `SettingsError` with a message of one line: the
name, the value and the allowed values.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

__all__ = [
    "ALL_BACKBONES",
    "AUGMENT",
    "BACKBONES",
    "BACKBONE_LR",
    "BACKBONE_LRS",
    "BASE_DIR",
    "BATCH_SIZE",
    "CKPT_DIR",
    "CLASS_WEIGHTS",
    "CYCLES",
    "DEBUG_BACKBONE",
    "DEBUG_BATCH_SIZE",
    "DEBUG_ENABLE_EXPORT",
    "DEBUG_EPOCHS_FINETUNE",
    "DEBUG_EPOCHS_HEAD",
    "DEBUG_FUNCTION",
    "DEBUG_FUNCTIONS",
    "DEBUG_LOG_DIR",
    "DEBUG_MODE",
    "DEPLOY_DIR",
    "ENABLE_EXPORT",
    "ENABLE_KFOLD_CV",
    "ENABLE_TRANSFER_LEARNING",
    "EPOCHS_FINETUNE",
    "EPOCHS_HEAD",
    "EPOCHS_PER_CYCLE",
    "EXIF",
    "EXPORT_CONFIG",
    "EXPORT_FORMATS",
    "EXPORT_TYPES",
    "EXTERNAL_BASE_BACK",
    "GROUP_REGEX",
    "HEAD_LR",
    "IMAGE_CACHE_DIR",
    "IMG_SIZE",
    "KFOLD_DIR",
    "K_FOLDS",
    "LAYER_DECAY",
    "METRICS_DIR",
    "MODEL_SIZE",
    "MODES",
    "NETWORK_MODES",
    "NETWORK_TRAINED_ON",
    "NETWORK_VIEWS",
    "NETWORK_WEIGHTS",
    "NUM_CLASSES",
    "NUM_WORKERS",
    "PARENT",
    "PLOTS_DIR",
    "PRETRAINED_DIR",
    "PRETRAINED_DOWNLOAD_MAP",
    "PRETRAINED_EPOCHS_FINETUNE",
    "PRETRAINED_EPOCHS_HEAD",
    "PRETRAINED_LR",
    "PRETRAINED_PATHS",
    "PROGRESS_SECONDS",
    "RAW_DIR",
    "SAMPLING",
    "SEED",
    "SMOKE_CHECK_DIR",
    "SNAPSHOTS",
    "SPLIT_DIR",
    "TEST_DIR",
    "TIMM_BACKBONES",
    "TIMM_IMG_SIZE",
    "TIMM_NETWORKS",
    "TRAINED_DIR",
    "TRAIN_DIR",
    "TRANSFER_LEARNING_MODE",
    "VAL_DIR",
    "WEIGHT_DECAY",
    "SettingsError",
    "option_of",
]


class SettingsError(ValueError):
    """An environment variable has an invalid value."""


def _read(name: str, default: T, convert: Callable[[str], T], allowed: str) -> T:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    try:
        return convert(text)
    except SettingsError:
        raise
    except ValueError:
        raise SettingsError(f"{name}: found {text!r}; allowed: {allowed}") from None


def _whole(name: str, default: int, least: int) -> int:
    def convert(text: str) -> int:
        value = int(text)
        if value < least:
            raise ValueError
        return value

    return _read(name, default, convert, f"a whole number from {least}")


def _positive(name: str, default: float) -> float:
    def convert(text: str) -> float:
        value = float(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    return _read(name, default, convert, "a number above 0")


def _seconds(name: str, default: float) -> float:
    def convert(text: str) -> float:
        value = float(text)
        if not 0 <= value < float("inf"):
            raise ValueError
        return value

    return _read(name, default, convert, "a number of seconds from 0")


def _choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
    def convert(text: str) -> str:
        if text not in allowed:
            raise ValueError
        return text

    return _read(name, default, convert, ", ".join(allowed))


def _flag(name: str, default: bool) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

    def convert(text: str) -> bool:
        if text.lower() not in words:
            raise ValueError
        return words[text.lower()]

    return _read(name, default, convert, "true, false")


def _group_regex(name: str) -> str | None:
    def convert(text: str) -> str:
        try:
            groups = re.compile(text).groups
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError from error
        if groups != 1:
            raise ValueError
        return text

    return _read(name, None, convert, "a regular expression with exactly one group, such as '^(patient[0-9]+)_'")


def _external() -> Path | None:
    text = os.environ.get("DBT_EXTERNAL_BASE_BACK", "").strip()
    if text and MODEL_SIZE == "tiny":
        raise SettingsError("DBT_MODEL_SIZE: found 'tiny'; the networks of another BASE-BACK have one size: full")
    return Path(text).absolute() if text else None


def _class_count(root: Path) -> int:
    if not root.is_dir():
        return 0
    return sum(entry.is_dir() and not entry.name.startswith(".") for entry in root.iterdir())


# folders -------------------------------------------------------------------------------------------------------------
# The default is the parent folder of BASE-BACK, independent of the name of BASE-BACK.
BASE_DIR = Path(os.environ.get("DBT_BASE_DIR") or Path(__file__).resolve().parents[3]).absolute()
CKPT_DIR = BASE_DIR / "checkpoints"
TRAINED_DIR = Path(os.environ.get("DBT_TRAINED_DIR") or CKPT_DIR).absolute()  # a new network takes its sizes from here
PLOTS_DIR = BASE_DIR / "plots_metrics"
METRICS_DIR = BASE_DIR / "metrics_output"
KFOLD_DIR = BASE_DIR / "kfold_results"
DEPLOY_DIR = BASE_DIR / "deployment_models"
SMOKE_CHECK_DIR = BASE_DIR / "smoke_checks"
PRETRAINED_DIR = BASE_DIR / "pretrained_weights"
TIMM_NETWORKS = (
    CKPT_DIR / "timm_networks.json"
)  # the options of each network, for a later run that passes only its name
DEBUG_LOG_DIR = BASE_DIR / "debug_logs"
IMAGE_CACHE_DIR = Path(os.environ.get("DBT_IMAGE_CACHE_DIR") or BASE_DIR / "image_cache").absolute()
RAW_DIR = Path(os.environ.get("DBT_RAW_DIR") or BASE_DIR / "Data").absolute()
SPLIT_DIR = Path(os.environ.get("DBT_SPLIT_DIR") or BASE_DIR / "split_dataset").absolute()
TRAIN_DIR, VAL_DIR, TEST_DIR = (SPLIT_DIR / name for name in ("train", "val", "test"))

# debug ---------------------------------------------------------------------------------------------------------------
DEBUG_MODE = _flag("DBT_DEBUG_MODE", False)
DEBUG_BACKBONE = os.environ.get("DBT_DEBUG_BACKBONE") or None
DEBUG_FUNCTION = os.environ.get("DBT_DEBUG_FUNCTION") or None
DEBUG_FUNCTIONS = ["verify", "split", "kfold", "train", "test", "export"]
DEBUG_EPOCHS_HEAD = _whole("DBT_DEBUG_HEAD_EPOCHS", 15, 0)
DEBUG_EPOCHS_FINETUNE = _whole("DBT_DEBUG_FT_EPOCHS", 10, 1)
DEBUG_BATCH_SIZE = _whole("DBT_DEBUG_BATCH_SIZE", 8, 2)
DEBUG_ENABLE_EXPORT = _flag("DBT_DEBUG_EXPORT", False)

# models and data -----------------------------------------------------------------------------------------------------
ALL_BACKBONES = [
    "CustomConvNeXt",
    "CustomEfficientNetV4",
    "CustomGhostNetV2",
    "CustomResNetMish",
    "CustomCSPDarkNet",
    "CustomInceptionV4",
    "CustomViTHybrid",
    "CustomSwinTransformer",
    "CustomCoAtNet",
    "CustomRegNet",
    "CustomDenseNetHybrid",
    "CustomDeiTStyle",
    "CustomMaxViT",
    "CustomMobileOne",
    "CustomDynamicConvNet",
]


TIMM = "timm:"  # NAME=timm:ARCH or timm:ARCH names a timm network
NETWORK_NAME = re.compile(r"(?!.*_(?:final|head_best|finetune_best|fold\d+|snapshot\d+)$)[A-Za-z0-9_][\w.+-]*")


def _entries(text: str) -> list[str]:
    entries = [name.strip() for name in text.split(",") if name.strip()]
    return [name for entry in entries for name in (ALL_BACKBONES if entry == "all" else [entry])]


def _recorded_networks() -> dict[str, str]:
    """{name: architecture} of the timm networks that an earlier run trained in this workspace."""
    try:
        record = json.loads(TIMM_NETWORKS.read_text(encoding="utf-8"))
        return {name: entry["architecture"] for name, entry in record.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SettingsError(
            f"{TIMM_NETWORKS}: damaged ({error}); remove it and name networks as NAME=timm:ARCH"
        ) from error


def _timm_backbones(text: str) -> dict[str, str]:
    """{name: architecture} of the timm networks in a comma-separated list of backbones."""
    networks: dict[str, str] = {}
    recorded = _recorded_networks()
    for entry in _entries(text):
        name, _, architecture = entry.rpartition("=")
        if not architecture.startswith(TIMM):
            if entry in recorded and entry not in ALL_BACKBONES:
                networks[entry] = recorded[entry]
            continue
        architecture = architecture.removeprefix(TIMM)
        name = name or architecture
        if not NETWORK_NAME.fullmatch(name) or name in ALL_BACKBONES:
            raise SettingsError(
                f"backbones (DBT_BACKBONES, --backbones): {entry!r}: {name!r} cannot name a network; expected "
                "NAME=timm:ARCH with a NAME of letters, digits and . _ + - that no other network or stage has"
            )
        if networks.get(name, architecture) != architecture:
            raise SettingsError(
                f"backbones (DBT_BACKBONES, --backbones): two networks of the name {name!r}; write NAME=timm:ARCH with "
                "different names"
            )
        networks[name] = architecture
    return networks


def _backbones(text: str) -> list[str]:
    names = _entries(text)
    if names and EXTERNAL_BASE_BACK:
        return names  # validated later against the other pipeline's own table
    names = [name.rpartition("=")[0] or name.removeprefix(TIMM) if TIMM in name else name for name in names]
    available = [*ALL_BACKBONES, *TIMM_BACKBONES]
    unknown = [name for name in names if name not in available]
    if unknown or not names:
        near = [match for name in unknown for match in get_close_matches(name, available, n=1)]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise SettingsError(
            f"backbones (DBT_BACKBONES, --backbones): unknown {', '.join(unknown) or 'empty list'}{hint} Known: all, "
            f"{', '.join(ALL_BACKBONES)}, and timm:ARCH or NAME=timm:ARCH for a network of timm"
        )
    return list(dict.fromkeys(names))


def _per_network(variable: str, separator: str = ",", allowed: tuple[str, ...] = ()) -> dict[str, str]:
    """{name of a timm network, or "" for all: value} of a list of `VALUE` and `NAME=VALUE`."""
    values: dict[str, str] = {}
    for entry in os.environ.get(variable, "").split(separator):
        name, _, value = entry.strip().partition("=")
        if name not in TIMM_BACKBONES:
            if value and not allowed and TIMM_BACKBONES and not Path(entry.strip()).expanduser().exists():
                near = get_close_matches(name, TIMM_BACKBONES, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise SettingsError(
                    f"{variable}: {entry.strip()!r}: no network is called {name!r} and no such file exists{hint} "
                    f"Networks: {', '.join(TIMM_BACKBONES)}"
                )
            name, value = "", entry.strip()
        if not value:
            continue
        if allowed and value not in allowed:
            raise SettingsError(
                f"{variable}: found {value!r}; allowed: {', '.join(allowed)}, or NAME=VALUE with one of the networks "
                f"{', '.join(TIMM_BACKBONES) or '(no network of timm is named)'}"
            )
        values[name] = value
    return values


def option_of(values: dict[str, str], name: str) -> str | None:
    """The value for one network: the one given for its name, else the one given for all."""
    return values.get(name) or values.get("")


MODEL_SIZE = _choice("DBT_MODEL_SIZE", "full", ("full", "tiny"))
EXTERNAL_BASE_BACK = _external()  # folder of another BASE-BACK whose networks K-fold trains; main.py --base-back
TIMM_BACKBONES = {} if EXTERNAL_BASE_BACK else _timm_backbones(os.environ.get("DBT_BACKBONES", ""))
BACKBONES = _read("DBT_BACKBONES", ALL_BACKBONES, _backbones, "a comma list of backbones")
IMG_SIZE = _whole("DBT_IMG_SIZE", 224 if MODEL_SIZE == "full" else 32, 8)
BATCH_SIZE = _whole("DBT_BATCH_SIZE", 32, 2)
K_FOLDS = _whole("DBT_K_FOLDS", 5, 2)
SEED = _whole("DBT_SEED", 42, 0)
NUM_WORKERS = _whole("DBT_NUM_WORKERS", -1, 0)  # -1: set by `utils.get_optimal_workers`
AUGMENT = _choice("DBT_AUGMENT", "full", ("full", "no_flip", "none"))
GROUP_REGEX = _group_regex("DBT_GROUP_REGEX")
# EXIF orientation of photographs; None: ignored, except that timm networks follow the record of their weights.
EXIF = _choice("DBT_EXIF", "", ("ignore", "apply")) or None
NUM_CLASSES = _whole(
    "DBT_NUM_CLASSES", _class_count(TRAIN_DIR) or _class_count(RAW_DIR / "train") or _class_count(RAW_DIR) or 13, 2
)

# training ------------------------------------------------------------------------------------------------------------
# There is no early stopping. Epochs, rates and smoothing of tiny networks were selected by benchmarks/recipe.py.
EPOCHS_HEAD = _whole("DBT_EPOCHS_HEAD", {"full": 40, "tiny": 1}[MODEL_SIZE], 0)
EPOCHS_FINETUNE = _whole("DBT_EPOCHS_FINETUNE", {"full": 25, "tiny": 35}[MODEL_SIZE], 1)
WEIGHT_DECAY = 1e-4
# Networks start from random weights, which need a higher rate than fine-tuning; small networks tolerate a higher one.
BACKBONE_LRS = {size: _positive("DBT_BACKBONE_LR", rate) for size, rate in (("full", 1e-3), ("tiny", 2e-3))}
BACKBONE_LR = BACKBONE_LRS[MODEL_SIZE]
HEAD_LR = _positive("DBT_HEAD_LR", 1e-3)
CLASS_WEIGHTS = _choice("DBT_CLASS_WEIGHTS", "none", ("none", "balanced"))  # of the samples in the loss
SAMPLING = _choice("DBT_SAMPLING", "natural", ("natural", "balanced"))  # of the samples of an epoch
if CLASS_WEIGHTS == SAMPLING == "balanced":
    raise SettingsError(
        "DBT_SAMPLING (--sampling): found 'balanced' beside DBT_CLASS_WEIGHTS (--class-weights) 'balanced'; allowed: "
        "one of them, since both together count rare classes twice"
    )
ENABLE_KFOLD_CV = _flag("DBT_ENABLE_KFOLD_CV", True)
ENABLE_EXPORT = _flag("DBT_ENABLE_EXPORT", True)
SNAPSHOTS = _whole("DBT_SNAPSHOTS", 3, 0)  # number of last epochs of fine-tuning whose weights are kept
CYCLES = _whole("DBT_CYCLES", 5, 1)  # of the stage snapshots; each cycle yields one network
EPOCHS_PER_CYCLE = _whole("DBT_EPOCHS_PER_CYCLE", 10, 1)
PROGRESS_SECONDS = _seconds("DBT_PROGRESS_SECONDS", 5.0)  # minimum time between two saves of a training; 0: every epoch
PARENT = _whole("DBT_PARENT", 0, 0)  # id of the parent process; this process exits with it; 0: none

# timm networks -------------------------------------------------------------------------------------------------------
ENABLE_TRANSFER_LEARNING = _flag("DBT_ENABLE_TRANSFER_LEARNING", True)  # False: start from random weights
MODES = {"frozen": "frozen", "finetune": "finetune", "feature_extraction": "frozen", "fine_tuning": "finetune"}
NETWORK_MODES = _per_network("DBT_TRANSFER_LEARNING_MODE", allowed=tuple(MODES))
TRANSFER_LEARNING_MODE = NETWORK_MODES.get("", "fine_tuning")
NETWORK_WEIGHTS = _per_network("DBT_WEIGHTS", "\n")  # `hub`, a file or a folder
NETWORK_TRAINED_ON = _per_network("DBT_TRAINED_ON", allowed=("none", "train", "train+val", "all", "unknown"))
NETWORK_VIEWS = _per_network("DBT_VIEWS", allowed=("1", "2"))
TIMM_IMG_SIZE = _whole("DBT_IMG_SIZE", 0, 8)  # 0: see `training.pretrained.default_size`
PRETRAINED_PATHS: dict[str, str] = {}  # architecture -> file or folder of its weights; searched first
PRETRAINED_DOWNLOAD_MAP: dict[str, str] = {}
# Pretrained layers need few epochs at a low rate; the head is trained first, so that its gradients do not disturb them.
PRETRAINED_EPOCHS_HEAD = _whole("DBT_EPOCHS_HEAD", 5, 0) or 1
PRETRAINED_EPOCHS_FINETUNE = _whole("DBT_EPOCHS_FINETUNE", 15, 1)
PRETRAINED_LR = _positive("DBT_BACKBONE_LR", 2e-3)  # of the last layer
LAYER_DECAY = 0.85  # ratio of a layer's learning rate to that of the next layer (Clark et al. 2020, ELECTRA)

# export --------------------------------------------------------------------------------------------------------------
EXPORT_TYPES = ["state_dict", "checkpoint", "torchscript", "onnx", "torchserve", "tensorrt", "tflite", "custom"]
EXPORT_FORMATS = EXPORT_TYPES if ENABLE_EXPORT else []
EXPORT_CONFIG: dict[str, dict[str, Any]] = {name: {} for name in EXPORT_TYPES} | {
    "onnx": {
        "exporter": "tracing",  # or "dynamo", which is much slower and writes opset 18 or newer
        "opset_version": 13,
        "input_names": ["input"],
        "output_names": ["output"],
        "dynamic_axes": {"input": {0: "batch_size"}, "output": {0: "batch_size"}},
    }
}
