"""Reading the file: shipped configurations, sections that are off, overrides, and every mistake answered at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils.core.config import SPECIFIED, Config, require_enabled
from utils.core.config_file import MOST_BYTES, MOST_VALUES, find_config, load_config, read_provenance
from utils.core.errors import ConfigError, UserError

PROJECT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((PROJECT / "configs").glob("*.yaml"))
QUICK = b"""\
backbones:
  include:
    - CustomConvNeXt
    - CustomViTHybrid
    - CustomSwinTransformer
runs:
  score_ensemble:
    enable: true
    methods: [soft_voting, hard_voting]
"""
SWITCHES = [
    *(f"runs.{name}" for name in ("score_ensemble", "model_soup", "snapshot_ensemble", "stacking", "fusion", "moe")),
    *("runs.meta_fuser", "pruning", "distillation", "exports"),
]


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes text or bytes to `x.yaml` in the working directory and returns its path as a user would type it."""
    monkeypatch.chdir(tmp_path)

    def write(content: str | bytes) -> Path:
        Path("x.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
        return Path("x.yaml")

    return write


def _problems(path: Path, *overrides: str, **options) -> list[str]:
    """The lines below the header of the one error that the file must give."""
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides=overrides, **options)
    header, *lines = str(error.value).split("\n")
    if not lines:  # one problem stands on the first line
        assert header.startswith(f"{path}: ")
        return [header.removeprefix(f"{path}: ")]
    assert header == f"{path}: {len(lines)} problem(s)"
    assert all(line.startswith("  ") and line[2] != " " for line in lines)
    return [line[2:] for line in lines]


def _on(config: Config) -> list[str]:
    return [place for place in SWITCHES if config.at(f"{place}.enable")]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_file_loads(path):
    config = load_config(path)
    assert config.source == path


def test_the_full_file_is_the_default_configuration():
    assert load_config(PROJECT / "configs/ensemble_config.yaml").as_dict() == Config().as_dict()


def test_the_quick_file_is_what_the_quick_start_writes():
    assert (PROJECT / "configs/quick_ensemble.yaml").read_bytes() == QUICK


def test_the_quick_file_builds_two_ensembles_and_nothing_else():
    config = load_config(PROJECT / "configs/quick_ensemble.yaml")
    assert _on(config) == ["runs.score_ensemble", "exports"]
    assert config.runs.score_ensemble.methods == ("soft_voting", "hard_voting")
    assert config.backbones.selected == ("CustomConvNeXt", "CustomViTHybrid", "CustomSwinTransformer")
    assert config.exports == Config().exports


@pytest.mark.parametrize("name", ["votes", "digits_demo"])
def test_the_files_for_digits_are_small_and_honour_the_machine(name):
    config = load_config(PROJECT / f"configs/{name}.yaml")
    assert (config.device, config.seed) == ("auto", 42)
    assert (config.dataset.img_size, config.dataset.batch_size, config.dataset.num_workers) == (32, 64, 0)
    of_demo = {"runs.model_soup", "runs.stacking", "runs.fusion", "runs.moe", "runs.meta_fuser"}
    of_demo |= {"pruning", "distillation", "exports"}
    more = of_demo if name == "digits_demo" else set()
    assert set(_on(config)) == {"runs.score_ensemble"} | more


DEFAULT_ON = _on(Config())


@pytest.mark.parametrize(
    ("text", "on"),
    [
        ("seed: 1", DEFAULT_ON),
        ("runs: {}", DEFAULT_ON),
        ("exports: {enable: false}", [place for place in DEFAULT_ON if place != "exports"]),
        ("runs: {fusion: {end_to_end: true}}", ["runs.fusion", "exports"]),
        ("runs: {moe: {top_k: 1}}", ["exports"]),
        ("runs: {moe: {enable: true}}", ["runs.moe", "exports"]),
        ("runs: {stacking: {enable: false}}\npruning: {target_size: 3}", ["pruning", "exports"]),
        ("runs: {stacking: {}}\ndistillation: {}", ["runs.stacking", "distillation", "exports"]),
    ],
)
def test_which_sections_are_on(file, text, on):
    assert _on(load_config(file(text))) == on


