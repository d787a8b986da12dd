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
    """Whether it may write into a folder that is not a workspace yet."""
    decodes: bool = False
    """Whether it may decode images; the cache quota is enforced before."""
    sandboxed: bool = False
    """Whether it writes only to a separate folder, and no log file into the workspace."""
    pass_through: tuple[str, ...] = ()
    """Common options that the function receives in addition to --force."""
    one_of: tuple[str, ...] = ()
    """Options of which exactly one is required."""
    standalone: tuple[tuple[str, str], ...] = ()
    """(option, function called instead of the target); needs no configuration, workspace or BASE-BACK."""
    is_standalone: bool = False
    """Whether the target itself needs none of these; it is called with its options only."""


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
        "find trained models, check them and write the catalog",
        "discover --verify",
        {
            "--verify": {
                "action": "store_true",
                "help": "also run every member and compare its scores with the recorded ones",
            },
            "--add": {
                "metavar": "NAME=SOURCE",
                "nargs": "+",
                "action": "extend",
                "default": [],
                "help": "add timm networks as members, which later runs of discover keep; SOURCE is "
                "timm:ARCH@FILE, local-dir:FOLDER, hf-hub:ORG/NAME or timm:ARCH (pretrained, from the hub)",
            },
            "--add-from": {
                "metavar": "DIR",
                "action": "append",
                "default": [],
                "help": "add every folder below DIR that holds a network (config.json and weights) as a member of "
                "the folder's name; repeatable",
            },
            "--preprocess": {
                "metavar": "KEY=VALUE",
                "nargs": "+",
                "action": "extend",
                "default": [],
                "help": "preprocessing of the networks that --add and --add-from add; NAME:KEY=VALUE changes that "
                "of a network added earlier; keys: input_size, resize, crop, resized, interpolation, "
                "crop_offset, mean, std, channels, range, exif",
            },
            "--trained-on": {
                "metavar": "STATEMENT",
                "nargs": "+",
                "action": "extend",
                "default": [],
                "help": "images that the networks of --add and --add-from were trained on: none, train, train+val, "
                "all, unknown, or a file that lists them; NAME=STATEMENT changes the statement on a "
                "network added earlier",
            },
            "--remove": {
                "metavar": "NAME",
                "action": "append",
                "default": [],
                "help": "take a network that --add or --add-from added out of the catalog; its file is kept; "
                "repeatable",
            },
            "--rename": {
                "metavar": "OLD=NEW",
                "action": "append",
                "default": [],
                "help": "rename an added or imported member and everything that is stored for it; repeatable",
            },
        },
        writes=True,
        pass_through=("--verbose",),
    ),
    "import-predictions": Command(
        "utils.discovery.import_predictions:import_predictions",
        "add members from predictions that any other tool has made",
        "import-predictions --from ~/predictions",
        {
            "--from": {
                "metavar": "DIR",
                "required": True,
                "dest": "folder",
                "help": "folder with <member>/{oof,val,test}.npz; the format is described in "
                "docs/tutorials/predictions.md",
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
                "help": "which pruned subset to keep (default: pruning.pick of the configuration)",
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
        "train fusion heads on the members' embeddings, the mixture of experts, and the cascade",
        "fusion-train --set runs.fusion.fusion_methods=[concat_mlp,attention]",
        {},
        writes=True,
        builds=True,
        decodes=True,
    ),
    "meta-fuse": Command(
        "utils.building.meta_builder:meta_fuse",
        "fit an ensemble of the other ensembles on their cross-fitted predictions",
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
            "--split": {"choices": ("test", "val"), "default": "test", "help": "split to score (default: test)"},
            "--model-name": {
                "metavar": "NAME",
                "help": "score only this member or ensemble; recommended is a name as well",
            },
            "--data": {
                "metavar": "DIR|CSV",
                "help": "score labelled images from outside the workspace and compare with the test split: a "
                "folder of class folders, or a CSV manifest",
            },
            "--class-map": {
                "metavar": "FILE",
                "help": "with --data: CSV file with the columns external and workspace, for classes that are named "
                "differently",
            },
            "--from-export": {
                "metavar": "DIR|FILE",
                "help": "with --data: score an exported .onnx file, or the one in an export folder",
            },
            "--name": {
                "metavar": "NAME",
                "help": "with --data: name of the image set (default: name of its folder or file)",
            },
            "--missing": {
                "choices": ("refuse", "ignore", "restrict"),
                "help": "with --data, for classes that only one side has: refuse (default) is an error, ignore "
                "leaves their images out, restrict also restricts the probabilities to the shared classes",
            },
            "--allow-contaminated": {
                "action": "store_true",
                "help": "with --model-name: score the model even on rows that it was fitted on, and mark the result",
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
                "help": "target selective risk: highest error rate among the images that are answered (default: "
                "%(default)s)",
            },
            "--wanted-error": {"metavar": "FRACTION", "type": float, "help": "deprecated; use --target-risk"},
            "--class-conditional": {
                "action": "store_true",
                "help": "also compute conformal sets with one threshold per class",
            },
            "--metrics": {
                "metavar": "KEY",
                "nargs": "+",
                "help": "columns of the ranking, as keys of metrics.json, such as balanced_accuracy and "
                "matthews_corrcoef (default: accuracy f1_macro log_loss ece)",
            },
            "--plots": {
                "choices": ("compared", "all", "none"),
                "help": "models to draw plots of: those that the report compares (default: compared), all in the "
                "ranking, or none; plots of other models are removed",
            },
            "--maps": {
                "action": "store_true",
                "help": "also show class-activation maps of the report's example images (runs the networks on them)",
            },
            "--mlflow": {
                "metavar": "URI",
                "help": "also log the scores and drawn plots of each model to this MLflow server or folder",
            },
            "--tensorboard": {
                "metavar": "DIR",
                "help": "also log the scores and drawn plots of each model to this TensorBoard folder",
            },
        },
        writes=True,
        decodes=True,
    ),
    "audit": Command(
        "utils.auditing.audit:audit",
        "find copies of images across splits, features beside the object that give the class away, and empty images",
        "audit --write-split",
        {
            "--strict": {
                "action": "store_true",
                "help": "exit with code 3 if copies of an image are in more than one split",
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
        "compare the same methods across several evaluated workspaces: mean ranks, significance tests, gains",
        "compare ~/citrus ~/apple ~/rice --to comparison",
        {
            "workspaces": {
                "metavar": "WORKSPACE",
                "nargs": "+",
                "help": "workspaces (or --output folders) that evaluate has scored: data sets, seeds or splits; "
                "significance tests need six",
            },
            "--metric": {
                "metavar": "KEY",
                "default": "accuracy",
                "help": "metric to compare, a key of metrics.json such as log_loss or f1_macro (default: %(default)s)",
            },
            "--split": {
                "choices": ("test", "val"),
                "default": "test",
                "help": "split whose scores are compared (default: test)",
            },
            "--models": {
                "metavar": "NAME",
                "nargs": "+",
                "help": "members and ensembles to compare; best_single and recommended are names as well (default: "
                "all that the workspaces share)",
            },
            "--control": {
                "metavar": "NAME",
                "default": "best_single",
                "help": "method that gains are measured against (default: %(default)s)",
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
        "export an ensemble or a member and check that each file reproduces its predictions",
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
                "help": "input of the file: resized and cropped float32 images in [0, 1], or decoded uint8 images "
                "(default: exports.input)",
            },
            "--onnx-exporter": {
                "choices": ("tracing", "dynamo"),
                "help": "exporter of torch that writes ONNX files (default: exports.onnx_exporter)",
            },
            "--max-members": {
                "metavar": "N",
                "type": int,
                "help": "refuse ensembles with more than N members (default: exports.max_members)",
            },
            "--member-probabilities": {
                "action": "store_true",
                "help": "let the file return the probabilities of each member as well",
            },
            "--check-tools": {"action": "store_true", "help": "only list what each format needs and what is installed"},
            "--verify": {
                "metavar": "DIR",
                "help": "only check an existing export: checksums and predictions; DIR may be relative to the "
                "workspace",
            },
            "--trust": {
                "action": "store_true",
                "help": "with --verify: run programs (TorchScript, torch.export, TFLite) that another workspace wrote",
            },
            "--compare": {
                "action": "store_true",
                "help": "only compare the exported files: accuracy, latency, size",
            },
        },
        writes=True,
        decodes=True,
    ),
    "predict": Command(
        "utils.inference.predict:predict",
        "classify image files: class, probability, conformal set, abstention, disagreement of the members",
        "predict --model-name soft_voting_ensemble photos/ --to answers.csv",
        {
            "paths": {
                "metavar": "PATH",
                "nargs": "+",
                "help": "image files, folders, quoted patterns, or - to read a list from standard input (one per "
                "line, or NUL-separated)",
            },
            "--model-name": {
                "metavar": "NAME",
                "help": "ensemble or member to predict with; recommended and recommended_fast are names as well",
            },
            "--from-export": {
                "metavar": "FILE",
                "help": "exported .onnx file to predict with; needs neither a workspace nor BASE-BACK nor torch",
            },
            "--to": {
                "metavar": "FILE",
                "help": "file for the predictions, written block by block (default: standard output, for up to "
                "10,000 images)",
            },
            "--format": {
                "choices": ("csv", "jsonl"),
                "dest": "form",
                "help": "format of the predictions (default: that of the extension of --to, else csv)",
            },
            "--probabilities": {"action": "store_true", "help": "also write the probabilities of all classes"},
            "--sets": {
                "choices": ("lac", "aps", "raps"),
                "default": "lac",
                "help": "kind of conformal sets; lac: smallest on average; aps: larger for hard images; raps: aps "
                "with randomisation, so that coverage does not exceed what was asked for (default: "
                "%(default)s)",
            },
            "--tta": {
                "action": "store_true",
                "help": "test-time augmentation: average over the views that build-ensemble chose for the model "
                "(section tta of the configuration)",
            },
            "--maps": {
                "metavar": "DIR",
                "help": "also write class-activation maps of the predicted classes to DIR: one picture per image, "
                "and maps.csv",
            },
            "--append": {
                "action": "store_true",
                "help": "continue an interrupted file: skip images that have a prediction, retry those with an error",
            },
            "--spreadsheet-safe": {
                "action": "store_true",
                "help": "put an apostrophe before CSV text that a spreadsheet would take for a formula; not with "
                "--append",
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
                "help": "remove leftover temporary files and nothing else, without confirmation",
            },
            "--cache": {"action": "store_true", "help": "also list the cached decoded images"},
            "--stale": {"action": "store_true", "help": "also list stale ensembles"},
            "--unlisted": {
                "action": "store_true",
                "help": "also list ensembles that the configuration does not ask for",
            },
        },
        writes=("confirm", "temporary"),
    ),
    "config": Command(
        "utils.operations.configuration:show",
        "print the configuration of the workspace with comments; --set changes it",
        "config --explain runs.stacking.xgb_config.max_depth",
        {
            "--explain": {
                "metavar": "KEY",
                "help": "explain a key: meaning, type, range, default, and which results it affects",
            },
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
        "try each part of the program on synthetic images or on your members; writes to debug_tmp/ only",
        "debug --section all --fast",
        {
            "--section": {
                "metavar": "NAME",
                "choices": (*DEBUG_SECTIONS, "all", "reset"),
                "default": "all",
                "help": f"{', '.join(DEBUG_SECTIONS)}; all (default); or reset, which removes debug_tmp/",
            },
            "--arch": {"metavar": "NAME", "help": "restrict the sections that test single members to this backbone"},
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
        "print the completion script of ensemble-system for a shell",
        "completion bash",
        {"shell": {"choices": ("bash", "zsh"), "help": "shell to print the script for"}},
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

The document of `pipeline` has the result of each under its name; that of a second run under `<name>-2`.
"""
COMMON_OPTIONS: dict[str, dict[str, Any]] = {
    "--config": {
        "metavar": "FILE",
        "help": "configuration file, looked up in the working directory, then in the project (default: the "
        "configuration that the workspace was built with, else configs/ensemble_config.yaml)",
    },
    "--set": {
        "metavar": "KEY=VALUE",
        "action": "append",
        "default": [],
        "help": "override one value of the configuration, such as runs.moe.enable=true; repeatable",
    },
    "--workspace": {
        "metavar": "DIR",
        "help": "folder with the trained networks, and for all results (default: DBT_BASE_DIR, else the parent of "
        "BASE-BACK, or the working directory where the package is installed)",
    },
    "--output": {
        "metavar": "DIR",
        "help": "folder for everything that this program writes, where the workspace is read-only or not yours "
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
        "help": "with --engine ray: address of the cluster to join, such as auto (default: start a cluster for "
        "this command)",
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
