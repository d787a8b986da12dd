"""The bundled base pipeline's export."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from packaging_cases import BUILT, CLASSES, FILES, SAMPLE, Leaf, package, written
from safetensors.torch import load_file, save_file

from config import settings
from export import (
    ExportConfig,
    ExportEngine,
    export_and_package_model,
    export_model,
    export_to_format,
    formats,
    run_export_smoke_tests,
)
from utils.torchscript import exporter_without_notices, torchscript_without_notices

EVERY_FILE = {name for files in FILES.values() for name in files}


class FrozenBatch(Leaf):
    """Its trace keeps the batch it was made with."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) + torch.zeros(int(images.shape[0]), len(CLASSES))


def record(root: Path, name: str) -> dict:
    return json.loads((root / "leaf" / name).read_text(encoding="utf-8"))


def test_every_known_format_is_built_or_skipped_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "DEPLOY_DIR", tmp_path)
    monkeypatch.setattr(settings, "EXPORT_FORMATS", settings.EXPORT_TYPES)
    result = export_and_package_model(Leaf(), "leaf", SAMPLE, class_names=CLASSES)
    assert result["requested_formats"] == settings.EXPORT_TYPES
    assert result["successful_exports"] == BUILT
    assert result["skipped_exports"] == ["torchserve", "tensorrt", "tflite", "custom"]
    assert result["failed_exports"] == []
    status = record(tmp_path, "export_status.json")
    assert status == result["export_results"]
    for name in result["skipped_exports"]:
        assert status[name]["status"] == "skipped"
        assert "writes state_dict, checkpoint, torchscript, onnx" in status[name]["reason"]
        assert status[name]["parity"] is None
    for name in BUILT:
        parity = status[name]["parity"]
        allowed = 1e-4 if name == "onnx" else 1e-5
        assert (parity["rows"], parity["batch_sizes"], parity["tolerance"]) == (21, [1, 3, 17], allowed)
        assert (parity["label_flips"], parity["max_abs_diff"] <= allowed) == (0, True)
        assert list(status[name]["files"]) == FILES[name]
    records = {"metadata.json", "class_mapping.json", "export_status.json", "checksums.json"}
    assert written(tmp_path / "leaf") == EVERY_FILE | records | set(BUILT)


def test_records_describe_the_network(tmp_path):
    result = package(tmp_path, Leaf(), training_metadata={"accuracy": np.float64(0.5), "loss": float("nan")})
    metadata = record(tmp_path, "metadata.json")
    assert (metadata["architecture"], metadata["num_classes"]) == ("leaf", 3)
    assert metadata["input_shape"] == [1, 3, 8, 8]
    assert (metadata["img_size"], metadata["batch_size"], metadata["seed"]) == (8, settings.BATCH_SIZE, settings.SEED)
    assert (metadata["device"], metadata["training"]) == ("cpu", {"accuracy": 0.5, "loss": None})
    assert record(tmp_path, "class_mapping.json") == {"0": "black spot", "1": "canker", "2": "healthy"}
    checksums = record(tmp_path, "checksums.json")
    assert checksums == result["checksums"]
    assert set(checksums) == {"metadata.json", "class_mapping.json"} | EVERY_FILE
    for name, digest in checksums.items():
        assert hashlib.sha256((tmp_path / "leaf" / name).read_bytes()).hexdigest() == digest


def test_files_hold_the_weights_and_open_without_unpickling(tmp_path):
    model = Leaf()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=4)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    scheduler.step()
    result = package(tmp_path, model, optimizer=optimizer, scheduler=scheduler, training_metadata={"epochs": 3})
    assert result["successful_exports"] == BUILT
    folder = tmp_path / "leaf"
    bare = torch.load(folder / FILES["state_dict"][0], weights_only=True)
    full = torch.load(folder / FILES["checkpoint"][0], weights_only=True)
    for weights in (bare, full["model_state_dict"], load_file(folder / FILES["state_dict"][1])):
        torch.testing.assert_close(dict(weights), dict(model.state_dict()), rtol=0, atol=0)
    assert (full["arch_name"], full["extra"]["classes"], full["metadata"]) == ("leaf", CLASSES, {"epochs": 3})
    assert full["scheduler_state_dict"]["last_epoch"] == 1
    assert full["optimizer_state_dict"]["state"].keys() == optimizer.state_dict()["state"].keys()


def test_same_weights_give_the_same_bytes(tmp_path):
    package(tmp_path / "one", Leaf())
    package(tmp_path / "two", Leaf())
    for name in (*FILES["state_dict"], *FILES["checkpoint"]):
        assert (tmp_path / "one/leaf" / name).read_bytes() == (tmp_path / "two/leaf" / name).read_bytes()


