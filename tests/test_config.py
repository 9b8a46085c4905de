"""A recipe is checked whole, says every problem at once, and its derived numbers follow from the
world and the data.
"""

import copy
import math
import re
import shlex
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rcmae import config
from rcmae.commands import training
from rcmae.errors import Refused
from rcmae.models.sizes import ARCHITECTURES
from rcmae.tasks.registry import task_of

SHIPPED = sorted(path.stem for path in config.RECIPES.glob("*.yaml"))
ENOUGH = {"data": {"shards": "photos.tar"}, "schedule": {"steps": 10, "lr": 1e-3}}


@pytest.fixture
def recipe(tmp_path):
    """The path of a recipe of these sections, over the least that one needs."""

    def write(**sections):
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({**ENOUGH, **sections}))
        return str(path)

    return write


def refused(path, *overrides):
    """The lines after the first, which names the file."""
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        config.load(path, overrides)
    head, *lines = str(caught.value).splitlines()
    assert head.removeprefix("the command line, over ") == f"{path}:"
    return [line.strip() for line in lines]


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ("modle.depth=2", "unknown key 'modle'; did you mean 'model'?"),
        (
            "objective.mask_ration=0.5",
            "unknown key 'mask_ration' in objective; did you mean 'mask_ratio'?",
        ),
        (
            "model.mask_ration=0.6",
            "unknown key 'mask_ration' in model; did you mean 'objective.mask_ratio'?",
        ),
        ("mask_ratio=0.6", "unknown key 'mask_ratio'; did you mean 'objective.mask_ratio'?"),
        (
            "schedule.warmup_epoch=5",
            "unknown key 'warmup_epoch' in schedule; did you mean 'warmup_epochs'?",
        ),
        (
            "data.shards=[{shards: a.tar, weight: 0}]",
            "data.shards: wants a pattern, a list of patterns, or, for a",
        ),
        (
            "data.shards=[{shards: a.tar, weight: 1}, b.tar]",
            "data.shards: wants a pattern, a list of patterns",
        ),
        ("log.zzzz=1", "unknown key 'zzzz' in log; known: every_steps, report, tensorboard"),
        ("batch.images=many", "batch.images: input should be a valid integer"),
        ("batch.images=32.5", "batch.images: input should be a valid integer"),
        ("batch.images=true", "batch.images: input should be a valid integer, got True"),
        ("batch.images=0", "batch.images: input should be greater than or equal to 1, got 0"),
        ("schedule.lr=fast", "schedule.lr: input should be a valid number"),
        ("schedule.lr=.nan", "schedule.lr: input should be greater than 0, got nan"),
        ("objective.mask_ratio=1", "objective.mask_ratio: input should be less than 1, got 1"),
        (
            "objective.name=mea",
            "objective.name: unknown objective 'mea'; did you mean 'mae'?, or give MODULE:NAME",
        ),
        (
            "objective.feature_weight=2",
            "objective.feature_weight belongs to bootmae, and has no effect with rcmae; remove it",
        ),
        (
            "objective.class_smoothing=0.1",
            "objective.class_smoothing belongs to supmae and the term class, and has no effect",
        ),
        (
            "objective={terms: {class: 1}, class_temperatur: 3}",
            "unknown key 'class_temperatur' in objective; did you mean 'class_temperature'?",
        ),
        ("log.tensorboard=maybe", "log.tensorboard: input should be a valid boolean"),
        ("data.crop_scale=[0.2]", "data.crop_scale: field required, got [0.2]"),
        ("model=[1]", "model is a section, got [1]; set its keys, such as model.name=VALUE"),
    ],
)
def test_unknown_keys_and_wrong_types_are_named_with_the_way_out(recipe, wrong, line):
    lines = refused(recipe(), wrong)
    assert len(lines) == 1
    assert lines[0].startswith(line)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (
            "schedule={epochs: 3, steps: 9, lr: 1}",
            "schedule: give exactly one of epochs and steps, got epochs and steps; schedule.epo",
        ),
        ("schedule.steps=null", "schedule: give exactly one of epochs and steps, got neither"),
        (
            "schedule={steps: 9, base_lr: 1, lr: 1}",
            "schedule: give exactly one of base_lr and lr, got base_lr and lr",
        ),
        ("schedule.lr=null", "schedule: give exactly one of base_lr and lr, got neither"),
        (
            "schedule={steps: 9, lr: 1, warmup_steps: 1, warmup_epochs: 1}",
            "schedule: give warmup_epochs or warmup_ste",
        ),
        ("data.shards=[]", "data.shards: names no shards"),
        (
            "checkpoint.allow=[schedule.lrr]",
            "checkpoint.allow: unknown key 'schedule.lrr'; did you mean 'lr'?",
        ),
        (
            "checkpoint.allow=[shedule]",
            "checkpoint.allow: unknown section 'shedule'; did you mean 'schedule'?",
        ),
        (
            "checkpoint.allow=[model.depth]",
            "checkpoint.allow: model.depth cannot change within a run",
        ),
        (
            "checkpoint.allow=[classify.num_classes]",
            "checkpoint.allow: classify.num_classes cannot change within a run",
        ),
        (
            "model.in_channels=4",
            "data.mean and data.std have 3 and 3 values for model.in_channels=4",
        ),
        ("data.std=[1.0, 0.0, 1.0]", "data.std: values must be above 0"),
        (
            "data.crop_scale=[0.5, 0.2]",
            "data.crop_scale: needs 0 < low <= high <= 1, got [0.5, 0.2]",
        ),
        (
            "evaluate.every_steps=5",
            "evaluate.every_steps is set: give evaluate.train_shards and test_shards",
        ),
        (
            "engine.name=deepspeed",
            "engine.config: DeepSpeed needs its JSON, such as engine.config=zero2.json",
        ),
        (
            "engine.config=zero2.json",
            "engine.config=zero2.json is DeepSpeed's, but engine.name=local",
        ),
        ("{engine}", "'{engine}' is not of the form key=value"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(recipe, wrong, line):
    lines = refused(recipe(), wrong)
    assert len(lines) == 1
    assert lines[0].startswith(line)


def test_views_of_one_image_stay_in_one_micro_batch(recipe):
    loaded = config.load(recipe(), ["data.repeats=3", "batch.images=96", "batch.per_device=20"])
    sizes = config.resolve(loaded, world=2, samples_per_epoch=960)
    assert (sizes.per_device, sizes.accumulation, sizes.steps_per_epoch) == (12, 4, 10)
    assert config.batch_problems(config.load(recipe(), ["data.repeats=3", "batch.images=32"]), 2)[
        -1
    ].endswith("use 30")
    few = config.load(recipe(), ["data.repeats=3", "batch.images=96", "batch.per_device=2"])
    with pytest.raises(ValueError, match=r"batch\.per_device=2 is less than data\.repeats=3"):
        config.resolve(few, world=2, samples_per_epoch=960)


def test_a_mixture_is_a_list_of_sets_with_weights(recipe):
    loaded = config.load(
        recipe(), ["data.shards=[{shards: a.tar, weight: 2}, {shards: [b.tar, c.tar], weight: 1}]"]
    )
    assert [(one.shards, one.weight) for one in loaded.data.shards] == [
        ("a.tar", 2.0),
        (["b.tar", "c.tar"], 1.0),
    ]
    lines = refused(recipe(), "data.shards=[{shards: a.tar, wieght: 1}]")
    assert "unknown key 'wieght' in data.shards.0; did you mean 'weight'?" in lines


def test_a_teacher_rounded_to_bf16_needs_bf16(recipe):
    lines = refused(recipe(), "teacher.accumulate=stochastic", "engine.precision=fp32")
    assert lines == [
        "teacher.accumulate=stochastic rounds to bf16: set engine.precision=bf16, or use fp32_shard"
    ]


def test_a_typo_is_said_to_be_where_it_is(recipe):
    path = recipe()
    with pytest.raises(Refused) as typed:
        config.load(path, ["objective.mask_ration=0.5"])
    assert str(typed.value).startswith(f"the command line, over {path}:")
    wrong = recipe(objective={"mask_ration": 0.5})
    for words in ([], ["model.dpeth=2"]):  # the file's, and one of each
        with pytest.raises(Refused) as written:
            config.load(wrong, words)
        assert str(written.value).startswith(f"{wrong}:")


def test_a_mistyped_recipe_is_answered_with_those_of_the_command():
    with pytest.raises(Refused) as caught:
        config.load("rcmae_vit_b_61", task="pretrain")
    assert "did you mean 'rcmae_vit_b_16'" in str(caught.value)
    assert "detect_" not in str(caught.value)
    assert "segment_" not in str(caught.value)
    with pytest.raises(Refused, match="did you mean 'probe'"):
        config.load("prob", task="probe")


@pytest.mark.parametrize("unit", ["steps", "epochs"])
def test_a_warm_up_shrinks_with_a_run_that_is_shorter_than_it(recipe, unit):
    length = {"epochs": None, "steps": None, unit: 90}
    warmup = {"warmup_epochs": None, "warmup_steps": None, f"warmup_{unit}": 10}
    path = recipe(schedule={**length, **warmup, "lr": 1e-3})

    def warmed(words):
        return getattr(config.load(path, words).schedule, f"warmup_{unit}")

    assert warmed([f"schedule.{unit}=9"]) == 1
    assert warmed([f"schedule.{unit}=11"]) == 10, "it ends before the run"
    assert warmed([f"schedule.{unit}=9", f"schedule.warmup_{unit}=9"]) == 9, "as it is given"


def test_every_problem_is_in_the_one_message(recipe):
    path = recipe(objective={"mask_ration": 0.5}, batch={"images": "many"}, nothing=1)
    lines = refused(path, "log.every_step=2", "plain", "run.seed=[", "engine.precision=fp8")
    assert [line.split(":")[0].split(";")[0] for line in sorted(lines)] == [
        "'plain' is not of the form key=value, such as batch.images=64",
        "'run.seed=['",
        "batch.images",
        "engine.precision",
        "unknown key 'every_step' in log",
        "unknown key 'mask_ration' in objective",
        "unknown key 'nothing'",
    ]
    twice = "schedule={steps: 9, epochs: 3, lr: 1, base_lr: 1}"
    contradictions = refused(recipe(), twice, "data.shards=[]", "engine.config=x")
    assert len(contradictions) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("[1, 2]", "a recipe is a mapping of sections, got list"),
        (b"\xff\xfe", "is not YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as caught:
        config.load(str(path))
    assert str(path) in str(caught.value)


def test_a_recipe_that_is_not_there_is_answered_with_the_way_out(tmp_path):
    with pytest.raises(Refused, match="no recipe 'rcmae_vit_x_16'; did you mean 'rcmae_vit_s_16'"):
        config.load("rcmae_vit_x_16")
    with pytest.raises(Refused, match=r"no recipe 'mine\.yaml': .* which rcmae recipe lists"):
        config.load("mine.yaml")
    with pytest.raises(Refused, match=r"is a folder, not a recipe; .* RECIPE data\.images="):
        config.load(str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("{}")
    with pytest.raises(Refused, match=r"is a folder of a run; its recipe is .*/recipe\.yaml"):
        config.load(str(tmp_path))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["batch.images", "64"], "batch.images has no value: write batch.images=64, without a"),
        (["64"], "'64' is not of the form key=value, such as batch.images=64"),
        (["batch=3"], "batch is a section, got 3; set its keys, such as batch.images=VALUE"),
        (["data.shards="], "data.shards: names no shards; give a path"),
    ],
)
def test_a_word_that_sets_no_key_is_answered_with_one_that_does(words, told):
    with pytest.raises(Refused) as caught:
        config.load("quickstart", words)
    (line,) = str(caught.value).splitlines()[1:]
    assert line.strip().startswith(told)


