"""Archives of torch.export that would run code when torch loads them, and those that export writes."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from export import programs
from utils.exporting.program_archives import MODEL, program_problem

WEIGHTS = "data/weights/model_weights_config.json"


class Doubled(nn.Module):
    """Has a tensor of twice the batch size inside."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values, values]).sin()[: values.shape[0]]


class Touches:
    """A pickle that makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> dict[str, bytes]:
    """{record: content} of an archive as export writes it."""
    path = tmp_path_factory.mktemp("program") / "it.pt2"
    network = nn.Sequential(nn.Linear(4, 4), nn.Flatten()).eval()
    torch.export.save(programs.capture(network, (torch.zeros(2, 4),)), path)
    assert program_problem(path) is None
    with zipfile.ZipFile(path) as archive:
        return {entry.filename.partition("/")[2]: archive.read(entry) for entry in archive.infolist()}


def archive_of(records: dict[str, bytes], path: Path, folder: str = "archive/") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(folder + name, content)
    return path


def changed(name: str, change: Callable[[dict], None]) -> Callable[[dict[str, bytes], Path], None]:
    """Another JSON record in an archive."""

    def apply(records: dict[str, bytes], canary: Path) -> None:
        content = json.loads(records[name])
        change(content)
        records[name] = json.dumps(content).replace("@canary@", str(canary)).encode()

    return apply


def pickled_weight(records: dict[str, bytes], canary: Path) -> None:
    config = json.loads(records[WEIGHTS])
    for entry in config["config"].values():
        entry["use_pickle"] = True
    records[WEIGHTS] = json.dumps(config).encode()
    path = canary.with_name("weight")
    torch.save(Touches(canary), path)
    records["data/weights/weight_0"] = path.read_bytes()


def pickled_example(records: dict[str, bytes], canary: Path) -> None:
    records["data/sample_inputs/model.pt"] = pickle.dumps(Touches(canary))


def pickled_constant(records: dict[str, bytes], canary: Path) -> None:
    records["data/constants/custom_obj_0"] = pickle.dumps(Touches(canary))


def with_target(target: str) -> Callable[[dict], None]:
    return lambda program: program["graph_module"]["graph"]["nodes"][0].update(target=target)


def with_size(text: str) -> Callable[[dict], None]:
    def apply(program: dict) -> None:
        values = program["graph_module"]["graph"]["tensor_values"]
        next(iter(values.values()))["sizes"][0] = {"as_expr": {"expr_str": text, "hint": None}}

    return apply


def with_tree(program: dict) -> None:
    signature = program["graph_module"]["module_call_graph"][0]["signature"]
    signature["in_spec"] = signature["in_spec"].replace("builtins.dict", "collections.defaultdict")


HOSTILE = {
    "pickled weight": (pickled_weight, "names a pickle"),
    "pickled example": (pickled_example, "holds a pickle"),
    "pickled constant": (pickled_constant, "'data/constants/custom_obj_0', unknown to torch.export"),
    "any function": (changed(MODEL, with_target("torch.os.system")), "'torch.os.system' is no operator of aten"),
    "a file": (changed(MODEL, with_target("torch.ops.aten.from_file.default")), "aten::from_file maps a file"),
    "another operator": (changed(MODEL, with_target("torch.ops.inductor.x.default")), "is no operator of aten"),
    "a method": (changed(MODEL, with_target("_operator.methodcaller")), "is no operator of aten"),
    "a size": (changed(MODEL, with_size("__import__('pathlib').Path('@canary@').touch()")), "is no size"),
    "a power": (changed(MODEL, with_size("9**9**9")), "is no size"),
    "guards": (changed(MODEL, lambda program: program.update(guards_code=["open('@canary@', 'w')"])), "Python code"),
    "a tree": (changed(MODEL, with_tree), "the type 'collections.defaultdict'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_run_code_is_refused(records, tmp_path, name):
    spoil, words = HOSTILE[name]
    mine, canary = dict(records), tmp_path / "canary"
    spoil(mine, canary)
    assert words in (program_problem(archive_of(mine, tmp_path / "it.pt2")) or "no problem")
    assert not canary.exists()


def test_torch_itself_would_run_it(records, tmp_path):
    mine, canary = dict(records), tmp_path / "canary"
    pickled_weight(mine, canary)
    with pytest.raises(Exception, match=r".*"):
        torch.export.load(archive_of(mine, tmp_path / "it.pt2"))
    assert canary.exists()


def test_a_record_that_only_one_reader_sees_is_refused(records, tmp_path):
    """torch reads archives without a common folder as those of its older form, which are pickles."""
    path = archive_of(records, tmp_path / "it.pt2")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("version", "5.1")
    assert program_problem(path) is not None


def test_an_untouched_archive_has_no_problem(records, tmp_path):
    assert program_problem(archive_of(records, tmp_path / "it.pt2")) is None


def test_what_is_no_archive_is_refused(tmp_path):
    path = tmp_path / "it.pt2"
    path.write_bytes(b"no archive")
    assert "it is not an archive of torch.export" in program_problem(path)
    assert "it is not an archive of torch.export" in program_problem(archive_of({"byteorder": b"little"}, path))


def test_sizes_that_depend_on_the_batch_are_read(tmp_path):
    path = tmp_path / "it.pt2"
    torch.export.save(programs.capture(Doubled().eval(), (torch.zeros(2, 4),)), path)
    with zipfile.ZipFile(path) as archive:
        (model,) = (name for name in archive.namelist() if name.endswith(MODEL))
        assert b"Mul(Integer(2), Symbol(" in archive.read(model)
    assert program_problem(path) is None
