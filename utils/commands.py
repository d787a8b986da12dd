"""The table of commands: what each runs, takes and changes; the stages of `pipeline`, and what every command takes."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple


class Command(NamedTuple):
    """One line of the table."""

    target: str
    """`module:function`, imported only when the command is typed; called with (config, workspace, options)."""
    help: str
    example: str
    arguments: dict[str, dict[str, Any]]
    """What this command alone takes; the common options are added to all."""
    writes: bool | tuple[str, ...]
    """Whether it changes the workspace, of which it is then the one writer; or the options that make it do so."""
    decodes: bool = False
    """Whether images may have to be decoded, for which the quota makes room first."""
    sandboxed: bool = False
    """Whether it leaves the workspace alone, log file included, but for a folder of its own."""
    pass_through: tuple[str, ...] = ()
    """Common options that the function receives in addition to --force."""
    one_of: tuple[str, ...] = ()
    """Options of which exactly one is typed."""
    standalone: tuple[tuple[str, str], ...] = ()
    """(option, function called instead of the target); needs no configuration, workspace or BASE-BACK."""


DEBUG_SECTIONS = (
    "discover",
    "smoke",
    "kfold",
    "extract_embeddings",
    "build_ensemble",
    "stack",
    "fusion_train",
    "moe",
    "meta_fuse",
    "recompute_bn",
    "evaluate",
    "distill",
    "export",
)
COMMANDS: dict[str, Command] = {
    "discover": Command(
        "utils.discovery.discover:discover",
        "find trained models, check them, write the catalog",
        "discover --verify",
        {
            "--verify": {"action": "store_true", "help": "also run every member and measure what is recorded of it"},
            "--add": {
                "metavar": "NAME=timm:MODEL@FILE",
                "action": "append",
                "default": [],
                "help": "declare a network of timm and its weights as a member; kept by later discoveries; repeatable",
            },
            "--remove": {
                "metavar": "NAME",
                "action": "append",
                "default": [],
                "help": "forget a network that was declared with --add; its file stays; repeatable",
            },
            "--rename": {
                "metavar": "OLD=NEW",
                "action": "append",
                "default": [],
                "help": "give an imported or declared member another name, with all that is stored of it; repeatable",
            },
        },
        writes=True,
    ),
    "import-predictions": Command(
        "utils.discovery.import_predictions:import_predictions",
        "take in members that are known by their predictions alone, made by any tool",
        "import-predictions --from ~/predictions",
        {
            "--from": {
                "metavar": "DIR",
                "required": True,
                "dest": "folder",
                "help": "holds <member>/{oof,val,test}.npz; the form is described in README",
            },
        },
        writes=True,
    ),
    "build-ensemble": Command(
        "utils.building.build_commands:build_ensemble",
        "build the score-level ensembles that the configuration lists",
        "build-ensemble --config configs/quick_ensemble.yaml",
        {
            "--pick": {
                "choices": ("best", "knee", "fastest"),
                "help": "which of the pruned subsets to keep (default: the configuration's pruning.pick)",
            }
        },
        writes=True,
        decodes=True,
    ),
    "stack": Command(
        "utils.building.stacking_builder:stack",
        "fit meta-learners on the members' out-of-fold predictions",
        "stack --set runs.stacking.meta_learners=[lr,mlp]",
        {
            "--strict": {
                "action": "store_true",
                "help": "end with 1 where a member has no out-of-fold predictions, instead of leaving it out",
            },
        },
        writes=True,
        decodes=True,
    ),
    "fusion-train": Command(
        "utils.building.build_commands:fusion_train",
        "train heads on the members' embeddings, and what runs only the members that an image needs",
        "fusion-train --set runs.fusion.fusion_methods=[concat_mlp,attention]",
        {},
        writes=True,
        decodes=True,
    ),
    "meta-fuse": Command(
        "utils.building.meta_builder:meta_fuse",
        "fit an ensemble of ensembles on their cross-fitted predictions",
        "meta-fuse --set runs.meta_fuser.fuser_type=attention",
        {},
        writes=True,
        decodes=True,
    ),
    "evaluate": Command(
        "utils.evaluation.evaluate:evaluate",
        "score members and ensembles, rank them, name the recommended one, write the report",
        "evaluate --model-name soft_voting_ensemble",
        {
            "--split": {"choices": ("test", "val"), "default": "test", "help": "rows to score on (default: test)"},
            "--model-name": {"metavar": "NAME", "help": "score this member or ensemble alone"},
            "--allow-contaminated": {
                "action": "store_true",
                "help": "with --model-name: score it even on rows it was fitted on, marked",
            },
            "--alpha": {
                "metavar": "SHARE",
                "type": float,
                "default": 0.1,
                "help": "share of images whose conformal set may miss the true class (default: %(default)s)",
            },
            "--target-risk": {
                "metavar": "SHARE",
                "type": float,
                "default": 0.05,
                "help": "target selective risk: error rate among the images that are answered (default: %(default)s)",
            },
            "--wanted-error": {"metavar": "SHARE", "type": float, "help": "deprecated; use --target-risk"},
            "--class-conditional": {
                "action": "store_true",
                "help": "conformal sets with a threshold for each class as well",
            },
        },
        writes=True,
        decodes=True,
    ),
    "distill": Command(
        "utils.distillation.student_builder:distill",
        "distil an ensemble into a student and compare it with the same network trained without a teacher",
        "distill --set distillation.teacher=best",
        {},
        writes=True,
        decodes=True,
    ),
    "export": Command(
        "utils.exporting.export:export",
        "write an ensemble or a member in deployment formats and check the parity of each file",
        "export --model-name soft_voting_ensemble --formats onnx tflite",
        {
            "--model-name": {"metavar": "NAME", "help": "ensemble or member (default: the recommended one)"},
            "--formats": {
                "metavar": "FORMAT",
                "nargs": "+",
                "help": "state_dict, checkpoint, torchscript, onnx, tflite or tensorrt (default: exports.formats)",
            },
            "--precision": {
                "choices": ("fp32", "fp16", "int8"),
                "nargs": "+",
                "help": "precisions of ONNX files; fp32 is always written (default: exports.precision)",
            },
            "--input": {
                "choices": ("float-nchw", "uint8-nhwc"),
                "help": "cropped float32 images in [0, 1], or decoded uint8 images (default: exports.input)",
            },
            "--max-members": {
                "metavar": "N",
                "type": int,
                "help": "refuse ensembles with more members (default: exports.max_members)",
            },
            "--member-probabilities": {"action": "store_true", "help": "also return each member's probabilities"},
            "--check-tools": {"action": "store_true", "help": "only list what each format needs and what is installed"},
            "--verify": {
                "metavar": "DIR",
                "help": "only check the checksums and the parity of an export; DIR may be relative to the workspace",
            },
            "--trust": {
                "action": "store_true",
                "help": "with --verify: run programs (TorchScript, TFLite) that another workspace wrote",
            },
            "--compare": {
                "action": "store_true",
                "help": "only compare exported files: accuracy, latency, size",
            },
        },
        writes=True,
        decodes=True,
    ),
    "predict": Command(
        "utils.inference.predict:predict",
        "classify image files with an ensemble or a member: class, probability, set, abstention, disagreement",
        "predict --model-name soft_voting_ensemble photos/ --to answers.csv",
        {
            "paths": {
                "metavar": "PATH",
                "nargs": "+",
                "help": "image files, folders, quoted patterns, or - for a list on standard input (lines or NUL)",
            },
            "--model-name": {"metavar": "NAME", "help": "ensemble or member that predicts"},
            "--from-export": {
                "metavar": "FILE",
                "help": "exported .onnx file that predicts, without workspace, BASE-BACK and torch",
            },
            "--to": {
                "metavar": "FILE",
                "help": "file for the predictions, written block by block (default: the screen, up to 10,000 images)",
            },
            "--format": {
                "choices": ("csv", "jsonl"),
                "dest": "form",
                "help": "format of the predictions (default: by the suffix of --to, else csv)",
            },
            "--probabilities": {"action": "store_true", "help": "also write the probabilities of all classes"},
            "--sets": {
                "choices": ("lac", "aps"),
                "default": "lac",
                "help": "lac: smallest sets on average; aps: larger sets for hard images (default: %(default)s)",
            },
            "--append": {
                "action": "store_true",
                "help": "continue the file: skip images with a prediction and try images with an error again",
            },
        },
        writes=False,
        one_of=("--model-name", "--from-export"),
        standalone=(("--from-export", "utils.inference.predict:predict_from_export"),),
    ),
    "pipeline": Command(
        "ensemble_orchestrator:run_pipeline",
        "all stages in order: discover --verify, build-ensemble, stack, fusion-train, meta-fuse, evaluate, distill, "
        "evaluate again, export, clean --temporary",
        "pipeline --config configs/digits_demo.yaml",
        {},
        writes=True,
        decodes=True,
    ),
    "status": Command(
        "utils.operations.upkeep:status",
        "what is built, what is stale and why, what takes room, what to type next",
        "status --json",
        {},
        writes=False,
    ),
    "clean": Command(
        "utils.operations.upkeep:clean",
        "list what may be removed; --confirm removes it",
        "clean --stale --confirm",
        {
            "--confirm": {"action": "store_true", "help": "remove what is listed"},
            "--temporary": {
                "action": "store_true",
                "help": "remove files under temporary names at once, and nothing else",
            },
            "--cache": {"action": "store_true", "help": "the decoded images as well"},
            "--stale": {"action": "store_true", "help": "stale ensembles as well"},
        },
        writes=("confirm", "temporary"),
    ),
    "debug": Command(
        "ensemble_orchestrator:run_debug",
        "run each section on synthetic data or with your members; writes to debug_tmp/ only",
        "debug --section all --fast",
        {
            "--section": {
                "metavar": "NAME",
                "choices": (*DEBUG_SECTIONS, "all", "reset"),
                "default": "all",
                "help": f"{', '.join(DEBUG_SECTIONS)}; all (default); or reset, which removes debug_tmp/",
            },
            "--arch": {"metavar": "NAME", "help": "restrict sections that test single members to this backbone"},
            "--fast": {
                "action": "store_true",
                "help": "use 16 synthetic images, 2 folds and 1 epoch",
            },
            "--dry-run": {
                "action": "store_true",
                "help": "list reads, writes and costs; change nothing",
            },
            "--confirm": {"action": "store_true", "help": "with --section reset: remove debug_tmp/"},
            "--inside": {"action": "store_true", "help": argparse.SUPPRESS},
        },
        writes=False,
        sandboxed=True,
        pass_through=("--verbose",),
    ),
}
PIPELINE_STAGES: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("discover", {"verify": True}, ()),
    ("build-ensemble", {}, ("runs.score_ensemble", "runs.model_soup", "runs.snapshot_ensemble", "pruning")),
    ("stack", {}, ("runs.stacking",)),
    ("fusion-train", {}, ("runs.fusion", "runs.moe", "runs.cascade")),
    ("meta-fuse", {}, ("runs.meta_fuser",)),
    ("evaluate", {}, ()),
    ("distill", {}, ("distillation",)),
    ("evaluate", {}, ("distillation",)),
    ("export", {}, ("exports",)),
    ("clean", {"temporary": True}, ()),
)
"""Command, its options, and the sections of the configuration of which one must be on.

