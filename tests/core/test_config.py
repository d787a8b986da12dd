"""The schema: the specification's values, the bounds of every key, digests, and sections that are off."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from utils.core.config import SPECIFIED, Config, require_enabled, validate
from utils.core.config_sections import Section
from utils.core.errors import UserError

PROJECT = Path(__file__).resolve().parents[2]
# The values that the specification prints under "Configuration File", typed from there.
PRINTED = {
    "project": {"name": "disease_classification_ensemble", "version": "1.0"},
    "device": "cuda",
    "seed": 42,
    "dataset": {"img_size": 224, "batch_size": 32, "num_workers": 16},
    "backbones": {
        "include": [
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
        ],
        "exclude": [],
    },
    "exports": {"enable": True, "formats": ["state_dict", "checkpoint", "torchscript", "onnx", "tflite"]},
    "runs": {
        "score_ensemble": {
            "enable": True,
            "methods": ["soft_voting", "hard_voting", "logit_averaging", "weighted"],
            "optimize_weights": True,
            "optimization_metric": "f1_macro",
        },
        "model_soup": {"enable": True, "methods": ["uniform", "greedy"], "recompute_bn": True},
        "snapshot_ensemble": {"enable": False, "n_snapshots": 5, "epochs_per_cycle": 10},
        "stacking": {
            "enable": True,
            "meta_learners": ["lr", "xgb", "mlp"],
            "mlp_config": {"hidden_dims": [256, 128], "epochs": 50, "lr": 0.001, "dropout": 0.3},
            "xgb_config": {"n_estimators": 100, "max_depth": 6, "learning_rate": 0.1},
        },
        "fusion": {
            "enable": True,
            "extract_embeddings": True,
            "fusion_methods": ["concat_mlp", "attention", "bilinear", "cca_aligned"],
            "fusion_config": {"hidden_dims": [512, 256], "epochs": 40, "lr": 0.001, "dropout": 0.3},
            "end_to_end": False,
        },
        "moe": {"enable": False, "num_experts": 5, "top_k": 2, "gating_hidden_dim": 128, "epochs": 30},
        "meta_fuser": {
            "enable": True,
            "input_ensembles": ["soft_voting", "logit_averaging", "stacking_xgb", "fusion_concat_mlp"],
            "fuser_type": "xgb",
            "mlp_config": {"hidden_dims": [128, 64], "epochs": 30, "lr": 0.001},
        },
    },
    "pruning": {
        "enable": True,
        "methods": ["greedy_forward", "greedy_backward", "diversity_max", "clustering"],
        "target_size": 7,
        "cost_budget": {"max_latency_ms": 100, "max_size_mb": 500},
    },
    "distillation": {
        "enable": True,
        "teacher": "meta_fuser",
        "student": "CustomMobileOne",
        "temperature": 4.0,
        "alpha": 0.5,
        "epochs": 50,
        "lr": 0.001,
        "batch_size": 32,
    },
}


def _places(values: dict, above: str = "") -> dict[str, object]:
    """Dotted place -> value of every leaf."""
    found = {}
    for key, value in values.items():
        found |= _places(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return found


LEAVES = _places(PRINTED)


def _at(place: str, value: object) -> dict:
    """{a: {b: value}} of `a.b`."""
    for name in reversed(place.split(".")):
        value = {name: value}
    return value


def test_shipped_file_holds_the_printed_values():
    assert yaml.safe_load((PROJECT / "configs/ensemble_config.yaml").read_text(encoding="utf-8")) == PRINTED


def test_defaults_are_the_printed_values_and_the_keys_of_ours():
    assert _places(Config().as_dict()) == LEAVES | {
        "dataset.group_regex": None,
        "dataset.num_threads": None,
        "cache.quota_gb": 20.0,
        "runs.score_ensemble.pool": "auto",
        "runs.score_ensemble.fit_rows": "honest",
        "runs.score_ensemble.temperature": "auto",
        "runs.score_ensemble.calibration": "temperature",
        "runs.stacking.fit_rows": "honest",
        "runs.stacking.fallback": True,
        "runs.stacking.inference_members": "auto",
        "runs.fusion.train_embeddings": "auto",
        "runs.fusion.end_to_end_epochs": 4,
        "runs.fusion.seeds": 1,
        "runs.fusion.label_smoothing": 0.0,
        "runs.cascade.enable": False,
        "runs.cascade.max_members": 5,
        "runs.cascade.max_accuracy_loss": 0.005,
        "pruning.pick": "best",
        "tta.enable": False,
        "tta.views": ["flip", "five_crop", "rotations", "multi_scale"],
        "tta.scope": "member",
        "exports.precision": ["fp32"],
        "exports.input": "float-nchw",
        "exports.onnx_exporter": "tracing",
        "exports.max_members": None,
        "distillation.targets": "auto",
        "distillation.views": 4,
        "distillation.mix": "auto",
        "distillation.initial_weights": "auto",
        "distillation.feature_weight": 0.0,
        "distillation.seeds": 1,
        "distillation.unlabeled_dir": None,
        "distillation.assistant": None,
    }


def test_specified_names_contain_every_printed_default():
    for place, names in SPECIFIED.items():
        printed = LEAVES[place]
        assert set(printed if isinstance(printed, list) else [printed]) <= set(names)
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("place", sorted(LEAVES))
def test_every_key_refuses_what_is_of_another_kind(place):
    wrong = {bool: 1, int: True, float: True, str: 5, list: "text"}[type(LEAVES[place])]
    for value in (wrong, None, {"a": 1}):
        if value is None and place.startswith("pruning.cost_budget."):
            continue
        with pytest.raises(ValidationError):
            Config.model_validate(_at(place, value))


@pytest.mark.parametrize(
    ("place", "good", "bad"),
    [
        ("seed", [0, 2**32 - 1], [-1, 2**32, 1.5]),
        ("dataset.batch_size", [1, "64", 8.0, "1e2"], [0, -3, 0.5, "many", float("inf")]),
        ("dataset.num_workers", [0, 4], [-1]),
        ("dataset.num_threads", [None, 1, 64, "2"], [0, -1, 1.5, True]),
        ("runs.stacking.mlp_config.lr", ["1e-3", 1, 5e-4], [0, -0.1, "0", float("inf"), float("nan"), "nan", 10**400]),
        ("runs.stacking.mlp_config.dropout", [0, 0.999], [1, -0.1]),
        ("runs.stacking.mlp_config.hidden_dims", [[], [1], ["64", 32]], [[0], [1.5], [True], 5]),
        ("runs.stacking.xgb_config.learning_rate", [1, 0.01], [0, 1.01]),
        ("runs.moe.top_k", [1, 5], [0, 6]),
        ("runs.moe.num_experts", [2], [0, 1]),
        ("distillation.alpha", [0, 1, 0.5], [-0.01, 1.01]),
        ("distillation.temperature", [0.1, 20], [0, -4]),
        ("pruning.cost_budget.max_latency_ms", [None, 0.5], [0, -1]),
        ("device", ["cpu", "auto", "cuda", "cuda:12"], ["gpu", "cuda:", "cuda:a", "CPU", "cpu ", "cuda:0\n", 0]),
        ("dataset.group_regex", [None, "^([a-z]+)_", "(?:a)(b)"], ["abc", "(a)(b)", "(", "", 5]),
        ("runs.score_ensemble.optimization_metric", ["accuracy", "log_loss", "brier"], ["auc", "F1_macro"]),
        ("project.version", ["2"], [1.0, "", "  "]),
        ("backbones.include", [[], ["vit_tiny.augreg_in1k", "a b"]], [["a/b"], ["..\\x"], [".x"], ["a", "a"], ["x "]]),
        ("backbones.include", ["all"], ["every", "all "]),
        ("runs.meta_fuser.input_ensembles", [["moe"], "all"], [["meta_fuser"], [], ["moe", "moe"], [None], "every"]),
        ("distillation.student", ["resnet18"], ["../x", "", "a\tb"]),
        ("distillation.batch_size", [2, 64], [1, 0, 2.5]),
        ("distillation.feature_weight", ["auto", 0, 1.5], [-0.1, "some", True]),
        ("distillation.targets", ["auto", "oof", "consistent", "views"], ["val", None]),
        ("distillation.mix", ["auto", "none", "mixup", "cutmix", "both"], ["blend", True]),
        ("distillation.unlabeled_dir", [None, "~/more images"], ["", 5]),
        ("distillation.assistant", [None, "CustomConvNeXt"], ["../x", "", 5, "CustomMobileOne"]),
    ],
)  # fmt: skip
def test_bounds(place, good, bad):
    for value in good:
        Config.model_validate(_at(place, value))
    for value in bad:
        with pytest.raises(ValidationError):
            Config.model_validate(_at(place, value))


def test_numbers_written_as_text_become_numbers():
    config = Config.model_validate({"distillation": {"lr": "1e-3"}, "dataset": {"batch_size": "1e2"}})
    assert (config.distillation.lr, config.dataset.batch_size) == (0.001, 100)
    assert type(config.dataset.batch_size) is int


def test_an_empty_list_is_a_mistake_only_in_a_section_that_is_on():
    Config.model_validate({"runs": {"score_ensemble": {"enable": False, "methods": []}}})
    with pytest.raises(ValidationError, match="at least one name, or enable: false"):
        Config.model_validate({"runs": {"score_ensemble": {"methods": []}}})


def test_exclude_takes_away_from_include_as_the_troubleshooting_says():
    config = Config.model_validate({"backbones": {"include": ["c", "a", "b"], "exclude": ["a", "elsewhere"]}})
    assert config.backbones.selected == ("c", "b")
    with pytest.raises(ValidationError, match="at least one of the 2 names of include left"):
        Config.model_validate({"backbones": {"include": ["a", "b"], "exclude": ["b", "a"]}})


def test_values_cannot_be_changed():
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.runs.moe.top_k = 3
    assert hash(config) == hash(Config())


def test_at_gives_sections_and_values():
    config = Config()
    assert config.at("runs.moe") is config.runs.moe
    assert config.at("runs.moe.top_k") == 2
    for place in ("runs.mo", "seed.x", "", "runs.moe.top_k.x", "model_fields"):
        with pytest.raises(KeyError, match="the configuration has no"):
            config.at(place)


def test_digest_names_the_values_and_nothing_else():
    config = validate({}, source=Path("a.yaml"))
    moved = validate({"distillation": {"temperature": "4"}}, source=Path("b.yaml"))
    assert config.digest() == moved.digest()
    assert config.digest("runs.moe", "seed") == config.digest("seed", "runs.moe") != config.digest("seed")
    # Stored records compare with it: another way of writing the values would make every result on disk stale.
    assert config.digest("seed") == hashlib.sha256(b'{"seed": 42}').hexdigest()


@pytest.mark.parametrize("place", sorted(set(LEAVES) - {"backbones.exclude", "runs.moe.top_k"}))
def test_digest_changes_with_every_value(place):
    value = LEAVES[place]
    other = {
        bool: lambda: not value,
        int: lambda: value + 1,
        float: lambda: value / 2,
        str: lambda: "cpu" if place == "device" else "accuracy" if place.endswith("metric") else "other",
        list: lambda: value[::-1],
    }[type(value)]()
    changed = Config.model_validate(_at(place, other))
    section = place.rpartition(".")[0]
    assert changed.digest() != Config().digest()
    assert changed.digest(place) != Config().digest(place)
    if section:
        assert changed.digest(section) != Config().digest(section)
    elsewhere = "project" if section != "project" else "dataset"
    assert changed.digest(elsewhere) == Config().digest(elsewhere)


def test_plain_values_make_the_same_configuration_again():
    config = validate({"seed": 7, "runs": {"moe": {"enable": True}}}, source=Path("configs/x.yaml"))
    again = validate(json.loads(json.dumps(config.as_dict())), source=config.source)
    assert again == config
    assert again.source == Path("configs/x.yaml")


def test_a_section_that_is_off_is_answered_with_the_line_to_add():
    config = validate({}, source=Path("configs/x.yaml"))
    require_enabled(config, "runs.fusion")
    with pytest.raises(UserError) as error:
        require_enabled(config, "runs.moe")
    assert str(error.value) == (
        "configs/x.yaml: runs.moe is disabled; run again with --set runs.moe.enable=true, "
        "or write `enable: true` under runs.moe in the file"
    )


def test_a_place_without_a_switch_is_a_bug_not_a_users_mistake():
    with pytest.raises(KeyError, match="no dataset"):
        require_enabled(Config(), "dataset")


def test_every_section_is_closed_and_frozen():
    def sections(model: type[Section]):
        yield model
        for field in model.model_fields.values():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                yield from sections(field.annotation)

    found = list(sections(Config))
    assert len(found) == 23
    for section in found:
        assert section.model_config["frozen"]
        with pytest.raises(ValidationError, match="extra"):
            section.model_validate({"unknown": 1})


def test_reading_a_configuration_needs_no_torch():
    code = "import sys, utils.core.config_file; print(sorted({'torch', 'numpy', 'sklearn'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
