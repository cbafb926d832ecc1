"""The GPU benchmark as far as it goes without one: plan, budget, crashes, how rows are called."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F

import hierkernels as hk
from benchmarks.device import __main__ as command
from benchmarks.device import cases
from benchmarks.device.schedule import Budget, NoWorker, Process, Run, WorkerFailed
from benchmarks.suites import attention as attention_suite

BF16 = torch.bfloat16
TINY = {entry.name: entry for entry in cases.tiny_entries()}
ATTENTION = [name for name in TINY if name.startswith("attention/")]


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeWorker:
    """Each group takes `seconds`; a group whose "entry direction" is in `crashes` needs no cuda."""

    hello: ClassVar[dict[str, Any]] = {
        "machine_info": {"device": "x"},
        "roof": {"flops": {"bfloat16": 1.0}},
    }

    def __init__(self, clock: FakeClock, seconds: float, crashes: tuple[str, ...] = ()) -> None:
        self.clock, self.seconds, self.crashes = clock, seconds, crashes
        self.asked: list[tuple[str, str, tuple[str, ...]]] = []
        self.closed = False

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        self.asked.append((request["entry"], request["direction"], tuple(request["rows"])))
        self.clock.now += self.seconds
        if (
            f"{request['entry']} {request['direction']}" in self.crashes
            and "cuda" in request["rows"]
        ):
            raise WorkerFailed("the process ended with status -11")
        stats = {"median": 1e-3}
        records = [{"extra_info": {"row": row}, "stats": stats} for row in request["rows"]]
        return {
            "records": records,
            "skipped": {},
            "failed": {},
            "roof": {"flops": {"bfloat16": 2.0}, "memory": {"64": 3.0}},
        }

    def close(self) -> None:
        self.closed = True


def _entries(*seconds: float) -> list[cases.Entry]:
    """Entries of these estimates, with other names."""
    made = []
    for i, estimate in enumerate(seconds):
        made.append(
            cases.Entry(
                cases.ATTENTION, cases.causal(64 * (i + 1), 64), ("cuda", "flash"), estimate
            )
        )
    return made


def _run(
    clock: FakeClock, worker: FakeWorker, total: float, entries: list[cases.Entry]
) -> tuple[Any, list[int]]:
    saved: list[int] = []
    run = Run(
        lambda: worker,
        Budget(total, clock),
        0.5,
        lambda line: None,
        lambda outcome: saved.append(len(outcome.records)),
    )
    return run.run(entries), saved


# ---- budget ----


def test_everything_is_measured_if_there_is_time() -> None:
    clock = FakeClock()
    worker = FakeWorker(clock, 5)
    outcome, saved = _run(clock, worker, 60, _entries(20, 20))
    assert [(a[0][-7:], a[1]) for a in worker.asked] == [
        ("x64-kv8", "forward"), ("x64-kv8", "backward"),
        ("x64-kv8", "forward"), ("x64-kv8", "backward"),
    ]  # fmt: skip
    assert outcome.left_out == [] and outcome.failed == {}
    assert saved == [2, 4, 6, 8]  # after each group
    assert outcome.roof == {"flops": {"bfloat16": 2.0}, "memory": {"64": 3.0}}
    assert worker.closed


def test_a_group_that_does_not_fit_is_left_out_and_a_shorter_one_still_measured() -> None:
    clock = FakeClock()
    worker = FakeWorker(clock, 10)
    outcome, _ = _run(clock, worker, 45, _entries(20, 60, 20))
    names = [entry.name for entry in _entries(20, 60, 20)]
    assert outcome.left_out == [f"{names[1]} forward", f"{names[1]} backward"]
    assert [a[0] for a in worker.asked] == [names[0], names[0], names[2], names[2]]


def test_slowness_is_expected_of_later_groups() -> None:
    """Groups take twice their estimates: the last is not begun although its estimate would fit."""
    clock = FakeClock()
    worker = FakeWorker(clock, 20)
    outcome, _ = _run(clock, worker, 55, _entries(20, 20))
    assert len(worker.asked) == 2 and len(outcome.left_out) == 2
    budget = Budget(100, clock)
    assert budget.slowness == 1
    budget.spent(10, 5)
    assert budget.slowness == 1  # quick ones promise nothing
    budget.spent(10, 55)
    assert budget.slowness == 3
    assert budget.allows(33) and not budget.allows(34)


# ---- crashes ----


def test_after_a_crash_the_group_is_measured_without_our_kernels() -> None:
    clock = FakeClock()
    entries = _entries(20)
    workers: list[FakeWorker] = []

    def start() -> FakeWorker:
        workers.append(FakeWorker(clock, 1, crashes=(f"{entries[0].name} forward",)))
        return workers[-1]

    run = Run(start, Budget(60, clock), 0.5, lambda line: None, lambda outcome: None)
    outcome = run.run(entries)
    assert len(workers) == 2  # a new process after the crash
    assert outcome.failed == {
        f"{entries[0].name} forward cuda": "the process ended with status -11"
    }
    rows = [r["extra_info"]["row"] for r in outcome.records]
    assert rows == ["flash", "cuda", "flash"]  # forward, backward


def test_a_gpu_that_starts_no_worker_ends_the_run() -> None:
    def start() -> FakeWorker:
        raise WorkerFailed("the process ended with status 1")

    run = Run(start, Budget(60), 0.5, lambda line: None, lambda outcome: None)
    with pytest.raises(NoWorker, match="status 1"):
        run.run(_entries(1))


def test_a_worker_measures_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The whole command on the CPU: peers that run there are timed, the others say why not."""
    path = tmp_path / "result.json"
    assert command.main(["--device", "cpu", "--tiny", "-k", "sgu", "--output", str(path)]) == 0
    data = json.loads(path.read_text())
    info = [r["extra_info"] for r in data["benchmarks"]]
    assert {(i["row"], i["direction"]) for i in info} == {
        (row, direction) for row in ("eager", "dense") for direction in ("forward", "backward")
    }
    assert data["failed"] == {} and len(data["skipped"]) == 4
    assert all("roof_share" in i and i["flops"] > 0 for i in info)
    worker = Process(["--device", "cpu", "--tiny"])
    worker.process.kill()
    with pytest.raises(WorkerFailed):
        worker.ask({"entry": "", "direction": "", "rows": [], "seconds": 0.1}, 5)