def test_an_override_switches_its_own_section_alone(file):
    path = file(QUICK)
    assert _on(load_config(path, overrides=["runs.moe.enable=true"])) == ["runs.score_ensemble", "runs.moe", "exports"]
    assert _on(load_config(path, overrides=["runs.moe={enable: true}"])) == [
        "runs.score_ensemble",
        "runs.moe",
        "exports",
    ]
    assert _on(load_config(path, overrides=["runs={moe: {enable: yes}}"])) == [
        "runs.score_ensemble",
        "runs.moe",
        "exports",
    ]
    assert _on(load_config(path, overrides=["runs.fusion.end_to_end=true"])) == ["runs.score_ensemble", "exports"]
    assert _on(load_config(file("seed: 1"), overrides=["runs.moe.enable=true"])) == sorted(
        [*DEFAULT_ON, "runs.moe"], key=SWITCHES.index
    )


def test_an_override_answers_require_enabled(file):
    path = file(QUICK)
    with pytest.raises(
        UserError, match=r"x\.yaml: runs\.fusion is disabled; run again with --set runs\.fusion\.enable=true"
    ):
        require_enabled(load_config(path), "runs.fusion")
    require_enabled(load_config(path, overrides=["runs.fusion.enable=true"]), "runs.fusion")


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("seed=7", "seed", 7),
        (" seed = 7", "seed", 7),
        ("distillation.lr=1e-3", "distillation.lr", 0.001),
        ("backbones.include=[a, b]", "backbones.include", ("a", "b")),
        ("device=cuda:1", "device", "cuda:1"),
        ('project.version="2.0"', "project.version", "2.0"),
        ("project.version=2026-01-02", "project.version", "2026-01-02"),
        ("dataset.group_regex=^(a=b)", "dataset.group_regex", "^(a=b)"),
        ("pruning.cost_budget.max_size_mb=null", "pruning.cost_budget.max_size_mb", None),
        ("pruning.cost_budget={max_size_mb: 5}", "pruning.cost_budget.max_latency_ms", 100.0),
    ],
)
def test_an_override_is_read_as_yaml(file, override, place, value):
    assert load_config(file("seed: 1"), overrides=[override]).at(place) == value


def test_the_last_override_of_a_place_wins_over_the_file(file):
    config = load_config(file("seed: wrong"), overrides=["seed=also wrong", "seed=3"])
    assert config.seed == 3


def test_names_of_the_family_tables_are_accepted_and_listed(file):
    path = file("runs: {score_ensemble: {methods: [a_method, greedy_selectoin]}}")
    names = {"runs.score_ensemble.methods": {"soft_voting": 1, "greedy_selection": 2, "a_method": 3}}
    assert _problems(path, names=names) == [
        "runs.score_ensemble.methods.1: found 'greedy_selectoin'; did you mean 'greedy_selection'? Allowed: "
        "soft_voting, hard_voting, logit_averaging, weighted, greedy_selection, soft_voting_calibrated, "
        "logit_averaging_calibrated, best_single_calibrated, a_method"
    ]
    assert len(_problems(path)) == 2


def test_names_for_a_place_that_is_never_checked_are_a_bug(file):
    with pytest.raises(KeyError, match="seed"):
        load_config(file("seed: 1"), names={"seed": ["a"]})


def test_the_ensemble_ending_may_be_written(file):
    config = load_config(file("runs: {score_ensemble: {methods: [soft_voting_ensemble, weighted]}}"))
    assert config.runs.score_ensemble.methods == ("soft_voting", "weighted")
    doubled = file("runs: {score_ensemble: {methods: [soft_voting, soft_voting_ensemble]}}")
    assert _problems(doubled) == ["runs.score_ensemble.methods.1: found 'soft_voting'; expected each name once"]


