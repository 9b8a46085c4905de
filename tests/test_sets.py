"""Where two sets meet, a label is the same class in both, and they are two sets."""

import shutil
from pathlib import Path

import pytest
import yaml

from rcmae import train as program
from rcmae.commands.evaluation import probes as probes_command
from rcmae.data.index import ShardIndex
from rcmae.data.patterns import expand
from rcmae.data.sets import (
    ClassList,
    Labelled,
    class_lists,
    class_problems,
    lines_of,
    met,
    moved,
    names_in,
    refuse_meeting,
    shared,
    unlike,
)
from rcmae.errors import Refused
from rcmae.evaluation.labelled_sets import LabelledSet, classes_of, refuse_other_classes
from runs import Folder, keeping_handlers, start

NAMES = [f"class {number}" for number in range(8)]


def listed(where, *names):
    return ClassList(where, names)


def test_lists_are_alike_as_far_as_both_go():
    one = listed("a", "cat", "dog")
    assert unlike(one, listed("b", "cat", "dog", "emu")) is None
    assert "label 0 is 'cat' in a and 'ant' in b; pack them" in unlike(one, listed("b", "ant"))
    assert moved(one, listed("b", "a cat", "a dog")) is None
    assert moved(one, listed("b", "dog", "cat")).startswith("'dog' is label 1 in a, and 0 in b")
    assert lines_of("cat\r\ndog \n\n") == ("cat", "dog")
    assert lines_of("\ufeffcat\n\ndog\u2028s") == ("cat", "", "dog\u2028s")
    assert lines_of("\n") == ()


def test_an_endless_file_is_no_list_of_names(tmp_path):
    with pytest.raises(Refused, match=r"/dev/zero has more than 16,777,216 bytes: no list of cl"):
        names_in("/dev/zero")
    with pytest.raises(Refused, match="cannot be read: Is a directory"):
        names_in(tmp_path)


def test_names_beside_shards_that_are_no_text_are_told_of(halves, tmp_path, caplog):
    shutil.copy(next(halves[0].glob("*.tar")), tmp_path)
    where = tmp_path / "classes.txt"
    where.write_bytes("Käse\n".encode("latin1"))
    index = ShardIndex.open(f"{tmp_path}/*.tar")
    assert [class_lists(index), class_lists(index)] == [(), ()]
    (told,) = [each.getMessage() for each in caplog.records]  # once
    assert told.startswith(f"{where} is not text in UTF-8: ")
    assert "iconv -f LATIN1 -t UTF-8 classes.txt > FILE" in told
    where.write_text("Käse\n")
    assert [each.names for each in class_lists(index)] == [("Käse",)]
    caplog.clear()
    where.write_bytes(bytes(2**24 + 1))
    assert class_lists(index) == ()
    assert "more than 16,777,216 bytes" in caplog.text


@pytest.fixture(scope="module")
def halves(photo_shards, tmp_path_factory):
    """(folder of the first four shards, folder of the other two), each with its classes."""
    folders = []
    for name, numbers in (("train", range(4)), ("test", range(4, 6))):
        folder = tmp_path_factory.mktemp(name)
        for number in numbers:
            shutil.copy(Path(photo_shards).parent / f"photo-{number:06d}.tar", folder)
        (folder / "classes.txt").write_text("\n".join(NAMES) + "\n")
        folders.append(folder)
    return folders


@pytest.fixture
def other(halves, tmp_path):
    """The test set, packed with other classes."""
    folder = tmp_path / "other"
    shutil.copytree(halves[1], folder)
    (folder / "classes.txt").write_text("\n".join([NAMES[0], NAMES[2], NAMES[1], *NAMES[3:]]))
    return folder


def opened(key, folder):
    index = ShardIndex.open(f"{folder}/*.tar")
    return Labelled(key, index, class_lists(index))


def test_classes_and_shards_of_two_sets_are_compared(halves, other, tmp_path):
    train, test = opened("--train", halves[0]), opened("--test", halves[1])
    assert met(train, test) == ([], [])
    assert met(train, test._replace(classes=())) == ([], [])
    problems, warnings = met(train, opened("--test", other))
    assert warnings == []
    assert problems[0].startswith("--train and --test: different classes: label 1 is 'class 1'")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in sorted(halves[0].glob("*.tar")):
        shutil.copy(path, copy / f"again-{path.name}")
    assert shared(train.samples, opened("", copy).samples) == 4
    assert met(train, opened("--test", copy)).problems[0].startswith("--test is --train: the same")
    next(copy.glob("*.tar")).unlink()
    problems, warnings = met(train, opened("--test", copy))
    assert problems == []
    assert warnings[0].startswith("3 of 3 shards of --test are in --train, too")


def test_images_that_both_sets_have_are_told_wherever_they_meet(halves, tmp_path, caplog):
    train, test = opened("--train", halves[0]), opened("--test", halves[1])
    refuse_meeting(train, test)
    assert caplog.text == ""
    shutil.copy(halves[0] / "photo-000001.tar", tmp_path)
    refuse_meeting(train, opened("--test", tmp_path))
    assert "1 of 1 shards of --test are in --train, too" in caplog.text


def test_names_that_are_numbers_of_other_classes_are_not_guessed():
    names = ["1", "2", "cat"]
    assert classes_of(["cat"], Path(), names) == [2]
    assert classes_of([0, 1], Path(), names) == [0, 1]
    with pytest.raises(Refused, match="classes 1, 2 are numbers and names of other classes"):
        classes_of(["1", "2"], Path(), names)
    assert classes_of(["1", "0"], Path(), ["0", "1"]) == [1, 0]
    with pytest.raises(Refused, match="classes -3, True are none"):
        classes_of([-3, True], Path(), names)


