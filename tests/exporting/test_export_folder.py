"""The folder of an export: replaced as a whole, recovered, verified by checksums."""

from __future__ import annotations

import pytest

from utils.core.artifacts import write_json
from utils.core.errors import UserError
from utils.exporting import export_folder
from utils.exporting.export_folder import replacing_folder


@pytest.fixture
def final(tmp_path):
    """An export with one file, its status and its checksums."""
    folder = tmp_path / "it"
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx" / "it.onnx").write_bytes(b"graph")
    digest = export_folder.file_sha256(folder / "onnx" / "it.onnx")
    entry = {"status": "ok", "files": {"onnx/it.onnx": digest}, "source_digest": "s", "size_mb": 0.1}
    export_folder.write_records(folder, {"training": {"ensemble": "it"}}, ("a", "b"), {"onnx": entry})
    return folder


def test_a_folder_is_replaced_when_the_block_succeeds(tmp_path):
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "old").touch()
    with replacing_folder(tmp_path / "it") as staged:
        (staged / "new").touch()
        assert (tmp_path / "it" / "old").exists()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["it", "it/new"]


def test_a_folder_stays_when_the_block_fails(final, tmp_path):
    before = export_folder.compute_checksums(final)

    def write_and_fail():
        with replacing_folder(final) as staged:
            (staged / "new").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    assert export_folder.compute_checksums(final) == before
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_an_interrupted_swap_is_restored(tmp_path):
    (tmp_path / ".it.previous").mkdir()
    (tmp_path / ".it.previous" / "old").touch()
    (tmp_path / ".it.abcdefgh.partial").mkdir()
    export_folder.recover_interrupted(tmp_path / "it")
    assert [path.name for path in tmp_path.iterdir()] == ["it"]
    assert (tmp_path / "it" / "old").is_file()


def test_folders_of_killed_exports_are_recognised_by_name_and_content(final, tmp_path):
    (tmp_path / ".it.abcdefgh.partial" / "it").mkdir(parents=True)
    (tmp_path / ".it.previous").mkdir()
    (tmp_path / ".gone.previous").mkdir()  # has no successor, so it is the only copy
    (tmp_path / ".other.abcdefgh.partial" / "mine").mkdir(parents=True)
    names = {item.paths[0].name for item in export_folder.unfinished_folders(tmp_path)}
    assert names == {".it.abcdefgh.partial", ".it.previous"}


def test_an_export_of_the_base_pipeline_is_not_replaceable(final, tmp_path):
    assert export_folder.is_replaceable(tmp_path / "absent")
    assert export_folder.is_replaceable(final)
    write_json(final / export_folder.METADATA, {"architecture": "it"})
    assert not export_folder.is_replaceable(final)


@pytest.mark.parametrize(
    ("digest", "content", "names"), [("s", b"graph", {"onnx"}), ("t", b"graph", set()), ("s", b"x", set())]
)
def test_formats_of_the_same_source_with_intact_files_are_reusable(final, digest, content, names):
    (final / "onnx" / "it.onnx").write_bytes(content)
    assert export_folder.reusable_formats(final, digest).keys() == names


PARITY = {"max_abs_diff": 1e-7, "tolerance": 1e-4}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size_mb": None}, r"'onnx' / 'size_mb' is null; expected a number"),
        ({"parity": PARITY | {"max_abs_diff": None}}, r"'parity' / 'max_abs_diff' is null; expected a number"),
        ({"parity": PARITY | {"tolerance": None}}, r"'parity' / 'tolerance' is null; expected a number"),
        ({"test_accuracy": {"change": None}}, r"'test_accuracy' / 'change' is null; expected a number"),
    ],
)
def test_an_entry_of_written_files_has_the_numbers_that_are_shown(final, changes, words):
    entry = export_folder.read_status(final)["onnx"]
    write_json(final / export_folder.STATUS, {"onnx": dict(entry) | changes})
    with pytest.raises(UserError, match=f"export_status.json: damaged, .*{words}. Export it again with --force"):
        export_folder.read_status(final)
    write_json(final / export_folder.STATUS, {"onnx": dict(entry) | changes | {"status": "failed"}})
    assert export_folder.read_status(final)["onnx"]["status"] == "failed"


@pytest.mark.parametrize("name", ["/etc/hostname", "../outside", "onnx/../../outside", "link/file", "a\0b"])
def test_files_outside_the_folder_are_refused(final, tmp_path, name):
    (final / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="expected files in this folder"):
        export_folder.entry_files(final, {"files": {name: "0"}})


def test_files_are_linked_into_the_next_export(final, tmp_path):
    export_folder.link_files(final, tmp_path / "next", {"files": {"onnx/it.onnx": "0"}})
    assert (tmp_path / "next" / "onnx" / "it.onnx").stat().st_ino == (final / "onnx" / "it.onnx").stat().st_ino


def test_files_that_failed_leave_the_place_of_usable_ones(final):
    export_folder.move_to_failed(final, "onnx")
    assert not (final / "onnx").exists()
    assert (final / "failed" / "onnx" / "it.onnx").read_bytes() == b"graph"
    (final / "tflite").mkdir()
    export_folder.move_to_failed(final, "tflite")
    assert not (final / "failed" / "tflite").exists()  # nothing was written of it


def test_each_difference_from_the_checksums_is_named(final):
    assert export_folder.checksum_mismatches(final) == []
    (final / "onnx" / "it.onnx").write_bytes(b"other")
    (final / export_folder.CLASSES).unlink()
    (final / "extra").touch()
    (final / "link").symlink_to(final / "extra")
    assert export_folder.checksum_mismatches(final) == [
        "link: a symbolic link",
        "class_mapping.json: missing",
        "extra: not part of the export",
        "onnx/it.onnx: changed",
    ]
    with pytest.raises(UserError, match=r"no checksums\.json"):
        export_folder.checksum_mismatches(final / "onnx")


def test_a_full_disk_is_reported_before_anything_is_written(tmp_path):
    export_folder.require_free_space(tmp_path / "absent" / "it", 0)
    with pytest.raises(UserError, match="are free"):
        export_folder.require_free_space(tmp_path / "absent" / "it", 1 << 62)
