"""k-NN is exact and the same on any number of ranks.

The picture shows what the networks predicted, where they did.
"""

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from rcmae import dist
from rcmae.data.batch import Batch
from rcmae.data.transforms import Normalise
from rcmae.evaluation import knn as knn_module
from rcmae.evaluation.features import (
    evaluating,
    extract_features,
    features_of_both,
    pixels,
    pooled,
)
from rcmae.evaluation.knn import knn, knn_rows, knn_table, votes
from rcmae.evaluation.logistic import logistic_rows
from rcmae.evaluation.pictures import (
    CELL_SIDE,
    GAP,
    GREY,
    reconstruct,
    reconstruction_picture,
    save_png,
)
from rcmae.models.patches import patchify
from rcmae.models.sizes import NetworkSizes
from rcmae.models.vit import MaskedAutoencoder
from runs import python_path

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT.parent / "shared" / "golden" / "knn"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")


def features(n: int, dim: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99)).double()
    return centres[labels] + torch.randn(n, dim, generator=generator).double(), labels


def scores_by_hand(train, labels, test, k, classes, temperature=0.07):
    """One test row at a time, in numpy: sort, take k, add up."""
    train, test = train.numpy(), test.numpy()
    out = np.zeros((len(test), classes))
    for row, vector in enumerate(test):
        similarity = train @ vector / np.linalg.norm(train, axis=1) / np.linalg.norm(vector)
        for index in np.argsort(-similarity, kind="stable")[:k]:
            out[row, labels[index]] += math.exp(similarity[index] / temperature)
    return torch.from_numpy(out)


# --------------------------------------------------------------------------------------------- k-NN


@pytest.mark.parametrize("n", [3, 40, 300])
def test_votes_are_those_of_one_row_at_a_time(n):
    train, labels = features(n, 16, 5, seed=1)
    test, _ = features(17, 16, 5, seed=2)
    ks = [1, 3, n]
    scores = votes(train, labels, test, k=ks, num_classes=7)
    for k in ks:
        torch.testing.assert_close(
            scores[k], scores_by_hand(train, labels, test, k, 7), rtol=1e-10, atol=1e-12
        )
    assert scores[n][:, 5:].eq(0).all()  # classes that no training image has


@pytest.mark.skipif(not GOLDEN.exists(), reason="the golden numbers lie outside the project")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_published_votes(dtype):
    given, expected = (
        load_file(GOLDEN / "inputs.safetensors"),
        load_file(GOLDEN / "expected.safetensors"),
    )
    fixture = json.loads((GOLDEN / "fixture.json").read_text())
    config, accuracy = fixture["config"], fixture["values"]["accuracy"]["value"]
    train, test = given["train_features"].to(dtype), given["test_features"].to(dtype)
    more = {"k": config["ks"], "num_classes": config["num_classes"], "temperature": config["T"]}
    scores = votes(train, given["train_labels"], test, **more)
    top1 = knn(train, given["train_labels"], test, given["test_labels"], **more)
    for k in config["ks"]:
        wanted = expected[f"k{k}.scores"]
        limit = 1e-11 + 1e-9 * wanted.max() if dtype == torch.float64 else 1e-5 * wanted.max()
        assert (scores[k] - wanted).abs().max() <= limit
        assert torch.equal(scores[k].argmax(1), expected[f"k{k}.prediction"])
        assert top1[k] == accuracy[str(k)]["top1"]


