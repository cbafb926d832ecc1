"""Which backend is chosen, what each refusal says, and that missing parts are no obstacle."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hierkernels as hk
from hierkernels import dispatch
from hierkernels.native import native

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HIERKERNELS_BACKEND", raising=False)


@pytest.fixture
def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = torch.randn(3, 1, 2, 5, 8).unbind()
    return q, k, v


class _Backends:
    """Backends of an op named toy: each refuses with its reasons; calls are recorded."""

    def __init__(self, **reasons: list[str]) -> None:
        self.asked: list[str] = []
        self.reasons = reasons

    def load(self, op: str, backend: str) -> SimpleNamespace:
        assert op == "toy"
        if backend not in self.reasons:
            raise ImportError(f"no module for {backend}")

        def supports(problem: object) -> list[str]:
            self.asked.append(backend)
            return self.reasons[backend]

        return SimpleNamespace(supports=supports)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> _Backends:
    backends = _Backends(cuda=["too old"], triton=["no dtype", "no device"], cpu=[], reference=[])
    monkeypatch.setattr(dispatch, "load_backend", backends.load)
    return backends


CPU = SimpleNamespace(device_type="cpu")
CUDA = SimpleNamespace(device_type="cuda")


def test_argument_beats_context_beats_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.requested_backend(None) == ""
    monkeypatch.setenv("HIERKERNELS_BACKEND", "cuda")
    assert dispatch.requested_backend(None) == "cuda"
    with hk.use_backend("triton"):
        assert dispatch.requested_backend(None) == "triton"
        with hk.use_backend("cpu"):
            assert dispatch.requested_backend(None) == "cpu"
            assert dispatch.requested_backend("reference") == "reference"
        assert dispatch.requested_backend(None) == "triton"
        with hk.use_backend(None):  # the automatic choice, whatever the environment says
            assert dispatch.requested_backend(None) == ""
    assert dispatch.requested_backend(None) == "cuda"
    monkeypatch.setenv("HIERKERNELS_BACKEND", "")
    assert dispatch.requested_backend(None) == ""


def test_context_ends_with_an_exception() -> None:
    with pytest.raises(RuntimeError, match="inside"), hk.use_backend("cpu"):
        raise RuntimeError("inside")
    assert dispatch.requested_backend(None) == ""


def test_automatic_choice_takes_the_first_that_supports(toy: _Backends) -> None:
    choice = dispatch.resolve("toy", CPU)
    assert choice == dispatch.Choice("cpu", {})
    choice = dispatch.resolve("toy", CUDA)
    assert choice.backend == "reference"
    assert choice.refusals == {"cuda": ["too old"], "triton": ["no dtype", "no device"]}
    assert dispatch.resolve("toy", SimpleNamespace(device_type="xpu")).backend == "reference"


def test_triton_comes_before_cuda(toy: _Backends) -> None:
    """Until a committed measurement says otherwise; neither loses if the other refuses."""
    toy.reasons |= {"triton": [], "cuda": []}
    assert dispatch.resolve("toy", CUDA).backend == "triton"
    toy.reasons["triton"] = ["no dtype"]
    assert dispatch.resolve("toy", CUDA).backend == "cuda"


def test_automatic_choice_asks_no_further(toy: _Backends) -> None:
    dispatch.resolve("toy", CPU)
    assert toy.asked == ["cpu"]


def test_the_module_of_the_choice(toy: _Backends, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that supports the call, past those that refuse or cannot be imported."""
    modules = {name: toy.load("toy", name) for name in toy.reasons}

    def load(op: str, backend: str) -> SimpleNamespace:
        if backend not in modules:
            raise ImportError
        return modules[backend]

    monkeypatch.setattr(dispatch, "load_backend", load)
    assert dispatch.module_for("toy", CPU) is modules["cpu"]
    assert toy.asked == ["cpu"]
    assert dispatch.module_for("toy", CUDA) is modules["reference"]
    assert dispatch.module_for("toy", CUDA, "reference") is modules["reference"]
    del modules["triton"]
    assert dispatch.module_for("toy", CUDA) is modules["reference"]
    for name, reason in (("cuda", "too old"), ("triton", "cannot be imported")):
        with pytest.raises(NotImplementedError, match=reason):
            dispatch.module_for("toy", CUDA, name)


