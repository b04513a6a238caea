"""A Transformer's attention averaged over a corpus, and a masked mixer that starts as it.

A head whose attention does not depend on its input is one constant matrix, which is what a masked mixer learns. The
average over a corpus is the constant that PAPA puts in a head's place (Hassid et al., "How Much Does Attention Actually
Attend?", Findings of EMNLP 2022), there of encoders, here causal: row i is the average over the documents that have
more than i tokens, and so sums to 1 as their rows do. The values and the output projection are the teacher's: where its
attention is constant, the mixer computes the same.

Symbols: B batch, L length, D width, H heads, P head width, N positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .teacher import capture, teacher_adapter


def average_attention(
    teacher: PreTrainedModel,
    layers: Sequence[int],
    documents: Sequence[Tensor],
    positions: int,
    *,
    batch_size: int = 4,
    progress: bool = True,
) -> dict[int, Tensor]:
    """Mean attention of each head between each pair of positions.

    Args:
        teacher: a model of a family with an adapter, in evaluation mode.
        layers: layers of it, each once.
        documents: (T) token ids each, of any lengths, the rows of a (documents, T) tensor say; a document counts with
            its first N tokens.
        positions: N.
        batch_size: documents in one forward, filled up at their right.
        progress: show a progress bar.

    Returns:
        For each layer (H, N, N) float32 on the teacher's device, zero above the diagonal; rows sum to 1.

    Raises:
        ValueError: if no document reaches position N - 1, or an argument is out of range; nothing has run then.
    """
    if positions < 1 or batch_size < 1:
        raise ValueError(f"positions and batch_size must be at least 1, got {positions} and {batch_size}")
    longest = max((len(document) for document in documents), default=0)
    if longest < positions:
        raise ValueError(
            f"positions: got {positions}, but the longest of the {len(documents)} documents has {longest} tokens; "
            "accepted: at most that"
        )
    adapter = teacher_adapter(teacher)
    device = teacher.device
    heads = {layer: adapter.attention(layer).num_heads for layer in layers}
    sums = {layer: torch.zeros(heads[layer], positions, positions, device=device) for layer in layers}
    reached = torch.zeros(positions, device=device)
    starts = range(0, len(documents), batch_size)
    for start in tqdm(starts, desc="average attention", unit="batch", disable=not progress, leave=False):
        rows = [document[:positions] for document in documents[start : start + batch_size] if len(document)]
        if not rows:
            continue
        ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(device)
        length = ids.shape[1]
        lengths = torch.tensor([len(row) for row in rows], device=device)
        real = torch.arange(length, device=device) < lengths[:, None]
        reached[:length] += real.sum(0)

        def on_layer(layer: int, normed_input: Tensor, real: Tensor = real, length: int = length) -> None:
            with torch.no_grad():
                matrix = adapter.attention_matrix(layer, normed_input) * real[:, None, :, None]
                sums[layer][:, :length, :length] += matrix.sum(0)

        # Without a mask: a document's tokens look back, and its padding follows them.
        capture(teacher, ids, layers, ("normed_input",), on_layer=on_layer)
    return {layer: total / reached[:, None] for layer, total in sums.items()}
