"""Members are brought together by id and class name, never by position."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from utils.core.errors import UserError
from utils.predictions.rows import UNKNOWN, MemberOutputs, MemberRows, align, collect_samples

CLASSES = ("ant", "bee", "cat")


def member(seed, ids=tuple(f"ant/{n}.png" for n in range(20)), split="val"):
    rng = np.random.default_rng(seed)
    labels = np.random.default_rng(99).integers(0, 3, len(ids))
    logits = rng.normal(size=(len(ids), 3)).astype(np.float32)
    return MemberRows(split, CLASSES, np.array(ids), labels, logits, np.ones(len(ids), dtype=bool))


def shuffled(rows, seed):
    order = np.random.default_rng(seed).permutation(len(rows.labels))
    return rows.take(order)


def permuted_classes(rows, order):
    """The same outputs with columns, class names and label numbers in another order."""
    number = np.argsort(order)
    return replace(
        rows, classes=tuple(CLASSES[k] for k in order), logits=rows.logits[:, order], labels=number[rows.labels]
    )


def test_rows_are_matched_by_id_and_columns_by_name():
    a, b = member(1), member(2)
    expected = align({"a": [a], "b": [b]}, CLASSES)
    found = align({"b": [permuted_classes(shuffled(b, 5), [2, 0, 1])], "a": [shuffled(a, 6)]}, CLASSES)
    assert found.members == ("a", "b")
    assert np.array_equal(found.logits, expected.logits)
    assert np.array_equal(found.labels, expected.labels)
    assert np.array_equal(found.sample_ids, expected.sample_ids)


def test_equal_ids_of_two_splits_are_two_rows():
    rows = align({"a": [member(1), member(2, split="train")]}, CLASSES)
    assert len(rows.labels) == 40
    assert set(rows.split.tolist()) == {"train", "val"}


def test_only_shared_rows_are_kept_and_the_rest_is_told(caplog):
    few = member(2, ids=tuple(f"ant/{n}.png" for n in range(5, 20)))
    few = replace(few, labels=member(1).labels[5:])
    with caplog.at_level("WARNING", logger="disease_pipeline"):
        import logging

        logging.getLogger("disease_pipeline").addHandler(caplog.handler)
        rows = align({"a": [member(1)], "b": [few]}, CLASSES)
        logging.getLogger("disease_pipeline").removeHandler(caplog.handler)
    assert len(rows.labels) == 15
    assert "ant/5.png" in rows.sample_ids.tolist()
    assert "a: 5 of 20 rows are not shared" in caplog.text


def spoil(rows, **changes):
    return replace(rows, **changes)


def with_nan(rows):
    logits = rows.logits.copy()
    logits[7, 1] = np.nan
    return spoil(rows, logits=logits)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (with_nan(member(2)), r"member b: 1 row\(s\) with NaN or infinity, first ant/7.png"),
        (spoil(member(2), labels=(member(2).labels + 1) % 3), r"members a and b: 20 label\(s\) disagree"),
        (
            spoil(member(2), sample_ids=np.array(["ant/0.png"] * 20)),
            "member b: the sample id val/ant/0.png occurs twice",
        ),
        (spoil(member(2), classes=("ant", "bee", "dog")), "member b: classes ant, bee, dog; expected ant, bee, cat"),
        (spoil(member(2), split="test"), "no row in common"),
    ],
)
def test_members_that_do_not_fit_are_named(broken, words):
    with pytest.raises(UserError, match=words):
        align({"a": [member(1)], "b": [broken]}, CLASSES)


def unlabelled(rows, kept=()):
    return replace(rows, labels=np.where(np.isin(np.arange(20), kept), rows.labels, UNKNOWN))


def test_a_label_that_one_member_does_not_know_comes_from_another():
    parts = {"a": [unlabelled(member(1), kept=[0])], "b": [unlabelled(permuted_classes(member(2), [2, 0, 1]), [1, 2])]}
    rows = align(parts, CLASSES)
    known = np.isin(rows.sample_ids, [f"ant/{n}.png" for n in range(3)])
    order = np.argsort(member(1).sample_ids)
    assert np.array_equal(rows.labels, np.where(known, member(1).labels[order], UNKNOWN))
    wrong = replace(member(3), labels=(member(3).labels + 1) % 3)
    with pytest.raises(UserError, match=r"members a and c: 1 label\(s\) disagree, first ant/0.png"):
        align(parts | {"c": [replace(wrong, labels=np.where(np.arange(20) < 1, wrong.labels, UNKNOWN))]}, CLASSES)


def test_a_row_is_out_of_sample_where_it_is_for_every_member():
    first, second = member(1), member(2)
    first.out_of_sample[:3], second.out_of_sample[2:5] = False, False
    rows = align({"a": [first], "b": [shuffled(second, 3)], "c": [member(3)]}, CLASSES)
    seen = {sample_id for sample_id, unseen in zip(rows.sample_ids, rows.out_of_sample, strict=True) if not unseen}
    assert seen == {f"ant/{n}.png" for n in range(5)}


def test_the_id_that_occurs_twice_is_named_and_minus_one_is_no_label():
    ids = ("ant/0.png", "ant/1.png", "ant/2.png", "ant/1.png")
    with pytest.raises(UserError, match=r"member a: the sample id val/ant/1\.png occurs twice"):
        align({"a": [member(1, ids=ids)]}, CLASSES)
    known = member(1)
    unknown = replace(member(2), labels=np.full(20, -1))
    alone, both = align({"b": [known]}, CLASSES), align({"a": [unknown], "b": [known]}, CLASSES)
    assert np.array_equal(both.labels, alone.labels)


def test_samples_are_gathered_from_whoever_has_them():
    one = unlabelled(member(1, ids=tuple(f"ant/{n}.png" for n in range(20))), kept=[3, 12])
    other = unlabelled(member(2, ids=tuple(f"ant/{n}.png" for n in range(10, 30))), kept=[0, 1])
    samples = collect_samples("val", CLASSES, {"b": [other], "a": [one], "c": []})
    assert samples.sample_ids == tuple(sorted(f"ant/{n}.png" for n in range(30)))
    label = dict(zip(samples.sample_ids, samples.labels.tolist(), strict=True))
    assert [label.pop("ant/3.png"), label.pop("ant/12.png")] == one.labels[[3, 12]].tolist()
    assert [label.pop("ant/10.png"), label.pop("ant/11.png")] == other.labels[:2].tolist()
    assert set(label.values()) == {UNKNOWN}
    liar = replace(one, labels=(one.labels + 1) % 3)
    with pytest.raises(UserError, match=r"members a and d: 2 label\(s\) of val disagree, first ant/12.png: \w+ for a"):
        collect_samples("val", CLASSES, {"d": [liar], "a": [one]})


def test_embeddings_come_in_the_order_of_the_rows_and_only_where_all_have_them():
    a, b = member(1), member(2)
    a = replace(a, embeddings=a.logits[:, :2] * 2)
    b = replace(b, embeddings=b.logits * 3)
    order = np.random.default_rng(5).permutation(20)
    mixed = replace(
        b, **{key: getattr(b, key)[order] for key in ("sample_ids", "labels", "logits", "out_of_sample", "embeddings")}
    )
    found = align({"b": [mixed], "a": [a]}, CLASSES)
    assert isinstance(found.outputs, MemberOutputs)
    assert np.array_equal(found.embeddings[0], found.logits[0][:, :2] * 2)
    assert np.array_equal(found.embeddings[1], found.logits[1] * 3)
    some = found.take(np.array([4, 0]))
    assert np.array_equal(some.embeddings[1], some.logits[1] * 3)
    assert align({"a": [a], "b": [member(2)]}, CLASSES).embeddings is None
    assert align({"a": [member(1)]}, CLASSES).outputs.shape == (1, 20, 3)


@pytest.mark.parametrize(
    ("key", "members", "rows"),
    [
        (np.array([2, 0]), [2, 0], range(6)),
        (slice(None, None, -1), [2, 1, 0], range(6)),
        ((slice(None), np.array([True, False] * 3)), [0, 1, 2], [0, 2, 4]),
        ((np.array([False, True, False]), slice(1, 3)), [1], [1, 2]),
    ],
)
def test_outputs_are_indexed_as_logits_are(key, members, rows):
    logits = np.arange(3 * 6 * 2, dtype=np.float32).reshape(3, 6, 2)
    outputs = MemberOutputs(logits, tuple(np.full((6, place + 1), place) + np.arange(6)[:, None] for place in range(3)))
    found = outputs[key]
    assert found.shape == (len(members), len(rows), 2)
    assert np.array_equal(found.logits, logits[members][:, list(rows)])
    for own, place in zip(found.embeddings, members, strict=True):
        assert np.array_equal(own, outputs.embeddings[place][list(rows)])


@pytest.mark.parametrize("chosen", [np.array([3, 0]), np.arange(20) % 2 == 1])
def test_rows_that_are_taken_keep_their_folds_and_embeddings(chosen):
    whole = replace(member(1), fold=np.arange(20) % 5, embeddings=np.arange(40.0).reshape(20, 2))
    found = whole.take(chosen)
    for name in ("sample_ids", "labels", "logits", "out_of_sample", "embeddings", "fold"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name)[chosen])
    bare = member(1).take(chosen)
    assert (bare.fold, bare.embeddings) == (None, None)
