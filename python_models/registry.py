"""The models that train and sample know, one entry each."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from python_models.autoregressive_wrapper import AutoregressiveWrapper, next_token_loss
from python_models.gmlp_gpt import gMLPGPT
from python_models.hierarchical_transformer import HierarchicalTransformer
from python_models.megabyte import MEGABYTE
from python_models.memformer_language_model import MemformerLanguageModel
from python_models.nsa_transformer import PAPER_SPARSE_ATTN_KWARGS
from python_models.nsa_transformer import Transformer as NSATransformer
from python_models.pretrained import tuples

# Sizes: for a test of seconds, for two CPU cores and minutes, and those of the paper.
PRESETS = ("tiny", "small", "paper")


@dataclass(frozen=True)
class ByteModel:
    """How to use one class of models on bytes.

    Attributes:
        build: makes the module from its options.
        options: constructor arguments that may be set, with their values in the preset "small".
        tiny, paper: what the other presets change of them.
        window: bytes of a training example, given the options.
        loss: mean nats a byte of int64 ``ids (B, window)``, a differentiable scalar.
        generate: yields the bytes ``(B,)`` that follow ``prime (B, N)``, up to window in all; takes
            ``filter_thres``, ``top_p``, ``temperature`` and ``generator``.
    """

    build: Callable[..., nn.Module]
    options: Mapping[str, Any]
    tiny: Mapping[str, Any]
    paper: Mapping[str, Any]
    window: Callable[[Mapping[str, Any]], int]
    loss: Callable[[nn.Module, Tensor], Tensor]
    generate: Callable[..., Generator[Tensor, None, None]]

    def make(self, options: Mapping[str, Any]) -> nn.Module:
        """The module for options that may come from JSON, where tuples have become lists."""
        unknown = set(options) - set(self.options)
        if unknown:
            raise ValueError(
                f"unknown option {sorted(unknown)[0]!r}; there are {', '.join(self.options)}"
            )
        return self.build(**{name: tuples(value) for name, value in options.items()})

    def parse(self, settings: Sequence[str], preset: str = "small") -> dict[str, Any]:
        """A preset's options, changed by settings such as ``dim=384,256`` or ``rel_pos=false``."""
        changes = {"tiny": self.tiny, "small": {}, "paper": self.paper}
        options = {**self.options, **changes[preset]}
        for setting in settings:
            name, equals, text = setting.partition("=")
            if not equals:
                raise ValueError(f"option {setting!r} must have the form name=value")
            if name not in options:
                raise ValueError(f"unknown option {name!r}; there are {', '.join(options)}")
            try:
                value = json.loads(f"[{text}]")
            except json.JSONDecodeError:
                raise ValueError(
                    f"option {name}: {text!r} is not a number, true, false, or numbers with commas"
                ) from None
            is_tuple = isinstance(options[name], tuple)
            if len(value) != 1 and not is_tuple:
                raise ValueError(f"option {name} takes one value, got {text!r}")
            options[name] = tuples(value if is_tuple else value[0])
        return options


def _generate(
    model: MEGABYTE | MemformerLanguageModel, prime: Tensor, **settings: Any
) -> Generator[Tensor, None, None]:
    return model.generate_tokens(prime, **settings)


# Some models have no token to begin with: this one, which is no byte, stands before the first.
_START = 256


def _with_start(ids: Tensor) -> Tensor:
    return F.pad(ids, (1, 0), value=_START)


def _generate_gmlp_gpt(
    model: gMLPGPT, prime: Tensor, **settings: Any
) -> Generator[Tensor, None, None]:
    count = model.seq_len - prime.shape[1]
    return AutoregressiveWrapper(model).generate_tokens(_with_start(prime), count, **settings)


def _hierarchical_loss(model: HierarchicalTransformer, ids: Tensor) -> Tensor:
    """The value is that of predicting bytes, the gradient that of the total."""
    total, (next_token, *_) = model(_with_start(ids), return_loss=True)
    others = total - next_token
    return next_token + (others - others.detach())


