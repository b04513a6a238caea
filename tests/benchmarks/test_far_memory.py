"""The simulation of far_memory.py: by the recipe's rule it computes what the model computes, and its fits are right."""

import pytest
import torch
from far_memory import Fits, Layer, Simulation, attention_to_come, gate_inputs
from teachers import trained_teacher

from ssm_zoo.distill.recipe import StudentSpec
from ssm_zoo.distill.student import build_student, set_slots
from ssm_zoo.distill.teacher import Teacher
from ssm_zoo.modeling import ZooHybridForCausalLM


@pytest.fixture(scope="module")
def student() -> ZooHybridForCausalLM:
    """A student whose heads have different numbers of slots and decays, all smaller than a text."""
    teacher = Teacher(trained_teacher())
    spec = StudentSpec(mixer="bounded_attention", window=8, chunk_size=4, sinks=1, rows=12, kv_dtype="int8")
    layers = list(range(teacher.num_layers))
    student = build_student(teacher, spec, layers)
    heads = int(student.config.num_key_value_heads or 0)
    slots = [[3 + layer + 2 * head for head in range(heads)] for layer in layers]
    set_slots(student, slots, [[1.0 if head % 2 else 0.9 for head in range(heads)] for _ in layers])
    return student


def texts(student: ZooHybridForCausalLM) -> torch.Tensor:
    return torch.randint(student.config.vocab_size, (2, 45), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(student: ZooHybridForCausalLM, simulation: Simulation) -> torch.Tensor:
    with simulation.installed():
        return student(input_ids=texts(student), use_cache=False).logits


@torch.no_grad()
def test_the_recipes_rule_computes_what_the_model_computes(student: ZooHybridForCausalLM) -> None:
    expected = student(input_ids=texts(student), use_cache=False).logits
    torch.testing.assert_close(logits(student, Simulation("received", {})), expected, rtol=1e-4, atol=1e-4)
    # A far state without weight, and a guess without weight, leave the rule as it is.
    heads = student.config.num_attention_heads
    none = {layer: Layer(gains=torch.zeros(heads)) for layer in range(student.config.num_hidden_layers)}
    torch.testing.assert_close(logits(student, Simulation("far", none)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ["peak", "pooled", "oracle", "far", "far-mean"])
def test_other_rules_compute_something_else(student: ZooHybridForCausalLM, rule: str) -> None:
    heads = student.config.num_attention_heads
    some = {layer: Layer(gains=torch.full((heads,), 0.5)) for layer in range(student.config.num_hidden_layers)}
    found, recipe = logits(student, Simulation(rule, some)), logits(student, Simulation("received", {}))
    assert found.isfinite().all()
    assert (found - recipe).abs().max() > 1e-3


def test_attention_to_come_is_a_sum_over_later_chunks() -> None:
    queries, keys = torch.randn(2, 3, 10, 4), torch.randn(2, 10, 4)
    scores = (queries @ keys[:, None].mT).masked_fill(torch.ones(10, 10).triu(1).bool(), -torch.inf).softmax(-1)
    found = attention_to_come(queries, keys, 4)
    assert found.shape == (2, 3, 10)
    for chunk in range(3):
        torch.testing.assert_close(found[:, chunk], scores[:, :, 4 * (chunk + 1) :].sum((1, 2)))


def test_gates_guess_the_attention_to_come_better_than_its_mean(student: ZooHybridForCausalLM) -> None:
    ids = torch.randint(student.config.vocab_size, (1, 600), generator=torch.Generator().manual_seed(1))
    fits, seen = Fits(), []

    def watch(mixer: object, hidden: torch.Tensor, *rest: torch.Tensor) -> None:
        fits.watch(mixer, hidden, *rest)
        seen.append(hidden)

    with Simulation("received", {}, watch).installed(), torch.no_grad():
        student(input_ids=ids, use_cache=False)
    fitted = fits.solve()
    heads = int(student.config.num_key_value_heads or 0)
    for layer, hidden in enumerate(seen):
        gates = fitted[layer].gates["gate"]
        assert gates.shape == (heads, hidden.shape[1] + 1)
        guesses = gate_inputs(hidden, None)[: 600 - 256] @ gates.T
        for head in range(heads):
            square, right = fits.gates["gate", layer, head]
            weight = gates[head].double()
            target = fits.targets["gate", layer, head]
            error = target - 2 * weight @ right + weight @ square @ weight
            mean = square.diagonal()[-1]  # of the constant 1: the number of tokens
            assert error < 0.9 * (target - right[-1] ** 2 / mean)
            assert guesses[:, head].std() > 0
