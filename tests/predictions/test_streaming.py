"""Images past networks: order, layout, memory, extra outputs, several image sizes, what the store keeps of it."""

from __future__ import annotations

import gc
import json
import os
import platform
import shutil
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PROJECT
from fake_cuda import fake_cuda
from PIL import Image
from preprocessings import BASE_32

from utils import base_back
from utils.core.artifacts import FileDigests
from utils.core.config_file import load_config
from utils.core.errors import UserError
from utils.core.workspace import Workspace
from utils.discovery import discover
from utils.networks import construction, memory
from utils.networks.embeddings import EmbeddingExtractor
from utils.networks.preprocessing import Preprocessing
from utils.predictions import catalog, extraction, image_splits, streaming
from utils.predictions.store import Store


def test_normalised_pixels_are_those_of_the_base_transform():
    from PIL import Image

    from utils.datasets import create_optimized_transforms

    pixels = np.random.default_rng(0).integers(0, 255, (36, 36, 3), dtype=np.uint8)
    expected = create_optimized_transforms(32, is_training=False)(Image.fromarray(pixels))
    crop = torch.from_numpy(pixels[2:34, 2:34][None])
    assert torch.equal(image_splits.normalise(crop, BASE_32)[0], expected)


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
    assert image_splits.decoding_threads(0) == 1
    assert not heard.records
    assert image_splits.decoding_threads(10_000) < 10_000
    assert "dataset.num_workers is 10000; this machine has" in heard.text


def test_a_deleted_model_frees_its_storage_even_where_it_is_still_referred_to():
    model = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.BatchNorm1d(100))
    memory.safe_delete_model(model)
    assert sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers())) == 0
    memory.cleanup_memory()


@dataclass
class Laid:
    """A workspace's images and one network's checkpoint."""

    splits: list
    cache: Path
    spec: construction.NetworkSpec
    model: torch.nn.Module

    def run(self, **options):
        settings = {"batch_size": 16, "device": "cpu", "image_cache": self.cache} | options
        return list(streaming.stream(settings.pop("spec", self.spec), settings.pop("splits", self.splits), **settings))


@pytest.fixture
def laid(trained, tmp_path):
    digests = FileDigests(tmp_path / "digests.json")
    splits = [image_splits.list_images(trained / "split_dataset", split, digests) for split in ("val", "test")]
    path = trained / "checkpoints" / "CustomResNetMish_final.pth"
    spec = construction.NetworkSpec("CustomResNetMish", path, "tiny", BASE_32, splits[0].classes)
    return Laid(splits, tmp_path / "cache", spec, streaming.open_network(spec))


def joined(batches, name="logits"):
    return np.concatenate([getattr(batch, name) for batch in batches])


def test_rows_come_in_order_whatever_the_batch_size(laid):
    batches = laid.run()
    assert [(batch.split, batch.start) for batch in batches] == [
        (split, start) for split in ("val", "test") for start in range(0, 28, 16)
    ]
    np.testing.assert_allclose(joined(laid.run(batch_size=5)), joined(batches), atol=1e-5)
    assert laid.run(splits=[]) == []


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_logits_do_not_depend_on_the_layout_in_memory(laid, layout, monkeypatch):
    from utils.datasets import create_optimized_transforms

    monkeypatch.setattr(streaming, "evaluation_format", lambda model: layout)
    transform = create_optimized_transforms(32, is_training=False)
    images = []
    for path in laid.splits[0].paths:
        with Image.open(path) as image:
            images.append(transform(image.convert("RGB")))
    with torch.inference_mode():
        expected = laid.model(torch.stack(images)).numpy()
    np.testing.assert_allclose(joined(laid.run(splits=laid.splits[:1])), expected, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pixels_are_normalised_in_place_in_the_layout_wanted(layout):
    pixels = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8)
    place = torch.empty((5, 3, 8, 8), memory_format=layout)
    found = image_splits.normalise(pixels, BASE_32, layout=layout, out=place[:3])
    assert found.data_ptr() == place.data_ptr()
    assert found.is_contiguous(memory_format=layout)
    assert torch.equal(found, image_splits.normalise(pixels, BASE_32))


def failing_above(limit, error):
    """A network that runs out of memory with more images than `limit`."""

    def install(original):
        def forward(self, images):
            if len(images) > limit:
                raise error
            return original(self, images)

        return forward

    return install


@pytest.mark.parametrize(
    "error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError(), torch.OutOfMemoryError("full")]
)
def test_a_batch_that_does_not_fit_is_halved_and_said_and_loses_no_row(laid, heard, monkeypatch, error):
    expected = joined(laid.run())
    monkeypatch.setattr(EmbeddingExtractor, "__call__", failing_above(5, error)(EmbeddingExtractor.__call__))
    batches = laid.run()
    np.testing.assert_allclose(joined(batches), expected, atol=1e-5)
    assert {batch.batch_size for batch in batches} == {4}
    assert "CustomResNetMish_final.pth: out of memory with 8 images at a time; continuing with 4" in heard.text


