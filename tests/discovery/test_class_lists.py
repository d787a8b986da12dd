"""Class lists of networks: their forms, and how they are matched to the classes of the workspace."""

from __future__ import annotations

import pytest

from utils.core.errors import UserError
from utils.discovery.class_lists import class_list, require_match

CLASSES = ("black_spot", "canker", "healthy")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["b", "a"], ("b", "a")),
        ({"1": "b", "0": "a"}, ("a", "b")),
        ({str(index): f"n{index}" for index in range(11)}, tuple(f"n{index}" for index in range(11))),
        ({"0": "LABEL_0", "1": "LABEL_1"}, None),
        (["class_0", "class_1"], None),
    ],
)
def test_lists_and_indexed_names_are_read_and_placeholders_are_none(value, expected):
    assert class_list(value, "config.json: id2label") == expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"0": "a", "2": "b"}, "the indices 0, 2; expected one name for each output"),
        ({"a": "b"}, "the indices a"),
        (["a", 3], "expected a list of class names"),
        ([], "expected a list of class names"),
        ("ab", "expected a list of class names"),
        (["a", "b", "a"], "a occurs more than once"),
    ],
)
def test_another_form_is_refused(value, reason):
    with pytest.raises(UserError, match=rf"^config\.json: .*{reason}"):
        class_list(value, "config.json")


def test_the_same_names_in_any_order_match():
    require_match(("healthy", "black_spot", "canker"), CLASSES, "leaf")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("Healthy", "black_spot", "canker"), r"'Healthy' is no class of the workspace; did you mean 'healthy'\?"),
        (("healthy", "Black Spot", "canker"), r"'Black Spot' is no class .*did you mean 'black_spot'\?"),
        (("healthy", "black-spot", "canker"), r"did you mean 'black_spot'\?"),
        (("healthy", "black_spot", "CANKER"), r"did you mean 'canker'\?"),
        (("Black Spot", "Healthy", "canker"), r"'Black Spot' .* mean 'black_spot'\?; 'Healthy' .* mean 'healthy'\?\."),
        (("healthy", "black_spot", "cancer"), r"'cancer' is no class .*did you mean 'canker'\?"),
        (("healthy", "black_spot"), r"2 classes; the workspace has 3\. no output for canker"),
        (("healthy", "black_spot", "canker", "rust"), r"4 classes; the workspace has 3\. 'rust' is no class"),
    ],
)
def test_other_names_are_refused_with_both_lists(names, reason):
    with pytest.raises(UserError, match=reason) as error:
        require_match(names, CLASSES, "leaf")
    assert f"The network's classes: {', '.join(names)}. The workspace's: black_spot, canker, healthy" in str(
        error.value
    )


def test_of_many_names_twelve_are_shown_and_of_unknown_ones_three():
    classes = tuple(f"class {letter}" for letter in "abcdefghijklm")
    with pytest.raises(UserError) as error:
        require_match(("v", "w", "x", "y"), classes, "leaf")
    text = str(error.value)
    assert text.startswith("leaf: 4 classes; the workspace has 13. 'v' is no class")
    assert [f"{name!r} is no class" in text for name in "vwxy"] == [True, True, True, False]
    assert "class k, class l and 1 more. Correct" in text
    with pytest.raises(UserError, match=r"leaf: 12 classes; .* no output for class m\..*class k, class l\. The works"):
        require_match(classes[:12], classes, "leaf")


def test_the_same_number_of_other_names_is_refused_without_a_count():
    with pytest.raises(UserError, match=r"^leaf: 'rust' is no class"):
        require_match(("healthy", "black_spot", "rust"), CLASSES, "leaf")


def test_a_list_with_some_placeholders_is_a_list_of_names():
    assert class_list(["LABEL_0", "rust"], "config.json") == ("LABEL_0", "rust")
    with pytest.raises(UserError, match=r"^config\.json: a, b occurs more than once"):
        class_list(["b", "b", "a", "a", "c"], "config.json")
    with pytest.raises(UserError, match="expected a list of class names"):
        class_list(["a", ""], "config.json")
    with pytest.raises(UserError, match=rf"^config\.json: {'a' * 60} occurs more than once"):
        class_list(["a" * 61, "a" * 61], "config.json")
