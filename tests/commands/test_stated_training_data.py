"""What declared networks were trained on, through the command line: stated, asked for, and never invented."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from declared_networks import COUNTS, QUICK, declaration, network, sample_ids, workspace_of, write_images

SEEN = {
    "a": ("train",),
    "b": ("train",),
    "leak": ("train", "val", "test"),
    "wide": ("train", "val"),
    "fresh": (),
}
"""{network: splits that its head knows by heart}"""


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A workspace of images, and `<name>.pth` of every network of SEEN beside it."""
    base = write_images(tmp_path_factory.mktemp("declared"))
    for seed, (name, splits) in enumerate(SEEN.items()):
        network(base, base / f"{name}.pth", splits, seed)
    return base


@pytest.fixture
def base(tmp_path, networks) -> Path:
    return Path(shutil.copytree(networks, tmp_path / "w"))


@pytest.fixture
def run(base, orchestrator):
    """Run a command on the workspace with the named members selected."""

    def command(*options, include=None):
        names = include if include == "all" else f"[{','.join(include or ())}]"
        selection = ("--set", f"backbones.include={names}") if include else ()
        return orchestrator(*options, *QUICK, *selection, workspace=base)

    return command


def declare(run, base, *names, statements=()):
    options = [option for name in names for option in declaration(name, base / f"{name}.pth")]
    stated = [option for statement in statements for option in ("--trained-on", statement)]
    return run("discover", *options, *stated, "--quiet")


def ranking(base):
    return json.loads((base / "metrics_output" / "ensembles" / "ranking.json").read_text())


def ensemble(base, name="soft_voting_ensemble"):
    return json.loads((base / "ensembles" / "models" / name / "ensemble.json").read_text())


def test_a_network_without_a_statement_is_scored_and_not_ranked(run, base):
    """`leak` was trained on test: it would lead the ranking and be recommended if train were assumed."""
    assert declare(run, base, "a", "b", "leak", statements=["a=train", "b=train"]).returncode == 0
    done = run("build-ensemble", include=["a", "b", "leak"])
    assert done.returncode == 0, done.stderr
    assert "the training data of leak is not stated" in done.stderr
    assert "discover --trained-on leak=train" in done.stderr
    assert "rows that leak may have been trained on" in done.stdout
    assert "out-of-sample" not in done.stdout
    assert ensemble(base)["unknown_training_data"] == ["leak"]
    done = run("evaluate", include=["a", "b", "leak"])
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in ranking(base)["rows"]}
    assert rows["leak"]["accuracy"] == 1.0
    assert {name for name, row in rows.items() if row["rank"] is None} == {
        *("leak", "soft_voting_ensemble", "hard_voting_ensemble", "logit_averaging_ensemble"),
    }
    assert rows["leak"]["unknown_training_data"] == ["leak"]
    assert {rows["a"]["rank"], rows["b"]["rank"]} == {1, 2}
    assert ranking(base)["recommended"]["name"] in "ab"
    assert ranking(base)["peers"]["best_single"] in "ab"
    assert "unknown training data" in done.stdout
    metrics = json.loads((base / "metrics_output/ensembles/soft_voting_ensemble/metrics.json").read_text())
    assert (metrics["crossfit"], metrics["conformal"], metrics["contaminated"]) == (None, None, False)
    assert "the training data of leak is not stated" in metrics["notes"]["crossfit"]
    page = (base / "ensembles/report/index.html").read_text()
    assert "The training data of leak is not stated" in page


def test_five_networks_without_a_statement_end_in_a_refusal_that_can_be_typed(run, base):
    assert declare(run, base, *SEEN).returncode == 0
    for command in ("build-ensemble", "evaluate"):
        done = run(command, include=SEEN)
        assert done.returncode == 3, done.stderr
        typed = " ".join(["--trained-on", *(f"{name}=train" for name in sorted(SEEN))])
        assert f"python ensemble_orchestrator.py discover {typed}" in done.stderr
    alone = run("evaluate", "--model-name", "leak", include=SEEN)
    assert alone.returncode == 0, alone.stderr
    assert "unknown training data" in alone.stdout
    assert run("discover", *typed.split()).returncode == 0
    assert run("build-ensemble", include=SEEN).returncode == 0
    assert run("evaluate", include=SEEN).returncode == 0