def test_forced_backend_never_falls_back(toy: _Backends) -> None:
    assert dispatch.resolve("toy", CPU, "reference").backend == "reference"
    with pytest.raises(NotImplementedError) as raised:
        dispatch.resolve("toy", CPU, "triton")
    assert str(raised.value) == (
        "toy: backend 'triton' does not support this call: no dtype; no device"
    )


def test_backend_that_cannot_be_imported_is_a_refusal(toy: _Backends) -> None:
    del toy.reasons["triton"]
    choice = dispatch.resolve("toy", CUDA)
    assert choice.refusals["triton"] == ["cannot be imported: no module for triton"]
    with pytest.raises(NotImplementedError, match="cannot be imported: no module for triton"):
        dispatch.resolve("toy", CUDA, "triton")


def test_no_backend_at_all_lists_every_reason(toy: _Backends) -> None:
    toy.reasons["reference"] = ["not today"]
    with pytest.raises(NotImplementedError, match=r"no dtype.*no device.*too old.*not today"):
        dispatch.resolve("toy", CUDA)


def test_survey_lists_every_refusal(toy: _Backends) -> None:
    choice = dispatch.survey("toy", CPU)
    assert choice.backend == "cpu"
    assert choice.refusals == {"cuda": ["too old"], "triton": ["no dtype", "no device"]}
    assert str(choice).splitlines() == [
        "backend: cpu", "  cuda: too old", "  triton: no dtype", "  triton: no device",
    ]  # fmt: skip


