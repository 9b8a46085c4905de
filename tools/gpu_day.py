#!/usr/bin/env python3
"""What the first half hour on a GPU must answer: how fast it is, how fast training is on it, and
how far `rcmae plan` is off.

    python tools/gpu_day.py [--out FILE] [--parts P ...] [--for-s N] [--tiny]
    python tools/gpu_day.py --wheels FOLDER ...          where there is no network
    python tools/gpu_day.py --make-wheels FOLDER         fills that folder, where there is one

Parts: `ceilings` (products, copies), `attention` (each kernel, each shape), `steps` (ViT-S to H,
RC-MAE and MAE, compiled and not), `engines` (DDP, FSDP2 and ZeRO-1 to 3 at one rank), `batches`,
`memory` (told and measured), `shards` (end to end from a disk), `tests` (those marked gpu). Each
case runs in a process of its own (with --tiny all in one) and is written to FILE when it is done,
so the same command goes on where it was stopped; no case begins that might end later than N seconds
from the start. The first cases of all parts come before the second ones. A batch that the memory
does not hold is an answer; a case that fails says why and is tried again last, in the next call.

torch, its CUDA and numpy are there already; whatever else is missing is installed from FOLDER, into
a temporary folder. Exit status: 0 all is measured; 75 run it again for the rest; 1 cases failed; 2
unusable input; 128 and the signal's number where SIGTERM, SIGINT or a closed terminal
stopped it (`nohup` keeps it from that).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from gpu_rows import print_report

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "tools" / "results" / "gpu_day.json"
AGAIN = 75
LONGEST_S = 450.0  # of a case
COMPILED_S, EAGER_S = 150, 60  # that a case may take where nothing is compiled yet
MOST_SAID = 2**26  # bytes that a process says
OWN_GROUP: dict[str, Any] = {"start_new_session": True}
LEAVES_S = 20.0  # that a process may take to end when its cases are done
CACHE = "TORCHINDUCTOR_CACHE_DIR"  # of what one case compiles, for all others
PARTS = ("ceilings", "attention", "steps", "engines", "batches", "memory", "shards", "tests")
# images that fill a GPU of 80 GB: those of the recipes
MODELS = {"L": ("l_16", 128), "H": ("h_14", 64), "B": ("b_16", 256), "S": ("s_16", 512)}
# what a training and the tests import beside torch, timm and numpy
WHEELS = (
    *("deepspeed", "einops", "hjson", "msgpack", "ninja", "py-cpuinfo", "packaging", "psutil"),
    *("tqdm", "fairscale", "webdataset", "braceexpand", "pydantic"),
    *("annotated-types", "typing-inspection", "typing-extensions", "PyYAML", "rich"),
    *("markdown-it-py", "mdurl", "pygments", "safetensors", "simplejpeg", "Pillow", "tifffile"),
    *("fsspec", "aiohttp", "multidict", "yarl", "frozenlist", "propcache", "aiosignal"),
    *("aiohappyeyeballs", "attrs", "idna", "torchmetrics", "lightning-utilities", "jinja2"),
    *("markupsafe", "pytest", "pluggy", "iniconfig", "pytest-timeout", "hypothesis"),
    *("sortedcontainers", "timm"),
)
BUILT = ("deepspeed", "fairscale")  # these have no wheel
MOST_MB = 40


# -------------------------------------------------------------------------------------------- cases


def cases_of(part: str, tiny: bool) -> list[dict[str, Any]]:
    """What a part measures, what matters most first."""
    if part in ("ceilings", "tests"):
        return [{"name": part, "kind": part, "about_s": 30 if part == "ceilings" else COMPILED_S}]
    if part == "attention":
        return [{"name": part, "kind": part, "images": 2 if tiny else 128, "about_s": 90}]
    if part == "shards":
        return [_step(part, model, "local", True, about_s=180) for model in _few("LB", tiny)]
    if part == "memory":
        engines = _few(("zero1", "zero2", "zero3", "fsdp2", "ddp"), tiny)
        return [_step(part, "L", engine, False) for engine in engines]
    if part == "engines":
        found = []
        for model in _few("LH", tiny):
            for engine in ("ddp", "zero1", "zero2", "fsdp2", "zero3"):
                found.append(_step(part, model, engine, engine != "zero3"))
        return found
    if part == "batches":
        sizes = (("L", 64), ("L", 256), ("H", 32), ("H", 128))
        return [_step(part, model, "local", True, images) for model, images in _few(sizes, tiny)]
    found = []
    for model in _few("LHBS", tiny):
        for objective in ("rcmae", "mae"):
            for compiles in (True, False):
                case = _step(part, model, "local", compiles)
                case |= {"objective": objective, "name": f"{case['name']}/{objective}"}
                found.append(case)
    return found


def _few(values: Sequence[Any], tiny: bool) -> Sequence[Any]:
    return values[:1] if tiny else values


def _step(
    part: str, model: str, engine: str, compiles: bool, images: int = 0, about_s: int = 0
) -> dict[str, Any]:
    name, usual = MODELS[model]
    images = images or usual
    mode = "compiled" if compiles else "eager"
    return {
        "name": f"{part}/{model}/{engine}/{images}/{mode}",
        "kind": part if part in ("memory", "shards") else "step",
        "recipe": f"rcmae_vit_{name}",
        "engine": engine,
        "images": images,
        "compile": compiles,
        "about_s": about_s or (COMPILED_S if compiles else EAGER_S),
    }


def in_order(parts: Sequence[str], tiny: bool) -> list[dict[str, Any]]:
    """The cases of these parts: the first of each, then the second ones, and so on."""
    rounds = itertools.zip_longest(*(cases_of(part, tiny) for part in parts))
    return [case for each in rounds for case in each if case is not None]


def run_cases(
    cases: Sequence[dict[str, Any]],
    tiny: bool,
    limit_s: float,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Run cases, all in one process. `keep` gets the row of each as soon as it is done; that of one
    that is cut off has an error.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    env.setdefault(CACHE, str(Path(tempfile.gettempdir()) / f"gpu_day-compiled-{os.getuid()}"))
    if tiny:
        env |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    told = json.dumps(cases)
    command = [sys.executable, str(ROOT / "tools" / "gpu_cases.py"), told]
    command += ["--tiny"] if tiny else []
    kept: set[str] = set()
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:

        def keep_new() -> bool:
            """Whether all have their rows."""
            for row in _rows(said):
                if row["name"] not in kept:
                    kept.add(row["name"])
                    keep(row)
            return len(kept) == len(cases)

        child = subprocess.Popen(command, env=env, stdout=said, stderr=errors, **OWN_GROUP)
        try:
            ended = _wait_for(child, keep_new, limit_s)
        finally:
            # with what it started: a training or the tests would go on, on the GPU
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        keep_new()
        errors.seek(0)
        why = f"ended with status {child.returncode}" if ended else f"over {limit_s:.0f} s"
        why = f"{why}: {errors.read()[-2000:]}"
    for case in cases:
        if case["name"] not in kept:
            keep({"name": case["name"], "error": why, "seconds": 0.0})


def _wait_for(child: subprocess.Popen[bytes], all_said: Callable[[], bool], limit_s: float) -> bool:
    """Return when a process has said its rows, or is over: whether it is."""
    end = time.monotonic() + limit_s
    while child.poll() is None and time.monotonic() < end:
        if all_said():  # what is left is to leave, in which libraries may hang
            end = min(end, time.monotonic() + LEAVES_S)
        time.sleep(0.2)
    return child.poll() is not None


def _rows(said: IO[str]) -> list[dict[str, Any]]:
    """The rows that a process has written whole. Its own place in the file does not move."""
    text = os.pread(said.fileno(), MOST_SAID, 0).decode(errors="replace")
    lines = [line for line in text.splitlines(keepends=True) if line.startswith("CASE ")]
    whole = [line.removeprefix("CASE ") for line in lines if line.endswith("\n")]
    return [json.loads(line) for line in whole]


# ------------------------------------------------------------------------------------------ results


def about(tiny: bool) -> dict[str, Any]:
    """What is measured on what. In a process of its own: this one leaves the GPU alone."""
    program = (
        "import json, sys, torch; cuda = torch.cuda.is_available(); "
        f"cuda or {tiny} or (print(json.dumps({{'no_gpu': torch.__version__}})), sys.exit()); "
        "from rcmae.planning.gpus import read_gpus; gpus = read_gpus(); "
        "from rcmae.planning.hardware import commit, hardware; from rcmae.planning import node; "
        f"cuda = cuda and not {tiny}; "
        "place = torch.device('cuda' if cuda else 'cpu'); print(json.dumps({'commit': commit(), "
        "'hardware': hardware(place), 'versions': node.versions() | {'cudnn': "
        "torch.backends.cudnn.version() if cuda else None}, 'driver': gpus}))"
    )
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"gpu_day: rcmae does not import here:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "no_gpu" in found:
        _refuse(f"no GPU is seen (torch {found['no_gpu']}); --tiny tries it on the CPU")
    return found


def _refuse(why: str) -> NoReturn:
    print(f"gpu_day: {why}", file=sys.stderr)
    raise SystemExit(2)


def opened(out: Path, found: dict[str, Any], tiny: bool) -> dict[str, Any]:
    """The report so far; a new one where there is none."""
    fresh = {"tool": "gpu_day", **found, "tiny": tiny, "cases": {}}
    if not out.exists():
        return fresh
    report: dict[str, Any] = json.loads(out.read_text())
    for key in ("hardware", "versions", "tiny"):
        if report.get(key) != fresh[key]:
            _refuse(
                f"{out} is of another {key}: {report.get(key)}, here {fresh[key]}; "
                "name another --out, or move it away"
            )
    return report


def write(out: Path, report: dict[str, Any]) -> None:
    """The report, whole or not at all."""
    report["summary"] = summary(report["cases"])
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(out.name + ".aside")
    aside.write_text(json.dumps(report, indent=1) + "\n")
    aside.replace(out)


def summary(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the parts say together: RC-MAE over MAE, the average's share, what compiling brings, and
    what an engine costs over `local`.
    """
    results = {name: row["result"] for name, row in cases.items() if "result" in row}
    steps = {name: result for name, result in results.items() if "step_s" in result}
    seconds = {name: result["step_s"]["median"] for name, result in steps.items()}
    found: dict[str, Any] = {"rcmae_over_mae": {}, "teacher_share": {}, "eager_over_compiled": {}}
    found["engine_over_local"] = {}
    for name, result in steps.items():
        if "teacher" in result["phases_s"]:
            found["teacher_share"][name] = result["phases_s"]["teacher"] / seconds[name]
        part, *middle = name.split("/")
        pairs = (
            ("rcmae_over_mae", name.removesuffix("/rcmae") + "/mae", False),
            ("eager_over_compiled", name.replace("/compiled", "/eager"), True),
        )
        for key, other, is_slow in pairs:
            if other != name and other in seconds:
                ratio = seconds[other] / seconds[name]
                found[key][name] = ratio if is_slow else 1 / ratio
        local = f"steps/{'/'.join([middle[0], 'local', *middle[2:]])}/rcmae"
        if part == "engines" and local in seconds:
            found["engine_over_local"][name] = seconds[name] / seconds[local]
    return found


