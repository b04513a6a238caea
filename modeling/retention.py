"""Multi-scale retention: linear attention with a fixed decay per head, rotary positions, a norm per head and a gate.

Paper: Sun et al., "Retentive Network" (arXiv 2307.08621), section 2; official code: microsoft/torchscale@4d1e0e8,
`component/multiscale_retention.py` and `architecture/retnet.py`.

Symbols: B batch, L length, D width, H heads, P key head width, V value head width; q, k, v queries, keys and values,
g gate, S state (B, H, V, P).

Head h has the decay gamma = 1 - 2^(-5 - h), the same in every layer. For token n of a document, with q and k rotated,

    S_n = gamma S_{n-1} + v_n (x) k_n / sqrt(P),   o_n = S_n q_n,   y_n = W_O (silu(W_G x_n) * RMSNorm(o_n)).

This is SSD with a constant decay (`kernels/ssd.py`): whole, in chunks and token by token are one recurrence. In matrix
form o = R v, with R_nm = q_n . k_m gamma^(n-m) / sqrt(P) for m <= n.

Score normalisation (the paper's, section 2.2): R_nm is divided by sqrt(sum_m gamma^(n-m)), then each row by
max(|sum_m R_nm|, 1). Both are constant along a row, so the head's norm cancels them, up to its epsilon. Both are
computed from what the recurrence carries: the first sum is (1 - gamma^(n+1)) / (1 - gamma), for which the cache counts
the tokens of each row; the second is a result of the op (`row_sums`). No gradient flows through the second one, as in
the official code; where the matrix itself is trained, it does.

An encoder (`bidirectional`) has gamma^|n-m|, as in RMT (arXiv 2309.11523), here along one dimension: a second scan from
the end of every document, with the same parameters and without the diagonal. With `prefix_bidirectional` the second
scan is over prefixes only (`prefix.py`), and the sum of decays is over the tokens that a token sees.

Deviations from the official code:

* Its forms normalise differently: the recurrent one omits the second division, the chunkwise one sums absolute values
  within a chunk. Here every form divides as the parallel one of the paper and of release 0.3.0, so that they agree
  before the norm too. (The parallel form of the present code sums absolute scores, which no recurrence can.)
* Its cache holds one decay sum for the whole batch, which is wrong for rows with different amounts of padding.
* It rotates neighbouring channels, here the two halves of a head are paired, as in Llama. A permutation of the rows of
  W_Q and W_K leads from one to the other (`conversion/formats/torchscale_retnet.py`).
* It takes log(1 - 2^(-5 - h)) in float32, which is 0 from the twentieth head on; here it is log1p.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from ..kernels.ssd import ssd_log_decay, ssd_log_decay_step, ssd_matrix
from .cache import RecurrentLayer, StateLayer, layer_of
from .layers import PlainRMSNorm, RMSNorm, make_qk_norm, normed_heads, output_bias, position_type, rotate
from .mixer import (
    FromAttention,
    MixerSettings,
    TokenMixer,
    check_sizes,
    copy_output,
    distillation,
    initialise_alone,
    is_single_step,
    matrix_rows,
)
from .prefix import prefix_alone
from .token_layout import Sequence

_HEADS = 144
"""Largest number of heads: 2^(-5 - h) is 0 in float32 from h = 145 on."""


class RetentionLayer(StateLayer, RecurrentLayer):
    """`recurrent_state` (B, H, V, P) in float32, with one more row if scores are normalised, and `counts` (B)."""

    _layer_type = "zoo_retention"
    _tensors = StateLayer._tensors  # there is no convolution


class Retention(nn.Module):
    """Multi-scale retention with grouped key-value heads.

    Args:
        config: the model's configuration.
        layer_idx: index of the block.
        v_head_dim: V.
        use_output_gate: multiply the normed output by silu(W_G x).
        normalize_scores: divide the scores as described above.
        elementwise_affine: give the norm of the heads a weight (V), which they share.
    """

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        *,
        v_head_dim: int,
        use_output_gate: bool = True,
        normalize_scores: bool = True,
        elementwise_affine: bool = False,
    ) -> None:
        super().__init__()
        if config.num_attention_heads > _HEADS:
            raise ValueError(
                f"num_attention_heads must be at most {_HEADS} with retention, whose further decays are 1 in float32, "
                f"got {config.num_attention_heads}"
            )
        self.layer_idx = layer_idx
        self.num_heads, self.num_kv_heads = config.num_attention_heads, int(config.num_key_value_heads or 0)
        self.head_dim, self.v_head_dim = int(config.head_dim or 0), v_head_dim
        self.normalize_scores = normalize_scores
        self.bidirectional = bool(getattr(config, "bidirectional", False))
        width, bias = config.hidden_size, bool(getattr(config, "attention_bias", False))
        self.q_proj = nn.Linear(width, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.num_kv_heads * v_head_dim, bias=bias)
        self.g_proj = nn.Linear(width, self.num_heads * v_head_dim, bias=False) if use_output_gate else None
        self.o_proj = nn.Linear(self.num_heads * v_head_dim, width, bias=output_bias(config, bias))
        self.qk_norm, self.positions = getattr(config, "qk_norm", None), position_type(config, layer_idx)
        self.q_norm = make_qk_norm(config, self.num_heads, self.head_dim)
        self.k_norm = make_qk_norm(config, self.num_kv_heads, self.head_dim)
        scalar = getattr(config, "query_pre_attn_scalar", None)
        self.scaling = (self.head_dim if scalar is None else scalar) ** -0.5
        eps = config.rms_norm_eps
        self.group_norm = RMSNorm(v_head_dim, eps) if elementwise_affine else PlainRMSNorm(eps)
        initialise_alone(self.initialise)

    def initialise(self) -> None:
        """Initialise as torchscale does: Xavier's uniform with gain 2^-2.5, of the output 2^-1; biases 0."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.o_proj):
            if projection is None:
                continue
            init.xavier_uniform_(projection.weight, gain=2**-1 if projection is self.o_proj else 2**-2.5)
            if projection.bias is not None:
                init.zeros_(projection.bias)

    def forward(
        self,
        hidden_states: Tensor,
        sequence: Sequence,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) to (B, L, D), and the (B, H, L, past + L) mixing matrix R if asked for."""
        cache = layer_of(past_key_values, self.layer_idx)
        hidden_states = sequence.blank(hidden_states)
        single = is_single_step(hidden_states, sequence, cache)
        ranks = sequence.places() if cache is None else cache.advance(hidden_states, sequence.real)
        factors = self.matrix_inputs(hidden_states, sequence, ranks)
        v = self.for_all_heads(self.v_proj(hidden_states).unflatten(-1, (self.num_kv_heads, self.v_head_dim)))
        dtype = v.dtype
        if self.normalize_scores and dtype == torch.float16:  # which outputs may exceed before they are divided
            v = v.float()
        o, *sums = self.retain(v, factors, sequence, cache, single)
        if self.normalize_scores:
            o = (o / sums[0].detach().abs().clamp(min=1)[..., None]).to(dtype)
        y = self.group_norm(o).flatten(2)
        if self.g_proj is not None:
            y = F.silu(self.g_proj(hidden_states)) * y
        attention = matrix_rows(self.mixing_matrix, factors, sequence, cache) if output_attentions else None
        return self.o_proj(y), attention

    def retain(
        self, v: Tensor, factors: tuple[Tensor, Tensor, Tensor], sequence: Sequence, cache: Any, single: bool
    ) -> tuple[Tensor, ...]:
        """Compute outputs of the recurrence and update the cache's state.

        Args:
            v: (B, L, H, V) values.
            factors: see :meth:`matrix_inputs`.
            sequence: the `Sequence` of the inputs.
            cache: the mixer's layer of the cache, or None.
            single: whether to update the state in place (`is_single_step`).

        Returns:
            (B, L, H, V) outputs; if scores are normalised also the (B, L, H) row sums of R.
        """
        log_decay, k, q = factors
        state: Any = None if cache is None else cache.recurrent_state
        row_sums = self.normalize_scores
        if single:
            token = (each[:, 0] for each in (v, log_decay, k, q))
            found = ssd_log_decay_step(state, *token, row_sums=row_sums)
            return tuple(each[:, None] for each in (found if isinstance(found, tuple) else (found,)))
        *found, state = ssd_log_decay(
            *(v, log_decay, k, q),
            initial_state=state,
            seq_idx=sequence.seq_idx,
            return_final_state=True,
            row_sums=row_sums,
        )
        if cache is not None:
            cache.recurrent_state = state
        turned = self.read_backwards(sequence)
        if turned is None:
            return tuple(found)
        ahead = scan_ahead(v, log_decay, k, q, turned, row_sums)
        return tuple(own + more for own, more in zip(found, ahead, strict=True))

    def read_backwards(self, sequence: Sequence) -> Sequence | None:
        """Return the layout of the tokens that are read backwards too: all, those of prefixes, or None for none."""
        if self.bidirectional:
            return sequence
        return None if sequence.prefix is None else prefix_alone(sequence)

    def matrix_inputs(self, hidden_states: Tensor, sequence: Sequence, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the factors of the mixing matrix.

        Args:
            hidden_states: (B, L, D) normed hidden states.
            sequence: their `Sequence`.
            ranks: (B or 1, L) rank of each token in its document; arbitrary at padding.

        Returns:
            Log-decays (B, L, H) in float32 or wider, scaled keys and queries (B, L, H, P). Queries are divided by the
            square root of the row's sum of decays if scores are normalised.
        """
        q = normed_heads(self.q_proj(hidden_states), self.q_norm, self.qk_norm, self.head_dim)
        k = normed_heads(self.k_proj(hidden_states), self.k_norm, self.qk_norm, self.head_dim)
        tables = sequence.rotary_tables(self.positions)
        if tables is not None:
            cos, sin = (table[:, :, None] for table in tables)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k = self.for_all_heads(k * self.scaling)
        log_decay = log_decays(self.num_heads, hidden_states)
        if self.normalize_scores:
            sums = decay_sums(log_decay, ranks)
            turned = self.read_backwards(sequence)
            if turned is not None:  # the token itself counts once
                ranks = ranks.expand(hidden_states.shape[0], -1)
                ahead = decay_sums(log_decay, turned.reverse(ranks)) - 1
                sums = sums + (ahead if turned is sequence else turned.blank(ahead))
            q = (q * sums.rsqrt()[..., None]).to(q.dtype)
        return log_decay.expand(*hidden_states.shape[:2], -1), k, q

    def for_all_heads(self, x: Tensor) -> Tensor:
        """Repeat (B, L, key-value heads, ...) keys or values for the H heads."""
        members = self.num_heads // self.num_kv_heads
        return x if members == 1 else x.repeat_interleave(members, dim=2)

    @distillation
    def hidden_attention(self, hidden_states: Tensor, sequence: Sequence) -> Tensor:
        """Return the (B, H, L, L) matrix R for normed (B, L, D) hidden states, without the outputs."""
        factors = self.matrix_inputs(sequence.blank(hidden_states), sequence, sequence.places())
        return self.mixing_matrix(*factors, sequence)

    @distillation
    def log_decay(self, hidden_states: Tensor) -> Tensor:
        """Return the (B, L, H) log-decays for (B, L, D) hidden states, on which they do not depend."""
        return log_decays(self.num_heads, hidden_states).expand(*hidden_states.shape[:2], -1)

    def mixing_matrix(self, log_decay: Tensor, k: Tensor, q: Tensor, sequence: Sequence) -> Tensor:
        """(B, H, L, L) matrix R: o = R v per head, before norm and gate."""
        matrix = ssd_matrix(log_decay, k, q, seq_idx=sequence.seq_idx)
        turned = self.read_backwards(sequence)
        if turned is not None:
            matrix = matrix + matrix_ahead(log_decay, k, q, turned)
        if self.normalize_scores:
            matrix = matrix / matrix.sum(-1, keepdim=True).abs().clamp(min=1)
        return matrix

    @distillation
    @torch.no_grad()
    def start_from(self, view: Any) -> None:
        """Copy the projections and norms of an attention layer: q, k, v and o. Decays are fixed, and a soft cap of the
        scores is ignored.

        Raises:
            ValueError: if the sizes differ.
        """
        sizes = (self.num_heads, self.num_kv_heads, self.head_dim, self.v_head_dim)
        if sizes != (view.num_heads, view.num_key_value_heads, view.head_dim, view.head_dim):
            raise ValueError(
                f"retention must have the attention's {view.num_heads} heads, {view.num_key_value_heads} key-value "
                f"heads and {view.head_dim} channels of keys and values to copy its projections, got {sizes[0]}, "
                f"{sizes[1]}, {sizes[2]} and {sizes[3]}"
            )
        for name in ("q", "k", "v"):
            projection, bias = getattr(self, f"{name}_proj"), getattr(view, f"{name}_bias")
            projection.weight.copy_(getattr(view, name))
            if projection.bias is not None:
                projection.bias.copy_(torch.zeros(()) if bias is None else bias)
        for mine, theirs in ((self.q_norm, view.q_norm), (self.k_norm, view.k_norm)):
            if mine is not None and theirs is not None:
                for parameter, value in zip(mine.parameters(), theirs.parameters(), strict=True):
                    parameter.copy_(value)
        copy_output(self.o_proj, view)


