"""Decoding every kind of image, crops with torchvision's statistics, resizing as PIL's, all
keyed by position.
"""

import contextlib
import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from rcmae.data.batch import Batch
from rcmae.data.draws import random_box
from rcmae.data.index import ShardIndex
from rcmae.data.jpeg import Box, decode_box, decoding
from rcmae.data.transforms import (
    FORMATS,
    BadImage,
    CentreTransform,
    Normalise,
    TrainTransform,
    decode,
    plain_jpeg,
    resize,
    shrunken,
)

PHOTOGRAPHS = load_sample_images().images  # two of 427 x 640
REAL = Path(__file__).parent.parent.parent / "shared" / "data" / "imagenet-sample"


def encoded(pixels, kind="PNG", mode=None, **options):
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def psnr(a, b):
    error = ((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def photographs():
    """Encoded JPEG photographs: real ones where they lie beside the repository, else those of
    scikit-learn.
    """
    if REAL.is_dir():
        index = ShardIndex.open(str(REAL / "imagenet-sample-000000.tar"))
        for number in range(20):
            sample = index[number]
            with open(sample.path, "rb") as file:
                file.seek(sample.offset)
                yield file.read(sample.size)
    for pixels in PHOTOGRAPHS:
        yield encoded(pixels, "JPEG", quality=90)


# ----------------------------------------------------------------------------------------- decoding


def test_jpeg_is_decoded_to_the_pixels_of_pil():
    for data in photographs():
        np.testing.assert_array_equal(
            decode(data), np.asarray(Image.open(io.BytesIO(data), formats=FORMATS).convert("RGB"))
        )


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "RGB", {"subsampling": 0}),
        ("PNG", "RGB", {}),
        ("PNG", "L", {}),
        ("PNG", "P", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "LA", {}),
        ("PNG", "1", {}),
        ("PNG", "P", {"transparency": 3}),
        ("PNG", "P", {"transparency": bytes(range(256))}),
        ("WEBP", "RGB", {"lossless": True}),
        ("BMP", "RGB", {}),
        ("TIFF", "RGB", {}),
        ("TIFF", "CMYK", {}),
        ("GIF", "P", {}),
        ("PPM", "RGB", {}),
    ],
)
def test_every_mode_becomes_rgb_as_pil_makes_it(kind, mode, options):
    data = encoded(PHOTOGRAPHS[0][:60, :80], kind, mode, **options)
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    expected = (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")
    got = decode(data)
    assert got.shape == (60, 80, 3)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, np.asarray(expected))


def test_sixteen_bit_grey_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(4, 0)
    for kind in ("PNG", "TIFF"):
        for channels in (1, 3):
            got = decode(encoded(ramp, kind), channels)
            assert got.shape == (4, 256, channels)
            np.testing.assert_array_equal(got[0, :, 0], np.arange(256))


def test_an_exif_rotation_is_left_alone_as_published():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(PHOTOGRAPHS[0][:40, :80], "JPEG", exif=exif)).shape == (40, 80, 3)


def test_grey_models_get_one_channel():
    for data in (
        encoded(PHOTOGRAPHS[0], "JPEG"),
        encoded(PHOTOGRAPHS[0]),
        encoded(PHOTOGRAPHS[0], "JPEG", "L"),
    ):
        got = decode(data, 1)
        assert got.shape == (427, 640, 1)
        grey = Image.open(io.BytesIO(data), formats=FORMATS).convert("L")
        assert psnr(got[:, :, 0], np.asarray(grey)) > 45
    view = TrainTransform((16, 16), in_channels=1)(encoded(PHOTOGRAPHS[0]), 0, 0)
    assert view.image.shape == (1, 16, 16)


