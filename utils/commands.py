"""The table of commands: the function, options and effects of each; the stages of `pipeline`; the common options."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple


class Command(NamedTuple):
    """One command of the command line."""

    target: str
    """`module:function`, imported when the command runs; called with (config, workspace, **options)."""
    help: str
    example: str
    arguments: dict[str, dict[str, Any]]
    """Options of this command, as arguments of `add_argument`; every command also has the common options."""
    writes: bool | tuple[str, ...]
    """Whether it changes the workspace and therefore holds its lock; or the options that make it do so."""
    builds: bool = False
    """Whether the workspace remembers the configuration that it runs with."""
    makes_workspace: bool = False
    """Whether it may write into a folder in which there is nothing of a workspace yet."""
    decodes: bool = False
    """Whether it may decode images; the cache quota is enforced before."""
    sandboxed: bool = False
    """Whether it writes to a folder of its own only, and no log file into the workspace."""
    pass_through: tuple[str, ...] = ()
    """Common options that the function receives in addition to --force."""
    one_of: tuple[str, ...] = ()
    """Options of which exactly one is required."""
    standalone: tuple[tuple[str, str], ...] = ()
    """(option, function called instead of the target); needs no configuration, workspace or BASE-BACK."""
    is_standalone: bool = False
    """Whether the target itself needs none of these; it is called with its options alone."""


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
        "find and check trained models, and write the catalog",
        "discover --verify",
        {
            "--verify": {"action": "store_true", "help": "also run every member and check its recorded figures"},
            "--add": {
                "metavar": "NAME=SOURCE",
                "nargs": "+",
                "action": "extend",
                "default": [],
                "help": "declare timm networks as members, which later discoveries keep; SOURCE is timm:ARCH@FILE, "
                "local-dir:FOLDER, hf-hub:ORG/NAME or timm:ARCH (pretrained, from the hub)",
            },
            "--add-from": {
                "metavar": "DIR",
                "action": "append",
                "default": [],
                "help": "declare every folder of a network (config.json and weights) below DIR by its name; repeatable",
            },
            "--preprocess": {
                "metavar": "KEY=VALUE",
                "nargs": "+",
                "action": "extend",
                "default": [],
                "help": "how images are prepared for the networks of --add and --add-from, or with NAME:KEY=VALUE for "
                "one that is declared; keys: input_size, resize, crop, resized, interpolation, crop_offset, mean, "
                "std, channels, range, exif",
            },
            "--trained-on": {
                "metavar": "STATEMENT",
                "nargs": "+",
                "action": "extend",
                "default": [],
                "help": "images that the networks of --add and --add-from were trained on: none, train, train+val, "
                "all, unknown, or a file that lists them; with NAME=STATEMENT those of one that is declared",
            },
            "--remove": {
                "metavar": "NAME",
                "action": "append",
                "default": [],
                "help": "remove a network that --add declared from the catalog; its file stays; repeatable",
            },
            "--rename": {
                "metavar": "OLD=NEW",
                "action": "append",
                "default": [],
                "help": "rename an imported or declared member and everything stored for it; repeatable",
            },
        },
        writes=True,
        pass_through=("--verbose",),
    ),
    "import-predictions": Command(
        "utils.discovery.import_predictions:import_predictions",
        "add members for which only predictions exist, made by any tool",
        "import-predictions --from ~/predictions",
        {
            "--from": {
                "metavar": "DIR",
                "required": True,
                "dest": "folder",
                "help": "folder with <member>/{oof,val,test}.npz; README describes the format",
            },
        },
        writes=True,
        makes_workspace=True,
    ),
    "build-ensemble": Command(
        "utils.building.build_commands:build_ensemble",
        "build the score-level ensembles that the configuration lists",
        "build-ensemble --config configs/quick_ensemble.yaml",
        {
            "--pick": {
                "choices": ("best", "knee", "fastest"),
                "help": "which of the pruned subsets to keep (default: pruning.pick of the configuration)",
            }
        },
        writes=True,
        builds=True,
        decodes=True,
    ),
    "stack": Command(
        "utils.building.stacking_builder:stack",
        "fit meta-learners on the members' out-of-fold predictions",
        "stack --set runs.stacking.meta_learners=[lr,mlp]",
        {
            "--strict": {
                "action": "store_true",
                "help": "fail if a member has no out-of-fold predictions, instead of leaving it out",
            },
        },
        writes=True,
        builds=True,
        decodes=True,
    ),
    "fusion-train": Command(
        "utils.building.build_commands:fusion_train",
        "train fusion heads on the members' embeddings, mixtures of experts and cascades",
        "fusion-train --set runs.fusion.fusion_methods=[concat_mlp,attention]",
        {},
        writes=True,
        builds=True,
        decodes=True,
    ),
    "meta-fuse": Command(
        "utils.building.meta_builder:meta_fuse",
        "fit an ensemble of ensembles on their cross-fitted predictions",
        "meta-fuse --set runs.meta_fuser.fuser_type=attention",
        {},
        writes=True,
        builds=True,
        decodes=True,
    ),
    "evaluate": Command(
        "utils.external_sets.command:evaluate",
        "score and rank members and ensembles, recommend one, and write the report",
        "evaluate --model-name soft_voting_ensemble",
        {
            "--split": {"choices": ("test", "val"), "default": "test", "help": "rows to score on (default: test)"},
            "--model-name": {"metavar": "NAME", "help": "score only this member or ensemble, or recommended"},
            "--data": {
                "metavar": "DIR|CSV",
                "help": "score on labelled images from outside the workspace, beside the test split: a folder of class "
                "folders, or a CSV manifest",
            },
            "--class-map": {
                "metavar": "FILE",
                "help": "with --data: CSV file external,workspace of classes of other names",
            },
            "--from-export": {
                "metavar": "DIR|FILE",
                "help": "with --data: score an exported .onnx file, or that of an export's folder",
            },
            "--name": {"metavar": "NAME", "help": "with --data: name of the set (default: that of its folder or file)"},
            "--missing": {
                "choices": ("refuse", "ignore", "restrict"),
                "help": "with --data: classes of one side alone are an error (default), are ignored, or beside that "
                "probabilities are restricted to the shared classes",
            },
            "--allow-contaminated": {
                "action": "store_true",
                "help": "with --model-name: score it even on rows that it was fitted on, and mark the result",
            },
            "--alpha": {
                "metavar": "FRACTION",
                "type": float,
                "default": 0.1,
                "help": "fraction of images whose conformal set may miss the true class (default: %(default)s)",
            },
            "--target-risk": {
                "metavar": "FRACTION",
                "type": float,
                "default": 0.05,
                "help": "target selective risk: error rate among the images that are answered (default: %(default)s)",
            },
            "--wanted-error": {"metavar": "FRACTION", "type": float, "help": "deprecated; use --target-risk"},
            "--class-conditional": {
                "action": "store_true",
                "help": "also compute conformal sets with one threshold per class",
            },
            "--metrics": {
                "metavar": "KEY",
                "nargs": "+",
                "help": "columns of the ranking's tables, keys of metrics.json, such as balanced_accuracy and "
                "matthews_corrcoef (default: accuracy f1_macro log_loss ece)",
            },
            "--maps": {
                "action": "store_true",
                "help": "also show class-activation maps of the report's example images, which runs the networks",
            },
            "--mlflow": {
                "metavar": "URI",
                "help": "also log every model's scores and pictures as a run to this MLflow server or folder",
            },
            "--tensorboard": {
                "metavar": "DIR",
                "help": "also log every model's scores and pictures to this folder of TensorBoard",
            },
        },
        writes=True,
        decodes=True,
    ),
    "audit": Command(
        "utils.auditing.audit:audit",
        "find copies of images across splits, shortcuts to the classes, and images that hold nothing",
        "audit --write-split",
        {
            "--strict": {
                "action": "store_true",
                "help": "exit with 3 if copies of an image are in more than one split",
            },
            "--write-split": {
                "metavar": "FILE",
                "nargs": "?",
                "const": "",
                "help": "write a CSV manifest that keeps all copies of an image in one split (default: clean_split.csv "
                "in the workspace)",
            },
        },
        writes=True,
    ),
    "compare": Command(
        "utils.comparison.compare:compare",
        "compare the same methods over several evaluated workspaces: mean ranks, tests, gains",
        "compare ~/citrus ~/apple ~/rice --to comparison",
        {
            "workspaces": {
                "metavar": "WORKSPACE",
                "nargs": "+",
                "help": "workspaces (or outputs) that evaluate has scored: data sets, seeds or splits; tests need six",
            },
            "--metric": {
                "metavar": "KEY",
                "default": "accuracy",
                "help": "key of metrics.json that is compared, such as log_loss or f1_macro (default: %(default)s)",
            },
            "--split": {"choices": ("test", "val"), "default": "test", "help": "rows of the scores (default: test)"},
            "--models": {
                "metavar": "NAME",
                "nargs": "+",
                "help": "members and ensembles to compare, also best_single and recommended (default: all in common)",
            },
            "--control": {
                "metavar": "NAME",
                "default": "best_single",
                "help": "method over which gains are given (default: %(default)s)",
            },
            "--to": {"metavar": "DIR", "help": "folder for the result as JSON, CSV, Markdown, LaTeX and a diagram"},
        },
        writes=False,
        standalone=(("workspaces", "utils.comparison.compare:compare"),),
    ),
    "distill": Command(
        "utils.distillation.student_builder:distill",
        "distil an ensemble into a student and compare it with the same network trained without a teacher",
        "distill --set distillation.teacher=best",
        {},
        writes=True,
        builds=True,
        decodes=True,
    ),
    "export": Command(
        "utils.exporting.export:export",
        "write an ensemble or a member in deployment formats and check the parity of each file",
        "export --model-name soft_voting_ensemble --formats onnx tflite",
        {
            "--model-name": {"metavar": "NAME", "help": "ensemble, member, recommended (default) or recommended_fast"},
            "--formats": {
                "metavar": "FORMAT",
                "nargs": "+",
                "help": "state_dict, checkpoint, torchscript, exported_program, onnx, tflite or tensorrt "
                "(default: exports.formats)",
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
            "--onnx-exporter": {
                "choices": ("tracing", "dynamo"),
                "help": "which exporter of torch writes ONNX files (default: exports.onnx_exporter)",
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
                "help": "with --verify: run programs (TorchScript, torch.export, TFLite) that another workspace wrote",
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
            "--model-name": {
                "metavar": "NAME",
                "help": "ensemble or member that predicts; also recommended or recommended_fast",
            },
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
                "choices": ("lac", "aps", "raps"),
                "default": "lac",
                "help": "lac: smallest sets on average; aps: larger sets for hard images; raps: aps randomised, which "
                "covers no more than asked for (default: %(default)s)",
            },
            "--tta": {
                "action": "store_true",
                "help": "average over the views that out-of-sample rows chose for the model (tta of the configuration)",
            },
            "--maps": {
                "metavar": "DIR",
                "help": "also write class-activation maps of the predicted classes: a picture of each image, maps.csv",
            },
            "--append": {
                "action": "store_true",
                "help": "continue the file: skip images with a prediction and try images with an error again",
            },
            "--spreadsheet-safe": {
                "action": "store_true",
                "help": "put an apostrophe before CSV text that a spreadsheet takes for a formula; not with --append",
            },
        },
        writes=False,
        one_of=("--model-name", "--from-export"),
        standalone=(("--from-export", "utils.inference.predict:predict_from_export"),),
    ),
    "pipeline": Command(
        "ensemble_orchestrator:run_pipeline",
        "run all stages in order: discover --verify, build-ensemble, stack, fusion-train, meta-fuse, evaluate, "
        "distill, evaluate, audit, export, clean --temporary",
        "pipeline --config configs/digits_demo.yaml",
        {},
        writes=True,
        builds=True,
        decodes=True,
    ),
    "status": Command(
        "utils.operations.upkeep:status",
        "show what is built, what is stale and why, disk usage, and the next command",
        "status --json",
        {},
        writes=False,
    ),
    "clean": Command(
        "utils.operations.upkeep:clean",
        "list files that can be removed; --confirm removes them",
        "clean --stale --confirm",
        {
            "--confirm": {"action": "store_true", "help": "remove the listed files"},
            "--temporary": {
                "action": "store_true",
                "help": "remove leftover temporary files without confirmation, and nothing else",
            },
            "--cache": {"action": "store_true", "help": "include the decoded images"},
            "--stale": {"action": "store_true", "help": "include stale ensembles"},
            "--unlisted": {"action": "store_true", "help": "include ensembles that the configuration does not ask for"},
        },
        writes=("confirm", "temporary"),
    ),
    "config": Command(
        "utils.operations.configuration:show",
        "print the configuration of the workspace with comments; --set changes what it remembers",
        "config --explain runs.stacking.xgb_config.max_depth",
        {
            "--explain": {"metavar": "KEY", "help": "meaning, type, range and default of a key, and what it affects"},
            "--schema": {"action": "store_true", "help": "print the JSON schema of a configuration file"},
            "--init": {
                "metavar": "FILE",
                "nargs": "?",
                "const": "my_ensemble.yaml",
                "help": "write a file with every key, its default and a comment (default: %(const)s)",
            },
        },
        writes=("set",),
        makes_workspace=True,
        pass_through=("--set",),
        standalone=(
            ("--explain", "utils.operations.configuration:explain"),
            ("--schema", "utils.operations.configuration:schema"),
            ("--init", "utils.operations.configuration:init"),
        ),
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
    "demo": Command(
        "utils.operations.demo:demo",
        "train networks on photographs or scanned digits, combine and score them, and write the report",
        'demo --data "my leaves"',
        {
            "--data": {
                "metavar": "PATH",
                "help": "folder with one folder of images per class, or train, val and test of such folders, or a CSV "
                "manifest (default: scikit-learn's handwritten digits)",
            },
            "--quick": {"action": "store_true", "help": "fewer networks, and two folds instead of three"},
            "--small": {"action": "store_true", "help": "with --data: train the small networks as well"},
        },
        writes=False,
        pass_through=("--workspace", "--json"),
        is_standalone=True,
    ),
    "completion": Command(
        "ensemble_orchestrator:print_completion",
        "print the completion script of a shell for the command ensemble-system",
        "completion bash",
        {"shell": {"choices": ("bash", "zsh"), "help": "shell that reads the script"}},
        writes=False,
        is_standalone=True,
    ),
}
PIPELINE_STAGES: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("discover", {"verify": True}, ()),
    ("build-ensemble", {}, ("runs.score_ensemble", "runs.model_soup", "runs.snapshot_ensemble", "pruning", "tta")),
    ("stack", {}, ("runs.stacking",)),
    ("fusion-train", {}, ("runs.fusion", "runs.moe", "runs.cascade")),
    ("meta-fuse", {}, ("runs.meta_fuser",)),
    ("evaluate", {}, ()),
    ("distill", {}, ("distillation",)),
    ("evaluate", {}, ("distillation",)),
    ("audit", {}, ()),
    ("export", {}, ("exports",)),
    ("clean", {"temporary": True}, ()),
)
"""(command, options, sections of the configuration of which at least one must be enabled).