@pytest.mark.parametrize("place", sorted(SPECIFIED))
def test_every_specified_name_is_accepted_and_any_other_refused(file, place):
    path = file("seed: 1")
    many = place != "runs.meta_fuser.fuser_type"
    for name in SPECIFIED[place]:
        load_config(path, overrides=[f"{place}={[name] if many else name}"])
    wrong = f"{place}={['x' + SPECIFIED[place][0]] if many else 'x' + SPECIFIED[place][0]}"
    (problem,) = _problems(path, wrong)
    assert f"? Allowed: {', '.join(SPECIFIED[place])}" in problem


MISTAKES = [
    ("seed: abc", "seed: found 'abc'; expected a whole number from 0 to 4294967295"),
    ("seed: true", "seed: found true; expected a whole number"),
    ("seed: 1.5", "seed: found 1.5; expected a whole number"),
    ("distillation: {lr: .inf}", "distillation.lr: found inf; expected a number above 0"),
    ("seed:", "seed: found nothing (null); expected a whole number"),
    ("dataset: {batch_size: 0}", "dataset.batch_size: found 0; expected a whole number of at least 1"),
    ("dataset: {img_size: 0224}", "dataset.img_size: found 0224, which YAML takes for a number in base 8 or 60"),
    ("dataset: {img_size: 3:44}", "dataset.img_size: found 3:44, which YAML takes for a number in base 8 or 60"),
    ("dataset: {img_size: 0b_}", "dataset.img_size: found '0b_'; expected int (line 1, column 21)"),
    ("dataset: {group_regex: abc}", "dataset.group_regex: found 'abc'; expected null or a regex with exactly"),
    ("device: gpu", "device: found 'gpu'; expected cuda, cuda:N, cpu or auto"),
    ("project: {version: 1.0}", "project.version: found 1.0; expected text, in quotes"),
    ("exports: {enable: 'true'}", "exports.enable: found 'true'; expected true or false, without quotes"),
    ("exports: {formats: [onxx]}", "exports.formats.0: found 'onxx'; did you mean 'onnx'? Allowed: state_dict"),
    ("exports: {formats: onxx}", "exports.formats: found 'onxx'; expected a list such as [a, b], or [] for none"),
    ("backbones: {include: CustomViT}", "backbones.include: found 'CustomViT'; expected a list such as [a, b], or all"),
    ("backbones: {include: [a, a]}", "backbones.include.1: found 'a'; expected each name once"),
    ("backbones: {include: [5]}", "backbones.include.0: found 5; expected a name"),
    ("backbones: {include: [a], exclude: [a]}", "backbones.exclude: found ['a']; expected at least one of the 1 names"),
    ("runs: 5", "runs: found 5; expected a section with any of the keys score_ensemble, model_soup"),
    ("runs: {moe: }", "runs.moe: found nothing (null); expected a section with any of the keys enable, num_experts"),
    ("runs: {moe: {enabel: true}}", "runs.moe.enabel: unknown key; did you mean 'enable'? Allowed: enable, num"),
    ("moe: {enable: true}", "moe: unknown key; did you mean 'runs.moe'? Allowed here: project, device"),
    ("runs.moe.enable: true", "runs.moe.enable: unknown key; allowed: project"),
    ("runs: {moe: {top_k: 6}}", "runs.moe.top_k: found 6; expected at most num_experts, which is 5"),
    ("runs: {stacking: {mlp_config: {hidden_dims: [8, 0]}}}", "runs.stacking.mlp_config.hidden_dims.1: found 0;"),
    ("runs: {stacking: {mlp_config: {hidden_dims: 8}}}", "runs.stacking.mlp_config.hidden_dims: found 8; expected"),
    ("runs: {score_ensemble: {optimization_metric: acuracy}}", "runs.score_ensemble.optimization_metric: "
     "found 'acuracy'; did you mean 'accuracy'? Allowed: f1_macro, accuracy, log_loss, brier"),
    ("runs: {score_ensemble: {methods: []}}", "runs.score_ensemble.methods: found []; expected at least one name, or"),
    ("runs: {meta_fuser: {fuser_type: xbg}}", "runs.meta_fuser.fuser_type: found 'xbg'; did you mean 'xgb'? Allow"),
    ("runs: {meta_fuser: {input_ensembles: [meta_fuser]}}", "runs.meta_fuser.input_ensembles: found ['meta_fuser']"),
    ("runs: {meta_fuser: {input_ensembles: every}}", "runs.meta_fuser.input_ensembles: found 'every'; expected a list "
     "such as [a, b], or all"),
    ("distillation: {temperature: -4}", "distillation.temperature: found -4; expected a number above 0"),
    ("distillation: {student: ../x}", "distillation.student: found '../x'; expected a name, without slashes"),
    ("pruning: {cost_budget: {max_size_mb: 0}}", "pruning.cost_budget.max_size_mb: found 0; expected a number above 0"),
    ("seed: 1\nseed: 2", "seed: found again; expected once, and line 1 has it (line 2, column 1)"),
    ("runs:\n  moe: {top_k: 1,\n    top_k: 1}", "runs.moe.top_k: found again; expected once, and line 2 has it"),
    ("on: 1", "on: found a key that is not text; expected a name, in quotes if necessary (line 1, column 1)"),
    ("? [a]\n: 1", "?: found a key that is not text"),
    ("<<: {seed: 1}", "<<: unknown key; allowed: project"),
    ("seed: !!python/name:os.system ''", "seed: found the tag !!python/name:os.system; expected a plain value"),
    ("seed: !secret 1", "seed: found the tag !secret; expected a plain value (line 1, column 7)"),
    ("exports: !!set {a}", "exports: found the tag !!set; expected a plain value (line 1, column 10)"),
    ("seed: !!bool 7", "seed: found '7'; expected bool"),
    (f"seed: {'9' * 5000}", "seed: found 5000 characters; expected at most 1000"),
    ("", "line 1, column 1: found an empty file; expected sections: project, device"),
    ("- 1", "line 1, column 1: found [1]; expected sections: project"),
    ("just text", "line 1, column 1: found 'just text'; expected sections: project"),
    ("seed: 1\n\tdevice: cpu", "line 2, column 1: found a tab; expected spaces"),
    ("a: [1\nb", "line 2, column 2: expected YAML: while parsing a flow sequence, expected ',' or ']'"),
    ("seed: 1\n---\nseed: 2", "line 2, column 1: expected YAML: expected a single document"),
    ("seed: *nowhere", "line 1, column 7: expected YAML: found undefined alias 'nowhere'"),
    (b"seed: 1\ndevice: \xff", "line 2, column 9: found the byte 0xff; expected UTF-8 text"),
    ("seed: 1".encode("utf-16"), "line 1, column 1: found the byte 0xff; expected UTF-8 text"),
    ("seed: 1\ndevice: \x01", "line 2, column 9: found a character that no text file has"),
    (b"#" * (MOST_BYTES + 1), f"found more than {MOST_BYTES} bytes; expected a short YAML file"),
    ("a: &a [*a]", "line 1, column 4: expected YAML: at most 20 levels, and no alias inside its own value"),
    ("[" * 5000, "line 1, column 21: expected YAML: at most 20 levels"),
    (f"seed: [{'1,' * MOST_VALUES}]", "expected YAML: at most 10000 values"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), MISTAKES, ids=[words[:50] for _, words in MISTAKES])