def test_the_model_its_modes_and_the_random_numbers_stay_as_they_were(tmp_path):
    model = Leaf()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    identities = [id(parameter) for parameter in model.parameters()]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    package(tmp_path, model)
    assert torch.rand(1) == expected
    assert [module.training for module in model] == [True, False, True, True, True, True, True]
    assert model.training
    assert [id(parameter) for parameter in model.parameters()] == identities
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_an_unknown_format_is_named_with_its_neighbour_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="unknown export format 'torchscrip'; did you mean 'torchscript'") as caught:
        package(tmp_path, Leaf(), ["state_dict", "torchscrip"])
    assert "tflite" in str(caught.value)
    assert written(tmp_path) == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_names": ["a", "b"]}, "3 logits, but there are 2 class names"),
        ({"num_classes": 13}, "3 logits, but there are 13 num_classes"),
        ({"sample_input": torch.zeros(1, 3, 8, 8).byte()}, r"torch.uint8 \(1, 3, 8, 8\); expected floats"),
        ({"sample_input": torch.zeros(3, 8, 8)}, r"\(3, 8, 8\); expected floats \(B, 3, H, W\)"),
        ({"training_metadata": {"a": {"b": [object()]}}}, r"training_metadata\.a\.b\[0\] is a object"),
    ],
)
def test_what_does_not_fit_the_network_is_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        package(tmp_path, Leaf(), **options)
    assert written(tmp_path) == set()


@pytest.mark.parametrize("name", ["../leaf", "", ".leaf", "a/b"])
def test_a_name_that_is_no_folder_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="cannot name a folder"):
        export_and_package_model(Leaf(), name, SAMPLE, BUILT, tmp_path / "deploy")
    assert written(tmp_path) == set()


def other_weights(given: formats.Package, path: Path) -> None:
    weights = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in given.weights.items()}
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights if "state_dict" in path.name else given.checkpoint | {"model_state_dict": weights}, path)


def other_trace(given: formats.Package, path: Path) -> None:
    torch.jit.save(torch.jit.trace(Leaf(seed=9).eval(), given.batches[1]), path)


def other_onnx(given: formats.Package, path: Path) -> None:
    formats._write_onnx(replace(given, network=Leaf(seed=9).eval()), path)


