"""`ssm-zoo generate`: continue a text, or answer, with any causal language model."""

import math
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..harness.text_files import check_text
from .loading_options import TrustRemoteCode
from .run_folder import model_source

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


class Dtype(StrEnum):
    """What the weights are loaded in; auto is the checkpoint's own."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a checkpoint, or folder of a run.")
    ],
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT", help="Text to continue; of several, each by itself.")
    ],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens to write.")] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="0 takes the likeliest token; above, tokens are drawn.")
    ] = 0,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", min=0, max=1, help="Draw from the likeliest tokens with this probability together."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, max=2**32 - 1, help="Draw the same tokens each time.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    dtype: Annotated[
        Dtype, typer.Option("--dtype", help="What the weights are loaded in; auto is the checkpoint's own.")
    ] = Dtype.AUTO,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="REVISION", help="Branch, tag or commit, for a Hub id.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Continue texts with a language model. The text is printed as it comes."""
    if any(not prompt for prompt in prompts):
        raise ValueError("PROMPT: got an empty text; accepted: one character or more")
    for prompt in prompts:
        check_text(prompt, "PROMPT")
    if not math.isfinite(temperature):
        raise ValueError(f"--temperature: got {temperature}; accepted: a finite number, 0 or more")
    if top_p == 0:
        raise ValueError("--top-p: got 0; accepted: a number above 0, at most 1")
    for name, value in (("--top-p", top_p), ("--seed", seed)):
        if value is not None and temperature == 0:
            raise ValueError(f"{name}: got {value}, but nothing is drawn with --temperature 0; set one above 0")

    import torch
    from transformers import AutoModelForCausalLM, TextStreamer, set_seed
    from transformers.utils import logging

    from ..conversion.load_model import load_model, load_tokenizer

    logging.disable_progress_bar()
    source = model_source(model)
    options: dict[str, Any] = {"field": "MODEL", "revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer: Any = load_tokenizer(source, **options)
    if chat and tokenizer.chat_template is None:
        raise ValueError(f"--chat: the tokenizer of {model} has no chat template")
    language_model: Any = load_model(source, AutoModelForCausalLM, dtype=dtype.value, **options)
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
        if inputs["input_ids"].shape[1] == 0:
            raise ValueError(f"PROMPT: the tokenizer of {model} has no token for {prompt!r}")
        _check_length(inputs["input_ids"].shape[1], language_model.config, model)
        streamer = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
        language_model.generate(**inputs.to(language_model.device), streamer=streamer)


def _refuse_lost_logits(name: str, _model: object, _inputs: object, outputs: Any) -> None:
    """Raise a ValueError if logits are not finite: the likeliest token would be an arbitrary one."""
    if not outputs.logits.isfinite().all():
        raise ValueError(f"MODEL: {name} computes logits that are not finite; try another --dtype, e.g. float32")


def _check_length(tokens: int, config: Any, name: str) -> None:
    """Raise a ValueError if a prompt is longer than what the model was made for, unless it looks at a window alone."""
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and tokens > limit and getattr(config, "context_overflow", None) != "window":
        raise ValueError(
            f"PROMPT: got {tokens:,} tokens; accepted: at most {limit:,}, the max_position_embeddings of {name}"
        )


def _generation_config(
    found: "GenerationConfig",
    tokenizer: "PreTrainedTokenizerBase",
    max_new_tokens: int,
    temperature: float,
    top_p: float | None,
) -> "GenerationConfig":
    """The end and padding tokens of the checkpoint's own configuration, and of the rest what the options say."""
    from transformers import GenerationConfig

    end = found.eos_token_id if found.eos_token_id is not None else tokenizer.eos_token_id
    first_end = end[0] if isinstance(end, list) else end
    padding = next(token for token in (found.pad_token_id, first_end, 0) if token is not None)
    drawing = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    return GenerationConfig(
        bos_token_id=found.bos_token_id,
        eos_token_id=end,
        pad_token_id=padding,
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        **drawing,
    )
