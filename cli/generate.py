"""`ssm-zoo generate`: continue a text, or answer a chat message, with any causal language model."""

import math
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..harness.text_files import check_text
from .options import Dtype, Revision, TrustRemoteCode
from .sources import model_source

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a checkpoint, or folder of a run.")
    ],
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT", help="Text to continue; several are continued one by one.")
    ],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Number of tokens to generate at most.")
    ] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="0 takes the most likely token; above 0, tokens are sampled.")
    ] = 0,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p", min=0, max=1, help="Sample from the most likely tokens whose probabilities add up to this."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of the sampling.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the model's chat template to each prompt.")] = False,
    prefix: Annotated[
        bool, typer.Option("--prefix", help="Read each prompt in both directions: a model with prefix_bidirectional.")
    ] = False,
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Continue texts with a language model. Prints the text while it is generated."""
    if any(not prompt for prompt in prompts):
        raise ValueError("PROMPT must not be empty")
    for prompt in prompts:
        check_text(prompt, "PROMPT")
    if not math.isfinite(temperature):
        raise ValueError(f"--temperature must be a finite number of 0 or more, got {temperature}")
    if top_p == 0:
        raise ValueError("--top-p must be above 0 and at most 1, got 0")
    for name, value in (("--top-p", top_p), ("--seed", seed)):
        if value is not None and temperature == 0:
            raise ValueError(f"{name} has no effect with --temperature 0, which samples nothing, got {value}")

    import torch
    from transformers import AutoModelForCausalLM, TextStreamer, set_seed
    from transformers.utils import logging

    from ..conversion.load_model import load_model, load_tokenizer
    from ..evaluation.token_ids import check_token_ids

    logging.disable_progress_bar()
    source = model_source(model, revision)
    options: dict[str, Any] = {"field": "MODEL", "revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer: Any = load_tokenizer(source, **options)
    if chat and tokenizer.chat_template is None:
        raise ValueError(f"--chat: the tokenizer of {model} has no chat template")
    language_model: Any = load_model(source, AutoModelForCausalLM, dtype=dtype, **options)
    if prefix and not getattr(language_model.config, "prefix_bidirectional", False):
        raise ValueError(f"--prefix: {model} is made with prefix_bidirectional=False and reads prompts causally")
    language_model.register_forward_hook(partial(_refuse_lost_logits, model))
    language_model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    language_model.generation_config = _generation_config(
        language_model.generation_config, tokenizer, max_new_tokens, temperature, top_p
    )
    if seed is not None:
        set_seed(seed)
    for index, prompt in enumerate(prompts):
        if index:
            typer.echo()
        if chat:
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
            )
        else:
            inputs = tokenizer(prompt, return_tensors="pt")
        # Some tokenizers count the segments of a pair, too, which a causal model refuses, or adds to its embeddings.
        inputs.pop("token_type_ids", None)
        if inputs["input_ids"].shape[1] == 0:
            raise ValueError(f"PROMPT: the tokenizer of {model} has no token for {prompt!r}")
        check_token_ids(language_model, inputs["input_ids"][0].tolist(), "MODEL")
        _check_length(inputs["input_ids"].shape[1], language_model.config, model)
        if prefix:
            inputs["prefix_mask"] = torch.ones_like(inputs["input_ids"])
        streamer = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
        language_model.generate(**inputs.to(language_model.device), streamer=streamer)


def _refuse_lost_logits(name: str, _model: object, _inputs: object, outputs: Any) -> None:
    """Raise a ValueError if logits are not finite: the most likely token would be arbitrary."""
    if not outputs.logits.isfinite().all():
        raise ValueError(f"MODEL: {name} computes logits that are not finite; try another --dtype, e.g. float32")


def _check_length(tokens: int, config: Any, name: str) -> None:
    """Raise a ValueError if a prompt is longer than the model's context, unless the model only reads a window of it."""
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and tokens > limit and getattr(config, "context_overflow", None) != "window":
        raise ValueError(
            f"PROMPT must have at most {limit:,} tokens, the max_position_embeddings of {name}, got {tokens:,}"
        )


def _generation_config(
    found: "GenerationConfig",
    tokenizer: "PreTrainedTokenizerBase",
    max_new_tokens: int,
    temperature: float,
    top_p: float | None,
) -> "GenerationConfig":
    """Return the generation settings of the options, with the checkpoint's own end and padding tokens."""
    from transformers import GenerationConfig

    end = found.eos_token_id if found.eos_token_id is not None else tokenizer.eos_token_id
    first_end = end[0] if isinstance(end, list) else end
    padding = next(token for token in (found.pad_token_id, first_end, 0) if token is not None)
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    return GenerationConfig(
        bos_token_id=found.bos_token_id,
        eos_token_id=end,
        pad_token_id=padding,
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        **sampling,
    )
