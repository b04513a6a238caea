"""Packed rows of transformers' own models on our ops: documents are kept apart, however they are described."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from native_configurations import VOCABULARY, cache_name, tiny_native
from torch import Tensor
from transformers import DataCollatorWithFlattening, PreTrainedModel
from transformers.integrations import flash_attention as transformers_flash

from ssm_zoo.modeling import native_packing
from ssm_zoo.modeling.native_models import MODEL_TYPES, accelerate_transformers

TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
LENGTHS = [2, 6, 1, 5]


@pytest.fixture(scope="module")
def models() -> Callable[[str], PreTrainedModel]:
    made: dict[str, PreTrainedModel] = {}

    def get(model_type: str) -> PreTrainedModel:
        if model_type not in made:
            made[model_type] = tiny_native(model_type)
        return made[model_type]

    return get


@pytest.fixture(scope="module")
def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


@pytest.fixture(scope="module")
def described(documents: list[Tensor]) -> dict[str, Any]:
    """Return all descriptions of the packed row that transformers' collator makes."""
    options = {"return_flash_attn_kwargs": True, "return_seq_idx": True}
    batch = DataCollatorWithFlattening(return_tensors="pt", **options)([{"input_ids": each} for each in documents])
    assert {"position_ids", "seq_idx", "cu_seq_lens_q"} <= batch.keys()
    return {key: value for key, value in batch.items() if key != "labels"}