@pytest.mark.parametrize("bad", ["gpu", "CPU", "", 3, ["cpu"]], ids=repr)
def test_unknown_backend_names(bad: object, qkv: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "backend must be one of cuda, triton, cpu, reference or None, got "
    with pytest.raises(ValueError, match=message):
        hk.attention(*qkv, backend=bad)
    with pytest.raises(ValueError, match=message), hk.use_backend(bad):
        pass
    with pytest.raises(ValueError, match=message):
        hk.explain("attention", *qkv, backend=bad)


def test_unknown_backend_in_the_environment(qkv: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIERKERNELS_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"HIERKERNELS_BACKEND must be one of .* got 'gpu'"):
        hk.attention(*qkv)
    hk.attention(*qkv, backend="reference")  # not looked at


def test_forced_cuda_on_cpu_tensors_is_refused(qkv: tuple) -> None:
    for call in (hk.attention, lambda *args, **kw: hk.explain("attention", *args, **kw)):
        with pytest.raises(NotImplementedError, match="attention: backend 'cuda' does not support"):
            call(*qkv, backend="cuda")
    with (
        hk.use_backend("cuda"),
        pytest.raises(NotImplementedError, match="backend 'cuda' does not support"),
    ):
        hk.attention(*qkv)


def test_explain_names_the_choice_and_refusals(qkv: tuple) -> None:
    choice = hk.explain("attention", *qkv, is_causal=True, return_lse=True)
    assert choice.backend == ("reference" if native() is None else "cpu")
    assert "cuda" in choice.refusals and "reference" not in choice.refusals
    assert all(choice.refusals.values())
    assert hk.explain("attention", *qkv, backend="reference").backend == "reference"
    with hk.use_backend("reference"):
        assert hk.explain("attention", *qkv).backend == "reference"
    with pytest.raises(ValueError, match=r"op must be one of attention, .*got 'attentoin'"):
        hk.explain("attentoin", *qkv)
    with pytest.raises(ValueError, match="q must have 4 dimensions"):
        hk.explain("attention", qkv[0][0], *qkv[1:])


@pytest.mark.parametrize("op", ["attention", "gelu", "layer_norm", "rms_norm", "rotary"])
@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_explain_agrees_with_the_call(op: str, backend: str) -> None:
    x, table = torch.randn(1, 2, 5, 8), torch.randn(5, 4)
    arguments = {
        "attention": (x, x, x), "gelu": (x,), "layer_norm": (x, x[0, 0, 0], x[0, 0, 0]),
        "rms_norm": (x, x[0, 0, 0]), "rotary": (x, table, table),
    }  # fmt: skip

    def refuses(ask: Callable[..., object], **options: str) -> bool:
        try:
            ask(*arguments[op], **options)
        except NotImplementedError:
            return True
        return False

    def explain(*args: torch.Tensor, **options: str) -> object:
        return hk.explain(op, *args, **options)

    call = getattr(hk, op)
    assert refuses(explain, backend=backend) == refuses(call, backend=backend)
    with hk.use_backend(backend):
        assert refuses(explain) == refuses(call)
        if backend == "cuda":  # of the small operators it has no kernels, so others compute them
            assert refuses(call) == (op == "attention")


def test_every_way_to_ask_gives_the_reference(qkv: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    # The reference alone leaves a graph of PyTorch's own operations behind.
    q = qkv[0].requires_grad_()

    def node() -> str:
        return type(hk.attention(q, *qkv[1:]).grad_fn).__name__

    kernel = node()
    with hk.use_backend("reference"):
        plain = node()
    assert plain != kernel
    monkeypatch.setenv("HIERKERNELS_BACKEND", "reference")
    assert node() == plain
    with hk.use_backend(None):
        assert node() == kernel


@pytest.mark.skipif(native() is None, reason="the compiled core is missing")
def test_a_compiled_function_follows_use_backend(qkv: tuple) -> None:
    asked = []

    def record(graph: torch.fx.GraphModule, _: object) -> Callable:
        operator = torch.ops.hierkernels.attention_forward.default
        asked.append([node.args[-1] for node in graph.graph.nodes if node.target is operator])
        return graph.forward

    compiled = torch.compile(lambda q: hk.attention(q, q, q), backend=record, fullgraph=True)
    compiled(qkv[0])
    for name in ("cpu", "reference", "cpu"):
        with hk.use_backend(name):
            compiled(qkv[0])
    assert asked == [[""], ["cpu"], []]  # the reference is no operator; what fits is not made anew


def _python(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("missing", ["triton", "hierkernels._native", "triton hierkernels._native"])
def test_works_without(missing: str) -> None:
    code = f"""
import sys
for name in {missing!r}.split():
    sys.modules[name] = None  # importing it fails
import torch
import hierkernels as hk
q = torch.randn(1, 2, 5, 8, requires_grad=True)
hk.attention(q, q, q).sum().backward()
print(hk.explain("attention", q, q, q))
"""
    found = _python(["-c", code])
    assert found.returncode == 0, found.stderr
    first, *refusals = found.stdout.splitlines()
    if "_native" in missing:
        assert first == "backend: reference"
        assert any(line.startswith("  cpu: the compiled kernels are missing") for line in refusals)
    if "triton" in missing.split():
        assert any(line.startswith("  triton: cannot be imported") for line in refusals)


def test_import_loads_no_kernels() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import hierkernels
new = set(sys.modules) - before
print(*(name for name in new if name.startswith("triton") or name == "hierkernels._native"))
"""
    found = _python(["-c", code])
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == []


def test_info_reports_every_backend() -> None:
    found = _python(["-m", "hierkernels.info"])
    assert found.returncode == 0, found.stderr
    lines = [line.split(maxsplit=1) for line in found.stdout.splitlines() if line.startswith("  ")]
    rows = {name: value for name, value in map(tuple, lines)}
    assert rows["hierkernels"] == hk.__version__ and rows["torch"] == torch.__version__
    assert set(dispatch.BACKENDS) <= set(rows)
    assert rows["reference"].startswith("ready")
    if native() is not None:
        assert native().cpu_isa() in found.stdout
    assert str(ROOT) not in found.stdout  # may be pasted into a report


def test_meta_tensors_have_shapes_alone() -> None:
    """The reference computes shapes; an argument that has memory is named."""
    q = torch.empty(1, 4, 6, 8, device="meta", requires_grad=True)
    k = torch.empty(1, 2, 6, 8, device="meta")
    out = hk.attention(q, k, k, is_causal=True)
    out.sum().backward()
    assert out.is_meta and out.shape == q.grad.shape == q.shape
    with pytest.raises(ValueError, match=r"k must be on the device of q \(meta\), got cpu"):
        hk.attention(q, torch.zeros(1, 2, 6, 8), k)
