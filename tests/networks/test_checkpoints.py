"""Checkpoint files of strangers: told apart, read without running anything, refused by name."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from utils.core.errors import UserError
from utils.networks import checkpoints
from utils.networks.checkpoints import read_checkpoint, reading_ahead, state_dict_of


class Canary:
    """Makes a folder when it is unpickled by a reader that runs what it reads."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def record():
    return {"model_state_dict": {"fc.weight": torch.arange(6.0).reshape(2, 3)}}


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", None])
def test_weights_are_found_under_their_usual_names_or_bare(tmp_path, key):
    weights = {"fc.weight": torch.ones(2, 3)}
    torch.save({key: weights, "extra": {}} if key else weights, tmp_path / "m.pth")
    assert torch.equal(state_dict_of(read_checkpoint(tmp_path / "m.pth"))["fc.weight"], torch.ones(2, 3))


@pytest.mark.parametrize("zipped", [True, False])
def test_numpy_scalars_pass_and_the_process_keeps_no_allowance(tmp_path, zipped):
    extra = {"accuracy": np.float64(0.5), "other": np.float32(1), "epoch": np.int64(3)}
    torch.save(record() | {"extra": extra}, tmp_path / "m.pth", _use_new_zipfile_serialization=zipped)
    before = set(torch.serialization.get_safe_globals())  # torch keeps them in a set
    assert read_checkpoint(tmp_path / "m.pth")["extra"] == extra
    assert set(torch.serialization.get_safe_globals()) == before


def test_scalars_of_numpy_1_pass(tmp_path):
    torch.save(record() | {"extra": np.float64(0.25)}, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert read_checkpoint(tmp_path / "old.pth")["extra"] == 0.25


def test_tensors_of_a_checkpoint_stay_on_disk(tmp_path):
    torch.save({"model_state_dict": {"w": torch.zeros(30_000_000)}}, tmp_path / "m.pth")  # 120 MB

    def anonymous_kilobytes():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

    before = anonymous_kilobytes()
    found = read_checkpoint(tmp_path / "m.pth")["model_state_dict"]["w"]
    assert float(found.sum()) == 0.0
    assert anonymous_kilobytes() - before < 60_000


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle 0", "pickle 4"])
def test_a_hostile_file_never_runs_and_what_it_asks_for_is_named(tmp_path, form):
    canary, path = tmp_path / "canary", tmp_path / "m.pth"
    hostile = record() | {"extra": Canary(canary)}
    if form in ("zip", "legacy"):
        torch.save(hostile, path, _use_new_zipfile_serialization=form == "zip")
    else:
        path.write_bytes(pickle.dumps(Canary(canary), protocol=int(form[-1])))
    with pytest.raises(UserError, match=r"m.pth: refused, .* it asks for (posix|nt)\.mkdir; expected"):
        read_checkpoint(path)
    assert not canary.exists()
    if form == "zip":  # the canary sings where it is let
        torch.load(path, weights_only=False)
        assert canary.exists()


def test_a_pickled_network_is_refused_by_its_class(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "m.pth")
    with pytest.raises(UserError, match=r"asks for torch.nn.modules.linear.Linear; .* model.state_dict\(\)"):
        read_checkpoint(tmp_path / "m.pth")


def test_a_refusal_is_not_followed_by_a_second_try(tmp_path, monkeypatch):
    torch.save(record() | {"extra": Canary(tmp_path / "canary")}, tmp_path / "m.pth")
    tries = []
    original = torch.load

    def counting(*arguments, **options):
        tries.append(options["weights_only"])
        return original(*arguments, **options)

    monkeypatch.setattr(torch, "load", counting)
    with pytest.raises(UserError, match="refused"):
        read_checkpoint(tmp_path / "m.pth")
    assert tries == [True]


def saved(tmp_path, zipped):
    path = tmp_path / "m.pth"
    torch.save({"model_state_dict": {"w": torch.ones(5000)}}, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.7, 0.999])
def test_truncated_files_are_called_truncated(tmp_path, zipped, kept):
    path = saved(tmp_path, zipped)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(UserError, match=r"m.pth: truncated or damaged, .*\. Copy or train it again"):
        read_checkpoint(path)


def test_other_files_are_told_apart(tmp_path):
    def refusal(name):
        with pytest.raises(UserError) as caught:
            read_checkpoint(tmp_path / name)
        return str(caught.value)

    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pth")
    with tarfile.open(tmp_path / "tar.pth", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "text.pth").write_text("weights are elsewhere")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    (tmp_path / "folder.pth").mkdir()
    assert "a TorchScript archive, which holds a program" in refusal("script.pth")
    assert "a tar file as PyTorch before 0.1.10" in refusal("tar.pth")
    assert "a zip file without data.pkl (it holds readme.txt)" in refusal("zip.pth")
    assert "empty.pth: empty" in refusal("empty.pth")
    assert "git lfs pull" in refusal("lfs.pth")
    assert "begins with b'weights '" in refusal("text.pth")
    assert "holds a list; expected a dictionary" in refusal("list.pth")
    assert "cannot be read as a checkpoint" in refusal("folder.pth")
    assert "none.pth: cannot be read as a checkpoint ([Errno 2]" in refusal("none.pth")


def test_files_of_pytorch_before_1_6_are_read_as_carefully(tmp_path):
    path = saved(tmp_path, zipped=False)
    assert read_checkpoint(path)["model_state_dict"]["w"].sum() == 5000


def test_reading_ahead_reads_the_whole_file_and_ends_with_its_block(tmp_path, monkeypatch):
    path = tmp_path / "m.pth"
    path.write_bytes(bytes(5 * checkpoints.BLOCK + 1))
    reached = threading.Event()
    original = checkpoints._read_through

    def telling(*arguments):
        original(*arguments)
        reached.set()

    monkeypatch.setattr(checkpoints, "_read_through", telling)
    with reading_ahead(path):
        assert reached.wait(30)
    with reading_ahead(tmp_path / "gone.pth"), reading_ahead(None):
        pass
    assert not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_a_safetensors_file_is_read_by_its_bytes_and_never_called_a_pickle(tmp_path):
    weights = {"fc.weight": torch.arange(6.0).reshape(2, 3)}
    save_file(weights, tmp_path / "m.safetensors")
    (tmp_path / "m.bin").write_bytes((tmp_path / "m.safetensors").read_bytes())
    for name in ("m.safetensors", "m.bin"):
        assert torch.equal(state_dict_of(read_checkpoint(tmp_path / name))["fc.weight"], weights["fc.weight"])


@pytest.mark.parametrize("kept", [4, 20, -8])
def test_a_damaged_safetensors_file_is_called_one(tmp_path, kept):
    save_file({"fc.weight": torch.ones(2, 3)}, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:kept])
    with pytest.raises(UserError, match=r"cut\.safetensors: truncated or damaged, .* as a safetensors file") as error:
        read_checkpoint(tmp_path / "cut.safetensors")
    assert "pickle" not in str(error.value)