def test_a_mixture_is_of_one_list_of_classes(halves, other):
    index = ShardIndex.open([f"{halves[0]}/*.tar", f"{other}/*.tar"])
    problems = class_problems([Labelled("data.shards", index, class_lists(index))])
    assert len(problems) == 1
    assert problems[0].startswith("data.shards: different classes")


def tuned(tiny, folder, name, **sections):
    tree = yaml.safe_load(tiny.read_text())
    tree["objective"] = {"name": name}
    tree["schedule"] = {"steps": 2, "warmup_steps": 1, "lr": 1e-3}
    for section, values in sections.items():
        tree.setdefault(section, {}).update(values)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def trained(recipe, run, *overrides):
    """The exit status of `rcmae finetune` or `rcmae probe`, as the recipe is called."""
    with keeping_handlers():
        return program.main([str(recipe), f"run.dir={run}", *overrides], task=recipe.stem)


@pytest.mark.parametrize("name", ["finetune", "probe"])
def test_a_classifier_is_not_judged_by_other_classes_or_its_own_images(
    tiny, halves, other, tmp_path, capsys, name
):
    run = tmp_path / "run"
    train = f"{halves[0]}/*.tar"
    rule = {"rule": "sgd"} if name == "probe" else {}
    more = {"data": {"shards": train}, "evaluate": {"every_steps": 2}, "classify": rule}
    recipe = tuned(tiny, tmp_path, name, **more)
    assert trained(recipe, run, f"evaluate.test_shards={other}/*.tar") == 2
    assert "data.shards and evaluate.test_shards: different classes" in capsys.readouterr().err
    assert trained(recipe, run, f"evaluate.test_shards={train}") == 2
    assert "evaluate.test_shards is data.shards: the same shards" in capsys.readouterr().err
    (tmp_path / "names").write_text("\n".join(reversed(NAMES)))
    test = f"evaluate.test_shards={halves[1]}/*.tar"
    assert trained(recipe, run, test, f"classify.class_names={tmp_path}/names") == 2
    assert "classify.class_names: 'class 7' is label 7 in" in capsys.readouterr().err


def test_a_classifier_knows_its_classes_and_is_warned_of_shared_images(tiny, halves, tmp_path):
    more = {"data": {"shards": f"{halves[0]}/*.tar"}, "evaluate": {"every_steps": 2}}
    recipe = tuned(tiny, tmp_path, "finetune", **more)
    run = Folder(tmp_path / "run")
    assert trained(recipe, run.path, f"evaluate.test_shards={halves[0]}/photo-000001.tar") == 0
    assert (
        "1 of 1 shards of evaluate.test_shards are in data.shards"
        in run.events("warning")[0]["told"]
    )
    written = yaml.safe_load((run.path / "recipe.yaml").read_text())
    assert written["classify"]["class_names"] == f"{halves[0]}/classes.txt"


def test_neighbours_are_of_another_set_and_of_the_same_classes(
    tiny, halves, other, tmp_path, capsys
):
    sets = ["evaluate.every_steps=2", "evaluate.k=[1]", f"evaluate.train_shards={halves[0]}/*.tar"]
    for test, told in ((halves[0], "is evaluate.train_shards"), (other, "different classes")):
        assert start(tiny, tmp_path / "run", *sets, f"evaluate.test_shards={test}/*.tar") == 2
        assert told in capsys.readouterr().err
    part = f"evaluate.test_shards={halves[0]}/photo-000001.tar"
    assert start(tiny, tmp_path / "run", *sets, part, "--check") == 0
    assert "warning: 1 of 1 shards of evaluate.test_shards are in" in capsys.readouterr().out


def test_probes_compare_their_sets(uninterrupted, halves, other, capsys):
    run = str(uninterrupted.path)
    for test, told in ((halves[0], "--test is --train"), (other, "different classes")):
        sets = ["--train", f"{halves[0]}/*.tar", "--test", f"{test}/*.tar"]
        assert probes_command.main([run, *sets]) == 2
        assert told in capsys.readouterr().err


def test_a_classifier_is_compared_with_the_sets_that_it_is_judged_on(halves, other):
    sets = [LabelledSet("a", [f"{halves[1]}/*.tar"]), LabelledSet("b", [f"{other}/*.tar"])]
    indexes = {each.name: ShardIndex.open(each.shards) for each in sets}
    with pytest.raises(Refused, match="a and b: different classes"):
        refuse_other_classes(sets, indexes, None)
    refuse_other_classes(sets[:1], indexes, None)
    mine = listed("names", *NAMES)
    refuse_other_classes(sets[:1], indexes, mine)
    with pytest.raises(Refused, match="b has other classes than the classifier: 'class 2' is"):
        refuse_other_classes(sets, indexes, mine)
    refuse_other_classes(sets[:1], indexes, listed("names", *[f"a {name}" for name in NAMES]))
    with pytest.raises(Refused, match="label 0 is 'x' in"):
        refuse_other_classes(sets[:1], indexes, listed("there/classes.txt", "x"))
    places = [0, 2, 1, *range(3, 8)]
    refuse_other_classes([sets[1]._replace(classes=places, listed=True)], indexes, mine)


def test_a_shard_is_not_named_twice_by_links(halves, tmp_path):
    (tmp_path / "folder").symlink_to(halves[1])
    (tmp_path / "one.tar").symlink_to(halves[1] / "photo-000004.tar")
    for other in (tmp_path / "folder" / "*.tar", tmp_path / "one.tar"):
        with pytest.raises(Refused, match="is named 2 times"):
            expand([f"{halves[1]}/*.tar", str(other)])