def test_a_single_image_that_does_not_fit_ends_the_run(laid, monkeypatch):
    monkeypatch.setattr(EmbeddingExtractor, "__call__", failing_above(0, MemoryError())(EmbeddingExtractor.__call__))
    with pytest.raises(UserError, match="out of memory with a single image of 32 px on cpu"):
        laid.run()


def test_other_errors_of_a_network_are_not_taken_for_memory(laid, monkeypatch):
    monkeypatch.setattr(
        EmbeddingExtractor, "__call__", failing_above(5, RuntimeError("boom"))(EmbeddingExtractor.__call__)
    )
    with pytest.raises(RuntimeError, match="boom"):
        laid.run()


def test_an_image_size_that_the_network_was_not_made_for_is_named(laid, monkeypatch):
    path = laid.spec.checkpoint.with_name("CustomViTHybrid_final.pth")
    spec = replace(laid.spec, architecture="CustomViTHybrid", checkpoint=path)
    fixed = streaming.open_network(spec)  # built for 32 px, as upstream's are for 224 whatever is asked
    monkeypatch.setattr(streaming, "open_network", lambda spec: fixed)
    with pytest.raises(UserError, match=r"CustomViTHybrid fails on images of 64 px \(.*expected the size"):
        laid.run(spec=replace(spec, preprocessing=Preprocessing.of_base_pipeline(64)))


def widened(laid, tmp_path, bias):
    """The network with three more outputs: as the public base pipeline leaves it for fewer than 13 folders."""
    weights = {name: value.clone() for name, value in laid.model.state_dict().items()}
    weights["network.fc.weight"] = torch.cat([weights["network.fc.weight"], torch.zeros(3, 64)])
    weights["network.fc.bias"] = torch.cat([weights["network.fc.bias"], torch.full((3,), bias)])
    torch.save({"model_state_dict": weights}, tmp_path / "wide.pth")
    return replace(laid.spec, checkpoint=tmp_path / "wide.pth")


def test_dead_outputs_are_cut_and_said(laid, tmp_path, heard):
    spec = widened(laid, tmp_path, bias=-30.0)
    np.testing.assert_allclose(joined(laid.run(spec=spec)), joined(laid.run()), atol=1e-5)
    assert "the extra outputs are never predicted on the 28 val rows" in heard.text
    only_test = joined(laid.run(spec=spec, splits=laid.splits[1:], val=laid.splits[0]))
    assert only_test.shape == (28, 4)


def test_extra_outputs_that_are_predicted_or_unchecked_are_refused_and_so_are_missing_ones(laid, tmp_path):
    with pytest.raises(streaming.ExtraOutputsError, match=r"7 outputs for 4 classes"):
        laid.run(spec=widened(laid, tmp_path, bias=30.0))
    with pytest.raises(UserError, match="no val split to check"):
        laid.run(spec=widened(laid, tmp_path, bias=-30.0), splits=laid.splits[1:])
    with pytest.raises(UserError, match="4 outputs for 5 classes"):
        laid.run(spec=replace(laid.spec, classes=("0", "1", "2", "3", "4")))


@pytest.mark.parametrize("ring", [False, True])
def test_a_network_is_gone_after_its_pass_and_only_a_ring_costs_a_collection(laid, monkeypatch, ring):
    alive, collections = [], []
    original = streaming.open_network

    def tracking(spec):
        network = original(spec)
        if ring:
            network.itself = [network]
        alive.append(weakref.ref(network))
        return network

    monkeypatch.setattr(streaming, "open_network", tracking)
    collecting = SimpleNamespace(collect=lambda: (collections.append(1), gc.collect()))
    monkeypatch.setattr(memory, "gc", collecting)
    laid.run()
    assert alive[0]() is None
    assert len(collections) == ring


def test_two_image_sizes_cost_one_decode(laid, monkeypatch):
    decoder = base_back.load_bundled("image_cache")
    opened = []
    original = Image.open

    def counting(path, **options):
        opened.append(path)
        return original(path, **options)

    monkeypatch.setattr(Image, "open", counting)
    preprocessings = [Preprocessing.of_base_pipeline(size) for size in (32, 64)]
    image_splits.decode(laid.splits, preprocessings, image_cache=laid.cache, threads=2)
    assert sorted(opened) == sorted(path for images in laid.splits for path in images.paths)
    laid.run()
    for rule in (preprocessing.resizing() for preprocessing in preprocessings):
        images = laid.splits[0]
        pixels = decoder.open_images(images.paths, images.contents, rule, laid.cache)
        again = decoder.open_images(images.paths[3:4], images.contents[3:4], rule, laid.cache / "again")
        assert np.array_equal(pixels.image(3), again.image(0))
    assert len(opened) == 56 + 2