def scan_ahead(
    values: Tensor, log_decay: Tensor, k: Tensor, q: Tensor, turned: Sequence, row_sums: bool
) -> tuple[Tensor, ...]:
    """Return the (B, L, H, V) outputs of a scan from the end of each document, 0 at padding.

    They are without the diagonal, which the scan from its start has. With `row_sums` the (B, L, H) row sums follow.

    Args:
        values: (B, L, H, V).
        log_decay: (B, L, H).
        k: (B, L, H, P) keys.
        q: (B, L, H, P) queries.
        turned: the layout of the tokens that are read.
        row_sums: whether to return the row sums.
    """
    found = ssd_log_decay(*map(turned.reverse, (values, log_decay, k, q)), seq_idx=turned.seq_idx, row_sums=row_sums)
    y, *sums = map(turned.reverse, found if isinstance(found, tuple) else (found,))
    diagonal = (q * k).sum(-1)
    ahead = y - diagonal[..., None] * values, *(each - diagonal for each in sums)
    if turned.real is None:
        return ahead
    return tuple(each.masked_fill(~turned.real.view(*turned.real.shape, *[1] * (each.dim() - 2)), 0) for each in ahead)


def matrix_ahead(log_decay: Tensor, k: Tensor, q: Tensor, turned: Sequence) -> Tensor:
    """Return the (B, H, L, L) matrix of :func:`scan_ahead`: 0 on the diagonal, below it, and in rows of padding."""
    ahead = ssd_matrix(*map(turned.reverse, (log_decay, k, q)), seq_idx=turned.seq_idx)
    ahead = turned.reverse(turned.reverse(ahead, 2), 3).triu(1)
    return ahead if turned.real is None else ahead * turned.real[:, None, :, None]


