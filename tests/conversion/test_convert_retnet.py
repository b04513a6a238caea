"""Checkpoints of torchscale's and flash-linear-attention's RetNet, made from the published names and shapes.

They are compared with the published equations in float64, and converted there and back."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import retnet
import torch
from families import draw_ids, make_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ssm_zoo.conversion.convert import convert
from ssm_zoo.conversion.formats.torchscale_retnet import TORCHSCALE_RETNET
from ssm_zoo.conversion.rules import Mapper
from ssm_zoo.modeling import ZooRetNetForCausalLM, preset

VOCAB, WIDTH, LAYERS = 61, 24, 2
TORCHSCALE = {
    "plain": {"decoder_retention_heads": 3, "decoder_value_embed_dim": 30, "decoder_ffn_embed_dim": 20},
    "everything": {
        "decoder_retention_heads": 2,
        "decoder_value_embed_dim": 10,
        "decoder_ffn_embed_dim": 36,
        "activation_fn": "swish",
        "no_scale_embedding": False,
        "share_decoder_input_output_embed": True,
        "max_target_positions": 99,
        "layernorm_eps": 1e-3,
        "subln": False,
        "decoder_normalize_before": True,
        "chunkwise_recurrent": True,
        "dropout": 0.1,
    },
}
FLA = {
    "plain": {"num_heads": 3, "intermediate_size": 20},
    "everything": {
        "num_heads": 4,
        "num_kv_heads": 2,
        "expand_k": 2 / 3,
        "expand_v": 1.5,
        "hidden_ratio": 7,
        "intermediate_size": None,  # 256
        "max_position_embeddings": 99,
        "elementwise_affine": False,
        "norm_eps": 1e-2,
        "use_cache": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        "pad_token_id": 3,
        "bos_token_id": 4,
        "eos_token_id": 5,
    },
    "without-a-gate": {"num_heads": 3, "intermediate_size": 20, "use_output_gate": False},
}
BOTH = [*(("torchscale", name) for name in TORCHSCALE), *(("fla", name) for name in FLA)]


def config_of(library: str, name: str) -> dict[str, Any]:
    if library == "torchscale":
        return {"vocab_size": VOCAB, "decoder_embed_dim": WIDTH, "decoder_layers": LAYERS} | TORCHSCALE[name]
    sizes = {"model_type": "retnet", "architectures": ["RetNetForCausalLM"], "dtype": "float32", "attn_mode": "chunk"}
    return sizes | {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS} | FLA[name]


def sizes_of(library: str, name: str) -> retnet.Sizes:
    """The reference's sizes, from the other library's own configuration."""
    given = config_of(library, name)
    if library == "torchscale":
        heads = given["decoder_retention_heads"]
        return retnet.Sizes(
            heads,
            heads,
            given.get("layernorm_eps", 1e-6),
            retnet.torchscale_angles(WIDTH // heads),
            interleaved=True,
            act="silu" if given.get("activation_fn") == "swish" else "gelu",
            embed_scale=1.0 if given.get("no_scale_embedding", True) else math.sqrt(WIDTH),
        )
    heads = given["num_heads"]
    angles = retnet.llama_angles(round(WIDTH * given.get("expand_k", 1.0)) // heads)
    return retnet.Sizes(heads, given.get("num_kv_heads", heads), given.get("norm_eps", 1e-6), angles, normalize=False)


def tensors_of(library: str, name: str) -> dict[str, Tensor]:
    """A state dict with the published names and shapes."""
    given, names = config_of(library, name), retnet.TORCHSCALE if library == "torchscale" else retnet.FLA
    if library == "torchscale":
        heads = kv_heads = given["decoder_retention_heads"]
        keys, values, inner = WIDTH, given["decoder_value_embed_dim"], given["decoder_ffn_embed_dim"]
        tied, gate, affine = given.get("share_decoder_input_output_embed", False), True, False
    else:
        heads = given["num_heads"]
        kv_heads = given.get("num_kv_heads", heads)
        keys, values = (round(WIDTH * given.get(key, default)) for key, default in (("expand_k", 1), ("expand_v", 2)))
        inner, tied = given["intermediate_size"] or 256, given.get("tie_word_embeddings", False)
        gate, affine = given.get("use_output_gate", True), given.get("elementwise_affine", True)
    part = kv_heads / heads
    shapes = {
        "first_norm": (WIDTH,),
        "second_norm": (WIDTH,),
        "q": (keys, WIDTH),
        "k": (round(keys * part), WIDTH),
        "v": (round(values * part), WIDTH),
        "o": (WIDTH, values),
        "gate": (inner, WIDTH),
        "up": (inner, WIDTH),
        "down": (WIDTH, inner),
    }
    shapes |= ({"g": (values, WIDTH)} if gate else {}) | ({"head_norm": (values // heads,)} if affine else {})
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        return 1 + 0.2 * noise if len(shape) == 1 else noise * shape[-1] ** -0.5

    state = {names["embedding"]: draw(VOCAB, WIDTH), names["norm"]: draw(WIDTH)}
    for layer in range(LAYERS):
        for what, shape in shapes.items():
            key = names["mixer"].format(what) if what in "qkvg" else names[what]
            state[names["block"].format(layer) + key] = draw(*shape)
    if not gate:
        state = {key.replace("g_norm_swish_gate", "g_norm"): tensor for key, tensor in state.items()}
    if not tied:
        state[names["head"]] = draw(VOCAB, WIDTH)
    elif library == "torchscale":
        state[names["head"]] = state[names["embedding"]].clone()
    if library == "torchscale":
        state["retnet_rel_pos.angle"] = (1.0 / (10000 ** torch.linspace(0, 1, WIDTH // heads // 2))).repeat_interleave(
            2
        )
        state["retnet_rel_pos.decay"] = torch.log(1 - 2 ** (-5 - torch.arange(heads, dtype=torch.float)))
    return state


def save(folder: Path, library: str, name: str, state: dict[str, Tensor], **changes: Any) -> Path:
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_of(library, name) | changes))
    return folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("library", "name"), BOTH)
def test_a_layout_computes_what_is_published_and_comes_back(library: str, name: str, tmp_path: Path) -> None:
    state = tensors_of(library, name)
    report = convert(save(tmp_path / "theirs", library, name, state), tmp_path / "ours")
    assert report.keys_read == len(state)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    ids = draw_ids(2, 19)
    names = dict(retnet.TORCHSCALE if library == "torchscale" else retnet.FLA)
    if name == "without-a-gate":
        names["head_norm"] = "attn.g_norm.weight"
    for row in range(2):
        with torch.no_grad():
            actual = model(ids).logits[row]
        expected = retnet.decoder(state, names, ids[row], sizes_of(library, name))
        assert expected.std() > 0.3
        torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)

    convert(tmp_path / "ours", tmp_path / "back", to=library)
    again = weights_of(tmp_path / "back")
    assert again.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(again[key], tensor), key
    convert(tmp_path / "back", tmp_path / "again")
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("ours", "again")]
    assert configs[0] == configs[1]
    given, written = config_of(library, name), json.loads((tmp_path / "back" / "config.json").read_text())
    without = {"dropout", "chunkwise_recurrent", "subln"}  # they change nothing
    without |= {"dtype", "attn_mode", "intermediate_size", "hidden_ratio"}
    assert {key: written[key] for key in given.keys() - without} == {k: given[k] for k in given.keys() - without}


def test_half_precision_keeps_angles_and_decays_in_float32(tmp_path: Path) -> None:
    state = tensors_of("torchscale", "plain")
    half = {key: tensor.half() for key, tensor in state.items()}  # as `model.half()` has them
    convert(save(tmp_path / "theirs", "torchscale", "plain", half), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to="torchscale")
    for key, tensor in weights_of(tmp_path / "back").items():
        fixed = key.startswith("retnet_rel_pos")
        assert torch.equal(tensor, state[key] if fixed else half[key]), key


def test_a_checkpoint_inside_fairseqs_model_is_read(tmp_path: Path) -> None:
    state = {f"decoder.{key}": tensor for key, tensor in tensors_of("torchscale", "plain").items()}
    report = convert(save(tmp_path / "theirs", "torchscale", "plain", state), tmp_path / "ours")
    assert any("'decoder.'" in note for note in report.notes)


@pytest.mark.parametrize(
    ("name", "key", "change", "message"),
    [
        ("plain", "retnet_rel_pos.decay", lambda t: t - 0.01, "weights: retnet_rel_pos.decay must be "),
        ("plain", "retnet_rel_pos.angle", lambda t: t * 0.9, "weights: retnet_rel_pos.angle must be "),
        ("everything", "output_projection.weight", lambda t: t + 1, "weights: output_projection.weight must be equal"),
    ],
)
def test_tensors_that_the_zoo_computes_are_compared(
    name: str, key: str, change: Any, message: str, tmp_path: Path
) -> None:
    state = tensors_of("torchscale", name)
    state[key] = change(state[key])
    save(tmp_path / "theirs", "torchscale", name, state)
    with pytest.raises(ValueError, match=f"^{message}"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize(
    ("library", "change", "message"),
    [
        ("torchscale", {"moe_freq": 2}, "`moe_freq` must be 0, got 2"),
        ("torchscale", {"deepnorm": True}, "`deepnorm` must be False, got True"),
        ("torchscale", {"multiway": True}, "`multiway` must be False, got True"),
        ("torchscale", {"layernorm_embedding": True}, "`layernorm_embedding` must be False, got True"),
        ("torchscale", {"no_output_layer": True}, "`no_output_layer` must be False, got True"),
        (
            "torchscale",
            {"subln": False, "decoder_normalize_before": False},
            "`decoder_normalize_before` must be True, got False",
        ),
        ("torchscale", {"activation_fn": "relu"}, "`activation_fn` must be 'swish' or 'gelu', got 'relu'"),
        ("torchscale", {"vocab_size": -1}, "`vocab_size` must be an integer of at least 1, got -1"),
        ("torchscale", {"decoder_retention_heads": 7}, r"`decoder_retention_heads` must divide .* \(24\), got 7"),
        ("torchscale", {"decoder_retentions": 7}, "`decoder_retentions` is not a field of torchscale's RetNetConfig"),
        ("fla", {"feature_map": "relu"}, "`feature_map` must be None, got 'relu'"),
        ("fla", {"use_short_conv": True}, "`use_short_conv` must be False, got True"),
        ("fla", {"attn": {"layers": [1]}}, "`attn` must be None, got "),
        ("fla", {"attnres_block_size": 4}, "`attnres_block_size` must be None, got 4"),
        ("fla", {"fuse_norm": False}, "`fuse_norm` must be True, got False"),
        ("fla", {"hidden_act": "powlu"}, "`hidden_act` must be 'swish', got 'powlu'"),
        ("fla", {"expand_k": 0.7}, r"`expand_k` must make hidden_size \(24\) a multiple of num_heads \(3\), got 0.7"),
        ("fla", {"num_heads": 0}, "`num_heads` must be an integer of at least 1, got 0"),
        ("fla", {"decoder_embed_dim": 24}, "`model_type` must be left out beside the fields of torchscale's"),
    ],
)
def test_a_field_that_cannot_be_expressed_is_named(
    library: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save(tmp_path / "theirs", library, "plain", {}, **change)
    with pytest.raises(ValueError, match=f"^config.json: {message}"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


OURS = {"head_dim": 4, "v_head_dim": 7}


@pytest.mark.parametrize(
    ("to", "change", "message"),
    [
        ("torchscale", {"num_key_value_heads": 2}, "`num_key_value_heads` must be 4, got 2"),
        ("torchscale", {"head_dim": 6}, r"`head_dim` must be hidden_size / num_attention_heads \(16 / 4\) .* got 6"),
        ("torchscale", {"mlp_type": "plain"}, "`mlp_type` must be 'gated', got 'plain'"),
        ("torchscale", {"use_output_gate": False}, "`use_output_gate` must be True, got False"),
        ("torchscale", {"normalize_scores": False}, "`normalize_scores` must be True, got False"),
        ("torchscale", {"elementwise_affine": True}, "`elementwise_affine` must be False, got True"),
        ("torchscale", {"hidden_act": "relu"}, "`hidden_act` must be 'silu' or 'gelu', got 'relu'"),
        ("torchscale", {"embedding_multiplier": 3.0}, "`embedding_multiplier` must be 1.0 or 4.0, got 3.0"),
        (
            "torchscale",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
            "`rope_parameters.rope_theta` must be 1",
        ),
        ("fla", {}, "`normalize_scores` must be False, got True"),
        ("fla", {"normalize_scores": False}, "`rope_parameters.rope_theta` must be 10000.0, got 1"),
        ("fla", {"mlp_type": "plain"}, "`mlp_type` must be 'gated', got 'plain'"),
        ("fla", {"hidden_act": "gelu"}, "`hidden_act` must be 'silu', got 'gelu'"),
    ],
)
def test_what_the_other_library_cannot_express_is_named(
    to: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make_model("retnet", **OURS | change).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=f"^config.json: {message}"):
        convert(tmp_path / "ours", tmp_path / "theirs", to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_preset_has_torchscales_keys() -> None:
    """Names and shapes of `retnet_medium`, from the published code."""
    config = preset("retnet-medium")
    with torch.device("meta"):
        model = ZooRetNetForCausalLM(config)
    theirs = Mapper(TORCHSCALE_RETNET.rules(config), model.state_dict()).expected()
    block = {
        "retention.q_proj": (1024, 1024),
        "retention.k_proj": (1024, 1024),
        "retention.v_proj": (1728, 1024),
        "retention.g_proj": (1728, 1024),
        "retention.out_proj": (1024, 1728),
        "retention_layer_norm": (1024,),
        "ffn.fc1": (1728, 1024),
        "ffn.gate": (1728, 1024),
        "ffn.fc2": (1024, 1728),
        "final_layer_norm": (1024,),
    }
    wanted = {f"layers.{layer}.{name}.weight": shape for layer in range(16) for name, shape in block.items()}
    wanted |= {"embed_tokens.weight": (32000, 1024), "output_projection.weight": (32000, 1024)}
    wanted |= {"layer_norm.weight": (1024,), "retnet_rel_pos.angle": (256,), "retnet_rel_pos.decay": (4,)}
    assert {key: tensor.shape for key, tensor in theirs.items()} == wanted
