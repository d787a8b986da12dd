"""Declarations of timm networks: folders and files that fit become candidates, others are refused before a write."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from listed_images import CLASSES, scan_of
from timm_folders import ARCHITECTURE, change_config, save_folder

from utils.core.errors import UserError
from utils.discovery import declarations
from utils.discovery.declarations import Options
from utils.discovery.identification import identify
from utils.predictions.catalog import Catalog, is_declared

TIMM_RECORD = "160 px of shorter side 168, bilinear, mean 0.5, std 0.5"


@pytest.fixture
def scan(tmp_path):
    return scan_of(tmp_path / "w")


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder with a network of three classes, to be copied."""
    folder = tmp_path_factory.mktemp("saved") / "leaf"
    save_folder(folder, CLASSES, label_names=["bee", "cat", "ant"])
    return folder


@pytest.fixture
def leaf(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "leaf")


def declare(scan, *add, earlier=None, **options):
    return declarations.declared(scan, Options(add=add, **options), earlier)


def one(scan, *add, **options):
    (declaration,) = declare(scan, *add, **options).declarations
    return declaration


def codes(declaration):
    return {problem.code for problem in declaration.problems}


def refused(scan, *add, **options):
    with pytest.raises(UserError) as error:
        declare(scan, *add, **options)
    return str(error.value)


def catalog_of(scan, requested, earlier=None):
    """The catalog that a discovery writes of the declarations."""
    members = {c.name: identify(scan, c)[0] for c in declarations.member_candidates(scan, requested, earlier)}
    problems = declarations.problems_of(scan.workspace, requested, members, earlier)
    return Catalog({"path": "", "kind": "", "digest": ""}, CLASSES, {}, members, tuple(problems))


# folders --------------------------------------------------------------------------------------------------------------


def test_a_folder_says_architecture_classes_and_preprocessing(scan, leaf):
    declaration = one(scan, f"leaf=local-dir:{leaf}")
    assert (declaration.architecture, declaration.weights) == (ARCHITECTURE, leaf / "model.safetensors")
    assert declaration.classes == ("bee", "cat", "ant")
    assert declaration.preprocessing.describe() == f"{TIMM_RECORD} (config.json)"
    assert declaration.problems == ()


def test_weights_of_other_names_are_found(scan, leaf):
    weights = torch.nn.Module.state_dict(save_folder(leaf / "other", CLASSES))
    for name in ("pytorch_model.bin", "best.pth"):
        for path in leaf.glob("*.*"):
            if path.suffix in (".safetensors", ".bin", ".pth"):
                path.unlink()
        torch.save(weights, leaf / name)
        assert one(scan, f"leaf=local-dir:{leaf}").weights == leaf / name


def test_names_of_hugging_face_and_of_older_timm_are_understood(scan, leaf):
    record = json.loads((leaf / "config.json").read_text())
    names = {"id2label": {"0": "cat", "1": "ant", "2": "bee"}}
    (leaf / "config.json").write_text(json.dumps({"architecture": ARCHITECTURE} | record["pretrained_cfg"] | names))
    declaration = one(scan, f"leaf=local-dir:{leaf}")
    assert declaration.classes == ("cat", "ant", "bee")
    assert declaration.preprocessing.describe() == f"{TIMM_RECORD} (config.json)"


