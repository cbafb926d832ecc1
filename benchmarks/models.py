"""The five models side by side, at about equal parameters and the same steps on the same bytes.

`python -m benchmarks.models` trains each for a few minutes, writes
benchmarks/results/models-<machine>.json and the table of docs/MODELS.md. Training is timed in
turns: a step on the best backend, one on the reference backend, one of the original package with
the same weights. Memory and the two kinds of sampling are measured in processes of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import hierkernels as hk
from benchmarks.machine import ROOT, commit_info, machine_info, slug
from benchmarks.memory import peak_extra
from benchmarks.suites.training_step import MODELS as ORIGINALS
from python_models.data import Corpus
from python_models.registry import MODELS, NSA_SIZES, continue_bytes
from python_models.training_run import Run, TrainConfig

DOCUMENT = ROOT / "docs" / "MODELS.md"
BEGIN, END = "<!-- compared: {} -->", "<!-- end of compared -->"
WAYS = ("fused", "reference", "original")
TIMED_STEPS = 6  # of each way
PROMPT, SAMPLED = 384, 128  # bytes: given, and sampled after them

# What makes each about as large, over windows of 512 bytes.
OPTIONS: dict[str, tuple[str, ...]] = {
    "megabyte": (),
    "hierarchical": ("dim=96,192", "depth=3"),
    "gmlp-gpt": ("depth=7", "window=16,32,64,16,32,64,128"),
    "nsa": ("dim=192", "depth=3", "seq_len=512"),
    "memformer": ("dim=192", "depth=1,3"),
}


# Bytes that follow a prime (1, N), by the original's own sampling; where it has none, none.
def _sample_gmlp(model: nn.Module, prime: Tensor, count: int) -> None:
    wrapper = importlib.import_module("g_mlp_gpt.autoregressive_wrapper").AutoregressiveWrapper
    wrapper(model).generate(prime, count)


ORIGINAL_SAMPLING: dict[str, Callable[[nn.Module, Tensor, int], Any]] = {
    "megabyte": lambda model, prime, count: model.generate(prime),
    "hierarchical": lambda model, prime, count: model.generate(prime, count),
    "gmlp-gpt": _sample_gmlp,
    "nsa": lambda model, prime, count: model.sample(
        prime, prime.shape[1] + count, use_cache_kv=True
    ),
}


def original_build(model: str) -> Callable[..., nn.Module]:
    """The constructor of the package that a model comes from; it takes our options."""
    if model not in ORIGINALS or model == "memformer":
        raise ValueError("the original is no model of one sequence")
    peer = ORIGINALS[model]
    original = getattr(importlib.import_module(peer.package), peer.name)

    def build(**options: Any) -> nn.Module:
        if model == "nsa":  # the package groups what the attention takes
            del options["seq_len"], options["preset"]
            options["sparse_attn_kwargs"] = {name: options.pop(name) for name in NSA_SIZES}
        return original(**{**options, **peer.variants[0]})

    return build


def make_run(model: str, way: str, steps: int, out: str) -> Run:
    """A training run; all ways begin with the same weights."""
    config = TrainConfig(model=model, option=OPTIONS[model], steps=steps, warmup=50, out=out)
    run = Run(config, MODELS[model].parse(config.option))
    if way == "original":
        entry = MODELS[model]
        module = dataclasses.replace(entry, build=original_build(model)).make(run.options)
        module.load_state_dict(run.module.state_dict())
        MODELS[model] = dataclasses.replace(entry, build=lambda **_: module)
        try:
            run = Run(config, run.options)
        finally:
            MODELS[model] = entry
    return run


def backend_of(way: str) -> str | None:
    return "reference" if way == "reference" else None


def train(model: str, steps: int) -> dict[str, Any]:
    """Seconds of a step in each way, then held-out bits per byte of the fused one's whole run."""
    with tempfile.TemporaryDirectory() as folder:
        runs, failures = {}, {}
        for way in WAYS:
            try:
                runs[way] = make_run(model, way, steps, folder)
                with hk.use_backend(backend_of(way)):
                    runs[way].train_step(_corpus(runs[way]).train)  # loads the code
            except Exception as error:  # the package's errors are of all kinds
                if way != "original":
                    raise
                runs.pop(way, None)
                failures[way] = f"{type(error).__name__}: {error}"
        seconds: dict[str, list[float]] = {way: [] for way in runs}
        corpus = _corpus(runs["fused"])
        for _ in range(TIMED_STEPS):
            for way, run in runs.items():
                with hk.use_backend(backend_of(way)):
                    start = time.perf_counter()
                    run.train_step(corpus.train)
                    seconds[way].append(time.perf_counter() - start)
        run = runs["fused"]
        while run.step < steps:
            run.train_step(corpus.train)
        return {
            "parameters": sum(p.numel() for p in run.module.parameters()),
            "window": run.window,
            "bytes_per_step": run.config.batch_size * run.window,
            "steps": steps,
            "held_out_bits_per_byte": run.evaluate(corpus.held_out),
            "step_seconds": {way: statistics.median(times) for way, times in seconds.items()},
            "failures": failures,
        }