def gradients(model: PreTrainedModel, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Return the (L, V) logits of a run and the gradients of all parameters."""
    model.zero_grad()
    logits = run()
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * cotangent).mean().backward()
    return {
        "logits": logits.detach(),
        **{name: each.grad for name, each in model.named_parameters() if each.grad is not None},
    }


def flash_by_bounds(
    q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, softmax_scale: float | None = None, **options: Any
) -> Tensor:
    """Compute causal attention over (B, L, H, P) tensors as flash attention does, given the bounds of documents."""
    bounds, longest = options["cu_seq_lens_q"], options["max_length_q"]
    assert attention_mask is None and options["is_causal"]
    assert bounds.dtype == torch.int32 and bounds[0] == 0 and torch.equal(bounds, options["cu_seq_lens_k"])
    sizes = bounds.diff().tolist()
    assert sum(sizes) == q.shape[0] * q.shape[1] and longest == options["max_length_k"] == max(sizes)
    attend, parts = torch.nn.functional.scaled_dot_product_attention, []
    for part in zip(*(each.flatten(0, 1).transpose(0, 1).split(sizes, dim=1) for each in (q, k, v)), strict=True):
        parts.append(attend(*(each[None] for each in part), is_causal=True, scale=softmax_scale, enable_gqa=True)[0])
    return torch.cat(parts, dim=1).transpose(0, 1).view(q.shape)


@pytest.fixture
def flash_attention(monkeypatch: pytest.MonkeyPatch) -> Callable[[PreTrainedModel], None]:
    """Let transformers' interface to flash attention, which needs a GPU, call the function above."""
    monkeypatch.setattr(transformers_flash, "_flash_attention_forward", flash_by_bounds)
    return lambda model: monkeypatch.setattr(model.config, "_attn_implementation", "flash_attention_2")


HYBRIDS = [each for each in MODEL_TYPES if each not in ("mamba", "mamba2", "falcon_mamba")]


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_flash_attention_keeps_documents_apart_in_one_row_and_in_several(
    model_type: str,
    models: Callable[[str], PreTrainedModel],
    described: dict[str, Any],
    flash_attention: Callable[[PreTrainedModel], None],
) -> None:
    model, row = models(model_type).eval(), described["input_ids"]
    seq_idx = torch.cat([described["seq_idx"], torch.tensor([[-1] + [0] * 5 + [4] * 6 + [70_000] * 2])])
    rows = {"input_ids": row.repeat(2, 1), "seq_idx": seq_idx}
    single = [{"input_ids": row, name: described[name]} for name in ("position_ids", "cu_seq_lens_q")]
    with accelerate_transformers([model_type]), torch.no_grad():
        expected = [model(**given).logits for given in (rows, *single)]
        flash_attention(model)
        found = [model(**given).logits for given in (rows, *single)]
    torch.testing.assert_close(found[0][seq_idx >= 0], expected[0][seq_idx >= 0], **TOLERANCE)
    torch.testing.assert_close(found[1:], expected[1:], **TOLERANCE)


FORMS = [("seq_idx",), ("cu_seq_lens_q",), ("position_ids",), ("position_ids", "seq_idx", "cu_seq_lens_q")]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_packed_documents_have_the_values_and_gradients_of_separate_ones(
    model_type: str,
    models: Callable[[str], PreTrainedModel],
    documents: list[Tensor],
    described: dict[str, Any],
) -> None:
    model = models(model_type).train()
    with accelerate_transformers([model_type]):
        separate = gradients(
            model, lambda: torch.cat([model(each[None], use_cache=False).logits[0] for each in documents])
        )
        for form in FORMS:
            given = {name: described[name] for name in ("input_ids", *form)}
            packed = gradients(model, lambda given=given: model(**given).logits[0])
            torch.testing.assert_close(packed, separate, **TOLERANCE, msg=lambda text, form=form: f"{form}: {text}")
        with torch.no_grad():  # a mask of ones separates too
            ones = torch.ones_like(described["input_ids"])
            for name in ("position_ids", "seq_idx"):
                given = {"input_ids": described["input_ids"], "attention_mask": ones, name: described[name]}
                torch.testing.assert_close(model.eval()(**given).logits[0], separate["logits"], **TOLERANCE)


@pytest.mark.parametrize("model_type", ["mamba", "jamba", "bamba"])
def test_documents_stay_apart_where_checkpointing_runs_the_layers_again(
    model_type: str, models: Callable[[str], PreTrainedModel], described: dict[str, Any]
) -> None:
    model, given = models(model_type).train(), {name: described[name] for name in ("input_ids", "position_ids")}
    with accelerate_transformers([model_type]):
        plain = gradients(model, lambda: model(**given).logits[0])
        model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            again = gradients(model, lambda: model(**given).logits[0])
        finally:
            model.gradient_checkpointing_disable()
    torch.testing.assert_close(again, plain, **TOLERANCE)


@pytest.mark.parametrize("model_type", ["mamba", "zamba2"])
def test_padding_inside_and_around_packed_documents_is_passed_over(
    model_type: str, models: Callable[[str], PreTrainedModel], documents: list[Tensor]
) -> None:
    model = models(model_type)
    seq_idx = torch.tensor([[-1, 0, 0, 1, 1, 1, 1, 1, 1, -1, -1, 2, -1]])
    row = torch.full_like(seq_idx, 5)
    row[seq_idx >= 0] = torch.cat(documents[:3])
    with accelerate_transformers([model_type]), torch.no_grad():
        found = model(row, seq_idx=seq_idx).logits[seq_idx >= 0]
        expected = torch.cat([model(each[None], use_cache=False).logits[0] for each in documents[:3]])
        torch.testing.assert_close(found, expected, **TOLERANCE)
        if model_type == "mamba":  # without attention, the same by a mask, with documents by position
            mask = (seq_idx >= 0).long()
            positions = torch.tensor([[7, 0, 1, 0, 1, 2, 3, 4, 5, 9, 9, 0, 3]])
            found = model(row, attention_mask=mask, position_ids=positions).logits[seq_idx >= 0]
            torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_rows_of_one_document_may_be_described_too(model_type: str, models: Callable[[str], PreTrainedModel]) -> None:
    model, row = models(model_type).eval(), ROW
    with accelerate_transformers([model_type]), torch.no_grad():
        for rows in (row, row[:, :1]):
            expected = model(rows).logits
            for given in ({"seq_idx": torch.full_like(rows, 3)}, {"cu_seq_lens_q": torch.tensor([0, rows.shape[1]])}):
                torch.testing.assert_close(model(rows, **given).logits, expected, **TOLERANCE)


def test_documents_may_have_any_numbers(models: Callable[[str], PreTrainedModel], described: dict[str, Any]) -> None:
    model, row = models("mamba").eval(), described["input_ids"]
    far = described["seq_idx"] * 1_000_000 + 40_000
    with accelerate_transformers(["mamba"]), torch.no_grad():
        expected = model(row, seq_idx=described["seq_idx"]).logits
        assert torch.equal(model(row, seq_idx=far).logits, expected)
        with pytest.raises(ValueError, match="seq_idx must hold at most 32767 documents in a row, got 32768"):
            model(torch.full((1, 32768), 3), seq_idx=torch.arange(32768)[None])


def test_positions_of_padded_batches_are_no_documents(models: Callable[[str], PreTrainedModel]) -> None:
    """As `generate` counts them: 1 for padding, then 0, 1, 2, ..."""
    model, mask = models("bamba"), torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    rows = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(3))
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        expected = model(rows, attention_mask=mask, position_ids=positions)
        with accelerate_transformers(["bamba"]):
            found = model(rows, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(found.logits[mask == 1], expected.logits[mask == 1], **TOLERANCE)
    assert found[cache_name(model)] is not None


@pytest.mark.parametrize("model_type", ["bamba", "mamba"])
def test_positions_that_count_padding_inside_a_text_are_no_documents(
    model_type: str, models: Callable[[str], PreTrainedModel]
) -> None:
    model, mask = models(model_type).eval(), torch.tensor([[1, 1, 0, 0, 1, 1, 1], [1] * 7])
    rows = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(3))
    given = {"attention_mask": mask, "position_ids": torch.arange(7).expand(2, -1)}
    with torch.no_grad():
        expected = model(rows, **given).logits
        with accelerate_transformers([model_type]):
            found = model(rows, **given).logits
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], **TOLERANCE)