def log_decays(heads: int, like: Tensor) -> Tensor:
    """Return the (H) logarithms of the decays 1 - 2^(-5 - h), in float32, or float64 for a float64 tensor."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(heads, device=like.device, dtype=dtype)))


def decay_sums(log_decay: Tensor, ranks: Tensor) -> Tensor:
    """Return the (B or 1, L, H) sums of gamma^i for i from 0 to the (B or 1, L) ranks; 1 for negative ranks."""
    terms = ranks.clamp(min=0)[..., None].to(log_decay.dtype) + 1
    return torch.expm1(terms * log_decay) / torch.expm1(log_decay)


@strict
@dataclass
class RetentionSettings(MixerSettings):
    """Multi-scale retention in `zoo_hybrid`, with the heads and the rotary embedding of attention.

    Args:
        v_head_dim: V, width of a value head; twice the width of an attention head if not given.
        use_output_gate: multiply the output by silu(W_G x).
    """

    v_head_dim: int | None = None
    use_output_gate: bool = True

    def validate_sizes(self) -> None:
        check_sizes(self, "v_head_dim")

    def complete(self, config: Any) -> None:
        if self.v_head_dim is None:
            self.v_head_dim = 2 * config.head_dim


def _retention_keys(teacher: Any, spec: Any) -> dict[str, Any]:
    # Attention has neither wider values nor a gate. An untrained gate would close the copied projections.
    return {"retention": {"v_head_dim": teacher.head_dim, "use_output_gate": False}}


RETENTION = TokenMixer(
    label="retention: linear attention with fixed decays",
    make=lambda config, settings, layer_idx: Retention(config, layer_idx, **vars(settings)),
    settings=RetentionSettings,
    bidirectional=True,
    cache_layer="zoo_retention",
    prefix=True,
    student=FromAttention(_retention_keys, ("calibration", "copy_projections")),
    tags=("retnet",),
)
