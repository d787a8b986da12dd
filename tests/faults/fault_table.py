"""The table of faults: what is broken, which command meets it, and what that says and ends with."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import spoiling as s
from given_predictions import fewer, without, write
from in_process import run

from utils.core import locks

VOTES = (
    *("--set", "runs.score_ensemble.methods=[soft_voting,weighted]", "--set", "pruning.enable=false"),
    *("--set", "runs.model_soup.enable=false", "--set", "dataset.num_workers=0", "--set", "device=cpu"),
)
STACK = ("--set", "runs.stacking.meta_learners=[lr,xgb]", "--set", "runs.stacking.xgb_config.n_estimators=3")
DISCOVER = "python ensemble_orchestrator.py discover"
MODELS = "ensembles/models"
WEIGHTED = f"{MODELS}/weighted_ensemble"
CATALOG = "ensembles/ensemble_catalog.json"


class Fault(NamedTuple):
    """One row."""

    what: str
    base: str
    """Fixture of the workspace: empty, trained (nothing of ours), ready (built), imported (no images)."""
    spoil: s.Spoil
    command: tuple[str, ...]
    code: int
    words: tuple[str, ...]
    """All of them in the messages."""


def of_config(what: str, content: str | bytes, *words: str) -> Fault:
    return Fault(what, "empty", s.config(content), ("discover", "--config", "{folder}/given.yaml"), 2, words)


def of_set(what: str, value: str, *words: str) -> Fault:
    return Fault(what, "empty", s.nothing, ("discover", "--set", value), 2, words)


def of_import(what: str, spoil: s.Spoil, *words: str) -> Fault:
    return Fault(what, "empty", spoil, ("import-predictions", "--from", "{folder}/given"), 1, words)


def of_checkpoint(what: str, spoil: s.Spoil, *words: str) -> Fault:
    return Fault(what, "trained", spoil, ("discover", *VOTES), 1, (f"{s.NAME}_final.pth", *words))


def of_verified(what: str, spoil: s.Spoil, *words: str) -> Fault:
    return Fault(what, "trained", spoil, ("discover", "--verify", *VOTES), 4, words)


def of_built(what: str, spoil: s.Spoil, *words: str) -> Fault:
    return Fault(what, "ready", spoil, ("evaluate", "--force", *VOTES), 1, words)


def first_ids(arrays):
    ids = arrays["sample_ids"].copy()
    ids[1] = ids[0]
    return arrays | {"sample_ids": ids}


def with_value(key: str, value: float, kind: type | None = None):
    def change(arrays):
        changed = arrays[key].astype(kind or arrays[key].dtype)
        changed.flat[0] = value
        return arrays | {key: changed}

    return change


def no_sum(arrays):
    wrong = np.full_like(arrays["logits"], 0.9)
    return {key: value for key, value in arrays.items() if key != "logits"} | {"probabilities": wrong}


def discovered(folder: Path) -> None:
    assert run("discover", *VOTES, workspace=folder).code == 0


def living(folder: Path) -> None:
    s.text("ensembles/.lock", json.dumps(asdict(locks.this_process("stack"))))(folder)


def silent(found: dict) -> None:
    found["extra"] = {"classes": found["extra"]["classes"], "model_size": "tiny", "img_size": 32}


def saying(key: str, value: object):
    return lambda found: found["extra"].update({key: value})


def of_other_classes(folder: Path) -> None:
    import torch

    for path in (folder / "checkpoints").glob(f"{s.NAME}_*.pth"):
        found = torch.load(path, weights_only=True)
        found["extra"]["classes"] = ["ant", "bee"]
        torch.save(found, path)
    done = run("discover", *VOTES, workspace=folder)
    assert "trained on the classes ant, bee" in done.stdout + done.stderr


def leading_out(found: dict) -> None:
    found["members"]["../../evil"] = found["members"].pop(s.NAME)


def unlabelled(folder: Path) -> None:
    write(folder / "given", change=lambda name, stem, arrays: without("labels")(arrays))


CONFIG = [
    of_config("unknown key", "runs:\n  moe:\n    top_x: 3\n", "runs.moe.top_x", "did you mean 'top_k'"),
    of_config("unknown section", "rums:\n  moe: {}\n", "rums", "did you mean 'runs'"),
    of_config("a key twice", "seed: 1\nseed: 2\n", "seed", "line 2"),
    of_config("text for a number", "runs:\n  moe:\n    epochs: ten\n", "runs.moe.epochs", "whole number", "ten"),
    of_config("dropout of 1", "runs:\n  fusion:\n    fusion_config:\n      dropout: 1\n", "dropout", "below 1"),
    of_config("a rate that is no number", "distillation:\n  lr: .nan\n", "distillation.lr"),
    of_config("endless temperature", "distillation:\n  temperature: .inf\n", "distillation.temperature"),
    of_config("a tab", "runs:\n\tmoe: {}\n", "line 2", "found a tab; expected spaces"),
    of_config("bytes", bytes(range(256)), "given.yaml"),
    of_config("Latin-1", "project:\n  name: caf\xe9\n".encode("latin-1"), "given.yaml"),
    of_config("an empty file", "", "an empty file", "expected sections"),
    of_config("a list", "- a\n- b\n", "expected sections"),
    of_config("a YAML bomb", s.alias_bomb(), "at most", "aliases written out"),
    of_config("deep nesting", "[" * 3000, "given.yaml", "levels"),
    of_config("a tag that would run", "seed: !!python/object/apply:os.system ['touch canary']\n", "python/object"),
    of_config("a number in base 8", "seed: 042\n", "seed", "base 8"),
    of_config("more experts asked than there are", "runs:\n  moe:\n    top_k: 9\n", "runs.moe.top_k", "num_experts"),
    of_config("a fuser of itself", "runs:\n  meta_fuser:\n    input_ensembles: [meta_fuser]\n", "an input of itself"),
    of_config("nobody left", "backbones:\n  include: [a]\n  exclude: [a]\n", "at least one"),
    of_config("yes in quotes", "pruning:\n  enable: 'yes'\n", "pruning.enable", "true or false"),
    of_config("two mistakes at once", "seed: x\ndevice: tpu\n", "2 problem(s)", "seed", "device"),
    of_set("a value without a key", "runs.moe.enable", "runs.moe.enable", "="),
    of_set("an unknown place", "runs.score_ensemble.method=x", "did you mean 'methods'"),
    of_set("an unknown method", "runs.score_ensemble.methods=[soft_votin]", "did you mean 'soft_voting'"),
    of_set("a regex without a group", "dataset.group_regex=^a", "exactly one group"),
    of_set("a regex that is none", "dataset.group_regex=^(a", "dataset.group_regex"),
    of_set("a device that is none", "device=gpu", "expected cuda, cuda:N, cpu or auto"),
    Fault("no such file", "empty", s.nothing, ("discover", "--config", "confgs/x.yaml"), 2, ("no such file", "x.yaml")),
    Fault("a folder", "empty", s.nothing, ("discover", "--config", "{folder}"), 2, ("is a folder; expected a file",)),
]
USAGE = [
    Fault("an unknown command", "empty", s.nothing, ("discovr",), 2, ("invalid choice", "discover")),
    Fault("an option left out", "empty", s.nothing, ("import-predictions",), 2, ("--from",)),
    Fault("an unknown split", "empty", s.nothing, ("evaluate", "--split", "train"), 2, ("invalid choice",)),
    Fault("a section that is none", "empty", s.nothing, ("debug", "--section", "stak"), 2, ("invalid choice",)),
    Fault("temporary and confirm", "ready", s.nothing, ("clean", "--temporary", "--confirm"), 2, ("takes none",)),
    Fault(
        "no such workspace", "empty", s.nothing, ("discover", "--workspace", "{folder}/none"), 1, ("no such folder",)
    ),
    Fault(
        "an output that is a file", "empty", s.text("out", ""), ("status", "--output", "{folder}/out"), 1, ("a file",)
    ),
    Fault(
        *("an output below a file", "trained", s.text("out", "")),
        *(("discover", *VOTES, "--output", "{folder}/out/x"), 1, ("cannot be written", "--output DIR")),
    ),
    Fault("ours is a file", "trained", s.text("ensembles", ""), ("discover", *VOTES), 1, ("ensembles", "--output DIR")),
]
NOTHING_THERE = [
    Fault(f"{command} before discover", "trained", s.nothing, (command, *VOTES), 1, ("Catalog not found", DISCOVER))
    for command in ("build-ensemble", "stack", "meta-fuse", "evaluate")
] + [
    Fault("no images", "empty", s.nothing, ("discover",), 1, ("split_dataset", "Split the images first")),
    Fault("nothing trained", "trained", s.removed("checkpoints"), ("discover",), 1, ("no trained model", "make demo")),
    Fault(
        "no test split",
        "trained",
        s.removed("split_dataset/test"),
        ("discover",),
        1,
        ("split_dataset", "--stages split"),
    ),
    Fault(
        *("an unknown ensemble", "ready", s.nothing, ("evaluate", "--model-name", "soft_votin_ensemble", *VOTES), 1),
        ("soft_votin_ensemble", "did you mean 'soft_voting_ensemble'"),
    ),
    Fault(
        *("inputs that are not built", "ready", s.nothing),
        *(("meta-fuse", "--set", "runs.meta_fuser.input_ensembles=[stacking_mlp,logit_averaging]", *VOTES), 1),
        ("stacking_mlp", "stack"),
    ),
    Fault(
        *("stacking switched off", "ready", s.nothing, ("stack", "--set", "runs.stacking.enable=false"), 1),
        ("runs.stacking is disabled", "--set runs.stacking.enable=true"),
    ),
    Fault(
        *("a pick without pruning", "ready", s.nothing, ("build-ensemble", "--pick", "fastest", *VOTES), 1),
        ("pruning is disabled", "--set pruning.enable=true"),
    ),
    Fault(
        *("a backbone that is none", "ready", s.nothing),
        *(("build-ensemble", "--set", "backbones.include=[CustomConvNext]", *VOTES), 1),
        ("did you mean 'CustomConvNeXt'",),
    ),
    Fault(
        *("members that nobody has", "ready", s.nothing),
        *(("build-ensemble", "--set", "backbones.include=[CustomMaxViT]", *VOTES), 1, ("Train one of them",)),
    ),
]
RECORDS = [
    Fault(
        "a damaged catalog",
        "ready",
        s.truncated(CATALOG),
        ("stack", *VOTES),
        1,
        ("ensemble_catalog.json: damaged", DISCOVER),
    ),
    Fault(
        "a catalog of lists",
        "ready",
        s.text(CATALOG, "[]"),
        ("evaluate", *VOTES),
        1,
        ("ensemble_catalog.json", DISCOVER),
    ),
    Fault("a catalog in depth", "ready", s.text(CATALOG, "[" * 200000), ("evaluate", *VOTES), 1, ("damaged", DISCOVER)),
    Fault(
        *("another schema", "ready", s.record(CATALOG, lambda found: found.update(schema=99))),
        *(("evaluate", *VOTES), 1, ("schema 99", DISCOVER)),
    ),
    Fault(
        *("a member that is null", "ready", s.record(CATALOG, lambda found: found["members"].update(x=None))),
        *(("evaluate", *VOTES), 1, ("not the form of a catalog", DISCOVER)),
    ),
    Fault(
        *("a member that leads out", "ready", s.record(CATALOG, leading_out)),
        *(("build-ensemble", *VOTES), 1, ("not the form of a catalog", "../../evil", DISCOVER)),
    ),
    Fault(
        *("splits that are a number", "ready", s.record(CATALOG, lambda found: found.update(splits=3))),
        *(("evaluate", *VOTES), 1, ("ensemble_catalog.json", DISCOVER)),
    ),
    Fault(
        "damaged digests",
        "ready",
        s.truncated("ensembles/digests.json"),
        ("evaluate", *VOTES),
        1,
        ("digests.json", "Remove it"),
    ),
    Fault(
        "digests of lists", "ready", s.text("ensembles/digests.json", "[1]"), ("evaluate", *VOTES), 1, ("digests.json",)
    ),
    Fault(
        *("folds that are cut", "ready", s.truncated("ensembles/crossfit_folds.npz")),
        *(("stack", "--force", *VOTES, *STACK), 1, ("crossfit_folds.npz: cannot be read", "Remove it")),
    ),
    Fault(
        "a damaged lock", "ready", s.text("ensembles/.lock", "{"), ("evaluate", *VOTES), 1, (".lock: damaged", "rm ")
    ),
    Fault(
        *("a living writer", "ready", living),
        *(("evaluate", *VOTES), 1, (f"process {os.getpid()}", "Wait until it ends")),
    ),
]
CHECKPOINTS = [
    *(of_checkpoint(f"a hostile pickle, {kind}", s.hostile(kind)) for kind in ("system", "eval", "legacy", "plain")),
    of_checkpoint("a TorchScript archive", s.hostile("torchscript"), "TorchScript"),
    of_checkpoint("no bytes", s.checkpoint(lambda path: path.write_bytes(b""))),
    of_checkpoint("text", s.checkpoint(lambda path: path.write_text("weights"))),
    of_checkpoint("half a file", s.checkpoint(lambda path: path.write_bytes(path.read_bytes()[:20000]))),
    of_verified("no weights", s.weights(lambda found: found.update(model_state_dict={}))),
    Fault(
        *("another architecture, which says so", "trained", s.another_architecture, ("discover", *VOTES), 0),
        (f"{s.NAME}_final.pth holds CustomResNetMish", "ame the file after it"),
    ),
    of_verified(
        *("another architecture that says nothing", s.combined(s.another_architecture, s.weights(silent))),
        *(f"{s.NAME}_final.pth", "backbones.exclude"),
    ),
    *(
        of_checkpoint(
            f"a checkpoint whose {key} is {value!r}", s.weights(saying(key, value)), f"extra.{key}", "expected"
        )
        for key, value in (
            *(
                ("img_size", "big"),
                ("img_size", 10**9),
                ("final_accuracy", "high"),
                ("classes", 7),
                ("backbone_name", 3),
            ),
        )
    ),
    of_verified("weights that are no numbers", s.weights(s.with_nan), "NaN or infinite logits", "backbones.exclude"),
    Fault(
        *(
            "a checkpoint changed since",
            "ready",
            s.combined(s.text(f"checkpoints/{s.NAME}_final.pth", b"x"), s.removed("ensembles/predictions")),
        ),
        *(("build-ensemble", "--force", *VOTES, "--set", "runs.score_ensemble.methods=[soft_voting]"), 1),
        ("changed since discovery", DISCOVER),
    ),
]
OTHERS = [
    Fault(
        *("a member of other classes among good ones", "trained", of_other_classes),
        *(("build-ensemble", *VOTES), 0, ("built soft_voting_ensemble from 2 of 2 members",)),
    ),
]
IMAGES = [
    of_verified("no image but text", s.image(b"hello"), "split_dataset/val", "cannot be decoded", "then run discover"),
    of_verified("an image cut short", s.image(s.png(8, 8)[:60]), ".png", "truncated", "Remove or replace"),
    of_verified("a bomb of pixels", s.image(s.png(60000, 60000)), ".png", "3600000000 pixels", "Remove or replace"),
    Fault(
        *("an image that came later", "ready", s.text("split_dataset/val/dark/new.png", s.png(4, 4))),
        *(("build-ensemble", "--force", *VOTES), 1, ("images have changed since discovery", DISCOVER)),
    ),
    Fault(
        *("a class that the test split lacks", "trained", s.removed("split_dataset/test/dark")),
        *(("discover", *VOTES), 4, ("test has the classes bright", "train has bright, dark")),
    ),
]
FOLDS = [
    Fault(what, "trained", spoil, ("discover", *VOTES), 0, (f"{s.NAME}_oof_predictions.npz", *words))
    for what, spoil, words in (
        ("out-of-fold file cut", s.truncated(f"kfold_results/{s.NAME}_oof_predictions.npz"), ("cannot be read",)),
        ("other labels", s.oof(lambda a: a | {"labels": 1 - a["labels"]}), ("labels",)),
        ("an id twice", s.oof(first_ids), ("occurs twice",)),
        ("no number in it", s.oof(with_value("logits", np.nan)), ("finite",)),
        ("no folds", s.oof(without("fold")), ("fold",)),
        (
            "rows of elsewhere",
            s.oof(lambda a: a | {"sample_ids": np.char.add("x", a["sample_ids"])}),
            ("not train images",),
        ),
        (
            "80 TB",
            lambda folder: s.oversized_array(folder / f"kfold_results/{s.NAME}_oof_predictions.npz"),
            ("cannot be read",),
        ),
    )
] + [
    Fault(
        *(
            "strict stacking without folds",
            "trained",
            s.combined(s.removed("kfold_results"), discovered),
        ),
        *(("stack", "--strict", "--force", *VOTES, *STACK), 1, ("No K-fold results for backbone", "--stages kfold")),
    ),
]
IMPORTS = [
    of_import("no folder", s.nothing, "given", "expected"),
    of_import("an empty folder", lambda folder: (folder / "given").mkdir(), "given", "oof"),
    of_import("no labels anywhere", unlabelled, "forest: no row of oof.npz has a label"),
    of_import("an id twice", s.import_file("oof", first_ids), "forest/oof.npz", "occurs twice"),
    of_import("no number", s.import_file("val", with_value("logits", np.nan)), "forest/val.npz", "finite"),
    of_import("1e308", s.import_file("val", with_value("logits", 1e308, float)), "forest/val.npz"),
    of_import("probabilities of sum 2.7", s.import_file("val", no_sum), "forest/val.npz", "sum"),
    of_import(
        "pickled objects", s.import_file("val", lambda a: a | {"sample_ids": a["sample_ids"].astype(object)}), "pickle"
    ),
    of_import("80 TB", s.raw_import_file(s.oversized_array), "forest/oof.npz", "bytes are there"),
    of_import("a name that leads out", s.raw_import_file(s.path_traversal), "forest/oof.npz", s.CANARY),
    of_import("a swollen archive", s.raw_import_file(s.understated_size), "forest/oof.npz", "more bytes"),
    of_import("two arrays of one name", s.raw_import_file(s.duplicate_entry), "forest/oof.npz", "one name"),
    of_import("no archive", s.raw_import_file(lambda path: path.write_text("x")), "forest/oof.npz", "cannot be read"),
    of_import(
        "half an archive", s.raw_import_file(lambda path: path.write_bytes(path.read_bytes()[:300])), "forest/oof.npz"
    ),
    of_import(
        "other classes", s.import_file("val", lambda a: a | {"classes": np.array(["x", "y", "z"])}), "forest", "classes"
    ),
    of_import("no fold in oof", s.import_file("oof", without("fold")), "forest/oof.npz", "fold"),
    of_import(
        "numbers for ids",
        s.import_file("val", lambda a: a | {"sample_ids": np.arange(30)}),
        "forest/val.npz",
        "sample_ids",
    ),
    of_import("a label beyond the classes", s.import_file("val", with_value("labels", 7)), "forest/val.npz", "labels"),
    of_import("fewer rows than ids", s.import_file("val", lambda a: a | {"logits": a["logits"][:3]}), "forest/val.npz"),
    of_import("no rows", s.import_file("val", fewer(slice(0, 0))), "forest/val.npz"),
    of_import(
        "logits in three axes",
        s.import_file("val", lambda a: a | {"logits": a["logits"][None]}),
        "forest/val.npz",
        "logits",
    ),
    of_import(
        "nothing to build from", lambda f: write(f / "given", stems=("test",)), "forest", "neither oof.npz nor val.npz"
    ),
]
BUILT = [
    of_built("a damaged record", s.truncated(f"{WEIGHTED}/ensemble.json"), "ensemble.json: damaged"),
    of_built("a record of lists", s.text(f"{WEIGHTED}/ensemble.json", "[]"), "ensemble.json: damaged", "list"),
    of_built("a record of nothing", s.text(f"{WEIGHTED}/ensemble.json", "{}"), "ensemble.json: damaged", "--force"),
    of_built("weights cut", s.truncated(f"{WEIGHTED}/combiner.safetensors"), "combiner.safetensors: cannot be read"),
    of_built("weights gone", s.removed(f"{WEIGHTED}/combiner.safetensors"), "combiner.safetensors", "--force"),
    of_built(
        *(
            "a temperature without an axis",
            s.with_scalar_tensor(f"{MODELS}/stacking_lr/combiner.safetensors", "temperature"),
        ),
        *("stacking_lr", "not the form of an ensemble", "stack --force"),
    ),
    of_built("a booster cut", s.truncated(f"{MODELS}/stacking_xgb/booster.json"), "booster.json", "stack --force"),
    of_built("another booster", s.text(f"{MODELS}/stacking_xgb/booster.json", "{}"), "booster.json: damaged"),
    of_built(
        "unseen predictions cut", s.truncated(f"{WEIGHTED}/crossfit.npz"), "crossfit.npz: cannot be read", "--force"
    ),
    of_built("provenance cut", s.truncated(f"{WEIGHTED}/provenance.npz"), "provenance.npz: cannot be read", "--force"),
    Fault(
        *("stored predictions cut", "ready", s.truncated(f"ensembles/predictions/{s.NAME}/val/logits.npy")),
        *(("stack", "--force", *VOTES, *STACK), 1, ("logits.npy: cannot be read", "Remove it")),
    ),
    Fault(
        *("asked for on rows it was fitted on", "ready", s.nothing),
        *(("evaluate", "--split", "val", "--model-name", "weighted_ensemble", *VOTES), 3),
        ("weighted_ensemble", "--allow-contaminated"),
    ),
    Fault(
        *("stored rows of nobody", "imported", s.removed("ensembles/oof_predictions/forest.npz")),
        *(("stack", *STACK), 1, ("forest", "import-predictions")),
    ),
]
FAULTS = [
    *(*CONFIG, *USAGE, *NOTHING_THERE, *RECORDS, *CHECKPOINTS, *OTHERS, *IMAGES, *FOLDS, *IMPORTS, *BUILT),
]
