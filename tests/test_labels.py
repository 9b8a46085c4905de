"""Labels keep their type and their column, classes their number, whatever a set looks like."""

import io
import os
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rcmae.commands.shards import make as make_command
from rcmae.data.index import ShardIndex
from rcmae.data.packing.labels import column_of, in_order, order_doubt, read_labels
from rcmae.data.packing.writer import PackingOptions, make_shards
from rcmae.errors import Refused


def labels(*cells, **more):
    return read_labels("label", cells, lambda row: f"row {row}", **more).labels


@pytest.mark.parametrize(
    "cells",
    [
        ("0", "1", "10", "2"),
        ("0.0", "1.0", "10.0", "2.0"),
        (" 0", "1 ", "\t10", "2."),
        ("0", "+1", "1e1", "2"),
        (0.0, 1.0, 10.0, 2.0),
        (Decimal(0), Decimal("1.0"), Decimal(10), Decimal(2)),
        (0, 1, 10, 2),
    ],
)
def test_numbers_stay_numbers_however_they_are_spelled(cells):
    assert labels(*cells) == [0, 1, 10, 2]


def test_a_gap_and_minus_one_are_no_label_where_that_is_said():
    for gap in ("", None, "-1", -1, -1.0, "nan", float("nan"), "NULL", "<NA>"):
        assert labels(3, gap, "4", gaps=True) == [3, None, 4]
        with pytest.raises(Refused, match=r"no label for 1 of 3 images: .* in row 1; --unlabelled"):
            labels(3, gap, "4")
        assert labels(gap, gap) == [None, None]
    assert labels("cat", "", gaps=True) == ["cat", None]


def test_truth_is_0_or_1_and_words_are_names():
    assert labels(True, False) == [1, 0]
    assert labels("cat ", " dog") == ["cat", "dog"]


def test_what_may_be_a_gap_among_names_becomes_no_class_by_itself():
    for word in ("nan", "None", "NULL", "N/A", "<NA>"):
        with pytest.raises(Refused, match=f"2 names, and 1 cells that may be gaps: '{word}'"):
            labels("cat", word, "dog")
        assert labels("cat", word, has_classes=True) == ["cat", word]


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        (("1", "2", "unknown"), r"2 whole numbers, and 1 cells that are none: 'unknown' in row 2"),
        ((1.0, 2.5), r"'2.5' in row 1"),
        ((0.5, 10.5, 2.5), r"numbers that are not classes: '0.5' in row 0"),
        (("0.25", "1e-3"), r"numbers that are not classes"),
        (("-1", "cat", "dog"), r"the numbers: '-1' in row 0"),
        (("1", "inf"), r"'inf' in row 1"),
        ((1, float("inf")), r"'inf' in row 1"),
        (("1", "-2"), r"not classes: '-2' in row 1"),
        ((3_000_000_000, 1), r"not classes: '3000000000' in row 0"),
        (("1", "1e30"), r"not classes: '1e30' in row 1"),
        (("1", "1e999999999"), r"'1e999999999' in row 1"),
        (("1_0", "2"), r"'1_0' in row 0"),
        (([1], [2]), r"holds list in row 0"),
        ((b"1",), r"holds bytes in row 0"),
    ],
)
def test_what_is_no_label_is_refused_with_its_row(cells, reason):
    with pytest.raises(Refused, match=reason):
        labels(*cells)


def test_what_was_taken_is_told():
    told = read_labels("Label", ["3", "1", ""], str, gaps=True).told
    assert told == "column 'Label': 2 labels, the numbers 1 to 3; 1 image without one"
    assert read_labels("x", ["b", "a"], str).told == "column 'x': 2 labels, 2 names"
    assert read_labels("x", ["-1"], str).told.startswith("column 'x': no labels at all")


def test_a_column_that_could_be_meant_is_taken_or_named():
    for names in (["path", "label"], ["Label", "label"], ["labels", "label"]):
        assert column_of("label", names, likely=True) == "label"
    for name in (" label", "LABEL", "labels", "fine_label"):
        assert column_of("label", ["path", name], likely=True) == name
    assert column_of("label", ["coarse_label", "fine_label"], likely=True) == "fine_label"
    assert column_of("label", ["path", "width"], likely=True) is None
    assert column_of("label", ["label", "age"], "age", likely=True) == "age"
    for name in (
        "class",
        "class_id",
        "Category",
        "target",
        "coarse_label",
        "y",
        "label_idx",
        "lable",
        "species",
        "gt",
        "ground_truth",
        "label.1",
        "synset",
    ):
        with pytest.raises(Refused, match=f"'{name}'; say which has the labels with --label"):
            column_of("label", ["path", name], likely=True)
    with pytest.raises(Refused, match="2 columns are called label"):
        column_of("label", ["Label", " label"])
    with pytest.raises(Refused, match="no column 'age'"):
        column_of("label", ["label"], "age")


