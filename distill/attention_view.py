"""The attention of a layer as weights in a common layout for all model families.

Symbols: B batch, L length, D width, H query heads, KV key and value heads, P head width, R rotated channels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modeling.layers import normed_heads, soft_capped


@dataclass(frozen=True, eq=False)
class AttentionView:
    """Causal softmax attention of one layer, with the weights in a common layout for all families.

    The tensors are detached and share the teacher's storage where the layout allows it. Head h reads the key and value
    head h // (H / KV). With R < P only the first R channels of a head are rotated, in halves (GPT-NeoX order).

    Attributes:
        q: (H*P, D) query weights, head by head.
        k: (KV*P, D) key weights.
        v: (KV*P, D) value weights.
        o: (D, H*P) output weights.
        num_heads: H.
        num_key_value_heads: KV, a divisor of H.
        head_dim: P; H*P need not equal D.
        scaling: factor on the scores, positive; 1 / sqrt(P) for most families.
        q_bias: (H*P,) or None.
        k_bias: (KV*P,) or None.
        v_bias: (KV*P,) or None.
        o_bias: (D,) or None.
        rotary: a module (hidden, position_ids) -> cos, sin, each (B or 1, L, R); None without rotary positions.
        q_norm: norm of the queries before the rotary embedding, over all heads or over each of them; None without.
        k_norm: norm of the keys.
        window: tokens that a query sees, itself included; None: all.
        softcap: c in c tanh(s / c) of the scaled scores s; None: none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    scaling: float
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    rotary: nn.Module | None = None
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None
    window: int | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_heads ({self.num_heads}), got {self.num_key_value_heads}."
            )
        D = self.q.shape[-1]
        rows, key_rows = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        expected = {"q": (rows, D), "k": (key_rows, D), "v": (key_rows, D), "o": (D, rows)}
        for name, shape in expected.items():
            weight, bias = getattr(self, name), getattr(self, f"{name}_bias")
            if tuple(weight.shape) != shape:
                raise ValueError(f"{name} must be of shape {shape}, got {tuple(weight.shape)}.")
            if bias is not None and tuple(bias.shape) != shape[:1]:
                raise ValueError(f"{name}_bias must be of shape {shape[:1]}, got {tuple(bias.shape)}.")

    def expand_heads(self, rows: Tensor) -> Tensor:
        """Give each query head its own copy of the key or value rows it reads.

        Args:
            rows: (KV*P, ...) a key or value weight or bias.

        Returns:
            (H*P, ...) a new tensor: whole heads repeated, not rows.
        """
        heads = rows.unflatten(0, (self.num_key_value_heads, self.head_dim))
        return heads.repeat_interleave(self.num_heads // self.num_key_value_heads, dim=0).flatten(0, 1)

    def queries_keys(self, hidden: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute the queries and keys of the scores: with bias, norm, rotation, keys repeated for a group's heads.

        Args:
            hidden: (B, L, D) output of the layer's input norm.
            position_ids: (B, L) or (1, L) integer positions; 0 to L-1 if None.

        Returns:
            Queries and keys, each (B, L, H, P), without the scaling.
        """
        queries = self._heads(F.linear(hidden, self.q, self.q_bias), self.q_norm)
        keys = self._heads(F.linear(hidden, self.k, self.k_bias), self.k_norm)
        if self.rotary is not None:
            if position_ids is None:
                position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
            cos, sin = self.rotary(hidden, position_ids)
            queries, keys = _rotate(queries, cos, sin), _rotate(keys, cos, sin)
        return queries, keys.repeat_interleave(self.num_heads // self.num_key_value_heads, dim=2)

    def _heads(self, projected: Tensor, norm: nn.Module | None) -> Tensor:
        """(B, L, heads P) queries or keys to (B, L, heads, P), normed."""
        over_width = norm is not None and norm.weight.shape == projected.shape[-1:]
        return normed_heads(projected, norm, "width" if over_width else "head", self.head_dim)

    def values(self, hidden: Tensor) -> Tensor:
        """Compute (B, L, H, P) values, repeated for the heads of a group, from (B, L, D) normed hidden states."""
        values = F.linear(hidden, self.v, self.v_bias).unflatten(-1, (self.num_key_value_heads, self.head_dim))
        return values.repeat_interleave(self.num_heads // self.num_key_value_heads, dim=2)

    def attention_matrix(
        self, hidden: Tensor, position_ids: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Compute the attention weights after the softmax.

        Args:
            hidden: (B, L, D) output of the layer's input norm.
            position_ids: (B, L) or (1, L) integer positions; 0 to L-1 if None.
            mask: (B, L), nonzero at real tokens, or (B, L, L), nonzero where row i may look at column j; in
                addition to the causal mask.

        Returns:
            (B, H, L, L) float32 (float64 for float64 input). Rows sum to 1; a row without any visible column is 0.
        """
        queries, keys = self.queries_keys(hidden, position_ids)
        scores = self._scores(queries, keys)
        visible = _visible(hidden, mask, self.window)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
        return weights.masked_fill(~visible.any(dim=-1, keepdim=True), 0.0)

    def _scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return the (B, H, I, J) scores of (B, I, H, P) queries and (B, J, H, P) keys, at least in float32."""
        dtype = torch.promote_types(queries.dtype, torch.float32)
        scores = torch.einsum("bihp,bjhp->bhij", queries.to(dtype), keys.to(dtype)) * self.scaling
        return scores if self.softcap is None else soft_capped(scores, self.softcap)

    def attention_received(self, hidden: Tensor, *, rows: int = 512) -> Tensor:
        """Sum the attention that each token receives from itself and the tokens after it, averaged over the heads.

        The matrices are computed in blocks of rows, so that memory is linear in L.

        Args:
            hidden: (B, L, D) output of the layer's input norm.
            rows: rows of a block.

        Returns:
            (B, L) float32 (float64 for float64 input); the sum over L is L.
        """
        queries, keys = self.queries_keys(hidden)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        received = torch.zeros(hidden.shape[:2], dtype=dtype, device=hidden.device)
        for start in range(0, hidden.shape[1], rows):
            end = min(start + rows, hidden.shape[1])
            scores = self._scores(queries[:, start:end], keys[:, :end])
            distance = torch.arange(start, end, device=hidden.device)[:, None] - torch.arange(end, device=hidden.device)
            unseen = distance < 0
            if self.window is not None:
                unseen |= distance >= self.window
            received[:, :end] += scores.masked_fill(unseen, -torch.inf).softmax(dim=-1).sum(2).mean(1)
        return received

    def head_outputs(self, hidden: Tensor, position_ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Compute the heads' inputs to the output projection, without an L x L matrix where torch supports it.

        Args:
            hidden: (B, L, D) output of the layer's input norm.
            position_ids: as in `attention_matrix`.
            mask: as in `attention_matrix`.

        Returns:
            (B, L, H, P), in the dtype of `hidden`.
        """
        if self.softcap is not None:  # PyTorch's function has no cap
            matrix = self.attention_matrix(hidden, position_ids, mask).to(hidden.dtype)
            return torch.einsum("bhij,bjhp->bihp", matrix, self.values(hidden))
        queries, keys = (states.transpose(1, 2) for states in self.queries_keys(hidden, position_ids))
        values = self.values(hidden).transpose(1, 2)
        if mask is None and self.window is None:
            outputs = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=self.scaling)
        else:
            visible = _visible(hidden, mask, self.window)
            outputs = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, scale=self.scaling)
            # The result of torch for a row without any visible column is undefined.
            outputs = outputs.masked_fill(~visible.any(dim=-1, keepdim=True), 0.0)
        return outputs.transpose(1, 2)

    def attention_output(
        self, hidden: Tensor, position_ids: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Compute the (B, L, D) output of the whole attention module; arguments as in `attention_matrix`."""
        return F.linear(self.head_outputs(hidden, position_ids, mask).flatten(2), self.o, self.o_bias)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R channels of (B, L, heads, P) by angles given as cos and sin, each (B or 1, L, R)."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned, rest = states.split([cos.shape[-1], states.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)


def _visible(hidden: Tensor, mask: Tensor | None, window: int | None) -> Tensor:
    """(B or 1, 1, L, L) bool, True where row i may look at column j: among the last `window` columns up to i (None:
    all), and allowed by the mask."""
    B, L = hidden.shape[:2]
    causal = torch.ones(L, L, dtype=torch.bool, device=hidden.device).tril()[None, None]
    if window is not None:
        causal = causal.triu(1 - window)
    if mask is None:
        return causal
    if tuple(mask.shape) not in ((B, L), (B, L, L)):
        raise ValueError(f"mask must be of shape {(B, L)} or {(B, L, L)}, got {tuple(mask.shape)}.")
    allowed = mask.to(torch.bool)
    return causal & (allowed[:, None, None, :] if allowed.ndim == 2 else allowed[:, None])