def test_what_was_trained_on_test_is_contaminated_and_what_was_trained_on_val_has_no_rows_there(run, base):
    assert declare(run, base, "a", "leak", "wide", statements=["a=train", "leak=all", "wide=train+val"]).returncode == 0
    done = run("build-ensemble", include=["a", "wide"])
    assert done.returncode == 3
    assert "no row is out of sample for all members" in done.stderr
    assert "wide (train+val) of no split" in done.stderr
    assert run("build-ensemble", include=["a"]).returncode == 0
    done = run("evaluate", include=["a", "leak", "wide"])
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in ranking(base)["rows"]}
    assert (rows["leak"]["contaminated"], rows["leak"]["rank"]) == (True, None)
    assert rows["wide"]["contaminated"] is False
    assert rows["wide"]["rank"] is not None
    assert ranking(base)["recommended"]["name"] != "leak"
    done = run("evaluate", "--model-name", "leak", include=["a", "leak"])
    assert done.returncode == 3
    done = run("evaluate", "--split", "val", include=["a", "wide"])
    assert done.returncode == 0, done.stderr
    of_val = json.loads((base / "metrics_output/ensembles/ranking_val.json").read_text())
    assert {row["name"]: row["contaminated"] for row in of_val["rows"] if row["kind"] == "member"} == {
        "a": False,
        "wide": True,
    }


def test_what_saw_none_of_the_images_answers_train_rows_out_of_sample(run, base):
    assert declare(run, base, "fresh", "a", statements=["fresh=none", "a=train"]).returncode == 0
    shown = run("discover").stdout
    assert "trained on other images than those of train: fresh none\n" in shown
    assert "No K-fold results for backbone fresh" not in shown
    assert "No K-fold results for backbone a" in shown
    done = run("build-ensemble", include=["fresh"])
    assert done.returncode == 0, done.stderr
    record = ensemble(base)
    assert record["crossfit"]["n"] == COUNTS["train"] + COUNTS["val"]
    assert (record["fitted_on"], record["selected_on"]) == ([], [])
    done = run("build-ensemble", include=["fresh", "a"])  # the rows that both have
    assert done.returncode == 0, done.stderr
    assert ensemble(base)["crossfit"]["n"] == COUNTS["val"]


def test_a_list_names_the_rows_that_were_seen(run, base):
    ids = {split: sample_ids(base, split) for split in COUNTS}
    seen = {"train": ids["train"][:40], "val": ids["val"][:15]}
    network(base, base / "part.pth", seen, seed=9)
    listed = base / "seen.csv"
    # The same file names are in every split, so that ids alone would name the images of all three.
    digests = workspace_digests(base, seen)
    listed.write_text("sha256\n" + "\n".join([*digests, "0" * 64, "ash/no_such.png"]) + "\n")
    done = run("discover", *declaration("part", base / "part.pth"), "--trained-on", f"part={listed}")
    assert done.returncode == 0, done.stderr
    assert "part: trained on 40 of 60 of train, 15 of 45 of val, 0 of 45 of test; 2 of 57 lines" in done.stdout
    assert run("build-ensemble", include=["part"]).returncode == 0
    record = ensemble(base)
    assert record["crossfit"]["n"] == 20 + 30
    with np.load(base / "ensembles/models/soft_voting_ensemble/crossfit.npz") as arrays:
        rows = set(zip(arrays["split"].tolist(), arrays["sample_ids"].tolist(), strict=True))
    assert rows == {(split, name) for split in ("train", "val") for name in ids[split] if name not in seen[split]}
    listed.write_text("\n".join(ids["test"]))  # later, by ids: of all three splits
    done = run("discover", "--trained-on", f"part={listed}")
    assert "45 of 60 of train, 45 of 45 of val, 45 of 45 of test" in done.stdout
    assert run("evaluate", include=["part"]).returncode == 0
    assert [row["contaminated"] for row in ranking(base)["rows"] if row["name"] == "part"] == [True]
    (workspace_of(base).training_data("part")).unlink()
    done = run("build-ensemble", include=["part"])
    assert done.returncode == 1
    assert "--trained-on part=FILE" in done.stderr


def test_all_members_are_those_of_known_training_data_and_the_others_are_named(run, base):
    assert declare(run, base, "a", "b", "leak", statements=["a=train", "b=none"]).returncode == 0
    done = run("build-ensemble", include="all")
    assert done.returncode == 0, done.stderr
    assert "2 members: a, b" in done.stdout
    assert "left out, since their training data is not stated: leak" in done.stderr
    assert "discover --trained-on leak=train" in done.stderr
    done = run("build-ensemble", "--set", "backbones.exclude=[a, b]", include="all")
    assert done.returncode == 3
    assert "the training data of leak is not stated" in done.stderr
    status = run("status", "--set", "backbones.exclude=[a, b]", include="all")
    assert (status.returncode, "the training data of leak is not stated" in status.stdout) == (0, True)


