"""Values of `discover --trained-on`, and which statements stay, without images or networks."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from utils.core.artifacts import write_arrays
from utils.core.errors import UserError
from utils.core.workspace import Workspace
from utils.discovery import training_statements
from utils.discovery.training_statements import of_unknown_origin, parse, problems, read_list, with_statements
from utils.predictions.catalog import Catalog, Member


def member(name, trained_on="unknown", sha256="1", **entries):
    values = {
        "architecture": "timm:x",
        "size": "full",
        "img_size": 32,
        "classes": ("a", "b"),
        "exports": (),
        "metrics": None,
    }
    checkpoint = {"path": f"{name}.pth", "stage": "final", "sha256": sha256}
    values |= {
        "checkpoints": (checkpoint,),
        "oof": None,
        "recorded_accuracy": None,
        "digest": sha256,
        "trained_on": trained_on,
    }
    return Member(name=name, **(values | entries))


def after(tmp_path, members, earlier=(), *values):
    workspace = Workspace(tmp_path, *(tmp_path / name for name in "abcdefg"))
    members, earlier = ({each.name: each for each in some} for some in (members, earlier))
    statements = parse(values, (), members)
    found, _ = with_statements(workspace, {}, members, Catalog({}, (), {}, earlier), statements)
    return {name: (each.trained_on, each.pretrained_on) for name, each in found.items()}


def test_what_names_a_network_takes_precedence_over_what_is_said_of_all_that_are_added():
    for values in (["train", "b=none"], ["b=none", "train"]):
        found = parse(values, ["a", "b"], ["a", "b", "old"])
        assert {name: each.trained_on for name, each in found.items()} == {"a": "train", "b": "none"}
    with pytest.raises(UserError, match="is about a too"):
        parse(["train", "all"], ["a"], ["a"])


def test_a_file_with_an_equals_sign_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seen=1.txt").write_text("a/0.png")
    assert parse(["seen=1.txt"], ["a"], ["a"])["a"].file == tmp_path / "seen=1.txt"
    assert parse(["a=seen=1.txt"], [], ["a"])["a"].file == tmp_path / "seen=1.txt"


def test_a_statement_stays_with_its_weights(tmp_path):
    earlier = [member("a", "none")]
    assert after(tmp_path, [member("a")], earlier) == {"a": ("none", "none")}
    assert after(tmp_path, [member("a", sha256="2")], earlier) == {"a": ("unknown", "none")}
    assert after(tmp_path, [member("a")], earlier, "a=all") == {"a": ("all", "none")}


def test_a_list_is_counted_again_where_the_images_are_split_otherwise(tmp_path):
    workspace = Workspace(tmp_path, *(tmp_path / name for name in "abcdefg"))
    write_arrays(workspace.training_data("a"), {"contents": np.array(["x", "y"])})
    before = member("a", "file", training_list={"digest": "1", "rows": {"train": 2, "val": 0}, "unmatched": 0})
    splits = {"train": SimpleNamespace(contents=("x",)), "val": SimpleNamespace(contents=("y", "z"))}
    stated, _ = with_statements(workspace, splits, {"a": member("a")}, Catalog({}, (), {}, {"a": before}), {})
    assert stated["a"].training_list["rows"] == {"train": 1, "val": 1}


@pytest.mark.parametrize("facts", [None, {"digest": "1", "rows": {"train": 2}, "unmatched": 0}])
def test_what_cannot_be_counted_again_is_kept(tmp_path, facts):
    workspace = Workspace(tmp_path, *(tmp_path / name for name in "abcdefg"))
    if facts is None:
        write_arrays(workspace.training_data("a"), {"contents": np.array(["x"])})  # of an earlier statement
    before = member("a", "file" if facts else "none", training_list=facts)
    stated, _ = with_statements(workspace, {}, {"a": member("a")}, Catalog({}, (), {}, {"a": before}), {})
    assert stated["a"].training_list == facts


def test_of_a_network_that_was_trained_here_the_statement_is_about_the_weights_it_started_from(tmp_path):
    trained = member("a", "unknown", pretrained_on="unknown")
    assert after(tmp_path, [trained], (), "a=none") == {"a": ("train", "none")}
    assert after(tmp_path, [trained], (), "a=train+val") == {"a": ("train+val", "train+val")}
    stated = replace(trained, trained_on="train", pretrained_on="none")
    assert after(tmp_path, [trained], [stated]) == {"a": ("train", "none")}
    (tmp_path / "list").write_text("a/0.png")
    with pytest.raises(UserError, match="a list is not supported"):
        after(tmp_path, [trained], (), f"a={tmp_path / 'list'}")


def test_derived_members_have_the_widest_statement_of_their_parents_even_when_one_is_gone(tmp_path):
    student = member("s", "train", source="derived", parents=("a", "b"), sha256="3")
    parents = [member("a", "none"), member("b", "all")]
    assert after(tmp_path, [*parents, student], parents)["s"] == ("all", "none")
    earlier = replace(student, trained_on="all")
    known = [member(name, "none") for name in "ab"]
    assert after(tmp_path, [*known, student], [*known, earlier])["s"] == ("train", "none")
    assert after(tmp_path, [parents[0], student], [parents[0], earlier])["s"] == ("all", "none")
    assert after(tmp_path, [parents[0], replace(student, digest="4")], [parents[0], earlier])["s"] == ("train", "none")


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("a/0.png\nb/1.png\na/0.png\n\n", ["a/0.png", "b/1.png"]),
        ('\ufefffile_name,label\na/0.png,a\n"b/x, y.png",b\n', ["a/0.png", "b/x, y.png"]),
        ("f" * 64 + "\n", ["f" * 64]),
        ("", []),
    ],
)
def test_lists_are_the_first_column_without_heading(tmp_path, text, entries):
    (tmp_path / "list").write_text(text, encoding="utf-8")
    assert read_list(tmp_path / "list") == entries


@pytest.mark.parametrize(("strangers", "count"), [(2, 0), (3, 1)])
def test_a_list_of_which_many_lines_match_no_image_is_a_warning(tmp_path, strangers, count):
    workspace = Workspace(tmp_path, *(tmp_path / name for name in "abcdefg"))
    ids = tuple(f"x/{n}.png" for n in range(18))
    lines = [*ids, *(f"images/{n}.png" for n in range(strangers))]
    (tmp_path / "seen.txt").write_text("\n".join(lines))
    splits = {"train": SimpleNamespace(sample_ids=ids, contents=tuple(f"{n:064x}" for n in range(18)))}
    statements = parse([f"a={tmp_path / 'seen.txt'}"], (), ["a"])
    stated, _ = with_statements(workspace, splits, {"a": member("a")}, None, statements)
    warnings = problems(stated, "x/0.png")
    assert [(problem.code, problem.severity) for problem in warnings] == [("training_list", "warning")] * count
    for problem in warnings:
        assert "3 of the 21 lines" in problem.message
        assert "first images/0.png" in problem.message
        assert "list them as x/0.png" in problem.remedy


@pytest.mark.parametrize(
    ("values", "added", "words"),
    [
        (["far=none"], ["a"], "far is no network that was declared with --add"),
        (["none"], [], r"no network is added by this command.* --trained-on NAME=none; these were: a, b"),
        (
            ["noen"],
            ["a"],
            r"'noen' is no statement and no such file exists; did you mean 'none'\? expected none, train,",
        ),
        (["a=far.txt"], [], r"'far.txt' is no statement and no such file exists; expected none, train"),
        (["a=none", "a=all"], [], "--trained-on a=all: --trained-on a=none is about a too"),
    ],
)
def test_a_statement_that_cannot_be_meant_is_refused(tmp_path, monkeypatch, values, added, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        parse(values, added, ["a", "b"])


def taken(tmp_path, text, each=None):
    """What becomes of a network and a list of images."""
    workspace = Workspace(tmp_path, *(tmp_path / name for name in "abcdefg"))
    (tmp_path / "seen.txt").write_text(text)
    contents = {"train": ("1" * 64, "2" * 64), "val": ("3" * 64,)}
    ids = {"train": ("a/0.png", "a/1.png"), "val": ("a/0.png",)}
    splits = {split: SimpleNamespace(sample_ids=ids[split], contents=contents[split]) for split in ids}
    statements = parse([f"m={tmp_path / 'seen.txt'}"], (), ["m"])
    stated, messages = with_statements(workspace, splits, {"m": each or member("m")}, None, statements)
    return workspace, stated["m"], messages


def test_a_list_names_images_by_id_in_any_split_or_by_digest(tmp_path):
    unknown = "F" * 64
    workspace, stated, messages = taken(tmp_path, f"a/0.png\n{'2' * 64}\nb/7.png\n{unknown}\n")
    assert stated.trained_on == "file"
    facts = dict(stated.training_list)
    assert len(facts.pop("digest")) == 64
    expected = {"rows": {"train": 2, "val": 1}, "unmatched": 2, "lines": 4, "unmatched_line": "b/7.png"}
    assert facts == expected
    assert messages == ["m: trained on 2 of 2 of train, 1 of 1 of val; 2 of 4 lines name no image of the workspace"]
    with np.load(workspace.training_data("m")) as stored:
        assert stored["contents"].tolist() == ["1" * 64, "2" * 64, "3" * 64, unknown.lower()]
    assert taken(tmp_path, "a/1.png\n")[1].training_list["unmatched_line"] is None
    assert taken(tmp_path, f"a/1.png\nb/{'7' * 80}")[1].training_list["unmatched_line"] == f"b/{'7' * 78}"
    other, _ = with_statements(workspace, {}, {"m": stated}, None, parse(["m=none"], (), ["m"]))
    assert (other["m"].trained_on, other["m"].training_list) == ("none", None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("b/7.png\nb/8.png", "none of its 2 lines names an image of the workspace; the first: b/7.png.*as a/0.png"),
        (f"b/{'7' * 80}", "none of its 1 lines names an image of the workspace; the first: b/7{78}\\. Expected"),
        ("", "none of its 0 lines names an image of the workspace; the first: it is empty"),
    ],
)
def test_a_list_of_no_image_is_refused(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        taken(tmp_path, text)


def test_a_list_that_cannot_be_read_is_refused(tmp_path):
    path = tmp_path / "list"
    path.write_bytes(b"a/0.png\n\xff\n")
    with pytest.raises(UserError, match=r"list: cannot be read as a list of images .*Write one sample id"):
        read_list(path)
    path.write_bytes(b"")
    os.truncate(path, 256 * 1024**2 + 1)
    with pytest.raises(UserError, match="list: more than 256 MB; expected a list of images"):
        read_list(path)


def test_unstated_networks_are_told_and_those_of_old_catalogs_are_not_doubted():
    old = member("old", "file", training_list={"digest": "1", "rows": {}, "unmatched": 3})
    members = [member("a"), member("b", "train"), member("soup", source="derived"), old]
    found = problems({each.name: each for each in members}, "x/0.png")
    assert [(problem.code, problem.member) for problem in found] == [("unknown_training_data", "a")]


def test_members_of_other_training_data_are_summed_up():
    members = {"a": member("a", "train"), "c": member("c", "none"), "b": member("b", pretrained_on="unknown")}
    assert training_statements.summary_lines(members) == [
        "trained on other images than those of train: b unknown, c none"
    ]
    assert training_statements.summary_lines({"a": members["a"]}) == []
    assert of_unknown_origin(members) == ["b"]


def test_a_network_without_a_checkpoint_keeps_no_statement(tmp_path):
    assert after(tmp_path, [member("a", checkpoints=())], [member("a", "none", checkpoints=())])["a"][0] == "unknown"
    assert after(tmp_path, [member("a")], [member("b", "none")])["a"] == ("unknown", "none")
