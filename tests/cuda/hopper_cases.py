"""Cases of attention's sm_90a kernels, for the emulated tests and those on a GPU.

Lengths at and around the tiles of 128 and 192 rows and 128 keys; more than two stages of keys; more
tiles than the emulated device has blocks, so that a block computes several.
"""

from __future__ import annotations

from hierkernels.key_range import KeyRange, Staircase
from hierkernels.ops.attention.spec import Case, _case


def _range(name: str, lo: Staircase, hi: Staircase, **options) -> Case:
    return _case(name, key_range=KeyRange(lo, hi), **options)


SERVED = (
    _case("h-causal-n128", B=1, N=128, is_causal=True),
    _case("h-causal-n129-d128", B=1, N=129, D=128, is_causal=True),
    _case("h-causal-n193", B=2, H=2, N=193, is_causal=True),
    _case("h-causal-n700", B=1, H=1, N=700, is_causal=True),
    _case("h-causal-n520-d128", B=1, H=1, N=520, D=128, is_causal=True),
    _case("h-full-n257", B=1, H=1, N=257),
    _case("h-full-q130-k391-d128", B=1, H=1, N=130, Nk=391, D=128),
    _case("h-causal-q130-k300", B=1, H=2, N=130, Nk=300, is_causal=True),
    # The first 70 queries see nothing.
    _case("h-causal-q300-k230", B=1, H=1, N=300, Nk=230, is_causal=True),
    _case("h-window-100-30", B=1, H=1, N=400, window=(100, 30)),
    _case("h-window-17-0-d128", B=1, H=1, N=300, D=128, window=(17, 0)),
    _range("h-empty", Staircase(), Staircase(), B=1, N=128, Nk=128),
    _range("h-bucketed", Staircase(0, 48, 48, -48), Staircase(0, 1, 1, 1), B=1, N=300),
    # Row packing: 64 rows are whole queries; a tile ends within a query's heads; 3 does not divide.
    _case("h-g2", B=1, H=4, Hkv=2, N=150, is_causal=True),
    _case("h-g8-d128", B=2, H=8, Hkv=1, N=40, Nk=150, D=128, is_causal=True),
    _case("h-g64", B=1, H=64, Hkv=1, N=3, Nk=200),
    _case("h-g3", B=1, H=6, Hkv=2, N=140, is_causal=True),
    _case("h-bnhd", B=2, H=2, N=140, is_causal=True, layout="bnhd"),
    _case("h-packed", B=2, H=2, N=140, is_causal=True, layout="packed"),
    _case("h-logits-x100", B=1, N=200, is_causal=True, gain=100.0),
    _case("h-lse-grad", B=1, H=1, N=200, is_causal=True, lse_grad=True),
    _case("h-scale", B=1, H=1, N=150, D=128, scale=0.3, window=(90, 0)),
)
# These the kernels of sm_80 compute, although the device is an sm_90.
NOT_SERVED = (
    _case("h-not-short", B=2, N=127, is_causal=True),
    _case("h-not-few-keys", B=1, H=1, N=130, Nk=127),
    _case("h-not-d96", B=1, H=1, N=130, D=96),
    _case("h-not-dv", B=1, H=1, N=130, D=128, Dv=64),
    _case("h-not-softcap", B=1, H=1, N=130, softcap=20.0),
    _case("h-not-bias", B=1, H=1, N=130, bias="k"),
    _case("h-not-padding", B=1, H=1, N=130, padding="right"),
    _case("h-not-dropout", B=1, H=1, N=130, dropout_p=0.3),
    _case("h-not-negative-scale", B=1, H=1, N=130, scale=-0.1),
    _case("h-not-unaligned", B=1, H=1, N=130, layout="unaligned"),
    _case("h-not-broadcast", B=1, H=2, N=130, layout="broadcast"),
)
