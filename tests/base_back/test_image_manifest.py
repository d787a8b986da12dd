"""CSV manifests: what is read, and what is refused by file, line, value, expectation and remedy."""

from __future__ import annotations

import re

import pytest
from image_folders import write_manifest

from utils.image_manifest import ManifestError, read_manifest_file
from utils.image_sets import open_image_set

HEADER = "file_name,label\n"


def refusal(path) -> str:
    with pytest.raises(ManifestError) as caught:
        read_manifest_file(path)
    message = str(caught.value)
    assert message.startswith(str(path.parent))
    return message.replace(str(path), "M").replace(str(path.parent), "DIR")


def test_rows_keep_splits_groups_and_line_numbers(tmp_path):
    text = "label,file_name,width,split,group\ncat,a.png,20,train,p1\n\ndog,b/../b.png,20,Validation,\n"
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    (tmp_path / "metadata.csv").write_text(text)
    manifest = read_manifest_file(tmp_path / "metadata.csv")
    rows = [(row.line, row.file_name, row.label, row.split, row.group) for row in manifest.rows]
    assert rows == [(2, "a.png", "cat", "train", "p1"), (4, "b.png", "dog", "val", None)]
    assert manifest.ignored == ("width",)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_byte_order_mark_line_ends_and_quotes_are_read(tmp_path, encoding, newline):
    lines = ["file_name,label", '"a, ""b"".png","leaf, dry"', "ü.png,grün"]
    for name in ('a, "b".png', "ü.png"):
        (tmp_path / name).touch()
    path = tmp_path / "set.csv"
    path.write_bytes((newline.join(lines) + newline).encode(encoding))
    assert [(row.file_name, row.label) for row in read_manifest_file(path).rows] == [
        ('a, "b".png', "leaf, dry"),
        ("ü.png", "grün"),
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "M: empty; expected file_name,label, optionally split and group"),
        (b"\xef\xbb\xbf\n\n", "M: empty"),
        (HEADER.encode(), "M: no row; expected one row per image below the header file_name,label"),
        ((HEADER + "ä.png,a").encode("latin-1"), "M, line 2: byte 0xe4 is not UTF-8; save the file as CSV in UTF-8"),
        ((HEADER + "a.png,a").encode("utf-16"), "M: encoded in UTF-16; expected UTF-8"),
        ((HEADER + 'a.png,a\n"b.png,a\n').encode(), "M, line 3: not valid CSV (unexpected end of data)"),
        (b"file_name;label\na.png;a\n", "M, line 1: fields separated by semicolons; expected commas"),
        (b"file_name,label\na.png,a,b\n", "M, line 2: 3 field(s); the header has 2; quote values that contain a comma"),
        (b"file_name,label,label\n", "M, line 1: column 'label' occurs 2 times; keep one of them"),
        (b"filename,label\n", "M, line 1: no column 'file_name' among 'filename', 'label'; did you mean 'filename'?"),
        (b"file_name,class\n", "did you mean 'class'? Rename it to 'label'"),
        (b"file_name,Label\n", "did you mean 'Label'? Rename it to 'label'"),
        (b"file_name,lable\n", "did you mean 'lable'? Rename it to 'label'"),
        (b"file_name,width\n", "expected file_name,label, optionally split and group; add the column"),
        (b"file_name,label,Split\n", "column 'Split' is not one of a manifest; did you mean 'split'?"),
        (b"file_name,label,gruop\n", "column 'gruop' is not one of a manifest; did you mean 'group'?"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused(tmp_path, content, words):
    path = tmp_path / "metadata.csv"
    path.write_bytes(content)
    assert words in refusal(path)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (",a", "M, line 3: file_name '': empty"),
        ("/etc/a.png,a", "file_name '/etc/a.png': an absolute path; expected a path below the manifest's folder"),
        (r"C:\x\a.png,a", "an absolute path"),
        ("~/a.png,a", "an absolute path"),
        ("x/../../a.png,a", "file_name 'x/../../a.png': a path that leaves the manifest's folder"),
        ("https://x.org/a.png,a", "an address; images are read from disk"),
        ("a.gif,a", "file_name 'a.gif': .gif; expected .jpg, .jpeg, .png, .bmp, .tif, .tiff, .webp; convert the image"),
        ("none.png,a", "M, line 3: file_name 'none.png': no such file in DIR; 1 of 2 rows name missing files"),
        (r"in\side.png,a", "no such file; did you mean 'in/side.png'?"),
        ("a.png,", "label '': empty; expected a name that a folder can have"),
        ("a.png,a/b", "label 'a/b': contains a slash"),
        ("a.png,.a", "begins with a dot"),
        ("a.png,..", "begins with a dot"),
        ('a.png,"a\nb"', "contains a control character"),
        ("a.png," + "x" * 300, "longer than 255 bytes"),
        ("b.png,a", "M, line 3: file_name 'b.png' occurs in line 2 already; expected each file once"),
        ("./b.png,a", "file_name 'b.png' occurs in line 2 already"),
        ("b.png,c", "occurs in line 2 already with the label 'a' there and 'c' here"),
        ("a.png,A", "label 'A' differs from 'a' in line 2 in case or encoding only"),
        ("a.png,a", "M: one class only ('a'); expected at least two classes"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused(tmp_path, row, words):
    for name in ("a.png", "b.png", "in/side.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    path = tmp_path / "metadata.csv"
    path.write_text(f"{HEADER}b.png,a\n{row}\n")
    assert words in refusal(path)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (("train,", "tset,"), "M, line 3: split 'tset'; did you mean 'test'? Expected one of train, val, valid,"),
        (("train,", ","), "M, line 3: split ''; expected one of"),
        (("train,p1", "test,p1"), "group 'p1' is in test and, in line 2, in train; expected each group"),
    ],
)
def test_splits_and_groups_must_agree(tmp_path, rows, words):
    text = "file_name,label,split,group\n" + "".join(f"{n}.png,c{n},{row}\n" for n, row in enumerate(rows))
    assert words in refusal(write_manifest(tmp_path, text))


def test_the_class_list_gives_names_and_order(tmp_path):
    path = write_manifest(tmp_path, HEADER + "1.png,mild\n2.png,severe\n3.png,none\n")
    assert read_manifest_file(path).classes == ("mild", "none", "severe")
    labels = tmp_path / "labels.txt"
    labels.write_bytes("\ufeffnone\r\nmild\r\n\r\nsevere\r\n".encode())
    assert read_manifest_file(path).classes == ("none", "mild", "severe")
    images = open_image_set(path)
    assert images.is_ordered
    assert [s.sample_id for s in images.samples] == ["none/3.png", "mild/1.png", "severe/2.png"]
    assert [s.label for s in images.samples] == [0, 1, 2]
    labels.write_text("none\nMild\nsevere\n")
    assert (
        "M, line 2: label 'mild' is not in labels.txt, which lists 'none', 'Mild', 'severe'; did you mean 'Mild'?"
        in refusal(path)
    )
    labels.write_text("none\nmild\nsevere\nlethal\n")
    assert "DIR/labels.txt: no row of metadata.csv has the label 'lethal'" in refusal(path)
    labels.write_text("none\nmild\nnone\n")
    assert "DIR/labels.txt, line 3: class 'none' stands in line 1 already" in refusal(path)
    labels.write_text("\n")
    assert "DIR/labels.txt: empty; expected one class name per line" in refusal(path)


def test_equal_file_names_of_one_class_keep_distinct_ids(tmp_path):
    names = ["a/x.jpg", "b/x.jpg", "b/c/x.jpg", "x__a.jpg", "y.jpg", "d/X.jpg"]
    path = write_manifest(tmp_path, HEADER + "".join(f"{name},one\n" for name in names) + "z/y.jpg,two\n")
    images = open_image_set(path)
    ids = dict(zip(images.names, (sample.sample_id for sample in images.samples), strict=True))
    assert len({sample_id.casefold() for sample_id in ids.values()}) == 7
    assert ids["y.jpg"] == "one/y.jpg"
    assert ids["z/y.jpg"] == "two/y.jpg"
    assert ids["b/c/x.jpg"] == "one/x__b__c.jpg"
    assert re.fullmatch(r"one/x__[0-9a-f]{16}\.jpg", ids["a/x.jpg"])  # its plain form is another file's name
    assert open_image_set(path) == images