What a command leaves stands under its name; the second time under `<name>-2`.
"""
COMMON_OPTIONS: dict[str, dict[str, Any]] = {
    "--config": {
        "metavar": "FILE",
        "default": "configs/ensemble_config.yaml",
        "help": "relative to the working directory, then to the project (default: %(default)s)",
    },
    "--set": {
        "metavar": "KEY=VALUE",
        "action": "append",
        "default": [],
        "help": "change one value of the configuration, such as runs.moe.enable=true; repeatable",
    },
    "--workspace": {
        "metavar": "DIR",
        "help": "the base pipeline's folder (default: DBT_BASE_DIR, else beside BASE-BACK)",
    },
    "--output": {
        "metavar": "DIR",
        "help": "where everything of ours goes, such as ensembles/, when the workspace is read-only or somebody "
        "else's (default: DBT_ENSEMBLE_DIR, else the workspace)",
    },
    "--base-back": {
        "metavar": "DIR",
        "help": "the base pipeline (default: BASE_BACK_DIR, ../BASE-BACK, the bundled one)",
    },
    "--device": {"metavar": "DEVICE", "help": "cuda, cuda:N, cpu or auto (default: the configuration's)"},
    "--engine": {
        "choices": ("local", "ray"),
        "default": "local",
        "help": "where independent jobs run: in this process, or on the workers of a Ray cluster (default: local)",
    },
    "--address": {
        "metavar": "ADDRESS",
        "help": "with --engine ray: the cluster to join, such as auto; without it one is started here for the command",
    },
    "--force": {"action": "store_true", "help": "do again what is there already"},
    "--json": {"action": "store_true", "help": "one JSON document on stdout"},
    "--verbose": {"action": "store_true", "help": "more messages"},
    "--quiet": {"action": "store_true", "help": "warnings and errors only"},
}
REPEATED_OPTIONS = ("--config", "--set", "--workspace", "--output", "--base-back", "--device", "--engine", "--address")
"""Common options that belong to the next command as well."""
