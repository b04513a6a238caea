"""Read one text with several models for their mixing matrices: tokens, weights, inputs of a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)
from transformers.utils.peft_utils import find_adapter_config_file

from ..conversion.load_model import load_config, load_model, load_tokenizer
from .attention_matrices import AttentionStack, read_attention
from .embedder import HEADS, POOLERS
from .token_ids import check_token_ids

__all__ = ["TextReader", "decoder_inputs", "load_attention_model"]

# By the end of a class's name. Other models are loaded without their head, on which no matrix depends.
_CLASSES: dict[str, Any] = {
    "ForCausalLM": AutoModelForCausalLM,
    "LMHeadModel": AutoModelForCausalLM,
    "ForMaskedLM": AutoModelForMaskedLM,
    "ForSeq2SeqLM": AutoModelForSeq2SeqLM,
    "ForConditionalGeneration": AutoModelForSeq2SeqLM,
    "MTModel": AutoModelForSeq2SeqLM,
}


def load_attention_model(
    source: str | Path,
    *,
    field: str = "model",
    dtype: Any = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a model of any family for `read_attention`.

    Args:
        source: folder or Hub id of a model, or of a peft adapter of a causal language model.
        field: what errors call the source.
        dtype: data type of the weights; "auto" is the checkpoint's.
        revision: branch, tag or commit, for a Hub id.
        trust_remote_code: run the code that the source brings.

    Raises:
        ValueError: as `load_model`.
        OSError: if the source does not exist or cannot be read.
    """
    options: dict[str, Any] = {"field": field, "revision": revision, "trust_remote_code": trust_remote_code}
    kind: Any = AutoModelForCausalLM
    if find_adapter_config_file(str(source), revision=revision or "main") is None:
        config = load_config(source, **options)
        architecture = (config.architectures or [""])[0]
        kind = next((each for end, each in _CLASSES.items() if architecture.endswith(end)), AutoModel)
        if kind is AutoModelForSeq2SeqLM and not config.is_encoder_decoder:
            kind = AutoModelForCausalLM  # e.g. Gemma3ForConditionalGeneration, which also reads pictures
    if kind is AutoModel:
        options |= {"may_lack": POOLERS, "may_add": HEADS}
    return load_model(source, kind, dtype=dtype, attn_implementation="eager", **options)


def decoder_inputs(model: PreTrainedModel, tokenizer: Any, target: str) -> Tensor:
    """Return the (1, L) ids that the decoder of an encoder-decoder reads to predict a target text.

    Raises:
        ValueError: if neither the configuration nor the generation settings have a token to begin with.
    """
    places = (model.config, getattr(model, "generation_config", None))
    starts = [getattr(place, name, None) for name in ("decoder_start_token_id", "bos_token_id") for place in places]
    start = next((each for each in starts if each is not None), None)
    if start is None:
        raise ValueError("config.json: `decoder_start_token_id` must be set to read a target text, got null.")
    ids = list(tokenizer(text_target=target)["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return torch.tensor([[start, *ids]])


class TextReader:
    """Reads the beginning of one text with several models, which have to cut it into the same tokens.

    Args:
        text: the text.
        target: what the decoder of an encoder-decoder reads; None: nothing.
        max_tokens: most tokens that are read of each, at least 2.
        dtype: data type of the weights; "auto" is the checkpoint's.
        trust_remote_code: run the code that the models bring.

    Attributes:
        ids: the token ids that were read, "source" and, with a target, "target".
        text_tokens: number of tokens of the whole text.
        tokenizer: of the first model.
    """

    def __init__(
        self,
        text: str,
        target: str | None = None,
        *,
        max_tokens: int,
        dtype: Any = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        self.text, self.target, self.max_tokens, self.dtype = text, target, max_tokens, dtype
        self.trust_remote_code = trust_remote_code
        self.ids: dict[str, list[int]] = {}
        self.text_tokens = 0
        self.tokenizer: Any = None

    def read(
        self,
        source: str,
        *,
        field: str,
        revision: str | None = None,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
    ) -> list[AttentionStack]:
        """Load a model, on a GPU if there is one, and return its matrices; see `read_attention`.

        Raises:
            ValueError: as `load_model` and `read_attention`; and if the text has fewer than two tokens, is longer than
                the model's context, is cut into tokens without an embedding or others than by the first model, or there
                is a target for a model without a decoder.
        """
        loading: dict[str, Any] = {
            "field": field,
            "revision": revision,
            "trust_remote_code": self.trust_remote_code,
        }
        tokenizer: Any = load_tokenizer(source, **loading)
        every = list(tokenizer(self.text, verbose=False)["input_ids"])
        ids = {"source": every[: self.max_tokens]}
        if len(every) < 2:
            raise ValueError(f"TEXT must have at least 2 tokens, got {len(every)} from the tokenizer of {source}.")
        model: Any = load_attention_model(source, dtype=self.dtype, **loading)
        limit = getattr(model.config, "max_position_embeddings", None)
        if isinstance(limit, int) and len(ids["source"]) > limit:
            raise ValueError(
                f"`max_tokens` must be at most {limit:,} for this text, the max_position_embeddings of {source}, got "
                f"{self.max_tokens:,}."
            )
        decoded = None
        if self.target is not None:
            if not getattr(model.config, "is_encoder_decoder", False):
                raise ValueError(f"`target` must be left out for {source}, which is no encoder-decoder.")
            decoded = decoder_inputs(model, tokenizer, self.target)[:, : self.max_tokens]
            ids["target"] = decoded[0].tolist()
        check_token_ids(model, [token for side in ids.values() for token in side], field)
        if self.ids and self.ids != ids:
            raise ValueError(f"{field}: the models must have one tokenizer, but {source} cuts TEXT into other tokens.")
        self.ids, self.text_tokens, self.tokenizer = ids, len(every), self.tokenizer or tokenizer
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        return read_attention(model, torch.tensor([ids["source"]]), decoded, layers=layers, heads=heads, field=field)
