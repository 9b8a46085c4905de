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
from rcmae.models.build import new_network

ROOT = Path(__file__).parent.parent

# Top first. A module imports only from its own row and rows below. A file that stands in rcmae/
# itself is on the row that has its name, or that HOMES gives it.
ROWS = (
    {"train", "commands"},
    {"run"},
    {"planning"},
    {"tasks"},
    {"evaluation"},
    {"weights"},
    {"checkpoint"},
    {"engines"},
    {"objectives"},
    {"models"},
    {"data"},
    {"config"},
    {"dist"},
    {"plugins"},
    {"process"},
    {"files", "errors"},
)
HOMES = {"finetune": "train", "probe": "train", "follow": "train", "starting": "train"}
HOMES |= {"detect": "train", "exchange": "dist"}
HOMES |= {"segment": "train"}
HOMES |= {"cli": "commands", "__main__": "commands"}
DEPTH = {package: depth for depth, row in enumerate(ROWS) for package in row}
UPWARD: set[str] = set()  # what is still to be turned round
# Tools of developers, which stay whole; every other one in tools/ is a command of the package.
OURS = (
    "notebook",
    "bench_host",
    "bench_memory",
    "bench_dense",
    "gpu_cases",
    "gpu_day",
    "gpu_rows",
    "bench_shuffle",
    "bench_step",
    "bench_stream",
    "check_parity",
    "drill",
)
OURS += ("bench_agreement", "bench_start", "check_cases", "quickstart_data", "stream_peers")
MODULES = sorted((ROOT / "rcmae").rglob("*.py"))


def package_of(path: Path) -> str:
    """The folder of rcmae/ that a module is in, or its own name where it stands in none."""
    return path.relative_to(ROOT / "rcmae").with_suffix("").parts[0]


def depth_of(package: str) -> int:
    assert HOMES.get(package, package) in DEPTH, f"give {package} its place in ROWS"
    return DEPTH[HOMES.get(package, package)]


def imported(path: Path) -> set[str]:
    """Packages of rcmae that a file imports from, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they point"
            module = str(node.module)
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("rcmae.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    package = package_of(path)
    if package == "__init__":
        return  # the door, which hands out what is below
    where = path.relative_to(ROOT / "rcmae")
    upward = {other for other in imported(path) if depth_of(other) < depth_of(package)}
    listed = {other for other in upward if f"{where}: {other}" in UPWARD}
    assert upward == listed, f"{where} imports from {', '.join(sorted(upward - listed))}, above it"


def test_imports_that_are_still_to_be_turned_round_are_there():
    for line in UPWARD:
        where, other = line.split(": ")
        path = ROOT / "rcmae" / where
        assert path.is_file(), f"take {line!r} out of UPWARD"
        assert other in imported(path), f"take {line!r} out of UPWARD"


LEARNT = (
    "objectives",
    "models/vit.py",
    "models/bootmae",
    "models/classifier",
    "models/fitting",
    "engines/teacher.py",
    "engines/schedules.py",
    "engines/optim.py",
)
LEARNT += ("data/masking.py", "data/transforms.py", "data/augment.py", "evaluation/attention.py")
LEARNT += ("evaluation/corruptions.py", "evaluation/warping.py")


def test_what_is_learnt_knows_no_engine_rank_or_recipe():
    paths = [path for path in MODULES if str(path.relative_to(ROOT / "rcmae")).startswith(LEARNT)]
    assert len(paths) > len(LEARNT)
    for path in paths:
        if package_of(path) == "objectives" and path.stem in ("__init__", "options", "masks"):
            continue  # they read the recipe; an objective knows none
        assert not imported(path) & {"config", "dist", "train", "run"}, path


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


def optional() -> set[str]:
    """Names of what extras of the package bring."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return {line.lower().split(">=")[0] for lines in extras for line in lines}


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
    # where a module is not called as its distribution, or comes with another
    names = {"PIL": "pillow", "yaml": "pyyaml", "pydantic_core": "pydantic"}
    names |= {"markupsafe": "jinja2"}
    names |= {"sklearn": "scikit-learn", "umap": "umap-learn"}
    names |= {"faster_coco_eval": "faster-coco-eval"}
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
        missing = {names.get(root, root) for root in roots - mine} - {*declared(), *optional()}
        assert not missing, (
            f"{path.name} imports {', '.join(sorted(missing))}, not among pyproject.toml's "
            "dependencies"
        )


