"""Why a test of the libraries does not apply to a family: a reason for every one that does not pass.

transformers' source distribution lacks `generation/test_utils.py` and `causal_lm_tester.py`. Without a checkout, what
they test is tested by our own `test_generation.py`, `test_decode.py` and `test_cached_matrices.py` (generation and
caches), `test_eight_ways.py` (loss, padding, packing), `test_heads.py` (classification) and `test_compile.py`.
"""

import re
from collections.abc import Callable
from functools import cache

import torch
from families import ENCODERS, FAMILIES, make_config

Families = Callable[[str], bool]


def every(family: str) -> bool:
    return True


def among(*families: str) -> Families:
    return lambda family: family in families


def mixers(family: str) -> list[str]:
    return list(getattr(make_config(family), "mixer_types", None) or [])


def first_layer_is_recurrent(family: str) -> bool:
    """Whether the first layer's output is computed without its matrix."""
    return mixers(family)[:1] not in (["full_attention"], ["sliding_attention"])


def selects_tokens(family: str) -> bool:
    return make_config(family).model_type == "taipan" or "selective_attention" in mixers(family)


def has_learned_positions(family: str) -> bool:
    return make_config(family).model_type == "masked_mixer" or "masked_mixing" in mixers(family)


def is_encoder(family: str) -> bool:
    return family in ENCODERS


def is_deep(family: str) -> bool:
    """Whether the family has more layers than transformers allows its tests."""
    return make_config(family).num_hidden_layers > 2


@cache
def heads_of_first_matrix_differ(family: str) -> bool:
    """Whether the first layer's matrix has other heads than the configuration's attention, if that has any."""
    config = make_config(family)
    model = (FAMILIES | ENCODERS)[family].backbone(config).eval()
    with torch.no_grad():
        matrices = model(torch.ones(1, 3, dtype=torch.long), output_attentions=True).attentions
    return matrices[0].shape[1] != getattr(config, "num_attention_heads", None)


FAILS: list[tuple[str, str, Families, str]] = [
    (
        "transformers",
        "test_retain_grad_hidden_states_attentions",
        first_layer_is_recurrent,
        "the matrix of a recurrence is computed beside its output: no gradient of the output runs through it",
    ),
    (
        "transformers",
        "test_attention_outputs",
        heads_of_first_matrix_differ,
        "the first layer's matrix has the heads of its mixer, the test wants the configuration's num_attention_heads",
    ),
    (
        "transformers",
        "test_num_layers_is_small",
        is_deep,
        "every kind of layer of the family takes more than the two layers that the test allows",
    ),
    (
        "transformers",
        "test_batching_equivalence",
        selects_tokens,
        "the output has selection_rate, a mean over the whole batch, which is not that of one row",
    ),
    (
        "transformers",
        "test_bc_cache_name_forward",
        is_encoder,
        "an encoder has no state to go on from and refuses use_cache=True, which the test passes",
    ),
    (
        "transformers",
        "test_training_overfit",
        is_encoder,
        "the test trains the last class that has a loss on labels of tokens; an encoder's classifies sequences",
    ),
    (
        "transformers",
        "test_model_rope_scaling_from_config_.*",
        has_learned_positions,
        "the test is one and a half times as long as the learned positions, and longer documents are refused",
    ),
    (
        "transformers",
        "test_model_rope_scaling_from_config_.*",
        among("discrete", "jamba"),
        "nothing is rotated in this family (no attention, or partial_rotary_factor 0): scaling changes nothing",
    ),
    (
        "transformers",
        "test_model_rope_scaling_from_config_.*",
        among("convolved-attention"),
        "the untrained attention, of width 16, adds less than the bound of 1e-5; with larger weights it changes",
    ),
    (
        "transformers",
        "test_model_rope_scaling_frequencies",
        among("jamba"),
        "partial_rotary_factor 0 leaves no frequency to scale",
    ),
    (
        "transformers",
        "test_model_rope_scaling_(frequencies|from_config_1_dynamic)",
        among("half-blocks"),
        "two dimensions are rotated, and transformers' dynamic scaling divides by their number less two",
    ),
    (
        "peft",
        r"test_(generate|generate_half_prec|disable_adapter)\[(PromptTuning|PromptEncoder|CPT)Config\d+-.*",
        every,
        "peft 0.21 looks for the cache under its old name: it takes each step of generate for the first and puts the "
        "prompt in again. transformers' Llama then gives other tokens; ours refuses the mask, which does not fit",
    ),
    (
        "peft",
        r"test_generate_pos_args\[PromptTuningConfig\d+-.*",
        has_learned_positions,
        "the same without a mask: the prompt is put in at every step, until the learned positions are used up",
    ),
    (
        "peft",
        r"test_(generate|generate_half_prec|generate_pos_args|disable_adapter)\[PrefixTuningConfig\d+-.*",
        every,
        "peft 0.21 passes its prefix under the cache's old name, beside generate's cache. transformers' Llama drops "
        "the prefix with a warning and answers as without the adapter; ours refuses two caches",
    ),
    (
        "peft",
        r"test_(inference_safetensors|passing_input_embeds_works|training_decoders|training_prompt_learning_tasks)"
        r"\[PrefixTuningConfig\d+-.*",
        every,
        "a prefix of keys and values takes full attention in every layer, and is refused elsewhere",
    ),
    (
        "peft",
        r"test_prompt_learning_with_gradient_checkpointing\[(PromptTuning|PromptEncoder|CPT)Config\d+-.*",
        every,
        "needs a data set of the Hub",
    ),
    (
        "peft",
        r"test_weighted_combination_of_adapters\[LoraConfig\d+-.*",
        every,
        "peft's SVD adds up the adapters' ranks to 20, more than the tiny model's width of 16",
    ),
    (
        "peft",
        r"test_merge_layers(_multi|_nan|_fp16)?\[BeftConfig\d+-.*",
        every,
        "BEFT trains biases and merges into existing ones only; the family's projections have none",
    ),
    (
        "peft",
        r"test_\w+\[(True-|False-)?ShadowConfig\d+-.*",
        every,
        "ShadowPEFT makes a shallower copy by assigning layer_types, which the configuration derives from its fields",
    ),
    (
        "peft",
        r"test_lora_conversion\[(GraloraConfig10|FourierFTConfig7)-.*",
        among("taipan"),
        "a low rank approximates blocks or frequencies: at a width of 16 the error is above the bound",
    ),
]
"""Suite, pattern of the test's name, families, reason. Such a test must fail."""

