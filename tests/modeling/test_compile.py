"""torch.compile of every family: one graph for all lengths and masks, with eager's numbers and gradients."""

from typing import Any

import pytest
import torch
import torch._inductor.config
import transformers
from families import ENCODERS, FAMILIES, draw_ids, make_head, make_model
from sweeps import SWEEP
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import AutoModel, CompileConfig
from transformers.cache_utils import DynamicCache
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from ssm_zoo.kernels import selective_scan, ssd
from ssm_zoo.modeling.heads import logger

# One of each kind of layer; the others are slow tests, being many.
QUICK = ["mamba", "mamba2", "sliding-discrete", "jamba", "convolved-attention", "taipan", "mixer", "mixer-series"]
QUICK += ["hybrid-mixers", "mamba2-encoder", "mixer-encoder"]


# Every head of every family takes many minutes: on request only (`make test-sweeps`).


def some(quick: list[Any], every: list[Any], *others: pytest.MarkDecorator) -> list[Any]:
    """All cases, of which the quick ones run among the fast tests; the others have more marks."""
    assert set(quick) <= set(every)
    cases = [each if isinstance(each, tuple) else (each,) for each in every]
    return [
        pytest.param(*case, marks=[] if each in quick else [pytest.mark.slow, *others])
        for case, each in zip(cases, every, strict=True)
    ]


ALL = some(QUICK, [*FAMILIES, *ENCODERS])


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def build(name: str) -> Any:
    """A tiny model in float64: in float32 sums in another order differ by more than 1e-5 in some gradients."""
    model = make_head(AutoModel, name) if name in ENCODERS else make_model(name)
    return model.double()


def padded(length: int, side: str) -> dict[str, Any]:
    """Two rows, of which one is padded; on no side both are whole, and with "absent" there is no mask."""
    inputs = {"input_ids": draw_ids(2, length, seed=length), "use_cache": False}
    if side == "absent":
        return inputs
    mask = torch.ones_like(inputs["input_ids"])
    mask[:1, : 4 if side == "left" else 0] = 0
    mask[1:, length - (3 if side == "right" else 0) :] = 0
    return inputs | {"attention_mask": mask}


def outputs(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """What the model computes at real tokens."""
    found = model(**inputs)
    states = found.logits if "logits" in found else found.last_hidden_state
    mask = inputs.get("attention_mask")
    return states if mask is None else states[mask.bool()]


def gate_buffers(model: Any) -> dict[str, torch.Tensor]:
    """The buffers that a gate's threshold changes in training."""
    moved = ("threshold", "correction", "stride", "passes")
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith(moved)}


def start_again(model: Any) -> None:
    """A step does not depend on those before: no gradients, gates as at first, and the noise that they draw."""
    model.zero_grad()
    for buffer in gate_buffers(model).values():
        buffer.zero_()
    torch.manual_seed(0)


