"""HierarchicalTransformer: parallel streams of compressed tokens, merged after every layer.

Nawrot et al., "Hierarchical Transformers Are More Efficient Language Models" (Hourglass), 2021,
with the compression by causal convolutions instead of pooling, and the streams side by side.

Each hierarchy reads the sequence as tokens of which each one compresses the last c tokens up to its
own place, every s-th place (c is its factor, s its stride). Layers run in all hierarchies; after
each layer, what they say is merged into the one that predicts the next token, or into all. Within
a hierarchy a token attends the tokens c places apart, those that compress disjoint stretches.

Shapes: B batch, N tokens of the sequence, M = ceil(N / s) tokens of a hierarchy, C its channels,
H heads, D head channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn

from python_models.arguments import check_integer, check_token_type, check_token_values
from python_models.hierarchical_config import make_hierarchies
from python_models.hierarchical_decoder import Decoder
from python_models.hierarchical_layers import (
    Compress,
    HierarchicalBlock,
    HierarchicalMerge,
    cosine_loss,
    cross_entropy,
)
from python_models.layers import LayerNorm, Linear
from python_models.pretrained import Pretrained
from python_models.sampling import (
    Recomputation,
    WindowReader,
    chooser,
    collect,
    draw_tokens,
)


class HierarchicalTransformer(Pretrained, nn.Module):
    """Autoregressive model of tokens with several hierarchies of compressed tokens.

    Arguments of which each hierarchy has its own are one value for all or a tuple of one each.

    Args:
        num_tokens: size V of the vocabulary.
        dim: channels C; the token embedding has as many as the widest hierarchy.
        depth: number of layers.
        seq_len: longest sequence.
        dim_head, heads, ff_mult: channels and number of heads, expansion of the feed-forward.
        hierarchies: the factors c, different powers of two; 1 is the tokens as they are.
        window_sizes: None attends to everything before, 0 has no attention, w sees w tokens of the
            hierarchy before its own; more than ``seq_len // c`` is None.
        hierarchical_stride: s, powers of two up to c.
        hierarchy_merge_all: merge into every hierarchy and not only the one that predicts.
        predict_hierarchy: the factor of the hierarchy that predicts, the least one by default; its
            stride must be 1 unless hierarchy_merge_all.
        predict_use_all_hierarchy: predict from all hierarchies together.
        recon_loss_weight: of the loss that compressed tokens predict the tokens they are made of;
            with 0 there is none, nor its weights.
        hierarchical_ar_loss_weight: of the loss that each compressed token predicts the next one.
        ignore_index: token that the losses skip as a target.
        use_flash_attn: accepted so that existing code runs; it never changes the result.
        upstream_quirks: as in simple-hierarchical-transformer 0.2.0: reconstruction skips token 0
            whatever ignore_index is; the loss of compressed tokens is NaN if there is only one;
            with predict_use_all_hierarchy and strides above 1 everywhere, tokens behind the last
            one have logits.

    The state dict is that of simple-hierarchical-transformer 0.2.0, whatever the flags.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int | tuple[int, ...],
        depth: int,
        seq_len: int = 2048,
        dim_head: int | tuple[int, ...] = 64,
        heads: int | tuple[int, ...] = 8,
        ff_mult: float | tuple[float, ...] = 4,
        hierarchies: int | tuple[int, ...] = 1,
        window_sizes: int | tuple[int | None, ...] | None = None,
        hierarchical_stride: int | tuple[int, ...] = 1,
        hierarchy_merge_all: bool = False,
        predict_hierarchy: int | None = None,
        predict_use_all_hierarchy: bool = False,
        recon_loss_weight: float = 0.1,
        hierarchical_ar_loss_weight: float = 0.25,
        ignore_index: int = 0,
        use_flash_attn: bool = False,
        upstream_quirks: bool = False,
    ) -> None:
        super().__init__()
        check_integer("num_tokens", num_tokens, minimum=1)
        check_integer("depth", depth, minimum=0)
        check_integer("seq_len", seq_len, minimum=1)
        self.hierarchies = make_hierarchies(
            seq_len=seq_len,
            hierarchies=hierarchies,
            hierarchical_stride=hierarchical_stride,
            dim=dim,
            window_sizes=window_sizes,
            dim_head=dim_head,
            heads=heads,
            ff_mult=ff_mult,
        )
        factors = [h.factor for h in self.hierarchies]
        if predict_hierarchy is None:
            predict_hierarchy = min(factors)
        if predict_hierarchy not in factors:
            raise ValueError(
                f"predict_hierarchy must be one of hierarchies = {tuple(factors)}, "
                f"got {predict_hierarchy!r}"
            )
        self.predict_index = factors.index(predict_hierarchy)
        predicting = self.hierarchies[self.predict_index]
        if predicting.stride != 1 and not hierarchy_merge_all:
            raise ValueError(
                "hierarchical_stride of the hierarchy that predicts must be 1 unless "
                f"hierarchy_merge_all=True, got {predicting.stride}"
            )
        for name, weight in (
            ("recon_loss_weight", recon_loss_weight),
            ("hierarchical_ar_loss_weight", hierarchical_ar_loss_weight),
        ):
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{name} must be 0 or more, got {weight}")
        if type(ignore_index) is not int:
            raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")

        self.num_tokens = num_tokens
        self.seq_len = seq_len
        self.merge_all = hierarchy_merge_all
        self.predict_all = predict_use_all_hierarchy
        self.recon_loss_weight = recon_loss_weight
        self.hierarchical_ar_loss_weight = hierarchical_ar_loss_weight
        self.ignore_index = ignore_index
        self.upstream_quirks = upstream_quirks
        self.dims = [h.dim for h in self.hierarchies]
        self.strides = [h.stride for h in self.hierarchies]

        self.token_emb = nn.Embedding(num_tokens, max(self.dims))
        self.to_hierarchical_preds = nn.ModuleList(
            Linear(h.dim, h.dim) if h.factor > 1 else None for h in self.hierarchies
        )
        self.compressors = nn.ModuleList(
            Compress(h, max(self.dims), num_tokens, recon_loss_weight > 0) for h in self.hierarchies
        )
        self.post_token_emb_norms = nn.ModuleList(
            LayerNorm(c, enters_product=False) for c in self.dims
        )
        self.layers = nn.ModuleList()
        self.hierarchical_merges = nn.ModuleList()
        for _ in range(depth):
            self.layers.append(nn.ModuleList(map(HierarchicalBlock, self.hierarchies)))
            if len(self.dims) > 1:
                dim_out = sum(self.dims) if hierarchy_merge_all else predicting.dim
                self.hierarchical_merges.append(HierarchicalMerge(sum(self.dims), dim_out))
        self.norms = nn.ModuleList(LayerNorm(c, enters_product=False) for c in self.dims)
        dim_logits = sum(self.dims) if predict_use_all_hierarchy else predicting.dim
        self.to_logits = Linear(dim_logits, num_tokens, bias=False)

    def forward(
        self,
        ids: Tensor,
        return_loss: bool = False,
        return_hierarchical_token_embeds: bool = False,
        return_hierarchical_embeds: bool = False,
        ablate_hierarchical_merge: bool = False,
    ) -> Any:
        """Logits of the token after each of the integer tokens ``ids (B, N)``, or the loss.

        Args:
            ids: from 1 to seq_len tokens a sequence; for the loss one more, which is only
                predicted.
            return_loss: the loss of predicting ``ids[:, 1:]``, in nats a token, and its parts.
            return_hierarchical_token_embeds: the list of the compressed tokens, before the layers.
            return_hierarchical_embeds: the list of what the layers make of them, normalised.
            ablate_hierarchical_merge: run the layers without merging.

        Returns:
            Logits ``(B, N, V)``; if the hierarchy that predicts has a stride s above 1, those of
            every s-th place, ``(B, ceil(N / s), V)``. With return_loss
            ``(total, (next_token, reconstruction, next_compressed))``, scalars. The lists have
            ``(B, M, C)`` for each hierarchy.

        Raises:
            TypeError, ValueError: ids are not integers, or of a shape, a device or a value that the
                model does not know; a loss of predictions that skip places.
        """
        self.check_tokens("ids", ids)
        extra = int(return_loss)
        if not 1 <= ids.shape[1] - extra <= self.seq_len:
            raise ValueError(
                f"ids must have from {1 + extra} to {self.seq_len + extra} tokens a sequence "
                f"(seq_len = {self.seq_len}), got shape {tuple(ids.shape)}"
            )
        ids = ids.long()
        inputs = ids[:, :-1] if return_loss else ids
        tokens = self.compress(self.token_emb(inputs))
        if return_hierarchical_token_embeds:
            return tokens
        tokens = self.run_layers(tokens, self.layers, merge=not ablate_hierarchical_merge)
        embeds = [norm(t) for norm, t in zip(self.norms, tokens, strict=True)]
        if return_hierarchical_embeds:
            return embeds
        logits = self.to_logits(self._predicting(embeds, inputs.shape[1]))
        return self._losses(logits, embeds, ids) if return_loss else logits

    def compress(self, x: Tensor) -> list[Tensor]:
        """The tokens of each hierarchy, of embeddings ``(B, N, C0)``."""
        parts = zip(self.compressors, self.post_token_emb_norms, strict=True)
        return [norm(compress(x)) for compress, norm in parts]

    def run_layers(
        self,
        tokens: list[Tensor],
        layers: Sequence[Sequence[Callable[[Tensor], Tensor]]],
        *,
        merge: bool,
    ) -> list[Tensor]:
        """Runs layers, each with a function a hierarchy, and merges after each one."""
        for index, layer in enumerate(layers):
            tokens = [block(t) for block, t in zip(layer, tokens, strict=True)]
            if merge and len(tokens) > 1:
                merged = self.hierarchical_merges[index](side_by_side(tokens, self.strides))
                tokens = self.add_merged(tokens, merged)
        return tokens

    def add_merged(self, tokens: list[Tensor], merged: Tensor) -> list[Tensor]:
        """Adds what was merged, ``(B, N, C')``, to the tokens that it is meant for."""
        if not self.merge_all:
            tokens = list(tokens)
            tokens[self.predict_index] = tokens[self.predict_index] + merged
            return tokens
        parts = zip(tokens, merged.split(self.dims, dim=-1), self.strides, strict=True)
        return [t + part[:, ::stride] for t, part, stride in parts]

    def _predicting(self, embeds: list[Tensor], length: int) -> Tensor:
        if not self.predict_all:
            return embeds[self.predict_index]
        together = side_by_side(embeds, self.strides)
        return together if self.upstream_quirks else together[:, :length]

    def _losses(
        self, logits: Tensor, embeds: list[Tensor], ids: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        inputs, labels = ids[:, :-1], ids[:, 1:]
        if logits.shape[1] != labels.shape[1]:
            raise ValueError(
                f"return_loss needs a prediction at each of {labels.shape[1]} places, but strides "
                f"{tuple(self.strides)} predict at {logits.shape[1]}: choose a predict_hierarchy "
                "of stride 1, or predict_use_all_hierarchy with upstream_quirks=False"
            )
        next_token = cross_entropy(logits.flatten(0, 1), labels, self.ignore_index)
        recon = next_compressed = logits.new_zeros((), dtype=next_token.dtype)
        skipped = 0 if self.upstream_quirks else self.ignore_index
        for compress, predict, h in zip(
            self.compressors, self.to_hierarchical_preds, embeds, strict=True
        ):
            if predict is None:
                continue
            recon = recon + compress.reconstruction_loss(h, inputs, skipped)
            if h.shape[1] > 1 or self.upstream_quirks:
                next_compressed = next_compressed + cosine_loss(predict(h)[:, :-1], h[:, 1:])
        total = (
            next_token
            + recon * self.recon_loss_weight
            + next_compressed * self.hierarchical_ar_loss_weight
        )
        return total, (next_token, recon, next_compressed)

    def decoder(self, *, ablate_hierarchical_merge: bool = False) -> Decoder:
        """Evaluates the model on a sequence that grows, at the cost of the new tokens only."""
        return Decoder(self, merge=not ablate_hierarchical_merge)

    def generate_tokens(
        self,
        prompt: Tensor,
        seq_len: int,
        *,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        top_p: float = 1.0,
        ablate_hierarchical_merge: bool = False,
        use_cache: bool = True,
        generator: torch.Generator | None = None,
    ) -> Generator[Tensor, None, None]:
        """Yields ``seq_len`` new tokens ``(B,)``, each as soon as it is drawn.

        Arguments and errors as in :meth:`generate`. The model is in evaluation mode from the first
        token until the iterator ends or is closed; the mode it was in comes back then.
        """
        self.check_tokens("prompt", prompt)
        if prompt.shape[1] == 0:
            raise ValueError(
                f"prompt must have at least one token a sequence, got shape {tuple(prompt.shape)}"
            )
        check_integer("seq_len", seq_len, minimum=0)
        choose = chooser(
            temperature=temperature, filter_thres=filter_thres, top_p=top_p, generator=generator
        )
        ablate = {"ablate_hierarchical_merge": ablate_hierarchical_merge}

        def reader() -> WindowReader | Recomputation:
            recomputation = Recomputation(partial(self, **ablate), self.seq_len)
            return (
                WindowReader(self.decoder(**ablate), recomputation) if use_cache else recomputation
            )

        return draw_tokens(self, reader, prompt.long(), seq_len, choose)

    def generate(
        self,
        prompt: Tensor,
        seq_len: int,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        *,
        top_p: float = 1.0,
        ablate_hierarchical_merge: bool = False,
        use_cache: bool = True,
        generator: torch.Generator | None = None,
        on_token: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """The ``seq_len`` tokens that follow the prompt, ``(B, seq_len)``.

        Args:
            prompt: tokens ``(B, N)``, at least one. Once there are more than the model's seq_len,
                the newest ones count.
            seq_len: number of new tokens.
            temperature: divides the logits; 0 takes the most likely token.
            filter_thres: share of the vocabulary that is never drawn, the least likely tokens.
            top_p: draw only from the likeliest tokens that together have this probability.
            ablate_hierarchical_merge: as in :meth:`forward`.
            use_cache: False runs the whole sequence for each token. The tokens are the same.
            generator: source of the random numbers; None is PyTorch's default generator.
            on_token: called with each token ``(B,)`` as soon as it is drawn.

        Raises:
            TypeError, ValueError: a prompt that the model does not know; a seq_len, temperature,
                filter_thres or top_p out of range.
        """
        tokens = self.generate_tokens(
            prompt,
            seq_len,
            temperature=temperature,
            filter_thres=filter_thres,
            top_p=top_p,
            ablate_hierarchical_merge=ablate_hierarchical_merge,
            use_cache=use_cache,
            generator=generator,
        )
        start = prompt.new_empty(len(prompt), 0, dtype=torch.long)
        return collect(tokens, start, on_token=on_token)

    def check_tokens(self, name: str, ids: Tensor) -> None:
        """Raises TypeError or ValueError unless ids are tokens ``(B, N)`` that the model knows."""
        check_token_type(name, ids, self.token_emb.weight.device)
        if ids.ndim != 2:
            raise ValueError(f"{name} must be (batch, tokens), got shape {tuple(ids.shape)}")
        check_token_values(name, ids, self.num_tokens)


def side_by_side(tokens: Sequence[Tensor], strides: Sequence[int]) -> Tensor:
    """The newest token of every hierarchy at each place: ``(B, M, C)`` each to ``(B, N, sum C)``.

    N is the number of places that all hierarchies reach.
    """
    spread = [
        t if s == 1 else repeat(t, "b m c -> b (m s) c", s=s)
        for t, s in zip(tokens, strides, strict=True)
    ]
    length = min(t.shape[1] for t in spread)
    return torch.cat([t[:, :length] for t in spread], dim=-1)
