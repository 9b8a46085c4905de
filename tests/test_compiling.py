"""Compiled blocks: a graph for each kind and shape and none twice, found again by the next start,
and no reason to stop where they cannot be made."""

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_compiler

import reference
from rcmae import config
from rcmae.engines.local import LocalEngine
from rcmae.engines.protocol import EngineSettings
from rcmae.evaluation.features import evaluating, pooled
from rcmae.models.blocks import Block, put_drop_path
from rcmae.models.kernels import layer_norm
from rcmae.models.sizes import NetworkSizes
from rcmae.models.tuning import compiling
from rcmae.models.vit import MaskedAutoencoder
from rcmae.objectives import new
from rcmae.planning.live import made_up_batch
from reference import Sizes

Backend = Callable[..., Callable[..., tuple[Tensor, ...]]]

# torch's own, where it compiles: at the import of its back end, and for a clean start
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A line for each graph that is compiled, by a backend that only counts."""
    made: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        made.append(graph.print_readable(print_output=False))
        return graph.forward

    whole = functools.partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", whole)
    yield made
    torch.compiler.reset()
    compiling.drain_news()


class Training:
    """RC-MAE on one process, by compiled blocks."""

    def __init__(self) -> None:
        self.student = MaskedAutoencoder(NetworkSizes(**Sizes().model()))
        self.teacher = MaskedAutoencoder(NetworkSizes(**Sizes().model()))
        compiling.compile_blocks(self.student, self.teacher)
        settings = EngineSettings(precision="fp32")
        self.engine = LocalEngine(self.student, self.teacher, settings)
        self.objective = new("rcmae")

    def step(self, images: int) -> float:
        batch = made_up_batch(self.student, images, torch.device("cpu"))
        sums = self.objective(self.engine.student, self.engine.teacher, batch, 0.0)
        loss = torch.stack(list(sums.values())).sum() / 100
        self.engine.backward(loss, last=True)
        self.engine.step(lr=1e-3, weight_decay=0.0)
        self.engine.update_teacher(0.9)
        return loss.item()

    def evaluate(self, images: int) -> Tensor:
        batch = made_up_batch(self.student, images, torch.device("cpu"))
        with evaluating(self.student, self.teacher):
            return pooled(self.student, "mean")(batch.images)


def test_twenty_steps_with_an_evaluation_and_a_second_batch_size_compile_each_shape_once(
    graphs: list[str],
) -> None:
    training = Training()
    training.step(2)
    # Block of encoder and decoder and LastBlock; of the student with a backward pass, of the
    # teacher without
    assert len(graphs) == 6
    for _ in range(8):
        training.step(2)
    training.evaluate(2)  # whole images: another length
    training.evaluate(3)
    training.step(2)
    assert len(graphs) == 6
    training.step(4)
    assert len(graphs) == 12
    for step in range(9):
        training.step(2 + 2 * (step % 2))
    assert len(graphs) == 12
    assert not torch._dynamo.utils.counters["graph_break"]
    assert not any("SymInt" in graph for graph in graphs)
    assert not compiling.drain_news()


def test_more_shapes_than_torch_would_take_still_have_their_own_graph(graphs: list[str]) -> None:
    training = Training()
    with torch._dynamo.config.patch(recompile_limit=1):
        for images in range(1, 4):
            training.step(images)
    assert len(graphs) == 6 * 3
    assert not compiling.drain_news()


def test_blocks_that_drop_paths_have_a_graph_each(graphs: list[str]) -> None:
    """Rate and place are constants in a graph, so torch would compile shared code for each block
    and stop at its limit.
    """
    network = nn.Module()
    blocks = [Block(8, 2, mlp_ratio=2, norm=layer_norm()) for _ in range(10)]
    draws = put_drop_path(blocks, [0.1 * number for number in range(10)])
    network.all_blocks = lambda: blocks  # type: ignore[assignment]
    compiling.compile_blocks(network)
    draws.keep = torch.ones(2, 10, 2, dtype=torch.bool)
    x = torch.randn(2, 5, 8)
    for _ in range(2):
        for block in blocks:
            block(x)
    assert len(graphs) == 10


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_a_compilation_that_fails_is_told_once_and_computes_eagerly(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        raise RuntimeError("no space left on the compiler's disk")

    fine = make_boxed_compiler(lambda graph, inputs: graph.forward)
    compilers = {"forward": (broken, fine), "backward": (fine, broken)}[part]
    backend = aot_autograd(fw_compiler=compilers[0], bw_compiler=compilers[1])
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    training = Training()
    losses = [training.step(2) for _ in range(3)]
    (told,) = compiling.drain_news()
    assert "no space left on the compiler's disk" in told
    assert "engine.compile=false" in told
    assert not compiling.drain_news()
    torch.compiler.reset()
    monkeypatch.setattr(compiling, "blocks_of", lambda model: [])
    assert losses == [plain for eager in [Training()] for plain in map(eager.step, [2, 2, 2])]


def test_shapes_without_end_go_eager_and_say_so(
    graphs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "MOST", 4)  # two batches: encoder and decoder are one kind
    training = Training()
    for images in range(1, 6):
        training.step(images)
    (told,) = compiling.drain_news()
    assert "4 graphs of Block.forward are compiled and shapes go on" in told


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ on a CPU")
def test_a_second_start_finds_what_the_first_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(compiling.CACHE, raising=False)
    compiling.keep_in(tmp_path / "run" / "compiled")
    block = Block(8, 2, mlp_ratio=2, norm=layer_norm())
    network = nn.Module()
    network.all_blocks = lambda: [block]  # type: ignore[assignment]
    found = []
    for _ in range(2):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        block.__dict__.pop("forward", None)
        compiling.compile_blocks(network)
        block(torch.randn(2, 5, 8)).sum().backward()
        found.append(dict(torch._dynamo.utils.counters["inductor"]))
    first, second = found
    assert first["fxgraph_cache_miss"] == 2  # forward and backward
    assert second.get("fxgraph_cache_miss", 0) == 0
    assert any((tmp_path / "run" / "compiled").iterdir())
    assert not compiling.drain_news()


def test_a_folder_that_the_environment_names_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(compiling.CACHE, str(tmp_path / "node"))
    compiling.keep_in(tmp_path / "run")
    assert compiling.os.environ[compiling.CACHE] == str(tmp_path / "node")
    (tmp_path / "file").touch()
    monkeypatch.setenv(compiling.CACHE, str(tmp_path / "file"))
    compiling.keep_in(tmp_path / "run")
    assert compiling.os.environ[compiling.CACHE] == str(tmp_path / "run")
    (told,) = compiling.drain_news()
    assert f"{tmp_path / 'file'} cannot be used (File exists)" in told
    monkeypatch.delenv(compiling.CACHE)
    for run in ("a", "b"):  # two runs in one process: each its own
        compiling.keep_in(tmp_path / run)
        assert compiling.os.environ[compiling.CACHE] == str(tmp_path / run)


@pytest.mark.parametrize(
    ("asked", "cuda", "zero3", "wanted"),
    [
        ("auto", True, False, True),
        ("auto", False, False, False),
        ("auto", True, True, False),
        ("true", False, True, True),
        ("false", True, False, False),
    ],
)
def test_auto_compiles_on_gpus_but_not_under_zero_3(
    asked: str, cuda: bool, zero3: bool, wanted: bool
) -> None:
    keys = ["data.shards=x.tar", f"engine.compile={asked}"]
    recipe = config.load("rcmae_vit_l_16", keys)
    assert config.compiles(recipe, cuda=cuda, zero3=zero3) is wanted
    assert config.load("rcmae_vit_l_16", ["data.shards=x.tar"]).engine.compile == "auto"


def test_graphs_compute_what_blocks_compute(graphs: list[str]) -> None:
    compiled, plain = Training(), MaskedAutoencoder(NetworkSizes(**Sizes().model()))
    images, noise = reference.inputs(Sizes(), 2, seed=1)
    ids = noise.argsort(dim=1)
    found = compiled.student(images, ids, 6)["pixels"]
    torch.testing.assert_close(found, plain(images, ids, 6)["pixels"], atol=0, rtol=0)
    assert len(graphs) == 3