# ------------------------------------------------------------------------------------------- wheels


def make_wheels(folder: Path, python: str) -> int:
    """Fill a folder with what `--wheels` wants, for this Python on x86-64 Linux, of the versions
    in requirements.txt where they are there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pins = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if pin := re.match(r"([\w.-]+)==([\w.]+)", line):
            pins[_plain(pin[1])] = pin[0]
    asked = {name: pins.get(_plain(name), name) for name in WHEELS}
    pip = [sys.executable, "-m", "pip"]
    binary = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    for system in ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"):
        binary += ["--platform", system]
    there = [spec for name, spec in asked.items() if name not in BUILT]
    download = [*pip, "download", "-q", "-d", str(folder), *binary]
    subprocess.run([*download, "--no-deps", *there], check=True)
    # a release of it works with one of its core alone
    subprocess.run([*download, asked["pydantic"]], check=True)
    built = [asked[name] for name in BUILT]
    env = {**os.environ, "DS_BUILD_OPS": "0"}
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), *built]
    subprocess.run(build, check=True, env=env)
    size = sum(path.stat().st_size for path in folder.glob("*.whl")) / 1e6
    print(f"{folder}: {len(list(folder.glob('*.whl')))} wheels, {size:.1f} MB")
    return 0 if size < MOST_MB else 1


def use_wheels(folder: Path) -> None:
    """Install what is missing here from the folder, and have it found by all processes that this
    one starts.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        _refuse(f"no wheels in {folder}; see --make-wheels")
    missing = [path for path in wheels if not _is_here(path.name.split("-")[0])]
    if not missing:
        return
    told = "\n".join([sys.version, *(f"{path.name} {path.stat().st_size}" for path in missing)])
    key = hashlib.sha256(told.encode()).hexdigest()[:12]
    target = Path(tempfile.gettempdir()) / f"gpu_day-{os.getuid()}-{key}"
    if not (target / "done").exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        subprocess.run([*pip, "--upgrade", "--target", str(target), *map(str, missing)], check=True)
        (target / "done").touch()
    # behind what is there: PYTHONPATH comes before it, but has only what is not
    path = filter(None, (str(ROOT), str(target), os.environ.get("PYTHONPATH")))
    os.environ["PYTHONPATH"] = os.pathsep.join(path)