def test_no_shards_beside_a_folder_of_images_are_none():
    recipe = config.load("quickstart", ["data.images=photos", "data.shards=null"])
    assert recipe.data.images == "photos"


# ------------------------------------------------------------------------------------- what is read


def test_overrides_are_yaml_and_go_over_the_file(recipe):
    path = recipe(batch={"images": 64, "per_device": 8}, run={"name": "named"})
    loaded = config.load(
        path,
        [
            "batch.images=128",
            "data.shards=[a.tar, 'b-{0..3}.tar']",
            "schedule={epochs: 2, base_lr: 1.5e-4}",
            "engine.compile=yes",
            "batch.per_device=null",
            "schedule.min_lr=1e-6",
            "model.image_size=[64, 32]",
            "run.dir=out=1",
            "batch.images=256",
        ],
    )
    assert (loaded.batch.images, loaded.batch.per_device) == (256, None)  # the last one counts
    assert loaded.data.shards == ["a.tar", "b-{0..3}.tar"]
    # a whole section
    assert (loaded.schedule.epochs, loaded.schedule.steps, loaded.schedule.lr) == (2, None, None)
    # 1e-6 is a string to YAML 1.1
    assert (loaded.schedule.base_lr, loaded.schedule.min_lr) == (1.5e-4, 1e-6)
    assert loaded.engine.compile is True
    assert loaded.model.image_hw == (64, 32)
    assert (loaded.run.name, loaded.run_dir) == ("named", Path("out=1"))