def trained(call: Any, model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Outputs and gradients of one step, and what it moved."""
    start_again(model)
    y = outputs(call, inputs)
    y.square().sum().backward()
    moved = {name: buffer.clone() for name, buffer in gate_buffers(model).items()}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"outputs": y.detach()} | gradients | moved


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def check_training(name: str, backend: str, cases: tuple[tuple[int, str], ...]) -> None:
    model = build(name).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for length, side in cases:
        inputs = padded(length, side)
        assert_same(trained(compiled, model, inputs), trained(model, model, inputs))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", ALL)
def test_one_graph_serves_lengths_and_padding_and_has_the_gradients_of_eager(name: str) -> None:
    check_training(name, "eager", ((9, "left"), (12, "right"), (14, "none")))


MASKLESS = ["mamba", "mamba2-full", "sliding-discrete", "taipan", "mixer"]


@pytest.mark.parametrize("name", some(MASKLESS, [*FAMILIES, *ENCODERS], SWEEP))
def test_without_a_mask_one_graph_serves_all_lengths(name: str) -> None:
    check_training(name, "eager", ((9, "absent"), (12, "absent"), (14, "absent")))


@pytest.mark.parametrize(
    "name", [pytest.param("taipan", marks=pytest.mark.slow), *some([], ["mamba", "mamba2", "mamba2-encoder"], SWEEP)]
)
def test_the_compiled_backward_has_the_gradients_of_eager(name: str) -> None:
    check_training(name, "aot_eager", ((9, "left"), (12, "right")))


@SWEEP
def test_inductor_has_the_gradients_of_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # no pool of processes
    check_training("mamba2", "inductor", ((9, "left"), (12, "right")))


def heads() -> list[tuple[str, str]]:
    """Every family with each of its heads, by the name of the Auto class."""
    cases = []
    for name in [*FAMILIES, *ENCODERS]:
        absent = {"AutoModel", "AutoModelForCausalLM" if name in ENCODERS else "AutoModelForMaskedLM"}
        autos = (FAMILIES | ENCODERS)[name].backbone.auto_classes
        cases += [(auto.removeprefix("AutoModelFor"), name) for auto in autos if auto not in absent]
    return cases


LABELLED = [("SequenceClassification", name) for name in ("mamba2", "taipan", "mixer", "jamba")]
LABELLED += [("TokenClassification", name) for name in ("mamba2", "taipan", "mixer", "jamba")]
LABELLED += [("MaskedLM", "mamba-encoder"), ("MaskedLM", "mixer-encoder"), ("CausalLM", "mamba2")]


@pytest.mark.parametrize(("head", "name"), some(LABELLED, heads(), SWEEP))
def test_heads_with_labels_compile(head: str, name: str) -> None:
    check_head(head, name, ((9, "left"), (12, "right"), (14, "none")))


@pytest.mark.slow
@pytest.mark.parametrize(("head", "name"), heads())
def test_heads_with_labels_compile_without_a_mask(head: str, name: str) -> None:
    check_head(head, name, ((9, "absent"), (12, "absent")))


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_other_labels_of_rows_compile(problem: str) -> None:
    check_head("SequenceClassification", "mamba2", ((9, "left"), (12, "right")), problem)


def check_head(
    head: str, name: str, cases: tuple[tuple[int, str], ...], problem: str = "single_label_classification"
) -> None:
    model = make_head(getattr(transformers, f"AutoModelFor{head}"), name).double().train()
    # Left open, transformers' loss writes it at its first call, and the second one is compiled anew.
    model.config.problem_type = problem
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for length, side in cases:
        inputs = padded(length, side)
        labels = inputs["input_ids"] if head in ("CausalLM", "MaskedLM") else inputs["input_ids"] % 2
        if head == "SequenceClassification":
            labels = labels[:, -1] if problem.startswith("single") else labels[:, :2].double()
        results = []
        for call in (compiled, model):
            start_again(model)
            loss = call(**inputs, labels=labels).loss
            loss.backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            results.append({"loss": loss.detach()} | gradients)
        assert_same(*results)
    assert counter.frame_count == 1


STEPPED = ["mamba", "mamba2", "sliding-discrete", "mamba2-full", "convolved-attention", "taipan", "mixer"]


@pytest.mark.parametrize("name", STEPPED)
def test_a_compiled_prompt_makes_a_cache_and_compiled_steps_go_on_from_it(name: str) -> None:
    model = build(name).eval()
    prompt = padded(9, "left")
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        found, expected = compiled(ids, attention_mask=mask), model(ids, attention_mask=mask)
        torch.testing.assert_close(found.logits[mask.bool()], expected.logits[mask.bool()], rtol=1e-5, atol=1e-5)
        mine, theirs = DynamicCache(config=model.config), DynamicCache(config=model.config)
        for cache in (mine, theirs):
            model(ids, attention_mask=mask, past_key_values=cache)
        counter.frame_count = 0
        for step in range(4):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            token = draw_ids(2, 1, seed=step)
            found = compiled(token, attention_mask=mask, past_key_values=mine).logits
            expected = model(token, attention_mask=mask, past_key_values=theirs).logits
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2  # the count of columns is a constant of the first, and a variable from then on


SCANS = {"selective_scan": selective_scan, "ssd": ssd, "ssd with row sums": ssd}


def scan_arguments(name: str) -> tuple[Any, ...]:
    """Small float64 arguments of a scan that need gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    if name == "selective_scan":
        x, dt, A = draw(2, 5, 4), draw(2, 5, 4), (-draw(4, 3).detach().exp()).requires_grad_()
        maps = draw(2, 5, 1, 3), draw(2, 5, 1, 3)
        return x, dt, A, *maps, draw(4), draw(2, 5, 4), draw(4), draw(2, 4, 3), True, None, None, True
    log_decay = (-draw(2, 5, 2).detach().exp()).requires_grad_()
    maps = draw(2, 5, 1, 3), draw(2, 5, 1, 3)
    x, z = draw(2, 5, 2, 4), draw(2, 5, 2, 4)
    if name == "ssd":
        return x, draw(2, 5, 2), log_decay, *maps, draw(2, 4), z, draw(2, 2, 4, 3), 2, False
    return x, None, log_decay, *maps, draw(2, 5), z, draw(2, 2, 5, 3), 2, True  # skip and state with another row


@pytest.mark.parametrize("name", SCANS)
def test_the_scans_are_operators_by_torchs_rules(name: str) -> None:
    torch.library.opcheck(SCANS[name]._traced_scan, scan_arguments(name))


@pytest.mark.usefixtures("modules_cache")
def test_exported_copies_of_the_code_and_the_package_compile_in_one_process(tmp_path: Any) -> None:
    models = [make_model("mamba2").double()]
    for name in ("first_copy", "second_copy"):
        make_model("mamba2").save_pretrained(tmp_path / name)
        kind = get_class_from_dynamic_module("modeling_mamba2.ZooMamba2ForCausalLM", str(tmp_path / name))
        models.append(kind.from_pretrained(tmp_path / name).double().eval())
    assert len({type(model).__module__ for model in models}) == 3
    inputs = padded(9, "left")
    with torch.no_grad():
        expected = outputs(models[0], inputs)
        for model in models[::-1]:
            found = outputs(torch.compile(model, fullgraph=True, backend="eager"), inputs)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mamba2", "mamba2-full"])
def test_generate_with_a_static_cache_needs_no_compiling_and_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(logger, "warning_once", said.append)
    model = make_model(name)
    ids = draw_ids(2, 6)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **settings)
    found = model.generate(ids, cache_implementation="static", compile_config=CompileConfig(), **settings)
    assert torch.equal(found, expected)
    assert said and all("`compile_config` has no effect" in text for text in said)
