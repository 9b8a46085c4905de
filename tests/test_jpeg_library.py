"""Which libjpeg-turbo decodes parts of JPEGs: a release of the system or of conda, else the wheel's
pre-release, else none. The pixels are the same.
"""

import io
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from rcmae.data import jpeg
from rcmae.data.jpeg import Box, decode_box, decoding, turbo
from rcmae.planning.node import check_software, versions

PHOTOGRAPH = load_sample_images().images[0]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """A library is looked for once; no test sees what another found, nor this machine's."""
    monkeypatch.setattr(decoding, "_decoders", threading.local())
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    jpeg.library.cache_clear()
    yield
    jpeg.library.cache_clear()


def release(folder: Path, version: bytes = b"3.0.92") -> str:
    """The wheel's library as one of another version, where conda has such."""
    data = Path(turbo.wheels()[0]).read_bytes()
    assert data.count(b"libjpeg-turbo version 2.1.92") == 1
    (folder / "lib").mkdir(parents=True)
    path = folder / "lib" / "libturbojpeg.so.0"
    path.write_bytes(data.replace(b"version 2.1.92", b"version " + version))
    return str(path)


def parts() -> list[np.ndarray]:
    """Parts of a photograph of each subsampling, at every size."""
    found = []
    for subsampling in (0, 1, 2):
        file = io.BytesIO()
        image = Image.fromarray(PHOTOGRAPH[:203, :301])
        image.save(file, "JPEG", quality=90, subsampling=subsampling)
        for shrink in (1, 2, 4, 8):
            box = Box(5 * shrink, 7 * shrink, 13 * shrink, 11 * shrink)
            found.append(decode_box(file.getvalue(), box, shrink))
    return found


def told() -> tuple[str, str]:
    """What the doctor says of it."""
    finding = next(each for each in check_software(versions()) if each.check == "jpegs")
    return finding.colour, finding.found


def without(monkeypatch) -> list[np.ndarray]:
    """The parts where no library decodes them alone."""
    with monkeypatch.context() as hidden:
        hidden.setattr(turbo, "wheels", list)
        jpeg.library.cache_clear()
        assert not jpeg.decodes_parts()
        colour, text = told()
        assert colour == "yellow"
        assert "simplejpeg decodes each JPEG whole" in text
        found = parts()
    jpeg.library.cache_clear()
    return found


@pytest.mark.parametrize("found_by", ["the loader", "conda", "the wheel"])
def test_every_library_gives_the_pixels_that_none_gives(tmp_path, monkeypatch, found_by):
    whole = without(monkeypatch)
    path = turbo.wheels()[0]
    if found_by == "the loader":
        path = release(tmp_path)
        monkeypatch.setattr("ctypes.util.find_library", lambda name: path)
    elif found_by == "conda":
        path = release(tmp_path)
        monkeypatch.setenv("CONDA_PREFIX", str(tmp_path))
    library = jpeg.library()
    assert library.path == path
    assert library.wheel == (found_by == "the wheel")
    for mine, theirs in zip(parts(), whole, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    colour, text = told()
    if found_by == "the wheel":
        assert colour == "yellow"
        assert "libjpeg-turbo 2.1.92" in text
        assert "pre-release" in text
    else:
        assert (colour, text) == (
            "green",
            f"parts of JPEGs are decoded by libjpeg-turbo 3.0.92 ({path})",
        )


def test_an_installed_library_that_is_no_release_of_3_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path))
    for version in (b"2.1.91", b"1.5.99"):
        release(tmp_path, version)
        jpeg.library.cache_clear()
        assert jpeg.library().wheel
        shutil.rmtree(tmp_path / "lib")


def test_what_cannot_be_loaded_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libturbojpeg.so").write_bytes(b"no library")
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path))
    assert jpeg.library().wheel


def test_no_other_variable_names_a_library(tmp_path, monkeypatch):
    release(tmp_path)
    for name in ("TURBOJPEG", "LIBTURBOJPEG", "PREFIX"):
        monkeypatch.setenv(name, str(tmp_path / "lib" / "libturbojpeg.so.0"))
    assert jpeg.library().wheel