def test_a_run_is_named_after_its_recipe(recipe):
    loaded = config.load(recipe())
    assert (loaded.run.name, loaded.run_dir) == ("mine", Path("runs/mine"))


def test_what_is_written_is_read_back_as_the_same_recipe(recipe, tmp_path):
    loaded = config.load(recipe(), ["model.image_size=[64, 32]", "data.crop_scale=[0.3, 0.9]"])
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(loaded.model_dump(mode="json")))
    assert config.load(str(path)) == loaded
    assert (
        config.differences(
            config.load(str(path)).model_dump(mode="json"), loaded.model_dump(mode="json")
        )
        == []
    )


def parsed(*words):
    return training.parse(words, "rcmae train")


def test_what_launchers_add_is_taken():
    plain = ("r.yaml", ("batch.images=8", "log.every_steps=1"))
    for local_rank in ([], ["--local_rank=1"], ["--local-rank", "1"], ["--local_rank", "1"]):
        assert parsed(*local_rank, "r.yaml", "batch.images=8", "log.every_steps=1")[:2] == plain
        assert parsed("r.yaml", "batch.images=8", *local_rank, "log.every_steps=1")[:2] == plain
    name, overrides, *_ = parsed(
        "r.yaml", "--deepspeed", "--deepspeed_config", "my.json", "batch.images=8"
    )
    assert name == "r.yaml"
    assert overrides == ("batch.images=8", "engine.name=deepspeed", "engine.config=my.json")
    overrides = parsed("r.yaml", "--deepspeed_config=a").overrides
    assert overrides == ("engine.name=deepspeed", "engine.config=a")
    assert parsed("r.yaml", "--deepspeed").overrides == ("engine.name=deepspeed",)


