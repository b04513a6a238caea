"""The initial weights: the tables in the docstrings of `init_mamba_mixer`, `init_mamba2_mixer` and
`init_discrete_mamba2_mixer`."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_zoo.modeling import (
    ZooHybridConfig,
    ZooHybridForCausalLM,
    ZooMamba2Config,
    ZooMamba2ForCausalLM,
    ZooMambaConfig,
    ZooMambaForCausalLM,
)
from ssm_zoo.modeling.discrete_mamba2 import half_life_to_bias

# Heads enough for their statistics: 128 of each kind.
MAMBA2 = {"hidden_size": 128, "head_dim": 2, "vocab_size": 200, "state_size": 4, "num_hidden_layers": 3}


def uniform(weight: Tensor, bound: float) -> None:
    """U(-bound, bound): nothing outside, the ends nearly reached, the right spread, no shift."""
    assert 0.9 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert weight.mean().abs() < 0.1 * bound


@pytest.mark.parametrize("kind", ["no-bias", "bias", "zoo_hybrid"])
def test_mamba(kind: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "vocab_size": 200, "state_size": 4, "num_hidden_layers": 3, "time_step_rank": 25}
    norms = {"mixer_rms_eps": 1e-5, "mixer_rms_weight": True}
    if kind == "zoo_hybrid":
        blocks = {"mixer_types": ["mamba"] * 3, "intermediate_size": 8, "num_attention_heads": 2}
        model = ZooHybridForCausalLM(ZooHybridConfig(**sizes, **norms, **blocks))
    else:
        model = ZooMambaForCausalLM(ZooMambaConfig(**sizes, **norms, use_bias=kind == "bias"))
    for block in model.backbone.layers:
        mixer = block.mixer
        torch.testing.assert_close(mixer.A_log.exp(), torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(256, 4))
        steps = F.softplus(mixer.dt_proj.bias)
        assert steps.min() >= 0.001 * (1 - 1e-4) and steps.max() <= 0.1 * (1 + 1e-4)
        assert steps.log().mean().item() == pytest.approx(math.log(0.01), abs=0.3)
        assert steps.log().std().item() == pytest.approx(math.log(100) / math.sqrt(12), rel=0.1)
        for ones in (mixer.D, mixer.dt_layernorm.weight, mixer.b_layernorm.weight, mixer.c_layernorm.weight):
            assert (ones == 1).all()
        uniform(mixer.dt_proj.weight, 0.2)
        uniform(mixer.in_proj.weight, 128**-0.5)
        uniform(mixer.x_proj.weight, 256**-0.5)
        uniform(mixer.conv1d.weight, 0.5)
        uniform(mixer.conv1d.bias, 0.5)
        uniform(mixer.out_proj.weight, (256 * 3) ** -0.5)
        for projection in (mixer.in_proj, mixer.out_proj):
            assert not projection.bias.any() if kind == "bias" else projection.bias is None
    assert not torch.equal(model.backbone.layers[0].mixer.dt_proj.bias, model.backbone.layers[1].mixer.dt_proj.bias)
    assert model.backbone.embeddings.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_mamba_options() -> None:
    torch.manual_seed(0)
    options = {"time_step_min": 0.5, "time_step_max": 2.0, "time_step_floor": 1.0, "initializer_range": 0.3}
    model = ZooMambaForCausalLM(ZooMambaConfig(hidden_size=128, vocab_size=200, num_hidden_layers=1, **options))
    steps = F.softplus(model.backbone.layers[0].mixer.dt_proj.bias)
    assert steps.min() >= 1 - 1e-5 and steps.max() <= 2 + 1e-5
    assert (steps < 1 + 1e-5).float().mean().item() == pytest.approx(0.5, abs=0.1)  # at the floor
    assert model.backbone.embeddings.weight.std().item() == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize("hybrid", [False, True], ids=["zoo_mamba2", "zoo_hybrid"])
def test_mamba2(hybrid: bool) -> None:
    torch.manual_seed(0)
    if hybrid:
        model = ZooHybridForCausalLM(
            ZooHybridConfig(
                hidden_size=128,
                intermediate_size=8,
                num_hidden_layers=3,
                mixer_types=["mamba2"] * 3,
                num_attention_heads=2,
                state_size=4,
                mamba_head_dim=2,
                vocab_size=200,
            )
        )
    else:
        model = ZooMamba2ForCausalLM(ZooMamba2Config(**MAMBA2, use_bias=True))
    for block in model.backbone.layers:
        mixer = block.mixer
        rates, steps = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
        assert rates.min() >= 1 and rates.max() <= 16
        assert rates.mean().item() == pytest.approx(8.5, abs=1.5)
        assert steps.min() >= 0.001 * (1 - 1e-4) and steps.max() <= 0.1 * (1 + 1e-4)
        assert steps.log().mean().item() == pytest.approx(math.log(0.01), abs=0.5)
        assert (mixer.D == 1).all() and (mixer.norm.weight == 1).all()
        uniform(mixer.in_proj.weight, 128**-0.5)
        uniform(mixer.conv1d.weight, 0.5)
        uniform(mixer.conv1d.bias, 0.5)
        uniform(mixer.out_proj.weight, (256 * 3) ** -0.5)
        for projection in (mixer.in_proj, mixer.out_proj):
            assert projection.bias is None if hybrid else not projection.bias.any()
    assert not torch.equal(model.backbone.layers[0].mixer.A_log, model.backbone.layers[1].mixer.A_log)
    assert model.backbone.embeddings.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_mamba2_options() -> None:
    torch.manual_seed(0)
    options = {"time_step_min": 0.5, "time_step_max": 2.0, "time_step_floor": 1.0, "A_init_bounds": (0.0, 0.5)}
    model = ZooMamba2ForCausalLM(ZooMamba2Config(**MAMBA2, **options, initializer_range=0.3))
    mixer = model.backbone.layers[0].mixer
    steps = F.softplus(mixer.dt_bias)
    assert steps.min() >= 1 - 1e-5 and steps.max() <= 2 + 1e-5
    assert (steps < 1 + 1e-5).float().mean().item() == pytest.approx(0.5, abs=0.2)  # at the floor
    assert mixer.A_log.isfinite().all() and mixer.A_log.exp().max() <= 0.5
    assert model.backbone.embeddings.weight.std().item() == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_discrete_mamba2(bias: bool) -> None:
    torch.manual_seed(0)
    config = ZooHybridConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        mixer_types=["discrete_mamba2", "full_attention"],
        num_attention_heads=5,
        head_dim=8,
        vocab_size=500,
        attention_bias=bias,
        initializer_range=0.05,
    )
    model = ZooHybridForCausalLM(config)
    mixer = model.backbone.layers[0].mixer
    x = torch.randn(2, 7, mixer.split[0])
    with torch.no_grad():
        assert torch.equal(mixer.conv1d(x)[0], x)  # the convolution is the identity
        gate_rows = mixer.in_proj.weight[mixer.split[0] : mixer.split[0] + mixer.split[1]]
        assert not gate_rows.any()
        torch.testing.assert_close(F.silu(mixer.z_bias), torch.ones(40))
        half_lives = math.log(0.5) / -F.softplus(mixer.dt_bias)
        torch.testing.assert_close(half_lives, torch.tensor([4.0, 8.0, 16.0, 32.0, 64.0]))
    assert (mixer.D == 1).all()
    others = torch.cat([mixer.in_proj.weight[: mixer.split[0]], mixer.in_proj.weight[-5:]])
    weights = [others, mixer.out_proj.weight, model.backbone.embeddings.weight, model.lm_head.weight]
    weights += [parameter for parameter in model.backbone.layers[1].parameters() if parameter.dim() == 2]
    for weight in weights:
        assert weight.std().item() == pytest.approx(0.05, rel=0.1)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias"):
            assert not parameter.any(), name
    assert (mixer.in_proj.bias is not None) == bias


def test_the_convolution_of_attention() -> None:
    """Its mixer has no parameters of its own, over which transformers would pass."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = ZooHybridForCausalLM(ZooHybridConfig(**sizes, vocab_size=50, full_attention={"conv_kernel": 4}))
    for parameter in model.backbone.layers[0].mixer.conv1d.parameters():
        uniform(parameter, 0.5)


def test_half_life_to_bias() -> None:
    """A head that sees no decay input halves its state within its half-life, however long."""
    half_lives = torch.tensor([0.5, 1.0, 7.0, 1e3, 1e6], dtype=torch.float64)
    decays = (-F.softplus(half_life_to_bias(half_lives))).exp()
    torch.testing.assert_close(decays**half_lives, torch.full((5,), 0.5, dtype=torch.float64))
