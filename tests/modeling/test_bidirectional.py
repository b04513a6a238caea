"""Encoders: what a token sees, the two directions against a loop over time, and what cannot be had with them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import ENCODERS, FAMILIES, VOCAB, draw_ids, make_config, make_head, make_model
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, DynamicCache

from ssm_zoo.kernels.causal_conv1d import causal_conv1d_reference
from ssm_zoo.kernels.rms_norm import rms_norm_reference
from ssm_zoo.kernels.selective_scan import selective_scan_reference
from ssm_zoo.kernels.ssd import ssd_reference
from ssm_zoo.modeling.cache import CACHE_FIELD
from ssm_zoo.modeling.modeling_mamba import MambaMixer
from ssm_zoo.modeling.token_layout import Sequence, make_sequence

# transformers 5.23 calls it activation checkpointing; 5.17, which is supported too, knows the old name only.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

LENGTH = 13
SEQ_IDX = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 3, 3]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0]])
INPUTS = [
    pytest.param({}, id="whole"),
    pytest.param({"seq_idx": SEQ_IDX}, id="packed"),
    pytest.param({"attention_mask": MASK}, id="padded"),
    pytest.param({"attention_mask": MASK, "seq_idx": SEQ_IDX}, id="packed-and-padded"),
]

# The two directions of these are scans in each mixer, with parameters of their own; those of a masked mixer are streams
# (test_masked_mixer.py), and those of retention have the same parameters (test_retnet.py).
# A hybrid may have both kinds of mixers, and attention.
SCANS = [encoder for encoder in ENCODERS if not encoder.startswith(("mixer", "retnet", "hybrid"))]


@pytest.fixture(params=ENCODERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def labelled(arguments: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(L) document of each column, and the real ones."""
    real = arguments.get("attention_mask", torch.ones(1, LENGTH))[0] != 0
    return arguments.get("seq_idx", torch.zeros(1, LENGTH))[0], real


# Turning documents around


