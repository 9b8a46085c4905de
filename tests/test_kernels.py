"""Fused choices compute the same function; the start-up print says what is used and why.

NVIDIA apex is not on the package index, so its path runs on a stand-in with its documented
signatures (data/apex_standin): what is shown is that it is found, called and fitted in, not that
its kernels are right or fast."""

import copy
import functools
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import reference
from rcmae.engines.optim import param_groups
from rcmae.models import kernels, precision
from rcmae.models.sizes import NetworkSizes
from rcmae.models.tuning import compiling
from rcmae.models.vit import MaskedAutoencoder
from reference import Sizes

SIZES = Sizes()
STANDIN = Path(__file__).parent / "data" / "apex_standin"


def small(sizes: Sizes = SIZES) -> MaskedAutoencoder:
    model = MaskedAutoencoder(NetworkSizes(**sizes.model()))
    model.load_state_dict(reference.weights(sizes, 3))
    return model


def trained(model: MaskedAutoencoder) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A loss and its gradients."""
    images, noise = reference.inputs(SIZES, 2, seed=1)
    loss = model(images, noise.argsort(dim=1), 6)["pixels"].square().mean()
    model.zero_grad()
    loss.backward()
    return loss.detach(), {
        name: param.grad for name, param in model.named_parameters() if param.grad is not None
    }


# --------------------------------------------------------------------------------------------- apex


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A clean slate for the name `apex`."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
            del sys.modules[name]

    forget()
    yield monkeypatch
    forget()


def test_apex_is_told_from_absence_and_from_its_namesake(
    apex: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with apex.context() as without:
        without.setattr(importlib.util, "find_spec", lambda name: None)
        assert kernels.apex_status() == (False, "NVIDIA apex is not installed")

    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text(
        "raise RuntimeError('a web toolkit was imported')"
    )
    apex.syspath_prepend(tmp_path)
    status = kernels.apex_status()
    assert not status.usable
    assert "not NVIDIA's (the index has a web toolkit of that name)" in status.found
    for ask in (
        lambda: kernels.layer_norm("apex"),
        lambda: kernels.adamw([], betas=(0.9, 0.95), kind="apex"),
    ):
        with pytest.raises(
            ValueError, match=r"engine\.(layer_norm|optimizer)=apex: the apex in .* use engine"
        ):
            ask()

    apex.syspath_prepend(STANDIN)
    assert kernels.apex_status().usable


def test_apex_layer_norm_takes_the_place_of_torchs(apex: pytest.MonkeyPatch) -> None:
    apex.syspath_prepend(STANDIN)
    model = MaskedAutoencoder(NetworkSizes(**SIZES.model()), norm_layer=kernels.layer_norm("apex"))
    kinds = {
        type(module).__name__
        for name, module in model.named_modules()
        if "norm" in name and list(module.parameters())
    }
    assert kinds == {"FusedLayerNorm"}
    assert torch.all(model.norm.weight == 1)
    model.load_state_dict(reference.weights(SIZES, 3), strict=True)
    loss, grads = trained(model)
    want_loss, want = trained(small())
    assert loss.item() == want_loss.item()
    assert all(torch.equal(grads[name], want[name]) for name in want)


def test_apex_adam_takes_the_place_of_torchs(apex: pytest.MonkeyPatch) -> None:
    apex.syspath_prepend(STANDIN)
    weights = []
    for kind in ("torch", "apex"):
        # in float32 Adam would blow up the rounding noise of the key biases
        model = small().double()
        optimizer = kernels.adamw(param_groups(model, 0.05), betas=(0.9, 0.95), kind=kind)
        for _ in range(3):
            trained(model)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3
            optimizer.step()
        weights.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
    assert type(optimizer).__name__ == "FusedAdam"
    torch.testing.assert_close(weights[1], weights[0], atol=1e-12, rtol=1e-10)


# ------------------------------------------------------------------------------------------- blocks


@pytest.fixture
def quick_compile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace and differentiate as torch.compile does, without a minute of C++."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch.compiler.reset()


KINDS = ["none", "torch", "fairscale", "fairscale_offload"]


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_blocks_keep_names_losses_and_gradients(kind: kernels.Checkpointing) -> None:
    plain, model = small(), small()
    kernels.checkpoint_blocks(model, kind)
    assert list(model.state_dict()) == list(plain.state_dict())
    loss, grads = trained(model)
    want_loss, want = trained(plain)
    assert loss.item() == want_loss.item()
    assert all(torch.equal(grads[name], want[name]) for name in want)


@pytest.mark.parametrize("kind", ["none", "torch", "fairscale"])
def test_checkpointing_keeps_only_the_inputs_of_blocks(kind: kernels.Checkpointing) -> None:
    model = small()
    kernels.checkpoint_blocks(model, kind)
    inside = []
    for block in [*model.blocks, *model.decoder_blocks]:
        block.mlp.fc1.register_forward_hook(lambda *_: inside.append(1))
    trained(model)
    assert len(inside) == (4 if kind == "none" else 8)  # a second time in the backward pass


# torch's own warnings while it compiles: at the import of its back end, and where it looks at an
# activation's gradient
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(
    ("kind", "compile_first"),
    [("none", True), ("torch", False), ("torch", True), ("fairscale_offload", True)],
)
def test_compiled_blocks_compute_the_same_with_any_checkpointing(
    kind: kernels.Checkpointing, compile_first: bool
) -> None:
    plain, model = small(), small()
    if compile_first:
        compiling.compile_blocks(model)
    kernels.checkpoint_blocks(model, kind)
    if not compile_first:
        compiling.compile_blocks(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    torch._dynamo.utils.counters.clear()
    loss, grads = trained(model)
    # Block of two widths, and LastBlock
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3
    assert not torch._dynamo.utils.counters["graph_break"]
    want_loss, want = trained(plain)
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-5)
    for name, grad in want.items():
        torch.testing.assert_close(grads[name], grad, atol=1e-6, rtol=1e-3, msg=name)
    if kind == "torch":  # a copy computes with its own weights (fairscale's wrapper forbids copies)
        twin = copy.deepcopy(model)
        for param in model.parameters():
            param.data.zero_()
        assert trained(twin)[0].item() == loss.item() != 0.0


# -------------------------------------------------------------------------------------------- table


def test_the_start_up_table_says_what_is_used_and_why(apex: pytest.MonkeyPatch) -> None:
    apex.setattr(importlib.util, "find_spec", lambda name: None)
    rows = {row.part: row for row in kernels.table(device=torch.device("cpu"))}
    assert "scaled_dot_product_attention" in rows["attention"].used
    assert rows["layer norm"][1:] == ("torch LayerNorm", "NVIDIA apex is not installed")
    assert rows["optimizer"][1:] == ("torch AdamW, fused", "NVIDIA apex is not installed")
    assert rows["compile"].used == "off"
    assert rows["activations"].used == "all kept"
    apex.undo()
    apex.syspath_prepend(STANDIN)
    chosen = kernels.table(
        device=torch.device("cpu"),
        layer_norm="apex",
        optimizer="DeepSpeedCPUAdam",
        compile=True,
        checkpointing="fairscale_offload",
    )
    rows = {row.part: row for row in chosen}
    assert rows["layer norm"].used == "apex FusedLayerNorm"
    assert rows["optimizer"][1:] == ("DeepSpeedCPUAdam", "the engine's own")
    assert rows["compile"].used.startswith("each block")
    assert "host memory" in str(rows["activations"])
    assert "engine.optimizer=apex" in kernels.table(device=torch.device("cpu"))[2].why


def test_attention_is_the_same_function_either_way_and_chosen_by_device_and_type(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "cpu_instructions", lambda: frozenset({"avx512_bf16"}))
    q, k, v = torch.randn(
        3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).unbind(0)
    fused = kernels.attention(q[:, :, 3:], k, v, fused=True)
    torch.testing.assert_close(
        kernels.attention(q[:, :, 3:], k, v, fused=False), fused, rtol=1e-12, atol=1e-12
    )
    model = small()
    blocks = [*model.blocks, *model.decoder_blocks]
    for device, computes_in, wanted in (
        ("cpu", "fp32", True),
        ("cpu", "bf16", False),
        ("cuda", "bf16", True),
    ):
        kernels.choose_attention(model, torch.device(device), computes_in)
        assert {block.attn.fused_attn for block in blocks} == {wanted}
    assert "softmax" in kernels.table(device=torch.device("cpu"), precision="bf16")[0].used


def test_torchvision_imports_beside_any_torch() -> None:
    program = "from rcmae.process import extensions; print(extensions.guard_torchvision())"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("True", "False")
