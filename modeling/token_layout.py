"""The layout of a batch (documents, padding and positions), computed once for all layers.

The layout may be given as a 2-D attention mask, `seq_idx`, `cu_seqlens` or restarting `position_ids`. The results are
`seq_idx` for the recurrent ops and boolean masks for softmax attention.

Symbols: B batch, L new tokens, M key columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from ..kernels.tracing import tracing
from .call_arguments import check_documents, check_integer, read_mask


class Sequence:
    """Positions, documents and padding of one forward.

    Deliberately neither a dataclass nor a pytree node: FSDP would look inside when a block is called with it, and cast
    the rotary tables to the dtype of its inputs. So every block gets the same object, with the masks that earlier
    blocks made.

    Attributes:
        position_ids: (B, L) position of each token in its document, for rotary embeddings.
        seq_idx: (B, L) document index, negative at padding; None if each row is one document without padding.
        attention_mask: (B, past + L) True at real tokens; None if there is no padding.
        past: columns in the cache before this forward.
        packed: whether a row may hold more than one document.
        rotary: (B, L, P) cosines and sines of the rotary embedding, if the family's layers use it.
        local_rotary: those of a second rotary embedding, if some layers use another.
        prefix: (B, L) True at the tokens of prefixes that are read in both directions (`prefix.py`); None without.
        alone: the layout of these tokens alone, once a layer has asked for it.
        begun: for each layer that moves a threshold in training, by its number, what it was in this pass.
    """

    def __init__(
        self,
        position_ids: Tensor,
        seq_idx: Tensor | None,
        attention_mask: Tensor | None,
        past: int,
        packed: bool,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.position_ids = position_ids
        self.seq_idx = seq_idx
        self.attention_mask = attention_mask
        self.past = past
        self.packed = packed
        self.rotary = rotary
        self.local_rotary: tuple[Tensor, Tensor] | None = None
        self.prefix: Tensor | None = None
        self.alone: Sequence | None = None
        self.begun: dict[int, tuple[Tensor, Tensor]] = {}
        self._masks: list[tuple[int | None, Tensor]] = []
        self._elsewhere: dict[torch.device, Sequence] = {}
        self._reversal: Tensor | None = None

    @property
    def real(self) -> Tensor | None:
        """(B, L) False at padding, None if there is none among the new tokens."""
        return None if self.seq_idx is None else self.seq_idx >= 0

    def blank(self, hidden_states: Tensor) -> Tensor:
        """Set the (B, L, D) states at padding to zero, so that e.g. a NaN there reaches no real token or gradient."""
        real = self.real
        return hidden_states if real is None else hidden_states.masked_fill(~real[..., None], 0)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Sequence":
        """Return a copy on `device`; accelerate calls this between blocks on different devices."""
        device = torch.device(device)
        if device == self.position_ids.device:
            return self
        if device not in self._elsewhere:

            def moved(tensor: Tensor | None) -> Tensor | None:
                return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

            there = self._elsewhere[device] = Sequence(
                self.position_ids.to(device, non_blocking=non_blocking),
                moved(self.seq_idx),
                moved(self.attention_mask),
                self.past,
                self.packed,
                rotary=None if self.rotary is None else (self.rotary[0].to(device), self.rotary[1].to(device)),
            )
            if self.local_rotary is not None:
                there.local_rotary = self.local_rotary[0].to(device), self.local_rotary[1].to(device)
            there.prefix = moved(self.prefix)
            there.begun = self.begun  # on the device of each layer
        return self._elsewhere[device]

    def rotary_tables(self, kind: str) -> tuple[Tensor, Tensor] | None:
        """Return the cosines and sines for a kind of positions (POSITION_TYPES in `layers.py`), None for none."""
        return {"rope": self.rotary, "local_rope": self.local_rotary}.get(kind)

    def reverse(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """Reverse the order of the real tokens in every document.

        Documents and padding keep their columns, so that `seq_idx` is valid for the result as well. Reversing twice
        gives the input.

        Args:
            tensor: (B, ..., L, ...) values of the new tokens.
            dim: the axis of length L, after the batch.

        Returns:
            A tensor of the same shape.
        """
        if self.seq_idx is None:
            return tensor.flip(dim)
        if self._reversal is None:
            # Columns ordered by document, forwards and with each document's last column first.
            last = self.seq_idx.shape[1] - 1
            forward = self.seq_idx.argsort(dim=1, stable=True)
            backward = last - self.seq_idx.flip(1).argsort(dim=1, stable=True)
            index = torch.empty_like(forward).scatter_(1, forward, backward)
            row = torch.arange(index.shape[0], device=index.device)[:, None]
            self._reversal = (row * index.shape[1] + index).flatten()
        moved = tensor.movedim(dim, 1)
        turned = moved.flatten(0, 1).index_select(0, self._reversal).view(moved.shape)
        return turned.movedim(1, dim)

    def full_mask(self, keys: int) -> Tensor | None:
        """Return the (B or 1, 1, L, M) mask, True where a query sees a key, for `keys` columns from the row's first on.

        None if plain causal attention over equally many queries and keys is the same. A query at padding sees itself,
        so that its softmax is defined.
        """
        length = self.position_ids.shape[1]
        whole = self.attention_mask is None and self.seq_idx is None and self.prefix is None
        if whole and (keys == length or length == 1 == keys - self.past):
            return None
        found = self._made(None, keys)
        if found is not None:
            return found
        device = self.position_ids.device
        query_column = self.past + torch.arange(length, device=device)
        key_column = torch.arange(keys, device=device)
        mask = (key_column <= query_column[:, None])[None]
        if self.attention_mask is not None:
            present = F.pad(self.attention_mask, (0, keys - self.attention_mask.shape[1]), value=True)
            mask = mask & present[:, None, :]
        if self.seq_idx is not None and self.past == 0:
            documents = F.pad(self.seq_idx, (0, keys - length), value=-1)
            mask = mask & (self.seq_idx[:, :, None] == documents[:, None, :])
        if self.prefix is not None:
            mask = mask | F.pad(self._within_prefixes(self.prefix), (0, keys - length), value=False)
        mask = mask | (key_column == query_column[:, None])
        self._masks.append((None, mask[:, None]))
        return mask[:, None]

    def document_mask(self) -> Tensor | None:
        """Return the (B, 1, L, L) mask, True where a token sees another one of its document on either side, or itself.

        None if every row is one document without padding.
        """
        if self.seq_idx is None:
            return None
        length = self.seq_idx.shape[1]
        found = self._made(0, length)
        if found is not None:
            return found
        mask = (self.seq_idx[:, :, None] == self.seq_idx[:, None, :]) & (self.seq_idx >= 0)[:, None, :]
        mask = (mask | torch.eye(length, dtype=torch.bool, device=mask.device))[:, None]
        self._masks.append((0, mask))
        return mask

    def window_mask(self, window: int, query_positions: Tensor | None, key_positions: Tensor | None) -> Tensor:
        """Return the (B or 1, 1, L, M) mask, True at a query itself and `window - 1` earlier tokens of its document, in
        a prefix also at as many later ones.

        Args:
            window: tokens that a query sees, itself included.
            query_positions: (B, L) positions among the row's real tokens, from the cache; None without a cache.
            key_positions: (B, M) positions of the columns, -1 where empty.
        """
        if query_positions is None or key_positions is None:
            query_positions = key_positions = self.row_positions()
        found = self._made(window, key_positions.shape[1])
        if found is not None:
            return found
        distance = query_positions[:, :, None] - key_positions[:, None, :]
        mask = (distance >= 0) & (distance < window) & (key_positions >= 0)[:, None, :]
        length, keys = mask.shape[1:]
        if self.seq_idx is not None and self.past == 0:
            mask = mask & (self.seq_idx[:, :, None] == self.seq_idx[:, None, :])
        if self.prefix is not None:
            mask = mask | (self._within_prefixes(self.prefix) & (distance.abs() < window))
        column = torch.arange(keys, device=mask.device)
        itself = column == keys - length + torch.arange(length, device=mask.device)[:, None]
        mask = (mask | itself)[:, None]
        self._masks.append((window, mask))
        return mask

    def _within_prefixes(self, prefix: Tensor) -> Tensor:
        """Return the (B, L, L) mask, True where query and key are in the prefix of one document."""
        pairs = prefix[:, :, None] & prefix[:, None, :]
        return pairs if self.seq_idx is None else pairs & (self.seq_idx[:, :, None] == self.seq_idx[:, None, :])

    def _made(self, window: int | None, keys: int) -> Tensor | None:
        """Return the mask with this window and number of columns that an earlier layer made, or None.

        This is a search, since a dictionary keyed by a length would tie a traced graph to that length.
        """
        return next((mask for of, mask in self._masks if of == window and mask.shape[-1] == keys), None)

    def places(self) -> Tensor:
        """Return the (B or 1, L) rank of each new token in its document, from 0, regardless of `position_ids`;
        values at padding are arbitrary."""
        length = self.position_ids.shape[1]
        batch = 1 if self.seq_idx is None else self.seq_idx.shape[0]
        return _positions(batch, length, self.position_ids.device, self.seq_idx, None, 0)

    def check_length(self, positions: int) -> None:
        """Raise ValueError if a document, with its cached tokens, is longer than the `positions` with weights.

        Without a mask every cached column counts.
        """
        columns = self.past + self.position_ids.shape[1]
        if columns <= positions:
            return
        if tracing() and (self.seq_idx is not None or self.attention_mask is not None):
            return  # values cannot be read while tracing; a position without weights fails when it is looked up
        if self.seq_idx is not None and self.past == 0:
            real = self.seq_idx >= 0
            longest = int((self.places() + 1).masked_fill(~real, 0).max())
        else:
            longest = columns if self.attention_mask is None else int(self.attention_mask.sum(-1).max())
        if longest > positions:
            raise ValueError(
                f"a document must have at most {positions} tokens, as there are weights for {positions} positions "
                f"(max_position_embeddings), got {longest} tokens, {self.past} columns of the cache included"
            )

    def whole(self) -> "Sequence":
        """Return the :class:`Sequence` of cached and new columns together, without rotary tables."""
        if not self.past:
            return self
        batch, length = self.position_ids.shape[0], self.past + self.position_ids.shape[1]
        device = self.position_ids.device
        position_ids = _positions(batch, length, device, None, self.attention_mask, 0)
        seq_idx = None if self.attention_mask is None else self.attention_mask.to(torch.int32) - 1
        return Sequence(position_ids, seq_idx, self.attention_mask, 0, False)

    def first(self, length: int) -> "Sequence":
        """Return the :class:`Sequence` of the first `length` new columns, as a call with these alone would make it."""

        def cut(tables: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
            return None if tables is None else (tables[0][:, :length], tables[1][:, :length])

        part = Sequence(
            self.position_ids[:, :length],
            None if self.seq_idx is None else self.seq_idx[:, :length],
            None if self.attention_mask is None else self.attention_mask[:, : self.past + length],
            self.past,
            self.packed,
            rotary=cut(self.rotary),
        )
        part.local_rotary = cut(self.local_rotary)
        part.prefix = None if self.prefix is None else self.prefix[:, :length]
        return part

    def over_columns(self, matrix: Tensor, key_positions: Tensor | None) -> Tensor:
        """Spread rows of attention over all columns of a row, cached ones first.

        Args:
            matrix: (B, H, L, M) weights of the columns that a cache returned: the last L are the new ones, or all are
                the columns of the row from the first on.
            key_positions: (B, M) rank of each column among the row's real tokens, -1 at hidden columns; None if the
                columns are those of the row.

        Returns:
            (B, H, L, past + L).
        """
        batch, heads, length, keys = matrix.shape
        if key_positions is None or not self.past:  # a static cache has empty columns
            columns = self.past + length
            return matrix if keys == columns else matrix[..., :columns]
        kept = matrix[..., : keys - length]
        place = key_positions[:, : keys - length]
        column = place.clamp(min=0)
        if self.attention_mask is not None:  # the real tokens' columns, in their order
            column = (~self.attention_mask).to(torch.int8).argsort(dim=1, stable=True).gather(1, column)
        rows = matrix.new_zeros(batch, heads, length, self.past)
        column = column.clamp(max=self.past - 1)  # of an empty column it may be the row's first token, a new one
        index = column[:, None, None].expand_as(kept)
        rows = rows.scatter_add(-1, index, kept * (place >= 0)[:, None, None])
        return torch.cat([rows, matrix[..., keys - length :]], dim=-1)

    def row_positions(self) -> Tensor:
        """Return the (B or 1, L) rank of each token among the row's real ones, across documents; -1 at padding."""
        length = self.position_ids.shape[1]
        if self.seq_idx is None:
            return torch.arange(length, device=self.position_ids.device)[None]
        real = self.seq_idx >= 0
        return (real.cumsum(-1) - 1).masked_fill(~real, -1)


