"""Sets with label maps and boxes become shards as they are unpacked; what is missing is said."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rcmae.commands.shards import make
from rcmae.data.index import ShardIndex
from rcmae.data.members.maps import decode_map

SHARED = Path(__file__).parent.parent / "../shared/data/composites"


def photo(path, height=12, width=20, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def label_map(path, *numbers, height=12, width=20, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.resize(np.array(numbers, np.uint8), (height, width)))
    if palette:
        image = image.copy()
        paletted = Image.new("P", image.size)
        paletted.putdata(np.array(image).reshape(-1).tolist())
        paletted.putpalette([number % 251 for number in range(768)])
        image = paletted
    image.save(path)


def made(capsys, *arguments, status=0):
    """What the command made, as JSON; or what it said."""
    assert make([*map(str, arguments), "--jobs", "1", "--json"]) == status, capsys.readouterr()
    said = capsys.readouterr()
    return json.loads(said.out) if not status else said.err


def samples_of(folder, name="train"):
    """Key -> suffix -> bytes of the shards of a folder."""
    found = {}
    for path in sorted(folder.glob(f"{name}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                found.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    return found


def numbers_of(sample):
    return np.unique(decode_map(sample["seg.png"])).tolist()


def ade(folder):
    for split, count in (("training", 3), ("validation", 1)):
        for number in range(count):
            name = f"ADE_{split[:5]}_{number:08d}"
            photo(folder / "images" / split / f"{name}.jpg", seed=number)
            label_map(folder / "annotations" / split / f"{name}.png", 0, 1, 150)
    rows = [f"{number}\t0.1\t1\t1\t0\tname {number}, same" for number in range(1, 151)]
    (folder / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n" + "\n".join(rows)
    )
    return folder


def test_ade20k_gets_no_label_for_zero_and_its_names(tmp_path, capsys):
    folder = ade(tmp_path / "ADEChallengeData2016")
    out = tmp_path / "out"
    report = made(capsys, folder, out, "--split", "training")
    assert (report["samples"], len(report["classes"])) == (3, 150)
    found = samples_of(out)
    assert {tuple(numbers_of(sample)) for sample in found.values()} == {(0, 149, 255)}
    assert (out / "classes.txt").read_text().splitlines()[149] == "name 150, same"
    index = ShardIndex.open(f"{out}/*.tar", needs=["map"])
    assert index.is_saved
    assert not len(index.without("map"))
    assert "training, validation: say which with --split" in made(capsys, folder, out, status=2)
    said = made(capsys, folder, out, "--split", "test", status=2)
    assert "--split test is not there" in said


def test_the_shards_of_a_split_have_its_name_beside_those_of_another(tmp_path, capsys):
    folder, out = ade(tmp_path / "ADEChallengeData2016"), tmp_path / "out"
    made(capsys, folder, out, "--split", "training")
    report = made(capsys, folder, out, "--split", "validation")
    assert report["samples"] == 1
    names = [path.name for path in sorted(out.glob("*.tar"))]
    assert names == ["train-000000.tar", "val-000000.tar"]
    made(capsys, folder, tmp_path / "own", "--split", "validation", "--name", "mine")
    assert [path.name for path in (tmp_path / "own").glob("*.tar")] == ["mine-000000.tar"]


def test_an_ade_folder_without_annotations_is_one_message(tmp_path, capsys):
    folder = ade(tmp_path / "ade")
    (folder / "annotations/training/ADE_train_00000001.png").unlink()
    said = made(capsys, folder, tmp_path / "out", "--split", "training", status=2)
    assert "1 of 3 images" in said
    assert "ADE_train_00000001.jpg; unpack all maps" in said
    for path in (folder / "annotations/training").iterdir():
        path.unlink()
    said = made(capsys, folder, tmp_path / "out", "--split", "training", status=2)
    assert "3 of 3 images" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def cityscapes(folder, kind, *numbers):
    for number in range(2):
        stem = f"ulm/ulm_00000{number}_000019"
        photo(folder / "leftImg8bit/train" / f"{stem}_leftImg8bit.png", seed=number)
        label_map(folder / "gtFine/train" / f"{stem}_gtFine_{kind}.png", *numbers)


def test_cityscapes_has_19_classes_whichever_maps_are_there(tmp_path, capsys):
    cityscapes(tmp_path / "a", "labelIds", 0, 7, 33, 6)
    report = made(capsys, tmp_path / "a", tmp_path / "ids", "--split", "train")
    assert report["classes"][:2] + report["classes"][-1:] == ["road", "sidewalk", "bicycle"]
    cityscapes(tmp_path / "b", "labelIds", 0, 7, 33, 6)
    cityscapes(tmp_path / "b", "labelTrainIds", 255, 0, 18, 255)
    report = made(capsys, tmp_path / "b", tmp_path / "ready", "--split", "train")
    assert "labelTrainIds as they are" in report["notes"][0]
    ids, ready = samples_of(tmp_path / "ids"), samples_of(tmp_path / "ready")
    for key, sample in ids.items():
        assert numbers_of(sample) == numbers_of(ready[key]) == [0, 18, 255]


def test_voc_is_read_by_its_lists_and_keeps_its_palette(tmp_path, capsys):
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    for number in range(3):
        photo(folder / f"JPEGImages/2007_{number}.jpg", seed=number)
        label_map(folder / f"SegmentationClass/2007_{number}.png", 0, 20, 255, palette=True)
    (folder / "ImageSets/Segmentation").mkdir(parents=True)
    (folder / "ImageSets/Segmentation/train.txt").write_text("2007_0\n2007_2\n")
    report = made(capsys, tmp_path / "VOCdevkit", tmp_path / "out", "--split", "train")
    assert (report["samples"], report["classes"][20]) == (2, "tvmonitor")
    found = samples_of(tmp_path / "out")
    assert sorted(found) == ["2007_0", "2007_2"]
    data = (folder / "SegmentationClass/2007_2.png").read_bytes()
    assert found["2007_2"]["seg.png"] == data


def test_two_folders_and_a_list_give_the_same_samples(tmp_path, capsys):
    images, maps = tmp_path / "images", tmp_path / "maps"
    for number in range(3):
        photo(images / f"x/{number}.jpg", height=24, width=40, seed=number)
        label_map(maps / f"x/{number}.png", 0, 1, 255, height=24, width=40)
    (tmp_path / "names.txt").write_text("sky\nroad\n")
    label_map(maps / "x/9.png", 0)
    common = ["--classes", tmp_path / "names.txt", "--size", 12]
    report = made(capsys, "--images", images, "--maps", maps, tmp_path / "a", *common)
    assert "1 maps have no image: 9.png" in report["notes"]
    rows = [f"images/x/{number}.jpg,maps/x/{number}.png" for number in range(3)]
    (tmp_path / "pairs.csv").write_text("path,map\n" + "\n".join(rows))
    made(capsys, tmp_path / "pairs.csv", tmp_path / "b", *common)
    a, b = samples_of(tmp_path / "a"), samples_of(tmp_path / "b")
    for number in range(3):
        one, other = a[f"x_{number}"], b[f"images_x_{number}"]
        assert one == other
        assert decode_map(one["seg.png"]).shape == (12, 20)
        assert Image.open(io.BytesIO(one["jpg"]), formats=["JPEG"]).size == (20, 12)
    again = made(capsys, tmp_path / "a" / "train-000000.tar", tmp_path / "c")
    assert again["samples"] == 3
    assert samples_of(tmp_path / "c") == a  # maps go along when tars are laid out anew
    assert (tmp_path / "c" / "classes.txt").read_text() == "sky\nroad\n"


def test_a_map_that_does_not_fit_is_left_out_and_named(tmp_path, capsys):
    images, maps = tmp_path / "images", tmp_path / "maps"
    for number in range(4):
        photo(images / f"{number}.jpg", seed=number)
        label_map(maps / f"{number}.png", 0, 1)
    label_map(maps / "1.png", 0, height=13)
    label_map(maps / "2.png", 0, 2)
    photo(maps / "3.png")
    (tmp_path / "names.txt").write_text("sky\nroad\n")
    classes = ["--classes", tmp_path / "names.txt"]
    report = made(capsys, "--images", images, "--maps", maps, tmp_path / "out", *classes)
    reasons = {Path(row["path"]).name: row["reason"] for row in report["rejected"]}
    assert "its map has 20 x 13 pixels, its image 20 x 12" in reasons["1.jpg"]
    assert "numbers beyond the 2 classes: 2" in reasons["2.jpg"]
    assert "its map is RGB" in reasons["3.jpg"]
    said = made(capsys, "--images", images, tmp_path / "o", status=2)
    assert "--images A --maps B go together" in said


def test_folders_that_do_not_fit_are_named_with_the_way_out(tmp_path, capsys):
    images, maps, out = tmp_path / "images", tmp_path / "maps", tmp_path / "out"
    photo(images / "a.jpg")
    label_map(maps / "a_mask.png", 0, 1)
    said = made(capsys, "--images", images, "--maps", maps, out, status=2)
    assert f"wants {maps}/a.png, and there is {maps}/a_mask.png" in said
    assert "columns path and map" in said
    said = made(capsys, "--images", tmp_path / "imgs", "--maps", maps, out, status=2)
    assert f"there is no {tmp_path / 'imgs'}" in said
    said = made(capsys, images, maps, out, status=2)
    assert "label maps: --images A --maps B" in said
    said = made(capsys, "--coco", tmp_path / "x.json", images, out, status=2)
    assert f"--coco {tmp_path / 'x.json'}: there is no such file" in said
    assert not out.exists()


def test_what_images_have_is_said_where_no_class_has_a_name(tmp_path, capsys):
    images, maps = tmp_path / "images", tmp_path / "maps"
    photo(images / "a.jpg")
    label_map(maps / "a.png", 0, 1)
    arguments = ["--images", images, "--maps", maps, tmp_path / "out", "--jobs", 1]
    assert make([*map(str, arguments)]) == 0
    told = capsys.readouterr().out
    assert "1 image with maps, whose classes have no names (--classes gives them) in" in told
    assert make([*map(str, [*coco(tmp_path / "c"), tmp_path / "o", "--jobs", 1])]) == 0
    assert "1 image with annotations in 1 shard" in capsys.readouterr().out


def coco(folder, **changes):
    """A JSON of four images: an object, a crowd alone, none, and one that is not there."""
    images = [
        {"id": number, "file_name": f"{number}.jpg", "height": 12, "width": 20}
        for number in range(1, 5)
    ]
    box = {"category_id": 3, "iscrowd": 0, "area": 20.0, "bbox": [2.0, 3.0, 4.0, 5.0]}
    annotations = [
        {"id": 11, "image_id": 1, **box, "segmentation": [[2, 3, 6, 3, 6, 8]]},
        {"id": 12, "image_id": 1, **box, "bbox": [2.0, 3.0, 0.0, 5.0]},
        {"id": 13, "image_id": 2, **box, "iscrowd": 1},
        {"id": 14, "image_id": 99, **box},
    ]
    categories = [{"id": 3, "name": "cat", "supercategory": "animal"}, {"id": 90, "name": "dog"}]
    tree = {"images": images, "annotations": annotations, "categories": categories} | changes
    folder.mkdir(exist_ok=True)
    (folder / "x.json").write_text(json.dumps(tree))
    for number in (1, 2, 3, 7):
        photo(folder / f"photos/{number}.jpg", seed=number)
    return ["--coco", folder / "x.json", folder / "photos"]


@pytest.mark.parametrize("box", [["a", 1, 2, 3], [None] * 4, [1, 2, 3], [1, 2, float("nan"), 3]])
def test_a_box_that_is_none_is_refused_and_nothing_is_left(tmp_path, capsys, box):
    annotations = [{"id": 11, "image_id": 1, "category_id": 1, "bbox": box}]
    arguments = coco(tmp_path, annotations=annotations)
    out = tmp_path / "new" / "out"
    said = made(capsys, *arguments, out, status=2)
    assert "bbox is not four numbers: {'id': 11" in said
    assert not out.parent.exists()


def test_a_refusal_leaves_no_spool_and_what_was_there(tmp_path, capsys):
    arguments = coco(tmp_path, annotations=[])
    said = made(capsys, *arguments, tmp_path / "new" / "out", status=2)
    assert "no image has an object" in said
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    made(capsys, *arguments, tmp_path / "mine", status=2)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]


@pytest.mark.parametrize("name", ["../x", "*", "a/b", "x{0,1}", ".hidden"])
def test_a_name_that_is_a_path_or_a_pattern_is_refused(tmp_path, capsys, name):
    photo(tmp_path / "photos" / "a.png")
    out = tmp_path / "out"
    out.mkdir()
    (out / "other-000000.tar").write_bytes(b"mine")
    said = made(capsys, "--name", name, "--overwrite", tmp_path / "photos", out, status=2)
    assert "what shards' names begin with" in said
    assert (out / "other-000000.tar").read_bytes() == b"mine"


def test_coco_becomes_an_annotation_beside_each_image_with_an_object(tmp_path, capsys):
    arguments = coco(tmp_path)
    report = made(capsys, *arguments, tmp_path / "out")
    assert report["samples"] == 1
    assert report["rejected"] == [{"path": "4.jpg", "reason": "it is named, and not there"}]
    notes = "\n".join(report["notes"])
    assert "2 images without objects left out" in notes
    assert "1 boxes without area are left out: ids 12" in notes
    assert "1 annotations are of no image" in notes
    assert "1 image not named in x.json: 7.jpg" in notes
    (sample,) = samples_of(tmp_path / "out").values()
    document = json.loads(sample["json"])
    assert (document["image_id"], document["height"], document["width"]) == (1, 12, 20)
    assert [each["id"] for each in document["annotations"]] == [11]
    assert "image_id" not in document["annotations"][0]
    listed = json.loads((tmp_path / "out/categories.json").read_text())
    assert listed == [{"id": 3, "name": "cat"}, {"id": 90, "name": "dog"}]
    report = made(capsys, *arguments, tmp_path / "all", "--keep-empty", "--size", 6)
    assert report["samples"] == 3
    small = json.loads(samples_of(tmp_path / "all")["1"]["json"])
    assert (small["height"], small["annotations"][0]["bbox"]) == (6, [1.0, 1.5, 2.0, 2.5])
    assert not list(tmp_path.rglob(".*.spool"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": None}, "has no list `images`"),
        ({"categories": [{"id": 4, "name": "cat"}]}, "categories lack 3"),
        ({"categories": [{"id": 3}]}, "categories: name is missing or no str"),
        ({"categories": [{"id": 3, "name": "a"}] * 2}, "categories: id is there twice: 3"),
        (
            {"images": [{"id": 1, "file_name": "../1.jpg", "height": 12, "width": 20}]},
            "leads out of the folder",
        ),
        (
            {"images": [{"id": 1, "file_name": "gone.jpg", "height": 12, "width": 20}]},
            "names 1 images, and none of them is in",
        ),
    ],
)
def test_what_is_no_coco_is_one_message(tmp_path, capsys, changes, said):
    arguments = coco(tmp_path, **changes)
    told = made(capsys, *arguments, tmp_path / "out", status=2)
    assert said in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.tar"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the photographs are not in this checkout")
def test_a_folder_of_cocos_gives_the_samples_of_the_tars_that_were_made_of_it(tmp_path, capsys):
    folder = SHARED / "coco"
    source = [folder / "instances_val.json", folder / "val", tmp_path]
    made(capsys, "--coco", *source, "--name", "val", "--keep-empty")
    found, wanted = samples_of(tmp_path, "val"), samples_of(SHARED, "val")
    assert found == wanted
    assert list(found) == list(wanted)  # in their order, too
    assert (tmp_path / "categories.json").read_bytes() == (SHARED / "categories.json").read_bytes()