SKIPS: list[tuple[str, str]] = [
    (
        r"^test requires (Flash Attention( [34])?|accelerator|multiple accelerators|MPS)$"
        r"|Need at least \d+ FSDP workers",
        "needs hardware that is not there, or a package that needs it",
    ),
    (r"^test requires (deepspeed|optimum-quanto|the kernels library)$", "needs a package that is not there"),
    (r"^test is slow$", "transformers runs it on request only (RUN_SLOW)"),
    (
        r"^No conversion found for|^No MTP keys",
        "reads checkpoints of transformers' earlier formats, of which there are none",
    ),
    (
        r"does not have (a|an) (tensor|token-dispatch expert|expert) parallel plan|does not have a TP plan"
        r"|no sparse experts|Not an MoE model|no `output_router_logits`|does not support grouped_mm",
        "about experts and tensor parallelism, which the families do not have",
    ),
    (
        r"not (a )?composite|^No subconfigs|^No sequence-to-sequence",
        "about models of several parts or modalities",
    ),
    (r"Stateful models don't support", "a state cannot be taken back, as transformers' own Mamba says of itself"),
    (
        r"does not support the static cache|doesn't support compilation without graph breaks",
        "the class is not declared to compile in one graph, as the retrieval mixer",
    ),
    (
        r"^Not a prioritized model",
        "transformers takes a file without its copyright line for an old model, which it does not test in this way",
    ),
    (
        r"`capture_outputs` decorator|^Cannot capture hidden states",
        "the forward collects hidden states itself",
    ),
    (r"^Model does not have position embeddings", "about a table of learned positions at one place in the model"),
    (r"^Model does not support sliding window mask", "the configuration has no switch `use_sliding_window`"),
    (r"custom 4D attention masks|new attention mask API", "takes 2-D masks only, by design"),
    (r"does not support SDPA|does not support output_attentions", "no implementation of attention to choose"),
    (r"^No softmax attention$", "compares implementations of softmax attention, which the family does not have"),
    (
        r"^No decoder-only language modeling head|does not support question answering|^bos_token_id is None",
        "the family has no such class or token",
    ),
    (r"declares no recurrent layer types", "transformers knows the recurrent layers of its own caches only"),
    (
        r"does not have partial rope|axial RoPE|no standardized RoPE module",
        "transformers looks for its own rotary layers by name",
    ),
    (r"^This model does not (support RoPE scaling|have RoPE)", "the family rotates nothing"),
    (
        r"_keep_in_fp32_modules nor|_keep_in_fp32_modules or|^No `_keep_in_fp32_modules_strict`",
        "the class has no parameters that stay in float32",
    ),
    (r"^Do not take a cache", "a family's token classifiers have no cache; its other classes were checked"),
    (r"no `base_model_class` defined", "of a tester's inner fields, which ours does not have"),
]
"""Pattern of the words in which a test of transformers skips itself, reason."""

PEFT_SKIPS: list[tuple[str, str]] = [
    (r"^Beam search not yet supported", "peft does not support it with any model"),
    (r"no-activation-case", "peft expects no change of this method's output, and asks for one"),
    (r"trainable tokens is tested elsewhere", "peft tests the merging of such adapters on one model of its own"),
    (r"use shared weights, so this generic", "peft does not count the layers of methods that share their weights"),
    (
        r"^(Prompt learning|Prefix Tuning|Lily|ShadowPEFT|AdaLoRA|This PEFT method|<class 'peft\.\S+'>) "
        r"(does not|layer weights do not|explicitly rejects)"
        r"|^Test not applicable for|^This test (does not apply to|is only for) "
        r"|^Mixed adapter batches not supported for|^Trainable token(s| indices) is (incompatible|not supported)"
        r"|as OSF adapter merge/unload are not implemented|^Skipping OSF for disable_adapter|^Skipping LoRA conversion"
        r"|^Test requires non-zero init",
        "the method does not do what is tested, with any model",
    ),
]
"""The same of peft. That a model does not support something is no reason."""


def reason_to_fail(suite: str, family: str, test: str) -> str | None:
    """Why a test is expected to fail for a family, None if it is expected to pass."""
    for name, pattern, families, reason in FAILS:
        if name == suite and re.fullmatch(pattern, test) and families(family):
            return reason
    return None


def reason_to_skip(suite: str, family: str, text: str) -> str | None:
    """Why a test that skips itself with these words does not apply, None if that is not known."""
    skips = PEFT_SKIPS if suite == "peft" else SKIPS
    return next((reason for pattern, reason in skips if re.search(pattern, text)), None)


def all_reasons() -> list[str]:
    """All reasons there are."""
    return [entry[-1] for entry in (*FAILS, *SKIPS, *PEFT_SKIPS)]