The document of `pipeline` holds the result of each under its name; that of a second run under `<name>-2`.
"""
COMMON_OPTIONS: dict[str, dict[str, Any]] = {
    "--config": {
        "metavar": "FILE",
        "help": "configuration file, relative to the working directory, then to the project (default: what the "
        "workspace was built with, at first configs/ensemble_config.yaml)",
    },
    "--set": {
        "metavar": "KEY=VALUE",
        "action": "append",
        "default": [],
        "help": "override one value of the configuration, such as runs.moe.enable=true; repeatable",
    },
    "--workspace": {
        "metavar": "DIR",
        "help": "folder of the base pipeline's results (default: DBT_BASE_DIR, else the parent of BASE-BACK)",
    },
    "--output": {
        "metavar": "DIR",
        "help": "folder for everything that this program writes, for a workspace that is read-only or not yours "
        "(default: DBT_ENSEMBLE_DIR, else the workspace)",
    },
    "--base-back": {
        "metavar": "DIR",
        "help": "the base pipeline (default: BASE_BACK_DIR, ../BASE-BACK, the bundled one)",
    },
    "--device": {"metavar": "DEVICE", "help": "cuda, cuda:N, cpu or auto (default: from the configuration)"},
    "--engine": {
        "choices": ("local", "ray"),
        "default": "local",
        "help": "where independent jobs run: in this process, or on the workers of a Ray cluster (default: local)",
    },
    "--address": {
        "metavar": "ADDRESS",
        "help": "with --engine ray: address of the cluster to join, such as auto (default: start one for this command)",
    },
    "--force": {"action": "store_true", "help": "rebuild existing results"},
    "--json": {"action": "store_true", "help": "print one JSON document to standard output"},
    "--verbose": {"action": "store_true", "help": "print more messages"},
    "--quiet": {"action": "store_true", "help": "print warnings and errors only"},
}
REPEATED_OPTIONS = ("--config", "--set", "--workspace", "--output", "--base-back", "--device", "--engine", "--address")
"""Common options that the suggested next command repeats."""
REMEMBERED_OPTIONS = ("--config", "--set")
"""Those that need no repetition after a command that builds."""
