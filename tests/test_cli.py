"""One command: what it lists and refuses, how fast, and that nothing heavy is imported for it."""

import argparse
import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rcmae import __version__, cli, config
from rcmae.commands import arguments
from rcmae.commands import recipe as recipe_command
from rcmae.files import shipped
from runs import python_path

ROOT = Path(__file__).parent.parent
COMMANDS = ROOT / "rcmae" / "commands"
HEAVY = ("torch", "numpy", "deepspeed", "timm", "rich", "matplotlib", "fsspec", "pydantic")


def rcmae(*arguments: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *python, "-m", "rcmae", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": python_path()},
    )


def imported_by(*arguments: str) -> set[str]:
    """Modules that Python imported for a command line."""
    lines = rcmae(*arguments, python=("-X", "importtime")).stderr.splitlines()
    return {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}


def test_a_training_imports_no_compiler_and_nothing_it_does_not_use(
    tiny: Path, tmp_path: Path
) -> None:
    """They cost seconds in each process: timm, torch's compiler, TensorBoard, DeepSpeed's Muon."""
    engine = ["engine.name=deepspeed", "engine.config=zero2"]
    for name, options in (("local", []), ("zero2", engine)):
        short = ["schedule.steps=1", "schedule.warmup_steps=0", f"run.dir={tmp_path / name}"]
        found = imported_by("train", str(tiny), *short, *options)
        assert "torch" in found
        assert ("deepspeed" in found) == bool(options)
        unused = {"timm", "torchvision", "torch._dynamo", "torch.utils.tensorboard", "matplotlib"}
        assert not found & unused


def test_the_table_and_the_modules_agree():
    families = {
        path.parent for path in COMMANDS.rglob("__init__.py") if "def main(" in path.read_text()
    }
    no_commands = {"__init__", "arguments"}  # the latter: what options of commands share
    paths = [path for path in COMMANDS.rglob("*.py") if path.stem not in no_commands]
    single = [path for path in paths if path.parent not in families]
    modules = {".".join(path.relative_to(COMMANDS).with_suffix("").parts) for path in single}
    modules |= {".".join(path.relative_to(COMMANDS).parts) for path in families}
    named = [command.module.partition(":") for command in cli.COMMANDS.values()]
    assert {module for module, _, _ in named} == modules
    for module, _, function in named:
        path = COMMANDS / module.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), module
        functions = {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}
        assert (function or "main") in functions


def test_help_lists_each_command_with_a_line(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert f"  {name} " in shown
        assert command.about in shown


def test_without_a_command_it_says_which_there_are(capsys):
    assert cli.main([]) == 2
    assert "usage: rcmae COMMAND" in capsys.readouterr().err


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"rcmae {__version__}\n"


def test_a_mistyped_command_gets_the_nearest(capsys):
    assert cli.main(["trian", "rcmae_vit_b_16"]) == 2
    assert capsys.readouterr().err == "rcmae: no command 'trian'; did you mean 'train'?\n"
    assert cli.main(["xyzzy"]) == 2
    assert "rcmae --help" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("shards data/train-*.tar", "rcmae shards check verify 'data/train-*.tar'"),
        ("shards chek verify data", "rcmae shards check verify data"),
        ("shards check data --json", "rcmae shards check verify data --json"),
        ("shards check verfy data", "rcmae shards check verify data"),
        ("shards check a b c d e f g", "rcmae shards check verify a b c d e ..."),
        ("runs runs/one --watch", "rcmae runs status runs/one --watch"),
        ("checkpoint runs/one", "rcmae checkpoint list runs/one"),
        ("visualize runs/one", "rcmae visualize reconstruct runs/one"),
    ],
)
def test_a_path_in_the_place_of_a_verb_gets_what_was_meant(said, meant, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(said.split())
    assert left.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"; did you mean: {meant}")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_imports_nothing_heavy(name):
    found = imported_by(name, "--help")
    assert "argparse" in found
    heavy = {module for module in found if module.split(".")[0] in HEAVY}
    assert not heavy, f"rcmae {name} --help imports {', '.join(sorted(heavy))}"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_is_its_name_in_its_help(name):
    done = rcmae(name, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: rcmae {name}")


@pytest.mark.parametrize("name", ["train", "finetune", "probe", "detect"])
def test_a_mistyped_key_is_refused_without_torch(name):
    words = [name, "rcmae_vit_b_16", "data.shards=x.tar", "model.dpeth=2"]
    done = rcmae(*words)
    assert done.returncode == 2
    assert "unknown key 'dpeth' in model; did you mean 'depth'?" in done.stderr
    assert "torch" not in imported_by(*words)


LAUNCHER = """
import os, subprocess, sys, time
ranks = []
for rank in ("0", "1"):
    env = os.environ | {"RANK": rank, "LOCAL_RANK": rank}
    ranks.append(subprocess.Popen(sys.argv[1:], env=env))
while all(rank.poll() is None for rank in ranks):
    time.sleep(0.05)
status = max(rank.poll() or 0 for rank in ranks)
for rank in ranks:
    rank.terminate()
    rank.wait()
raise SystemExit(status)
"""


def test_ranks_of_a_launcher_that_ends_them_refuse_a_typo_without_torch(tmp_path):
    """One says it; neither imports what takes seconds."""
    launcher = tmp_path / "deepspeed"  # it goes by its name
    launcher.write_text(LAUNCHER)
    ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    command = [sys.executable, "-X", "importtime", "-m", "rcmae", "train", "quickstart"]
    done = subprocess.run(
        [sys.executable, str(launcher), *command, "model.dpeth=2"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": python_path(), **ranks},
    )
    assert done.returncode == 2
    assert done.stderr.count("did you mean 'depth'?") == 1
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "rcmae.config" in imported
    assert "torch" not in imported


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["train", "rcmae_vit_b_16", "batch.imags=1"]]
)
def test_help_and_a_typo_take_less_than_a_second(words):
    """Of a core's time: what else this machine does is no matter of ours."""
    seconds = []
    for _ in range(2):  # the first may compile
        before = os.times()
        rcmae(*words)
        after = os.times()
        user = after.children_user - before.children_user
        seconds.append(user + after.children_system - before.children_system)
    assert min(seconds) < 1.0