def test_extras_are_imported_only_where_they_are_used():
    """Whoever does not use one need not install it."""
    modules = {"s3fs", "gcsfs", "adlfs", "pyarrow", "onnx", "onnxscript", "onnxruntime", "umap"}
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            assert not modules & {name.split(".")[0] for name in names}, path


def test_a_folder_has_at_most_16_modules_and_a_module_says_why_it_is_long():
    folders = {path.parent for path in MODULES}
    crowded = {str(each): len(list(each.glob("*.py"))) for each in folders}
    assert {name for name, count in crowded.items() if count > 16} == set()
    long = [path for path in MODULES if len(path.read_text().splitlines()) > 500]
    assert long == [], "split it by its ideas"


def test_readme_opens_with_the_two_commands_and_stays_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 200
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


@pytest.mark.parametrize("tool", sorted((ROOT / "tools").rglob("*.py")), ids=lambda path: path.stem)
def test_a_tool_finds_the_package_where_it_is_installed(tool):
    """And its neighbours by name: `python tools/X.py` has tools/ on its path."""
    text = tool.read_text()
    assert "sys.path" not in text, "tools/setup.sh installs the package, editable"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            assert not str(node.module).startswith("tools"), f"{tool.name}: import it by name"


SHIMS = [path for path in sorted((ROOT / "tools").glob("*.py")) if path.stem not in OURS]


@pytest.mark.parametrize("tool", SHIMS, ids=lambda path: path.stem)
def test_a_tool_of_users_is_a_command_and_nothing_more(tool):
    text = tool.read_text()
    assert len(text.splitlines()) <= 10, "what a command does belongs to the package"
    assert "from rcmae.commands" in text


def test_version_is_that_of_the_metadata():
    from rcmae import __version__

    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_licence_is_apache_2():
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


def test_hooks_run_what_continuous_integration_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"], "nothing is downloaded to check a commit"
    entries = [hook["entry"] for hook in hooks[0]["hooks"]]
    script = (ROOT / "tools" / "test.sh").read_text()
    for entry in entries[:3]:
        assert entry.removeprefix(".venv/bin/") in script.splitlines()
    assert "tools/test.sh" in entries
    assert "exec tools/test.sh" in (ROOT / ".ci" / "run").read_text()


def test_the_fast_tests_are_files_that_are_there():
    script = (ROOT / "tools" / "test.sh").read_text()
    names = script.split("fast_tests=(")[1].split(")")[0].split()
    assert len(names) > 10
    for name in names:
        assert (ROOT / "tests" / f"test_{name}.py").is_file(), name


GUARDED = ("timm", "torchvision", "torchmetrics")  # they import torchvision's compiled part


def _imports(tree):
    """(line, top name) of what a module imports, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("folder", ["rcmae", "tools"])
def test_a_module_that_imports_timm_makes_it_importable_before(folder):
    """Beside a torch that torchvision was not built for, each module has to import by itself."""
    found = 0
    for path in sorted((ROOT / folder).rglob("*.py")):
        imports = list(_imports(ast.parse(path.read_text())))
        needs = [line for line, name in imports if name.split(".")[0] in GUARDED]
        if not needs:
            continue
        found += 1
        guards = [line for line, name in imports if name == "rcmae.process.extensions"]
        assert guards, f"{path} imports {GUARDED} without rcmae.process.extensions"
        assert min(guards) < min(needs), f"{path}: rcmae.process.extensions comes first"
    assert found >= 1