def half_a_file(given: formats.Package, path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 and then the disk was full")


@pytest.mark.parametrize(
    ("name", "template", "writer", "reason"),
    [
        ("state_dict", "{}_state_dict_cpu.pth", other_weights, "ParityError"),
        ("state_dict", "{}_state_dict_cpu.safetensors", other_weights, "ParityError"),
        ("checkpoint", "{}_checkpoint_full.pth", other_weights, "ParityError"),
        ("torchscript", "{}_trace.pt", other_trace, "ParityError"),
        ("onnx", "{}.onnx", other_onnx, "ParityError"),
        ("state_dict", "{}_state_dict_cpu.safetensors", half_a_file, "SafetensorError"),
        ("checkpoint", "{}_checkpoint_full.pth", half_a_file, "Error"),
        ("torchscript", "{}_trace.pt", half_a_file, "Error"),
        ("onnx", "{}.onnx", half_a_file, "InvalidProtobuf"),
    ],
)
def test_a_sabotaged_file_fails_its_format_and_leaves_nothing(tmp_path, monkeypatch, name, template, writer, reason):
    monkeypatch.setitem(formats.FORMATS[name], template, writer)
    result = package(tmp_path, Leaf())
    assert result["failed_exports"] == [name]
    assert result["successful_exports"] == [other for other in BUILT if other != name]
    entry = record(tmp_path, "export_status.json")[name]
    assert (entry["status"], entry["path"], entry["sha256"]) == ("failed", None, None)
    assert reason in entry["reason"]
    if reason == "ParityError":
        assert entry["parity"]["max_abs_diff"] > 1e-5
    assert not (tmp_path / "leaf" / name).exists()
    assert not any(file.startswith(name) for file in result["checksums"])


def test_a_failed_format_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    package(tmp_path, Leaf())
    before = (tmp_path / "leaf" / FILES["checkpoint"][0]).read_bytes()
    monkeypatch.setitem(formats.FORMATS["checkpoint"], "{}_checkpoint_full.pth", half_a_file)
    assert package(tmp_path, Leaf(), force=True)["failed_exports"] == ["checkpoint"]
    assert (tmp_path / "leaf" / FILES["checkpoint"][0]).read_bytes() == before
    assert [path.name for path in (tmp_path / "leaf/checkpoint").iterdir()] == ["leaf_checkpoint_full.pth"]


def test_a_trace_that_keeps_its_batch_size_fails(tmp_path):
    result = package(tmp_path, FrozenBatch())
    assert result["failed_exports"] == ["torchscript", "onnx"]
    assert result["successful_exports"] == ["state_dict", "checkpoint"]


def test_answers_that_are_not_finite_fail_every_format(tmp_path):
    model = Leaf()
    with torch.no_grad():
        model[6].bias[1] = float("nan")
    result = package(tmp_path, model)
    assert result["failed_exports"] == BUILT
    assert "not finite" in record(tmp_path, "export_status.json")["state_dict"]["reason"]


def test_a_second_run_keeps_what_is_there_and_force_writes_it_again(tmp_path):
    package(tmp_path, Leaf())
    files = [tmp_path / "leaf" / name for name in EVERY_FILE]
    times = [path.stat().st_mtime_ns for path in files]
    first = record(tmp_path, "export_status.json")
    result = package(tmp_path, Leaf())
    assert result["skipped_exports"] == BUILT
    assert "already there state_dict, checkpoint, torchscript, onnx" in result["one_line_summary"]
    assert [path.stat().st_mtime_ns for path in files] == times
    assert record(tmp_path, "export_status.json") == first
    result = package(tmp_path, Leaf(), force=True)
    assert (result["skipped_exports"], result["successful_exports"]) == ([], BUILT)
    assert not {path.stat().st_mtime_ns for path in files} & set(times)


def test_other_weights_or_a_damaged_file_are_written_again_without_force(tmp_path):
    package(tmp_path, Leaf())
    result = package(tmp_path, Leaf(seed=1))
    assert (result["skipped_exports"], result["successful_exports"]) == ([], BUILT)
    bare = tmp_path / "leaf" / FILES["state_dict"][0]
    torch.testing.assert_close(torch.load(bare, weights_only=True), dict(Leaf(seed=1).state_dict()), rtol=0, atol=0)
    bare.write_bytes(bare.read_bytes()[:-1])
    assert package(tmp_path, Leaf(seed=1))["skipped_exports"] == ["checkpoint", "torchscript", "onnx"]
    assert torch.load(bare, weights_only=True)


def test_a_later_run_keeps_the_records_of_other_formats(tmp_path):
    package(tmp_path, Leaf(), ["state_dict"])
    result = package(tmp_path, Leaf(), ["torchscript"])
    expected = {"metadata.json", "class_mapping.json", *FILES["state_dict"], *FILES["torchscript"]}
    assert set(result["checksums"]) == expected
    status = record(tmp_path, "export_status.json")
    assert {name: entry["status"] for name, entry in status.items()} == {"state_dict": "ok", "torchscript": "ok"}


def test_a_file_that_changed_since_loses_its_status_and_its_checksum(tmp_path):
    package(tmp_path, Leaf())
    (tmp_path / "leaf" / FILES["state_dict"][0]).write_bytes(b"something else")
    result = package(tmp_path, Leaf(), ["torchscript"])
    entry = record(tmp_path, "export_status.json")["state_dict"]
    assert entry["status"] == "failed"
    assert "leaf_state_dict_cpu.pth: gone or changed" in entry["reason"]
    assert FILES["state_dict"][0] not in result["checksums"]
    assert FILES["checkpoint"][0] in result["checksums"]


def test_files_of_earlier_weights_are_no_longer_ok(tmp_path):
    package(tmp_path, Leaf())
    package(tmp_path, Leaf(seed=1), ["torchscript"])
    status = record(tmp_path, "export_status.json")
    assert [status[name]["status"] for name in BUILT] == ["skipped", "skipped", "ok", "skipped"]
    assert "earlier weights" in status["checkpoint"]["reason"]
    package(tmp_path, Leaf(), ["state_dict"])
    assert record(tmp_path, "export_status.json")["state_dict"]["status"] == "ok"


def test_no_format_asked_for_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "EXPORT_FORMATS", [])
    result = package(tmp_path, Leaf(), export_formats=None)
    assert result["successful_exports"] == []
    assert result["one_line_summary"] == "leaf: no format was asked for"
    assert written(tmp_path) == set()


