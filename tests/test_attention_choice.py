"""Which kernel computes attention: by one measurement for each shape, kept, and the same on all
ranks; nothing of it on a CPU."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ranks
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rcmae.models import kernels
from rcmae.models.sizes import NetworkSizes
from rcmae.models.tuning import attention
from rcmae.models.tuning.attention import OWN, Shape, Timed
from rcmae.models.vit import MaskedAutoencoder
from rcmae.objectives import new
from rcmae.planning.live import attention_shapes
from reference import Sizes

ENCODER = Shape(50, 50, 16, 64, "bfloat16")
DECODER = Shape(197, 197, 16, 32, "bfloat16")


@pytest.fixture(autouse=True)
def nothing_chosen() -> object:
    yield
    attention.use({})


class FakeTimer:
    """Milliseconds from a table; it counts."""

    def __init__(self, **ms: float | None) -> None:
        self.ms: dict[str, float | None] = {OWN: 1.0, **ms}
        self.asked: list[tuple[Shape, str]] = []

    def __call__(self, shape: Shape, backend: str) -> float | None:
        self.asked.append((shape, backend))
        return self.ms.get(backend)


@pytest.mark.parametrize(
    ("ms", "wanted"),
    [
        ({"efficient": 0.5, "flash": 0.8, "plain": 3.0}, "efficient"),
        ({"cudnn": 0.5, "flash": 0.8}, "flash"),  # its gradients are at times no numbers
        ({"cudnn": 0.5, "flash": 0.98}, OWN),
        ({"torch": None, "cudnn": 0.5}, OWN),
        ({"flash": 0.98}, OWN),  # within the noise
        ({"torch": None, "plain": 9.0}, "plain"),
        ({"torch": None}, OWN),
    ],
)
def test_the_fastest_is_taken_where_it_is_faster_than_torchs_own(
    ms: dict[str, float | None], wanted: str
) -> None:
    timed = attention.fastest(ENCODER, FakeTimer(**ms))
    assert timed.backend == wanted
    assert None not in timed.ms.values()


def test_what_was_measured_is_kept_for_this_gpu_and_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "compiled" / attention.FILE
    first = FakeTimer(flash=0.5)
    found = attention.choose([DECODER, ENCODER], first, file, "GPU A")
    assert {shape: timed.backend for shape, timed in found.items()} == {
        ENCODER: "flash",
        DECODER: "flash",
    }
    assert attention.told() == f"flash at {ENCODER}; flash at {DECODER}"
    again = FakeTimer(efficient=0.1)
    assert attention.choose([DECODER, ENCODER], again, file, "GPU A") == found
    assert not again.asked
    attention.choose([ENCODER], again, file, "GPU B")
    assert {shape for shape, _ in again.asked} == {ENCODER}
    monkeypatch.setattr(torch, "__version__", "9.9")
    attention.choose([ENCODER], newer := FakeTimer(), file, "GPU A")
    assert newer.asked
    assert len(json.loads(file.read_text())) == 4


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{torn",
        "[" * 100_000,
        "[1, 2]",
        '{"%s": 3}',
        '{"%s": {"backend": "os.system", "ms": {}}}',
        '{"%s": {"backend": "flash", "ms": {"flash": "fast"}}}',
        '{"%s": {"backend": "flash"}}',
    ],
)
def test_a_file_that_says_no_choice_is_measured_again(tmp_path: Path, content: str) -> None:
    file = tmp_path / attention.FILE
    key = f"GPU, torch {torch.__version__}, {ENCODER}"
    file.write_text(content.replace("%s", key))
    timer = FakeTimer(efficient=0.1)
    assert attention.choose([ENCODER], timer, file, "GPU")[ENCODER].backend == "efficient"
    assert timer.asked
    assert json.loads(file.read_text())[key]["backend"] == "efficient"


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = attention.choose([ENCODER], FakeTimer(flash=0.1), tmp_path / "file" / "x.json", "GPU")
    assert found[ENCODER].backend == "flash"


RANK = """
import sys
from pathlib import Path
from rcmae import dist
from rcmae.models.tuning import attention
from rcmae.models.tuning.attention import Shape
dist.start(required=True, timeout_s=60)
rank = dist.rank()
shapes = [Shape(50, 50, 16, 64, "bfloat16")] if rank == 0 else []
def timer(shape, backend):
    assert rank == 0, "only rank 0 measures"
    return 0.5 if backend == "efficient" else 1.0
found = attention.choose(shapes, timer, Path(sys.argv[1]) / f"{rank}.json", "GPU")
told = dist.gather([timed.backend for timed in found.values()])
if rank == 0:
    print("TOLD", told, sorted(path.name for path in Path(sys.argv[1]).glob("*.json")))