# ---- the plan ----


def test_dry_run_lists_all_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum(len(entry.directions) for entry in cases.entries()) + 1
    assert "if time is left" not in "".join(lines)  # by the estimates, ten minutes are enough
    for n in (2048, 4096, 8192, 16384, 32768):
        for d in (64, 128):
            (line, _) = [text for text in lines if f"long-1x64x{n}x{d}-kv8" in text]
            assert "cuda triton cudnn flash" in line
    decoding = [text for text in lines if "decoding-" in text]
    assert len(decoding) == 6 and all(" forward " in text for text in decoding)
    assert command.main(["--dry-run", "--minutes", "1"]) == 0
    assert "if time is left" in capsys.readouterr().out


def test_work_of_decoding() -> None:
    """Each head meets all keys; of a window's cache, what it does not see is not read."""
    (case,) = (e.case for e in cases.entries() if "decoding-16x8x65536x128" in e.name)
    assert case.flops() == 4 * 16 * 8 * 65536 * 128
    cache, ends = 2 * 2 * 16 * 65536 * 128, 16 * 8 * (2 * 2 * 128 + 4)
    assert case.bytes(BF16) == cache + ends
    window = replace(case, window=(511, None))
    assert window.flops() == case.flops() / 128
    assert window.bytes(BF16) == cache // 128 + ends
    assert window.bytes(BF16, "backward") == cache // 128 + cache + ends + 16 * 8 * 2 * 2 * 128


def test_no_such_entry(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["-k", "nothing like this"]) == 1
    assert "nothing like this" in capsys.readouterr().err


def test_entries_have_names_of_their_own() -> None:
    names = [entry.name for entry in cases.entries()]
    assert len(set(names)) == len(names)


