"""Restart markers: a part of a JPEG cut out before it is decoded has the pixels of the whole."""

import io
import json
import shutil
from functools import partial

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from sklearn.datasets import load_sample_images

from rcmae.commands.shards import checking, making
from rcmae.data import jpeg
from rcmae.data.jpeg import Box, decode_box, recoding, restarts
from rcmae.data.jpeg.markers import layout, with_segments
from rcmae.data.packing import writer
from rcmae.data.packing.encoding import Encoding, encoded
from rcmae.data.packing.found import Source
from rcmae.data.transforms import BadImage, TrainTransform, decode

PHOTOGRAPH = load_sample_images().images[0]
HEIGHT, WIDTH = 203, 301  # no multiples of a block


@pytest.fixture(params=["library", "program"])
def adds(request, monkeypatch):
    """What adds markers here: each of the two ways that is found."""
    turbo = jpeg.library()
    program = shutil.which("jpegtran")
    if request.param == "library":
        if turbo is None or turbo.version < (3, 1):
            pytest.skip("needs libjpeg-turbo 3.1")
        found = partial(recoding._by_library, turbo.loaded)
    else:
        if program is None:
            pytest.skip("needs jpegtran")
        found = partial(recoding._by_program, program)
    monkeypatch.setattr(recoding, "_found", lambda: found)


def photograph(size=(HEIGHT, WIDTH), mode="RGB", **options):
    """A JPEG of a photograph."""
    file = io.BytesIO()
    image = Image.fromarray(PHOTOGRAPH[: size[0], : size[1]]).convert(mode)
    image.save(file, "JPEG", **{"quality": 90} | options)
    return file.getvalue()


def boxes(count, size=(HEIGHT, WIDTH), multiple=1, seed=0):
    """Boxes of a size up to the image's, the corners among them."""
    rng = np.random.default_rng(seed)
    height, width = (side // multiple for side in size)
    for number in range(count):
        rows, columns = rng.integers(1, height + 1), rng.integers(1, width + 1)
        top, left = rng.integers(0, height - rows + 1), rng.integers(0, width - columns + 1)
        if number % 4 == 0:
            top, left = 0, width - columns
        elif number % 4 == 1:
            top = height - rows
        yield Box(*(int(each) * multiple for each in (top, left, rows, columns)))


def part_of(data, box):
    return restarts.cut_out(data, box, layout(data))


def whole(data, channels=3):
    return simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY")


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("interval", [1, 2, "rows", "two rows"])
def test_a_part_has_the_pixels_of_the_whole(subsampling, interval):
    columns = -(-WIDTH // (8 if subsampling == "4:4:4" else 16))
    interval = {"rows": columns, "two rows": 2 * columns}.get(interval, interval)
    if interval == 2 and columns % 2:
        interval = columns
    data = photograph(subsampling=subsampling, restart_marker_blocks=interval)
    plain = photograph(subsampling=subsampling)
    assert (whole(data) == whole(plain)).all()
    cut = 0
    for box in boxes(24):
        np.testing.assert_array_equal(decode_box(data, box), box.of(whole(plain)))
        found = part_of(data, box)
        if found is not None:
            cut += 1
            assert len(found[0]) < len(data)
            np.testing.assert_array_equal(found[1].of(whole(found[0])), box.of(whole(plain)))
    assert cut > 6
    for shrink in (2, 4, 8):
        for box in boxes(8, multiple=shrink):
            np.testing.assert_array_equal(
                decode_box(data, box, shrink), decode_box(plain, box, shrink)
            )


def test_a_part_of_a_grey_image_has_the_pixels_of_the_whole():
    data = photograph(mode="L", restart_marker_blocks=2)
    for box in boxes(12):
        for channels in (1, 3):
            expected = box.of(whole(photograph(mode="L"), channels))
            np.testing.assert_array_equal(decode_box(data, box, channels=channels), expected)
    assert part_of(data, Box(60, 100, 20, 20)) is not None


def test_of_a_single_colour_the_factors_say_nothing():
    data = bytearray(photograph(mode="L", restart_marker_blocks=2))
    data[layout(bytes(data)).frame + 6] = 0x22
    box = Box(60, 100, 20, 20)
    part, inside = part_of(bytes(data), box)
    assert (inside.of(whole(part, 1)) == box.of(whole(bytes(data), 1))).all()


def test_a_crop_reads_the_segments_that_it_needs_and_no_more():
    data = photograph(subsampling="4:2:0", restart_marker_blocks=1)
    part, box = part_of(data, Box(64, 64, 32, 48))
    assert box == Box(16, 16, 32, 48)
    assert jpeg.header(part)[:2] == (64, 80)  # 2 x 3 blocks of 16, and one more on each side
    full = photograph(restart_marker_blocks=1, subsampling="4:4:4")
    assert jpeg.header(part_of(full, Box(64, 64, 32, 48))[0])[:2] == (32, 48)


def test_a_training_view_is_the_same_with_and_without():
    transform = TrainTransform((32, 32))
    marked = photograph((240, 320), restart_marker_blocks=2)
    plain = photograph((240, 320))
    for position in range(20):
        mine, theirs = (transform(data, 0, position) for data in (marked, plain))
        assert mine.crop == theirs.crop
        assert (mine.image == theirs.image).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True, "restart_marker_blocks": 2},
        {"restart_marker_blocks": 5},  # 19 blocks a row
        {"restart_marker_blocks": 28},  # a row and a half
    ],
)
def test_other_files_are_decoded_as_before(options):
    data = photograph(**{"subsampling": "4:2:0"} | options)
    for box in boxes(6):
        assert part_of(data, box) is None
        np.testing.assert_array_equal(decode_box(data, box), box.of(whole(data)))