def test_a_mistake_is_answered_with_place_found_and_expected(file, text, words):
    (problem,) = _problems(file(text))
    assert words in problem
    assert "Input should" not in problem


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("runs.moe.enabel=true", "--set runs.moe.enabel=true: unknown key; did you mean 'enable'? Allowed: enable, "
         "num_experts, top_k, gating_hidden_dim, epochs"),
        ("moe.enable=true", "--set moe.enable=true: moe: unknown key; did you mean 'runs.moe'? Allowed here: "
         "project, device, seed, dataset, backbones, exports, runs, pruning, tta, distillation, cache"),
        ("runs.moe.epochs=0", "--set runs.moe.epochs=0: found 0; expected a whole number of at least 1"),
        ("runs.moe.epochs=", "--set runs.moe.epochs=: found nothing (null); expected a whole number of at least 1"),
        ("runs.moe={epochs: 0}", "--set runs.moe={epochs: 0}: runs.moe.epochs: found 0; expected a whole number"),
        ("runs.moe={epoch: 1}", "--set runs.moe={epoch: 1}: runs.moe.epoch: unknown key; did you mean 'epochs'"),
        ("runs.moe=5", "--set runs.moe=5: found 5; expected a section with any of the keys enable"),
        ("backbones.include=[a, a]", "--set backbones.include=[a, a]: backbones.include.1: found 'a'; expected each"),
        ("backbones.include.0=a", "--set backbones.include.0=a: backbones.include holds a value, not a section"),
        ("runs.fusion.fusion_methods=[atention]", "--set runs.fusion.fusion_methods=[atention]: "
         "runs.fusion.fusion_methods.0: found 'atention'; did you mean 'attention'? Allowed: concat_mlp, "
         "attention, bilinear, cca_aligned"),
        ("seed", "--set seed: expected KEY=VALUE, such as --set runs.moe.enable=true"),
        ("=1", "--set =1: expected KEY=VALUE"),
        ("runs..moe=1", "--set runs..moe=1: expected KEY=VALUE"),
        ("seed=[1", "--set seed=[1: line 1, column 3: expected YAML"),
        ("runs.moe={top_k: 1, top_k: 2}", "--set runs.moe={top_k: 1, top_k: 2}: top_k: found again; expected once"),
        ("seed=!x 1", "--set seed=!x 1: found the tag !x; expected a plain value"),
    ],
)  # fmt: skip
def test_a_bad_override_is_named_as_it_was_typed(file, override, words):
    (problem,) = _problems(file("seed: 1"), override)
    assert problem.startswith(words)