def saved(array):
    """An array as a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_arrays_and_multi_band_tiff_feed_models_of_other_channels():
    noise = np.random.RandomState(0)
    bands = noise.randint(0, 256, (40, 60, 5)).astype(np.uint8)
    files = [saved(bands), saved(bands.transpose(2, 0, 1)), saved(np.asfortranarray(bands))]
    for planar in ("contig", "separate"):
        file = io.BytesIO()
        image = bands if planar == "contig" else bands.transpose(2, 0, 1)
        tifffile.imwrite(
            file, image, photometric="minisblack", planarconfig=planar, compression="zlib"
        )
        files.append(file.getvalue())
    for data in files:
        np.testing.assert_array_equal(decode(data, 5), bands)
        view = TrainTransform((16, 24), in_channels=5)(data, 1, 2)
        assert view.image.shape == (5, 16, 24)
        assert CentreTransform((16, 16), in_channels=5)(data, 0, 0).image.shape == (5, 16, 16)
    np.testing.assert_array_equal(decode(saved(bands.astype(np.uint16) * 257), 5), bands)
    np.testing.assert_array_equal(decode(saved(bands[:, :, 0]), 1)[:, :, 0], bands[:, :, 0])
    np.testing.assert_array_equal(decode(saved(bands[:, :, :3]), 3), bands[:, :, :3])
    rgba = encoded(bands[:, :, :4], "PNG", "RGBA")
    np.testing.assert_array_equal(decode(rgba, 4), bands[:, :, :4])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            saved(np.zeros((4, 6, 4), np.uint8)),
            r"an array of 4 x 6 x 4, expected height x width x 5",
        ),
        (
            saved(np.zeros((4, 6, 5), np.float32)),
            "float32, of unknown range; store uint8 or uint16",
        ),
        (saved(np.zeros((4, 6, 5), np.uint8))[:-9], "ValueError: buffer is smaller"),
        (
            saved(np.zeros((4, 6, 5), np.uint8)).replace(b"(4, 6, 5), ", b"(9**9,5,5),"),
            "ValueError",
        ),
        (
            saved(np.zeros((1, 1, 5), np.uint8)).replace(
                b"(1, 1, 5), }     ", b"(30000, 30000,5)}"
            ),
            "buffer is smaller",
        ),
        (np.lib.format.MAGIC_PREFIX + b"\x01\x00", "Error"),
        (
            encoded(PHOTOGRAPHS[0], "JPEG"),
            "an array of 427 x 640 x 3, expected height x width x 5",
        ),
        (b"II*\0" + bytes(100), "Error"),
    ],
)
def test_other_arrays_are_bad_images(data, reason):
    with pytest.raises(BadImage, match=reason):
        decode(data, 5)


def test_several_views_of_one_decode_are_those_of_their_positions():
    transform = TrainTransform((48, 48), margin=math.inf)
    views = transform.views(JPEG, 3, range(40, 44))
    for position, view in zip(range(40, 44), views, strict=True):
        alone = transform(JPEG, 3, position)
        assert view.crop == alone.crop
        assert torch.equal(view.image, alone.image)


def bomb(side):
    """A PNG header that promises side x side pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )


def jpeg_bomb():
    data = bytearray(encoded(PHOTOGRAPHS[0], "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 30_000, 30_000)
    return bytes(data)


JPEG = encoded(PHOTOGRAPHS[0], "JPEG")
PNG = encoded(PHOTOGRAPHS[0])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "of a format that is read"),
        (b"this is text in place of a photograph", "of a format that is read"),
        (bytes(5000), "of a format that is read"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (JPEG[:2], "of a format"),
        (PNG[: len(PNG) // 2], "truncated"),
        (PNG[:40] + bytes(1000) + PNG[1040:], "Error|of a format"),
        (bomb(30_000), "Decompression|more than data.max_pixels"),
        (jpeg_bomb(), "30000 x 30000 pixels are more than data.max_pixels"),
        (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "floating-point"),
    ],
)
def test_damaged_bytes_are_a_bad_image_with_a_reason(data, reason):
    with pytest.raises(BadImage, match=reason):
        decode(data)


def test_flipped_bytes_either_decode_or_are_a_bad_image():
    noise = np.random.RandomState(0)
    for number in range(60):
        data = bytearray((JPEG, PNG)[number % 2])
        for at in noise.randint(0, len(data), 20):
            data[at] ^= 1 << noise.randint(8)
        with contextlib.suppress(BadImage):
            assert decode(bytes(data)).ndim == 3


# -------------------------------------------------------------------------------------------- crops


def test_a_view_depends_on_seed_position_and_draw_alone():
    transform = TrainTransform((32, 48))
    view = transform(JPEG, 1, 2)
    assert view.image.shape == (3, 32, 48)
    assert view.image.dtype == torch.uint8
    again = transform(JPEG, 1, 2)
    assert again.crop == view.crop
    assert torch.equal(again.image, view.image)
    assert len({transform(JPEG, *key).crop for key in ((1, 2), (1, 3), (2, 2), (1, 2, 1))}) == 4


def test_a_view_is_the_crop_it_names():
    transform = TrainTransform((64, 64), margin=math.inf)
    pixels = decode(JPEG)
    flips = 0
    for position in range(10):
        view = transform(JPEG, 0, position)
        top, left, height, width, flipped = view.crop
        box = resize(pixels[top : top + height, left : left + width], (64, 64))
        assert torch.equal(view.image, box.flip(-1) if flipped else box)
        flips += flipped
    assert 0 < flips < 10
    assert not any(
        TrainTransform((64, 64), flip=0.0)(JPEG, 0, position).crop[4] for position in range(10)
    )


def test_a_part_of_a_jpeg_has_the_pixels_of_the_whole():
    """At every size, subsampling and place.

    Also where the library that decodes parts is not there.
    """
    noise = np.random.RandomState(0)
    kinds = [
        {"subsampling": kind, "progressive": progressive}
        for kind in (0, 1, 2)
        for progressive in (False, True)
    ]
    files = [(encoded(PHOTOGRAPHS[0][:203, :301], "JPEG", quality=90, **kind), 3) for kind in kinds]
    files += [
        (encoded(PHOTOGRAPHS[1], "JPEG", "L"), 1),
        (encoded(PHOTOGRAPHS[1], "JPEG", "L"), 3),
        (JPEG, 1),
    ]
    for data, channels in files:
        height, width = plain_jpeg(data)[:2]
        for shrink in (1, 2, 4, 8):
            whole = decoding._decode_whole(data, shrink, channels)
            assert whole.shape == (-(-height // shrink), -(-width // shrink), channels)
            for _ in range(6):
                top, left = noise.randint(0, height // shrink), noise.randint(0, width // shrink)
                small = Box(
                    top,
                    left,
                    noise.randint(1, height // shrink - top + 1),
                    noise.randint(1, width // shrink - left + 1),
                )
                box = Box(*(number * shrink for number in small))
                np.testing.assert_array_equal(
                    decode_box(data, box, shrink, channels), small.of(whole)
                )


def test_a_shrunken_decode_keeps_the_likeness_and_the_place():
    """Against the full-size decode of the same box: mean at least 50 dB, none under 45; a box off
    by half a pixel of the shrunken image would be under 40."""
    likeness, shrunk = [], 0
    transform = TrainTransform((48, 48), flip=0.0)
    for number, data in enumerate(photographs()):
        pixels = decode(data)
        for position in range(6):
            view = transform(data, number, position)
            box = Box(*view.crop[:4])
            if shrunken(box, (48, 48), transform.margin)[1] > 1:
                shrunk += 1
                likeness.append(
                    psnr(view.image, resize(np.ascontiguousarray(box.of(pixels)), (48, 48)))
                )
    assert shrunk > 4
    assert np.mean(likeness) > 50
    assert min(likeness) > 45


def test_a_box_shrinks_only_as_far_as_the_margin_allows():
    box = Box(11, 7, 1345, 1201)
    assert shrunken(box, (224, 224), 2.5) == (Box(10, 6, 1344, 1200), 2)
    assert shrunken(box, (224, 300), 2.5) == (box, 1)
    assert shrunken(box, (100, 100), 2.5) == (Box(8, 4, 1344, 1200), 4)
    assert shrunken(box, (1, 1), 2.5) == (Box(8, 0, 1344, 1200), 8)
    assert shrunken(box, (1, 1), math.inf) == (box, 1)


def test_a_jpeg_that_ends_too_early_is_bad_wherever_the_crop_lies():
    for cut in (0.3, 0.9, 0.999):
        for position in range(5):
            with pytest.raises(BadImage, match="truncated"):
                TrainTransform((16, 16))(JPEG[: int(len(JPEG) * cut)], 0, position)


def test_crops_have_torchvisions_statistics():
    """Two-sample Kolmogorov-Smirnov distances of area, aspect, top and left to
    RandomResizedCrop's own boxes.
    """
    from rcmae.process.extensions import guard_torchvision

    guard_torchvision()
    from torchvision.transforms import RandomResizedCrop

    count, scale, ratio = 4000, (0.2, 1.0), (3 / 4, 4 / 3)
    for rows, columns in ((375, 500), (500, 375), (100, 400), (32, 32)):
        generator = np.random.RandomState(rows)
        mine = np.array(
            [random_box(rows, columns, scale, ratio, generator.rand(40)) for _ in range(count)]
        )
        with torch.random.fork_rng():
            torch.manual_seed(columns)
            image = torch.empty(1, rows, columns)
            theirs = np.array(
                [RandomResizedCrop.get_params(image, scale, ratio) for _ in range(count)]
            )
        for what in ("area", "aspect", "top", "left"):
            a, b = (
                np.sort({"area": h * w, "aspect": w / h, "top": top, "left": left}[what])
                for top, left, h, w in (mine.T, theirs.T)
            )
            at = np.union1d(a, b)
            distance = (
                np.abs(np.searchsorted(a, at, "right") - np.searchsorted(b, at, "right")).max()
                / count
            )
            assert distance < 1.95 * math.sqrt(2 / count)  # exceeded by chance once in a thousand
        inside = (
            (mine[:, 0] + mine[:, 2] <= rows)
            & (mine[:, 1] + mine[:, 3] <= columns)
            & (mine >= 0).all(1)
        )
        assert inside.all()


def test_where_no_box_fits_the_largest_centred_one_is_taken():
    never = [0.999] * 40
    assert random_box(100, 1000, (0.9, 1.0), (3 / 4, 4 / 3), never) == (0, 433, 100, 133)
    assert random_box(1000, 100, (0.9, 1.0), (3 / 4, 4 / 3), never) == (433, 0, 133, 100)
    assert random_box(1, 300, (0.2, 1.0), (3 / 4, 4 / 3), never)[2:] == (1, 1)
    assert random_box(300, 1, (0.2, 1.0), (3 / 4, 4 / 3), never)[2:] == (1, 1)


def test_resizing_is_pils_to_rounding():
    likeness = []
    for data in photographs():
        pixels = decode(data)
        for size in ((224, 224), (96, 160)):
            theirs = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)
            likeness.append(psnr(resize(pixels, size).permute(1, 2, 0).numpy(), theirs))
    assert min(likeness) > 50
    assert np.mean(likeness) > 65  # without antialiasing less than 40


def test_a_photograph_of_one_pixel_makes_a_view():
    for data in (
        encoded(PHOTOGRAPHS[0][:1, :1]),
        encoded(PHOTOGRAPHS[0][:1, :50]),
        encoded(PHOTOGRAPHS[0][:50, :1]),
    ):
        assert TrainTransform((8, 8))(data, 0, 0).image.shape == (3, 8, 8)
        assert CentreTransform((8, 8))(data, 0, 0).image.shape == (3, 8, 8)


# --------------------------------------------------------------------------------------- evaluation


def test_the_centre_view_is_that_of_torchvision():
    from rcmae.process.extensions import guard_torchvision

    guard_torchvision()
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    theirs = Compose([Resize(256, interpolation=InterpolationMode.BICUBIC), CenterCrop(224)])
    for data in photographs():
        image = Image.open(io.BytesIO(data), formats=FORMATS).convert("RGB")
        if min(image.size) >= 256:
            view = CentreTransform((224, 224))(data, 0, 0)
            assert psnr(view.image.permute(1, 2, 0).numpy(), theirs(image)) > 50


@pytest.mark.parametrize("shape", [(32, 32), (34, 50), (20, 20), (20, 90), (400, 300)])
def test_a_small_image_is_blown_up_no_further_than_needed(shape):
    pixels = np.ascontiguousarray(PHOTOGRAPHS[0][: shape[0], : shape[1]])
    view = CentreTransform((32, 32))(encoded(pixels), 0, 0)
    assert view.image.shape == (3, 32, 32)
    top, left, height, width, flipped = view.crop
    assert flipped == 0
    if shape == (32, 32):
        np.testing.assert_array_equal(view.image.permute(1, 2, 0).numpy(), pixels)
    if shape == (34, 50):
        np.testing.assert_array_equal(view.image.permute(1, 2, 0).numpy(), pixels[1:33, 9:41])
    if shape == (20, 90):
        assert (top, left, height, width) == (0, 35, 20, 20)


def test_non_square_targets_are_covered():
    view = CentreTransform((32, 96))(JPEG, 0, 0)
    assert view.image.shape == (3, 32, 96)
    assert view.crop[3] > 2.9 * view.crop[2]


def test_normalisation_is_that_of_to_tensor_then_normalize():
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    normalise = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    batch = normalise(
        Batch(images, torch.zeros(1, 1).long(), 1, None, ("a",), torch.zeros(1), torch.zeros(1, 5))
    )
    for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        expected = (torch.arange(256.0) / 255 - mean) / std
        torch.testing.assert_close(batch.images[0, channel].flatten(), expected, rtol=0, atol=1e-6)
    assert images.dtype == torch.uint8


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match=r"model\.in_channels=0"):
        TrainTransform((8, 8), in_channels=0)
    with pytest.raises(ValueError, match=r"data\.crop_scale"):
        TrainTransform((8, 8), scale=(0.5, 0.2))
    with pytest.raises(ValueError, match=r"data\.crop_scale"):
        TrainTransform((8, 8), scale=(0.5, 1.2))
    with pytest.raises(ValueError, match=r"data\.decode_margin"):
        TrainTransform((8, 8), margin=0.5)
    with pytest.raises(ValueError, match=r"data\.crop_ratio"):
        TrainTransform((8, 8), ratio=(0.0, 1.0))
