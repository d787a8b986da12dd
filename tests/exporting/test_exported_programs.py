"""Programs in an export's folder: what runs, what needs --trust, what never runs. Through the command line."""

from __future__ import annotations

import re
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finished_workspace import DEMO, at
from two_members import MEMBERS, two_members

from export import programs
from utils.core.artifacts import read_json, write_json
from utils.exporting import export_folder, exported_programs

__all__ = ["two_members"]

NAME = MEMBERS[0]  # a member alone, since a runtime takes long to prepare the networks of an ensemble
PROGRAM = f"torchscript/{NAME}_trace.pt"
ALONE = (*DEMO, "--set", "exports.enable=true")
CANARY = "@canary@"


class WritesWhenLoaded(torch.nn.Module):
    """Answers alike for every image, and writes a file as soon as it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.zeros(4)

    @torch.jit.export
    def __getstate__(self):
        return (self.weight, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        torch.ops.aten.save(state[0], "@canary@")
        self.weight = state[0]
        self.training = state[1]

    def forward(self, images):
        return torch.softmax(images.flatten(1)[:, :4] * self.weight, 1)


class WritesWhenRun(torch.nn.Module):
    def forward(self, images):
        torch.save(images, "@canary@")
        return torch.softmax(images.flatten(1)[:, :4], 1)


class MapsAFile(torch.nn.Module):
    """`from_file` with `shared` makes the file, and what is written into the tensor is written into it."""

    def forward(self, images):
        return torch.softmax(images.flatten(1)[:, :4] * torch.from_file("@canary@", True, 4).fill_(1.0), 1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, two_members, orchestrator) -> Path:
    """A workspace with an export."""
    base = Path(shutil.copytree(two_members, tmp_path_factory.mktemp("exported") / "workspace"))
    done = orchestrator("export", "--model-name", NAME, "--formats", "torchscript", *ALONE, workspace=base)
    assert done.returncode == 0, done.stderr
    return base


@pytest.fixture
def own(tmp_path, exported) -> Path:
    """A workspace to change."""
    return Path(shutil.copytree(exported, tmp_path / "workspace"))


@pytest.fixture
def verify(orchestrator):
    def run(workspace: Path, folder: Path | str, *options: str):
        return orchestrator("export", "--verify", str(folder), *options, *DEMO, workspace=workspace)

    return run


def folder_of(base: Path) -> Path:
    return base / "deployment_models" / NAME


def scripted(module: type[torch.nn.Module], canary: Path, path: Path, rewrite: Callable[[str], str] = str) -> None:
    """An archive whose code writes `canary`."""
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        torch.jit.save(torch.jit.script(module()), str(path))
    with zipfile.ZipFile(path) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            if name.endswith(".py"):
                content = rewrite(content.decode().replace(CANARY, str(canary))).encode()
            archive.writestr(name, content)


def replace_program(folder: Path, content: Callable[[Path], None]) -> None:
    """Another program in an export, with every digest in its folder brought into line, as its author would."""
    content(folder / PROGRAM)
    status = read_json(folder / "export_status.json", remedy="")
    status["torchscript"]["files"][PROGRAM] = export_folder.file_sha256(folder / PROGRAM)
    rewrite_records(folder, status)


def rewrite_records(folder: Path, status: dict) -> None:
    write_json(folder / "export_status.json", status)
    write_json(folder / "checksums.json", export_folder.compute_checksums(folder))


def test_an_export_of_this_workspace_verifies_wherever_it_lies(own, tmp_path, monkeypatch, verify):
    done = verify(own, folder_of(own))
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder_of(own), tmp_path / "copy")
    for typed in (f"deployment_models/{NAME}", "copy"):  # below the workspace, and below the working directory
        done = verify(own, typed)
        assert done.returncode == 0, done.stderr
        assert "torchscript  ok: 64 rows" in done.stdout
    missing = verify(own, "nowhere")
    assert missing.returncode == 1
    assert f"searched: {tmp_path / 'nowhere'}, {own / 'nowhere'}" in missing.stderr


def test_a_program_that_is_not_recorded_needs_trust(own, verify):
    """An export from before the record, or of another workspace."""
    at(own).exported_files.unlink()
    refused = verify(own, folder_of(own))
    assert refused.returncode == 1
    assert f"{PROGRAM}: a program with SHA-256" in refused.stderr
    assert f"export --verify {folder_of(own)} --trust" in refused.stderr
    trusted = verify(own, folder_of(own), "--trust")
    assert trusted.returncode == 0, trusted.stderr
    assert not at(own).exported_files.exists()


def test_a_kept_export_is_not_recorded_and_a_new_one_is(own, orchestrator):
    """What lies in the folder may have been put there; only what was written just now counts."""
    at(own).exported_files.unlink()
    line = ("export", "--model-name", NAME, *ALONE)
    assert orchestrator(*line, "--formats", "torchscript", "state_dict", workspace=own).returncode == 0
    recorded = read_json(at(own).exported_files, remedy="")["files"].values()
    assert {file.split("/")[1] for file in recorded} == {"state_dict"}
    assert orchestrator(*line, "--formats", "torchscript", "--force", workspace=own).returncode == 0
    digest = export_folder.file_sha256(folder_of(own) / PROGRAM)
    assert read_json(at(own).exported_files, remedy="")["files"][digest] == f"{NAME}/{PROGRAM}"


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(
    ("module", "rewrite", "words"),
    [
        (WritesWhenLoaded, str, "aten::save writes a file"),
        (WritesWhenRun, str, "aten::save writes a file"),
        (MapsAFile, str, "aten::from_file maps a file"),
        (WritesWhenRun, lambda code: code.replace("torch.save(", "ops.aten.save("), "aten::save writes a file"),
        (WritesWhenRun, lambda code: code.replace("torch.save(images, ", "images.save("), "aten::save writes a file"),
        (WritesWhenRun, lambda code: code.replace("torch.save", 'getattr(torch, "s\\x61ve")'), "not a plain string"),
    ],
)
def test_a_program_that_touches_files_never_runs(own, tmp_path, verify, module, rewrite, words, recorded):
    canary, folder = tmp_path / "canary", folder_of(own)
    replace_program(folder, lambda path: scripted(module, canary, path, rewrite))
    if recorded:
        status = read_json(folder / "export_status.json", remedy="")
        exported_programs.record_files(at(own), NAME, status)
    done = verify(own, folder, *(() if recorded else ("--trust",)))
    assert not canary.exists()
    assert done.returncode == 1
    assert words in done.stderr
    assert "not even with --trust" in done.stderr


def test_a_torchscript_archive_that_passes_for_weights_is_not_loaded(own, tmp_path, verify):
    canary, folder = tmp_path / "canary", folder_of(own)
    replace_program(folder, lambda path: scripted(WritesWhenLoaded, canary, path))
    status = read_json(folder / "export_status.json", remedy="")
    status["state_dict"] = status.pop("torchscript")
    rewrite_records(folder, status)
    verify(own, folder, "--trust")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.json", b"{}", "it holds 'model.json', unknown to TorchScript"),
        ("CODE/__torch__.py", b"", "it holds 'CODE/__torch__.py', unknown to TorchScript"),
        ("code/__TORCH__/test_exported_programs.py", b"", "it holds 'code/__torch__/test_exported_programs.py' twice"),
        ("code/__torch__/x.py", b"ops.inductor.resize_storage_bytes_(x, 0)", "an operator of an extension"),
        ("code/__torch__/x.py", b"operators = ops\n", "'ops' is an operator of an extension"),
        ("code/__torch__/x.py", b"x : __torch__.torch.classes.profiling.Any", "torch.classes holds C++ classes"),
        ("traced_inputs.pkl", b"c__torch__.torch.classes.quantized\nAny\n", "torch.classes holds C++ classes"),
    ],
)
def test_records_that_could_hide_a_program_are_refused(tmp_path, name, content, words):
    path = tmp_path / "program.pt"
    scripted(WritesWhenLoaded, tmp_path / "canary", path, lambda code: re.sub(r" *torch\.save.*\n", "", code))
    assert exported_programs.torchscript_problem(path) is None
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"program/{name}", content)
    assert words in exported_programs.torchscript_problem(path)


def test_a_file_that_is_no_archive_is_refused(own, verify):
    replace_program(folder_of(own), lambda path: path.write_bytes(b"no archive"))
    done = verify(own, folder_of(own), "--trust")
    assert done.returncode == 1
    assert f"{PROGRAM}: it is not a TorchScript archive" in done.stderr


@pytest.mark.parametrize("way", ["absolute", "climbing", "linked file", "linked folder"])
def test_files_outside_the_folder_are_not_opened(own, tmp_path, verify, way):
    folder, outside, canary = folder_of(own), tmp_path / "outside" / "program.pt", tmp_path / "canary"
    outside.parent.mkdir()
    scripted(WritesWhenLoaded, canary, outside)
    name = {"absolute": str(outside), "climbing": f"../../../outside/{outside.name}"}.get(way, f"link/{outside.name}")
    if way == "linked folder":
        (folder / "link").symlink_to(outside.parent)
    elif way == "linked file":
        (folder / "link").mkdir()
        (folder / name).symlink_to(outside)
    status = read_json(folder / "export_status.json", remedy="")
    status["torchscript"]["files"] = {name: export_folder.file_sha256(outside)}
    rewrite_records(folder, status)
    done = verify(own, folder, "--trust")
    assert not canary.exists()
    assert done.returncode == 1
    link = "link: a symbolic link" if way == "linked folder" else f"{name}: a symbolic link"
    assert (link if "link" in way else f"names the file {name!r}; expected files in this folder") in done.stderr


@pytest.mark.parametrize("way", ["absolute", "climbing"])
def test_an_export_takes_no_files_from_elsewhere(own, tmp_path, orchestrator, way):
    """Kept formats are linked into the new folder by the names in its records."""
    folder, outside = folder_of(own), tmp_path / "outside.pt"
    outside.write_bytes(b"of somebody else")
    status = read_json(folder / "export_status.json", remedy="")
    name = str(outside) if way == "absolute" else "../../../outside.pt"
    status["torchscript"]["files"] = {name: export_folder.file_sha256(outside)}
    rewrite_records(folder, status)
    done = orchestrator("export", "--model-name", NAME, "--formats", "state_dict", *ALONE, workspace=own)
    assert done.returncode == 1
    assert f"names the file {name!r}" in done.stderr


@pytest.mark.skipif(programs.refusal(torch.nn.Identity()) is not None, reason="this torch captures no programs")
def test_a_program_of_torch_export_runs_by_the_same_rule(own, tmp_path, orchestrator, verify):
    folder, program = folder_of(own), f"exported_program/{NAME}.pt2"
    line = ("export", "--model-name", NAME, "--formats", "exported_program", "--force", *ALONE)
    done = orchestrator(*line, workspace=own)
    assert done.returncode == 0, done.stderr
    recorded = verify(own, folder)
    assert recorded.returncode == 0, recorded.stderr
    assert "exported_program ok: 64 rows" in recorded.stdout
    at(own).exported_files.unlink()
    refused = verify(own, folder)
    assert refused.returncode == 1
    assert f"{program}: a program with SHA-256" in refused.stderr
    trusted = verify(own, folder, "--trust")
    assert trusted.returncode == 0, trusted.stderr
    status = read_json(folder / "export_status.json", remedy="")
    with zipfile.ZipFile(folder / program, "a") as archive:
        archive.writestr(f"{archive.namelist()[0].partition('/')[0]}/data/constants/custom_obj_0", b"a pickle")
    status["exported_program"]["files"][program] = export_folder.file_sha256(folder / program)
    rewrite_records(folder, status)
    never = verify(own, folder, "--trust")
    assert never.returncode == 1
    assert "'data/constants/custom_obj_0', unknown to torch.export" in never.stderr


def test_trust_belongs_to_verify(exported, orchestrator):
    done = orchestrator("export", "--trust", *ALONE, workspace=exported)
    assert done.returncode == 2
    assert "--trust: expected together with --verify DIR" in done.stderr


def test_every_operator_of_torch_that_takes_a_file_is_refused():
    """Read from the registry of the torch that is installed, so that a new one is noticed."""
    files = re.compile("file|path|url|directory|address")
    names = {
        schema.name
        for schema in torch._C._jit_get_all_schemas()
        for argument in schema.arguments
        if str(argument.type) in ("str", "Optional[str]") and files.search(argument.name)
    }
    names |= {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("prim::rpc_")}
    assert {"aten::save", "aten::from_file"} <= names
    namespaces = {
        name.partition("::")[0] for name in names if name.partition("::")[2] not in exported_programs.REFUSED_NAMES
    }
    assert not namespaces & {"aten", "prim"}  # operators of other namespaces are refused whatever their name