@pytest.mark.parametrize("seed", range(6))
def test_reverse_turns_every_document_where_it_stands(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    seq_idx = torch.randint(0, 2, (3, 17), generator=generator).cumsum(1)
    seq_idx[torch.rand(3, 17, generator=generator) < 0.3] = -1
    values = torch.randn(3, 17, 2, generator=generator)
    sequence = make_sequence(3, 17, values.device, seq_idx=seq_idx)
    turned = sequence.reverse(values)
    for row in range(3):
        for document in seq_idx[row].unique():
            if document >= 0:
                columns = seq_idx[row] == document
                assert torch.equal(turned[row, columns], values[row, columns].flip(0))
    assert torch.equal(sequence.reverse(turned), values)
    assert torch.equal(sequence.reverse(values.transpose(1, 2), dim=2), turned.transpose(1, 2))


def test_reverse_without_documents_or_padding_is_a_flip() -> None:
    values = torch.randn(2, 5, 3)
    assert torch.equal(make_sequence(2, 5, values.device).reverse(values), values.flip(1))


# The mixer


def convolved(scan: Any, x: Tensor) -> Tensor:
    return causal_conv1d_reference(x, scan.conv1d.weight[:, 0], scan.conv1d.bias, activation="silu")


def scanned_s6(scan: Any, x: Tensor) -> Tensor:
    """One direction of Mamba-1 over one document, in a loop over time."""
    x = convolved(scan, x)
    dt, B, C = scan.x_proj(x).split(scan.split, dim=-1)
    dt, B, C = scan.dt_proj(scan.dt_layernorm(dt)), scan.b_layernorm(B)[:, :, None], scan.c_layernorm(C)[:, :, None]
    return selective_scan_reference(x, dt, -scan.A_log.exp(), B, C, D=scan.D, dt_softplus=True)


def scanned_ssd(scan: Any, xBC: Tensor, dt: Tensor) -> Tensor:
    """One direction of Mamba-2 over one document, in a loop over time."""
    x, B, C = convolved(scan, xBC).split(scan.conv_split, dim=-1)
    heads = {"x": x.unflatten(-1, (scan.num_heads, -1)), "dt": dt, "A": -scan.A_log.exp()}
    maps = {"B": B.unflatten(-1, (scan.n_groups, -1)), "C": C.unflatten(-1, (scan.n_groups, -1))}
    steps = {"dt_bias": scan.dt_bias, "dt_softplus": True, "dt_limit": scan.time_step_limit}
    return ssd_reference(**heads, **maps, D=scan.D, **steps).flatten(2)


def mixed(mixer: Any, hidden_states: Tensor) -> Tensor:
    """The mixer over one document, in loops over time."""
    if isinstance(mixer, MambaMixer):
        x, z = mixer.in_proj(hidden_states).chunk(2, dim=-1)
        y = scanned_s6(mixer, x) + scanned_s6(mixer.reverse, x.flip(1)).flip(1)
        return mixer.out_proj(y * F.silu(z))
    z, xBC, dt = mixer.in_proj(hidden_states).split(mixer.split, dim=-1)
    y = scanned_ssd(mixer, xBC, dt) + scanned_ssd(mixer.reverse, xBC.flip(1), dt.flip(1)).flip(1)
    return mixer.out_proj(gated(mixer, y, z))


def gated(mixer: Any, y: Tensor, z: Tensor) -> Tensor:
    """Mamba-2's gate and norm."""
    return rms_norm_reference(y, mixer.norm.weight, mixer.norm.eps, z=z, group_size=mixer.norm.group_size)


def applied(mixer: Any, hidden_states: Tensor, matrix: Tensor, sequence: Sequence) -> Tensor:
    """What the mixer gives for (1, L, D) hidden states, by its (1, 2 H, L, L) matrices."""

    def values(scan: Any, x: Tensor) -> Tensor:
        x, _ = scan.conv1d(x, seq_idx=sequence.seq_idx)
        return x[..., None] if isinstance(mixer, MambaMixer) else scan.recurrence_inputs(x)[0]

    if isinstance(mixer, MambaMixer):
        x, z = mixer.in_proj(hidden_states).chunk(2, dim=-1)
    else:
        z, x, _ = mixer.in_proj(hidden_states).split(mixer.split, dim=-1)
    both = torch.cat([values(mixer, x), sequence.reverse(values(mixer.reverse, sequence.reverse(x)))], dim=2)
    y = torch.einsum("bhls,bshp->bhlp", matrix, both).unflatten(1, (2, -1)).sum(1).transpose(1, 2).flatten(2)
    return mixer.out_proj(y * F.silu(z) if isinstance(mixer, MambaMixer) else gated(mixer, y, z))


@pytest.mark.parametrize("length", [1, 2, 13, 70])
@pytest.mark.parametrize("name", SCANS)
def test_the_mixer_is_the_sum_of_two_scans(name: str, length: int) -> None:
    """In float64, in a loop over time."""
    model = make_head(AutoModel, name)
    hidden_states = torch.randn(2, length, 16, generator=torch.Generator().manual_seed(0))
    mixer = model.layers[1].mixer
    with torch.no_grad():
        actual, _ = mixer(hidden_states, model.sequence_of(hidden_states))
        expected = mixed(mixer.double(), hidden_states.double())
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SCANS)
def test_equal_directions_have_no_preference(name: str) -> None:
    """With the parameters of `reverse` equal to the others, turned tokens give the outputs turned."""
    model = make_head(AutoModel, name)
    for block in model.layers:
        block.mixer.reverse.load_state_dict(block.mixer.state_dict(), strict=False)
    ids = draw_ids(2, LENGTH)
    with torch.no_grad():
        forward, backward = model(ids).last_hidden_state, model(ids.flip(1)).last_hidden_state
    torch.testing.assert_close(backward.flip(1), forward, rtol=0, atol=1e-5)


@pytest.mark.parametrize("arguments", INPUTS)
def test_a_token_is_seen_by_its_whole_document_and_nothing_else(name: str, arguments: dict[str, Tensor]) -> None:
    model, ids = make_head(AutoModel, name), draw_ids(1, LENGTH)
    document, real = labelled(arguments)
    with torch.no_grad():
        states = model(ids, **arguments).last_hidden_state
        for t in range(LENGTH):
            changed = ids.clone()
            changed[0, t] = ids[0, t] % (VOCAB - 1) + 1
            differs = (model(changed, **arguments).last_hidden_state != states).any(-1)[0]
            assert torch.equal(differs[real], ((document == document[t]) & real[t])[real])


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("arguments", INPUTS)
def test_the_matrices_of_both_directions_are_the_mixer(name: str, arguments: dict[str, Tensor]) -> None:
    model = make_head(AutoModel, name)
    seen: list[tuple[Tensor, Tensor]] = []
    for block in model.layers:
        block.mixer.register_forward_hook(lambda _, inputs, outputs: seen.append((inputs[0], outputs[0])))
    with torch.no_grad():
        attentions = model(draw_ids(1, LENGTH), output_attentions=True, **arguments).attentions
        sequence = make_sequence(1, LENGTH, torch.device("cpu"), **arguments)
        document, real = labelled(arguments)
        together = (document[:, None] == document) & real[:, None] & real
        for block, (inputs, outputs), matrix in zip(model.layers, seen, attentions, strict=True):
            mixer = block.mixer
            assert matrix.shape == (1, 2 * len(mixer.D), LENGTH, LENGTH) and matrix.dtype == torch.float32
            back, ahead = matrix[0].chunk(2)
            assert ((back[:, real][:, :, real] != 0) == together.tril()[real][:, real]).all()
            assert ((ahead[:, real][:, :, real] != 0) == together.triu()[real][:, real]).all()
            assert not matrix[0, :, real][:, :, ~real].any()
            actual = applied(mixer, inputs, matrix, sequence)
            torch.testing.assert_close(actual[0, real], outputs[0, real], rtol=0, atol=1e-5)