dist.finish()
"""


def test_all_ranks_take_rank_0s_choice(tmp_path: Path, ranks: Callable[..., Ranks]) -> None:
    said = ranks("-c", RANK, str(tmp_path), world=2).succeed()
    assert "TOLD [['efficient'], ['efficient']] ['0.json']" in said


def test_the_shapes_of_a_step_are_those_of_its_networks() -> None:
    """Visible patches in the encoder, all in the decoder, whose last block answers for the hidden
    ones; a student, and a teacher in the type that they compute in.
    """
    sizes = Sizes()
    student, teacher = (MaskedAutoencoder(NetworkSizes(**sizes.model())) for _ in range(2))
    before = {name: param.clone() for name, param in student.named_parameters()}
    found = attention_shapes(new("rcmae"), student, teacher, "bf16")
    patches = student.num_patches
    visible = patches // 4
    widths = {(shape.queries, shape.keys, shape.heads) for shape in found}
    heads, decoder_heads = sizes.heads, sizes.decoder_heads
    assert widths == {
        (1 + visible, 1 + visible, heads),
        (1 + patches, 1 + patches, decoder_heads),
        (patches - visible, 1 + patches, decoder_heads),
    }
    assert {shape.dtype for shape in found} == {"bfloat16"}
    assert all(torch.equal(param, before[name]) for name, param in student.named_parameters())


def test_a_network_that_made_up_images_do_not_do_for_has_no_choice() -> None:
    assert attention_shapes(new("mae"), torch.nn.Linear(2, 2), None, "bf16") == set()


def qkv(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    drawn = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    q, k, v = drawn.to(dtype).unbind(0)
    return q, k, v


def test_a_chosen_kernel_computes_its_shape_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv()
    taken = []
    monkeypatch.setattr(
        attention, "sdpa_kernel", lambda backend: taken.append(backend) or torch.no_grad()
    )
    own = kernels.attention(q, k, v, fused=True)
    assert torch.equal(own, scaled_dot_product_attention(q, k, v))
    assert not taken
    attention.use({Shape.of(q, k): Timed("plain", {}), ENCODER: Timed("flash", {})})
    kernels.attention(q, k, v, fused=True)
    assert taken == [attention.BACKENDS["plain"]]
    kernels.attention(q[:, :, 3:], k, v, fused=True)  # other queries
    kernels.attention(q, k, v, fused=True, bias=torch.zeros(4, 9, 9))
    assert len(taken) == 1


def test_the_start_up_table_says_what_was_chosen() -> None:
    rows = {row.part: row for row in kernels.table(device=torch.device("cpu"))}
    assert "flash kernel, or plain" in rows["attention"].used
    attention.use({ENCODER: Timed("efficient", {"efficient": 0.5, OWN: 1.0})})
    rows = {row.part: row for row in kernels.table(device=torch.device("cuda"))}
    assert rows["attention"].used == "efficient at 50 tokens x 16 heads x 64 bfloat16"


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_a_chosen_kernel_does_not_end_a_graph() -> None:
    block = MaskedAutoencoder(NetworkSizes(**Sizes().model())).blocks[0]
    heads, width = Sizes().heads, Sizes().width
    x = torch.randn(2, 9, width)
    plain = block(x)
    attention.use({Shape(9, 9, heads, width // heads, "float32"): Timed("plain", {})})
    found = torch.compile(block, backend="eager", fullgraph=True, dynamic=False)(x)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)
    torch.compiler.reset()


@pytest.mark.gpu
def test_a_gpus_kernels_agree_and_one_is_chosen_once(tmp_path: Path) -> None:
    device = torch.device("cuda")
    timer = functools.partial(attention.milliseconds, batch=8, device=device)
    name = torch.cuda.get_device_name()
    found = attention.choose([ENCODER, DECODER], timer, tmp_path / "a.json", name)
    for shape, timed in found.items():
        assert timed.ms[OWN] > 0
        assert {"flash", "efficient", "plain"} <= set(timed.ms)
        size = (2, shape.heads, shape.keys, shape.head_dim)
        q, k, v = (torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(3))
        attention.use({})
        own = kernels.attention(q, k, v, fused=True)
        attention.use(found)
        torch.testing.assert_close(
            kernels.attention(q, k, v, fused=True), own, atol=2e-2, rtol=2e-2
        )
    again = attention.choose([ENCODER, DECODER], FakeTimer(), tmp_path / "a.json", name)
    assert again == found
