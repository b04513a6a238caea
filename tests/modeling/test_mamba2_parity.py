"""zoo_mamba2 against transformers' Mamba-2 with the same random weights, which load under the same names."""

import inspect
import math
from typing import Any

import pytest
import torch
from families import draw_ids, perturb
from parity import check_gradients, check_left_padded_batch, check_logits
from transformers import Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from ssm_zoo.modeling import ZooMamba2Config, ZooMamba2ForCausalLM

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "state_size": 16,
    "expand": 2,
    "head_dim": 8,
    "num_heads": 8,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# Releases before that argument took the mean square over all groups at once, which the published models do not.
grouped = pytest.mark.skipif(
    "group_size" not in inspect.signature(MambaRMSNormGated.__init__).parameters,
    reason="this release of transformers does not know the groups of the gated norm",
)
VARIANTS = [
    pytest.param({"n_groups": 1}, id="one-group"),
    pytest.param({"n_groups": 4}, id="four-groups", marks=grouped),
    pytest.param(
        {
            "n_groups": 2,
            "use_bias": True,
            "use_conv_bias": False,
            "conv_kernel": 3,
            "time_step_limit": (0.01, 0.5),
            "tie_word_embeddings": True,
            "residual_in_fp32": False,
            "layer_norm_epsilon": 1e-3,
        },
        id="every-option",
        marks=grouped,
    ),
]


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """transformers' model and ours."""
    options = {"tie_word_embeddings": False} | request.param
    torch.manual_seed(0)
    theirs = Mamba2ForCausalLM(Mamba2Config(**SIZES, **options)).eval()
    perturb(theirs)
    ours = ZooMamba2ForCausalLM(ZooMamba2Config(**SIZES, **options)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("length", [1, 3, 37])
def test_logits(pair: tuple[Any, Any], length: int) -> None:
    check_logits(pair, length)


def test_logits_of_a_left_padded_batch(pair: tuple[Any, Any]) -> None:
    check_left_padded_batch(pair)


def test_greedy_tokens(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    ids, mask = draw_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    if not theirs.config.use_bias:
        mask[0, :4] = 0
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
    # transformers' step of a single token leaves time_step_limit out; its whole forward does not.
    unlimited = theirs.config.time_step_limit == (0.0, math.inf)
    expected = theirs.generate(ids, use_cache=unlimited, **settings)
    assert torch.equal(ours.generate(ids, **settings), expected)
    assert len(expected[:, 9:].unique()) > 2


def test_gradients_of_the_loss(pair: tuple[Any, Any]) -> None:
    for name, gradient in check_gradients(pair).items():
        assert gradient.any(), name