def test_folders_of_numbers_are_in_their_order_and_odd_orders_are_told():
    assert in_order(["10", "2", "0", "1"]) == ["0", "1", "2", "10"]
    assert in_order(["b2", "b10", "a"]) == ["a", "b10", "b2"]
    assert order_doubt(["0", "1", "2"]) == ""
    assert order_doubt(["ant", "bee"]) == ""
    assert "'1' is label 0" in order_doubt(["1", "2"])
    assert "'b10' is label 1, before 'b2'" in order_doubt(["a", "b10", "b2"])


# ------------------------------------------------------------------------------------------ folders


def picture(number):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number * 20, np.uint8)).save(file, "JPEG")
    return file.getvalue()


def tree(folder, *paths):
    for number, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(picture(number))
    return folder


def packed(images, out, **options):
    """(report, key -> label)."""
    report = make_shards(images, out, PackingOptions(**options))
    index = ShardIndex.load(out)
    samples = [index[number] for number in range(len(index))]
    return report, {sample.key: sample.label for sample in samples}


def test_hidden_and_system_folders_are_no_classes_and_are_told(tmp_path):
    hidden = [".ipynb_checkpoints", "@eaDir", "__MACOSX", ".Trash-1000", "lost+found"]
    hidden += ["$RECYCLE.BIN", "System Volume Information"]
    paths = ["cat/0.jpg", "dog/0.jpg", *(f"{name}/0.jpg" for name in hidden)]
    images = tree(tmp_path / "in", *paths, "cat/.ipynb_checkpoints/0.jpg", "dog/@eaDir/0/x.jpg")
    report, found = packed(images, tmp_path / "out")
    assert report.classes == ["cat", "dog"]
    assert found == {"cat_0": 0, "dog_0": 1}
    assert "and 4 more: hidden and system folders, not read" in report.notes[0]


def test_a_class_without_images_is_refused_unless_classes_are_named(tmp_path):
    images = tree(tmp_path / "in", "cat/0.jpg", "emu/0.jpg")
    (images / "dog").mkdir()
    (images / "dog/0.heic").write_bytes(b"x")
    (images / "elk").mkdir()
    reason = r"without an image: dog \(1 file: \.heic\), elk \(is empty\); as they would shift"
    with pytest.raises(Refused, match=reason):
        packed(images, tmp_path / "out")
    names = ["cat", "dog", "elk", "emu"]
    report, found = packed(images, tmp_path / "out", classes=names)
    assert found == {"cat_0": 0, "emu_0": 3}
    assert any("dog (1 file: .heic)" in note for note in report.notes), report.notes


def test_other_names_of_jpeg_are_jpeg(tmp_path):
    images = tree(tmp_path / "in", "cat/0.jfif", "dog/0.JPE", "emu/0.jpg")
    report, found = packed(images, tmp_path / "out")
    assert report.classes == ["cat", "dog", "emu"]
    assert found == {"cat_0": 0, "dog_0": 1, "emu_0": 2}


def test_a_folder_is_read_once_whatever_links_lead_to_it(tmp_path):
    images = tree(tmp_path / "in", "cat/0.jpg", "dog/0.jpg", "dog/more/1.jpg")
    far = tree(tmp_path / "far", "2.jpg")
    os.symlink("..", images / "cat/up")
    os.symlink("../dog", images / "cat/other")
    os.symlink(far, images / "cat/far")
    os.symlink(far, images / "dog/again")
    os.symlink("../..", images / "dog/above")
    os.symlink("../cat", images / "dog/cycle")
    os.symlink("0.jpg", images / "cat/same.jpg")
    report, found = packed(images, tmp_path / "out")
    assert found == {"cat_0": 0, "cat_far_2": 0, "dog_0": 1, "dog_more_1": 1}
    assert "cat/other, cat/same.jpg, cat/up" in report.notes[0]


def test_a_link_between_classes_is_refused(tmp_path):
    images = tree(tmp_path / "in", "cat/0.jpg", "dog/0.jpg")
    os.symlink("cat", images / "lynx")
    with pytest.raises(Refused, match=r"lynx \(is a link to a folder that is read already\)"):
        packed(images, tmp_path / "out")
    (images / "lynx").unlink()
    os.symlink("../cat/0.jpg", images / "dog/1.jpg")
    with pytest.raises(Refused, match=r"dog/1\.jpg is a link to cat/0\.jpg, of another class"):
        packed(images, tmp_path / "out")


