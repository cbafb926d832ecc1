"""MEGABYTE: a hierarchy of causal transformers, each one refining the patches of the one above.

Yu et al., "MEGABYTE: Predicting Million-byte Sequences with Multiscale Transformers", 2023.

A sequence of ``prod(max_seq_len)`` tokens is read as ``max_seq_len[0]`` patches of
``max_seq_len[1]`` patches ... of ``max_seq_len[-1]`` tokens. Stage 0 runs one long sequence whose
positions are whole patches; the last stage runs very many short ones whose positions are tokens.
What stage ``s`` says at position ``i``, having read the patches before ``i``, is projected to one
vector for each position of patch ``i`` and added to the input of stage ``s + 1``.

Shapes: B batch, R rows (sequences a stage runs at once, B times the positions above it), S stages,
N positions of a stage, C its channels, H heads, D head channels, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from math import prod

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from einops.layers.torch import Rearrange
from torch import Tensor, nn

import hierkernels as hk
from python_models.arguments import check_integers, check_token_type, check_token_values
from python_models.layers import FeedForward, LayerNorm, Linear, RMSNorm
from python_models.megabyte_decoder import Decoder
from python_models.pretrained import Pretrained
from python_models.rotary import RotaryEmbedding
from python_models.sampling import Recomputation, chooser, collect, draw_tokens


class Attention(nn.Module):
    """Token shift, then causal multi-query attention: H query heads share a key and value head.

    ``x (R, N, C) -> (R, N, C)``, plus a residual.
    """

    def __init__(self, *, dim: int, dim_head: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm = RMSNorm(dim)
        self.to_q = Linear(dim, heads * dim_head, bias=False)
        self.to_kv = Linear(dim, 2 * dim_head, bias=False)
        self.to_out = Linear(heads * dim_head, dim, bias=False)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, residual: Tensor | None = None
    ) -> Tensor:
        x = self.norm(x, shift=1)
        q = rearrange(self.to_q(x), "r n (h d) -> r h n d", h=self.heads)
        k, v = rearrange(self.to_kv(x), "r n (kv d) -> kv r 1 n d", kv=2)
        if rotary is not None:
            q, k = hk.rotary(q, *rotary), hk.rotary(k, *rotary)
        dropout_p = self.dropout if self.training else 0.0
        out = hk.attention(q, k, v, is_causal=True, dropout_p=dropout_p)
        return self.to_out(rearrange(out, "r h n d -> r n (h d)"), residual)


class Transformer(nn.Module):
    """A stack of blocks, attention then feed-forward, each with token shift and a residual.

    ``x (R, N, C) -> (R, N, C)``.
    """

    def __init__(
        self,
        *,
        dim: int,
        layers: int,
        dim_head: int,
        heads: int,
        attn_dropout: float,
        ff_mult: int,
        ff_dropout: float,
        rel_pos: bool,
    ) -> None:
        super().__init__()
        self.rotary_emb = RotaryEmbedding(dim_head) if rel_pos else None
        self.layers = nn.ModuleList(
            nn.ModuleList(
                (
                    Attention(dim=dim, dim_head=dim_head, heads=heads, dropout=attn_dropout),
                    FeedForward(dim=dim, mult=ff_mult, dropout=ff_dropout),
                )
            )
            for _ in range(layers)
        )
        self.norm = RMSNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        rotary = None if self.rotary_emb is None else self.rotary_emb.tables_of_pairs(x.shape[1])
        for attention, feed_forward in self.layers:
            x = attention(x, rotary, residual=x)
            x = feed_forward(x, shift=1, residual=x)
        return self.norm(x)


class MEGABYTE(Pretrained, nn.Module):
    """Multiscale autoregressive model of tokens, usually bytes.

    Args:
        num_tokens: size V of the vocabulary.
        dim: channels of each stage, coarse to fine, or one number for all of them.
        depth: blocks of each stage; its length is the number of stages, two or more.
        max_seq_len: positions of each stage; a sequence has at most ``prod(max_seq_len)`` tokens.
        dim_head, heads: channels and number of query heads; keys and values have one head.
        attn_dropout, ff_dropout: probabilities of dropping an attention weight, a hidden unit.
        ff_mult: expansion of the feed-forward layers.
        pad_id: token that fills up an unfinished patch; the loss skips it wherever it stands.
        rel_pos: rotary positions in every stage.
        pos_emb: learned absolute positions in every stage.
        flash_attn: accepted so that existing code runs; it never changes the result.
        upstream_quirks: pair the position embeddings with the stages in reverse order, as
            megabyte-pytorch 0.2.1 does (only possible if the stages are equally wide).

    The state dict is that of megabyte-pytorch 0.2.1, whatever the flags.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: tuple[int, ...] | int,
        depth: tuple[int, ...],
        max_seq_len: tuple[int, ...],
        dim_head: int = 64,
        heads: int = 8,
        attn_dropout: float = 0.0,
        ff_mult: int = 4,
        ff_dropout: float = 0.0,
        pad_id: int = 0,
        rel_pos: bool = False,
        pos_emb: bool = False,
        flash_attn: bool = False,
        upstream_quirks: bool = False,
    ) -> None:
        super().__init__()
        check_integers("depth", depth, minimum=0)
        check_integers("max_seq_len", max_seq_len, minimum=1)
        if len(depth) < 2:
            raise ValueError(f"depth must have one entry a stage, two or more, got {depth}")
        if len(max_seq_len) != len(depth):
            raise ValueError(
                f"max_seq_len must have as many entries as depth ({len(depth)}), got {max_seq_len}"
            )
        dims = dim if isinstance(dim, tuple) else (dim,) * len(depth)
        check_integers("dim", dims, minimum=1)
        if len(dims) != len(depth):
            raise ValueError(
                f"dim must be one integer or one a stage, as depth has ({len(depth)}), got {dim}"
            )
        for name, number in (
            ("num_tokens", num_tokens),
            ("dim_head", dim_head),
            ("heads", heads),
            ("ff_mult", ff_mult),
        ):
            check_integers(name, (number,), minimum=1)
        if rel_pos and dim_head % 2:
            raise ValueError(f"dim_head must be even for rel_pos=True, got {dim_head}")
        for name, p in (("attn_dropout", attn_dropout), ("ff_dropout", ff_dropout)):
            if not 0 <= p < 1:
                raise ValueError(f"{name} must be a probability, 0 or more and below 1, got {p}")
        if not isinstance(pad_id, int):
            raise TypeError(f"pad_id must be an integer, got {pad_id!r}")

        self.num_tokens = num_tokens
        self.max_seq_len = max_seq_len
        self.pad_id = pad_id
        self.stages = len(depth)
        self.upstream_quirks = upstream_quirks
        # Tokens that one position of each stage stands for.
        self.patch_sizes = tuple(prod(max_seq_len[s + 1 :]) for s in range(self.stages))

        self.start_tokens = nn.ParameterList(nn.Parameter(torch.randn(c)) for c in dims)
        self.pos_embs = (
            nn.ModuleList(nn.Embedding(n, c) for n, c in zip(max_seq_len, dims, strict=True))
            if pos_emb
            else None
        )

        fine_dim = dims[-1]
        self.token_embs = nn.ModuleList([nn.Embedding(num_tokens, fine_dim)])
        for c, patch in reversed(list(zip(dims, self.patch_sizes, strict=True))[:-1]):
            self.token_embs.append(
                nn.Sequential(
                    nn.Embedding(num_tokens, fine_dim),
                    Rearrange("b n patch c -> b n (patch c)"),
                    LayerNorm(patch * fine_dim),
                    Linear(patch * fine_dim, c),
                    LayerNorm(c, enters_product=False),
                )
            )

        self.transformers = nn.ModuleList(
            Transformer(
                dim=c,
                layers=layers,
                dim_head=dim_head,
                heads=heads,
                attn_dropout=attn_dropout,
                ff_mult=ff_mult,
                ff_dropout=ff_dropout,
                rel_pos=rel_pos,
            )
            for c, layers in zip(dims, depth, strict=True)
        )
        self.to_next_transformer_projections = nn.ModuleList(
            nn.Sequential(
                Rearrange("r n c -> (r n) c"),
                Linear(c, next_c * next_n),
                Rearrange("r (n c) -> r n c", n=next_n),
            )
            for c, next_c, next_n in zip(dims[:-1], dims[1:], max_seq_len[1:], strict=True)
        )
        self.to_next_transformer_projections.append(nn.Identity())
        self.to_logits = Linear(fine_dim, num_tokens)

    def forward(self, ids: Tensor, return_loss: bool = False) -> Tensor:
        """Logits of the token after each token, or the mean cross-entropy in nats a token.

        Args:
            ids: integer tokens, flat ``(B, N)`` or by stage ``(B, n_0, ..., n_last)``, where
                ``n_0 <= max_seq_len[0]`` and the rest equal ``max_seq_len[1:]``. Flat tokens are
                padded with ``pad_id`` to whole patches.
            return_loss: predict every token, the first one from the start tokens, and return the
                scalar loss.

        Returns:
            ``(B, N, V)`` or ``(B, n_0, ..., n_last, V)``; ``(B, 1, V)`` for empty ids. The logits
            at the last position predict the token after the sequence.

        Raises:
            TypeError, ValueError: ids are not integers, or of a shape, a device or a value that
                the model does not know.
        """
        self._check_ids(ids)
        if ids.numel() == 0:
            return self.forward_empty(ids.shape[0])
        batch, *shape = ids.shape
        ids = ids.flatten(1).long()
        length = ids.shape[1]
        padding = -length % self.patch_sizes[0]
        if padding:
            self._check_pad_id()
            ids = F.pad(ids, (0, padding), value=self.pad_id)

        context = None
        for s, transformer in enumerate(self.transformers):
            # Stage 0 may stop before max_seq_len; the rows of the others are always full.
            rows = batch if s == 0 else ids.numel() // (self.max_seq_len[s] * self.patch_sizes[s])
            tokens = rearrange(self.embed_patches(s, ids), "b m c -> (b m) c")
            tokens = rearrange(tokens, "(r n) c -> r n c", r=rows)
            tokens = self.add_positions(s, tokens)
            if context is not None:
                tokens = tokens + context
            start = repeat(self.start_tokens[s], "c -> r 1 c", r=rows)
            hidden = transformer(torch.cat((start, tokens), dim=1))
            if s < self.stages - 1:
                context = self.to_next_transformer_projections[s](hidden[:, :-1])

        first = hidden[:: rows // batch, :1]  # the only start position that predicts a token
        hidden = rearrange(hidden[:, 1:], "(b m) n c -> b (m n) c", b=batch)
        if not return_loss:
            return self.to_logits(hidden[:, :length]).unflatten(1, shape)
        logits = self.to_logits(torch.cat((first, hidden[:, : length - 1]), dim=1))
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        return F.cross_entropy(
            rearrange(logits, "b n v -> (b n) v"),
            rearrange(ids[:, :length], "b n -> (b n)"),
            ignore_index=self.pad_id,
        )

    def forward_empty(self, batch_size: int) -> Tensor:
        """Logits ``(B, 1, V)`` of the first token, from the start tokens of all stages."""
        context = None
        for s, transformer in enumerate(self.transformers):
            tokens = repeat(self.start_tokens[s], "c -> b 1 c", b=batch_size)
            if context is not None:
                tokens = tokens + context[:, :1]
            hidden = transformer(tokens)
            context = self.to_next_transformer_projections[s](hidden)
        return self.to_logits(hidden)

    def generate_tokens(
        self,
        prime: Tensor | None = None,
        *,
        seq_len: int | None = None,
        filter_thres: float = 0.9,
        temperature: float = 1.0,
        top_p: float = 1.0,
        default_batch_size: int = 1,
        use_cache: bool = True,
        generator: torch.Generator | None = None,
    ) -> Generator[Tensor, None, None]:
        """Yields one new token ``(B,)`` at a time, as soon as it is drawn.

        Arguments and errors as in :meth:`generate`. The model is in evaluation mode from the first
        token until the iterator ends or is closed; the mode it was in comes back then.
        """
        limit = prod(self.max_seq_len)
        if prime is None:
            check_integers("default_batch_size", (default_batch_size,), minimum=0)
            prime = self._empty_sequences(default_batch_size)
        self._check_ids(prime, name="prime")
        if prime.ndim != 2:
            raise ValueError(f"prime must be flat, (B, N), got shape {tuple(prime.shape)}")
        total = limit if seq_len is None else seq_len
        if not prime.shape[1] <= total <= limit:
            raise ValueError(
                f"seq_len counts the prime as well: it must be from {prime.shape[1]} (the length "
                f"of the prime) to {limit} (the product of max_seq_len), got {total}"
            )
        choose = chooser(
            temperature=temperature, filter_thres=filter_thres, top_p=top_p, generator=generator
        )
        batch, length = prime.shape

        def reader() -> Decoder | Recomputation:
            return Decoder(self, batch) if use_cache else Recomputation(self)

        return draw_tokens(self, reader, prime.long(), total - length, choose)

    def generate(
        self,
        prime: Tensor | None = None,
        filter_thres: float = 0.9,
        temperature: float = 1.0,
        default_batch_size: int = 1,
        *,
        seq_len: int | None = None,
        top_p: float = 1.0,
        use_cache: bool = True,
        generator: torch.Generator | None = None,
        on_token: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """Continues ``prime`` until the sequence is full.

        Args:
            prime: flat tokens ``(B, N)``; None begins with empty sequences.
            filter_thres: share of the vocabulary that is never drawn, the least likely tokens.
            temperature: divides the logits; 0 takes the most likely token.
            top_p: draw only from the likeliest tokens that together have this probability.
            seq_len: stop at this many tokens, those of the prime included.
            default_batch_size: number of sequences if there is no prime.
            use_cache: False computes the whole sequence anew for each token. The tokens are the
                same.
            generator: source of the random numbers; None is PyTorch's default generator.
            on_token: called with each token ``(B,)`` as soon as it is drawn.

        Returns:
            ``(B, *max_seq_len)``, or ``(B, seq_len)`` if seq_len is given.

        Raises:
            TypeError, ValueError: a prime that does not fit, a seq_len, temperature, filter_thres
                or top_p out of range.
        """
        tokens = self.generate_tokens(
            prime,
            seq_len=seq_len,
            filter_thres=filter_thres,
            temperature=temperature,
            top_p=top_p,
            default_batch_size=default_batch_size,
            use_cache=use_cache,
            generator=generator,
        )
        start = self._empty_sequences(default_batch_size) if prime is None else prime.long()
        sequence = collect(tokens, start, on_token=on_token)
        return sequence if seq_len is not None else sequence.unflatten(1, self.max_seq_len)

    def _empty_sequences(self, batch: int) -> Tensor:
        return torch.empty(batch, 0, dtype=torch.long, device=self.to_logits.weight.device)

    def embed_patches(self, s: int, ids: Tensor) -> Tensor:
        """Patches of stage ``s`` as vectors: ``(B, N * patch) -> (B, N, C)``."""
        embed = self.token_embs[self.stages - 1 - s]
        if s == self.stages - 1:
            return embed(ids)
        return embed(rearrange(ids, "b (n patch) -> b n patch", patch=self.patch_sizes[s]))

    def add_positions(self, s: int, tokens: Tensor, first: int = 0) -> Tensor:
        """Adds the learned positions ``first, first + 1, ...`` to ``(R, N, C)``, if there are."""
        if self.pos_embs is None:
            return tokens
        table = self.pos_embs[self.stages - 1 - s if self.upstream_quirks else s].weight
        last = first + tokens.shape[1]
        if table.shape[1] != tokens.shape[2] or table.shape[0] < last:
            raise ValueError(
                f"pos_emb with upstream_quirks adds a table of {tuple(table.shape)} to stage {s}, "
                f"which has {last} positions of {tokens.shape[2]} channels: use "
                "upstream_quirks=False, or equal dim and max_seq_len for all stages"
            )
        return tokens + table[first:last]

    def _check_ids(self, ids: Tensor, name: str = "ids") -> None:
        check_token_type(name, ids, self.to_logits.weight.device)
        if ids.ndim not in (2, self.stages + 1):
            raise ValueError(
                f"{name} must be flat (B, N) or have {self.stages + 1} dimensions, (B, n) and one "
                f"for each stage; got shape {tuple(ids.shape)}"
            )
        if ids.ndim > 2 and tuple(ids.shape[2:]) != self.max_seq_len[1:]:
            raise ValueError(
                f"{name} of shape {tuple(ids.shape)} must end in max_seq_len[1:] = "
                f"{self.max_seq_len[1:]}"
            )
        limit = prod(self.max_seq_len)
        if prod(ids.shape[1:]) > limit:
            raise ValueError(
                f"{name} must have at most {limit} tokens a sequence, the product of max_seq_len = "
                f"{self.max_seq_len}; got shape {tuple(ids.shape)}"
            )
        check_token_values(name, ids, self.num_tokens)

    def _check_pad_id(self) -> None:
        if not 0 <= self.pad_id < self.num_tokens:
            raise ValueError(
                f"pad_id {self.pad_id} cannot fill an unfinished patch, it is no token (0 to "
                f"{self.num_tokens - 1}): give ids of whole patches, a multiple of "
                f"{self.patch_sizes[0]}"
            )
