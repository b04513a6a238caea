"""Why a test of the libraries does not apply to a family: a reason for every one that does not pass."""

import re
from collections.abc import Callable

from families import ENCODERS, make_config

Families = Callable[[str], bool]


def every(family: str) -> bool:
    return True


def first_layer_is_softmax(family: str) -> bool:
    """Whether the first layer's matrix is computed on the way to its output, with the configuration's heads."""
    config = make_config(family)
    mixers = getattr(config, "mixer_types", None)
    return bool(mixers) and mixers[0] in ("full_attention", "sliding_attention")


def first_layer_is_recurrent(family: str) -> bool:
    return not first_layer_is_softmax(family)


def is_encoder(family: str) -> bool:
    return family in ENCODERS


FAILS: list[tuple[str, str, Families, str]] = [
    (
        "transformers",
        "test_retain_grad_hidden_states_attentions",
        first_layer_is_recurrent,
        "the matrix of a recurrence is computed beside its output: no gradient of the output runs through it",
    ),
    (
        "peft",
        r"test_lora_conversion\[GraloraConfig10-.*",
        lambda family: family == "taipan",
        "one low rank approximates blocks and a low rank: at a width of 16 the error is above the bound",
    ),
]
"""Suite, pattern of the test's name, families, reason. Such a test must fail."""

SKIPS: list[tuple[str, str]] = [
    (
        r"test requires (Flash Attention|accelerator|multiple accelerators|MPS|CUDA|GPU|PyTorch accelerator)"
        r"|Need at least \d+ FSDP workers",
        "needs hardware that is not there",
    ),
    (r"test requires|test needs|requires .* (package|library)|is not installed", "needs a package that is not there"),
    (r"test is slow", "transformers runs it on request only (RUN_SLOW)"),
    (r"No conversion found|No MTP keys", "reads checkpoints of transformers' earlier formats, of which there are none"),
    (
        r"(tensor|expert) parallel plan|TP plan|dispatch expert|sparse experts|MoE|output_router_logits|grouped_mm"
        r"|router logits",
        "about experts and tensor parallelism, which the families do not have",
    ),
    (
        r"composite|[Ss]ubconfig|sequence-to-sequence|encoder-decoder|image|video|audio|vision|text_features|get_\w+_features"
        r"|multimodal",
        "about models of several parts or modalities",
    ),
    (r"[Ss]tateful models don't support", "a state cannot be taken back, as transformers' own Mamba says of itself"),
    (
        r"(does not|doesn't) support (the )?(static cache|compilation)|compile",
        "`_can_compile_fullgraph` is not set for the class",
    ),
    (
        r"[Nn]ot a prioritized model",
        "transformers takes a file without its copyright line for an old model, which it does not test in this way",
    ),
    (r"`capture_outputs` decorator|Cannot capture hidden states", "the forward collects hidden states itself"),
    (
        r"position embeddings|sliding window mask|4D attention masks|new attention mask API",
        "takes 2-D masks only, by design",
    ),
    (r"support (SDPA|Flex|flash)|does not support output_attentions|can't dispatch", "no attention to dispatch"),
    (
        r"language modeling head to check|question answering|bos_token_id is None",
        "the family has no such class or token",
    ),
    (r"declares no recurrent layer types", "transformers knows the recurrent layers of its own caches only"),
    (r"partial rope|axial RoPE", "transformers looks for its own rotary layers by name"),
    (r"Do not take a cache", "of the classes of a family the token classifiers have no cache; the others were checked"),
    (r"base_model_class", "of a tester's inner fields, which ours does not have"),
]
"""Pattern of the words in which a test of transformers skips itself, reason."""

PEFT_SKIPS: list[tuple[str, str]] = [
    (r"Beam search not yet supported", "peft does not support it with any model"),
    (r"no-activation-case", "peft expects no change of this method's output, and asks for one"),
    (
        r"^(?!Model ).*([Nn]ot applicable|[Tt]his test (does not apply|is only)|not supported|do(es)? not support"
        r"|incompatible|explicitly rejects|not implemented|does not create|LoRA conversion|do not follow|OSF uses exact"
        r"|non-zero init)",
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
    if is_encoder(family) and "Not returning cache" in text:
        return "an encoder has no cache"
    skips = PEFT_SKIPS if suite == "peft" else SKIPS
    return next((reason for pattern, reason in skips if re.search(pattern, text)), None)