def test_chunks_and_several_k_at_once_change_nothing(monkeypatch):
    train, labels = features(90, 8, 4, seed=3)
    test, test_labels = features(50, 8, 4, seed=4)
    whole = votes(train, labels, test, k=[1, 7, 20], num_classes=4)
    monkeypatch.setattr(knn_module, "SIMILARITIES_AT_ONCE", 7 * 90)
    chunked = votes(train, labels, test, k=[20, 1, 7], num_classes=4)
    assert list(chunked) == [20, 1, 7]
    for k in chunked:
        torch.testing.assert_close(chunked[k], whole[k], rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(knn_module, "SIMILARITIES_AT_ONCE", 1)  # no row fits: one it is
    assert knn(train, labels, test, test_labels, k=[7], num_classes=4) == {
        7: 100 * float((whole[7].argmax(1) == test_labels).double().mean())
    }


def test_of_equally_near_images_the_first_ones_vote():
    one = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    far = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    train = torch.cat([far, one, 3 * one, one, far, one])
    labels = torch.tensor([4, 3, 2, 1, 4, 0])
    scores = votes(train, labels, torch.cat([one, far]), k=[1, 2, 3, 5], num_classes=5)
    vote = math.exp(1 / 0.07)
    for k, voters in ((1, [3]), (2, [3, 2]), (3, [3, 2, 1])):
        wanted = torch.zeros(5)
        wanted[voters] = vote
        torch.testing.assert_close(scores[k][0], wanted)
    torch.testing.assert_close(scores[5][0], torch.tensor([vote, vote, vote, vote, 1.0]))
    torch.testing.assert_close(scores[5][1], torch.tensor([0.0, 1.0, 1.0, 1.0, 2 * vote]))
    test, test_labels = torch.cat([one, far]), torch.tensor([0, 4])
    assert knn(train, labels, test, test_labels, k=[1, 3, 5], num_classes=5) == {
        1: 50.0,
        3: 50.0,
        5: 100.0,
    }


def test_what_does_not_fit_is_said_all_at_once():
    train, labels = features(10, 4, 3, seed=5)
    with pytest.raises(
        ValueError, match=r"k=\[0, 11\].*between 1 and 10.*9 labels for 10.*temperature=0"
    ):
        votes(train, labels[:9], train, k=[0, 11], num_classes=3, temperature=0.0)
    with pytest.raises(ValueError, match=r"labels from 0 to 2; expected 0 to 1"):
        votes(train, labels, train, k=[1], num_classes=2)
    with pytest.raises(ValueError, match=r"shapes \[10, 4\] and \[10, 3\]"):
        votes(train, labels, train[:, :3], k=[1], num_classes=3)


# ----------------------------------------------------------------------------------------- features


def a_batch(
    images: torch.Tensor, labels, positions, *, patch: int = 4, num_visible: int = 4, seed: int = 0
) -> Batch:
    count = images.shape[2] // patch * (images.shape[3] // patch)
    order = torch.rand(len(images), count, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return Batch(
        images,
        order,
        num_visible,
        None if labels is None else torch.tensor(labels),
        ("x/y",) * len(images),
        torch.tensor(positions),
        torch.zeros(len(images), 5, dtype=torch.int64),
    )


def a_model(image_size=(16, 16), *, channels: int = 3, seed: int = 0) -> MaskedAutoencoder:
    model = MaskedAutoencoder(
        NetworkSizes(
            image_size=image_size,
            patch_size=4,
            in_channels=channels,
            embed_dim=16,
            depth=2,
            num_heads=2,
            decoder_dim=16,
            decoder_depth=2,
            decoder_heads=2,
        )
    )
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def photographs(count: int, size=(16, 16), *, channels: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, *size), generator=generator, dtype=torch.uint8)


def test_features_are_pooled_tokens_of_the_whole_image_without_the_padding():
    model, images = a_model().eval(), photographs(5)
    batches = [
        a_batch(images[:3], [2, 0, 1], [7, 3, 5]),
        a_batch(images[[3, 4, 4]], [1, 1, 1], [1, 2, -1]),
    ]
    normalise = Normalise(MEAN, STD).images
    networks = {"cls": pooled(model, "cls"), "mean": pooled(model, "mean"), "pixels": pixels}
    found = extract_features(networks, batches, device=CPU, normalise=normalise).gathered()
    assert found.samples.tolist() == [1, 2, 3, 5, 7]
    assert found.labels.tolist() == [1, 1, 0, 1, 2]
    with torch.no_grad():
        tokens = model.encoded(normalise(images[[3, 4, 1, 2, 0]]))
    torch.testing.assert_close(found.vectors["cls"], tokens[:, 0])
    torch.testing.assert_close(found.vectors["mean"], tokens[:, 1:].mean(1))
    torch.testing.assert_close(
        found.vectors["pixels"], normalise(images[[3, 4, 1, 2, 0]]).flatten(1)
    )


def test_large_images_are_compared_as_small_pixels():
    images = torch.arange(64.0).repeat(2, 3, 64, 1)
    small = pixels(images).unflatten(1, (3, 32, 32))
    torch.testing.assert_close(small[0, 0, 0], torch.arange(32) * 2 + 0.5)


def test_images_without_labels_are_refused():
    normalise = Normalise(MEAN, STD).images
    for labels in (None, [0, -100]):
        with pytest.raises(ValueError, match="needs a label for every image"):
            extract_features(
                {"pixels": pixels},
                [a_batch(photographs(2), labels, [0, 1])],
                device=CPU,
                normalise=normalise,
            )
    with pytest.raises(ValueError, match="use 'cls', 'cls_before_norm' or 'mean'"):
        pooled(a_model(), "max")


def test_evaluation_mode_and_gradients_come_back():
    training, resting = nn.Dropout().train(), nn.Dropout().eval()
    with evaluating(training, resting, None):
        assert not training.training
        assert not torch.is_grad_enabled()
    assert (training.training, resting.training) == (True, False)
    assert torch.is_grad_enabled()


def test_the_table_has_a_line_a_network():
    table = knn_table({"student": {20: 50.0, 1: 45.25}, "random": {20: 7.5, 1: 6.0}})
    assert table.splitlines() == [
        "            k=1    k=20",
        "student   45.25   50.00",
        "random     6.00    7.50",
    ]


def share(count: int, seed: int) -> Iterator[Batch]:
    """This rank's part of some labelled images, four a forward, padded to the longest rank's."""
    images = photographs(count, seed=seed)
    labels = torch.randint(4, (count,), generator=torch.Generator().manual_seed(seed))
    # something to find
    images[:, :, :12] = images[:, :, :12] // 4 + (labels * 48).byte()[:, None, None, None]
    images[:, 0, :12] = 255 - images[:, 0, :12]
    mine = list(range(dist.rank(), count, dist.world()))
    mine += [-1] * (-(-count // (dist.world() * 4)) * 4 - len(mine))
    for at in range(0, len(mine), 4):
        part = mine[at : at + 4]
        yield a_batch(images[part], labels[part].tolist(), part)


def rows_here() -> list:
    """What knn_rows gives on this rank, and what it says to a k that is too large."""
    networks = {"random": pooled(a_model().eval(), "mean"), "pixels": pixels}
    more = {"device": CPU, "normalise": Normalise(MEAN, STD).images}
    features = features_of_both(networks, share(29, 1), share(9, 3), **more)
    rows = knn_rows(*features, k=[1, 5], device=CPU)
    with pytest.raises(ValueError) as problem:  # noqa: PT011
        knn_rows(*features, k=[30], device=CPU)
    return json.loads(json.dumps([rows, str(problem.value), logistic_rows(*features, device=CPU)]))


RANK = """
import json, torch
torch.set_num_threads(1)
from rcmae import dist
import test_evaluate
dist.start(required=False)
print(json.dumps(test_evaluate.rows_here()))
dist.finish()
"""


def test_rows_are_the_same_on_any_number_of_ranks():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SLURM", "RANK", "WORLD"))
    }
    env |= {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    env |= {"PYTHONPATH": python_path(Path(__file__).parent)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env=env | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
        )
        for rank in ("0", "1")
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    rows, too_many, linear = rows_here()
    assert [json.loads(output.splitlines()[-1]) for output in outputs] == [
        [rows, too_many, linear]
    ] * 2
    assert linear.keys() == {"random", "pixels"}
    assert linear["pixels"] > 50
    assert rows["pixels"]["1"] > 50
    assert "k=[30] neighbours of 29 training images" in too_many


# ------------------------------------------------------------------------------------------ picture


class Perfect(nn.Module):
    """Predicts exactly what the loss asks for."""

    def __init__(self, norm_pix_loss: bool, patch: int = 4) -> None:
        super().__init__()
        self.norm_pix_loss, self.patch = norm_pix_loss, patch

    def forward(self, images, ids_shuffle, num_visible, outputs):
        assert outputs == ("all_pixels",)
        patches = patchify(images, self.patch)
        if self.norm_pix_loss:
            mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
            patches = (patches - mean) / (variance + 1e-6).sqrt()
        return {"all_pixels": patches}


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_perfect_network_gives_the_photograph_back(norm_pix_loss, channels):
    images = Normalise(MEAN[:channels], STD[:channels]).images(
        photographs(2, (8, 16), channels=channels)
    )
    batch = a_batch(images, None, [0, 1])
    torch.testing.assert_close(
        reconstruct(Perfect(norm_pix_loss), batch, norm_pix_loss=norm_pix_loss), images
    )


def test_visible_patches_are_pasted_and_hidden_ones_predicted():
    images = Normalise(MEAN, STD).images(photographs(3, (8, 16)))
    batch = a_batch(images, None, [0, 1, 2])
    model = a_model((8, 16)).eval()
    with torch.no_grad():
        filled = patchify(reconstruct(model, batch, norm_pix_loss=False), 4)
        predicted = model(images, batch.ids_shuffle, batch.num_visible, ("all_pixels",))[
            "all_pixels"
        ]
    for row in range(3):
        visible, hidden = batch.ids_shuffle[row, :4], batch.ids_shuffle[row, 4:]
        assert torch.equal(filled[row, visible], patchify(images, 4)[row, visible])
        assert torch.equal(filled[row, hidden], predicted[row, hidden])


def cells(sheet: np.ndarray, rows: int, columns: int, height: int, width: int) -> np.ndarray:
    """The pictures of a sheet, [rows, columns, height, width, 3]."""
    factor = -(-CELL_SIDE // min(height, width))
    height, width = height * factor, width * factor
    top = first_row(sheet)
    grid = [
        [
            sheet[top + row * (height + GAP) :][:height, GAP + column * (width + GAP) :][:, :width][
                ::factor, ::factor
            ]
            for column in range(columns)
        ]
        for row in range(rows)
    ]
    return np.array(grid)


def first_row(sheet: np.ndarray) -> int:
    """Where the pictures begin: the first row of pixels without white or black at the left, where
    text is black on white.
    """
    inside = sheet[:, GAP : GAP + CELL_SIDE].astype(int)
    is_text = np.ptp(inside, axis=2).max(axis=1) == 0
    return int(np.argmax(~is_text))


def test_the_picture_has_input_masked_student_teacher():
    pictures = photographs(2, (8, 16))
    batch = a_batch(Normalise(MEAN, STD).images(pictures), None, [0, 1], num_visible=2)
    student, teacher = a_model((8, 16)), Perfect(True)
    sheet = reconstruction_picture(student, teacher, batch, mean=MEAN, std=STD, norm_pix_loss=True)
    assert sheet.dtype == np.uint8
    shown = cells(sheet, 2, 4, 8, 16)
    true = pictures.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(shown[:, 0], true)
    assert np.array_equal(shown[:, 3], true)
    assert student.training
    for row in range(2):
        for patch in range(8):
            top, left = patch // 4 * 4, patch % 4 * 4
            cut = (slice(top, top + 4), slice(left, left + 4))
            if patch in batch.ids_shuffle[row, :2]:
                assert np.array_equal(shown[row, 1][cut], true[row][cut])
                assert np.array_equal(shown[row, 2][cut], true[row][cut])
            else:
                assert (shown[row, 1][cut] == GREY).all()
                assert not np.array_equal(shown[row, 2][cut], true[row][cut])


def test_without_a_teacher_its_column_is_missing():
    batch = a_batch(Normalise(MEAN[:1], STD[:1]).images(photographs(1, channels=1)), None, [0])
    perfect = Perfect(False)
    three = reconstruction_picture(
        perfect, None, batch, mean=MEAN[:1], std=STD[:1], norm_pix_loss=False
    )
    four = reconstruction_picture(
        perfect, perfect, batch, mean=MEAN[:1], std=STD[:1], norm_pix_loss=False
    )
    assert four.shape[1] - three.shape[1] == GAP + CELL_SIDE


def test_a_png_is_there_whole(tmp_path):
    picture = photographs(1, (30, 40))[0].permute(1, 2, 0).numpy()
    path = tmp_path / "pictures" / "step.png"
    save_png(picture, path)
    assert np.array_equal(np.asarray(Image.open(path, formats=["PNG"])), picture)
    assert list(path.parent.iterdir()) == [path]


def test_one_process_gives_rows_of_every_network():
    normalise = Normalise(MEAN, STD).images
    images = photographs(6)
    batch = a_batch(images, [0, 1, 2, 0, 1, 2], list(range(6)))
    model = a_model().eval()
    networks = {"student": pooled(model, "mean"), "pixels": pixels}
    rows = knn_rows(
        *features_of_both(networks, [batch], [batch], device=CPU, normalise=normalise),
        k=[1],
        device=CPU,
    )
    assert rows == {"student": {1: 100.0}, "pixels": {1: 100.0}}