@pytest.mark.parametrize("model_type", ["bamba", "zamba", "mamba2"])
def test_a_compiled_model_passes_over_padding_where_positions_are_given(
    model_type: str, models: Callable[[str], PreTrainedModel]
) -> None:
    """A graph cannot tell these positions, which go on over the padding, from those of packed documents."""
    model, mask = models(model_type).eval(), torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    rows = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(3))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for positions in (torch.arange(7).expand(2, -1), (mask.cumsum(1) - 1).clamp(min=0)):
            expected = model(rows, attention_mask=mask, position_ids=positions).logits
            with accelerate_transformers([model_type]):
                torch._dynamo.reset()
                found = compiled(rows, attention_mask=mask, position_ids=positions, use_cache=False).logits
            torch.testing.assert_close(found[mask == 1], expected[mask == 1], **TOLERANCE)
        if model_type != "mamba2":  # attention would not reach over padding inside a text
            mask[1, 3] = 0
            with accelerate_transformers([model_type]), pytest.raises(RuntimeError, match="padding inside a document"):
                compiled(rows, attention_mask=mask, position_ids=positions, use_cache=False)


def test_a_compiled_model_fills_a_cache_where_positions_are_given_and_stops_at_documents(
    models: Callable[[str], PreTrainedModel],
) -> None:
    model, positions = models("bamba").eval(), torch.arange(8)[None]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with accelerate_transformers(["bamba"]), torch.no_grad():
        found = compiled(ROW, position_ids=positions, use_cache=True)
        assert found[cache_name(model)].get_seq_length(1) == 8
        torch.testing.assert_close(found.logits, model(ROW, position_ids=positions).logits, **TOLERANCE)
        with pytest.raises(RuntimeError, match="use_cache must not be set with several documents in a row"):
            compiled(ROW, position_ids=positions % 5, use_cache=True)


ROW = torch.arange(3, 11)[None]
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]])
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "use_cache": ("mamba", {"seq_idx": DOCUMENTS, "use_cache": True}, "use_cache must not be set with several"),
    "mask": (
        "jamba",
        {"seq_idx": DOCUMENTS, "attention_mask": torch.tensor([[0] + [1] * 7])},
        "attention_mask must be None with several documents.*negative seq_idx",
    ),
    "positions": (
        "bamba",
        {"seq_idx": DOCUMENTS, "position_ids": torch.arange(8)[None]},
        "position_ids must start again exactly where",
    ),
    "bounds-end": ("mamba2", {"cu_seq_lens_q": torch.tensor([0, 3, 6])}, "cu_seq_lens_q must end at .* 8, got"),
    "bounds-differ": (
        "zamba",
        {"seq_idx": DOCUMENTS, "cu_seq_lens_q": torch.tensor([0, 3, 8])},
        "cu_seq_lens_q must bound the documents of seq_idx",
    ),
    "decreasing": ("mamba", {"seq_idx": DOCUMENTS.flip(1)}, "seq_idx must not decrease"),
    "padding-inside": (
        "zamba2",
        {"seq_idx": torch.tensor([[-1, 0, 0, -1, -1, 0, 1, 1]])},
        "seq_idx and attention_mask must not have padding inside a document of a model with attention",
    ),
    "shape": ("nemotron_h", {"seq_idx": DOCUMENTS[:, 1:]}, r"seq_idx must be \(B, L\) = \(1, 8\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_mix_documents_is_refused(case: str, models: Callable[[str], PreTrainedModel]) -> None:
    model_type, given, message = REFUSED[case]
    with accelerate_transformers([model_type]), pytest.raises(ValueError, match=message):
        models(model_type).eval()(ROW, **given)


def test_flash_attention_in_a_graph_has_to_be_given_what_it_cannot_find(
    models: Callable[[str], PreTrainedModel],
    described: dict[str, Any],
    flash_attention: Callable[[PreTrainedModel], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native_packing, "tracing", lambda: True)
    row, message = described["input_ids"], "max_length_q, max_length_k must be given .* flash attention in a compiled"
    for model_type, rows in (("bamba", 2), ("zamba", 1)):
        model = models(model_type).eval()
        with accelerate_transformers([model_type]), torch.no_grad():
            expected = model(row, seq_idx=described["seq_idx"]).logits
            flash_attention(model)
            with pytest.raises(ValueError, match=message):
                model(row.repeat(rows, 1), seq_idx=described["seq_idx"].repeat(rows, 1))
            names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
            given = {name: described[name] for name in names}
            torch.testing.assert_close(model(row, **given).logits, expected, **TOLERANCE)


def test_a_cache_is_refused_with_documents(models: Callable[[str], PreTrainedModel]) -> None:
    model = models("mamba").eval()
    name = cache_name(model)
    with accelerate_transformers(["mamba"]), torch.no_grad():
        cache = model(ROW, use_cache=True)[name]
        with pytest.raises(ValueError, match=rf"{name} must not be set with several documents in a row.*one by one"):
            model(ROW, seq_idx=DOCUMENTS, **{name: cache})