# Training


def masked(length: int = LENGTH) -> dict[str, Tensor]:
    """A batch with padding, some of its tokens masked, and these as labels."""
    ids, mask = draw_ids(3, length), torch.ones(3, length, dtype=torch.long)
    mask[0, :4] = mask[1, -5:] = 0
    hidden = (torch.rand(3, length, generator=torch.Generator().manual_seed(1)) < 0.4) & (mask == 1)
    labels = ids.masked_fill(~hidden, -100)
    return {"input_ids": ids.masked_fill(hidden, VOCAB - 1), "attention_mask": mask, "labels": labels}


def test_loss_is_the_cross_entropy_of_the_masked_tokens(name: str) -> None:
    model, batch = make_head(AutoModelForMaskedLM, name), masked()
    with torch.no_grad():
        output = model(**batch)
        expected = F.cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten())
        torch.testing.assert_close(output.loss, expected, rtol=0, atol=1e-6)
        count = (batch["labels"] >= 0).sum()
        by_items = model(**batch, num_items_in_batch=2 * count).loss
        torch.testing.assert_close(by_items, expected / 2, rtol=0, atol=1e-6)
        as_tuple = model(**batch, return_dict=False)
    assert torch.equal(as_tuple[0], output.loss) and torch.equal(as_tuple[1], output.logits)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_embeddings_are_tied_if_the_configuration_says_so(name: str, tied: bool, tmp_path: Path) -> None:
    model = make_head(AutoModelForMaskedLM, name, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    for each in (model, AutoModelForMaskedLM.from_pretrained(tmp_path)):
        assert (each.get_output_embeddings().weight is each.get_input_embeddings().weight) == tied


def test_every_parameter_is_trained(name: str) -> None:
    model = make_head(AutoModelForMaskedLM, name).train()
    model(**masked()).loss.backward()
    least = 2 * (4 if name in SCANS or name == "hybrid-encoder" else 0 if name.startswith("retnet") else 2)
    assert sum(".reverse." in key for key, _ in model.named_parameters()) >= least
    for key, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient.isfinite().all(), key
        used = gradient if gradient.dim() == 1 else gradient.flatten(1).any(-1)
        assert used.any() if key.endswith("embeddings.weight") else used.all(), key


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not-reentrant", "reentrant"])
def test_gradient_checkpointing_changes_nothing(name: str, use_reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make_head(AutoModelForMaskedLM, name).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model(**masked()).loss.backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoder", ["mamba-encoder", "mamba2-encoder", "retnet-encoder", "mixer-encoder"])
def test_it_fills_in_from_what_follows(encoder: str) -> None:
    """The first token is the last one repeated: only a model that sees ahead can tell."""
    model = make_head(AutoModelForMaskedLM, encoder).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        ids = torch.randint(1, 7, (16, 5), generator=generator)
        labels = torch.full_like(ids, -100)
        labels[:, 0] = ids[:, -1]
        ids[:, 0] = VOCAB - 1
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * math.log(6)


def test_lora_on_every_projection(name: str) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=12, target_modules="all-linear")
    model = get_peft_model(make_head(AutoModelForMaskedLM, name), config).train()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    projections = {"in_proj", "out_proj"} if name != "mixer-toeplitz-encoder" else set()
    projections |= {"up_proj", "down_proj"} if name not in SCANS else set()
    projections |= {"x_proj", "dt_proj"} if name.startswith("mamba-") else set()
    if name.startswith(("retnet", "hybrid")):
        projections = {"q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        projections |= {"in_proj", "out_proj", "x_proj", "dt_proj"} if name == "hybrid-encoder" else set()
    assert {key.split(".")[-4] for key in trained} == projections
    optimizer = torch.optim.Adam(trained.values(), lr=0.03)
    losses = []
    for _ in range(15):
        loss = model(**masked()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# Loading


OF_ITS_OWN = {
    "mamba": {"A_log", "D", "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "conv1d.weight", "conv1d.bias"},
    "mamba2": {"A_log", "D", "dt_bias", "conv1d.weight", "conv1d.bias"},
}


@pytest.mark.parametrize("family", OF_ITS_OWN)
def test_a_causal_checkpoint_loads_and_the_reverse_direction_is_new(family: str, tmp_path: Path) -> None:
    causal = make_model(family)
    causal.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model, found = AutoModelForMaskedLM.from_pretrained(tmp_path, bidirectional=True, output_loading_info=True)
    new = {f"backbone.layers.{i}.mixer.reverse.{key}" for i in range(2) for key in OF_ITS_OWN[family]}
    assert set(found["missing_keys"]) == new
    assert not found["unexpected_keys"] and not found["mismatched_keys"]
    state = model.state_dict()
    for key, value in causal.state_dict().items():
        assert torch.equal(state[key], value), key
    for block in model.backbone.layers:
        scan = block.mixer.reverse
        assert (scan.D == 1).all() and scan.conv1d.weight.any() and scan.conv1d.weight.abs().max() <= 0.5
        assert scan.A_log.min() >= 0 and scan.A_log.max() <= math.log(16)
        steps = F.softplus(scan.dt_proj.bias if family == "mamba" else scan.dt_bias)
        assert steps.min() >= 0.001 - 1e-6 and steps.max() <= 0.1 + 1e-6
        if family == "mamba":
            for projection in (scan.x_proj, scan.dt_proj):
                bound = projection.in_features**-0.5
                assert 0.8 * bound < projection.weight.abs().max() <= bound


def test_bfloat16_keeps_both_recurrences_in_float32(name: str, tmp_path: Path) -> None:
    model = make_head(AutoModelForMaskedLM, name)
    model.save_pretrained(tmp_path)
    half = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for key, parameter in half.named_parameters():
        kept = key.endswith((".A_log", ".D", ".dt_bias", ".dt_proj.bias"))
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), key
    ids = draw_ids(2, LENGTH)
    with torch.no_grad():
        difference = (half(ids).logits.float() - model(ids).logits).abs()
    assert difference.max() < 0.06 and difference.mean() < 0.01


# What there is not


def test_there_is_no_cache(name: str) -> None:
    model, ids = make_head(AutoModel, name), draw_ids(1, 3)
    assert model.config.use_cache and getattr(model(ids), CACHE_FIELD) is None
    for arguments in ({"use_cache": True}, {"past_key_values": DynamicCache(config=model.config)}):
        with pytest.raises(ValueError, match="a bidirectional model has no cache: use_cache must be False"):
            model(ids, **arguments)


def test_there_is_no_causal_language_model(name: str) -> None:
    with pytest.raises(ValueError, match="`bidirectional` must be False for a causal language model, got True"):
        AutoModelForCausalLM.from_config(make_config(name))


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_causal_model_fills_in_nothing(family: str) -> None:
    with pytest.raises(ValueError, match="`bidirectional` must be True for a masked language model, got False"):
        AutoModelForMaskedLM.from_config(make_config(family))


def test_a_family_without_the_option_refuses_it() -> None:
    """transformers keeps any keyword of a configuration: it must not pass for an encoder and then scan one way."""
    with pytest.raises(ValueError, match=r"`bidirectional` must be left out, got True: taipan has no such option"):
        FAMILIES["taipan"].backbone(make_config("taipan", bidirectional=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mixer_types": ["sliding_attention"] * 4},
            r"mixer_types\[0\] must be one of full_attention, mamba, mamba2, ",
        ),
        (
            {"full_attention": {"conv_kernel": 4}},
            "full_attention: conv_kernel must be 0 with bidirectional=True, .* got 4",
        ),
        ({"lm_head_bias": True}, "lm_head_bias must be left out with bidirectional=True, got True"),
    ],
)
def test_a_hybrid_refuses_what_reads_one_way(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        make_config("hybrid-encoder", **changes)


def test_attention_in_both_directions_is_pytorchs() -> None:
    """The matrix of a token is the softmax over its document, before the token and behind it."""
    model = make_head(AutoModel, "hybrid-encoder", mixer_types=["full_attention"] * 4)
    document, real = labelled({"attention_mask": MASK, "seq_idx": SEQ_IDX})
    together = (document[:, None] == document) & real[:, None] & real
    with torch.no_grad():
        output = model(draw_ids(1, LENGTH), attention_mask=MASK, seq_idx=SEQ_IDX, output_attentions=True)
        layout = {"attention_mask": MASK, "seq_idx": SEQ_IDX}
        mixer, sequence = model.layers[0].mixer, make_sequence(1, LENGTH, torch.device("cpu"), **layout)
        states = model.layers[0].input_layernorm(model.embeddings(draw_ids(1, LENGTH)))
        model.prepare(sequence, states)
        parts = ((mixer.q_proj, 1), (mixer.k_proj, 2))
        q, k = (mixer.to_heads(part(states), None, sequence).repeat_interleave(by, 2)[0] for part, by in parts)
        scores = torch.einsum("ihp,jhp->hij", q, k) * mixer.scaling
    expected = scores.masked_fill(~together, -torch.inf).softmax(-1)[:, real]
    torch.testing.assert_close(output.attentions[0][0][:, real], expected, rtol=0, atol=1e-5)
