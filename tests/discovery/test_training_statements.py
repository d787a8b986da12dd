"""Values of `discover --trained-on`, and which statements stay, without images or networks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from utils.core.artifacts import write_arrays
from utils.core.errors import UserError
from utils.core.workspace import Workspace
from utils.discovery.training_statements import parse, problems, read_list, with_statements
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