# -------------------------------------------------------------------------------- lists and Parquet


def test_a_list_of_a_spreadsheet_is_read_and_told(tmp_path, capsys):
    tree(tmp_path, "p/0.jpg", "p/1.jpg", "p/2.jpg")
    path = tmp_path / "list.csv"
    path.write_bytes(b"\xef\xbb\xbfPath, Label\np/0.jpg, 10.0\np/1.jpg, 2.0\np/2.jpg,\n")
    assert make_command([str(path), str(tmp_path / "no"), "--jobs", "1"]) == 2
    assert "line 4" in capsys.readouterr().err
    assert make_command([str(path), str(tmp_path / "out"), "--jobs", "1", "--unlabelled"]) == 0
    assert "column 'Label': 2 labels, the numbers 2 to 10; 1 image without one" in (
        capsys.readouterr().out
    )
    labels = ShardIndex.load(tmp_path / "out").labels.tolist()
    assert sorted(labels) == [-100, 2, 10]
    again = ["--label", "none", "--name", "again"]
    assert make_command([str(path), str(tmp_path / "out"), "--jobs", "1", *again]) == 0
    assert "images without labels" in capsys.readouterr().out


def test_a_list_names_no_file_twice_by_links(tmp_path):
    tree(tmp_path, "p/0.jpg")
    os.symlink("p", tmp_path / "q")
    os.symlink("0.jpg", tmp_path / "p/1.jpg")
    for other in ("./p/0.jpg", "q/0.jpg", "p/1.jpg"):
        (tmp_path / "list.csv").write_text(f"path\np/0.jpg\n{other}\n")
        with pytest.raises(Refused, match=f"more than once: {other} is p/0.jpg"):
            packed(tmp_path / "list.csv", tmp_path / "out")


def test_numbers_with_named_classes_get_their_names(tmp_path):
    tree(tmp_path, "0.jpg", "1.jpg")
    (tmp_path / "list.csv").write_text("path,label\n0.jpg,1\n1.jpg,0\n")
    report, found = packed(tmp_path / "list.csv", tmp_path / "out", classes=["cat", "dog"])
    assert (report.classes, found) == (["cat", "dog"], {"0": 1, "1": 0})
    with pytest.raises(Refused, match="has the label 1, --classes names only 1"):
        packed(tmp_path / "list.csv", tmp_path / "other", classes=["cat"])
    for classes, reason in ((["a", ""], "label 1 has no name"), (["a", "a"], "named twice: a")):
        with pytest.raises(Refused, match=reason):
            packed(tmp_path / "list.csv", tmp_path / "other", classes=classes)


def test_parquet_files_of_one_name_keep_apart_and_labels_of_any_type_stay(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    for part, kind in (("train", pa.float64()), ("test", pa.float64())):
        (tmp_path / part).mkdir()
        columns = {
            "image": [picture(number) for number in range(3)],
            "labels": pa.array([10, 2, 0], kind),
        }
        parquet.write_table(pa.table(columns), tmp_path / part / "0000.parquet")
    files = [tmp_path / part / "0000.parquet" for part in ("train", "test")]
    report, found = packed(files, tmp_path / "out")
    assert sorted(found.values()) == [0, 0, 2, 2, 10, 10]
    assert report.notes == ["column 'labels': 6 labels, the numbers 0 to 10"]
    assert {key.partition("_")[0] for key in found} == {"train", "test"}
    os.symlink(files[0], tmp_path / "link.parquet")
    with pytest.raises(Refused, match="named twice"):
        packed([files[0], tmp_path / "link.parquet"], tmp_path / "twice")
    other = {"image": [picture(0)], "label": [1]}
    parquet.write_table(pa.table(other), tmp_path / "other.parquet")
    with pytest.raises(Refused, match="other columns of the files"):
        packed([files[0], tmp_path / "other.parquet"], tmp_path / "mixed")
    assert not Path(tmp_path / "mixed" / "index.json").exists()


def test_a_pipe_among_images_is_not_waited_for_and_shares_folders_are_no_classes(tmp_path):
    folder = tree(tmp_path / "in", "a/1.jpg", "b/1.jpg", "~snapshot/1.jpg", "a/_gsdata_/1.jpg")
    os.mkfifo(folder / "a" / "0.jpg")
    report = make_shards(folder, tmp_path / "out", PackingOptions())
    assert (report.samples, report.classes, report.other_files) == (2, ["a", "b"], 1)
    assert "a/_gsdata_, ~snapshot: hidden and system folders" in report.notes[0]