# ---------------------------------------------------------------------------------- what is derived


def resolved(path, world=1, samples=10_000, *overrides):
    recipe = config.load(path, overrides)
    return config.resolve(
        recipe, world=world, samples_per_epoch=samples // recipe.batch.images * recipe.batch.images
    )


def test_the_learning_rate_follows_the_batch_and_not_the_ranks(recipe):
    path = recipe(schedule={"epochs": 4, "base_lr": 1.5e-4, "warmup_epochs": 0.5})
    for images in (64, 256, 4096):
        for world in (1, 2, 16):
            found = resolved(path, world, 10_000, f"batch.images={images}")
            assert found.lr == pytest.approx(1.5e-4 * images / 256, rel=1e-12)
            assert found.steps_per_epoch == 10_000 // images
            assert found.total_steps == 4 * found.steps_per_epoch
            assert found.warmup_steps == 0.5 * found.steps_per_epoch
    # lr itself is taken as it is
    assert resolved(recipe(), 1, 10_000, "batch.images=512").lr == 1e-3


@given(
    per_rank=st.integers(1, 300),
    world=st.integers(1, 64),
    per_device=st.none() | st.integers(1, 400),
)
def test_a_rank_takes_the_largest_divisor_that_fits_at_once(per_rank, world, per_device):
    recipe = config.Recipe(
        batch={"images": per_rank * world, "per_device": per_device}, schedule={"steps": 1, "lr": 1}
    )
    found = config.resolve(recipe, world=world, samples_per_epoch=per_rank * world)
    assert found.per_device * found.accumulation == found.images_per_rank == per_rank
    limit = min(per_device or per_rank, per_rank)
    assert found.per_device == max(size for size in range(1, limit + 1) if per_rank % size == 0)
    assert (
        found.images_per_step == found.per_device * found.accumulation * world == per_rank * world
    )


