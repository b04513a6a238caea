"""Linear attention with learned features for far tokens, softmax attention for near ones, in one normaliser.

Source: LoLCATs (Zhang et al. 2024, arXiv 2410.10254, section 3.2), HazyResearch/lolcats@375df84,
`src/model/linear_attention/linear_window_attention_sw.py` with the model configuration
`distill_llama3_1_8b_lk_smd_wsw64_fd64_w01`; features of Hedgehog (arXiv 2402.04347).

The projections, rotary positions and grouped key-value heads are those of attention. For query n and the keys i up to
n, with s_ni the scaled scores of softmax attention, m_n their largest within the window of w tokens, g a learned factor
for each head, and f_q, f_k learned positive features of the rotated queries and keys,

    a_ni = sigmoid(g) exp(s_ni - m_n)   for n - w < i <= n
    a_ni = f_q(q_n) . f_k(k_i)          for i <= n - w
    y_n  = sum_i a_ni v_i / sum_i a_ni.

The recurrent state is the sum of f_k(k_i) (x) v_i over the tokens that have left the window. So the op reads at query n
the key and value of token n - w, and a cache holds the keys and values of the last w tokens beside the state. Memory is
linear in the length, except in a traced graph (torch.compile, torch.export), which computes the scores of all L x M
pairs, since a number of blocks would fix the length.

Deviation: the maps start as the identity where they keep the size of a head, as Hedgehog proposes, and else from a
normal distribution; the cited code starts them from a uniform one (Kaiming's).

Symbols: B batch, L new tokens, M key columns of the cache and the new tokens, D width, H query heads, G key-value
heads, P head width, F features before their negatives, w window, T queries of a block, S columns that they see.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from ..kernels.checks import without_autocast
from ..kernels.ssd import ssd_log_decay, ssd_log_decay_step
from ..kernels.tracing import tracing
from .cache import RecurrentLayer, WindowLayer, layer_of
from .layers import GroupedAttention, hedgehog_features, soft_capped
from .mixer import (
    FromAttention,
    MixerSettings,
    TokenMixer,
    check_sizes,
    distillation,
    initialise_alone,
    is_single_step,
    matrix_rows,
)
from .token_layout import Sequence

_START = -2.1972246  # sigmoid of it is 0.1, as in the cited configuration
_SMALLEST_ROW_SUM = 1e-6
_BLOCK = 64


class LinearAttentionLayer(WindowLayer, RecurrentLayer):
    """The last w keys and values, as in :class:`WindowLayer`, and `recurrent_state` (B, H, P + 1, 2 F) in float32."""

    _layer_type = "zoo_linear_attention"
    _tensors = (*WindowLayer._tensors, "recurrent_state")


class LinearAttention(GroupedAttention):
    """Linear attention beyond a window, softmax attention within it.

    Args:
        config: the model's.
        settings: a :class:`LinearAttentionSettings`.
        layer_idx: number of the block.
    """

    def __init__(self, config: Any, settings: "LinearAttentionSettings", layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.window = settings.sliding_window
        self.feature_size = int(settings.feature_size or 0)
        self.add_projections(config, config.attention_bias, layer_idx)
        self.q_features = nn.Parameter(torch.empty(self.num_heads, self.head_dim, self.feature_size))
        self.k_features = nn.Parameter(torch.empty(self.num_heads, self.head_dim, self.feature_size))
        self.window_factors = nn.Parameter(torch.empty(self.num_heads))
        initialise_alone(self.initialise)

    def initialise(self) -> None:
        """Set the feature maps, and the factor of each window to 0.1."""
        for weight in (self.q_features, self.k_features):
            if self.feature_size == self.head_dim:
                identity = torch.eye(self.head_dim, device=weight.device, dtype=weight.dtype)
                init.copy_(weight, identity.expand_as(weight))
            else:
                init.normal_(weight, std=self.head_dim**-0.5)
        init.constant_(self.window_factors, _START)

    def forward(
        self,
        hidden_states: Tensor,
        sequence: Sequence,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) to (B, L, D), and the (B, H, L, past + L) matrix a_ni / sum_i a_ni if asked for."""
        cache = layer_of(past_key_values, self.layer_idx)
        single = is_single_step(hidden_states, sequence, cache)
        hidden_states = sequence.blank(hidden_states)
        q, k = self._queries_and_keys(hidden_states, sequence)
        v = self.v_proj(hidden_states).unflatten(-1, (self.num_kv_heads, self.head_dim))
        attention = matrix_rows(self.mixing_matrix, (q, k), sequence, cache) if output_attentions else None
        real = held = sequence.real
        if cache is not None:  # a window more by one token, the one that leaves it next
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            k, v, positions, _ = cache.update(k, v, window=self.window + 1, real=real)
            k, v, held = k.transpose(1, 2), v.transpose(1, 2), positions >= 0
        seq_idx, back = sequence.seq_idx, None
        if real is not None and held is not None and seq_idx is not None:
            # Real tokens to the right of their rows, in their order: then a window is a range of columns.
            order, key_order = (mask.to(torch.int8).argsort(dim=1, stable=True) for mask in (real, held))
            back = order.argsort(dim=1)
            q, k, v = gathered(q, order), gathered(k, key_order), gathered(v, key_order)
            seq_idx, held = seq_idx.gather(1, order), held.gather(1, key_order)
        if held is None:
            held = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
        columns = _Columns(held, None if sequence.past else seq_idx)
        with without_autocast(q):
            far = self._far_sums(q, k, v, columns, seq_idx, cache, single)
            sums = far + self._near_sums(q, k, v, columns)
            y = (sums[..., :-1] / sums[..., -1:].clamp(min=_SMALLEST_ROW_SUM)).to(q.dtype)  # 0 / 0 at padding
        y = y if back is None else gathered(y, back)
        return self.o_proj(y.flatten(2)), attention

    @distillation
    def hidden_attention(self, hidden_states: Tensor, sequence: Sequence) -> Tensor:
        """(B, H, L, L) matrix of normed (B, L, D) hidden states, without the outputs."""
        return self.mixing_matrix(*self._queries_and_keys(hidden_states, sequence), sequence)

    def mixing_matrix(self, q: Tensor, k: Tensor, sequence: Sequence) -> Tensor:
        """(B, H, L, L) matrix of (B, L, H, P) queries and (B, L, G, P) keys of a row from its first column on."""
        places = sequence.row_positions()
        distance = places[:, :, None] - places[:, None]
        seen = torch.ones_like(distance, dtype=torch.bool).tril()
        if sequence.seq_idx is not None:
            document = sequence.seq_idx
            seen = seen & (document[:, :, None] == document[:, None]) & (document >= 0)[:, None]
        far = (seen & (distance >= self.window))[:, None]
        near = (seen & (distance < self.window))[:, None]
        k = self._for_all_heads(k)
        with without_autocast(q):
            C, B = features(q, self.q_features), features(k, self.k_features)
            found = self._weights(q, k, near) + torch.where(far, torch.einsum("bthf,bshf->bhts", C, B), 0)
            return found / found.sum(-1, keepdim=True).clamp(min=_SMALLEST_ROW_SUM)

    def _queries_and_keys(self, hidden_states: Tensor, sequence: Sequence) -> tuple[Tensor, Tensor]:
        """(B, L, H, P) queries and (B, L, G, P) keys, with norm and rotary embedding."""
        q = self.to_heads(self.q_proj(hidden_states), self.q_norm, sequence)
        return q, self.to_heads(self.k_proj(hidden_states), self.k_norm, sequence)

    def _for_all_heads(self, x: Tensor) -> Tensor:
        """(B, M, G, P) to (B, M, H, P)."""
        return x.repeat_interleave(self.num_key_value_groups, dim=2)

    def _far_sums(
        self, q: Tensor, k: Tensor, v: Tensor, columns: "_Columns", seq_idx: Tensor | None, cache: Any, single: bool
    ) -> Tensor:
        """Sum the values that have left the window, weighted by features, and the weights; update the cache's state.

        Args:
            q: (B, L, H, P) queries of the new tokens.
            k: (B, M, G, P) keys; the last L are the new tokens'.
            v: (B, M, G, P) values.
            columns: which columns hold tokens, and of which documents.
            seq_idx: (B, L) documents of the new tokens, negative at padding; None if there is neither.
            cache: the mixer's layer of the cache, or None.
            single: whether to update the state in place (`is_single_step`).

        Returns:
            (B, L, H, P + 1) in float32 or wider, the sum of the weights last.
        """
        length, total = q.shape[1], k.shape[1]
        before = self.window - (total - length)  # columns to the left of those that are given
        left_k, left_v = (F.pad(x, (0, 0, 0, 0, before, 0))[:, :length] for x in (k, v))
        B = features(self._for_all_heads(left_k), self.k_features)
        B = B * columns.that_left(length, self.window)[:, :, None, None]
        C, values = features(q, self.q_features), self._for_all_heads(left_v).to(B.dtype)
        keep = C.new_zeros(C.shape[:3])  # log-decay
        state: Any = None if cache is None else cache.recurrent_state
        if single:
            token = (each[:, 0] for each in (values, keep, B, C))
            y, weights = ssd_log_decay_step(state, *token, row_sums=True)
            return torch.cat([y, weights[..., None]], dim=-1)[:, None]
        y, weights, state = ssd_log_decay(
            *(values, keep, B, C), initial_state=state, seq_idx=seq_idx, return_final_state=True, row_sums=True
        )
        if cache is not None:
            cache.recurrent_state = state
        return torch.cat([y, weights[..., None]], dim=-1)

    def _near_sums(self, q: Tensor, k: Tensor, v: Tensor, columns: "_Columns") -> Tensor:
        """Sum the values within the window, weighted by scores, and the weights, with memory linear in the length.

        Args:
            q: (B, L, H, P) queries of the new tokens.
            k: (B, M, G, P) keys; the last L are the new tokens'.
            v: (B, M, G, P) values.
            columns: which columns hold tokens, and of which documents.

        Returns:
            (B, L, H, P + 1) in float32 or wider, the sum of the weights last.
        """
        (batch, length), total = q.shape[:2], k.shape[1]
        k, v = self._for_all_heads(k), self._for_all_heads(v)
        block = max(self.window, _BLOCK)
        if tracing() or length <= 2 * block:
            return self._sums_of_block(q, k, v, columns.seen(length, self.window))
        short, before = -length % block, self.window - 1 - (total - length)
        blocks, reach = (length + short) // block, block + self.window - 1

        def own(x: Tensor, value: float = 0) -> Tensor:
            """Cut (B, L, ...) columns into (B blocks, T, ...)."""
            padding = (0, 0) * (x.dim() - 2) + (0, short)
            return F.pad(x, padding, value=value).unflatten(1, (blocks, block)).flatten(0, 1)

        def reached(x: Tensor, value: float = 0) -> Tensor:
            """Cut (B, M, ...) columns into the (B blocks, S, ...) that each block sees."""
            padding = (0, 0) * (x.dim() - 2) + (before, short)
            return F.pad(x, padding, value=value).unfold(1, reach, block).movedim(-1, 2).flatten(0, 1)

        seen = columns.cut(own, reached).seen(block, self.window)
        sums = self._sums_of_block(own(q), reached(k), reached(v), seen)
        return sums.unflatten(0, (batch, blocks)).flatten(1, 2)[:, :length]

    def _sums_of_block(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        """(B, T, H, P + 1) weighted sums for (B, T, H, P) queries and (B, S, H, P) keys and values under a mask."""
        weights = self._weights(q, k, seen)
        sums = torch.einsum("bhts,bshp->bthp", weights, v.to(weights.dtype))
        return torch.cat([sums, weights.sum(-1).transpose(1, 2)[..., None]], dim=-1)

    def _weights(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        """(B, H, T, M) terms sigmoid(g) exp(s - m) of the keys that a query sees, 0 elsewhere."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        scores = torch.einsum("bthp,bshp->bhts", q.to(dtype), k.to(dtype)) * self.scaling
        if self.softcap is not None:
            scores = soft_capped(scores, self.softcap)
        scores = scores.masked_fill(~seen, -torch.inf)
        largest = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min)  # -inf where nothing is seen
        return self.window_factors.to(dtype).sigmoid()[:, None, None] * (scores - largest).exp()


class _Columns:
    """The columns of keys that hold tokens, and their documents. The last L of M columns are those of the queries.

    Args:
        held: (B, M) False at columns without a token.
        own: (B, L) documents of the queries, negative at padding, if a row may have several; else None.
        documents: (B, M) documents of the columns; None: those of the queries, with M = L.
    """

    def __init__(self, held: Tensor, own: Tensor | None, documents: Tensor | None = None) -> None:
        self.held, self.own = held, own
        self.documents = own if documents is None else documents

    def seen(self, length: int, window: int) -> Tensor:
        """Return the (B, 1, L, M) mask of the columns that each query sees in its window."""
        total, device = self.held.shape[1], self.held.device
        place = torch.arange(length, device=device)[:, None] + (total - length)
        column = torch.arange(total, device=device)
        mask = (column <= place) & (column > place - window) & self.held[:, None]
        if self.own is not None and self.documents is not None:
            mask = mask & (self.own[:, :, None] == self.documents[:, None])
        return mask[:, None]

    def that_left(self, length: int, window: int) -> Tensor:
        """Return the (B, L) mask of the queries at which a token of their own document leaves the window."""
        before = window - (self.held.shape[1] - length)
        mask = F.pad(self.held, (before, 0), value=False)[:, :length]
        if self.own is not None:
            mask = mask & (F.pad(self.own, (window, 0), value=-1)[:, :length] == self.own)
        return mask

    def cut(self, own: Any, reached: Any) -> "_Columns":
        """Return the same for blocks, by functions that cut queries and columns."""
        if self.own is None:
            return _Columns(reached(self.held), None)
        return _Columns(reached(self.held), own(self.own, -1), reached(self.documents, -1))


def features(x: Tensor, weight: Tensor) -> Tensor:
    """(B, M, H, P) queries or keys to (B, M, H, 2 F) features in float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return hedgehog_features(x.to(dtype), weight.to(dtype))


def gathered(x: Tensor, order: Tensor) -> Tensor:
    """Put the columns of (B, M, H, P) values into an order (B, M)."""
    return x.gather(1, order[:, :, None, None].expand_as(x))


@strict
@dataclass
class LinearAttentionSettings(MixerSettings):
    """Linear attention beyond a window in `zoo_hybrid`.

    Args:
        sliding_window: w, tokens with softmax attention, the query's own included.
        feature_size: F, size of the learned maps of queries and keys, of which softmax makes 2 F features; the width of
            a head if not given.
    """

    sliding_window: int = 64
    feature_size: int | None = None

    def validate_sizes(self) -> None:
        check_sizes(self, "sliding_window", "feature_size")

    def complete(self, config: Any) -> None:
        if self.feature_size is None:
            self.feature_size = config.head_dim


LINEAR_ATTENTION = TokenMixer(
    label="linear attention with learned features, and softmax attention over a sliding window",
    make=LinearAttention,
    settings=LinearAttentionSettings,
    cache_layer="zoo_linear_attention",
    student=FromAttention(
        lambda teacher, spec: {
            "linear_attention": {"sliding_window": spec.sliding_window, "feature_size": spec.feature_size}
        },
        ("sliding_window", "feature_size", "calibration"),
        is_attention=True,
        learned_features=True,
    ),
)
