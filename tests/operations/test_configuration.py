"""`config`: what it prints is a configuration, and what it says of a key is so."""

from __future__ import annotations

import json
import runpy

import pytest
import yaml
from conftest import PROJECT
from in_process import run

from utils.core import config_schema
from utils.core.config import Config
from utils.core.config_file import load_config
from utils.operations import configuration

SHIPPED = sorted((PROJECT / "configs").glob("*.yaml"))
QUICK = PROJECT / "configs" / "quick_ensemble.yaml"  # byte by byte what the specification's quick start writes


def test_every_key_has_a_meaning_and_every_value_a_range():
    keys = list(config_schema.iterate_keys())
    assert [key.name for key in keys if not key.meaning.endswith(".")] == []
    unbounded = {key.name for key in keys if not key.keys and not key.range}
    assert unbounded == {"backbones.exclude"}


def test_the_printed_configuration_is_one_with_the_same_values(tmp_path):
    done = run("config", "--set", "runs.moe.epochs=7", "--set", "project.name='a: #b'", workspace=tmp_path)
    assert done.code == 0, done.stderr
    assert "runs.moe.epochs: 30 -> 7" not in done.stdout  # nothing was remembered before
    done = run("config", workspace=tmp_path)
    (tmp_path / "again.yaml").write_text(done.stdout)
    again = load_config(tmp_path / "again.yaml")
    assert again.as_dict() == load_config(tmp_path / "ensembles" / "config.yaml").as_dict()
    assert again.runs.moe.epochs == 7
    assert again.project.name == "a: #b"
    lines = done.stdout.splitlines()
    assert "    epochs: 7  # --set runs.moe.epochs=7" in lines
    assert "  quota_gb: 20.0  # default" in lines
    assert "seed: 42  # file" in lines


def test_set_changes_what_is_remembered_and_says_what(tmp_path):
    assert run("config", "--set", "seed=1", workspace=tmp_path).code == 0
    done = run("config", "--set", "seed=2", "--json", workspace=tmp_path)
    assert done.document["changed"] == ["seed: 1 -> 2"]
    assert run("config", "--json", workspace=tmp_path).document["values"]["seed"] == 2
    assert run("config", "--set", "seed=no", workspace=tmp_path).code == 2
    assert run("config", "--json", workspace=tmp_path).document["values"]["seed"] == 2


def test_asking_writes_nothing(tmp_path):
    assert run("config", workspace=tmp_path).code == 0
    assert run("config", "--explain", "seed", workspace=tmp_path).code == 0
    assert not (tmp_path / "ensembles").exists()


def test_a_key_is_explained(tmp_path):
    document = run("config", "--explain", "runs.stacking.xgb_config.max_depth", "--json").document
    assert document["affects"] == ["stacking_xgb"]
    assert (document["type"], document["default"]) == ("whole number", 6)
    assert document["range"] == "a whole number of at least 1"
    assert len(run("config", "--explain", "runs.moe", "--json").document["keys"]) == 5
    for typed, meant in {"max_dept": "max_depth", "runs.moe.topk": "runs.moe.top_k"}.items():
        done = run("config", "--explain", typed)
        assert done.code == 2
        assert meant in done.stderr


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("seed", {"every ensemble", "the ranking"}),
        ("runs.moe.epochs", {"moe"}),
        ("runs.cascade", {"cascade"}),
        ("pruning.target_size", {f"pruned_{m}" for m in Config().pruning.methods}),
        ("runs.stacking.mlp_config.epochs", {"stacking_mlp"}),
        ("distillation.alpha", {"the student"}),
        ("cache.quota_gb", set()),
        ("project.name", set()),
    ],
)
def test_what_a_key_affects(key, names):
    assert set(configuration.affected(config_schema.find(key))) == names


def test_a_starter_is_the_default_configuration_and_is_not_overwritten(tmp_path):
    path = tmp_path / "mine.yaml"
    assert run("config", "--init", path).code == 0
    assert load_config(path).as_dict() == Config().as_dict()
    first = path.read_text().splitlines()[0]
    assert (tmp_path / first.partition("$schema=")[2]).resolve() == PROJECT / "configs" / "schema.json"
    before = path.read_text()
    assert run("config", "--init", path).code == 1
    assert path.read_text() == before
    assert run("config", "--init", tmp_path / "nowhere" / "mine.yaml").code == 1


def test_the_page_and_the_schema_are_those_of_the_models():
    module = runpy.run_path(str(PROJECT / "scripts" / "configuration_page.py"))
    for path, made in (("docs/configuration.md", module["page"]()), ("configs/schema.json", module["schema"]())):
        assert (PROJECT / path).read_text() == made, f"{path}: run python scripts/configuration_page.py"


@pytest.mark.parametrize("path", [path for path in SHIPPED if path != QUICK], ids=lambda path: path.name)
def test_editors_find_the_schema_of_a_shipped_file(path):
    assert path.read_text().splitlines()[0] == "# yaml-language-server: $schema=schema.json"


def test_the_schema_accepts_the_shipped_files_and_refuses_mistakes():
    schema = json.loads(run("config", "--schema").stdout)
    for path in SHIPPED:
        assert problems(schema, schema, yaml.safe_load(path.read_text())) == [], path
    for mistake in ("seed: -1", "sed: 1", "runs: {moe: {top_k: 0}}", "exports: {formats: [onx]}", "runs: {moe: 1}"):
        assert problems(schema, schema, yaml.safe_load(mistake)), mistake


def problems(root: dict, schema: dict, value: object) -> list[str]:
    """What a value breaks of the few rules of JSON schema that this one uses; none of our packages has a validator."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        return min((problems(root, part, value) for part in schema["anyOf"]), key=len)
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    kind = schema.get("type")
    if kind == "null":
        return [] if value is None else ["not null"]
    if kind and (not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return [f"{value!r} is no {kind}"]
    if ("enum" in schema and value not in schema["enum"]) or ("const" in schema and value != schema["const"]):
        return [f"{value!r}"]
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        unknown = [key for key in value if key not in properties and schema.get("additionalProperties") is False]
        return unknown + [p for key in value if key in properties for p in problems(root, properties[key], value[key])]
    if isinstance(value, list):
        return [p for item in value for p in problems(root, schema.get("items", {}), item)]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, above = schema.get("minimum", value), schema.get("exclusiveMinimum", value - 1)
        return [] if value >= low and value > above else [f"{value}"]
    return []