@given(
    images=st.integers(1, 5000),
    world=st.integers(1, 64),
    per_device=st.none() | st.integers(1, 128),
)
def test_batches_that_the_ranks_do_not_divide_are_answered_with_some_that_they_do(
    images, world, per_device
):
    recipe = config.Recipe(
        batch={"images": images, "per_device": per_device}, schedule={"steps": 1, "lr": 1}
    )
    problems = config.batch_problems(recipe, world)
    assert bool(problems) == bool(images % world)
    if problems:
        assert len(problems) == 1
        assert problems[0].startswith(f"batch.images={images} is not divisible by {world} ranks")
        proposed = [
            int(number) for number in re.findall(r"\d+", problems[0].partition("; use ")[2])
        ]
        assert proposed
        for number in proposed:
            assert number % world == 0
        assert max(proposed) > images
        assert min(proposed) < images or images < world * min(
            per_device or 1, max(1, images // world)
        )


def test_the_message_of_an_undivided_batch_is_the_one_promised():
    recipe = config.Recipe(batch={"images": 4100, "per_device": 64})
    assert config.batch_problems(recipe, 8) == [
        "batch.images=4100 is not divisible by 8 ranks x 64 per_device; use 4096 or 4608"
    ]


def test_streams_are_raised_to_the_ranks_unless_they_were_chosen():
    free, chosen = config.Recipe(), config.Recipe(data={"canonical_streams": 24})
    for world in range(1, 300):
        streams = config.streams_for(free, world)
        assert streams % world == 0
        assert 256 <= streams < 256 + world or (world > 256 and streams == world)
        assert config.streams_for(chosen, world) == 24
    assert config.batch_problems(chosen, 8) == []
    assert config.batch_problems(chosen, 16) == [
        "data.canonical_streams=24 is not divisible by 16 ranks; use 16 or 32, or a number "
        "of ranks that divides it"
    ]


def test_both_counts_that_the_ranks_do_not_divide_are_named(recipe):
    loaded = config.load(recipe(), ["batch.images=30", "data.canonical_streams=6"])
    with pytest.raises(ValueError, match=r"batch\.images=30") as caught:
        config.resolve(loaded, world=4, samples_per_epoch=3000)
    assert "data.canonical_streams=6" in str(caught.value)


def test_a_warm_up_that_outlasts_the_run_is_refused(recipe):
    resolved(recipe(), 1, 10_000, "batch.images=32", "schedule.warmup_steps=9")
    with pytest.raises(
        ValueError, match="warm-up of 10 steps does not end before the last of 10 steps"
    ):
        resolved(recipe(), 1, 10_000, "batch.images=32", "schedule.warmup_steps=10")


# ------------------------------------------------------------------------ which run is the same run


CHANGES_THE_TRAINING = [
    "objective.mask_ratio=0.5",
    "objective.name=mae",
    "model.depth=2",
    "model.image_size=64",
    "teacher.momentum=0.9",
    "teacher.schedule=constant",
    "teacher.update=micro_step",
    "schedule.lr=1",
    "schedule.steps=11",
    "schedule.weight_decay=0",
    "schedule.clip_grad=1",
    "batch.images=64",
    "run.seed=1",
    "data.seed=1",
    "data.epoch_samples=9000",
    "data.canonical_streams=8",
    "data.shuffle_window=7",
    "data.crop_scale=[0.1, 1.0]",
    "data.crop_ratio=[0.5, 2.0]",
    "data.flip=0",
    "data.mean=[0, 0, 0]",
    "data.std=[1, 1, 1]",
    "data.decode_margin=3.0",
]
MAY_CHANGE = [
    "engine.name=fsdp2",
    "engine.precision=fp32",
    "engine.compile=true",
    "engine.activation_checkpointing=torch",
    "data.workers=0",
    "data.shards=elsewhere/*.tar",
    "data.max_bad_fraction=0.1",
    "batch.per_device=4",
    "checkpoint.every_steps=3",
    "checkpoint.keep=9",
    "checkpoint.resume=must",
    "log.every_steps=1",
    "run.dir=other",
    "run.name=other",
    "run.stop_after_steps=5",
    "evaluate.k=[1]",
]


def test_a_key_that_changes_the_training_makes_another_run_and_no_other_key_does(recipe):
    path = recipe()
    saved = config.load(path).model_dump(mode="json")
    for change in CHANGES_THE_TRAINING:
        key, _, value = change.partition("=")
        [found] = config.differences(config.load(path, [change]).model_dump(mode="json"), saved)
        assert found.key == key
        assert found.asked == yaml.safe_load(value)
    for change in MAY_CHANGE:
        assert (
            config.differences(config.load(path, [change]).model_dump(mode="json"), saved) == []
        ), change
    every = config.load(path, CHANGES_THE_TRAINING).model_dump(mode="json")
    assert len(config.differences(every, saved)) == len(CHANGES_THE_TRAINING)


def test_streams_that_the_first_start_chose_need_not_be_said_again(recipe):
    path = recipe()
    chosen = config.load(path, ["data.canonical_streams=256"]).model_dump(mode="json")
    assert config.differences(config.load(path).model_dump(mode="json"), chosen) == []
    assert config.differences(
        config.load(path, ["data.canonical_streams=8"]).model_dump(mode="json"), chosen
    )


@pytest.mark.parametrize("value", ["0", "false", "[]", "''"])
def test_a_folder_that_is_none_is_refused_and_not_replaced_by_the_usual(recipe, value):
    with pytest.raises(Refused, match=r"run\.dir: "):
        config.load(recipe(), [f"run.dir={value}"])


# ------------------------------------------------------------------------------ the shipped recipes


def header(name):
    """The fields of a shipped recipe's header: Command, Hardware, Hours, Number."""
    lines = re.findall(
        r"^# (\w+): +(.*)$", (config.RECIPES / f"{name}.yaml").read_text(), re.MULTILINE
    )
    return dict(lines)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_resolves_on_the_hardware_of_its_header(name):
    fields = header(name)
    assert {"Command", "Hardware", "Hours", "Number"} <= fields.keys()
    nodes = re.match(r"(\d+) nodes? x (\d+)", fields["Hardware"])
    ranks = re.search(r"(\d+) (?:\w+ )?(?:ranks|cores)", fields["Hardware"])
    world = math.prod(map(int, nodes.groups())) if nodes else int(ranks.group(1)) if ranks else 1
    recipe = config.load(name, ["data.shards=photos.tar"])
    images = recipe.batch.images
    samples = recipe.data.epoch_samples or max(1_281_167, images)
    found = config.resolve(recipe, world=world, samples_per_epoch=samples // images * images)
    assert found.total_steps > found.warmup_steps
    assert recipe.model.name in ARCHITECTURES
    if recipe.engine.config is not None:
        assert (config.RECIPES.parent.parent / "ds_configs" / recipe.engine.config).is_file()


@pytest.mark.parametrize("name", SHIPPED)
def test_the_command_in_a_recipes_header_runs_that_recipe(name):
    command = header(name)["Command"]
    module = re.search(r"rcmae[. ](train|finetune|probe|segment|detect)\b", command)
    if module is None:  # a script that runs it
        assert (config.RECIPES.parent.parent / command.split()[0].strip(",;")).is_file()
        return
    words = shlex.split(command.partition(module[0])[2])
    recipe, overrides, *_ = parsed(*words)
    assert Path(recipe).stem == name
    loaded = config.load(recipe, overrides)
    assert loaded.data.shards
    assert module[0].replace(" ", ".") == config.module_of(loaded)
    assert task_of(loaded).name == module[1].replace("train", "pretrain")


@pytest.mark.parametrize("size", ["s_16", "b_16", "l_16", "h_14"])
def test_the_papers_run_is_what_the_recipes_say(size):
    recipe = config.load(f"rcmae_vit_{size}", ["data.shards=photos.tar"])
    found = config.resolve(recipe, world=8, samples_per_epoch=1_281_167 // 4096 * 4096)
    assert (recipe.schedule.epochs, recipe.schedule.warmup_epochs, found.images_per_step) == (
        1600,
        40,
        4096,
    )
    assert found.lr == pytest.approx(2.4e-3)
    assert (recipe.schedule.betas, recipe.schedule.weight_decay) == ((0.9, 0.95), 0.05)
    assert (
        recipe.objective.mask_ratio,
        recipe.objective.norm_pix_loss,
        recipe.objective.consistency_weight,
    ) == (
        0.75,
        True,
        1.0,
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            ["objective.name=bootmae", "model.cls_token=false"],
            "model.cls_token: bootmae's network has its own",
        ),
        (["model.class_tokens=0"], "model.class_tokens=0: set model.cls_token=false for none"),
        (
            ["objective.name=bootmae", "objective.terms={class: 1}"],
            "bootmae's network has no class head",
        ),
        (["objective.name=bootmae", "objective.teacher_mask=different"], "objective.teacher_mask"),
        (
            ["objective.name=supmae", "model.cls_token=false", "model.class_pool=cls"],
            "there is no token to pool",
        ),
        (
            ["objective.terms={clas: 1}"],
            "objective.terms: input should be 'consistency', 'class' or 'features'",
        ),
    ],
)
def test_what_a_network_cannot_learn_is_refused(recipe, wrong, said):
    assert said in "\n".join(refused(recipe(), *wrong))


def test_a_run_from_before_a_key_was_there_goes_on(recipe):
    mine = config.load(recipe()).model_dump(mode="json")
    old = copy.deepcopy(mine)
    del old["objective"]["teacher_mask"], old["model"]["qkv_bias"]
    assert config.differences(mine, old) == []
    assert config.differences(
        config.load(recipe(), ["model.qkv_bias=qv"]).model_dump(mode="json"), old
    )


def test_what_the_command_line_sets_takes_the_place_of_the_recipes_other_key():
    shards = "data.shards=x.tar"
    recipe = config.load(
        "rcmae_vit_b_16", [shards, "schedule.steps=400", "schedule.lr=1e-3", "engine.name=local"]
    )
    schedule = recipe.schedule
    assert (schedule.epochs, schedule.steps) == (None, 400)
    assert (schedule.base_lr, schedule.lr) == (None, 1e-3)
    assert (schedule.warmup_epochs, schedule.warmup_steps) == (None, 10), "40 of 1600 epochs"
    assert recipe.engine.config is None
    assert config.load("rcmae_vit_b_16", [shards, "schedule.warmup_steps=7"]).schedule == (
        config.load(
            "rcmae_vit_b_16", [shards, "schedule.warmup_epochs=null", "schedule.warmup_steps=7"]
        ).schedule
    )
    epochs = config.load("quickstart", ["schedule.epochs=20", "schedule.base_lr=1e-4"]).schedule
    assert (epochs.steps, epochs.lr, epochs.warmup_steps, epochs.warmup_epochs) == (
        None,
        None,
        None,
        2.0,
    )
    # said in full, as it had to be once: the same training as then
    full = ["schedule.epochs=null", "schedule.steps=400000"]
    assert config.load("rcmae_vit_b_16", [shards, *full]).schedule.warmup_epochs == 40


def test_two_of_a_pair_on_one_command_line_are_refused():
    with pytest.raises(Refused, match="give exactly one of epochs and steps, got epochs and steps"):
        config.load("quickstart", ["schedule.epochs=2", "schedule.steps=3"])
    with pytest.raises(Refused, match=r"is DeepSpeed's, but engine\.name=local"):
        config.load("quickstart", ["engine.name=local", "engine.config=zero2.json"])


def test_0_means_never_for_all_that_is_done_every_so_many_steps():
    keys = ("evaluate.every_steps", "evaluate.picture_every_steps", "checkpoint.every_steps")
    keys += ("checkpoint.keep_every", "log.every_steps")
    recipe = config.load("quickstart", [f"{key}=0" for key in keys])
    for key in keys:
        section, _, name = key.partition(".")
        assert getattr(getattr(recipe, section), name) is None, key
    with pytest.raises(Refused, match=r"log\.every_steps"):
        config.load("quickstart", ["log.every_steps=-1"])
    with pytest.raises(Refused, match=r"log\.every_steps"):
        config.load("quickstart", ["log.every_steps=false"])


def test_a_mistyped_recipe_is_told_the_near_ones():
    with pytest.raises(Refused, match="did you mean 'quickstart'"):
        config.load("quickstrat")
    with pytest.raises(Refused, match="'rcmae_vit_b_16'"):
        config.load("rcmae_vit_b16")
    with pytest.raises(Refused, match="nor a shipped recipe, which rcmae recipe lists"):
        config.load("nothing-like-it.yaml")


@pytest.mark.parametrize(
    ("name", "shown", "hidden"),
    [("train", "quickstart", "probe_"), ("probe", "probe_rcmae_vit_b_16", "quickstart")],
)
def test_help_lists_the_recipes_of_a_command(name, shown, hidden, capsys):
    with pytest.raises(SystemExit):
        training.parse(["--help"], f"rcmae {name}")
    listed = capsys.readouterr().out.partition("shipped recipes")[2]
    assert shown in listed
    assert hidden not in listed