def test_all_problems_of_file_and_overrides_come_at_once(file):
    text = """\
runs:
  moe: {top_k: 6, epochs: abc}
  score_ensemble:
    methods: [soft_votign, hard_voting, hard_voting, 3]
    enable: yes
    enable: no
  fusion:
backbons: {}
seed: -1
"""
    found = _problems(file(text), "device=gpu", "runs.mo.x=1", "distillation.alpha=2", "nonsense")
    expected = [
        "runs.score_ensemble.enable: found again",
        "--set runs.mo.x=1: runs.mo: unknown key",
        "--set nonsense: expected KEY=VALUE",
        "--set device=gpu: found 'gpu'",
        "seed: found -1",
        "runs.score_ensemble.methods.3: found 3",
        "runs.score_ensemble.methods.2: found 'hard_voting'; expected each name once",
        "runs.fusion: found nothing (null)",
        "runs.moe.top_k: found 6; expected at most num_experts",
        "runs.moe.epochs: found 'abc'",
        "--set distillation.alpha=2: found 2",
        "backbons: unknown key; did you mean 'backbones'? Allowed: project, device",
        "runs.score_ensemble.methods.0: found 'soft_votign'",
    ]
    assert [line[: len(start)] for line, start in zip(found, expected, strict=True)] == expected


def test_overrides_are_judged_beside_a_file_that_cannot_be_read(file):
    found = _problems(file("a: [1"), "seed=x", "runs.moe.num_experts=1", "runs.mo=1")
    assert [line.partition(";")[0] for line in found] == [
        "line 1, column 6: expected YAML: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'",
        "--set runs.mo=1: unknown key",
        "--set seed=x: found 'x'",
    ]