def make_sequence(
    batch: int,
    length: int,
    device: torch.device,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    past_key_values: Cache | None = None,
) -> Sequence:
    """Build the :class:`Sequence` of B rows of L new tokens.

    Args:
        batch: B.
        length: L.
        device: of the inputs.
        attention_mask: (B, past + L), non-zero at real tokens; padding may be on the left, right or anywhere.
        position_ids: (B, L) or (1, L) positions; without a mask and a cache, a new document starts where they restart.
        seq_idx: (B, L) document index, non-decreasing, negative at padding.
        cu_seqlens: (documents + 1) starts of the documents of a single row, then its length.
        past_key_values: cache before this forward.

    Raises:
        ValueError: if a shape, a dtype or a value does not fit, or packed documents come with a cache that already
            holds tokens.
    """
    if length == 0:
        raise ValueError(f"a row must hold at least one token, got (B, L) = ({batch}, {length})")
    past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape[0] != batch:
            raise ValueError(
                f"attention_mask must be (B, past + L) = ({batch}, {past + length}), got {tuple(attention_mask.shape)}"
            )
        if (
            batch and attention_mask.shape[1] != past + length
        ):  # transformers' caches have no length if there are no rows
            raise ValueError(
                f"attention_mask must cover the {past} cached and the {length} new tokens, "
                f"got length {attention_mask.shape[1]}"
            )
        attention_mask = read_mask(attention_mask)
        if attention_mask is not None:
            attention_mask = attention_mask[:, -(past + length) :].to(device=device)
    if position_ids is not None:
        if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != length:
            raise ValueError(f"position_ids must be (B, L) = ({batch}, {length}), got {tuple(position_ids.shape)}")
        check_integer("position_ids", position_ids)
        position_ids = position_ids.to(device).expand(batch, length)
    explicit = seq_idx is not None or cu_seqlens is not None
    seq_idx = _documents(batch, length, device, seq_idx, cu_seqlens, position_ids, attention_mask, past)
    packed = explicit or (seq_idx is not None and not tracing())  # a graph cannot read whether positions restart
    if packed and past:
        raise ValueError(
            f"packed documents (seq_idx, cu_seqlens) cannot continue a cache that holds {past} tokens; "
            "pass past_key_values=None"
        )
    if seq_idx is not None and attention_mask is not None:
        seq_idx = seq_idx.masked_fill(~attention_mask, -1)
    if position_ids is None:
        position_ids = _positions(batch, length, device, seq_idx, attention_mask, past)
    if seq_idx is None and attention_mask is not None:
        real = attention_mask[:, past:]
        if tracing() or past == 0 or not bool(real.all()):
            seq_idx = real.to(torch.int32) - 1
    return Sequence(position_ids, seq_idx, attention_mask, past, packed)


