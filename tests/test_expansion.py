"""A line of a pattern or of YAML never becomes more than a machine can hold."""

import random
import time
from pathlib import Path

import pytest
from braceexpand import braceexpand

from rcmae import config
from rcmae.config.trees import tree_of
from rcmae.data.patterns import expand
from rcmae.data.sources import braces
from rcmae.data.sources.braces import expanded
from rcmae.errors import Refused
from rcmae.evaluation.comparison.runs import read_run
from rcmae.run.again import reproduce
from rcmae.run.records import shown

MANY = (
    "x-{000000000..999999999}.tar",
    "{a..z}{a..z}{a..z}{a..z}{a..z}.tar",
    "{0..9}" * 30,
    "{" + ",".join(["{0..99999}"] * 20) + "}",
    "{a,b{c,{0..9999999}}}.tar",
    "{1..99999999999999999999999}.tar",
    "{1000000000..0..3}",
)


@pytest.mark.parametrize("pattern", MANY)
def test_braces_that_stand_for_too_many_are_refused_at_once(pattern):
    begin = time.monotonic()
    with pytest.raises(Refused, match="more than 1,000,000 shards"):
        expand(pattern)
    assert time.monotonic() - begin < 1


def test_all_patterns_together_have_the_limit(monkeypatch, tmp_path):
    with pytest.raises(Refused, match="more than 1,000,000 shards with those"):
        expand([str(tmp_path / "{000000..600000}.tar")] * 2)


@pytest.mark.parametrize("pattern", ["{" * 5000 + "}" * 5000, "{a," * 3000 + "}" * 3000])
def test_braces_that_are_nested_too_deeply_are_refused(pattern):
    with pytest.raises(Refused, match="nested too deeply"):
        expand(pattern)


def test_braces_are_counted_as_they_are_expanded():
    draw = random.Random(2)
    pieces = ["{a,b}", "{0..4}", "{05..1}", "{a..e..2}", "{x}", "{}", "{,}", "\\{", "\\,", "-", ","]
    pieces += ["{a,{b,c}}", "{{1..3},z}", "{9..0..-3}", "{a{0..2},}", "$"]
    for _ in range(400):
        pattern = "".join(draw.choices(pieces, k=draw.randrange(4)))
        assert braces._count(pattern, 10**6) == len(list(braceexpand(pattern))), pattern
        assert expanded(pattern) == list(braceexpand(pattern))


def bomb() -> str:
    """Nine values, nine times nine times ..."""
    lines = ["x: &a [l,l,l,l,l,l,l,l,l]"]
    for number in range(7):
        of = ",".join([f"*{chr(97 + number)}"] * 9)
        lines.append(f"x{number}: &{chr(98 + number)} [{of}]")
    return "\n".join([*lines, "data: {shards: *h}", ""])


YAML = {
    "more than 1,000,000 values": bomb(),
    "contains itself": "data: &a {shards: [*a]}",
    "nested too deeply": "data: " + "[" * 5000,
    "is not YAML": "run: {name: 2020-13-45}",
}


@pytest.mark.parametrize("why", YAML)
def test_yaml_that_stands_for_too_much_is_refused_with_its_file(tmp_path, why):
    path = tmp_path / "bomb.yaml"
    path.write_text(YAML[why])
    with pytest.raises(Refused, match=rf"bomb\.yaml .*{why}"):
        config.load(str(path))
    value = YAML[why].replace("\n", " ").partition(": ")[2]
    if why.startswith(("contains", "nested")):
        with pytest.raises(Refused, match=why):
            config.load("quickstart", [f"data.shards={value}"])


def test_aliases_as_people_use_them_are_read():
    tree = tree_of("a: &a {x: [1, 2]}\nb: {<<: *a, y: 3}\nc: [*a, *a]")
    assert tree["b"] == {"x": [1, 2], "y": 3}
    assert tree["c"] == [{"x": [1, 2]}] * 2


NO_RECIPES = [bomb(), "[" * 20_000 + "]" * 20_000, "a: &a [*a]", "- 1", "5", "{"]


def reproduced(folder):
    found = reproduce.Original(folder, {"step": 0}, {}, None)
    return reproduce.recipe_of(found, 1, folder, [], allow_pipe=False)


@pytest.mark.parametrize("text", NO_RECIPES)
@pytest.mark.parametrize("read", [shown.recipe_of, read_run, reproduced])
def test_a_recipe_in_a_folder_that_is_none_is_refused(tmp_path, read, text):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(Refused):
        read(tmp_path)


def test_yaml_is_read_in_one_place():
    package = Path(config.__file__).parents[1]
    callers = [path for path in package.rglob("*.py") if "yaml.safe_load" in path.read_text()]
    assert [path.name for path in callers] == ["trees.py"], "others have no limit"
