"""Linear attention beyond a softmax window against its definition, token by token."""

from typing import Any

import pytest
import torch
from families import make_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssm_zoo.modeling.linear_attention import LinearAttention
from ssm_zoo.modeling.modeling_hybrid import ZooHybridConfig, ZooHybridModel
from ssm_zoo.modeling.token_layout import make_sequence


def make(window: int = 4, **changes: Any) -> ZooHybridModel:
    """A model of one block in float64, with a random map of features and random factors."""
    sizes = {"vocab_size": 11, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    settings = {"sliding_window": window, "feature_size": 5}
    config = ZooHybridConfig(
        **sizes, num_key_value_heads=2, mixer_types=["linear_attention"], linear_attention=settings, **changes
    )
    torch.manual_seed(3)
    model = ZooHybridModel(config).double().eval()
    mixer = mixer_of(model)
    with torch.no_grad():
        for weight in (mixer.q_features, mixer.k_features, mixer.window_factors):
            weight.normal_()
        for projection in (mixer.q_proj, mixer.k_proj):
            projection.weight.normal_()
    return model


def mixer_of(model: Any) -> LinearAttention:
    mixer = model.layers[0].mixer
    assert isinstance(mixer, LinearAttention)
    return mixer


def definition(mixer: LinearAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """LoLCATs' sums for (L, H, P) queries and (L, G, P) keys and values of a document, by loops."""
    outputs = torch.zeros_like(q)

    def features(x: Tensor, weight: Tensor) -> Tensor:
        mapped = weight.T @ x
        positive, negative = mapped.exp() / mapped.exp().sum(), (-mapped).exp() / (-mapped).exp().sum()
        return torch.cat([positive, negative])

    for head in range(mixer.num_heads):
        group = head // mixer.num_key_value_groups
        for n in range(len(q)):
            near = range(max(n - mixer.window + 1, 0), n + 1)
            scores = torch.stack([q[n, head] @ k[i, group] * mixer.scaling for i in near])
            factor = 1 / (1 + (-mixer.window_factors[head]).exp())
            weights = factor * (scores - scores.max()).exp()
            query = features(q[n, head], mixer.q_features[head])
            far = [query @ features(k[i, group], mixer.k_features[head]) for i in range(near[0])]
            every = torch.cat([torch.stack(far), weights]) if far else weights
            outputs[n, head] = (every[:, None] * v[: n + 1, group]).sum(0) / every.sum()
    return outputs


def applied(model: Any, hidden: Tensor, seq_idx: Tensor | None = None, **mask: Tensor) -> Tensor:
    sequence = make_sequence(*hidden.shape[:2], hidden.device, seq_idx=seq_idx, **mask)
    model.prepare(sequence, hidden)
    return mixer_of(model)(hidden, sequence)[0]


def expected(model: Any, hidden: Tensor) -> Tensor:
    """The outputs for a document (L, D)."""
    mixer, sequence = mixer_of(model), model.sequence_of(hidden[None])
    q = mixer.to_heads(mixer.q_proj(hidden[None]), None, sequence)[0]
    k = mixer.to_heads(mixer.k_proj(hidden[None]), None, sequence)[0]
    v = mixer.v_proj(hidden).unflatten(-1, (mixer.num_kv_heads, -1))
    return mixer.o_proj(definition(mixer, q, k, v).flatten(1))


@pytest.mark.parametrize("length", [1, 4, 5, 13, 150])
def test_outputs_are_those_of_the_definition(length: int) -> None:
    """Also in blocks: 150 tokens are three of them."""
    model = make()
    hidden = torch.randn(1, length, 24, dtype=torch.float64)
    torch.testing.assert_close(applied(model, hidden)[0], expected(model, hidden[0]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [11, 200])
def test_padding_anywhere_takes_no_room_in_the_window(length: int) -> None:
    """Rows with holes, and NaN in them, against their tokens alone; 200 columns are four blocks."""
    model = make()
    torch.manual_seed(1)
    real = torch.rand(2, length) < 0.6
    hidden = torch.randn(2, length, 24, dtype=torch.float64)
    poisoned = hidden.masked_fill(~real[..., None], float("nan")).requires_grad_()
    found = applied(model, poisoned, attention_mask=real.long())
    for row in range(2):
        alone = applied(model, hidden[row, real[row]][None])[0]
        torch.testing.assert_close(found[row, real[row]], alone, rtol=1e-9, atol=1e-9)
    found[real].sum().backward()
    assert poisoned.grad is not None and poisoned.grad.isfinite().all()
    assert poisoned.grad[~real].abs().max() == 0


@pytest.mark.parametrize("lengths", [[3, 1, 7], [90, 2, 70, 38]])
def test_packed_documents_do_not_see_each_other(lengths: list[int]) -> None:
    model = make()
    hidden = torch.randn(1, sum(lengths), 24, dtype=torch.float64)
    seq_idx = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    found = applied(model, hidden, seq_idx=seq_idx)[0].split(lengths)
    for part, document in zip(found, hidden[0].split(lengths), strict=True):
        torch.testing.assert_close(part, applied(model, document[None])[0], rtol=1e-9, atol=1e-9)


def test_gradients_are_those_of_the_definition() -> None:
    model = make()
    mixer = mixer_of(model)
    names = ["hidden", "q_features", "k_features", "window_factors", "q_proj", "v_proj"]
    gradients: list[list[Tensor]] = []
    hidden = torch.randn(1, 13, 24, dtype=torch.float64, requires_grad=True)
    leaves = [
        hidden,
        mixer.q_features,
        mixer.k_features,
        mixer.window_factors,
        mixer.q_proj.weight,
        mixer.v_proj.weight,
    ]
    cotangent = torch.randn(13, 24, dtype=torch.float64)
    for output in (applied(model, hidden)[0], expected(model, hidden[0])):
        gradients.append(list(torch.autograd.grad((output * cotangent).sum(), leaves)))
    for name, mine, its in zip(names, *gradients, strict=True):
        assert its.abs().max() > 1e-6, name
        torch.testing.assert_close(mine, its, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_a_window_that_holds_everything_is_softmax_attention() -> None:
    """In float32, where the two sums over the features cancel, also after many tokens."""
    model = make(window=300).float()
    sizes = {"vocab_size": 11, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    full = ZooHybridModel(ZooHybridConfig(**sizes, num_key_value_heads=2, mixer_types=["full_attention"]))
    left = full.load_state_dict(model.state_dict(), strict=False)
    assert not left.missing_keys and len(left.unexpected_keys) == 3
    ids = torch.randint(11, (1, 300))
    with torch.no_grad():
        found, wanted = model(ids).last_hidden_state, full.eval()(ids).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)


def test_a_small_factor_of_the_window_costs_no_precision() -> None:
    """Where all tokens are in the window, their weights are as small as the factor, and there are no others."""
    model = make(window=8)
    with torch.no_grad():
        mixer_of(model).window_factors.fill_(-12)
        ids = torch.randint(11, (1, 20))
        exact = model(ids).last_hidden_state
        found = model.float()(ids).last_hidden_state
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


def test_a_compiled_graph_keeps_restarting_positions_apart() -> None:
    model, ids = make(), torch.randint(11, (1, 150))
    positions = torch.cat([torch.arange(n) for n in (70, 3, 77)])[None]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(ids, position_ids=positions).last_hidden_state
        expected = model(ids, position_ids=positions).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_no_two_channels_of_a_feature_map_start_alike() -> None:
    for size in (5, 6, 10):
        sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 11}
        settings = {"feature_size": size}
        config = ZooHybridConfig(**sizes, mixer_types=["linear_attention"], linear_attention=settings)
        weight = mixer_of(ZooHybridModel(config)).q_features
        distances = torch.cdist(weight.mT, weight.mT) + 9 * torch.eye(size)
        assert weight.shape == (4, 6, size) and distances.min() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_sums_in_float32(dtype: torch.dtype) -> None:
    model = make().float()
    ids = torch.randint(11, (1, 130))
    with torch.no_grad():
        exact = model(ids).last_hidden_state
        found = model.to(dtype)(ids, use_cache=True)
    assert found.past_key_values.layers[0].recurrent_state.dtype == torch.float32
    error = (found.last_hidden_state.float() - exact).norm() / exact.norm()
    assert error < (0.03 if dtype == torch.bfloat16 else 0.004)


def test_the_memory_of_blocks_grows_linearly() -> None:
    """Scores of 4 heads of 4,096 tokens with all others would take 256 MiB in float32."""
    model = make(window=16).float()
    hidden = torch.randn(1, 4096, 24)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            output = function(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, tuple | list) else [output]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return output

    with torch.no_grad(), Watch():
        applied(model, hidden)
    assert 2**20 < largest < 16 * 2**20


def test_settings_that_make_no_sense_are_refused() -> None:
    for name in ("sliding_window", "feature_size"):
        with pytest.raises(Exception, match=f"linear_attention: {name} must be at least 1, got 0"):
            make_model("linear-attention", linear_attention={name: 0})
