"""What any causal LM owes its users, checked for every family: causality, gradients, losses, outputs, saving."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, VOCAB, draw_ids, make_config, make_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from ssm_zoo.modeling.pretrained import names_in_float32

LENGTH = 13

# transformers 5.23 calls it activation checkpointing; 5.17, which is supported too, knows the old name only.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.usefixtures("without_gate_noise"),
]


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def loss_of(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """The definition: the logits of a token against the next label."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def equal_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(actual[key], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, k=key: f"{k}: {text}")


def test_causal(name: str) -> None:
    """Another token changes its own logits and those after it, never those before."""
    model, ids = make_model(name), draw_ids(1, LENGTH)
    with torch.no_grad():
        logits = model(ids).logits
        for t in range(LENGTH):
            changed = ids.clone()
            changed[0, t] = ids[0, t] % (VOCAB - 1) + 1
            # Not to the bit: attention of selected tokens computes them in blocks, which another token regroups.
            differs = ((model(changed).logits - logits).abs() > 1e-6).any(-1)[0]
            assert not differs[:t].any() and differs[t]
            assert t + 1 == LENGTH or differs[t + 1 :].any()


# Training


def test_every_parameter_is_trained(name: str) -> None:
    model = make_model(name).train()
    output = model(draw_ids(3, LENGTH), labels=draw_ids(3, LENGTH))
    assert output.past_key_values is None
    for key, gradient in gradients(model, output.loss).items():
        assert gradient.isfinite().all(), key
        used = gradient if gradient.dim() == 1 else gradient.any(-1)
        if gradient.dim() == 3 and key.endswith("mixer.weight"):  # a row for each position, of which not all occur
            used = used.any(-1)
        if not key.endswith("embeddings.weight"):  # only the drawn tokens have one
            assert used.all(), f"{key}: no gradient at {(used == 0).nonzero().tolist()}"
        assert used.any(), key


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not-reentrant", "reentrant"])
def test_gradient_checkpointing_changes_nothing(name: str, use_reentrant: bool) -> None:
    model, ids = make_model(name).train(), draw_ids(2, LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :4] = 0
    expected = gradients(model, model(ids, attention_mask=mask, labels=ids).loss)
    calls = []
    model.backbone.layers[0].mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.zero_grad()
    model(ids, attention_mask=mask, labels=ids).loss.backward()  # a reentrant checkpoint knows no autograd.grad
    assert len(calls) == 2  # the second time for the backward pass
    equal_gradients({key: parameter.grad for key, parameter in model.named_parameters()}, expected)


def test_it_learns_by_heart(name: str) -> None:
    model, ids = make_model(name).train(), draw_ids(1, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    generated = model.eval().generate(ids[:, :1], do_sample=False, max_new_tokens=9, pad_token_id=0)
    assert torch.equal(generated, ids)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({}, id="position_ids"),
        pytest.param({"return_seq_idx": True}, id="seq_idx"),
        pytest.param({"return_flash_attn_kwargs": True}, id="cu_seq_lens"),
    ],
)
def test_padding_free_batches_train_like_separate_documents(name: str, flags: dict[str, bool]) -> None:
    """transformers' own collator: documents of different lengths in one row."""
    model = make_model(name).train()
    rows = [draw_ids(1, length, seed=length) for length in (7, 2, 11, 3)]
    batch = DataCollatorWithFlattening(**flags)([{"input_ids": row[0].tolist()} for row in rows])
    assert batch["input_ids"].shape == (1, 23)
    packed = model(**batch).loss
    losses = [loss_of(model(row).logits, row, "sum") for row in rows]
    separate = torch.stack(losses).sum() / (23 - len(rows))
    torch.testing.assert_close(packed, separate, rtol=0, atol=1e-5)
    equal_gradients(gradients(model, packed), gradients(model, separate))


def test_trainer_trains_and_saves(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    documents = [{"input_ids": draw_ids(5 + i, seed=i).tolist()} for i in range(8)]
    trainer = Trainer(model=model, args=arguments, train_dataset=documents, data_collator=DataCollatorWithFlattening())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    for key, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[key]), key
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = draw_ids(1, 6)
    with torch.no_grad():
        # Not to the bit: the product with a single selected token depends on where the weights lie in memory.
        torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, rtol=0, atol=1e-6)


# Loss and logits


def test_loss_is_the_cross_entropy_of_the_next_token(name: str) -> None:
    model, ids = make_model(name), draw_ids(3, LENGTH)
    labels = ids.clone()
    labels[0, :5] = labels[1, -3:] = labels[2, 4] = -100
    with torch.no_grad():
        output = model(ids, labels=labels)
        torch.testing.assert_close(output.loss, loss_of(output.logits, labels), rtol=0, atol=1e-6)
        summed = loss_of(output.logits, labels, "sum")
        for items in (7, torch.tensor(50)):
            loss = model(ids, labels=labels, num_items_in_batch=items).loss
            torch.testing.assert_close(loss, summed / items, rtol=1e-6, atol=1e-6)
        as_tuple = model(ids, labels=labels, return_dict=False, use_cache=False)
    assert torch.equal(as_tuple[0], output.loss) and torch.equal(as_tuple[1], output.logits)


