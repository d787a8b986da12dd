"""Classes of external sets: equal names alone are taken, near ones suggested, and class maps checked line by line."""

from __future__ import annotations

import unicodedata

import pytest

from utils.core.errors import UserError
from utils.external_sets.class_matching import match_classes, read_class_map, require_treatment

OWN = ("black_spot", "canker", "healthy")


def refusal(path, text, external=("Black Spot", "canker", "rust")) -> str:
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_class_map(path, external, OWN)
    return str(caught.value)


def test_names_that_differ_in_case_and_separators_are_suggested_and_not_taken():
    match = match_classes(("Black Spot", "canker", "rust"), OWN, {})
    assert match.class_of == {"canker": "canker"}
    assert match.unknown == {"Black Spot": "black_spot", "rust": ""}
    assert match.absent == ["black_spot", "healthy"]


def test_another_encoding_of_a_name_is_suggested():
    composed, decomposed = (unicodedata.normalize(form, "rouillé") for form in ("NFC", "NFD"))
    assert match_classes((decomposed,), (composed,), {}).unknown == {decomposed: composed}


def test_two_equally_near_classes_suggest_neither():
    assert match_classes(("A B",), ("a_b", "a-b"), {}).unknown == {"A B": ""}


def test_a_class_map_joins_renames_and_leaves_out(tmp_path):
    path = tmp_path / "map.csv"
    path.write_text('external,workspace\nBlack Spot,black_spot\n"spot, dark",black_spot\nrust,\n')
    external = ("Black Spot", "spot, dark", "rust", "canker")
    match = match_classes(external, OWN, read_class_map(path, external, OWN))
    assert match.class_of == {"Black Spot": "black_spot", "spot, dark": "black_spot", "canker": "canker"}
    assert match.dropped == ["rust"]
    assert match.unknown == {}
    assert match.shared == ("black_spot", "canker")


def test_a_class_map_names_every_problem(tmp_path):
    text = refusal(tmp_path / "m.csv", "external,workspace\nBlack Spt,black_spot\nrust,Canker\nrust,healthy\ncanker\n")
    assert "line 2: 'Black Spt' is no class of the external set; did you mean 'Black Spot'?" in text
    assert "line 3: 'Canker' is no class of the workspace; did you mean 'canker'?" in text
    assert "line 4: 'rust' is mapped twice" in text
    assert "line 5: 1 field(s)" in text


def test_names_in_a_circle_are_refused(tmp_path):
    external = ("black_spot", "canker", "healthy")
    text = refusal(tmp_path / "m.csv", "external,workspace\ncanker,healthy\nhealthy,canker\n", external)
    assert "canker -> healthy -> canker" in text


@pytest.mark.parametrize("text", ["", "a,b\n", "Black Spot,black_spot\n", '"'])
def test_a_file_that_is_no_class_map_is_refused_with_the_header(tmp_path, text):
    assert "external,workspace" in refusal(tmp_path / "m.csv", text)


def test_a_missing_class_map_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv"):
        read_class_map(tmp_path / "none.csv", OWN, OWN)


def test_the_refusal_lists_counts_and_the_command_of_each_treatment():
    match = match_classes(("Black Spot", "canker", "healthy"), (*OWN, "scab"), {})
    counts = {"Black Spot": 12, "canker": 1, "healthy": 2}
    own_counts = {"black_spot": 5, "canker": 4, "healthy": 3, "scab": 1}
    with pytest.raises(UserError) as caught:
        require_treatment(match, counts, own_counts, "refuse", "set", "evaluate --data set --workspace w")
    text = str(caught.value)
    for words in (
        "Black Spot (12 images; did you mean black_spot?)",
        "black_spot (5 test images) and scab (1 test image)",
        "Black Spot,black_spot",
        "    evaluate --data set --workspace w --missing ignore",
        "    evaluate --data set --workspace w --missing restrict",
    ):
        assert words in text
    require_treatment(match, counts, own_counts, "ignore", "set", "evaluate")


def test_a_treatment_that_would_be_refused_is_not_offered():
    match = match_classes(("canker",), OWN, {})
    with pytest.raises(UserError) as caught:
        require_treatment(match, {"canker": 3}, dict.fromkeys(OWN, 1), "refuse", "set", "evaluate")
    assert "--missing ignore" in str(caught.value)
    assert "restrict" not in str(caught.value)


def test_a_set_without_a_shared_class_is_refused_by_every_treatment():
    match = match_classes(("rust",), OWN, {})
    for treatment in ("refuse", "ignore", "restrict"):
        with pytest.raises(UserError, match="no class of the workspace"):
            require_treatment(match, {"rust": 3}, dict.fromkeys(OWN, 1), treatment, "set", "evaluate")


def test_equal_classes_need_no_treatment():
    counts = dict.fromkeys(OWN, 1)
    require_treatment(match_classes(OWN, OWN, {}), counts, counts, "refuse", "set", "evaluate")
