"""What holds of the package as a whole: imports point one way, recipes load, requirements and
README are true.
"""

import ast
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml

from rcmae import config
from rcmae.parts import new_network

ROOT = Path(__file__).parent.parent

# Bottom first. A module imports only from rows below its own; train.py sees all but what works
# beside it.
LAYERS = (
    {"errors", "files"},
    {"config", "dist", "draws", "preempt", "lease", "sources", "startup", "names", "workers"},
    {
        "jpeg",
        "masking",
        "plan",
        "patterns",
        "tars",
        "schedules",
        "optim",
        "kernels",
        "metrics",
        "batchnorm",
    }
    | {"presence"},
    {"batch", "index"},
    {"cache"},
    {"transforms", "guard", "attention", "device_decode", "features"},
    {"views"},
    {"stream", "vit", "augment", "corruptions", "knn", "logistic"},
    {"bootmae"},
    {"objectives", "classifier"},
    {"teacher"},
    {"engine", "memory", "layouts", "recipe"},
    {"deepspeed", "fsdp2", "checkpoint"},
    {"pictures", "reading", "scores", "parts", "folder"},
    {"encoder", "writing"},
    {"train"},
    {"follow"},
    {"finetune"},
    {"probe"},
    {"tasks"},
    {"commands"},
)
# Who starts a training is on the top row, too: their arguments are the commands'.
ON_TOP = {"train", "follow"}
LEVEL = {module: level for level, layer in enumerate(LAYERS) for module in layer}
MODULES = sorted(
    path
    for path in (ROOT / "rcmae").rglob("*.py")
    if path.name != "__init__.py" or path.parent.name in ("checkpoint", "objectives")
)


PACKAGES = {"run", "data", "models", "engines", "evaluation", "weights", "planning"}


def named(parts: list[str]) -> str:
    """The module's row in LAYERS, of its path within the package."""
    if parts[0] in ("commands", "cli", "__main__"):
        return "commands"
    if parts[0] == "checkpoint" and parts[1:2] == ["lease"]:
        return "lease"
    return parts[1] if parts[0] in PACKAGES and len(parts) > 1 else parts[0]