@pytest.mark.parametrize("keep", [1, 4, torch.tensor([0, 5, 12]), torch.tensor([3])], ids=str)
def test_logits_to_keep(name: str, keep: int | Tensor) -> None:
    model, ids = make_model(name), draw_ids(2, LENGTH)
    with torch.no_grad():
        logits = model(ids).logits
        kept = model(ids, logits_to_keep=keep).logits
    expected = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]
    torch.testing.assert_close(kept, expected, rtol=0, atol=1e-6)


def test_hidden_states_and_backbone(name: str) -> None:
    model, ids = make_model(name), draw_ids(2, LENGTH)
    backbone = model.backbone
    blocks: list[Tensor] = []
    for block in backbone.layers:
        block.register_forward_hook(lambda _, __, output: blocks.append(output[0]))
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        states = output.hidden_states
        assert len(states) == model.config.num_hidden_layers + 1
        embeddings = backbone.embeddings(ids)
        assert torch.equal(states[0], backbone.add_positions(embeddings, backbone.sequence_of(embeddings)))
        assert all(torch.equal(state, block) for state, block in zip(states[1:-1], blocks, strict=False))
        assert torch.equal(states[-1], backbone.norm_f(blocks[-1]))
        assert torch.equal(model.scale_logits(model.lm_head(states[-1])), output.logits)
        bare = backbone(ids, return_dict=False, use_cache=False)
        assert isinstance(bare, tuple) and torch.equal(bare[0], states[-1])
        embedded = model(inputs_embeds=backbone.embeddings(ids)).logits
    assert torch.equal(embedded, output.logits)
    assert model(ids).hidden_states is None and model(ids).attentions is None


# Saving and loading


@pytest.mark.parametrize("shard", ["50GB", "5KB"], ids=["one-file", "shards"])
def test_saved_and_loaded_bit_equal(name: str, shard: str, tmp_path: Path) -> None:
    model, ids = make_model(name), draw_ids(2, LENGTH)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard != "50GB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    assert loaded.config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path)}
    states = model.state_dict()
    assert loaded.state_dict().keys() == states.keys()
    assert all(torch.equal(value, states[key]) for key, value in loaded.state_dict().items())
    with torch.no_grad():
        expected = model(ids)
        assert torch.equal(loaded(ids).logits, expected.logits)
        hidden = model(ids, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state, hidden)


def test_missing_weights_get_their_initial_values_and_the_others_stay(name: str, tmp_path: Path) -> None:
    """A checkpoint of another model that shares some of the weights: what distillation starts from."""
    model = make_model(name)
    states = model.state_dict()
    missing = {key for key in states if ".mixer." in key}
    assert missing
    model.save_pretrained(tmp_path, state_dict={key: states[key] for key in states.keys() - missing})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for key, value in states.items():
        assert loaded[key].isfinite().all()
        assert torch.equal(loaded[key], value) != (key in missing), key
        if key.endswith(".D"):
            assert (loaded[key] == 1).all()


def test_bfloat16_keeps_the_recurrence_in_float32(name: str, tmp_path: Path) -> None:
    model, ids = make_model(name), draw_ids(2, LENGTH)
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = tuple(f".{name}" for name in names_in_float32(model))
    for key, parameter in half.named_parameters():
        expected = torch.float32 if key.endswith(kept) else torch.bfloat16
        assert parameter.dtype == expected, key
    with torch.no_grad():
        exact = model(ids).logits
        whole = half(ids).logits
        cache, steps = None, []
        for t in range(LENGTH):
            output = half(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    assert whole.dtype == torch.bfloat16
    # Logits of order 1 after a few layers: some units in the last place, 2**-8.
    torch.testing.assert_close(whole.float(), exact, rtol=0, atol=0.06)
    torch.testing.assert_close(torch.cat(steps, dim=1).float(), exact, rtol=0, atol=0.06)
    assert (whole.float() - exact).abs().mean() < 0.01


def test_made_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config(name))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in make_model(name).state_dict().items()
    }


def test_registered_with_the_auto_classes(name: str) -> None:
    family, config = FAMILIES[name], make_config(name)
    assert isinstance(AutoConfig.for_model(config.model_type), type(config))
    assert type(AutoModel.from_config(config)) is family.backbone
    assert type(AutoModelForCausalLM.from_config(config)) is family.causal_lm


# Embeddings


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tied_weights_and_resized_vocabulary(name: str, tied: bool, tmp_path: Path) -> None:
    model, ids = make_model(name, tie_word_embeddings=tied), draw_ids(2, 6)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (head.weight is embeddings.weight) == tied
    with torch.no_grad():
        expected = model(ids).logits
    torch.manual_seed(0)
    model.resize_token_embeddings(VOCAB + 5)
    assert model.config.vocab_size == VOCAB + 5
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.backbone.embeddings.weight) == tied
    new = torch.tensor([[VOCAB + 4, 3]])
    for each in (model, loaded):
        with torch.no_grad():
            logits = each(ids).logits
            assert logits.shape[-1] == VOCAB + 5
            torch.testing.assert_close(logits[..., :VOCAB], expected, rtol=0, atol=1e-6)
            assert each(new, labels=new).loss.isfinite()