def test_without_a_class_list_the_order_of_the_folders_is_assumed_with_a_warning(scan, leaf):
    change_config(leaf, {"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}}, remove=["label_names"])
    declaration = one(scan, f"leaf=local-dir:{leaf}")
    assert (declaration.classes, codes(declaration)) == (CLASSES, {"classes_assumed"})


def test_the_image_processor_of_hugging_face_counts_more_than_the_configuration(scan, leaf):
    processor = {"image_processor_type": "ViTImageProcessor", "size": 96, "resample": 3}
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (leaf / "preprocessor_config.json").write_text(json.dumps(processor))
    declaration = one(scan, f"leaf=local-dir:{leaf}")
    assert declaration.preprocessing.describe().endswith("EXIF orientation applied (preprocessor_config.json)")
    assert declaration.preprocessing.input_size == 96
    assert codes(declaration) == {"preprocessing_conflict"}
    assert TIMM_RECORD in declaration.problems[0].message
    assert codes(one(scan, f"leaf=local-dir:{leaf}", preprocess=["exif=ignore"])) == set()
    processor["image_processor_type"] = "OtherImageProcessor"
    (leaf / "preprocessor_config.json").write_text(json.dumps(processor))
    assert "'OtherImageProcessor' is not supported" in refused(scan, f"leaf=local-dir:{leaf}")
    given = one(scan, f"leaf=local-dir:{leaf}", preprocess=["input_size=64"]).preprocessing
    assert (given.input_size, given.source) == (64, "user")


def test_the_input_size_that_a_network_was_built_for_is_kept(scan, tmp_path):
    save_folder(tmp_path / "vit", CLASSES, architecture="test_vit", label_names=list(CLASSES), img_size=96)
    declaration = one(scan, f"leaf=local-dir:{tmp_path / 'vit'}")
    assert declaration.preprocessing.input_size == 96


def test_a_folder_without_a_record_of_preprocessing_gets_timms_with_a_warning(scan, leaf):
    change_config(leaf, {}, remove=["pretrained_cfg"])
    declaration = one(scan, f"leaf=local-dir:{leaf}")
    assert declaration.preprocessing.describe() == f"{TIMM_RECORD} (timm)"
    assert codes(declaration) == {"preprocessing_assumed"}
    (problem,) = declaration.problems
    assert "state it: python ensemble_orchestrator.py discover --preprocess leaf:KEY=VALUE" in problem.remedy
    assert "python ensemble_orchestrator.py discover --verify" in problem.remedy


def remove_config(folder):
    (folder / "config.json").unlink()


def remove_weights(folder):
    (folder / "model.safetensors").unlink()


def truncate_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def split_weights(folder):
    remove_weights(folder)
    (folder / "model.safetensors.index.json").touch()


def prefix_weights(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    save_file({f"module.{name}": value for name, value in load_file(path).items()}, path)


def config(remove=(), **changes):
    return lambda folder: change_config(folder, changes, remove=remove)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (remove_config, "leaf: no config.json; expected config.json and model.safetensors"),
        (remove_weights, "leaf: it has no file of weights; expected"),
        (truncate_weights, "truncated or damaged, cannot be read as a safetensors file"),
        (split_weights, "the weights are split over several files"),
        (prefix_weights, "all names begin with 'module.', as DataParallel saves them"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: .*expected a JSON object"),
        (config(architecture="test_resnte"), "has no model 'test_resnte'; did you mean 'test_resnet'"),
        (config(architecture="test_resnet.r161_in1k"), "no pretrained tag .*did you mean 'test_resnet.r160_in1k'"),
        (config(architecture="test_vit"), "they share 0 of .*Name the architecture that these weights belong to"),
        (
            config(remove=["architecture"], architectures=["ViTForImageClassification"]),
            "no architecture; it describes ViTForImageClassification of transformers.*import-predictions",
        ),
        (config(num_classes=4), "different numbers of classes: num_classes 4, model_args.num_classes 3"),
        (
            config(remove=["label_names", "model_args"], num_classes=4),
            r"a classifier for 4 classes; the workspace has 3 \(ant, bee, cat\)\. Train a classifier .*--backbones "
            r"timm:test_resnet --weights \S+model\.safetensors",
        ),
        (config(remove=["label_names", "model_args"], num_classes=0), "no classifier; the workspace has 3"),
        (config(label_names=["Bee", "cat", "ant"]), r"'Bee' is no class of the workspace; did you mean 'bee'\?"),
        (
            config(label_names=["bee", "cat", "dog"]),
            "The network's classes: bee, cat, dog. The workspace's: ant, bee, cat",
        ),
        (config(id2label={"0": "ant", "1": "bee", "2": "cat"}), "label_names and id2label name different classes"),
        (
            config(model_args={"drop_rate": 0.1, "stem_type": "deep"}),
            "model_args has stem_type, with which timm builds",
        ),
        (config(model_args={"in_chans": 1}), "in_chans is 1; expected 3"),
        (config(model_args={"img_size": [160, 96]}), "model_args.img_size is .*expected equal sides"),
        (config(model_args={"global_pool": "max"}), "its global_pool is 'max'; timm builds test_resnet with 'avg'"),
        (config(model_args=["img_size"]), "model_args is .*expected an object"),
        (config(pretrained_cfg={"input_size": [3, 160, 200]}), "expected three channels and a square"),
        (config(pretrained_cfg={"crop_mode": "zoom"}), "crop_mode 'zoom'"),
        (config(pretrained_cfg={"mean": "ImageNet"}), "not the form of a timm configuration"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(scan, leaf, spoil, reason):
    spoil(leaf)
    with pytest.raises(UserError, match=rf"(?s)^--add leaf=local-dir:\S+: .*{reason}") as error:
        declare(scan, f"leaf=local-dir:{leaf}")
    assert "backbones.exclude" not in str(error.value)
    assert "pickle" not in str(error.value)


def test_a_configuration_that_contradicts_the_weights_is_refused(scan, tmp_path):
    save_folder(tmp_path / "two", CLASSES[:2])
    change_config(tmp_path / "two", {"num_classes": 3}, remove=["model_args"])
    message = refused(scan, f"leaf=local-dir:{tmp_path / 'two'}")
    assert "config.json has 3 classes; the weights in model.safetensors have 2 outputs" in message


def test_folders_that_are_not_there_are_explained(scan, leaf):
    assert "laef: no such folder" in refused(scan, f"leaf=local-dir:{leaf.with_name('laef')}")
    assert "did you mean 'leaf'?" in refused(scan, f"leaf=local-dir:{leaf.with_name('laef')}")
    assert "a file, not a folder" in refused(scan, f"leaf=local-dir:{leaf / 'config.json'}")
    assert f"declare it as leaf=local-dir:{leaf}" in refused(scan, f"leaf=timm:{ARCHITECTURE}@{leaf}")


def test_entries_that_name_files_are_not_followed(scan, leaf, tmp_path):
    torch.save({}, tmp_path / "other.pth")
    change_config(leaf, {"file": str(tmp_path / "other.pth"), "_name_or_path": "../other.pth"})
    assert one(scan, f"leaf=local-dir:{leaf}").weights == leaf / "model.safetensors"


# files ----------------------------------------------------------------------------------------------------------------


def test_a_safetensors_file_is_declared_with_its_architecture(scan, leaf):
    declaration = one(scan, f"leaf=timm:{ARCHITECTURE}@{leaf / 'model.safetensors'}")
    assert (declaration.architecture, declaration.classes) == (ARCHITECTURE, CLASSES)
    assert codes(declaration) == {"classes_assumed", "preprocessing_assumed"}


def test_the_users_words_count_more_than_the_files(scan, leaf):
    extra = {
        "classes": ["cat", "bee", "ant"],
        "preprocessing": one(scan, f"a=local-dir:{leaf}").preprocessing.as_record(),
    }
    network = save_folder(leaf / "other", CLASSES)
    torch.save({"model_state_dict": network.state_dict(), "extra": extra}, leaf / "leaf.pth")
    text = f"leaf=timm:{ARCHITECTURE}@{leaf / 'leaf.pth'}"
    declaration = one(scan, text)
    assert (declaration.classes, declaration.preprocessing.source) == (("cat", "bee", "ant"), "checkpoint")
    assert declaration.problems == ()
    changed = one(scan, text, preprocess=["mean=0.4", "input_size=96"]).preprocessing
    assert (changed.mean, changed.input_size, changed.resized, changed.source) == ((0.4,) * 3, 96, 100, "user")


def test_an_image_size_alone_means_the_base_transform_in_checkpoints_of_this_project_only(scan, leaf):
    network = save_folder(leaf / "other", CLASSES)
    extra = {"img_size": 64}
    text = f"leaf=timm:{ARCHITECTURE}@{leaf / 'leaf.pth'}"
    torch.save({"model_state_dict": network.state_dict(), "extra": extra}, leaf / "leaf.pth")
    foreign = one(scan, text)
    assert foreign.preprocessing.describe() == "64 px of shorter side 67, bilinear, mean 0.5, std 0.5 (timm)"
    assert codes(foreign) == {"classes_assumed", "preprocessing_assumed"}
    extra |= {"backbone_name": f"timm:{ARCHITECTURE}", "model_size": "full"}
    torch.save({"model_state_dict": network.state_dict(), "extra": extra}, leaf / "leaf.pth")
    own = one(scan, text)
    assert (own.preprocessing.is_base_pipeline, own.preprocessing.input_size) == (True, 64)
    assert codes(own) == {"classes_assumed"}


def test_an_input_size_that_the_architecture_refuses_is_refused(scan, tmp_path):
    save_folder(tmp_path / "vit", CLASSES, architecture="test_vit")
    text = f"leaf=local-dir:{tmp_path / 'vit'}"
    message = refused(scan, text, preprocess=["input_size=100"])
    assert message.startswith(f"--add {text}: ")
    assert "pos_embed" in message or "100 px" in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("leaf", "expected NAME=timm:ARCH@FILE, NAME=local-dir:FOLDER, NAME=hf-hub:ORG/NAME or NAME=timm:ARCH"),
        ("leaf=localdir:x", r"no such source: 'localdir'; did you mean 'local-dir'\?"),
        ("leaf.pth=local-dir:{leaf}", "expected a name that does not end in .pth"),
        ("a/b=local-dir:{leaf}", "expected a name of a letter or a digit"),
        ("soft_voting=local-dir:{leaf}", "the name is reserved"),
        (
            "leaf=timm:test_resnet",
            "the pretrained weights of test_resnet: a classifier for 1000 classes; .*--weights hub",
        ),
    ],
)
def test_other_forms_and_names_are_refused(scan, leaf, text, reason):
    with pytest.raises(UserError, match=reason):
        declare(scan, text.format(leaf=leaf))


def test_several_at_once_are_all_or_none_and_have_different_names(scan, leaf):
    both = (f"leaf=local-dir:{leaf}", f"tree=timm:{ARCHITECTURE}@{leaf / 'model.safetensors'}")
    assert [declaration.name for declaration in declare(scan, *both).declarations] == ["leaf", "tree"]
    assert "the name leaf occurs twice" in refused(scan, both[0], both[0])
    assert "no such file" in refused(scan, both[0], f"tree=timm:{ARCHITECTURE}@{leaf / 'none.pth'}")


# folders of folders ---------------------------------------------------------------------------------------------------


def test_every_folder_below_is_declared_and_bad_ones_are_named_failures(scan, saved, tmp_path):
    root = tmp_path / "networks"
    for name in ("leaf", "deep/tree", "deep/er/bush", "soft_voting", ".cache/hidden"):
        shutil.copytree(saved, root / name)
    for name in ("broken", "bare"):
        shutil.copytree(saved, root / name)
    truncate_weights(root / "broken")
    remove_config(root / "bare")
    (root / "notes.txt").touch()
    (root / "linked").symlink_to(saved)
    (root / "empty").mkdir()
    result = declare(scan, add_from=[str(root)])
    assert [declaration.name for declaration in result.declarations] == ["bush", "tree", "leaf"]
    failures = "\n".join(sorted(result.failures))
    assert len(result.failures) == 3
    assert f"--add-from {root}: bare: {root / 'bare'}: no config.json" in failures
    assert f"--add-from {root}: broken: {root / 'broken' / 'model.safetensors'}: truncated or damaged" in failures
    assert "soft_voting: the name is reserved" in failures
    assert result.messages == (
        "declared from folders: bush, tree, leaf",
        f"passed over in {root}, since they are files or links: linked, notes.txt",
    )


def test_folders_of_the_same_name_are_both_left_out(scan, saved, tmp_path):
    for name in ("a/best", "b/Best", "c"):
        shutil.copytree(saved, tmp_path / "networks" / name)
    result = declare(scan, add_from=[str(tmp_path / "networks")])
    assert [declaration.name for declaration in result.declarations] == ["c"]
    (failure,) = result.failures
    assert "a/best and " in failure
    assert "have the same name" in failure
    assert "--add NAME=local-dir:" in failure


def test_a_root_without_networks_is_refused(scan, leaf, tmp_path):
    assert "no folder of a network below it" in refused(scan, add_from=[str(scan.workspace.base)])
    assert "no such folder; did you mean 'leaf'?" in refused(scan, add_from=[str(tmp_path / "laef")])
    assert "a file, not a folder" in refused(scan, add_from=[str(leaf / "config.json")])
    assert f"declared with --add NAME=local-dir:{leaf}" in refused(scan, add_from=[str(leaf)])


# later ----------------------------------------------------------------------------------------------------------------


def test_a_later_discovery_keeps_class_order_preprocessing_and_warnings(scan, leaf):
    change_config(leaf, {}, remove=["pretrained_cfg"])
    first = catalog_of(
        scan, declare(scan, f"leaf=local-dir:{leaf}", f"bare=timm:{ARCHITECTURE}@{leaf / 'model.safetensors'}")
    )
    shutil.copy(leaf / "model.safetensors", leaf.parent / "kept.safetensors")
    again = catalog_of(scan, declare(scan, earlier=first), first)
    assert again.members == first.members
    assert again.members["leaf"].classes == ("bee", "cat", "ant")
    expected = {("leaf", "preprocessing_assumed"), ("bare", "preprocessing_assumed"), ("bare", "classes_assumed")}
    assert {(problem.member, problem.code) for problem in again.problems} == expected
    assert sorted(map(str, again.problems)) == sorted(map(str, first.problems))


def test_the_preprocessing_of_a_declared_network_can_be_stated_later(scan, leaf):
    change_config(leaf, {}, remove=["pretrained_cfg"])
    first = catalog_of(scan, declare(scan, f"leaf=local-dir:{leaf}"))
    requested = declare(scan, earlier=first, preprocess=["leaf:mean=0.4", "leaf:input_size=96"])
    second = catalog_of(scan, requested, first)
    member = second.members["leaf"]
    assert (member.img_size, member.preprocessing["source"]) == (96, "user")
    assert member.digest != first.members["leaf"].digest
    assert second.problems == ()
    assert catalog_of(scan, declare(scan, earlier=second), second).members == second.members
    with pytest.raises(UserError, match=r"laef is no network that was declared .*did you mean 'leaf'\?"):
        declare(scan, earlier=first, preprocess=["laef:mean=0.4"])
    with pytest.raises(UserError, match=r"for which network\? .*where NAME is one of leaf"):
        declare(scan, earlier=first, preprocess=["mean=0.4"])


def test_networks_of_the_base_pipeline_on_timm_are_not_declared_ones(scan, leaf):
    member = catalog_of(scan, declare(scan, f"leaf=local-dir:{leaf}")).members["leaf"]
    assert is_declared(scan.workspace, member)
    trained = member.checkpoints[0] | {"path": "checkpoints/leaf_final.pth"}
    assert not is_declared(scan.workspace, replace(member, checkpoints=(trained,)))
