"""The command `export`, its folder, its certificate and what can go wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from export_runs import NAME, folder_of, run
from finished_workspace import at
from PIL import Image
from safetensors.torch import load_file, save_file
from two_members import MEMBERS, two_members

from utils.core import engines
from utils.core.artifacts import read_arrays, read_json, write_json
from utils.core.errors import ConfigError, UserError
from utils.exporting import (
    export_checks,
    export_comparison,
    export_folder,
    export_formats,
    parity_rows,
    reduced_precision,
    tflite_conversion,
)

__all__ = ["two_members"]

RECORDS = {"metadata.json", "class_mapping.json", "export_status.json", "checksums.json"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, two_members):
    """A workspace with two exports: soft voting in most formats, and hard voting on raw images."""
    base = Path(shutil.copytree(two_members, tmp_path_factory.mktemp("exported") / "workspace"))
    results = {
        NAME: run(base, NAME, "state_dict", "torchscript", "onnx", "tensorrt"),
        "hard_voting_ensemble": run(base, "hard_voting", "onnx", input="uint8-nhwc", member_probabilities=True),
    }
    return base, results


@pytest.fixture
def own_export(tmp_path, exported):
    """A copy of the exports to change or break."""
    return Path(shutil.copytree(exported[0], tmp_path / "workspace"))


def test_the_folder_is_as_the_specification_prints_it(exported):
    base, results = exported
    folder = folder_of(base)
    assert {path.name for path in folder.iterdir()} == RECORDS | {"state_dict", "torchscript", "onnx", "custom"}
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - RECORDS
    assert {name for name in files if not name.startswith("custom/")} == {
        f"state_dict/{NAME}_state_dict_cpu.pth",
        f"state_dict/{NAME}_state_dict_cpu.safetensors",
        f"torchscript/{NAME}_trace.pt",
        f"onnx/{NAME}.onnx",
    }
    assert {"README.md", "predict.py", "model_card.md", "ensemble.json", f"{NAME}_custom.bin"} <= {
        path.name for path in (folder / "custom").iterdir()
    }
    assert not list(folder.parent.glob(".*"))
    assert read_json(folder / "class_mapping.json", remedy="") == {str(n): str(n) for n in range(4)}
    assert results[NAME].failures == [f"tensorrt: skipped, {results[NAME].document['formats']['tensorrt']['reason']}"]


def test_every_file_carries_its_proof(exported):
    status = read_json(folder_of(exported[0]) / "export_status.json", remedy="")
    for name in ("state_dict", "torchscript", "onnx"):
        entry = status[name]
        assert entry["status"] == "ok"
        assert (entry["parity"]["rows"], entry["parity"]["batch_sizes"]) == (64, [1, 3, 17])
        assert entry["parity"]["max_abs_diff"] <= entry["parity"]["tolerance"] == 1e-4
        assert (entry["parity"]["label_flips"], entry["parity"]["near_threshold"]) == (0, 0)
        assert {"python", "onnxruntime" if name == "onnx" else "torch"} <= entry["versions"].keys()
        assert entry["seconds"] > 0
        assert entry["members_run"] == "all"
        assert entry["latency_ms"] > 0
    assert "trtexec --onnx=onnx/soft_voting_ensemble.onnx" in status["tensorrt"]["reason"]


def test_a_combiner_with_steps_is_compared_twice(exported):
    entry = exported[1]["hard_voting_ensemble"].document["formats"]["onnx"]
    assert entry["parity"]["members"]["max_abs_diff"] < 1e-4
    assert entry["parity"]["combiner"]["label_flips"] == 0
    outputs = read_json(folder_of(exported[0], "hard_voting_ensemble") / "metadata.json", remedy="")["training"][
        "outputs"
    ]
    assert outputs == ["probabilities", "member_probabilities", "member_logits"]


def test_an_export_that_is_there_is_kept_and_another_format_joins_it(own_export):
    file = folder_of(own_export) / f"onnx/{NAME}.onnx"
    before = file.stat()
    assert "up to date" in run(own_export, NAME, "onnx", "torchscript").text
    run(own_export, NAME, "checkpoint", "onnx")
    after = read_json(folder_of(own_export) / "export_status.json", remedy="")
    assert file.stat().st_ino == before.st_ino
    assert {name for name, entry in after.items() if entry["status"] == "ok"} == {
        "state_dict",
        "checkpoint",
        "torchscript",
        "onnx",
        "custom",
    }
    assert export_folder.checksum_mismatches(folder_of(own_export)) == []


IMPORT_BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "timm", "sklearn", "scipy", "xgboost", "utils", "onnx"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", [NAME, "hard_voting_ensemble"])
def test_the_delivered_program_predicts_what_evaluate_did(tmp_path, exported, name):
    base, _ = exported
    folder = Path(shutil.copytree(folder_of(base, name), tmp_path / "elsewhere"))
    images = base / "split_dataset" / "test"
    done = subprocess.run(
        [sys.executable, "-P", "-c", IMPORT_BLOCKER, str(folder / "custom" / "predict.py"), str(images), "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    found = {Path(answer["file"]).relative_to(images).as_posix(): answer["probabilities"] for answer in answers}
    stored = read_arrays(at(base).ensemble(name) / "predictions_test.npz", remedy="")
    assert sorted(found) == stored["sample_ids"].tolist()
    classes = stored["classes"].tolist()
    given = np.array([[found[key][label] for label in classes] for key in stored["sample_ids"].tolist()])
    np.testing.assert_allclose(given, stored["probabilities"], rtol=0, atol=1e-5)


def change_a_weight(path: Path) -> None:
    """One weight of a written file."""
    if path.suffix == ".safetensors":
        weights = load_file(path)
        name = next(name for name, value in weights.items() if value.ndim == 2)
        weights[name][0] += 1
        save_file(weights, path)
    elif path.suffix == ".onnx":
        model = onnx.load(str(path))
        matrix = next(value for value in model.graph.initializer if len(value.dims) == 2)
        values = onnx.numpy_helper.to_array(matrix).copy()
        values[0] += 1
        matrix.CopyFrom(onnx.numpy_helper.from_array(values, matrix.name))
        onnx.save(model, str(path))
    elif path.name.endswith("_trace.pt"):
        network = torch.jit.load(str(path))
        with torch.no_grad():
            next(value for value in network.parameters() if value.ndim == 2)[0] += 1
        torch.jit.save(network, str(path))
    else:
        content = torch.load(path, weights_only=True)
        weights = content.get("model_state_dict", content)
        next(value for value in weights.values() if value.ndim == 2)[0] += 1
        torch.save(content, path)


@pytest.mark.parametrize(
    ("kinds", "unchanged"), [(("state_dict", "torchscript"), "onnx"), (("checkpoint", "onnx"), "state_dict")]
)
def test_a_weight_that_changes_after_writing_is_caught(own_export, monkeypatch, kinds, unchanged):
    package = export_formats.write_packaged_formats

    def sabotaged(network, name, formats, staged, *rest):
        done = package(network, name, formats, staged, *rest)
        for kind in kinds:
            change_a_weight(staged / done[kind]["path"])
        return done

    monkeypatch.setattr(engines, "cores", lambda: 1)  # so that no check starts before all formats are written
    monkeypatch.setattr(export_formats, "write_packaged_formats", sabotaged)
    result = run(own_export, NAME, *kinds, unchanged, force=True)
    folder = folder_of(own_export)
    for kind in kinds:
        entry = result.document["formats"][kind]
        assert (entry["status"], entry["path"]) == ("failed", None)
        assert "probabilities differ by" in entry["reason"]
        assert (folder / "failed" / kind).is_dir()
        assert not (folder / kind).exists()
    assert [failure.partition(":")[0] for failure in result.failures] == list(kinds)
    assert result.document["formats"][unchanged]["status"] == "ok"


def test_an_interrupted_export_leaves_the_old_one_whole(own_export, monkeypatch):
    before = {path: path.read_bytes() for path in folder_of(own_export).rglob("*") if path.is_file()}

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_folder, "write_records", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(own_export, NAME, "onnx", force=True)
    assert {path: path.read_bytes() for path in folder_of(own_export).rglob("*") if path.is_file()} == before
    assert not list(folder_of(own_export).parent.glob(".*"))


def test_a_checkpoint_that_changed_or_is_gone_is_named(own_export):
    path = own_export / "checkpoints" / f"{MEMBERS[0]}_final.pth"
    content = path.read_bytes()
    path.write_bytes(content + b"x")
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match=rf"{MEMBERS[0]}_final\.pth: changed since discovery"):
        run(own_export, NAME, "onnx", force=True)
    path.unlink()
    with pytest.raises(UserError, match=rf"{MEMBERS[0]}_final\.pth: the checkpoint of {MEMBERS[0]} is gone"):
        run(own_export, NAME, "onnx", force=True)


def test_an_ensemble_of_other_checkpoints_is_named(own_export):
    record = read_json(at(own_export).ensemble(NAME) / "ensemble.json", remedy="")
    record["member_digests"][MEMBERS[0]] = "0" * 64
    write_json(at(own_export).ensemble(NAME) / "ensemble.json", record)
    with pytest.raises(UserError, match=f"{MEMBERS[0]} has changed since the ensemble was built"):
        run(own_export)


def test_what_is_not_known_is_named_with_its_neighbour(exported):
    with pytest.raises(UserError, match="did you mean 'soft_voting_ensemble'"):
        run(exported[0], "soft_votin_ensemble")
    with pytest.raises(ConfigError, match="unknown 'onxx'; did you mean 'onnx'"):
        run(exported[0], NAME, "onxx")
    with pytest.raises(ConfigError, match="--max-members 0: expected a whole number of at least 1"):
        run(exported[0], NAME, "onnx", max_members=0)
    with pytest.raises(UserError, match="2 members, --max-members allows 1"):
        run(exported[0], NAME, "onnx", max_members=1)


def test_the_base_pipelines_own_export_is_not_replaced(own_export, trained):
    shutil.copytree(folder_of(trained, "CustomConvNeXt"), folder_of(own_export, "CustomConvNeXt"))
    with pytest.raises(UserError, match="holds an export that this command did not write"):
        run(own_export, "CustomConvNeXt")


def test_a_member_alone_gives_its_logits(own_export):
    result = run(own_export, MEMBERS[0], "onnx", force=True)
    assert result.failures == []
    metadata = read_json(folder_of(own_export, MEMBERS[0]) / "metadata.json", remedy="")
    assert metadata["training"]["outputs"] == ["probabilities", "logits"]


def test_a_disk_without_room_is_told_before_anything_is_written(own_export, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match="0 MB are free"):
        run(own_export, NAME, "onnx", force=True)


def test_verify_holds_and_names_what_was_tampered_with(own_export):
    folder = folder_of(own_export, "hard_voting_ensemble")
    assert "checksums match" in export_checks.verify(at(own_export), folder).text
    with (folder / "custom" / "README.md").open("a") as file:
        file.write("one more line")
    (folder / "onnx" / "hard_voting_ensemble.onnx").unlink()
    with pytest.raises(UserError, match=r"hard_voting_ensemble\.onnx: missing; custom/README\.md: changed"):
        export_checks.verify(at(own_export), folder)
    with pytest.raises(UserError, match=r"no checksums\.json"):
        export_checks.verify(at(own_export), folder.parent)


def test_verify_finds_answers_that_differ(own_export):
    folder = folder_of(own_export)
    change_a_weight(folder / "onnx" / f"{NAME}.onnx")
    write_json(folder / "checksums.json", export_folder.compute_checksums(folder))
    with pytest.raises(UserError, match=r"onnx: soft_voting_ensemble\.onnx: its probabilities differ by"):
        export_checks.verify(at(own_export), folder)


def test_forms_of_fewer_bits_have_a_tolerance_of_their_own_and_their_accuracy(own_export, monkeypatch):
    """Made from the ONNX file that is there; ranges come from train, figures from test."""
    monkeypatch.setattr(parity_rows, "N_CALIBRATION_IMAGES", 32)
    folder = folder_of(own_export)
    before = (folder / "onnx" / f"{NAME}.onnx").stat().st_ino
    result = run(own_export, NAME, "onnx", precision=["fp32", "fp16", "int8"])
    assert result.failures == []
    assert (folder / "onnx" / f"{NAME}.onnx").stat().st_ino == before
    measured = read_json(at(own_export).ensemble_metrics(NAME, "test"), remedy="")["accuracy"]
    for precision, tolerance, share in (("fp16", 0.01, 0.7), ("int8", 0.1, 0.6)):
        entry = result.document["formats"][f"onnx_{precision}"]
        assert entry["path"] == f"onnx_{precision}/{NAME}_{precision}.onnx"
        assert 1e-6 < entry["parity"]["max_abs_diff"] < entry["parity"]["tolerance"] == tolerance
        assert entry["size_mb"] < share * result.document["formats"]["onnx"]["size_mb"]
        accuracy = entry["test_accuracy"]
        assert accuracy["ensemble"] == pytest.approx(measured)
        assert accuracy["change"] == pytest.approx(accuracy["file"] - measured)
    assert "onnx_int8" in export_checks.verify(at(own_export), folder).document["formats"]
    rows = {row["format"]: row for row in export_comparison.compare_exports(at(own_export)).document["rows"]}
    assert rows["onnx_int8"]["accuracy"] == result.document["formats"]["onnx_int8"]["test_accuracy"]["file"]


def test_a_form_of_fewer_bits_that_is_off_fails_alone(own_export, monkeypatch):
    to_float16 = reduced_precision.to_float16

    def spoilt(source, path):
        to_float16(source, path)
        change_a_weight(path)

    monkeypatch.setattr(reduced_precision, "to_float16", spoilt)
    monkeypatch.setattr(reduced_precision, "to_int8", lambda *_: 1 / 0)
    formats = run(own_export, NAME, "onnx", precision=["fp16", "int8"], force=True).document["formats"]
    assert "probabilities differ by" in formats["onnx_fp16"]["reason"]
    assert formats["onnx_int8"]["reason"] == "ZeroDivisionError: division by zero"
    assert [formats[name]["status"] for name in ("onnx", "onnx_fp16", "onnx_int8")] == ["ok", "failed", "failed"]
    assert not (folder_of(own_export) / "onnx_fp16").exists()


def test_the_command_line_ends_with_4_where_a_format_is_skipped(own_export, orchestrator):
    done = orchestrator(
        "export", "--config", "configs/votes.yaml", "--set", "exports.enable=true", "--model-name", NAME, "--formats",
        "onnx", "tensorrt", workspace=own_export,
    )  # fmt: skip
    assert done.returncode == 4
    assert "left out: tensorrt: skipped" in done.stderr
    assert "64 real rows, largest difference" in done.stdout


def test_exported_forms_are_compared_by_accuracy_latency_and_size(own_export):
    status = read_json(folder_of(own_export) / "export_status.json", remedy="")
    for name, latency, size in (("state_dict", 1.0, 5.0), ("torchscript", 2.0, 6.0), ("onnx", 3.0, 1.0)):
        status[name] |= {"latency_ms": latency, "size_mb": size}
    write_json(folder_of(own_export) / "export_status.json", status)
    document = export_comparison.compare_exports(at(own_export)).document
    rows, picture = document["rows"], at(own_export).scores / "exports.png"
    assert document["picture"] == str(picture)
    with Image.open(picture) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44)} <= colours  # one for each format
    kinds = {(row["name"], row["format"]) for row in rows}
    assert kinds == {(NAME, "state_dict"), (NAME, "torchscript"), (NAME, "onnx"), ("hard_voting_ensemble", "onnx")}
    accuracy = read_json(at(own_export).ensemble_metrics(NAME, "test"), remedy="")["accuracy"]
    assert {row["accuracy"] for row in rows if row["name"] == NAME} == {accuracy}
    assert not {row["format"]: row for row in rows if row["name"] == NAME}["torchscript"]["pareto"]
    shutil.rmtree(folder_of(own_export).parent)
    with pytest.raises(UserError, match="nothing is exported"):
        export_comparison.compare_exports(at(own_export))


@pytest.mark.slow
@pytest.mark.skipif(tflite_conversion.missing_tools() is not None, reason="needs litert-torch, see DBT_TFLITE_PYTHON")
@pytest.mark.parametrize("sabotaged", [False, True])
@pytest.mark.parametrize("given", ["float-nchw", "uint8-nhwc"])
def test_tflite_is_converted_and_proved(own_export, monkeypatch, given, sabotaged):
    convert = tflite_conversion.convert_network

    def spoilt(network, sample, path, scratch):
        convert(network, sample, path, scratch)
        content = bytearray(path.read_bytes())
        weights = network.members[0].networks[0].get_classifier().weight.detach().numpy()
        place = content.index(weights[0].tobytes())
        content[place : place + 4 * weights.shape[1]] = (weights[0] + 1).tobytes()
        path.write_bytes(content)

    if sabotaged:
        monkeypatch.setattr(tflite_conversion, "convert_network", spoilt)
    entry = run(own_export, NAME, "tflite", input=given, force=True).document["formats"]["tflite"]
    assert entry["status"] == ("failed" if sabotaged else "ok"), entry["reason"]
    if sabotaged:
        assert "probabilities differ by" in entry["reason"]
    else:
        assert (entry["parity"]["rows"], entry["parity"]["batch_sizes"]) == (64, [1])
