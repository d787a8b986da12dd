"""Fitting one combiner: which rows, what is computed, what is saved, what the digest covers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from given_predictions import CONFIG, NAMES, empty_workspace, opened, take_in, write

from utils.building import build_commands, ensembles, fitting
from utils.building.baselines import Baselines
from utils.core.config_file import load_config
from utils.core.errors import LeakageError
from utils.ensemble_methods import COMBINERS
from utils.predictions.store import Store


def imported(tmp_path, stems=("oof", "val", "test")) -> Store:
    workspace = empty_workspace(tmp_path / "base")
    take_in(workspace, write(tmp_path / "given", stems=stems))
    return opened(workspace)


def configured(*overrides):
    return load_config(CONFIG.source, overrides=list(overrides))


def members(store: Store):
    return [store.catalog.members[name] for name in sorted(store.catalog.members)]


def test_rows_of_a_kind_are_those_of_one_split_and_keep_their_folds(tmp_path):
    store = imported(tmp_path)
    rows = fitting.out_of_sample_rows(store, members(store))
    assert sorted(set(rows.rows.split.tolist())) == ["train", "val"]
    for kind, split in (("oof", "train"), ("val", "val")):
        chosen = fitting.rows_of_kind(store, members(store), rows, kind)
        inside = rows.rows.split == split
        assert set(chosen.rows.split.tolist()) == {split}
        np.testing.assert_array_equal(chosen.fold, rows.fold[inside])
        np.testing.assert_array_equal(chosen.rows.logits, rows.rows.logits[:, inside])
    assert fitting.rows_of_kind(store, members(store), rows, "honest") is rows


def test_rows_that_no_member_has_are_refused_with_the_remedy(tmp_path):
    store = imported(tmp_path, stems=("val", "test"))
    rows = fitting.out_of_sample_rows(store, members(store))
    with pytest.raises(LeakageError, match=r"fit_rows: oof .*oof\.npz.*or set fit_rows to honest"):
        fitting.rows_of_kind(store, members(store), rows, "oof")


def test_fit_touches_no_file_and_compares_with_the_baselines(tmp_path):
    store = imported(tmp_path)
    rows = fitting.out_of_sample_rows(store, members(store))
    facts = fitting.member_facts(store, members(store))
    combiner = COMBINERS["soft_voting"].configured(CONFIG, facts)
    losses = {"soft_voting": np.full(len(rows.fold), 9.0), "best_single": np.full(len(rows.fold), 9.5)}
    before = sorted(store.workspace.base.rglob("*"))
    fitted = fitting.fit(combiner, rows, baselines=Baselines(losses, "bayes"))
    assert sorted(store.workspace.base.rglob("*")) == before
    assert fitted.entries["beats_guards"]
    assert fitted.entries["crossfit"]["n"] == len(rows.fold) == len(fitted.crossfit.labels)
    assert fitted.used.tolist() == [True, True, True]


def test_build_saves_what_fit_computed_and_the_digest_of_its_inputs(tmp_path):
    store = imported(tmp_path)
    rows = fitting.out_of_sample_rows(store, members(store))
    facts = fitting.member_facts(store, members(store))
    combiner = COMBINERS["soft_voting"].configured(CONFIG, facts)
    fitting.save(
        store,
        "one",
        "soft_voting",
        fitting.fit(combiner, rows),
        members(store),
        rows,
        extra_inputs={"k": 1},
        notes={"note": 2},
    )
    record = json.loads((store.workspace.ensemble("one") / "ensemble.json").read_text())
    assert (record["note"], record["depends_on"]) == (2, {"k": 1})
    expected = fitting.inputs_digest(CONFIG, store, members(store), "soft_voting", extra_inputs={"k": 1})
    assert record["inputs_digest"] == expected
    assert expected != fitting.inputs_digest(CONFIG, store, members(store), "soft_voting")
    saved = ensembles.load_crossfit(store.workspace, "one")
    assert fitting.scores(saved) == record["crossfit"]


def test_records_of_equal_inputs_are_equal_however_the_members_were_selected(tmp_path):
    """An ensemble that is kept has the record of one that is built anew, though `backbones` has changed since."""
    named = configured(f"backbones.include=[{','.join(NAMES)}]")
    records = []
    for config, folder in ((CONFIG, "one"), (named, "other")):
        workspace = empty_workspace(tmp_path / folder)
        take_in(workspace, write(tmp_path / f"given-{folder}"))
        build_commands.build_ensemble(config, workspace)
        records.append((workspace.ensemble("soft_voting_ensemble") / "ensemble.json").read_text())
    assert records[0] == records[1]


def test_other_settings_of_the_combiner_have_another_digest(tmp_path):
    digests = set()
    for number, value in enumerate(("f1_macro", "log_loss")):
        workspace = empty_workspace(tmp_path / str(number))
        take_in(workspace, write(tmp_path / f"given-{number}"))
        methods = "runs.score_ensemble.methods=[weighted]"
        build_commands.build_ensemble(
            configured(methods, f"runs.score_ensemble.optimization_metric={value}"), workspace
        )
        record = json.loads((workspace.ensemble("weighted_ensemble") / "ensemble.json").read_text())
        digests.add(record["config_digest"])
    assert len(digests) == 2


def test_facts_of_imported_members_have_no_size_and_measured_latencies_alone(tmp_path):
    store = imported(tmp_path)
    facts = fitting.member_facts(store, members(store), {"bayes": 2.5})
    assert facts.names == ("bayes", "forest", "linear")
    assert facts.latency_ms[0] == 2.5
    assert np.isnan(facts.latency_ms[1:]).all()
    assert np.isnan(facts.size_mb).all()
