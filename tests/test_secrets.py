"""Nothing that a run shows or passes on holds a secret, what must be whole is its owner's alone,
and a command from another's file does not run.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import rcmae
from rcmae.commands import convert, export
from rcmae.commands.again import replay as replay_tool
from rcmae.config import sources_in, without_pipes
from rcmae.data.index import ShardIndex
from rcmae.data.sources import holds_secret, redacted, without_secrets
from rcmae.errors import Refused
from rcmae.run.records.metrics import MetricsLog
from runs import start

HUSH = "TOPSECRET"

TEXTS = [
    f"pipe:AWS_SECRET_ACCESS_KEY={HUSH} aws s3 cp s3://b/x.tar -",
    f'pipe:TOKEN="a {HUSH} b" curl https://h/x.tar',
    f"data.shards=pipe:curl -H 'Authorization: Bearer {HUSH}' https://h/x.tar: cannot be read",
    f"pipe:curl -u me:{HUSH} https://h/x.tar",
    f"https://{HUSH}@host/x.tar",
    f"https://user:{HUSH}@host/x.tar",
    f"https://user:a)b@{HUSH}@host/x.tar",
    f"https://h/x.tar?sig=AAA){HUSH}",
    f"https://h/x.tar?a='b'&sig={HUSH}",
    f"['https://h/x.tar#{HUSH}', 3]",
    f"HF_TOKEN={HUSH}",
    f"export MY_API_KEY='{HUSH}'",
    f"Authorization: Bearer {HUSH}",
    f"password = {HUSH}",
    f"password: {HUSH}",
    f"{{'password': '{HUSH}', 'a': 1}}",
    f'{{"token": "{HUSH}"}}',
    f"aws_secret_access_key = {HUSH}",
    f"hf_token={HUSH} wandb_api_key={HUSH}",
    f"client_secret={HUSH}",
    f"X-Api-Key: {HUSH}",
    f"x-amz-security-token: {HUSH}",
    f"PRIVATE-TOKEN: {HUSH}",
    f"Set-Cookie: a=b; session={HUSH}",
    f"401, message='Bearer {HUSH}'",
    f"curl --token {HUSH}",
    f"curl --api-key {HUSH}",
    f"curl -u me:{HUSH} https://h/x.tar",
    f"https://h/x.tar;token={HUSH}",
    f"https://h/x.tar%3Fsig={HUSH}",
    f"https://h/x.tar?a=1 sig={HUSH}",
    f"AccountName=x;AccountKey={HUSH};EndpointSuffix=core.windows.net",
    f"SharedAccessSignature=sv=1&sig={HUSH}",
    f"simplecache::https://u:{HUSH}@h/x.tar?a={HUSH}",
]


@pytest.mark.parametrize("text", TEXTS)
def test_secrets_are_not_shown(text: str) -> None:
    shown = redacted(text)
    assert HUSH not in shown
    assert redacted(shown) == shown
    assert holds_secret({"data": [{"shards": text}]})
    assert HUSH not in json.dumps(without_secrets({"data": [{"shards": text}]}))


@pytest.mark.parametrize(
    "text",
    [
        "data/train-{000000..000099}.tar",
        "s3://bucket/train-{000000..000099}.tar",
        "class_token=False mask_token=1",
        "cls_token: 3, token=3 tokens, mask_token: [1, 1, 64]",
        '{"tokens": 5, "num_tokens": 4}',
        "key: a, keys: b, --keys last-dot, the secret of it",
        "key: photo@2x",
        "`pipe:` commands",
        "pipe:cat ... (x.tar): is not a complete tar",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text
    assert not holds_secret([text])


def inside(folder: Path) -> dict[str, int]:
    """The files that hold the secret, with their modes for others."""
    return {
        str(path.relative_to(folder)): path.stat().st_mode & 0o077
        for path in sorted(folder.rglob("*"))
        if path.is_file() and HUSH.encode() in path.read_bytes()
    }


def test_a_run_and_its_exports_keep_a_secret(
    tiny: Path, photo_shards: str, tmp_path: Path, capfd: Any
) -> None:
    folder = tmp_path / "run"
    shards = f"data.shards=pipe:MY_TOKEN={HUSH}; cat {photo_shards}"
    few = ["schedule.steps=3", "schedule.warmup_steps=0", "guard.drill_nan_position=40"]
    few += ["guard.action=skip"]
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    assert start(tiny, folder, shards, cache, "data.mean=[0.3,0.3,0.3]", *few) == 0
    own = {"recipe.yaml", "index/index.json"}
    held = inside(folder)
    bundles = {name for name in held if name.startswith("replay/")}
    manifests = {name for name in held if name.endswith("manifest.json")}
    assert own | bundles | manifests == held.keys()
    assert bundles
    assert manifests
    assert not any(held.values()), "others may read it"

    for tool, options in (
        (export, ["--format", "safetensors", "--out", str(tmp_path / "e.safetensors")]),
        (export, ["--format", "rcmae", "--out", str(tmp_path / "r.pth")]),
        (convert, ["--to", "safetensors", "--out", str(tmp_path / "c.safetensors")]),
        (convert, ["--to", "huggingface", "--out", str(tmp_path / "hf")]),
    ):
        assert tool.main([str(folder), *options]) == 0
    outside = inside(tmp_path)
    assert {name for name in outside if not name.startswith("run/")} == set()
    said = capfd.readouterr()
    assert HUSH not in said.out
    assert HUSH not in said.err
    for name in ("e.safetensors", "c.safetensors", "hf"):  # and they say what images need
        encoder = rcmae.load_encoder(tmp_path / name)
        assert encoder.mean == pytest.approx((0.3,) * 3)
        assert encoder.image_size == (32, 32)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["num_attention_heads"] == 4


def test_an_event_and_a_line_keep_a_secret(tmp_path: Path, capsys: Any) -> None:
    log = MetricsLog(tmp_path, resume_step=0, total_steps=1, bar=False, tensorboard=False)
    for text in TEXTS:
        log.event("bad_sample", shard=text, more={"of": [text]})
        log.say(text)
        log.warn(text)
    log.close()
    assert not inside(tmp_path)
    assert HUSH not in capsys.readouterr().out


# ------------------------------------------------------------------------------------- commands


def test_commands_in_another_s_recipe_are_refused() -> None:
    tree = {"data": {"shards": [{"shards": "pipe:touch x", "weight": 1}]}, "run": {"name": "a"}}
    with pytest.raises(Refused, match=r"data\.shards.*--allow-pipe"):
        without_pipes(tree, "bundle.json")
    without_pipes({"data": {"shards": "a.tar"}}, "bundle.json")
    assert sources_in(tree) == {"data.shards.shards": "pipe:touch x"}


@pytest.fixture
def bundle(tiny: Path, tmp_path: Path) -> Path:
    """Of a run that met a loss that was not finite."""
    folder = tmp_path / "run"
    few = ["schedule.steps=3", "schedule.warmup_steps=0", "guard.drill_nan_position=40"]
    assert start(tiny, folder, *few, "checkpoint.every_steps=1") == 1
    (path,) = sorted((folder / "replay").glob("*.json"))
    return path


def test_a_bundle_s_command_runs_only_where_it_is_allowed(
    bundle: Path, photo_shards: str, tmp_path: Path, capsys: Any
) -> None:
    tree = json.loads(bundle.read_text())
    first = photo_shards.replace("{000000..000005}", "000000")
    tree["recipe"]["data"]["shards"] = f"pipe:touch {tmp_path}/OWNED; cat {first}"
    bundle.write_text(json.dumps(tree))
    shutil.rmtree(bundle.parents[1] / "index")
    assert replay_tool.main([str(bundle)]) == 2
    assert "--allow-pipe" in capsys.readouterr().err
    assert not (tmp_path / "OWNED").exists()
    replay_tool.main([str(bundle), "--allow-pipe"])
    assert (tmp_path / "OWNED").exists()


@pytest.mark.parametrize(
    "pattern",
    [
        "{pipe:touch OWNED,pipe:touch  OWNED}",
        "p{ipe:touch,ipe: touch} OWNED",
        "file://pipe:touch OWNED",
        "*",
    ],
)
def test_no_pattern_becomes_a_command(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands in another's recipe are known by how a pattern begins."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipe:touch OWNED").write_bytes(b"no tar")
    without_pipes({"data": {"shards": pattern}}, "recipe.yaml")
    with pytest.raises(Refused, match="cannot be used"):
        ShardIndex.open(pattern)
    assert not (tmp_path / "OWNED").exists()


def test_an_index_s_command_does_not_run(photo_shards: str, tmp_path: Path) -> None:
    shard = photo_shards.replace("{000000..000005}", "000000")
    ShardIndex.open(shard).save(tmp_path)
    head = json.loads((tmp_path / "index.json").read_text())
    head["shards"][0]["name"] = f"pipe:touch {tmp_path}/OWNED; cat {shard}"
    (tmp_path / "index.json").write_text(json.dumps(head))
    index = ShardIndex.open(shard, cache=[str(tmp_path)])
    assert [each.path for each in index.shards] == [shard]
    assert not (tmp_path / "OWNED").exists()
