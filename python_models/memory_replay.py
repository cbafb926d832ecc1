"""Training Memformer through many segments with the activations of one.

Memory replay back-propagation (Wu et al., "Memformer", 2020, section 3.4): the forward pass keeps
only the memory (B, M, C) that each segment leaves. The backward pass begins with the last segment:
it computes a segment again, takes its gradients, and hands that of the memory to the segment
before. A step costs one more forward pass, and its activations do not grow with the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from python_models.memformer import EncOnlyResults, Memformer, Results

# A scalar from the index of a segment and its results.
SegmentLoss = Callable[[int, Results | EncOnlyResults], Tensor]


def run_segments(
    model: Memformer,
    segments: Sequence[Mapping[str, Tensor | None]],
    *,
    mems: Tensor | None = None,
    replay: bool = True,
    segment_loss: SegmentLoss | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Reads segments one after another, each with the memory that the one before has left.

    Args:
        model: the Memformer.
        segments: arguments src, tgt, src_mask and tgt_mask of its forward, as far as needed.
        mems: the memory ``(B, M, C)`` before the first; None is the initial one.
        replay: keep no activations; the backward pass computes each segment again. False is plain
            back-propagation. The gradients are the same.
        segment_loss: a further loss, of whatever a segment gives; with replay it is called twice.

    Returns:
        The loss of each segment, a scalar, and the memory after the last.
    """

    def run(index: int, mems: Tensor | None) -> tuple[Tensor, Tensor]:
        results = model(**segments[index], mems=mems)
        losses = []
        if isinstance(results, Results):
            losses.append(results.dec_out)
        if segment_loss is not None:
            losses.append(segment_loss(index, results))
        return sum(losses, start=results.mem.new_zeros(())), results.mem

    losses = []
    for index in range(len(segments)):
        # The last segment comes first in the backward pass: nothing is saved by computing it twice.
        if replay and index < len(segments) - 1:
            loss, mems = checkpoint(run, index, mems, use_reentrant=False)
        else:
            loss, mems = run(index, mems)
        losses.append(loss)
    return losses, mems


def memory_replay_backprop(
    model: Memformer,
    src: Tensor,
    tgt: Tensor | Sequence[Tensor] | None = None,
    src_mask: Tensor | None = None,
    tgt_mask: Tensor | None = None,
    *,
    segment_loss: SegmentLoss | None = None,
) -> Tensor:
    """Adds the gradients of a sequence's loss to the parameters; memory is that of one segment.

    src is read in segments of enc_max_seq_len tokens. The decoder predicts tgt from the last one.

    Args:
        model: the Memformer.
        src: tokens ``(B, N)``.
        tgt: tokens ``(B, T)`` or a list of B tensors, as :meth:`Memformer.forward` takes them.
        src_mask, tgt_mask: bool ``(B, N)`` and ``(B, T)``, True = real token.
        segment_loss: called with the index of each segment and its results, gives a scalar that is
            added to the loss. An encoder_only model has no other.

    Returns:
        The loss, without a graph.

    Raises:
        TypeError, ValueError: what the model's forward refuses; neither tgt nor segment_loss.
    """
    if tgt is None and segment_loss is None:
        raise ValueError("tgt or segment_loss must be given: there is nothing to differentiate")
    model.check_source(src, src_mask)
    segments = [{"src": ids, "src_mask": mask} for ids, mask in model.segments(src, src_mask)]
    segments[-1] |= {"tgt": tgt, "tgt_mask": tgt_mask}
    losses, _ = run_segments(model, segments, segment_loss=segment_loss)
    loss = sum(losses[1:], start=losses[0])
    loss.backward()
    return loss.detach()