def test_classes_without_names_are_counted_and_said(tmp_path, caplog):
    log = logging.getLogger("somebody's own")
    package(tmp_path, Leaf(), ["state_dict"], class_names=None, logger_inst=log)
    assert record(tmp_path, "class_mapping.json") == {"0": "0", "1": "1", "2": "2"}
    assert "the classes are called 0 to 2" in caplog.text


def test_export_model_returns_the_paths_of_what_was_built(tmp_path):
    paths = export_model(Leaf(), "leaf", tmp_path / "out", (1, 3, 8, 8), ["pytorch", "onnx"], CLASSES)
    assert paths == {
        "pytorch": tmp_path / "out" / FILES["state_dict"][0],
        "onnx": tmp_path / "out" / FILES["onnx"][0],
    }
    assert json.loads((tmp_path / "out/class_mapping.json").read_text(encoding="utf-8"))["1"] == "canker"
    with pytest.raises(ValueError, match="did you mean 'onnx'"):
        export_model(Leaf(), "leaf", tmp_path / "none", (1, 3, 8, 8), ["onxx"])
    assert not (tmp_path / "none").exists()


def test_export_to_format_writes_one_checked_file(tmp_path):
    model = Leaf()
    assert export_to_format(model, "state_dict", tmp_path / "a.safetensors", SAMPLE)
    assert load_file(tmp_path / "a.safetensors").keys() == model.state_dict().keys()
    assert export_to_format(model, "torchscript", tmp_path / "a.pt", SAMPLE)
    with pytest.raises(ValueError, match="tflite is not written here"):
        export_to_format(model, "tflite", tmp_path / "a.tflite", SAMPLE)
    with pytest.raises(RuntimeError):
        export_to_format(FrozenBatch(), "torchscript", tmp_path / "b.pt", SAMPLE)
    assert written(tmp_path) == {"a.safetensors", "a.pt"}


def test_the_engine_packages_by_its_configuration(tmp_path):
    engine = ExportEngine(ExportConfig("leaf", tmp_path, ["checkpoint"], CLASSES))
    assert engine.export(Leaf(), SAMPLE)["successful_exports"] == ["checkpoint"]
    assert (tmp_path / "leaf" / FILES["checkpoint"][0]).is_file()


def test_smoke_tests_open_every_file_again(tmp_path):
    result = package(tmp_path, Leaf(), [*BUILT, "tflite"])
    folder = tmp_path / "leaf"
    (folder / FILES["torchscript"][0]).write_bytes(b"no archive")
    torch.save(Leaf(seed=3).state_dict(), folder / FILES["state_dict"][0])
    found = run_export_smoke_tests(Leaf(), result["export_results"], folder, num_classes=3, image_size=8)
    assert {name: outcome["passed"] for name, outcome in found.items()} == {
        "state_dict": False,
        "checkpoint": True,
        "torchscript": False,
        "onnx": True,
        "tflite": False,
    }
    assert found["state_dict"]["parity"]["max_abs_diff"] > 1e-5
    assert "writes state_dict" in found["tflite"]["details"]
    paths = {"pytorch": folder / FILES["state_dict"][0]}
    assert run_export_smoke_tests(Leaf(seed=3), paths, folder, image_size=8)["pytorch"]["passed"]
    with pytest.raises(ValueError, match="3 logits; expected 13"):
        run_export_smoke_tests(Leaf(), {}, folder, num_classes=13, image_size=8)


def test_an_export_shows_no_warning(tmp_path):
    """Also none that pytest's own configuration ignores."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = package(tmp_path, Leaf())
    assert result["successful_exports"] == BUILT


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_a_notice_of_torchscript_is_not_shown_whatever_its_category(category):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torchscript_without_notices():
            warnings.warn("`torch.jit.trace` is deprecated. Please switch to `torch.export`.", category, stacklevel=1)
            with pytest.raises(category, match="another"):
                warnings.warn("another notice", category, stacklevel=1)
        with exporter_without_notices():
            warnings.warn("You are using the legacy TorchScript-based ONNX export.", category, stacklevel=1)


def test_an_onnx_file_says_what_it_is(tmp_path):
    package(tmp_path, Leaf(), ["onnx"], training_metadata={"epochs": 3})
    session = onnxruntime.InferenceSession(str(tmp_path / "leaf" / FILES["onnx"][0]))
    metadata = session.get_modelmeta().custom_metadata_map
    assert (json.loads(metadata["classes"]), metadata["epochs"], metadata["opset"]) == (CLASSES, "3", "13")
    assert [given.shape for given in session.get_inputs()] == [["batch", 3, 8, 8]]
    assert [given.name for given in session.get_outputs()] == ["output"]
