"""Opening checkpoints and running networks."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from utils import streaming
from utils.errors import UserError


@pytest.fixture
def heard(caplog):
    logger = logging.getLogger("disease_pipeline")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", None])
def test_weights_are_found_under_their_usual_names_or_bare(tmp_path, key):
    weights = {"fc.weight": torch.ones(2, 3)}
    torch.save({key: weights, "extra": {}} if key else weights, tmp_path / "m.pth")
    found = streaming.weights_of(streaming.read_checkpoint(tmp_path / "m.pth"))
    assert torch.equal(found["fc.weight"], torch.ones(2, 3))


def test_numpy_scalars_pass_and_the_process_keeps_no_allowance(tmp_path):
    extra = {"accuracy": np.float64(0.5), "other": np.float32(1), "epoch": np.int64(3)}
    torch.save({"model_state_dict": {}, "extra": extra}, tmp_path / "m.pth")
    before = torch.serialization.get_safe_globals()
    assert streaming.read_checkpoint(tmp_path / "m.pth")["extra"]["accuracy"] == 0.5
    assert torch.serialization.get_safe_globals() == before


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none.pth: cannot be read as a checkpoint"):
        streaming.read_checkpoint(tmp_path / "none.pth")


def test_a_legacy_pickle_that_runs_code_is_refused(tmp_path):
    import pickle

    class Hostile:
        def __reduce__(self):
            return eval, ("1",)

    (tmp_path / "m.pth").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match=r"m.pth: (refused|cannot be read)"):
        streaming.read_checkpoint(tmp_path / "m.pth")


def test_normalised_pixels_are_those_of_the_base_transform():
    from PIL import Image

    from utils.datasets import create_optimized_transforms

    pixels = np.random.default_rng(0).integers(0, 255, (36, 36, 3), dtype=np.uint8)
    expected = create_optimized_transforms(32, is_training=False)(Image.fromarray(pixels))
    crop = torch.from_numpy(pixels[2:34, 2:34][None])
    assert torch.equal(streaming.normalise(crop)[0], expected)


def test_devices(heard, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert streaming.resolve_device("cpu") == "cpu"
    assert streaming.resolve_device("auto") == "cpu"
    assert not heard.records
    assert streaming.resolve_device("cuda") == "cpu"
    assert "device cuda: no CUDA device here, the CPU is used" in heard.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert streaming.resolve_device("cuda") == "cuda:0"
    with pytest.raises(UserError, match=r"device cuda:3: this machine has 1 CUDA device"):
        streaming.resolve_device("cuda:3")


def test_decoding_threads_are_capped_with_a_warning(heard):
    assert streaming.decoding_threads(0) == 1
    assert not heard.records
    assert streaming.decoding_threads(10_000) < 10_000
    assert "dataset.num_workers is 10000; this machine has" in heard.text


def test_a_deleted_model_frees_its_storage_even_where_it_is_still_referred_to():
    model = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.BatchNorm1d(100))
    streaming.safe_delete_model(model)
    assert sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers())) == 0
    streaming.cleanup_memory()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_agrees_with_the_cpu(trained):
    from utils.streaming import NetworkSpec

    spec = NetworkSpec(
        "CustomResNetMish", trained / "checkpoints" / "CustomResNetMish_final.pth", "tiny", 32, ("0", "1", "2", "3")
    )
    images = torch.randn(8, 3, 32, 32)
    model = streaming.open_network(spec)
    with torch.inference_mode():
        expected, _ = streaming.logits_and_embeddings(model, images)
        found, _ = streaming.logits_and_embeddings(model.cuda(), images.cuda())
    torch.testing.assert_close(found.cpu(), expected, atol=1e-2, rtol=0)