def test_a_seed_sets_both_seeds_and_is_given_once(capsys):
    from rcmae.commands.training import parse

    asked = parse(["RECIPE", "batch.images=8", "--seed", "7"], "rcmae train")
    assert asked.overrides == ("batch.images=8", "run.seed=7", "data.seed=7")
    with pytest.raises(SystemExit):
        parse(["RECIPE", "run.seed=1", "--seed", "7"], "rcmae train")
    assert "leave out run.seed=1 or --seed" in capsys.readouterr().err


def test_recipe_lists_what_is_shipped(capsys):
    assert cli.main(["recipe"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(
        path.stem for path in config.RECIPES.glob("*.yaml")
    )


def test_a_printed_recipe_is_a_recipe_with_the_same_settings(tmp_path, capsys):
    assert cli.main(["recipe", "quickstart", "schedule.steps=7"]) == 0
    printed = tmp_path / "quickstart.yaml"
    printed.write_text(capsys.readouterr().out)
    assert config.load(str(printed)) == config.load("quickstart", ["schedule.steps=7"])
    assert printed.read_text().startswith("# The first run")


def test_a_document_is_printed_in_the_place_of_tables_or_kept_beside_them(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    arguments.add_json(parser)
    assert not arguments.told({"a": 1}, parser.parse_args([]).json)
    assert arguments.told({"a": 1}, parser.parse_args(["--json"]).json)
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    kept = tmp_path / "kept.json"
    assert not arguments.told({"a": 1}, parser.parse_args(["--json", str(kept)]).json)
    assert json.loads(kept.read_text()) == {"a": 1}
    for place in ("recipe.yaml", str(tmp_path)):  # the next argument of who thought of a flag
        with pytest.raises(SystemExit):
            parser.parse_args(["--json", place])
    assert "give FILE.json, or --json behind all else" in capsys.readouterr().err


def test_recipes_are_json_for_scripts(capsys):
    assert cli.main(["recipe", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quickstart"].startswith("The first run")
    assert cli.main(["recipe", "rcmae_vit_b_16", "schedule.steps=7", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert (tree["schedule"]["steps"], tree["data"]["shards"]) == (7, [])


def test_every_key_has_a_meaning_a_unit_and_a_default(capsys):
    assert cli.main(["recipe", "--keys", "--json"]) == 0
    listed = {key["name"]: key for key in json.loads(capsys.readouterr().out)}
    assert len(listed) > 130
    assert [name for name, key in listed.items() if not key["meaning"] or not key["unit"]] == []
    every = listed["checkpoint.every_steps"]
    assert (every["default"], every["unit"]) == (1000, "steps")
    assert listed["engine.precision"]["unit"] == "auto | bf16 | fp32"
    assert listed["objective.consistency_weight"]["owners"] == ["rcmae", "rcpixio"]


def test_keys_are_found_by_how_they_begin(capsys):
    assert cli.main(["recipe", "--keys", "data.cache"]) == 0
    printed = capsys.readouterr().out
    assert "data.cache_gb = 100.0  [10^9 bytes]" in printed
    assert "data.shards" not in printed
    assert cli.main(["recipe", "--keys", "qqq"]) == 2
    assert "known: batch, checkpoint, " in capsys.readouterr().err
    assert cli.main(["recipe", "--keys", "data.cahce_gb"]) == 2
    assert "did you mean 'data.cache_gb'?" in capsys.readouterr().err


def test_keys_may_be_read_by_who_leaves_early():
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "rcmae", "recipe", "--keys"]
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, cwd=ROOT) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_the_schema_describes_every_section(capsys):
    assert cli.main(["recipe", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    section = schema["$defs"]["ScheduleOptions"]["properties"]
    assert "Length of the training" in section["steps"]["description"]
    assert "consistency_weight" in schema["$defs"]["ObjectiveOptions"]["properties"]


def test_a_printed_recipe_says_what_each_key_means():
    printed = recipe_command.resolved("quickstart", [])
    assert "  # Images per optimizer step, over all ranks.\n  images: 64\n" in printed


def test_a_recipe_without_shards_is_printed_without_shards(tmp_path):
    printed = recipe_command.resolved("rcmae_vit_b_16", [])
    assert yaml.safe_load(printed)["data"]["shards"] == []
    (tmp_path / "mine.yaml").write_text(printed)
    assert config.load(str(tmp_path / "mine.yaml"), ["data.shards=x.tar"]).batch.images == 4096


def test_a_recipe_that_is_wrong_is_refused(capsys):
    assert cli.main(["recipe", "rcmae_vit_b_61"]) == 2
    assert "no recipe 'rcmae_vit_b_61'" in capsys.readouterr().err
    assert cli.main(["recipe", "quickstart", "model.dpeth=2"]) == 2
    assert "did you mean 'depth'?" in capsys.readouterr().err


def test_templates_are_copied_and_never_over_others(tmp_path, capsys):
    folder = tmp_path / "jobs"
    assert cli.main(["slurm-templates", str(folder)]) == 0
    capsys.readouterr()
    there = {path.name for path in folder.iterdir()}
    assert {"pretrain.sbatch", "job.sh", "env.example.sh", "README.md"} <= there
    assert os.access(folder / "submit.sh", os.X_OK) == os.access(ROOT / "slurm/submit.sh", os.X_OK)
    (folder / "job.sh").write_text("mine")
    (folder / "rank.sh").unlink()
    assert cli.main(["slurm-templates", str(folder)]) == 2
    assert "job.sh" in capsys.readouterr().err
    assert (folder / "job.sh").read_text() == "mine"
    assert not (folder / "rank.sh").exists(), "all or nothing"
    assert cli.main(["slurm-templates", str(folder), "--overwrite"]) == 0
    assert (folder / "job.sh").read_text() == (ROOT / "slurm" / "job.sh").read_text()
    capsys.readouterr()
    assert cli.main(["slurm-templates", str(folder / "job.sh")]) == 2
    assert capsys.readouterr().err == f"rcmae: {folder / 'job.sh'} is a file; give a folder\n"


def test_folders_that_come_with_the_package_are_found():
    assert json.loads((shipped("ds_configs") / "zero1.json").read_text())
    assert (shipped("slurm") / "pretrain.sbatch").is_file()
    assert list(shipped("results").glob("step_*.json"))


@pytest.mark.slow
def test_ranks_train_through_the_command_and_refuse_a_typo_together(tiny, ranks, tmp_path):
    words = ["-m", "rcmae", "train", str(tiny), "engine.name=fsdp2", f"run.dir={tmp_path}/run"]
    ranks(*words, "schedule.steps=2", "schedule.warmup_steps=1", world=2).succeed()
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["step"] == 2
    typo = ranks(*words, "model.dpeth=2", world=2)
    assert typo.wait() == [2, 2]
    assert "did you mean 'depth'?" in typo.said()


def test_all_commands_begin_what_went_wrong_alike() -> None:
    """With `rcmae: `: a search of a job's log finds it, whichever command spoke."""
    found = []
    for path in sorted((ROOT / "rcmae").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and str(node.value).startswith("error: "):
                found.append(f"{path}:{node.lineno}")
    assert found == []