def module_of(path: Path) -> str:
    return named(list(path.relative_to(ROOT / "rcmae").with_suffix("").parts))


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they point"
            inside = node.module in {"rcmae", *(f"rcmae.{package}" for package in PACKAGES)}
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = names if inside else [str(node.module)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {named(name.split(".")[1:]) for name in names if name.startswith("rcmae.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    module = module_of(path)
    assert module in LEVEL, f"give {module} its place in LAYERS"
    theirs = imported(path) - {module} - ({"commands"} if module in ON_TOP else set())
    upward = sorted(other for other in theirs if LEVEL[other] >= LEVEL[module])
    assert not upward, f"{module} imports {', '.join(upward)}, not below it in LAYERS"


def test_what_is_learnt_knows_no_engine_rank_or_recipe():
    learnt = {
        "objectives",
        "vit",
        "classifier",
        "attention",
        "augment",
        "schedules",
        "optim",
        "masking",
        "transforms",
    }
    learnt |= {"teacher", "corruptions"}
    for path in MODULES:
        if module_of(path) in learnt:
            assert not imported(path) & {"config", "dist", "train", "preempt", "metrics"}, path


def test_heavy_engines_are_imported_only_where_they_are_used():
    tree = ast.parse((ROOT / "rcmae" / "train.py").read_text())
    top = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not top & {"rcmae.engines.deepspeed", "rcmae.engines.fsdp2"}


RECIPES = sorted((ROOT / "rcmae" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_loads_and_says_what_to_expect(path):
    overrides = (
        []
        if "shards" in yaml.safe_load(path.read_text()).get("data", {})
        else ["data.shards=x.tar"]
    )
    recipe = config.load(path.stem, overrides)  # by its name, as a user gives it
    with torch.device("meta"):
        new_network(recipe)
    header = "".join(
        line for line in path.read_text().splitlines(keepends=True) if line.startswith("#")
    )
    for what in ("Command:", "Hardware:", "Hours:", "Number:"):
        assert what in header, f"the header of {path.name} lacks {what}"
    assert path.stem in header, "the command names the recipe"


def test_shipped_deepspeed_files_leave_the_recipe_its_numbers():
    owned = {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    }
    owned |= {"bf16", "fp16", "torch_autocast", "optimizer", "scheduler"}
    for path in sorted((ROOT / "ds_configs").glob("*.json")):
        assert not owned & set(json.loads(path.read_text())), path.name


REQUIREMENTS = (ROOT / "requirements.txt").read_text().splitlines()


def test_requirements_are_pinned_and_say_why():
    pins = [line for line in REQUIREMENTS if line and not line.startswith("#")]
    assert pins
    for line in pins:
        assert re.fullmatch(r"[A-Za-z0-9-]+==[0-9][^ ]* +# .+", line), (
            f"not NAME==VERSION  # reason: {line}"
        )
    names = {line.split("==")[0].lower() for line in pins}
    assert "apex" not in names, "the apex of the package index is another project"


def declared() -> dict[str, str]:
    """Name -> least version of what pyproject.toml says the package needs."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return dict(line.lower().split(">=") for line in wanted)


def test_pins_lie_in_the_range_that_the_metadata_states():
    lines = [line.split("#")[0].strip().lower() for line in REQUIREMENTS]
    pins = dict(line.split("==") for line in lines if line)
    for name, least in declared().items():
        assert name in pins, f"pyproject.toml needs {name}, requirements.txt does not pin it"
        assert numbers(pins[name]) >= numbers(least), (
            f"{name}=={pins[name]} is below pyproject.toml's {least}"
        )


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def test_whatever_the_package_imports_is_declared():
    names = {"PIL": "pillow", "yaml": "pyyaml"}  # where a module is not called as its distribution
    # apex is found at run time where a site has built it
    mine = {"rcmae", "apex", *sys.stdlib_module_names}
    for path in MODULES:
        trees = ast.walk(ast.parse(path.read_text()))
        roots = {
            node.module.split(".")[0]
            for node in trees
            if isinstance(node, ast.ImportFrom) and node.module
        }
        trees = ast.walk(ast.parse(path.read_text()))
        roots |= {
            alias.name.split(".")[0]
            for node in trees
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        missing = {names.get(root, root) for root in roots - mine} - set(declared())
        assert not missing, (
            f"{path.name} imports {', '.join(sorted(missing))}, not among pyproject.toml's "
            "dependencies"
        )


def test_readme_opens_with_the_two_commands_and_stays_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 250
    opening = "\n".join(lines[:15])
    assert "tools/quickstart.sh" in opening
    assert "tools/test.sh" in opening


def test_readme_names_only_files_that_are_there():
    text = (ROOT / "README.md").read_text()
    for name in set(re.findall(r"\b(?:tools|rcmae|ds_configs|tests|slurm)/[\w./-]*\w", text)):
        assert (ROOT / name).exists(), f"README.md speaks of {name}"


def test_readme_names_recipes_that_are_there():
    text = (ROOT / "README.md").read_text()
    shipped = {path.stem for path in RECIPES}
    named = set(re.findall(r"\b(?:rcmae|mae)_(?:vit|cifar10)_\w+", text))
    assert named <= shipped, f"README.md speaks of {', '.join(sorted(named - shipped))}"


@pytest.mark.parametrize("tool", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.stem)
def test_a_tool_finds_the_package_from_anywhere(tool):
    """`python tools/X.py` has only tools/ on its path."""
    nodes = list(ast.walk(ast.parse(tool.read_text())))
    imports = [
        node.lineno
        for node in nodes
        if isinstance(node, ast.ImportFrom | ast.Import)
        and (getattr(node, "module", None) or node.names[0].name).split(".")[0]
        in ("rcmae", "tools")
    ]
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    found = [node.lineno for node in calls if ast.unparse(node.func) == "sys.path.insert"]
    assert not imports or (found and found[0] < min(imports))


def test_version_is_that_of_the_metadata():
    from rcmae import __version__

    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_licence_is_apache_2():
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
