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

The recurrent state is the sum of f_k(k_i) (x) v_i over **all** tokens, and what it holds of the window is taken out of
the sums. So a token enters the state when it is read, and a cache holds the state and the window's keys and values.
The sums are float32: where all tokens are in the window, the two parts cancel.

Symbols: B batch, L new tokens, M key columns of the window and the new tokens, D width, H query heads, G key-value
heads, P head width, F features, w window, T queries of a block.
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
    """What a :class:`WindowLayer` holds, and `recurrent_state` (B, H, P + 1, 2 F) in float32."""

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
        """Start with features of single channels, and a factor of 0.1 for the window."""
        for weight in (self.q_features, self.k_features):
            identity = torch.eye(*weight.shape[1:], device=weight.device, dtype=weight.dtype)
            init.copy_(weight, identity.expand_as(weight))
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
        own_k, real, near_real = k, sequence.real, sequence.real
        if cache is not None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            k, v, positions, _ = cache.update(k, v, window=self.window, real=real)
            k, v, near_real = k.transpose(1, 2), v.transpose(1, 2), positions >= 0
        k, v = self._for_all_heads(k), self._for_all_heads(v)
        with without_autocast(q):
            C, B = features(q, self.q_features), features(k, self.k_features)
            v = v.to(C.dtype)
            sums = self._sums_of_all(C, B, v, sequence, cache, single)
            documents = sequence.seq_idx if sequence.packed and not sequence.past else None
            sums = sums + self._correction((q, C), (k, B, v), real, near_real, documents)
        y = (sums[..., :-1] / sums[..., -1:].clamp(min=_SMALLEST_ROW_SUM)).to(q.dtype)
        attention = matrix_rows(self.mixing_matrix, (q, own_k), sequence, cache) if output_attentions else None
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

    def _sums_of_all(self, C: Tensor, B: Tensor, v: Tensor, sequence: Sequence, cache: Any, single: bool) -> Tensor:
        """Sum the values of all tokens, weighted by features, and the weights; update the cache's state.

        Args:
            C: (B, L, H, 2 F) features of the queries.
            B: (B, M, H, 2 F) features of the keys; the last L are the new tokens'.
            v: (B, M, H, P) values.
            sequence: where the tokens stand.
            cache: the mixer's layer of the cache, or None.
            single: whether to update the state in place (`is_single_step`).

        Returns:
            (B, L, H, P + 1), the sum of the weights last.
        """
        length = C.shape[1]
        B, v = B[:, -length:], v[:, -length:]
        keep = C.new_zeros(C.shape[:3])  # log-decay
        state: Any = None if cache is None else cache.recurrent_state
        if single:
            token = (each[:, 0] for each in (v, keep, B, C))
            y, weights = ssd_log_decay_step(state, *token, row_sums=True)
            return torch.cat([y, weights[..., None]], dim=-1)[:, None]
        y, weights, state = ssd_log_decay(
            *(v, keep, B, C),
            initial_state=state,
            seq_idx=sequence.seq_idx,
            return_final_state=True,
            row_sums=True,
        )
        if cache is not None:
            cache.recurrent_state = state
        return torch.cat([y, weights[..., None]], dim=-1)

    def _correction(
        self,
        queries: tuple[Tensor, Tensor],
        keys: tuple[Tensor, Tensor, Tensor],
        real: Tensor | None,
        near_real: Tensor | None,
        documents: Tensor | None,
    ) -> Tensor:
        """Return what the window adds to the sums of all tokens: its softmax terms less its features' terms.

        Args:
            queries: (B, L, H, ...) queries of the new tokens and their features.
            keys: (B, M, H, ...) keys, their features, and values; the last L are the new tokens'.
            real: (B, L) False at padding; None if there is none.
            near_real: (B, M) False at columns without a token; None if there are none.
            documents: (B, L) document of each token if a row may have several, and M = L; else None.

        Returns:
            (B, L, H, P + 1), arbitrary and finite at padding.
        """
        length, columns = queries[0].shape[1], keys[0].shape[1]
        back = None
        if real is not None and near_real is not None:
            # Real tokens to the right of their rows, in their order: then a window is a range of columns.
            order, key_order = (mask.to(torch.int8).argsort(dim=1, stable=True) for mask in (real, near_real))
            back = order.argsort(dim=1)
            queries = tuple(gathered(x, order) for x in queries)  # pyright: ignore[reportAssignmentType]
            keys = tuple(gathered(x, key_order) for x in keys)  # pyright: ignore[reportAssignmentType]
            near_real = near_real.gather(1, key_order)
            documents = None if documents is None else documents.gather(1, order)
        if tracing() or length <= 2 * max(self.window, _BLOCK):  # a graph with blocks would have a fixed length
            sums = self._near_sums(queries, keys, self._seen(length, near_real, documents, documents, columns))
        else:
            sums = self._near_sums_in_blocks(queries, keys, near_real, documents)
        return sums if back is None else gathered(sums, back)

    def _near_sums_in_blocks(
        self,
        queries: tuple[Tensor, Tensor],
        keys: tuple[Tensor, Tensor, Tensor],
        held: Tensor | None,
        documents: Tensor | None,
    ) -> Tensor:
        """Compute :meth:`_near_sums` with memory linear in the length."""
        (batch, length), columns = queries[0].shape[:2], keys[0].shape[1]
        block = max(self.window, _BLOCK)
        short, missing = -length % block, self.window - 1 - (columns - length)
        blocks, reach = (length + short) // block, block + self.window - 1  # columns that the queries of a block see

        def own(x: Tensor, value: float = 0) -> Tensor:
            """Cut (B, L, ...) columns into (B blocks, T, ...)."""
            padding = (0, 0) * (x.dim() - 2) + (0, short)
            return F.pad(x, padding, value=value).unflatten(1, (blocks, block)).flatten(0, 1)

        def seen(x: Tensor, value: float = 0) -> Tensor:
            """Cut (B, M, ...) columns into the (B blocks, S, ...) that each block sees."""
            padding = (0, 0) * (x.dim() - 2) + (missing, short)
            return F.pad(x, padding, value=value).unfold(1, reach, block).movedim(-1, 2).flatten(0, 1)

        q, C = queries
        k, B, v = keys
        if held is None:
            held = torch.ones(batch, columns, dtype=torch.bool, device=q.device)
        places = (None, None) if documents is None else (own(documents, -1), seen(documents, -1))
        mask = self._seen(block, seen(held), *places, reach)
        sums = self._near_sums((own(q), own(C)), (seen(k), seen(B), seen(v)), mask)
        return sums.unflatten(0, (batch, blocks)).flatten(1, 2)[:, :length]

    def _seen(self, length: int, held: Tensor | None, own: Tensor | None, there: Tensor | None, columns: int) -> Tensor:
        """Return the (B or 1, 1, T, S) mask of what the last T of S columns see in their windows.

        Args:
            length: T.
            held: (B, S) False at columns without a token; None if there are none.
            own: (B, T) documents of the queries; None if a row is one document.
            there: (B, S) documents of the columns.
            columns: S.
        """
        device = self.window_factors.device
        place = torch.arange(length, device=device)[:, None] + (columns - length)
        column = torch.arange(columns, device=device)
        seen = ((column <= place) & (column > place - self.window))[None]
        if held is not None:
            seen = seen & held[:, None]
        if own is not None and there is not None:
            seen = seen & (own[:, :, None] == there[:, None])
        return seen[:, None]

    def _near_sums(self, queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor, Tensor], seen: Tensor) -> Tensor:
        """Sum what queries see, weighted by scores less features.

        Args:
            queries: (B, T, H, ...) queries and their features.
            keys: (B, S, H, ...) keys, their features, and values.
            seen: (B or 1, 1, T, S) mask.

        Returns:
            (B, T, H, P + 1).
        """
        q, C = queries
        k, B, v = keys
        weights = self._weights(q, k, seen) - torch.where(seen, torch.einsum("bthf,bshf->bhts", C, B), 0)
        sums = torch.einsum("bhts,bshp->bthp", weights, v)
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
        lambda teacher, spec: {"linear_attention": {"sliding_window": spec.sliding_window}},
        ("sliding_window", "calibration"),
        is_attention=True,
        learned_features=True,
    ),
)
