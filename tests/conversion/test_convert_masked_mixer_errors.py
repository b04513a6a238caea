"""Checkpoints of mixers that are damaged, ambiguous or of another kind: one clear error each, and nothing written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_model
from masked_mixers import LLAMA_CONFIG, MASKED, D, N, Weights, save, tensors
from safetensors.torch import save_file
from structured_mixers import RMS, STRUCTURED

from ssm_zoo.conversion.convert import convert
from ssm_zoo.modeling import MaskedMixerConfig, MaskedMixerForCausalLM

KINDS = MASKED | STRUCTURED | RMS
BLOCK = "mixerblocks.1."
TOKENS = "mixer_blocks.0.token_mixing_layer."


def refused(folder: Path, message: str, settings: tuple[str, ...] = (), **options: Any) -> None:
    """Converting `folder`/theirs raises in one line, and leaves nothing else behind."""
    with pytest.raises(ValueError, match=message) as caught:
        convert(folder / "theirs", folder / "ours", settings=settings, **options)
    assert "\n" not in str(caught.value)
    assert [path.name for path in folder.iterdir()] == ["theirs"]


def changed(kind: str, change: Callable[[Weights], Any], folder: Path) -> None:
    weights = tensors(KINDS[kind])
    change(weights)
    save(folder / "theirs", weights)


def renamed(old: str, new: str) -> Callable[[Weights], Any]:
    def change(weights: Weights) -> None:
        for key in [key for key in weights if old in key]:
            weights[key.replace(old, new)] = weights.pop(key)

    return change


DAMAGED: dict[str, tuple[str, Callable[[Weights], Any], str]] = {
    "missing key": (
        "flat",
        lambda w: w.pop(f"{BLOCK}conv.bias"),
        rf"^theirs: the weights are not what the sizes of its first block promises: 1 missing: {BLOCK}conv.bias$",
    ),
    "left-over key": ("flat", lambda w: w.update(a=torch.ones(1)), "promises: 1 left over: a$"),
    "no embedding": ("flat", lambda w: [w.pop("wte.weight"), w.pop("lm_head.weight")], "wte.weight is missing, from"),
    "no first block": (
        "flat",
        lambda w: [w.pop(key) for key in list(w) if key.startswith("mixerblocks.0.")],
        "mixerblocks.0.patch_ff.0.weight is missing, from whose shape sizes are inferred",
    ),
    "a block that is skipped": ("flat", renamed(BLOCK, "mixerblocks.2."), r"promises: 10 missing: mixerblocks.1.*, \."),
    "other positions in a block": (
        "flat",
        lambda w: w.update({f"{BLOCK}conv.weight": torch.ones(N + 1, N + 1, 1)}),
        rf"1 of another shape: {BLOCK}conv.weight \[11, 11, 1\] instead of \[10, 10, 1\]$",
    ),
    "a matrix that is not square": (
        "flat",
        lambda w: w.update({"mixerblocks.0.conv.weight": torch.ones(N, N - 1, 1)}),
        r"mixerblocks.0.conv.weight must have as many columns as rows, got shape \[10, 9, 1\]",
    ),
    "a matrix of four axes": (
        "flat",
        lambda w: w.update({"mixerblocks.0.conv.weight": torch.ones(N, N, 1, 1)}),
        r"conv.weight must have 2 or 3 axes, none of them empty, got shape \[10, 10, 1, 1\]",
    ),
    "other taps in a block": (
        "kernel-3",
        lambda w: w.update({f"{BLOCK}conv.weight": torch.ones(N, N, 2)}),
        r"conv.weight \[10, 10, 2\] instead of \[10, 10, 3\]",
    ),
    "a head more in a block": (
        "heads",
        lambda w: w.update({f"{BLOCK}mixerhead.convs.3.bias": torch.ones(N)}),
        "1 left over: mixerblocks.1.mixerhead.convs.3.bias",
    ),
    "heads that do not divide the width": (
        "heads",
        lambda w: [w.update({f"mixerblocks.0.mixerhead.convs.{head}.bias": torch.ones(N)}) for head in range(3, 5)],
        "num_heads must divide hidden_size",
    ),
    "an output projection of another width": (
        "heads",
        lambda w: w.update({"mixerblocks.0.mixerhead.out_proj.weight": torch.ones(D, 2 * D)}),
        "out_proj.weight must have 12 columns or, with the stale index of MixerHead, 3 times as many, got 24",
    ),
    "a head of another width": (
        "flat",
        lambda w: w.update({"lm_head.weight": torch.ones(5, D + 1)}),
        r"lm_head.weight \[5, 13\] instead of \[37, 12\]",
    ),
    "more taps than channels": (
        "kernel-3",
        lambda w: w.update({"mixerblocks.0.conv.weight": torch.ones(N, N, D + 1)}),
        "sizes or settings: kernel_size must be at most the 12 channels of a head, got 13",
    ),
    "integers": ("flat", lambda w: w.update({f"{BLOCK}conv.bias": torch.ones(N).int()}), "of a dtype other than"),
    "an encoder that lacks a key": (
        "autoencoder",
        lambda w: w.pop("encoderblocks.1.conv.bias"),
        "1 missing: encoderblocks.1.conv.bias",
    ),
    "a stream without a bias": ("bidirectional", lambda w: w.pop(f"{BLOCK}convr.bias"), "1 missing: .*convr.bias"),
    "a repeat without a decay in a block": (
        "mixed",
        lambda w: w.pop("mixer_blocks.1.token_mixing_layer.mixer_heads.2.decay_value"),
        "1 missing: mixer_blocks.1.token_mixing_layer.mixer_heads.2.decay_value",
    ),
    "decays of another shape": (
        "parallel",
        lambda w: w.update({f"{TOKENS}mixer_heads.decay_value": torch.ones(4)}),
        r"decay_value \[4\] instead of \[2, 1\]",
    ),
    "vectors of another length": (
        "toeplitz-heads",
        lambda w: w.update({f"{TOKENS}mixer_heads.1.weight": torch.ones(1, N + 1)}),
        r"mixer_heads.1.weight \[1, 11\] instead of \[1, 10\]",
    ),
    "more rows than a combined head has": (
        "combined",
        lambda w: w.update({f"{TOKENS}mixer_heads.0.weight": torch.ones(3, N)}),
        "mixer_heads.0.weight must have 1 row, or 2 for a combined head, got 3",
    ),
    "a transfixer without its convolution in a block": (
        "transfixer",
        lambda w: w.pop("model.layers.1.mixer_layer.conv.weight"),
        "1 missing: model.layers.1.mixer_layer.conv.weight",
    ),
    "expanded without its second convolution": (
        "expanded",
        lambda w: w.pop("mixerblocks.0.conv.2.weight"),
        "mixerblocks.0.conv.2.weight is missing, from whose shape sizes are inferred",
    ),
    "expanded with one bias": (
        "expanded-2",
        lambda w: w.pop("mixerblocks.1.conv.2.bias"),
        "1 missing: mixerblocks.1.conv.2.bias",
    ),
    "expanded Toeplitz": (
        "toeplitz",
        renamed("token_mixing_layer.", "token_mixing_layer.0."),
        "token_mixing_layer.0.bias is a key of an expanded Toeplitz mixer",
    ),
    "a diagonal": ("row", lambda w: w.update({f"{TOKENS}diag_weight": torch.ones(1, N)}), "with a diagonal of its own"),
    "memory": ("autoencoder", renamed("lm_head", "decoder_wte"), "decoder_wte.weight is a key of a memory mixer"),
    "token pairs": (
        "autoencoder",
        lambda w: w.update({"wte.bias": torch.ones(D)}),
        "an AutoencodingMixer of token pai",
    ),
    "moving averages": (
        "002",
        lambda w: w.update({"blocks.0.mixer.alpha_logits": torch.ones(4)}),
        "exponential moving averages. Only LanguageMixer, MultiHeadedMixer, Auto",
    ),
    "half a Llama": (
        "flat",
        renamed("mixerblocks.", "decoder.layers."),
        "an AutoencodingTransfixer, of which one half",
    ),
    "an unknown one": (
        "flat",
        lambda w: [w.pop(key) for key in list(w) if key != "wte.weight"],
        r"must hold a config.json, or have the keys of one of LanguageMixer, .*\. Its first key is wte.weight\.$",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_checkpoint_that_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    kind, change, message = DAMAGED[case]
    changed(kind, change, tmp_path)
    refused(tmp_path, message, KINDS[kind].settings)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("flat", ("mixing=dense",), "--set mixing is no setting of LanguageMixer. It has bos_token_id, context_over"),
        ("flat", ("a.b=1",), "--set a is no setting of LanguageMixer"),
        ("flat", ("pad_mode",), "override must be of the form dotted.key=value, got 'pad_mode'"),
        ("flat", ("pad_mode=left",), "sizes or settings: pad_mode must be one of shift, as_trained, got"),
        (
            "flat",
            ("pad_mode=as_trained",),
            "pad_mode='as_trained' fills rows up with pad_token_id, which must be a tok",
        ),
        ("flat", ("pad_mode=3",), "--set pad_mode must be a value of type str, got 3"),
        ("flat", ("pad_token_id=37",), "pad_token_id must be None or from 0 to 36, got 37"),
        ("flat", ("pad_token_id=true",), "--set pad_token_id must be a value of type int, got True"),
        ("flat", ("hidden_act=none",), "hidden_act must be an activation of transformers, got 'none'"),
        (
            "column-heads",
            (),
            "--set mixing must be given, since several kinds have these keys: toeplitz or column_repeat",
        ),
        (
            "column-heads",
            ("mixing=mixed_repeat",),
            "--set mixing must be toeplitz or column_repeat.*, got 'mixed_repeat'",
        ),
        (
            "mixed",
            ("mixing=toeplitz",),
            "--set mixing must be mixed_repeat or column_repeat or row_repeat, got 'toeplitz'",
        ),
        ("row-decay", ("decay_constant=0",), "--set decay_constant must be above 0, got 0.0"),
        (
            "row-decay",
            ("decay_constant=0.25",),
            "decay_value to the power of 4 must be a decay of at least 0.9, got 0.6561 from 0.85",
        ),
        ("row", ("decay_constant=2",), "--set decay_constant is no setting of recurrent MLPMixer. It has .*mixing"),
        ("parallel", ("use_projections=1",), "--set use_projections must be a value of type bool, got 1"),
        ("010", (), "--set mean must be given, since the keys do not tell it. Pass --set mean=true if outputs are"),
        (
            "transfixer",
            (),
            "--set num_attention_heads must be given, since it cannot be inferred without a config",
        ),
        (
            "transfixer",
            ("num_attention_heads=5",),
            "num_attention_heads must divide the 12 rows of q_proj into heads .* of k_proj, got 5",
        ),
        ("transfixer", ("num_attention_heads=0",), "num_attention_heads must be above 0, got 0"),
    ],
)
def test_a_setting_that_is_wrong_or_missing_is_named(
    kind: str, settings: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    changed(kind, lambda weights: weights.update(low(weights) if "0.25" in str(settings) else {}), tmp_path)
    refused(tmp_path, message, settings)


def low(weights: Weights) -> Weights:
    return {key: torch.full_like(tensor, 0.85) for key, tensor in weights.items() if "decay_value" in key}


def test_a_configuration_that_says_it_all_takes_no_settings(tmp_path: Path) -> None:
    make_model("mamba2").save_pretrained(tmp_path / "theirs")
    refused(
        tmp_path,
        "--set must be left out for a checkpoint with a config.json, got 'pad_mode=shift'",
        ("pad_mode=shift",),
    )


def test_a_transfixer_without_its_mixers_is_a_llama(tmp_path: Path) -> None:
    changed("transfixer", lambda w: [w.pop(key) for key in list(w) if "mixer_layer" in key], tmp_path)
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    assert convert(tmp_path / "theirs", tmp_path / "ours").source == "transformers llama"


def test_a_pickle_is_read_if_allowed(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    torch.save(tensors(MASKED["flat"]), tmp_path / "theirs" / "pytorch_model.bin")
    refused(tmp_path, "has its weights in pytorch_model.bin, a pickle, .* Pass --allow-pickle")
    convert(tmp_path / "theirs", tmp_path / "ours", allow_pickle=True)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    changed("flat", lambda weights: None, tmp_path)
    path = tmp_path / "theirs" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    refused(tmp_path, "model.safetensors is damaged, or no safetensors file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixing": "toeplitz"}, "`mixing` must be 'dense', got 'toeplitz'"),
        ({"mlp_first": True}, "`mlp_first` must be False, got True"),
        ({"norm_type": "rms_norm"}, "`norm_type` must be 'layer_norm', got 'rms_norm'"),
        ({"norm_eps": 1e-6}, "`norm_eps` must be 1e-05, got 1e-06"),
        ({"final_norm": True}, "`final_norm` must be False, got True"),
        ({"mlp_type": "gated"}, "`mlp_type` must be 'plain', got 'gated'"),
        ({"mlp_bias": False}, "`mlp_bias` must be True, got False"),
        ({"hidden_act": "silu"}, "`hidden_act` must be 'gelu', got 'silu'"),
        ({"attention": "series"}, "`attention` must be 'none', got 'series'"),
        (
            {"num_heads": 2, "use_projections": False},
            "`use_projections` must be True for several heads in maskedmixers, got False",
        ),
        ({"num_heads": 2, "expanded": True}, "`expanded` must be False with several heads or projections, got True"),
    ],
)
def test_what_the_authors_classes_cannot_express_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": N}
    MaskedMixerForCausalLM(MaskedMixerConfig(**{**sizes, **change})).save_pretrained(tmp_path / "theirs")
    refused(tmp_path, f"^config.json: {message}", to="maskedmixers")


def test_a_folder_of_weights_alone_is_replaced_if_asked(tmp_path: Path) -> None:
    source = save(tmp_path / "theirs", tensors(MASKED["flat"]))
    convert(source, tmp_path / "ours")
    for _ in range(2):
        convert(tmp_path / "ours", tmp_path / "back", to="maskedmixers", overwrite=True)
    with pytest.raises(ValueError, match="exists and is not empty"):
        convert(tmp_path / "ours", tmp_path / "back", to="maskedmixers")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not replaced: it holds no config\.json"):
        convert(source, tmp_path / "notes", overwrite=True)


def test_a_converted_mixer_has_no_other_formats(tmp_path: Path) -> None:
    changed("flat", lambda weights: None, tmp_path)
    refused(tmp_path, "^--to transformers: that library has no model like this masked_mixer", to="transformers")
    save_file(tensors(MASKED["autoencoder"]), tmp_path / "theirs" / "model.safetensors")
    refused(tmp_path, "^--to maskedmixers: that library has no model like this masked_mixer", to="maskedmixers")