def markers(data):
    scan = layout(data).scan
    return [at for at in range(scan, len(data) - 2) if data[at] == 0xFF and data[at + 1]]


@pytest.mark.parametrize("listed", [False, True])
def test_markers_that_are_not_as_the_header_says_are_not_believed(listed):
    data = photograph(subsampling="4:2:0", restart_marker_blocks=1)
    if listed:
        data = jpeg.with_restarts(data)
    box = Box(64, 64, 32, 48)
    assert part_of(data, box) is not None
    second = markers(data)[1]
    bad = {
        "one is gone": data[:second] + data[second + 2 :],
        "one is there twice": data[:second] + data[second : second + 2] + data[second:],
        "one has another's number": data[: second + 1] + b"\xd5" + data[second + 2 :],
        "another image follows": data + data,
        "the end is missing": data[:-2],
        "bytes follow": data + b"\0\0",
        "no scan": data[: layout(data).scan],
        "nothing": b"",
    }
    for what, torn in bad.items():
        assert part_of(torn, box) is None, what


def test_a_file_that_lists_its_segments_is_not_searched(monkeypatch):
    plain = photograph(subsampling="4:4:4", restart_marker_blocks=2)
    data = jpeg.with_restarts(plain)  # markers are there: no library is needed
    assert jpeg.with_restarts(data) is data
    assert b"RCMAE segments" in data
    assert (whole(data) == whole(plain)).all()
    box = Box(100, 100, 50, 50)
    part, inside = part_of(plain, box)
    monkeypatch.delattr(restarts, "_searched")
    listed, inside_listed = part_of(data, box)
    assert inside_listed == inside
    np.testing.assert_array_equal(whole(listed), whole(part))
    with pytest.raises(NameError):
        part_of(plain, box)


@pytest.mark.parametrize(
    "change",
    [
        lambda lengths: lengths[:-1],
        lambda lengths: lengths[:0],
        lambda lengths: np.r_[lengths, 2],
        lambda lengths: lengths + 1,
        lambda lengths: lengths * 0,
        lambda lengths: lengths * 0 + 65535,
        lambda lengths: lengths[::-1],
        lambda lengths: np.r_[0, lengths[0] + lengths[1], lengths[2:]],
        lambda lengths: np.r_[lengths[0] + 1, lengths[1] - 1, lengths[2:]],
        lambda lengths: np.r_[lengths[0], lengths[1] + lengths[2], 0, lengths[3:]],
    ],
)
def test_lengths_of_segments_that_are_wrong_are_not_believed(change):
    plain = photograph(subsampling="4:4:4", restart_marker_blocks=2)
    data = jpeg.with_restarts(plain)
    lengths = np.frombuffer(layout(data).segments, "<u2")
    wrong = with_segments(plain, layout(plain), change(lengths.astype(int)).astype("<u2").tobytes())
    box = Box(100, 100, 50, 50)
    assert part_of(wrong, box) is not None
    np.testing.assert_array_equal(decode_box(wrong, box), box.of(whole(plain)))
    assert layout(jpeg.with_restarts(wrong)).segments == layout(data).segments


