"""The definition of hk.select_blocks: examples computed by hand."""

from __future__ import annotations

import math

import torch

import hierkernels as hk
from hierkernels.ops.select_blocks import api, reference


def _scores_to_queries(terms: list[float], N: int) -> tuple[torch.Tensor, torch.Tensor]:
    """q (1, 1, N, 1) of ones and k (1, 1, W, 1) whose scaled scores are the logs of the terms."""
    k = torch.tensor(terms, dtype=torch.float64).log().clamp(min=-800)
    return torch.ones(1, 1, N, 1, dtype=torch.float64), k[None, None, :, None]


def test_weights_of_windows_in_blocks() -> None:
    """l / d = 2, S / d = 4: the windows 4 j - 1 .. 4 j + 3 count 1 2 2 2 1 times in block j."""
    W, N = 11, 48  # d = 4, l = 8, S = 16: windows end at 7, 11, ..., 47; blocks 0, 1, 2
    for w in range(W):
        terms = [0.0] * W
        terms[w] = 1.0
        q, k = _scores_to_queries(terms, N)
        call = api.make_call(
            q, k, num_selected=3, block_size=16, stride=4, first_end=7, window_size=8, scale=1.0,
            lse=torch.zeros(1, 1, N),
        )  # fmt: skip
        assert call.num_blocks == 3
        expected = [
            [1, 2, 2, 2, 1][w - 4 * j + 1] if 0 <= w - 4 * j + 1 < 5 else 0 for j in range(3)
        ]
        found = reference.probability_sums(call)[0, 0, N - 1]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_selection_by_hand() -> None:
    """d = 4, l = 8, S = 16, N = 64: P of window w as listed, the same for every query."""
    #        ends at 7    11   15   19   23   27   31   35   39   43   47   51   55   59   63
    terms = [0.01, 0.01, 0.05, 0.30, 0.01, 0.01, 0.02, 0.01, 0.10, 0.12, 0.02, 0.3, 0.2, 0.05, 0.04]
    q, k = _scores_to_queries(terms, 64)
    options = {
        "block_size": 16, "stride": 4, "first_end": 7, "window_size": 8, "scale": 1.0,
        "lse": torch.zeros(1, 1, 64),
    }  # fmt: skip
    # Position 63 sees all. Block 0: 2 (.01 + .01 + .05) + .30 = .44; 1: .30 + 2 (.01 + .01 + .02)
    # + .01 = .39; 2: .01 + 2 (.10 + .12 + .02) + .3 = .79; 3: .3 + 2 (.2 + .05 + .04) = .88.
    call = api.make_call(q, k, num_selected=2, **options)
    sums = reference.probability_sums(call)[0, 0]
    torch.testing.assert_close(sums[63], torch.tensor([0.44, 0.39, 0.79, 0.88]).double())
    # Position 39 sees windows 0 .. 8: block 2 has .01 + 2 * .10 = .21; block 3 lies in the future.
    torch.testing.assert_close(sums[39], torch.tensor([0.44, 0.39, 0.21, 0.0]).double())
    chosen = hk.select_blocks(q, k, num_selected=2, backend="reference", **options)[0, 0].tolist()
    assert chosen[63] == [2, 3] and chosen[39] == [0, 1]
    # At 31, block 1: .30 + 2 (.01 + .01 + .02), as window 7 ends at 35.
    assert chosen[31] == [0, 1] and chosen[15] == [0, -1]
    # Blocks 0 and 1 have begun, scores 0 and 0: candidates all the same.
    assert chosen[16] == [0, 1] and chosen[6] == [0, -1]
    # One initial and two local blocks, inside n = 3 and n = 4.
    for n, expected in ((3, [0, 2, 3]), (4, [0, 1, 2, 3])):
        forced = hk.select_blocks(
            q, k, num_selected=n, num_initial=1, num_local=2, backend="reference", **options
        )[0, 0].tolist()
        assert forced[63] == expected
        assert forced[20] == [0, 1] + [-1] * (n - 2)
    # At 39 the initial block 0 and the local block 2, which has the lowest score.
    forced = hk.select_blocks(
        q, k, num_selected=2, num_initial=1, num_local=1, backend="reference", **options
    )
    assert forced[0, 0, 39].tolist() == [0, 2]


def test_logit_scoring_by_hand() -> None:
    """d = 2, S = 4, strict: block j is a candidate once its second window has ended before i."""
    logits = [0.0, 4.0, 6.0, -2.0, 2.0, 2.0, -30.0, 0.0]  # means 2, 2, 2, -15
    k = torch.tensor(logits, dtype=torch.float64)[None, None, :, None]
    q = torch.ones(1, 1, 17, 1, dtype=torch.float64)
    options = {
        "block_size": 4, "stride": 2, "first_end": 1, "scoring": "logit", "strict": True,
        "scale": 1.0, "backend": "reference",
    }  # fmt: skip
    chosen, p = hk.select_blocks(q, k, num_selected=2, return_probabilities=True, **options)
    chosen = chosen[0, 0].tolist()
    assert chosen[3] == [-1, -1] and chosen[4] == [0, -1] and chosen[8] == [0, 1]
    assert chosen[12] == [0, 1]  # ties go to the lower index
    third = math.exp(2) / (3 * math.exp(2))
    torch.testing.assert_close(p[0, 0, 12], torch.tensor([third, third]).double())
    assert p[0, 0, 4].tolist() == [1.0, 0.0]
    four = hk.select_blocks(q, k, num_selected=4, **options)[0, 0].tolist()
    assert four[16] == [0, 1, 2, 3]
    # exp(-40 - 2) is below 1e-10.
    k[..., 6:, :] = -40.0
    four = hk.select_blocks(q, k, num_selected=4, **options)[0, 0].tolist()
    assert four[16] == [0, 1, 2, -1]
    # All logits far below that of no block.
    none = hk.select_blocks(q, k - 2000.0, num_selected=4, **options)
    assert (none == -1).all()
