"""Continues a prompt with a trained model: ``python -m python_models.sample --help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import hierkernels as hk
from python_models import checkpoint
from python_models.arguments import check_device
from python_models.registry import MODELS, continue_bytes


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m python_models.sample",
        description="Continue a prompt with a model that python_models.train has saved.",
    )
    parser.add_argument("--checkpoint", required=True, help="run folder, or a checkpoint in it")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", default="", help="text to continue (default: none)")
    source.add_argument("--prompt-file", type=Path, help="file whose bytes to continue")
    parser.add_argument("--bytes", type=int, default=400, help="how many to add (default: 400)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest (default: 0.8)"
    )
    parser.add_argument(
        "--filter-thres",
        type=float,
        default=0.9,
        help="share of the vocabulary, the least likely part, never drawn (default: 0.9)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="draw only from the likeliest bytes that together have this probability (default: 1)",
    )
    parser.add_argument("--seed", type=int, help="repeatable output (default: a new one)")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda (default: cpu)")
    parser.add_argument(
        "--backend", choices=hk.BACKENDS, help="backend of hierkernels (default: the best there is)"
    )
    return parser


def sample(arguments: argparse.Namespace) -> None:
    """Loads the model and writes the prompt and its continuation, byte by byte, as they come."""
    if arguments.bytes < 0:
        raise ValueError(f"bytes must be at least 0, got {arguments.bytes}")
    prompt = (
        arguments.prompt.encode()
        if arguments.prompt_file is None
        else arguments.prompt_file.read_bytes()
    )
    device = check_device(arguments.device)
    folder = checkpoint.find(arguments.checkpoint)
    state = checkpoint.load_state(folder)
    if state["model"] not in MODELS:
        raise checkpoint.CheckpointError(
            f"checkpoint file {folder / checkpoint.STATE} is of the unknown model "
            f"{state['model']!r}; there are {', '.join(MODELS)}"
        )
    entry = MODELS[state["model"]]
    try:
        module = entry.make(state["options"])
    except (TypeError, ValueError) as error:
        raise checkpoint.CheckpointError(
            f"checkpoint file {folder / checkpoint.STATE} has options that make no "
            f"{state['model']}: {error}"
        ) from error
    checkpoint.load_model(module, checkpoint.load_tensors(folder, state), folder)
    module.to(device).eval()
    generator = torch.Generator(device)
    if arguments.seed is None:
        generator.seed()
    else:
        generator.manual_seed(arguments.seed)
    output = sys.stdout.buffer
    output.write(prompt)
    output.flush()
    with hk.use_backend(arguments.backend):
        for value in continue_bytes(
            entry,
            module,
            prompt,
            arguments.bytes,
            window=entry.window(state["options"]),
            filter_thres=arguments.filter_thres,
            top_p=arguments.top_p,
            temperature=arguments.temperature,
            generator=generator,
        ):
            output.write(bytes([value]))
            output.flush()
    output.write(b"\n")
    output.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    try:
        sample(build_parser().parse_args(arguments))
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
