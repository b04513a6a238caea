"""Selective attention: a gate selects the tokens that attend, over a window and without a dense mask.

Source: Taipan (arXiv 2410.18572), section 3.2, equations 1 to 5. No code or checkpoint of it is public.

Symbols: B batch, L new tokens, M selected ones, K key columns, D width, H heads, G key-value heads, P head width;
s gate scores, m decisions, a mixing weights, o outputs of attention, h the residual stream.

    s_t = gate(x_t),  m_t = argmax(s_t + Gumbel noise) in training, argmax(s_t) otherwise,  a_t = softmax(s_t)[1],
    h_t + m_t a_t (o_t - h_t)   ("convex", equation 5)     or     h_t + m_t a_t o_t   ("residual")

That is `sal_selection="gumbel"`. Its capacity loss holds the rate of the noisy choice, and a gate that is not sure of a
token can keep that rate without ever selecting one when the noise is gone: trained that way, it selected 0 to 0.02 % of
the tokens (docs/results.md). The default, `sal_selection="capacity"`, has no noise and a threshold on the margin:

    m_t = 1 if z_t > 0,   z_t = s_t[1] - s_t[0] - threshold

The weight a_t is that of the paper, without the threshold. One that is near zero below the threshold would leave tokens
that are wrongly not selected almost without a gradient.

After each pass in training that records gradients the threshold moves a little: up if more than the share C of the
tokens were selected, down if fewer, by steps that are short where many margins lie close together, so that it does not
jump over them. The length of a step is an average over earlier batches. Were it taken from the same batch, surpluses
and deficits would be given different weights, and the rate would settle beside C. So the rate is C over many batches,
not in each, and training selects as evaluation does, by the tokens before alone. Gradients also go through the
threshold, as if it moved at once to hold sum_t sigmoid(z_t / tau): what makes one token likelier makes the others less
likely. `sal_warmup_steps` lets the share fall from all tokens to C, so that attention learns before the gate has to
choose. (Biases that hold the load of experts without a loss: arXiv 2408.15664.)

Choices where the paper is open or ambiguous:

* The gradient of m is straight-through, with the probability of class 1 as the surrogate. Equation 3 as printed uses
  the probability of the chosen class, which has the wrong sign for class 0.
* Noise is added in training only, and decoding is deterministic: with "gumbel" a selected token then has a > 1/2.
* A token that is not selected gives the gate no gradient of the language model's loss, since its o is not computed
  (that of the capacity loss, or of the threshold, does reach it). `sal_dense_training` computes o for every token,
  which gives the exact straight-through gradient.
* The projections run over all tokens and attention over the selected ones, because adapters that depend on the row of a
  batch or the place in it need both axes.
* A query sees all tokens of its window, selected or not (equation 4). Figure 2 draws selected keys only, which
  `sal_key_source="selected"` gives.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from ..kernels.tracing import tracing
from ..kernels.window_attention import attend_traced, window_attention, window_attention_matrix
from .cache import layer_of
from .layers import GroupedAttention
from .mixer import MixerSettings, TokenMixer
from .token_layout import Sequence

KEY_SOURCES = ("all", "selected")
SELECTIONS = ("capacity", "gumbel")

_PACE = 0.05  # share of the surplus of selected tokens that a step of the threshold removes
_NEAR = 0.05  # share of the tokens, next to the threshold, whose distance sets the length of the step
_MEMORY = 0.9  # weight of the earlier batches in the average length of a step
_LEAST = 1e-3  # least distance for a share of 1, in standard deviations of the margins


class SelectiveAttention(GroupedAttention):
    """Sliding-window attention for the tokens that a gate selects; other tokens are unchanged.

    `config` has the sizes of the heads, `settings` the keys of :class:`SelectiveAttentionSettings`.
    """

    float32_parameters = ("threshold", "correction", "stride")
    threshold: Tensor
    correction: Tensor
    stride: Tensor  # (2): the average, and the last batch's, distance that changes the share of selected tokens by 1
    passes: Tensor

    def __init__(self, config: Any, settings: Any, layer_idx: int, *, bias: bool = False) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.window, self.tau = settings.sliding_window, settings.gumbel_tau
        self.key_source, self.dense_training = settings.sal_key_source, settings.sal_dense_training
        if self.dense_training is None:
            self.dense_training = settings.sal_selection == "capacity" and self.key_source == "all"
        self.capacity, self.warmup_steps = settings.attention_capacity, settings.sal_warmup_steps
        self.gate = nn.Linear(config.hidden_size, 2)
        self.has_threshold = settings.sal_selection == "capacity"
        if self.has_threshold:
            self.register_buffer("threshold", torch.zeros((), dtype=torch.float32))
            self.register_buffer("correction", torch.zeros((), dtype=torch.float32))
            self.register_buffer("stride", torch.zeros(2, dtype=torch.float32))
            self.register_buffer("passes", torch.zeros((), dtype=torch.long))
        self.closed = False  # set by `without_attention`
        self.add_projections(config, bias, layer_idx)

    def initialise(self) -> None:
        """Set the threshold to zero, as at the begin of training."""
        if self.has_threshold:
            for buffer in (self.threshold, self.correction, self.stride, self.passes):
                init.zeros_(buffer)

    def forward(
        self,
        hidden_states: Tensor,
        sequence: Sequence,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
        *,
        stream: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Attend at the tokens that the gate selects.

        Args:
            hidden_states: (B, L, D) normed inputs.
            sequence: positions, documents and padding.
            past_key_values: cache to continue.
            output_attentions: return the matrix.
            stream: (B, L, D) residual stream, of which attention replaces a share ("convex"); None: attention is added
                ("residual").

        Returns:
            (B, L, D) update of the residual stream, zero at tokens that are not selected; the (B, H, L, L) attention
            matrix, with rows of zeros at those tokens, or None; the (B, L, 2) gate scores; the (B, L) decisions.
        """
        hidden_states = sequence.blank(hidden_states)
        scores = self.gate(hidden_states)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        margin = scores[..., 1] - scores[..., 0]
        above = margin
        if self.has_threshold:
            above = self.over_threshold(margin, sequence.real, sequence.begun.get(self.layer_idx))
            scores = torch.stack([scores[..., 0], scores[..., 0] + above], dim=-1)
        selected, decision = self.decide(above, sequence.real)
        keys, values, positions = self.keys(hidden_states, selected, sequence, past_key_values)

        queries = selected
        if self.training and self.dense_training:
            queries = torch.ones_like(selected) if sequence.real is None else sequence.real
        q = self.to_heads(self.q_proj(hidden_states), self.q_norm, sequence)
        where: dict[str, Any] = {
            "window": self.window,
            "scale": self.scaling,
            "positions": positions,
            "seq_idx": sequence.seq_idx if past_key_values is None else None,  # packed rows have no cache
        }
        attention = None
        if tracing():  # the number of selected tokens is unknown: all attend, and the others' outputs are dropped
            o, matrix = attend_traced(q, keys, values, **where)
            o = o.flatten(2)
            if output_attentions:
                attention = matrix.masked_fill(~selected[:, None, :, None], 0)
        else:
            token = queries.flatten().nonzero()[:, 0]  # (M), in the flattened (B, L)
            q = q.flatten(0, 1)[token]
            length, columns = queries.shape[1], keys.shape[1]
            index = token + (token // length + 1) * (columns - length)  # the new columns are a row's last
            o = window_attention(q, keys, values, index=index, **where).flatten(1)
            o = o.new_zeros(queries.numel(), o.shape[1]).index_copy(0, token, o).unflatten(0, queries.shape)
            if output_attentions:
                chosen = selected.flatten()[token]
                rows = window_attention_matrix(q[chosen], keys, index=index[chosen], **where)
                attention = rows.new_zeros(selected.numel(), self.num_heads, columns)
                attention = attention.index_copy(0, token[chosen], rows)
                attention = attention.unflatten(0, selected.shape).transpose(1, 2)
        if attention is not None and past_key_values is not None:
            attention = sequence.over_columns(attention, positions)
        o = self.o_proj(o)  # (B, L, D)

        kept = o if stream is None else o - stream
        weight = (decision * margin.sigmoid())[..., None]
        update = torch.where(queries[..., None], (weight * kept).to(kept.dtype), 0)
        return update, attention, scores, decision

    @property
    def follows(self) -> bool:
        """Whether the threshold moves with the gate's scores.

        It does in passes from which the gate can learn. It stays where no gradient is recorded, e.g. where a model in
        training mode generates text, and with a frozen gate or one with adapters, which are saved without it.
        """
        learns = self.training and torch.is_grad_enabled()
        return learns and isinstance(self.gate, nn.Linear) and self.gate.weight.requires_grad

    @property
    def wanted_rate(self) -> float | None:
        """The rate that the capacity loss pulls to; None with a threshold, which holds the rate over many batches."""
        return None if self.has_threshold else self.capacity

    def share(self) -> Tensor | float:
        """Return the share of the tokens to select now: the capacity, or more while it falls in the warm-up."""
        if not (self.has_threshold and self.warmup_steps and self.training):
            return self.capacity
        left = (1 - (self.passes - 1) / self.warmup_steps).clamp(min=0, max=1)
        return self.capacity + (1 - self.capacity) * left

    def begin_pass(self, sequence: Sequence) -> None:
        """Move the threshold by the correction of the last pass, before a pass in training.

        Gradient checkpointing repeats the passes of the blocks with the same `sequence`, also after a later pass has
        begun. So `sequence` keeps the threshold and the number of its pass.
        """
        if not (self.has_threshold and self.follows):
            return
        with torch.no_grad():
            self.threshold.add_(self.correction)
            self.correction.zero_()
            average, last = self.stride
            average.copy_(torch.where(average > 0, average + (1 - _MEMORY) * (last - average), last))
            self.passes.add_(1)
            sequence.begun[self.layer_idx] = self.threshold.clone(), self.passes.clone()

    def over_threshold(self, margin: Tensor, real: Tensor | None, begun: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return (B, L) margins less the threshold; in training also take down the correction that the batch asks for.

        Args:
            margin: (B, L) score of attending minus score of not attending.
            real: (B, L) False at padding, which does not count; None if there is none.
            begun: what :meth:`begin_pass` has kept of the pass, if it was called.
        """
        # A checkpoint of the older kind runs a pass without gradients first.
        follows, share = self.follows or begun is not None, self.share()
        threshold, number = begun or (self.threshold if follows else self.threshold + self.correction, self.passes)
        if not (self.training and margin.numel()):
            return margin - threshold
        # A margin that is not finite makes its own output NaN, and must not do the same to the saved threshold.
        finite = margin.isfinite()
        known = margin.masked_fill(~finite, 0)
        with torch.no_grad():
            counts = (finite if real is None else finite & real).to(margin.dtype)
            soft = ((known - threshold) / self.tau).sigmoid()
            slope = soft * (1 - soft) * counts
            slope = slope / slope.sum().clamp(min=torch.finfo(slope.dtype).tiny)
            if follows:
                total = counts.sum()
                mean = (known * counts).sum() / total.clamp(min=1)
                spread = ((known - mean).square() * counts).sum().div(total.clamp(min=1)).sqrt()
                surplus = ((known > threshold) * counts).sum() / total.clamp(min=1) - share * (total > 0)
                last = torch.maximum(reach(threshold, known, counts), _LEAST * spread)
                last = torch.where(total > 0, last, self.stride[1])
                stride = torch.where(self.stride[0] > 0, self.stride[0], last)
                newest = number == self.passes  # otherwise a later pass has begun, whose correction stays
                self.stride[1].copy_(torch.where(newest, last, self.stride[1]))
                self.correction.copy_(torch.where(newest, _PACE * surplus * stride, self.correction))
        moved = (slope * known).sum()
        return margin - threshold - (moved - moved.detach())

    def decide(self, margin: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Select the tokens that attend.

        Args:
            margin: (B, L) score of attending minus score of not attending, less the threshold.
            real: (B, L) False at padding, which never attends; None if there is none.

        Returns:
            (B, L) booleans; and the same as numbers, through which gradients reach the scores in training. A token
            whose margin is NaN is selected and its number is NaN, so that a broken gate is not a closed one.
        """
        if self.training:
            noisy = margin if self.has_threshold else margin + logistic_noise(margin)
            probability = (noisy / self.tau).sigmoid()
            selected = ~(probability <= 0.5)
            decision = selected + (probability - probability.detach())
        else:
            selected = ~(margin <= 0)
            decision = torch.where(margin.isnan(), margin, selected)
        if self.closed:
            selected, decision = torch.zeros_like(selected), decision * 0
        if real is not None:
            selected, decision = selected & real, decision.masked_fill(~real, 0)
        return selected, decision

    def keys(
        self, hidden_states: Tensor, selected: Tensor, sequence: Sequence, past_key_values: Cache | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return (B, K, G, P) keys and values of cached and new tokens, and their (B, K) positions: -1 at hidden
        columns, None where positions are column indices."""
        k = self.to_heads(self.k_proj(hidden_states), self.k_norm, sequence)
        v = self.v_proj(hidden_states).unflatten(-1, (self.num_kv_heads, self.head_dim))
        kept = selected if self.key_source == "selected" else None
        cache = layer_of(past_key_values, self.layer_idx)
        if cache is not None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            k, v, positions, _ = cache.update(k, v, window=self.window, real=sequence.real, kept=kept)
            return k.transpose(1, 2), v.transpose(1, 2), positions
        positions = None
        if sequence.seq_idx is not None or kept is not None:
            positions = sequence.row_positions().expand(k.shape[:2])
            if kept is not None:
                positions = positions.masked_fill(~kept, -1)
        return k, v, positions


@contextmanager
def without_attention(model: nn.Module) -> Iterator[list[SelectiveAttention]]:
    """Let no token of a model attend in evaluation while the context lasts: what is lost is what attention does.

    Yields:
        The model's layers of selective attention, none if it has none.
    """
    layers = [module for module in model.modules() if isinstance(module, SelectiveAttention)]
    before = [layer.closed for layer in layers]
    try:
        for layer in layers:
            layer.closed = True
        yield layers
    finally:
        for layer, closed in zip(layers, before, strict=True):
            layer.closed = closed


def reach(threshold: Tensor, margin: Tensor, counts: Tensor) -> Tensor:
    """Return how far a threshold would have to move to change the share of selected tokens by 1, judged nearby.

    Nearby is the distance from the threshold to the margin that `_NEAR` of the tokens are beyond, above or below it,
    whichever is less. So it is short at the edge of margins that lie close together.

    Args:
        threshold: the threshold.
        margin: (B, L) margins.
        counts: (B, L) 1 at tokens, 0 at padding.
    """
    real = counts > 0
    values = margin.masked_fill(~real, -torch.inf).flatten().sort(descending=True).values
    tokens, above = real.sum(), ((margin > threshold) & real).sum()
    near = (_NEAR * tokens).ceil().long()
    last = (tokens - 1).clamp(min=0)
    ends = values[torch.stack([(above - near).clamp(min=0), torch.minimum(above + near - 1, last)])]
    up = torch.where(above > 0, ends[0] - threshold, torch.inf)
    down = torch.where(above < tokens, threshold - ends[1], torch.inf)
    return torch.minimum(up, down) / _NEAR


def logistic_noise(like: Tensor) -> Tensor:
    """Draw the difference of two Gumbel variables, which is logistic, in the shape and dtype of `like`."""
    return torch.rand_like(like).clamp_(1e-7, 1 - 1e-7).logit()


def check_selective_attention(config: Any) -> None:
    """Raise ValueError where a setting of selective attention is out of range."""
    if config.sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, got {config.sliding_window}")
    if not 0 < config.attention_capacity <= 1:
        raise ValueError(f"attention_capacity must be above 0 and at most 1, got {config.attention_capacity}")
    if not 0 < config.gumbel_tau < math.inf:
        raise ValueError(f"gumbel_tau must be positive, got {config.gumbel_tau}")
    if not 0 <= config.router_aux_loss_coef < math.inf:
        raise ValueError(f"router_aux_loss_coef must not be negative, got {config.router_aux_loss_coef}")
    if config.sal_selection not in SELECTIONS:
        raise ValueError(f"sal_selection must be one of {', '.join(SELECTIONS)}, got {config.sal_selection!r}")
    if config.sal_warmup_steps < 0 or (config.sal_warmup_steps and config.sal_selection != "capacity"):
        raise ValueError(
            f"sal_warmup_steps must be at least 0, and 0 unless sal_selection is 'capacity', got "
            f"{config.sal_warmup_steps} with {config.sal_selection!r}"
        )
    if config.sal_key_source not in KEY_SOURCES:
        raise ValueError(f"sal_key_source must be one of {', '.join(KEY_SOURCES)}, got {config.sal_key_source!r}")
    if config.sal_dense_training and config.sal_key_source != "all":
        raise ValueError(
            "sal_key_source must be 'all' with sal_dense_training=True, got 'selected': tokens that are not selected "
            "would have no key"
        )


@strict
@dataclass
class SelectiveAttentionSettings(MixerSettings):
    """Selective attention in `zoo_hybrid`. `TaipanConfig` explains the keys."""

    sliding_window: int = 256
    attention_capacity: float = 0.15
    gumbel_tau: float = 1.0
    router_aux_loss_coef: float = 1.0
    sal_selection: str = "capacity"
    sal_warmup_steps: int = 0
    sal_key_source: str = "all"
    sal_dense_training: bool | None = None

    def check(self, config: Any) -> None:
        check_selective_attention(self)
        if config.attn_logit_softcapping is not None:
            raise ValueError(
                f"attn_logit_softcapping must be null with selective attention, which has no soft cap, got "
                f"{config.attn_logit_softcapping}"
            )


SELECTIVE_ATTENTION = TokenMixer(
    label="softmax attention over a sliding window, for the tokens that a gate selects",
    make=lambda config, settings, layer_idx: SelectiveAttention(
        config, settings, layer_idx, bias=config.attention_bias
    ),
    settings=SelectiveAttentionSettings,
    cache_layer="zoo_window",
    flat={
        name: name
        for name in (
            "sliding_window",
            "attention_capacity",
            "gumbel_tau",
            "router_aux_loss_coef",
            "sal_selection",
            "sal_warmup_steps",
            "sal_key_source",
            "sal_dense_training",
        )
    },
)