def _documents(
    batch: int,
    length: int,
    device: torch.device,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    past: int,
) -> Tensor | None:
    """Return the (B, L) document index from the argument that defines it; None for one document a row."""
    if seq_idx is not None and cu_seqlens is not None:
        raise ValueError("pass either seq_idx or cu_seqlens, got both")
    if seq_idx is not None:
        if tuple(seq_idx.shape) != (batch, length):
            raise ValueError(f"seq_idx must be (B, L) = ({batch}, {length}), got {tuple(seq_idx.shape)}")
        check_integer("seq_idx", seq_idx)
        check_documents(seq_idx, None, length)
        return _renumbered(seq_idx.to(device))
    if cu_seqlens is not None:
        check_integer("cu_seqlens", cu_seqlens)
        if batch != 1 or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
            raise ValueError(
                f"cu_seqlens must rise from 0 to L = {length} over a single row, got shape {tuple(cu_seqlens.shape)} "
                f"for {batch} rows"
            )
        check_documents(None, cu_seqlens, length)
        starts = cu_seqlens.to(device)
        column = torch.arange(length, device=device)
        return (torch.searchsorted(starts, column, right=True) - 1).to(torch.int32)[None]
    if position_ids is not None and (attention_mask is None or tracing()) and past == 0 and length > 1:
        restarts = position_ids[:, 1:] != position_ids[:, :-1] + 1
        if attention_mask is not None:  # a mask without padding changes nothing
            restarts = restarts & attention_mask.all()
        if tracing() or bool(restarts.any()):
            return F.pad(restarts, (1, 0)).cumsum(-1).to(torch.int32)
    return None


def _renumbered(seq_idx: Tensor) -> Tensor:
    """Number the (B, L) documents of each row from 0, -1 at padding, as the given numbers may exceed 32 bits."""
    document = seq_idx.cummax(dim=1).values
    changes = document[:, 1:] != document[:, :-1]
    return F.pad(changes, (1, 0)).cumsum(-1).masked_fill(seq_idx < 0, -1).to(torch.int32)


def _positions(
    batch: int, length: int, device: torch.device, seq_idx: Tensor | None, attention_mask: Tensor | None, past: int
) -> Tensor:
    """Return (B, L) positions from 0 in each document, without counting padding."""
    if seq_idx is not None:
        real = seq_idx >= 0
        count = real.cumsum(-1) - 1  # of the row's real tokens
        document = seq_idx.cummax(dim=1).values
        first = real & (document != F.pad(document[:, :-1], (1, 0), value=-1))
        start = torch.where(first, count, 0).cummax(-1).values
        return (count - start).clamp(min=0)
    if attention_mask is not None:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
    return (past + torch.arange(length, device=device)).expand(batch, length)
