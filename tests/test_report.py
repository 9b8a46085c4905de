"""A run on one page: whole, true, safe to open, kept by the training, readable in a browser."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROOT

from rcmae.commands import report
from rcmae.errors import Refused
from rcmae.run.records.shown import figures
from rcmae.run.records.status import status
from rcmae.run.report import beside, curves, page
from rcmae.run.report.axes import across, told, upright
from rcmae.run.report.reading import Curve, seen
from rcmae.run.report.recipes import changes
from runs import Folder, python_path, start, wait_for

KEPT = ROOT / "tests" / "data" / "version_0.1.0"
VOID = ("meta", "link", "img", "br")
HTML = "<script>alert(1)</script><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """What is on a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text())
        self.wrong += self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def of(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        """The attributes of the elements of a kind."""
        found = [attrs for name, attrs in self.tags if name == tag]
        return [each for each in found if wanted.items() <= each.items()]


@pytest.fixture(scope="module")
def judged(tiny: Path, photo_shards: str, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A run with evaluations and pictures, stopped once and resumed, that kept its own page."""
    folder = tmp_path_factory.mktemp("reported") / "run"
    first = photo_shards.replace("{000000..000005}", "000000")
    second = photo_shards.replace("{000000..000005}", "000001")
    options = [
        "schedule.steps=12",
        "checkpoint.every_steps=4",
        "evaluate.every_steps=6",
        "evaluate.picture_every_steps=6",
        f"evaluate.train_shards={first}",
        f"evaluate.test_shards={second}",
        "log.report=true",
    ]
    assert start(tiny, folder, *options, "run.stop_after_steps=7") == 75
    assert start(tiny, folder, *options) == 0
    return Folder(folder)


def copied(folder: Path, to: Path) -> Path:
    """A run that a test may change."""
    return Path(shutil.copytree(folder, to, ignore=shutil.ignore_patterns("checkpoints")))


def test_a_training_keeps_its_page_to_the_end(judged: Folder) -> None:
    found = Page(judged.path / "report.html")
    assert found.wrong == []
    assert "finished" in found.text
    assert "12100% of 12" in found.text.replace("\n", "")
    assert (judged.path / "trackers" / "report.log").read_text() == ""


def test_the_page_has_all_that_the_run_has(judged: Folder, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert report.main([str(judged.path), "--out", str(out)]) == 0
    found = Page(out)
    assert found.wrong == []
    titles = {str(each["aria-label"]).split(":")[0] for each in found.of("svg", role="img")}
    assert {"loss", "learning rate", "norm of the gradient", "images a second"} <= titles
    assert any(title.startswith("k-NN") for title in titles)
    (told_loss,) = [
        str(each["aria-label"])
        for each in found.of("svg", role="img")
        if str(each["aria-label"]).startswith("loss: from")
    ]
    rows = judged.rows()
    assert f"{told(rows[0]['loss'])} at step 1" in told_loss
    assert f"{told(rows[-1]['loss'])} at step 12" in told_loss
    pictures = [each for each in found.of("img") if "reconstruction" in str(each["alt"])]
    assert [each["alt"] for each in pictures] == [
        "reconstruction at step 12",
        "reconstruction at step 6",
    ]
    for word in ("resume", "checkpoint", "Where the time went", "checkpoint.every_steps", "k-NN"):
        assert word in found.text
    assert found.of("path", **{"class": "resumes"})[1]["d"] == "M248.7 14V166"  # step 7 of 12


def test_a_page_fetches_nothing_and_runs_nothing(judged: Folder, tmp_path: Path) -> None:
    """Whatever a name holds."""
    run = copied(judged.path, tmp_path / "a & <b>")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["run"]["name"] = HTML
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rows = [{**row, HTML: 1.0, "loss": row["loss"]} for row in judged.rows()]
    write(run / "metrics.jsonl", rows)
    event: dict[str, Any] = {"time": rows[-1]["time"], "step": 12}
    bad = {**event, "event": "bad_sample", "shard": HTML, "key": HTML, "reason": HTML}
    strange = {**event, "event": HTML, "reason": HTML}
    scalars = {"scalars": {HTML: {HTML: 1.0}}, "best": {HTML: {HTML: 1.0, "step": 3}}}
    lines = (run / "events.jsonl").read_text()
    write(run / "events.jsonl", [bad, strange, {**event, "event": "evaluate", **scalars}])
    (run / "events.jsonl").write_text(lines + (run / "events.jsonl").read_text())
    out = tmp_path / "report.html"
    page.write([run], out)
    found = Page(out)
    assert found.wrong == []
    assert not found.of("script")
    assert "<script" not in out.read_text()
    for _, attrs in found.tags:
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href"):
            assert str(attrs.get(name, "#")).startswith(("data:", "#"))
    (policy,) = found.of("meta", **{"http-equiv": "Content-Security-Policy"})
    assert str(policy["content"]).startswith("default-src 'none'")
    assert found.text.count(HTML) > 6


def test_no_secret_is_on_the_page(judged: Folder, tmp_path: Path) -> None:
    run = copied(judged.path, tmp_path / "run")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"]["shards"] = "https://me:TOKEN@host/a.tar?X-Amz-Signature=SIGNED"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    event = {"event": "warning", "time": time.time(), "told": "got https://me:TOKEN@host/a.tar"}
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    out = tmp_path / "report.html"
    page.write([run], out)
    assert "TOKEN" not in out.read_text()
    assert "SIGNED" not in out.read_text()
    assert "warned" in Page(out).text


def test_runs_are_beside_each_other(judged: Folder, tmp_path: Path) -> None:
    other = copied(judged.path, tmp_path / "other")
    recipe = yaml.safe_load((other / "recipe.yaml").read_text())
    recipe["schedule"]["lr"] = 0.5
    (other / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "report.html"
    assert report.main([str(judged.path), str(other), str(KEPT / "local"), "--out", str(out)]) == 0
    found = Page(out)
    assert found.wrong == []
    (loss,) = [
        each
        for each in found.of("svg", role="img")
        if str(each["aria-label"]).startswith("loss: run")
    ]
    for name in ("run from", "other from", "local from"):
        assert name in str(loss["aria-label"])
    assert "schedule.lr" in found.text.split("Curves over")[0]


@pytest.mark.parametrize("name", ["local", "zero2", "fsdp2"])
def test_runs_of_the_first_version_have_a_page(name: str, tmp_path: Path) -> None:
    page.write([KEPT / name], tmp_path / "report.html")
    assert Page(tmp_path / "report.html").wrong == []


def test_an_evaluation_of_the_first_version_has_its_figures() -> None:
    event = {"knn": {"student": {"1": 50.0, "20": 60.0}}, "scores": {"student": {"top1": 70.0}}}
    assert [tuple(each) for each in figures(event)] == [
        ("knn_student", "k1", 50.0),
        ("knn_student", "k20", 60.0),
        ("scores_student", "top1", 70.0),
    ]


def test_lines_that_somebody_edited_break_no_page(judged: Folder, tmp_path: Path) -> None:
    run = copied(judged.path, tmp_path / "run")
    with (run / "events.jsonl").open("a") as file:
        for row in (
            {"event": 3, "time": 1.0},
            {"event": "evaluate", "time": time.time(), "step": "six", "seconds": "long"},
            {"event": "odd", "time": "now"},
            {"event": "first_step", "time": time.time(), "step": 1, "startup_s": {"a": None}},
        ):
            file.write(json.dumps(row) + "\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "loss": null, "new": {"deep": 1, "text": "a"}}\n{"torn')
    page.write([run], tmp_path / "report.html")
    found = Page(tmp_path / "report.html")
    assert found.wrong == []
    assert "1 logged steps were not finite" in found.text
    assert "new, deep" in found.text


def test_who_holds_all_up_and_what_is_judged_without_labels_have_their_places(
    judged: Folder, tmp_path: Path
) -> None:
    run = copied(judged.path, tmp_path / "run")
    ranks = {"compute_slowest_s": 0.5, "compute_median_s": 0.3, "compute_slowest_rank": 3}
    write(run / "metrics.jsonl", [{**row, **ranks} for row in judged.rows()])
    now = time.time()
    who = {"rank": 3, "host": "node7", "cause": "compute"}
    late = {"event": "late_rank", "step": 9, "seconds_a_step": 0.2, "share": 0.4, **who}
    scalars = {"rankme": {"student": 12.5}, "held": {"reconstruction": 0.25}}
    judging = {"event": "evaluate", "step": 12, "seconds": 1.0, "scalars": scalars}
    fell = {"event": "collapse", "step": 12, "network": "student", "effective_rank": 1.2}
    with (run / "events.jsonl").open("a") as file:
        for event in (late, judging, fell):
            file.write(json.dumps({**event, "time": now}) + "\n")
    page.write([run], tmp_path / "r.html")
    found = Page(tmp_path / "r.html")
    first = found.text.split("Curves over")[0]
    assert "rank 3 on node7 holds the others up by 0.200 s a step (40% of one), by compute" in first
    assert "the features collapsed at step 12" in first
    said = {str(each["aria-label"]) for each in found.of("svg", role="img")}
    (both,) = [each for each in said if each.startswith("ranks: forward passes, s a step: slowest")]
    assert "; median from 0.3" in both
    assert any(each.startswith("RankMe") and "to 12.5 at step 12" in each for each in said)
    assert any(each.startswith("held images, fixed masks: reconstruction") for each in said)


def evaluated(run: Path, scalars: dict[str, Any], document: dict[str, Any]) -> None:
    """A run whose last evaluation found this."""
    event = {"event": "evaluate", "step": 12, "seconds": 1.0, "scalars": scalars}
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({**event, "time": time.time()}) + "\n")
    (run / "evaluation").mkdir(exist_ok=True)
    (run / "evaluation" / "step-00000012.json").write_text(json.dumps(document))


def tables(path: Path) -> str:
    """The words of a page's evaluation."""
    words = re.sub(r"<[^>]*>", " ", path.read_text().split("<h3>Evaluation</h3>")[1])
    return " ".join(html.unescape(words).split())


def test_each_class_of_a_segmenter_is_in_a_table(judged: Folder, tmp_path: Path) -> None:
    run = copied(judged.path, tmp_path / "run")
    sky = {"class": 0, "name": "sky", "iou": 0.9, "accuracy": 0.95, "share": 0.25, "pixels": 9}
    never = {"class": 1, "name": HTML, "iou": None, "accuracy": None, "share": 0.0}
    taken = {"label": "sky", "taken_for": "tree", "pixels": 3, "share": 0.125}
    row = {"miou": 90.0, "classes": [sky, never, "edited"], "confused": [taken]}
    document = {"networks": {"student": row}, "untrained": ["tree"]}
    evaluated(run, {"segmentation_student": {"miou": 90.0}}, document)
    page.write([run], tmp_path / "r.html")
    found = Page(tmp_path / "r.html")
    assert found.wrong == []
    text = tables(tmp_path / "r.html")
    assert "segmentation, in %: mIoU 90" in text
    assert "classes: student 2 class IoU in % accuracy in % share in %" in text
    assert f"sky 90 95 25 {HTML} none none 0" in text
    assert "sky tree 12.5" in text
    assert "classes that training never showed 1 class tree" in text


def test_a_detector_has_few_curves_and_all_figures_in_tables(
    judged: Folder, tmp_path: Path
) -> None:
    run = copied(judged.path, tmp_path / "run")
    numbers = {"AP": 0.19, "AP50": 0.4, "AP75": 0.1, "APs": 0.05, "APm": 0.3, "APl": -1.0}
    numbers |= {"AR1": 0.2, "ARl": -1.0}
    categories = [{"id": 1, "name": "coin", "AP": 0.25}, {"id": 2, "name": "person", "AP": -1.0}]
    kinds = {kind: {**numbers, "categories": categories} for kind in ("bbox", "segm")}
    scalars = {"box_student": numbers, "mask_student": numbers}
    evaluated(run, scalars, {"networks": {"student": kinds}})
    page.write([run], tmp_path / "r.html")
    found = Page(tmp_path / "r.html")
    assert found.wrong == []
    said = [str(each["aria-label"]) for each in found.of("svg", role="img")]
    mine = [each.split(":")[0] for each in said if each.startswith(("box", "mask"))]
    assert mine == [
        "box AP, in %",
        "box AP by size, in %",
        "mask AP, in %",
        "mask AP by size, in %",
    ]
    (joined,) = [each for each in said if each.startswith("box AP, in %")]
    assert "student, AP from 19 at step 12" in joined
    assert "student, AP50 from 40 at step 12" in joined
    assert not [each for each in said if "large from" in each]
    text = tables(tmp_path / "r.html")
    assert "in % AP AP50 AP75 APs APm APl AR1 ARl box, student 19 40 10 5 30 none 20 none" in text
    assert "category box AP in % mask AP in % coin 25 25 person none none" in text


def test_a_run_without_a_teacher_has_no_momentum(judged: Folder, tmp_path: Path) -> None:
    run = copied(judged.path, tmp_path / "run")
    assert "momentum of the teacher" in str(curves.groups(seen([run])))
    rows = [
        {key: value for key, value in row.items() if not key.startswith("teacher_")}
        for row in judged.rows()
    ]
    write(run / "metrics.jsonl", rows)
    assert "momentum of the teacher" not in str(curves.groups(seen([run])))


def test_a_folder_without_a_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(tmp_path)]) == 2
    assert "no run is there" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


