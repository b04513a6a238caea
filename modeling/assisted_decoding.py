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
    """Assisted decoding for models whose cache layers record the past."""

    backbone: Any
    config: PreTrainedConfig

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with drafts that end before `max_length`: those of prompt lookup would go beyond it, and
        beyond the positions that a model has."""
        drafts = super()._get_candidate_generator(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        settings: Any = kwargs["generation_config"] if "generation_config" in kwargs else args[0]
        get_candidates = drafts.get_candidates
        last = settings.max_length - 1  # the verification adds a token of its own

        def cut(input_ids: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
            ids, logits = get_candidates(input_ids, *rest, **options)
            new = max(last - input_ids.shape[1], 0)
            if ids.shape[1] <= input_ids.shape[1] + new:
                return ids, logits
            return ids[:, : input_ids.shape[1] + new], None if logits is None or not new else logits[:, :new]

        drafts.get_candidates = cut
        return drafts

    def _check_drafts(self, settings: Any) -> None:
        """Raise ValueError where drafts would not give the tokens of greedy decoding."""
        if settings.assistant_early_exit is not None:
            raise ValueError(
                f"assistant_early_exit must be None, got {settings.assistant_early_exit}: the cache has a state for "
                "each layer, and all layers run. Use a smaller model as the assistant"
            )
        for name, limit, why in (
            (
                "recompute_length",
                getattr(self.config, "recompute_length", None),
                "the text is read again from there on",
            ),
            (
                "max_position_embeddings",
                self.config.max_position_embeddings
                if getattr(self.config, "context_overflow", "") == "window"
                else None,
                "older tokens are dropped from there on",
            ),
        ):
            if limit is not None and settings.max_length > limit:
                raise ValueError(
                    f"max_length must be at most {name} = {limit} in assisted decoding, got {settings.max_length}: "
                    f"{why}, and drafts would change which tokens are read"
                )

    def _assisted_decoding(self, input_ids: Tensor, *rest: Any, **kwargs: Any) -> Any:
        """As in transformers, which here would read a prompt in one piece, whatever `prefill_chunk_size` is, and with a
        cache that holds its first tokens would read these again. A cache of the caller's is left not recording."""
        cache, settings, mask = kwargs.get(CACHE_FIELD), kwargs["generation_config"], kwargs.get("attention_mask")
        if kwargs.get("prefix_mask") is not None:
            raise ValueError("prefix_mask must be left out in assisted decoding, which reads a prompt causally")
        self._check_drafts(settings)
        if cache is None:
            raise ValueError(
                "use_cache must be True for assisted decoding, which takes rejected tokens back, got False"
            )
        columns = getattr(settings, "_mask_length", input_ids.shape[1]) if mask is None else mask.shape[1]
        # Shorter ids than the mask are the new ones alone.
        alone = not self.config.is_encoder_decoder and kwargs.get("inputs_embeds") is None
        if alone and columns == input_ids.shape[1]:
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
        if not layers or any(asked) or arguments["prefix_mask"] is not None:
            return arguments
        if not isinstance(logits_to_keep, int) or not logits_to_keep:
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
        try:
            self.backbone(**first)
        finally:
            for layer in layers:
                layer.record_past = True
        return arguments | {name: arguments[name][:, columns:] for name in given}