def test_an_override_inside_what_the_file_fills_with_a_value_blames_the_file(file):
    (problem,) = _problems(file("runs: 5"), "runs.moe.enable=true")
    assert problem.startswith("runs: found 5; expected a section")


def test_short_aliases_are_read_and_an_alias_bomb_is_refused(file):
    config = load_config(file("distillation: {epochs: &few 3}\nruns: {moe: {epochs: *few}}"))
    assert config.runs.moe.epochs == config.distillation.epochs == 3
    bomb = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    bomb += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 15)]
    (problem,) = _problems(file("\n".join(bomb)))
    assert "at most 10000 values, aliases written out" in problem


def test_a_file_of_another_kind_fills_no_screens(file):
    with pytest.raises(ConfigError) as error:
        load_config(file("\n".join(f"key{number}: 1" for number in range(150))))
    assert len(str(error.value).split("\n")) == 102
    assert str(error.value).startswith("x.yaml: 150 problem(s)\n  key0: unknown key")
    assert str(error.value).endswith("\n  ... and 50 more")


def test_windows_files_are_read(file):
    assert load_config(file("\ufeffseed: 5\r\ndevice: cpu\r\n")).seed == 5


def test_a_file_that_cannot_be_opened_is_a_configuration_error(tmp_path):
    assert _problems(tmp_path / "missing.yaml") == ["cannot be read: No such file or directory"]


def test_find_looks_in_the_working_directory_first_then_in_the_project(tmp_path, monkeypatch):
    project, here = tmp_path / "project", tmp_path / "here"
    for folder in (project, here):
        (folder / "configs").mkdir(parents=True)
        (folder / "configs/both.yaml").touch()
    (project / "configs/one.yaml").touch()
    monkeypatch.chdir(here)
    assert find_config("configs/both.yaml", project) == Path("configs/both.yaml")
    assert find_config("configs/one.yaml", project) == project / "configs/one.yaml"
    assert find_config(str(here / "configs/both.yaml"), project) == here / "configs/both.yaml"


def test_find_says_where_it_looked_and_what_is_near(tmp_path, monkeypatch):
    project = tmp_path / "project"
    (project / "configs").mkdir(parents=True)
    for name in ("ensemble_config.yaml", "quick_ensemble.yml", "notes.txt"):
        (project / "configs" / name).touch()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(ConfigError) as error:
        find_config("configs/ensemble_confg.yaml", project)
    assert str(error.value) == (
        "configs/ensemble_confg.yaml: no such file; did you mean 'configs/ensemble_config.yaml'? Looked for "
        f"{tmp_path / 'configs/ensemble_confg.yaml'} and {project / 'configs/ensemble_confg.yaml'}; there are "
        "configs/ensemble_config.yaml, configs/quick_ensemble.yml"
    )
    with pytest.raises(ConfigError, match=r"did you mean 'mine\.yaml'\? .* there are .*mine\.yaml"):
        find_config("mine.yml", project)
    with pytest.raises(ConfigError, match="configs: is a folder; expected a file"):
        find_config("configs", project)
    with pytest.raises(ConfigError, match=f"Looked for {tmp_path / 'absent.yaml'}; there are"):
        find_config(str(tmp_path / "absent.yaml"), project)


def test_find_lists_few_of_many_files(tmp_path, monkeypatch):
    for number in range(30):
        (tmp_path / f"{number}.yaml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="there are no YAML files"):
        find_config("x/y", tmp_path)
    with pytest.raises(ConfigError, match=r"there are ([0-9]+\.yaml, ){10}\.\.\.$"):
        find_config("none", tmp_path)


def test_what_was_read_of_a_file_belongs_to_the_caller(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("seed: 1\nprovenance: {file: a.yaml, keys: {seed: file}}\n")
    read_provenance(path)["keys"]["seed"] = "changed"
    assert read_provenance(path) == {"file": "a.yaml", "keys": {"seed": "file"}}