# ------------------------------------------------------------------------------------------ curves


def test_a_long_curve_is_drawn_at_few_places_that_tell_the_truth() -> None:
    draw = np.random.default_rng(0)
    values = 1.0 + draw.normal(0.0, 0.1, 200_000)
    values[77_777] = 9.0  # a spike
    curve = Curve(array("d", range(1, 200_001)), array("d", values))
    found = curves.panel("loss", [curves.Series("", 0, curve)], across(200_000))
    (line,) = found.lines
    assert line.path.count("L") < curves.PLACES
    assert len(found.hovers) <= curves.HOVERS
    means = [float(hover.said[1]) for hover in found.hovers]
    assert np.mean(means) == pytest.approx(values.mean(), rel=1e-3)
    heights = [float(y) for y in re.findall(r" ([\d.]+)(?=[LZ])", line.band)]
    assert min(heights) < 30  # the spike reaches the top of the band
    assert len(str(found)) < 60_000


def test_what_is_not_finite_is_left_out_and_said() -> None:
    curve = Curve(array("d", [1, 2, 3]), array("d", [1.0, float("nan"), 3.0]))
    found = curves.panel("loss", [curves.Series("", 0, curve)], across(3))
    assert "nan" not in str(found)
    assert found.notes == ["1 logged steps were not finite"]


