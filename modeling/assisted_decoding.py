"""Assisted and prompt-lookup decoding by `generate`, with caches that take rejected tokens back (`rollback.py`)."""

from typing import Any

from torch import Tensor
from transformers import GenerationMixin, PreTrainedConfig

from .cache import CACHE_FIELD
from .rollback import RECORDED, recording_layers, stop_recording

READ = "_columns_read"
"""Attribute of a cache during assisted decoding: columns of the prompt that it holds already."""
_OF_TOKENS = ("output_hidden_states", "output_attentions")


class AssistedDecoding(GenerationMixin):
    """What a causal language model needs for it."""

    backbone: Any
    config: PreTrainedConfig

    def _assisted_decoding(self, input_ids: Tensor, *rest: Any, **kwargs: Any) -> Any:
        """As in transformers, which here would read a prompt in one piece, whatever `prefill_chunk_size` is, and with a
        cache that holds its first tokens would read these again. A cache of the caller's is left not recording."""
        cache, settings, mask = kwargs.get(CACHE_FIELD), kwargs["generation_config"], kwargs.get("attention_mask")
        if kwargs.get("prefix_mask") is not None:
            raise ValueError("prefix_mask must be left out in assisted decoding, which reads a prompt causally")
        if cache is None:
            raise ValueError(
                "use_cache must be True for assisted decoding, which takes rejected tokens back, got False"
            )
        columns = getattr(settings, "_mask_length", input_ids.shape[1]) if mask is None else mask.shape[1]
        # Shorter ids than the mask are the new ones alone.
        if kwargs.get("inputs_embeds") is None and columns == input_ids.shape[1]:
            read, positions = int(cache.get_seq_length()), kwargs.get("position_ids")
            if read >= columns:
                raise ValueError(f"input_ids must go on after the {read} tokens that the cache holds, got {columns}")
            for part in input_ids[:, read:-1].split(settings.prefill_chunk_size or columns, dim=1):
                if settings.prefill_chunk_size is None or not part.shape[1]:
                    break
                end = read + part.shape[1]
                self.backbone(
                    part,
                    attention_mask=None if mask is None else mask[:, :end],
                    position_ids=None if positions is None else positions[:, read:end],
                    cache=cache,
                    use_cache=True,
                )
                read = end
            setattr(cache, READ, read)
        try:
            return super()._assisted_decoding(input_ids, *rest, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            vars(cache).pop(READ, None)
            stop_recording(cache)

    def read_unrecorded(self, arguments: dict[str, Any], logits_to_keep: int | Tensor) -> dict[str, Any]:
        """Read the first columns of a long prompt without recording them: no draft is part of them.

        Args:
            arguments: of the backbone.
            logits_to_keep: as in :meth:`forward`; assisted decoding keeps those of the draft.

        Returns:
            The arguments for the other columns: the same if nothing was read.
        """
        layers = recording_layers(arguments["cache"])
        asked = [getattr(self.config, name) if arguments[name] is None else arguments[name] for name in _OF_TOKENS]
        if not layers or any(asked) or not isinstance(logits_to_keep, int) or not logits_to_keep:
            return arguments
        given = [name for name in ("input_ids", "inputs_embeds", "position_ids") if arguments[name] is not None]
        columns = min(arguments[name].shape[1] for name in given) - max(logits_to_keep, RECORDED)
        if columns < RECORDED:
            return arguments
        first = arguments | {name: arguments[name][:, :columns] for name in given}
        if arguments["attention_mask"] is not None:
            past = arguments["cache"].get_seq_length()
            first["attention_mask"] = arguments["attention_mask"][:, : past + columns]
        for layer in layers:
            layer.record_past = False
        self.backbone(**first)
        for layer in layers:
            layer.record_past = True
        return arguments | {name: arguments[name][:, columns:] for name in given}