def _generate_hierarchical(
    model: HierarchicalTransformer, prime: Tensor, **settings: Any
) -> Generator[Tensor, None, None]:
    count = model.seq_len - prime.shape[1]
    return model.generate_tokens(_with_start(prime), count, **settings)


NSA_SIZES = (
    "sliding_window_size",
    "compress_block_size",
    "compress_block_sliding_stride",
    "selection_block_size",
    "num_selected_blocks",
)


def _build_nsa(*, seq_len: int, **options: Any) -> NSATransformer:
    """seq_len is the window; the model itself reads any length."""
    sizes = {name: options.pop(name) for name in NSA_SIZES}
    model = NSATransformer(**options, sparse_attn_kwargs=sizes)
    model.seq_len = seq_len
    return model


def _generate_nsa(
    model: NSATransformer, prime: Tensor, **settings: Any
) -> Generator[Tensor, None, None]:
    count = model.seq_len - prime.shape[1]
    return model.sample_tokens(_with_start(prime), count, **settings)


MODELS: dict[str, ByteModel] = {
    "megabyte": ByteModel(
        build=MEGABYTE,
        options={
            # 256 bytes and, as padding, a token that is no byte: the loss skips padding.
            "num_tokens": 257,
            "pad_id": 256,
            "dim": (256, 128),
            "depth": (3, 3),
            "max_seq_len": (64, 8),
            "dim_head": 64,
            "heads": 4,
            "attn_dropout": 0.0,
            "ff_mult": 4,
            "ff_dropout": 0.0,
            "rel_pos": True,
            "pos_emb": False,
        },
        tiny={"dim": (64, 32), "depth": (1, 1), "max_seq_len": (16, 4), "heads": 2, "dim_head": 32},
        # The one of 758 M and 262 M parameters (Yu et al., 2023, table 11).
        paper={"dim": (2048, 1024), "depth": (14, 18), "max_seq_len": (1024, 8), "heads": 16},
        window=lambda options: prod(options["max_seq_len"]),
        loss=lambda model, ids: model(ids, return_loss=True),
        generate=_generate,
    ),
    "gmlp-gpt": ByteModel(
        build=gMLPGPT,
        options={
            "num_tokens": 257,
            "dim": 256,
            "depth": 6,
            "seq_len": 512,
            "heads": 4,
            "ff_mult": 4,
            "prob_survival": 1.0,
            "reversible": False,
            "window": (16, 32, 64, 16, 32, 64),
            "attn_dim": 32,
        },
        tiny={"dim": 64, "depth": 2, "seq_len": 64, "window": (16, 32), "attn_dim": 16},
        # aMLP-base of 48 layers (Liu et al., 2021, table 6), over a window of bytes.
        paper={"dim": 512, "depth": 48, "ff_mult": 6, "heads": 1, "window": None, "attn_dim": 64},
        window=lambda options: options["seq_len"],
        loss=lambda model, ids: next_token_loss(model, _with_start(ids)),
        generate=_generate_gmlp_gpt,
    ),
    "hierarchical": ByteModel(
        build=HierarchicalTransformer,
        options={
            "num_tokens": 257,
            # The start token, which is never predicted.
            "ignore_index": _START,
            "dim": (128, 256),
            "depth": 4,
            "seq_len": 512,
            "dim_head": (32, 64),
            "heads": (4, 4),
            "ff_mult": (4, 4),
            "hierarchies": (1, 4),
            "window_sizes": (64, None),
            "hierarchical_stride": (1, 1),
            "hierarchy_merge_all": False,
            "predict_hierarchy": 1,
            "predict_use_all_hierarchy": False,
            "recon_loss_weight": 0.1,
            "hierarchical_ar_loss_weight": 0.25,
        },
        tiny={
            "dim": (32, 48),
            "depth": 1,
            "seq_len": 64,
            "dim_head": (16, 24),
            "heads": (2, 2),
            "window_sizes": (16, None),
        },
        # No paper has this model: four hierarchies, each twice as wide as the one before.
        paper={
            "dim": (128, 256, 512, 1024),
            "depth": 8,
            "seq_len": 1024,
            "dim_head": (16, 32, 64, 64),
            "heads": (2, 4, 8, 8),
            "ff_mult": (2, 2, 4, 4),
            "hierarchies": (1, 2, 4, 16),
            "window_sizes": (16, 32, 64, None),
            "hierarchical_stride": (1, 1, 1, 8),
        },
        window=lambda options: options["seq_len"],
        loss=_hierarchical_loss,
        generate=_generate_hierarchical,
    ),
    "memformer": ByteModel(
        build=MemformerLanguageModel,
        options={
            "num_tokens": 256,
            "dim": 256,
            "depth": (2, 4),
            "heads": 4,
            "segment_len": 128,
            "segments": 4,
            "num_memory_slots": 32,
            "num_mem_updates": 1,
            "replay": False,
        },
        tiny={"dim": 64, "depth": (1, 1), "heads": 2, "segment_len": 16, "num_memory_slots": 8},
        # The size of the paper's experiments: a deep decoder, many slots, long sequences.
        paper={
            "dim": 512,
            "depth": (4, 16),
            "heads": 8,
            "segments": 16,
            "num_memory_slots": 1024,
            "replay": True,
        },
        window=lambda options: options["segment_len"] * options["segments"],
        loss=lambda model, ids: model(ids, return_loss=True),
        generate=_generate,
    ),
    "nsa": ByteModel(
        build=_build_nsa,
        options={
            "num_tokens": 257,
            "dim": 256,
            "depth": 6,
            "seq_len": 1024,
            "dim_head": 32,
            "heads": 8,
            "kv_heads": 2,
            "ff_expansion_factor": 4.0,
            "use_sparse_attn": True,
            "preset": "seed",
            "sliding_window_size": 64,
            "compress_block_size": 16,
            "compress_block_sliding_stride": 8,
            "selection_block_size": 16,
            "num_selected_blocks": 4,
        },
        tiny={
            "dim": 64,
            "depth": 2,
            "seq_len": 64,
            "dim_head": 16,
            "heads": 4,
            "sliding_window_size": 16,
            "compress_block_size": 8,
            "compress_block_sliding_stride": 4,
            "selection_block_size": 8,
            "num_selected_blocks": 2,
        },
        # Yuan et al., 2025, section 4.1: the attention of its 27 B model, one feed-forward layer
        # in the place of experts.
        paper={
            "dim": 2560,
            "depth": 30,
            "seq_len": 8192,
            "dim_head": 128,
            "heads": 64,
            "kv_heads": 4,
            "preset": "paper",
            **PAPER_SPARSE_ATTN_KWARGS,
        },
        window=lambda options: options["seq_len"],
        loss=lambda model, ids: model(_with_start(ids), return_loss=True),
        generate=_generate_nsa,
    ),
}


def continue_bytes(
    entry: ByteModel,
    model: nn.Module,
    prompt: bytes,
    count: int,
    *,
    window: int,
    **settings: Any,
) -> Iterator[int]:
    """Yields ``count`` bytes that follow the prompt, drawn by ``entry.generate(**settings)``.

    Where the model's window is full, it begins again with the last half of it as the prompt.
    """
    device = next(model.parameters()).device
    text = bytearray(prompt)
    produced = 0
    while produced < count:
        if len(text) >= window:
            del text[: len(text) - window // 2]
        prime = torch.tensor([list(text)], dtype=torch.long, device=device).reshape(1, -1)
        tokens = entry.generate(model, prime, **settings)
        for token in tokens:
            value = int(token)
            if value > 255:  # padding is a token too, and drawn very seldom
                continue
            text.append(value)
            produced += 1
            yield value
            if produced == count:
                break
        tokens.close()