def _corpus(run: Run) -> Corpus:
    return Corpus.open(None, window=run.window)


def memory(model: str, way: str) -> int | None:
    """Peak bytes of a training step beyond the weights, gradients and optimizer's state."""
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(model, way, 10, folder)
        corpus = _corpus(run)
        with hk.use_backend(backend_of(way)):
            run.train_step(corpus.train)
            gc.collect()
            return peak_extra(lambda: run.train_step(corpus.train)[:1], "cpu")


def sample(model: str, way: str) -> float | None:
    """Bytes a second of sampling after a prompt; None where the original cannot."""
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(model, way, 10, folder)
        corpus = _corpus(run)
        prompt, count = bytes(corpus.held_out[:PROMPT]), SAMPLED
        run.module.eval()
        if way == "original":
            if model not in ORIGINAL_SAMPLING:
                return None
            prime = torch.tensor([list(prompt)])
            start = time.perf_counter()
            ORIGINAL_SAMPLING[model](run.module, prime, count)
            return count / (time.perf_counter() - start)
        settings = {
            "window": run.window,
            "filter_thres": 0.9,
            "temperature": 1.0,
            "generator": torch.Generator().manual_seed(0),
        }
        with hk.use_backend(backend_of(way)):
            start = time.perf_counter()
            produced = len(bytes(continue_bytes(run.entry, run.module, prompt, count, **settings)))
            return produced / (time.perf_counter() - start)


def in_process(*arguments: str) -> Any:
    """A measurement in a fresh process; a string that says why, if it fails."""
    command = [sys.executable, "-m", "benchmarks.models", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def compare(steps: int) -> dict[str, Any]:
    """All measurements of all models, with progress on stderr."""
    models = {}
    for model in OPTIONS:
        print(f"{model}: training {steps} steps", file=sys.stderr, flush=True)
        entry = in_process("--train", model, "--steps", str(steps))
        if isinstance(entry, str):
            raise RuntimeError(f"{model}: {entry}")
        for kind in ("memory", "sample"):
            print(f"{model}: {kind}", file=sys.stderr, flush=True)
            entry[kind] = {way: in_process(f"--{kind}", model, "--way", way) for way in WAYS}
        models[model] = entry
    return {"machine": machine_info("cpu"), "commit": commit_info(), "models": models}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: figures of the best backend, and how the others compare."""
    steps = next(iter(result["models"].values()))["steps"]
    lines = [
        f"| model | parameters | bits per byte after {steps} steps | training, kB/s "
        "| against reference | against the original | memory of a step, MiB | reference | original "
        "| sampling, bytes/s | against the original |",
        "|---|" + "---:|" * 10,
    ]
    for name, entry in result["models"].items():
        seconds, peak, rate = entry["step_seconds"], entry["memory"], entry["sample"]
        speed = entry["bytes_per_step"] / seconds["fused"] / 1e3
        cells = [
            f"{entry['parameters'] / 1e6:.2f} M",
            f"{entry['held_out_bits_per_byte']:.3f}",
            f"{speed:.1f}",
            *(_times(seconds.get(way), seconds["fused"]) for way in WAYS[1:]),
            *(_mebibytes(peak[way]) for way in WAYS),
            f"{rate['fused']:.0f}",
            _times(rate["fused"], rate["original"]),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _times(more: Any, less: Any) -> str:
    return f"{more / less:.2f}x" if all(isinstance(x, float) for x in (more, less)) else "-"


def _mebibytes(n: Any) -> str:
    return f"{n / 2**20:.0f}" if isinstance(n, int) else "-"


def updated(text: str, name: str, result: dict[str, Any]) -> str:
    """The document with the table of the result file `name`."""
    start, stop = text.index(BEGIN.split("{}")[0]), text.index(END)
    return f"{text[:start]}{BEGIN.format(name)}\n\n{table(result)}\n\n{text[stop:]}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="of training (default: 300)")
    for kind in ("train", "memory", "sample"):
        parser.add_argument(f"--{kind}", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        print(json.dumps(train(arguments.train, arguments.steps)))
    elif arguments.memory:
        print(json.dumps(memory(arguments.memory, arguments.way)))
    elif arguments.sample:
        print(json.dumps(sample(arguments.sample, arguments.way)))
    else:
        result = compare(arguments.steps)
        name = f"models-{slug(result['machine'])}.json"
        path = ROOT / "benchmarks" / "results" / name
        path.write_text(json.dumps(result, indent=1) + "\n")
        DOCUMENT.write_text(updated(DOCUMENT.read_text(), name, result))
        print(table(result))


if __name__ == "__main__":
    main()