def test_a_code_that_looks_like_the_number_of_a_marker_is_none():
    plain = photograph(subsampling="4:4:4", restart_marker_blocks=2)
    segments = layout(jpeg.with_restarts(plain)).segments
    lengths = np.frombuffer(segments, "<u2").astype(int)
    ends = lengths.cumsum()  # behind each marker
    codes = plain[layout(plain).scan :]
    which, other = next(
        (number, at)
        for number in range(4, 14)  # in the first row of 19
        for at in range(ends[number - 1], ends[number] - 2)
        if codes[at] == codes[ends[number] - 1] and codes[at - 1] != 0xFF
    )
    moved = ends[which] - (other + 1)
    lengths[which] -= moved
    lengths[which + 1] += moved
    wrong = with_segments(plain, layout(plain), lengths.astype("<u2").tobytes())
    box = Box(0, 40, 100, 230)  # whose markers are numbered anew
    np.testing.assert_array_equal(decode_box(wrong, box), box.of(whole(plain)))


def test_lengths_that_are_cut_or_too_many_for_a_marker_are_no_hindrance():
    plain = photograph(subsampling="4:4:4", restart_marker_blocks=2)
    box = Box(100, 100, 50, 50)
    odd = with_segments(plain, layout(plain), layout(jpeg.with_restarts(plain)).segments[:-1])
    np.testing.assert_array_equal(decode_box(odd, box), box.of(whole(plain)))
    assert with_segments(plain, layout(plain), bytes(2**16)) is plain
    noise = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 2048, 3), np.uint8)
    Image.fromarray(pixels).save(
        noise, "JPEG", quality=100, subsampling="4:4:4", restart_marker_blocks=256
    )
    long = noise.getvalue()  # its rows of blocks are longer than 65,535 bytes
    assert jpeg.with_restarts(long) is long


@pytest.mark.parametrize(
    ("filling", "told"),
    [
        (b"\xff", "over 65,536 bytes between its markers"),
        (b"\xff\xd0", "over 65,536 bytes between its markers"),
        (b"\xff\x00", "over 65,536 bytes between its markers"),
        (b"\xff\xe0\x00\x02", "over 10,000 markers"),
    ],
)
def test_a_header_without_end_is_not_read_to_its_end(filling, told):
    data = photograph(subsampling="4:4:4", restart_marker_blocks=2)
    few = data[:2] + 100 * filling + data[2:]
    assert decode(few).shape == (HEIGHT, WIDTH, 3)
    many = data[:2] + 200_000 * filling + data[2:]
    assert layout(many) is None
    with pytest.raises(BadImage, match=told):  # in no time; Pillow looks at them one by one
        decode(many)


def test_a_frame_of_no_size_or_of_torn_factors_has_no_layout():
    data = photograph(restart_marker_blocks=1)
    at = layout(data).frame
    assert layout(data[:at] + b"\0\0" + data[at + 2 :]) is None
    assert layout(data[: at + 6] + b"\0" + data[at + 7 :]) is None
    for length in range(0, layout(data).scan - 1, 7):
        assert layout(data[:length]) is None


@pytest.mark.parametrize("listed", [False, True])
def test_damage_is_a_value_error_or_pixels_of_the_right_size(listed):
    data = photograph((96, 128), subsampling="4:2:0", restart_marker_blocks=2)
    if listed:
        data = jpeg.with_restarts(data)
    rng = np.random.default_rng(0)
    for _ in range(400):
        torn = bytearray(data)
        for at in rng.integers(2, len(data) - 2, size=rng.integers(1, 4)):
            torn[at] = rng.integers(256)
        box = Box(16, 32, 40, 50)
        try:
            pixels = decode_box(bytes(torn), box)
        except ValueError:
            continue
        assert pixels.shape[2] == 3
        assert pixels.shape[0] <= 40
        assert pixels.shape[1] <= 50


def test_a_damaged_file_does_not_spoil_the_next_ones():
    good = photograph((96, 128))
    box = Box(16, 32, 40, 50)
    expected = box.of(whole(good))
    tables = good.index(b"\xff\xc4") + 5
    for at in range(tables, tables + 16):
        torn = good[:at] + b"\xff" + good[at + 1 :]
        with pytest.raises(ValueError, match=r"[a-z]"):
            decode_box(torn, box)
        np.testing.assert_array_equal(decode_box(good, box), expected)


def test_damage_beside_a_part_goes_unseen_on_every_machine(monkeypatch):
    data = photograph(subsampling="4:4:4", restart_marker_blocks=2)
    first, second = markers(data)[:2]
    torn = data[: first + 2] + bytes([0x55] * (second - first - 2)) + data[second:]
    with pytest.raises(ValueError, match="Corrupt"):
        whole(torn)
    box = Box(100, 100, 50, 50)
    for decodes in (True, False):
        monkeypatch.setattr(
            "rcmae.data.jpeg.decoding.decodes_parts", lambda decodes=decodes: decodes
        )
        np.testing.assert_array_equal(decode_box(torn, box), box.of(whole(data)))