def test_a_false_statement_is_contradicted_by_the_rows_and_stays_as_it_is(run, base):
    assert declare(run, base, "a", "leak", "wide", statements=["train"]).returncode == 0
    assert "may have been trained on" not in run("discover").stdout  # nothing has run yet
    shown = run("discover", "--verify").stdout
    assert "warning: wide: its accuracy on the 45 rows of val is 1.0000" in shown
    assert "(Fisher's exact p = " in shown
    assert "discover --trained-on wide=train+val" in shown
    # `leak` knows val and test alike, so that nothing shows.
    assert "warning: leak: its accuracy" not in shown
    assert "warning: a: its accuracy" not in shown
    assert "discover --trained-on wide=train+val" in run("discover").stdout  # remembered
    done = run("evaluate", include=["a", "leak", "wide"])
    assert done.returncode == 0, done.stderr
    assert "wide: its accuracy on the 45 rows of val is 1.0000" in done.stderr
    metrics = json.loads((base / "metrics_output/ensembles/members/wide/metrics.json").read_text())
    assert "it may have been trained on images of val" in metrics["notes"]["trained_on"]
    assert "The stated training data of wide is in doubt" in (base / "ensembles/report/index.html").read_text()
    members = json.loads((base / "ensembles" / "ensemble_catalog.json").read_text())["members"]
    assert {member["trained_on"] for member in members.values()} == {"train"}
    shown = run("discover", "--verify", "--trained-on", "wide=train+val").stdout
    assert "its accuracy on" not in shown


def workspace_digests(base, rows):
    from hashlib import sha256

    files = [base / "split_dataset" / split / name for split, names in rows.items() for name in names]
    return [sha256(file.read_bytes()).hexdigest() for file in files]


def test_a_statement_that_changes_makes_stale_what_was_built_with_the_other(run, base):
    assert declare(run, base, "a", "leak", statements=["train"]).returncode == 0
    assert run("build-ensemble", include=["a", "leak"]).returncode == 0
    assert run("evaluate", include=["a", "leak"]).returncode == 0
    assert run("discover", "--trained-on", "leak=all").returncode == 0
    done = run("evaluate", include=["a", "leak"])
    assert done.returncode == 0, done.stderr
    assert "soft_voting_ensemble was built before" in done.stderr
    assert [row["name"] for row in ranking(base)["rows"] if row["rank"] is not None] == ["a"]
    status = run("status", "--json", include=["a", "leak"])
    assert json.loads(status.stdout)["ensembles"]["soft_voting_ensemble"]["state"] == "stale"


def test_a_statement_belongs_to_the_weights(run, base):
    assert declare(run, base, "a", statements=["train"]).returncode == 0
    catalog = base / "ensembles" / "ensemble_catalog.json"

    def stated():
        return json.loads(catalog.read_text())["members"]["a"]["trained_on"]

    assert run("discover").returncode == 0
    assert stated() == "train"
    shutil.copy(base / "leak.pth", base / "a.pth")
    done = run("discover")
    assert stated() == "unknown"
    assert "warning: a: its training data is not stated" in done.stdout
    record = json.loads(catalog.read_text())
    for key in ("trained_on", "training_list", "pretrained_on"):
        del record["members"]["a"][key]  # as written before it was asked
    catalog.write_text(json.dumps(record))
    assert run("build-ensemble", include=["a"]).returncode == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--trained-on", "train"), "no network is added by this command"),
        (("--trained-on", "b=train"), "b is no network that was declared with --add; these were: a"),
        (("--trained-on", "a=trian"), "'trian' is no statement and no such file exists"),
        (("--trained-on", "a=train", "--trained-on", "a=all"), "is about a too"),
        (("--trained-on", "a={empty}"), "none of its 0 lines names an image"),
        (("--trained-on", "a={stranger}"), "none of its 1 lines names an image of the workspace; the first: x/y.png"),
        (("--trained-on", "a={binary}"), "cannot be read as a list of images"),
    ],
)
def test_statements_that_cannot_be_followed_change_nothing(run, base, options, words):
    assert declare(run, base, "a", statements=["none"]).returncode == 0
    files = {"empty": b"", "stranger": b"x/y.png\n", "binary": b"\xff\xfe\x00\x81"}
    for name, content in files.items():
        (base / name).write_bytes(content)
    before = (base / "ensembles" / "ensemble_catalog.json").read_bytes()
    done = run("discover", *(option.format(**{name: base / name for name in files}) for option in options))
    assert done.returncode == 1, done.stdout
    assert words in done.stderr
    assert (base / "ensembles" / "ensemble_catalog.json").read_bytes() == before