def _is_here(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# --------------------------------------------------------------------------------------------- main


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        prog="tools/gpu_day.py", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="JSON, resumed")
    parser.add_argument(
        "--parts",
        nargs="+",
        default=list(PARTS),
        choices=PARTS,
        metavar="PART",
        help=f"of {', '.join(PARTS)}; by default all",
    )
    parser.add_argument("--for-s", type=float, default=530, help="seconds of this call (530)")
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU: does it run?")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="of what is missing here")
    parser.add_argument("--make-wheels", type=Path, metavar="FOLDER", help="fill it, and end")
    parser.add_argument("--python", default="3.12", help="that the wheels are for (3.12)")
    asked = parser.parse_args(argv)
    if asked.tiny and asked.out == OUT:
        parser.error("--tiny measures nothing: give it an --out of its own")
    return asked


class _Stopped(BaseException):
    """A signal asks this process to end; no `except Exception` holds it up."""


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Inside, SIGTERM, SIGINT and a terminal that is closed (SIGHUP) raise `_Stopped`, once: what
    ends then ends undisturbed.
    """

    def stop(number: int, _: object) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # `timeout` sends its signal twice
        raise _Stopped(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not under `nohup`
        before[signal.SIGHUP] = signal.getsignal(signal.SIGHUP)
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is not measured yet, and report."""
    asked = arguments(argv)
    try:
        with _stoppable():
            return _measure(asked)
    except _Stopped as stopped:
        with contextlib.suppress(OSError):  # the terminal may be gone
            print("gpu_day: stopped; run it again for the rest", file=sys.stderr, flush=True)
        return 128 + int(stopped.args[0])