def test_a_curve_without_a_finite_number_is_a_panel_all_the_same() -> None:
    curve = Curve(array("d", [1]), array("d", [float("nan")]))
    found = curves.panel("loss", [curves.Series("", 0, curve)], across(1))
    assert found.lines[0].path == ""


@pytest.mark.parametrize(
    ("values", "log"), [([1e-4, 1.0], True), ([0.0, 1.0], False), ([5.0, 5.0], False), ([], False)]
)
def test_an_axis_holds_its_values(values: list[float], log: bool) -> None:
    axis = upright(values)
    assert axis.log is log
    assert all(14.0 <= axis.at(value) <= 166.0 for value in values)
    assert 2 <= len(axis.ticks()) <= 8
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.32017, "0.3202"),
        (1.5e-4, "1.5e-4"),
        (12_345.6, "12,346"),
        (3e20, "3e20"),
        (float("inf"), "not finite"),
    ],
)
def test_numbers_are_told_in_few_digits(value: float, text: str) -> None:
    assert told(value) == text


def test_keys_that_others_add_have_a_place() -> None:
    assert curves.group_of("loss_new_term") == "loss"
    assert curves.group_of("data_wait_slowest") == "ranks"
    assert curves.group_of("surprise") == "more"


def test_a_recipe_is_compared_with_the_shipped_one_that_it_stands_on(judged: Folder) -> None:
    from rcmae import config

    recipe = config.load(
        "rcmae_vit_l_16", ["data.shards=x.tar", "run.name=mine", "batch.images=8192"]
    )
    base, found = changes(recipe.model_dump(mode="json"))
    assert base == "rcmae_vit_l_16"
    assert [change.key for change in found if change.key != "data.shards"] == ["batch.images"]
    (run,) = seen([judged.path])
    assert changes(run.recipe)[1]