def workspace_at(base):
    names = ("split_dataset", "checkpoints", "metrics", "kfold_results", "deployment_models", "image_cache", "logs")
    return Workspace(base, *(base / name for name in names))


@pytest.fixture(scope="module")
def discovered(trained, tmp_path_factory):
    """A workspace of one network after `discover`."""
    workspace = workspace_at(tmp_path_factory.mktemp("discovered"))
    shutil.copytree(trained / "split_dataset", workspace.split_dir)
    workspace.checkpoints.mkdir()
    shutil.copy2(trained / "checkpoints" / "CustomConvNeXt_final.pth", workspace.checkpoints)
    discover.discover(load_config(PROJECT / "configs" / "votes.yaml"), workspace)
    return workspace.base


@pytest.fixture
def store(discovered, tmp_path):
    workspace = workspace_at(shutil.copytree(discovered, tmp_path, dirs_exist_ok=True))
    return Store(load_config(PROJECT / "configs" / "votes.yaml"), workspace, catalog.load(workspace))


def test_a_network_without_embeddings_is_stored_once_and_then_known(store, monkeypatch):
    monkeypatch.setattr(EmbeddingExtractor, "_methods_agree", lambda self, images, logits: False)
    monkeypatch.setattr("utils.networks.embeddings._heads", lambda calls, logits: ())
    member = store.catalog.members["CustomConvNeXt"]
    extraction.ensure(store, [member], ("val",))
    assert not store.workspace.embeddings("CustomConvNeXt", "val").exists()
    record = json.loads(store.workspace.embeddings_record("CustomConvNeXt", "val").read_text())
    assert record["width"] == 0
    monkeypatch.setattr(streaming, "stream", None)
    extraction.ensure(store, [member], ("val",))
    assert store.rows(member, "val").logits.shape == (28, 4)


def test_the_record_tells_the_batch_size_that_memory_allowed(store, monkeypatch):
    monkeypatch.setattr(EmbeddingExtractor, "__call__", failing_above(10, MemoryError())(EmbeddingExtractor.__call__))
    extraction.ensure(store, [store.catalog.members["CustomConvNeXt"]], ("val",))
    record = json.loads((store.workspace.predictions("CustomConvNeXt", "val") / "record.json").read_text())
    assert record["batch_size"] == 7


def test_the_next_members_file_is_read_while_this_one_runs(store, monkeypatch):
    from contextlib import contextmanager

    first = store.catalog.members["CustomConvNeXt"]
    second = replace(first, name="Other")
    store.catalog = replace(store.catalog, members=store.catalog.members | {"Other": second})
    order = []

    @contextmanager
    def telling(path):
        order.append(path and path.name)
        yield
        order.append("done")

    monkeypatch.setattr(extraction, "reading_ahead", telling)
    extraction.ensure(store, [first, second], ("val",))
    assert order == ["CustomConvNeXt_final.pth", "done", None, "done"]


def test_on_a_gpu_a_batch_is_moved_once_and_its_outputs_come_back_together(laid, monkeypatch):
    expected = laid.run(batch_size=2)
    with fake_cuda(monkeypatch) as device:
        batches = laid.run(device="cuda:0", batch_size=2)
    assert [batch.start for batch in batches if batch.split == "val"] == [0, 2, 6, 14]
    for name in ("logits", "embeddings"):
        np.testing.assert_allclose(joined(batches, name), joined(expected, name), atol=1e-5)
    n_weights = len(laid.model.state_dict())
    n_probes = 1
    assert device.counts["to device"] <= n_weights + n_probes + len(batches)
    assert device.counts["to host"] == 2 * len(batches)  # logits and embeddings


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_doubles_its_batch_and_agrees_with_the_cpu(laid):
    batches = laid.run(device="cuda:0", batch_size=2)
    assert [batch.start for batch in batches if batch.split == "val"] == [0, 2, 6, 14]
    np.testing.assert_allclose(joined(batches), joined(laid.run()), atol=0.3)  # bfloat16 keeps three digits
    np.testing.assert_array_equal(joined(batches).argmax(1), joined(laid.run()).argmax(1))


def test_cores_are_told_once_however_often_images_are_decoded(heard):
    for _ in range(3):
        image_splits.decoding_threads(10_001)
    assert heard.text.count("dataset.num_workers is 10001") == 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no malloc_trim")
def test_freed_memory_is_given_back_to_the_system():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    memory.trim_memory()
    kept = [np.ones(8000) for _ in range(3000)][-1]  # the last one keeps the others' room from shrinking by itself
    before = resident()
    memory.trim_memory()
    assert before - resident() > 100e6
    assert kept[0] == 1


def test_memory_is_given_back_after_every_network(laid, monkeypatch):
    given_back = []
    monkeypatch.setattr(streaming, "trim_memory", lambda: given_back.append(1))
    for count in (1, 2):
        list(streaming.stream(laid.spec, laid.splits, batch_size=8, device="cpu", image_cache=laid.cache))
        assert len(given_back) == count