@pytest.mark.parametrize(
    ("size", "unit", "expected"),
    [
        ((375, 500), (8, 8), 3),  # 63 blocks a row
        ((375, 500), (16, 16), 2),  # 32
        ((1200, 1600), (16, 16), 2),
        ((500, 296), (16, 16), 19),  # 19: of a row, or each
        ((16, 16), (16, 16), 1),
    ],
)
def test_the_interval_divides_a_row(size, unit, expected):
    found = jpeg.restart_interval(size, unit, size[0] * size[1] // 2)
    assert -(-size[1] // unit[1]) % found == 0
    assert found == expected


def test_images_made_smaller_get_markers(tmp_path):
    (tmp_path / "one.jpg").write_bytes(photograph((400, 600)))
    source = Source(str(tmp_path / "one.jpg"), "one", None)
    image = encoded(source, Encoding(size=200, restart_markers=True))
    found = layout(image.data)
    assert (found.height, found.width, found.interval) == (200, 300, 19)
    assert part_of(image.data, Box(100, 100, 50, 50)) is not None
    plain = encoded(source, Encoding(size=200))
    assert layout(plain.data).interval == 0
    assert abs(whole(plain.data).astype(int) - whole(image.data)).mean() < 2


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (None, "and neither is here: install the package libjpeg-turbo-progs"),
        ("cat", "jpegtran adds no restart markers (coded anew, it has other"),
        (
            "cat > /dev/null; echo no memory >&2; exit 1",
            "jpegtran adds no restart markers (no memory)",
        ),
        ("echo no JPEG", "jpegtran adds no restart markers (coded anew, it has other"),
    ],
)
def test_without_anything_that_adds_markers_it_is_said(tmp_path, monkeypatch, capsys, script, told):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "one.jpg").write_bytes(photograph())
    if script is not None:
        (tmp_path / "jpegtran").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "jpegtran").chmod(0o755)
    monkeypatch.setattr(recoding, "library", lambda: None)
    found = partial(shutil.which, path=str(tmp_path))
    monkeypatch.setattr(recoding.shutil, "which", found)
    monkeypatch.setattr(recoding, "_found", recoding._found.__wrapped__)
    asked = [str(tmp_path / "images"), str(tmp_path / "out"), "--restart-markers"]
    assert making.make(asked) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("adds")
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": "4:2:0"},
        {"subsampling": "4:4:4"},
        {"progressive": True},
        {"restart_marker_blocks": 5},
        {"mode": "L"},
    ],
)
def test_markers_are_added_without_loss(options):
    data = photograph(**options)
    made = jpeg.with_restarts(data)
    assert (whole(made) == whole(data)).all()
    assert part_of(made, Box(100, 100, 50, 50)) is not None
    assert jpeg.with_restarts(made) is made
    with pytest.raises(ValueError, match=r"[a-z]"):
        jpeg.with_restarts(data[: len(data) // 2])


@pytest.mark.usefixtures("adds")
def test_shards_with_markers_have_the_same_pixels(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "one.jpg").write_bytes(photograph())
    assert making.make([str(tmp_path / "images"), str(tmp_path / "out"), "--restart-markers"]) == 0
    assert b"\xff\xdd\x00\x04" in (tmp_path / "out" / "train-000000.tar").read_bytes()


def test_it_is_counted_which_images_got_markers_and_why_others_did_not(
    tmp_path, monkeypatch, capsys
):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    (images / "large.jpg").write_bytes(photograph((400, 600)))
    for number in range(2):
        (images / f"marked{number}.jpg").write_bytes(photograph(restart_marker_blocks=1))
    (images / "padded.jpg").write_bytes(photograph()[:-2] + bytes(10) + b"\xff\xd9")
    Image.fromarray(PHOTOGRAPH[:50, :50]).save(images / "small.png")
    # what becomes smaller gets them from Pillow
    monkeypatch.setattr(writer, "check_adds_restarts", lambda: None)
    asked = [str(images), str(out), "--size", "300", "--restart-markers", "--samples", "2"]
    assert making.make(asked) == 0
    said = capsys.readouterr().out
    assert (
        "restart markers: added to 1 image; in 2 before; left as they were: 1 (no JPEG), "
        "1 (damaged)\n"
    ) in said
    assert making.make([*asked, "--overwrite", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["restarts"]
    assert told == {"added": 1, "there before": 2, "no JPEG": 1, "damaged": 1}
    checking.check(["verify", str(out / "train-*.tar"), "--jobs", "1"])
    assert "  3 of 4 images have restart markers\n" in capsys.readouterr().out
    assert making.make([*asked[:4], "--overwrite"]) == 0
    assert "restart markers" not in capsys.readouterr().out