# ------------------------------------------------------------------------------ beside a training


def test_the_page_follows_a_run_until_its_input_ends(
    judged: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(judged.path, tmp_path / "run")
    out = tmp_path / "report.html"
    made: list[str] = []
    looks = iter([False, False, False, True])

    def look(seconds: float) -> bool:
        ended = next(looks)
        made.append("page" if out.exists() else "none")
        out.unlink(missing_ok=True)
        if len(made) == 2:  # an evaluation is made
            with (run / "events.jsonl").open("a") as file:
                event = {"event": "evaluate", "time": time.time(), "step": 12, "seconds": 1.0}
                file.write(json.dumps(event) + "\n")
        return ended

    monkeypatch.setattr(beside, "input_ended", look)
    beside.keep(run, out, 1.0)
    assert made == ["none", "none", "page", "none"]
    assert out.exists()


def test_a_training_that_is_killed_leaves_its_page(tiny: Path, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run")
    job = [sys.executable, "-m", "rcmae", "train", str(tiny), f"run.dir={folder.path}"]
    job += ["schedule.steps=20000", "log.report=true"]
    env = {**os.environ, "PYTHONPATH": python_path()}
    training = subprocess.Popen(job, env=env, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(folder.rows()) > 30, lambda: training.poll() is None)
    finally:
        training.kill()
        training.wait()
    wait_for((folder.path / "report.html").exists, lambda: True, timeout_s=60)
    found = Page(folder.path / "report.html")
    assert found.wrong == []
    assert f"to {told(folder.losses()[-1])} at step {folder.steps()[-1]}" in str(found.tags)
    assert "not running: ended without an event" in found.text  # though its beat is fresh
    state = status(folder.path)["state"]
    assert state == "not running: ended without an event"


def test_a_page_needs_no_torch(judged: Folder, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from rcmae.run.report.page import write\n"
        f"write([Path({str(judged.path)!r})], Path({str(tmp_path / 'r.html')!r}))\n"
        "assert 'torch' not in sys.modules"
    )
    env = {**os.environ, "PYTHONPATH": python_path()}
    subprocess.run([sys.executable, "-c", program], check=True, env=env)


def test_a_page_that_is_gone_is_refused_by_the_disk(judged: Folder, tmp_path: Path) -> None:
    assert report.main([str(judged.path), "--out", str(tmp_path / "none" / "r.html")]) == 1


def test_a_run_that_never_trained_is_refused(judged: Folder, tmp_path: Path) -> None:
    run = copied(judged.path, tmp_path / "run")
    (run / "events.jsonl").unlink()
    with pytest.raises(Refused, match="is not a run"):
        page.write([run], tmp_path / "r.html")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --------------------------------------------------------------------------------------- a browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
FLAGS += ["--disable-component-update", "--no-first-run"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    playwright = pytest.importorskip("playwright.sync_api")
    if program is None:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=program, args=FLAGS)
        yield launched
        launched.close()


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_a_browser_shows_the_page(
    browser: Any, judged: Folder, tmp_path: Path, width: int, theme: str
) -> None:
    """No error in the console, nothing beyond the screen's edge, curves, and values under the
    pointer.
    """
    out = tmp_path / "report.html"
    page.write([judged.path], out)
    opened = browser.new_page(
        viewport={"width": width, "height": 900}, color_scheme=theme, has_touch=False
    )
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("requestfailed", lambda request: said.append(request.url[:100]))
    opened.goto(out.as_uri())
    assert said == []
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    light = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (light == "rgb(255, 255, 255)") == (theme == "light")
    for image in opened.query_selector_all("img"):
        assert image.evaluate("image => image.naturalWidth") > 0
    panel = opened.query_selector("figure.panel svg")
    box = panel.bounding_box()
    assert box["height"] > 120
    assert panel.evaluate("svg => svg.querySelector('.line').getTotalLength()") > 100
    panel.scroll_into_view_if_needed()
    box = panel.bounding_box()
    opened.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    shown = opened.evaluate(
        "[...document.querySelectorAll('.tip')]"
        ".filter(each => getComputedStyle(each).visibility == 'visible')"
        ".map(each => each.textContent)"
    )
    assert shown == [f"step 5{told(judged.rows()[4]['loss'])}"]  # 5.3 is in the middle
    if folder := os.environ.get("RCMAE_TEST_SCREENSHOTS"):
        opened.mouse.move(0, 0)
        opened.screenshot(path=Path(folder) / f"report-{width}-{theme}.png", full_page=True)
    opened.close()
