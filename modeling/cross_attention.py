"""Cross-attention of a decoder to the hidden states of an encoder, with keys and values computed once for each source.

Which columns of the source a target token sees is the same in all layers and for all queries of a document, so it is
computed once, as the layout of a sequence is (`token_layout.py`). There are no positions: order is known to the states.

Symbols: B batch, L new tokens of the target, M columns of the source, D width, H query heads, G key-value heads, P head
width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .layers import GroupedAttention, as_weight
from .softmax_attention import attend_under_mask, implementation_of, is_flash
from .token_layout import Sequence


class SourceLayout:
    """The columns of a source that each token of a target sees. Like `Sequence` it is the same object for all blocks.

    Attributes:
        documents: (B, M) number of each source column's document, negative at padding; None: no padding and one
            document in each row.
        targets: (B, L) number of the document of each target token; None: one document in each row.
    """

    def __init__(self, documents: Tensor | None, targets: Tensor | None) -> None:
        self.documents = documents
        self.targets = targets
        self._mask: tuple[Tensor | None, Tensor | None] | None = None
        self._elsewhere: dict[torch.device, SourceLayout] = {}

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "SourceLayout":
        """Return a copy on `device`; accelerate calls this between blocks on different devices."""
        device = torch.device(device)
        if self.documents is None or device == self.documents.device:
            return self
        if device not in self._elsewhere:
            targets = None if self.targets is None else self.targets.to(device, non_blocking=non_blocking)
            self._elsewhere[device] = SourceLayout(self.documents.to(device, non_blocking=non_blocking), targets)
        return self._elsewhere[device]

    def mask(self) -> tuple[Tensor | None, Tensor | None]:
        """Return what the target tokens see of the source.

        Returns:
            (B, 1, L or 1, M), True where a target token sees a column, and (B, L or 1), True at tokens that see none:
            the mask has all columns there, so that the softmax is defined. None and None if all see everything.
        """
        if self._mask is None:
            if self.documents is None:
                self._mask = None, None
            else:
                seen = (self.documents >= 0)[:, None, :]
                if self.targets is not None:
                    seen = seen & (self.targets[:, :, None] == self.documents[:, None, :])
                blind = ~seen.any(-1)
                self._mask = (seen | blind[..., None])[:, None], blind
        return self._mask


class CrossAttention(GroupedAttention):
    """Softmax attention of a target to a source, without positions, with grouped key-value heads.

    A token that sees no column of the source, e.g. of an empty source, gets zeros.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.add_projections(config, config.attention_bias, layer_idx)
        self.positions, self.is_causal = "none", False

    def forward(
        self,
        hidden_states: Tensor,
        source_states: Tensor,
        source: SourceLayout,
        sequence: Sequence,
        cache: EncoderDecoderCache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Read the source.

        Args:
            hidden_states: (B, L, D) normed states of the target.
            source_states: (B, M, D) states of the source, 0 at padding.
            source: which of them a target token sees.
            sequence: the `Sequence` of the target.
            cache: holds the keys and values after the first call.
            output_attentions: return the matrix.

        Returns:
            (B, L, D), and the (B, H, L, M) attention matrix if asked for.
        """
        q = self.to_heads(self.q_proj(hidden_states), self.q_norm, sequence).transpose(1, 2)
        k, v = self.keys_and_values(source_states, sequence, cache)
        mask, blind = source.mask()
        implementation = implementation_of(self, output_attentions)
        matrix = None
        if is_flash(implementation):
            y = _flash_by_document(self, q, k, v, source, implementation)
        else:
            if mask is not None:
                mask = mask.expand(-1, -1, q.shape[2], -1)
            y, matrix = attend_under_mask(self, q, k, v, mask, implementation, output_attentions)
        if blind is not None:
            y = y.masked_fill(blind[..., None, None], 0)
            matrix = None if matrix is None else matrix.masked_fill(blind[:, None, :, None], 0)
        return self.o_proj(y.flatten(2)), matrix

    def keys_and_values(
        self, source_states: Tensor, sequence: Sequence, cache: EncoderDecoderCache | None
    ) -> tuple[Tensor, Tensor]:
        """Return the (B, G, M, P) keys and values of the source, from the cache if it holds them."""
        if cache is not None and cache.is_updated.get(self.layer_idx):
            layer: Any = cache.cross_attention_cache.layers[self.layer_idx]
            k, v = layer.keys, layer.values
            if k.shape[2] != source_states.shape[1]:
                raise ValueError(
                    f"past_key_values must be of the same source, which has {source_states.shape[1]} columns, got the "
                    f"keys of {k.shape[2]}. Start another source with an empty cache"
                )
            return k, v
        source_states = as_weight(self.k_proj, source_states)
        k = self.to_heads(self.k_proj(source_states), self.k_norm, sequence).transpose(1, 2)
        v = self.v_proj(source_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if cache is not None:
            k, v = cache.cross_attention_cache.update(k, v, self.layer_idx)
            cache.is_updated[self.layer_idx] = True
        return k, v


def _flash_by_document(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, source: SourceLayout, implementation: str
) -> Tensor:
    """(B, L, H, P) by transformers' flash attention.

    transformers' own way to leave out padding takes the mask of the keys for that of the queries if both are equally
    long. Therefore it gets the documents of all rows one after another, for queries and for keys: a row without
    documents is one, and what is padding on either side has no counterpart on the other.
    """
    attend: Any = ALL_ATTENTION_FUNCTIONS[implementation]
    options: dict[str, Any] = {"dropout": 0.0, "scaling": module.scaling, "sliding_window": None}
    if getattr(module, "softcap", None) is not None:
        options["softcap"] = module.softcap
    if source.documents is None:
        return attend(module, q, k, v, None, **options)[0]
    documents, targets = source.documents, source.targets
    if targets is None:
        targets = documents.new_zeros(q.shape[0], q.shape[2])
    both = torch.cat([targets, documents], dim=1)
    number = both.unique(return_inverse=True)[1].masked_fill(both < 0, -1) + 1  # 0 at padding
    width = int(number.max()) + 1
    rows = torch.arange(q.shape[0], device=q.device)[:, None] * width
    numbers = (rows + number).split([targets.shape[1], documents.shape[1]], dim=1)
    bounds, orders, longest = [], [], []
    for number in numbers:
        number = number.flatten()
        counts = torch.bincount(number, minlength=q.shape[0] * width)
        counts[::width] = 0
        place = number.where(number % width > 0, q.shape[0] * width)  # padding comes last and is cut off
        orders.append(place.sort(stable=True).indices[: int(counts.sum())])
        bounds.append(F.pad(counts.cumsum(0), (1, 0)).to(torch.int32))
        longest.append(int(counts.max()))
    lines = [
        tensor.transpose(1, 2).flatten(0, 1)[order].transpose(0, 1)[None]
        for tensor, order in ((q, orders[0]), (k, orders[1]), (v, orders[1]))
    ]
    lengths = {"cu_seq_lens_q": bounds[0], "cu_seq_lens_k": bounds[1]}
    lengths |= {"max_length_q": longest[0], "max_length_k": longest[1]}
    y = attend(module, *lines, None, **options, **lengths)[0][0]
    whole = y.new_zeros(q.shape[0] * q.shape[2], *y.shape[1:]).index_copy(0, orders[0], y)
    return whole.unflatten(0, (q.shape[0], q.shape[2]))


__all__ = ["CrossAttention", "SourceLayout"]