# ---- rows ----


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that SDPA is held to, which the CPU does not have, by name."""
    seen: list[str] = []

    @contextlib.contextmanager
    def held_to(kernel: Any) -> Iterator[None]:
        seen.append(kernel.name)
        yield

    monkeypatch.setattr("torch.nn.attention.sdpa_kernel", held_to)
    return seen


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("row", ["reference", "cudnn", "flash", "flex"])
def test_rows_of_attention(
    name: str, row: str, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = TINY[name]
    if row in ("cudnn", "flash") and entry.case.window:
        pytest.skip("these kernels are not given masks")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    problem = entry.suite.problem(entry.case, BF16, "cpu")
    for candidate in entry.suite.candidates(row, problem.inputs, "forward"):
        problem.check(candidate, "forward")
        if row != "flex" and "backward" in entry.directions:  # flex has none on the CPU
            problem.check(candidate, "backward")
    if row in ("cudnn", "flash"):
        assert set(kernels) == {f"{row.upper()}_ATTENTION"}
        candidates = 3 if entry.case.Hq != entry.case.Hkv else 2
        assert len(kernels) == candidates * len(entry.directions)


def test_decoding_is_judged_on_some_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one among them; a wrong result of one that is judged is found."""
    (entry,) = (e for e in TINY.values() if "decoding" in e.name)
    monkeypatch.setattr(attention_suite, "CHECK_SCORES", entry.case.Hq * entry.case.Nk * 2)
    problem = entry.suite.problem(entry.case, BF16, "cpu")
    assert problem.judged == slice(0, None, 2)
    (candidate,) = entry.suite.candidates("reference", problem.inputs, "forward")
    problem.check(candidate, "forward")

    def wrong(inputs: Any) -> torch.Tensor:
        out = candidate.function(inputs)
        out[2, 1, 0, 5] += 0.1
        return out

    with pytest.raises(AssertionError):
        problem.check(replace(candidate, function=wrong), "forward")


def test_sdpa_is_called_with_the_causal_flag_and_groups(
    kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = TINY[ATTENTION[0]]
    calls: list[dict[str, Any]] = []

    def sdpa(q: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        calls.append(options)
        return q

    inputs = entry.suite.inputs(entry.case, BF16, "cpu")
    candidates = list(entry.suite.candidates("cudnn", inputs, "forward"))
    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    for candidate in candidates:
        candidate.function(candidate.inputs)
    assert [c["is_causal"] for c in calls] == [True, True, True]
    assert [c.get("enable_gqa") for c in calls] == [True, True, None]
    assert all(c.get("attn_mask") is None for c in calls)


@pytest.mark.parametrize("row", ["reference", "eager", "dense"])
def test_rows_of_the_gating_unit(row: str) -> None:
    (entry,) = (e for e in TINY.values() if e.suite is cases.SGU)
    problem = entry.suite.problem(entry.case, BF16, "cpu")
    for candidate in entry.suite.candidates(row, problem.inputs, "forward"):
        for direction in ("forward", "backward"):
            problem.check(candidate, direction)
            assert problem.bind(candidate, direction)()


@pytest.mark.parametrize("row", ["reference", "fla"])
def test_rows_of_selected_attention(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fla's function is stood in for by one of the same signature and layout."""
    (entry,) = (e for e in TINY.values() if e.suite is cases.SELECTED)

    def parallel_nsa(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, block_indices: torch.Tensor,
        block_counts: int, block_size: int, scale: float,
    ) -> torch.Tensor:  # fmt: skip
        assert block_counts == block_indices.shape[-1] and block_indices.is_contiguous()
        assert all(t.is_contiguous() for t in (q, k, v))  # nothing is copied within the timing
        out = hk.selected_attention(
            *(t.transpose(1, 2) for t in (q, k, v, block_indices)), block_size=block_size,
            scale=scale, backend="reference",
        )  # fmt: skip
        return out.transpose(1, 2)

    module = ModuleType("fla.ops.nsa.parallel")
    module.parallel_nsa = parallel_nsa  # type: ignore[attr-defined]
    for name in ("fla", "fla.ops", "fla.ops.nsa"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.nsa.parallel", module)
    problem = entry.suite.problem(entry.case, BF16, "cpu")
    for candidate in entry.suite.candidates(row, problem.inputs, "forward"):
        problem.check(candidate, "forward")
        problem.check(candidate, "backward")


def test_rows_of_native_sparse_attention() -> None:
    (entry,) = (e for e in TINY.values() if e.suite is cases.NSA)
    problem = entry.suite.problem(entry.case, BF16, "cpu")
    (candidate,) = entry.suite.candidates("reference", problem.inputs, "forward")
    for direction in ("forward", "backward"):
        errors = problem.check(candidate, direction)
        assert ("dq" in errors) == (direction == "backward")
        assert problem.bind(candidate, direction)()