def _measure(asked: argparse.Namespace) -> int:
    began = time.monotonic()
    if asked.make_wheels:
        return make_wheels(asked.make_wheels, asked.python)
    if asked.wheels:
        use_wheels(asked.wheels)
    report = opened(asked.out, about(asked.tiny), asked.tiny)
    rows = report["cases"]
    cases = in_order(asked.parts, asked.tiny)
    if asked.tiny:
        for case in cases:
            case["images"] = 2
    waiting = [case for case in cases if "result" not in rows.get(case["name"], {})]
    waiting.sort(key=lambda case: case["name"] in rows)  # what failed once, last
    groups = [waiting] if asked.tiny and waiting else [[case] for case in waiting]

    def keep(row: dict[str, Any]) -> None:
        rows[row.pop("name")] = row
        write(asked.out, report)

    for number, group in enumerate(groups):
        gone = time.monotonic() - began
        left = asked.for_s - gone
        takes = min(case["about_s"] for case in group)
        if left < takes:
            if number == 0:  # the same call would never get further
                needs = 10 * math.ceil((gone + takes + 5) / 10)
                _refuse(
                    f"--for-s {asked.for_s:g} is too short: {group[0]['name']} may take {takes} s "
                    f"and the start took {gone:.0f} s; give at least --for-s {needs}"
                )
            print_report(report)
            print(f"gpu_day: {_count(len(groups) - number, 'waits')}; run it again for the rest")
            return AGAIN
        print(f"gpu_day: {', '.join(case['name'] for case in group)}", file=sys.stderr, flush=True)
        run_cases(group, asked.tiny, left if asked.tiny else min(LONGEST_S, left), keep)
    print_report(report)
    if failed := sum("error" in rows[case["name"]] for case in cases):
        print(f"gpu_day: {_count(failed, 'failed')}; run it again to try once more")
        return 1
    if asked.tiny:
        print("gpu_day: every case runs; without --tiny, on a GPU, they are measured")
    else:
        parts = "" if set(asked.parts) == set(PARTS) else f" of {', '.join(asked.parts)}"
        print(f"gpu_day: all{parts} is measured; now: rcmae plan RECIPE --measured {asked.out}")
    return 0


def _count(number: int, does: str) -> str:
    """ "1 case waits", "2 cases wait"; "2 cases failed"."""
    return f"1 case {does}" if number == 1 else f"{number} cases {does.removesuffix('s')}"


if __name__ == "__main__":
    raise SystemExit(main())
