"""Encoder-decoders in use: training with transformers' own tools, adapters, saving, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ENCODER_DECODERS, draw_ids, make_encoder_decoder
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from ssm_zoo.modeling import ZooEncDecConfig

# transformers 5.23 calls it activation checkpointing; 5.17, which is supported too, knows the old name only.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

PAD, EOS, BOS = 0, 1, 2
SOURCE, LABELS = draw_ids(3, 7, seed=1).clamp(min=3), draw_ids(3, 5, seed=2).clamp(min=3)
NAMES = list(ENCODER_DECODERS)


def tokenizer(side: str = "right") -> PreTrainedTokenizerFast:
    words = {"<pad>": PAD, "</s>": EOS, "<s>": BOS} | {f"w{i}": i for i in range(3, 20)}
    made = Tokenizer(WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, padding_side=side, **special)


def reversals(count: int) -> list[dict[str, list[int]]]:
    """Sources of 2 to 4 tokens, and the same tokens reversed."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        length = int(torch.randint(2, 5, (), generator=generator))
        tokens = torch.randint(3, 9, (length,), generator=generator).tolist()
        rows.append({"input_ids": tokens, "attention_mask": [1] * length, "labels": [*tokens[::-1], EOS]})
    return rows


# Inputs of the decoder


def test_the_decoder_reads_each_label_one_token_later() -> None:
    model = make_encoder_decoder("mamba")
    labels = torch.tensor([[5, 6, 7, 1], [5, 1, -100, -100], [-100, -100, 5, 1], [-100] * 4])
    found = model.prepare_decoder_input_ids_from_labels(labels)
    expected = [[BOS, 5, 6, 7], [BOS, 5, 1, PAD], [PAD, PAD, BOS, 5], [BOS, PAD, PAD, PAD]]
    assert found.tolist() == expected
    packed = torch.tensor([[5, 1, 6, 7, 1, -100]]), torch.tensor([[0, 0, 3, 3, 3, -1]])
    assert model.prepare_decoder_input_ids_from_labels(*packed)[0, :5].tolist() == [BOS, 5, BOS, 6, 7]
    model.config.decoder_start_token_id = 9
    assert model.prepare_decoder_input_ids_from_labels(labels)[0].tolist() == [9, 5, 6, 7]
    for name, message in (("pad_token_id", "pad_token_id must be set"), ("bos_token_id", "decoder_start_token_id or")):
        other = make_encoder_decoder("mamba", **{name: None})
        with pytest.raises(ValueError, match=message):
            other.prepare_decoder_input_ids_from_labels(labels)


@pytest.mark.parametrize("start", [None, PAD], ids=["bos", "pad"])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_transformers_collator_has_one_loss_whatever_its_side(name: str, start: int | None) -> None:
    model = make_encoder_decoder(name, decoder_start_token_id=start)
    rows, losses = reversals(5), []
    for side in ("left", "right"):
        batch = DataCollatorForSeq2Seq(tokenizer(side), model=model)(rows)
        assert "decoder_attention_mask" not in batch and (batch["labels"] == -100).any()
        with torch.no_grad():
            losses += [model(**batch).loss, model(**{k: v for k, v in batch.items() if k != "decoder_input_ids"}).loss]
    total, count = 0.0, 0
    for row in rows:
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            total += model(torch.tensor([row["input_ids"]]), labels=labels, num_items_in_batch=1).loss.item()
        count += labels.numel()
    for loss in losses:
        assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_padding_in_front_is_not_forgotten_in_a_cache() -> None:
    model = make_encoder_decoder("transformer")
    ids = torch.tensor([[PAD, PAD, BOS, 5], [BOS, 5, 6, 7]])
    with pytest.raises(ValueError, match="decoder_attention_mask must be given for targets that are padded in front"):
        model(SOURCE[:2], decoder_input_ids=ids, use_cache=True)


# Training


def test_a_graph_reads_targets_that_are_padded_in_front_without_a_mask() -> None:
    model = make_encoder_decoder("mamba").train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for side in ("left", "right"):
        batch = dict(DataCollatorForSeq2Seq(tokenizer(side), model=model)(reversals(5)))
        with torch.no_grad():
            assert compiled(**batch).loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not-reentrant", "reentrant"])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_no_gradient(name: str, use_reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make_encoder_decoder(name, hidden_dropout=0.2).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        torch.manual_seed(0)
        model(SOURCE, labels=LABELS).loss.backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    for key, gradient in gradients[0].items():
        assert gradient.isfinite().all(), key
        assert gradient.any(), key
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-5)


def test_dropout_acts_on_every_part_and_in_training_alone() -> None:
    model = make_encoder_decoder("mixed", hidden_dropout=0.4)
    plain = make_encoder_decoder("mixed")
    with torch.no_grad():
        assert torch.equal(model(SOURCE, labels=LABELS).logits, plain(SOURCE, labels=LABELS).logits)
        model.train()
        calls: list[float] = []
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.register_forward_hook(lambda _, __, output: calls.append((output == 0).float().mean().item()))
        model(SOURCE, labels=LABELS)
    # The embeddings of both, 4 mixers and MLPs of the encoder, 2 mixers, 3 cross-attentions and MLPs of the decoder.
    assert len(calls) == 2 + 8 + 8
    assert all(0.2 < share < 0.6 for share in calls)


def trainer_of(model: Any, folder: Path, **changes: Any) -> Seq2SeqTrainer:
    """transformers' trainer and collator as they are, padding on the left, with generation in evaluation."""
    settings = {
        "max_steps": 40,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "predict_with_generate": True,
        "generation_max_length": 8,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 10,
        "seed": 0,
    }
    return Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(str(folder), **settings | changes),
        train_dataset=reversals(200),  # pyright: ignore[reportArgumentType]
        eval_dataset=reversals(16),  # pyright: ignore[reportArgumentType]
        data_collator=DataCollatorForSeq2Seq(tokenizer("left"), model=model),
        processing_class=tokenizer("left"),
        compute_metrics=lambda found: {"ended": float((found.predictions == EOS).any(1).mean())},
    )


def test_seq2seq_trainer_lowers_the_loss(tmp_path: Path) -> None:
    trainer = trainer_of(make_encoder_decoder("mamba", head_dim=8), tmp_path)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert after["eval_loss"] < 0.6 * before and losses[-1] < 0.6 * losses[0]
    assert after["eval_ended"] > 0.9
    assert losses[0] < 1.5 * before  # a mean over labels, whatever a step is made of


def test_smoothed_labels_are_not_shifted(tmp_path: Path) -> None:
    """With smoothing, transformers' trainer keeps the labels to itself and reads the logits."""
    model = make_encoder_decoder("transformer")
    trainer = trainer_of(model, tmp_path, label_smoothing_factor=0.1)
    batch = trainer.data_collator(reversals(5))  # pyright: ignore[reportCallIssue]
    with torch.no_grad():
        loss = trainer.compute_loss(model, dict(batch))
        logs = model(**batch).logits.log_softmax(-1)
    real = batch["labels"] != -100
    right = logs[real].gather(1, batch["labels"][real][:, None]).mean()
    torch.testing.assert_close(loss, -(0.9 * right + 0.1 * logs[real].mean()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_lora_on_every_projection_learns_and_merges(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=12, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
    plain = make_encoder_decoder(name)
    linear = [key for key, module in plain.named_modules() if isinstance(module, torch.nn.Linear) and key != "lm_head"]
    model: Any = get_peft_model(make_encoder_decoder(name), config)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    expected = {f"base_model.model.{key}.lora_{part}.default.weight" for key in linear for part in "AB"}
    assert trained.keys() == expected and any("cross_attention.k_proj" in key for key in expected)
    optimizer, losses = torch.optim.Adam(trained.values(), lr=0.01), []
    for _ in range(15):
        loss = model(input_ids=SOURCE, labels=LABELS).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    with torch.no_grad():
        wanted = model(input_ids=SOURCE, labels=LABELS).logits
    tokens = model.generate(input_ids=SOURCE, max_new_tokens=6, do_sample=False)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_encoder_decoder(name), tmp_path).eval()
    merged = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=SOURCE, labels=LABELS).logits, wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(merged(SOURCE, labels=LABELS).logits, wanted, rtol=0, atol=1e-5)
    assert torch.equal(merged.generate(SOURCE, max_new_tokens=6, do_sample=False), tokens)


# Saving


LOAD = """
import sys
sys.modules["ssm_zoo"] = None
import torch
from transformers import AutoModelForSeq2SeqLM, AutoConfig
for folder in sys.argv[1:]:
    model, found = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(found.values()), found
    given = torch.load(folder + "/given.pt")
    with torch.no_grad():
        assert torch.equal(model(given["source"], labels=given["labels"]).logits, given["logits"])
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(given["source"], **options), given["tokens"])
    model.save_pretrained(folder + "/again")
    again = AutoModelForSeq2SeqLM.from_pretrained(folder + "/again", trust_remote_code=True)
    assert torch.equal(again(given["source"], labels=given["labels"]).logits, given["logits"])
    print("loaded", type(model).__module__)
"""


def test_an_export_loads_without_the_package(tmp_path: Path) -> None:
    for name in ("transformer", "mixed"):
        folder, model = tmp_path / name, make_encoder_decoder(name)
        model.save_pretrained(folder)
        with torch.no_grad():
            logits = model(SOURCE, labels=LABELS).logits
        tokens = model.generate(SOURCE, num_beams=3, max_new_tokens=6, do_sample=False)
        torch.save({"source": SOURCE, "labels": LABELS, "logits": logits, "tokens": tokens}, folder / "given.pt")
    folders = [str(tmp_path / name) for name in ("transformer", "mixed")]
    command = [sys.executable, "-P", "-c", LOAD, *folders]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.count("loaded transformers_modules.") == 2 and result.returncode == 0, result.stderr
    code = "".join(path.read_text() for path in (tmp_path / "transformer").glob("*.py"))
    for absent in ("class MambaMixer", "class Retention", "class BoundedMemory"):
        assert absent not in code
    auto = json.loads((tmp_path / "mixed" / "config.json").read_text())["auto_map"]
    assert auto.keys() == {"AutoConfig", "AutoModel", "AutoModelForSeq2SeqLM"}


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = make_encoder_decoder(name)
    model.save_pretrained(tmp_path)
    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        expected = model(SOURCE, labels=LABELS)
    for each in (model, AutoModelForSeq2SeqLM.from_pretrained(tmp_path)):
        assert (each.get_output_embeddings().weight is each.get_input_embeddings().weight) == tied
        assert torch.equal(each(SOURCE, labels=LABELS).logits, expected.logits)
    backbone, found = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"]
    ids = model.prepare_decoder_input_ids_from_labels(LABELS)
    with torch.no_grad():
        states = backbone(SOURCE, decoder_input_ids=ids)
    assert torch.equal(states.encoder_last_hidden_state, expected.encoder_last_hidden_state)
    half = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for key, parameter in half.named_parameters():
        kept = key.endswith((".A_log", ".D", ".dt_bias", ".dt_proj.bias"))
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), key
    with torch.no_grad():
        assert (half(SOURCE, labels=LABELS).logits.float() - expected.logits).abs().mean() < 0.05
    model.resize_token_embeddings(70)
    assert model(SOURCE, labels=LABELS).logits.shape == (3, 5, 70)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path / "wider")
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "wider").get_input_embeddings().num_embeddings == 70


@pytest.mark.parametrize("name", NAMES)
def test_short_and_empty_batches(name: str) -> None:
    model = make_encoder_decoder(name).train()
    output = model(SOURCE[:0], labels=LABELS[:0], attention_mask=torch.ones(0, 7))
    assert output.logits.shape == (0, 5, 61) and output.loss.item() == 0
    output.loss.backward()
    model.eval()
    with torch.no_grad():
        one = model(SOURCE[:, :1], labels=LABELS[:, :1])
        assert one.logits.shape == (3, 1, 61) and one.loss.isfinite()
        masked = model(SOURCE, attention_mask=torch.tensor([[1] * 7, [0] * 7, [1] * 7]), labels=LABELS)
        assert masked.logits.isfinite().all()  # a source without tokens
        torch.testing.assert_close(masked.logits[::2], model(SOURCE[::2], labels=LABELS[::2]).logits)
        as_tuple = model(SOURCE, labels=LABELS, return_dict=False)
        last = model(SOURCE, labels=LABELS[:, -1:], decoder_input_ids=LABELS[:, :1], logits_to_keep=1)
    assert as_tuple[1].shape == (3, 5, 61) and last.logits.shape == (3, 1, 61)


# The configuration


def test_the_encoder_takes_over_what_it_is_not_given() -> None:
    config = make_encoder_decoder("mixed").config
    encoder = config.encoder_config()
    assert (encoder.num_hidden_layers, encoder.num_attention_heads, encoder.head_dim) == (4, 2, 8)
    assert (encoder.hidden_size, encoder.norm_placement, encoder.qk_norm) == (16, "both", "head")
    assert encoder.bidirectional and not config.bidirectional and encoder.final_logit_softcapping is None
    assert encoder.mamba2["head_dim"] == 8 and encoder.mamba["state_size"] == 8
    assert encoder.mlp_types == ["gated"] * 4
    merged = ZooEncDecConfig(mamba={"state_size": 4, "expand": 3}, encoder={"mamba": {"expand": 1}}).encoder_config()
    assert (merged.mamba["state_size"], merged.mamba["expand"]) == (4, 1)
    assert config.used_rows() == {
        "TOKEN_MIXERS": {"retention", "sliding_attention", "full_attention", "mamba2", "mamba"}
    }
    assert ZooEncDecConfig(**config.to_dict()).to_dict() == config.to_dict()
    assert ZooEncDecConfig().encoder_config().num_hidden_layers == 6


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"encoder": {"hidden_size": 8}}, r"encoder\['hidden_size'\] must be left out, got 8: hidden_size is that of"),
        ({"encoder": {"layers": 3}}, "encoder has no key 'layers'. It takes intermediate_size, num_hidden_layers"),
        ({"encoder": {"mixer_types": ["mamba"]}}, "encoder: mixer_types must have one entry for each of the 2 blocks"),
        ({"encoder": {"mixer_types": ["sliding_attention"] * 2}}, "encoder: .*must be one of full_attention, mamba"),
        ({"mixer_types": ["selective_attention"] * 2}, r"mixer_types\[0\] must be another than selective_attention"),
        ({"bidirectional": True}, "bidirectional must be left out, got True: the decoder is causal"),
        ({"use_parallel_residual": True}, "use_parallel_residual must be left out, got True: a block reads"),
        ({"recompute_length": 9}, "recompute_length must be left out, got 9"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder must be True, got False"),
        ({"hidden_dropout": 1.0}, "hidden_dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_a_configuration_without_effect_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=f"(?s){message}"):
        make_encoder_decoder("transformer", **{"mixer_types": None, "mlp_types": None, "position_types": None, **keys})


# Arguments


def numbers(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


TARGET = {"decoder_input_ids": LABELS[:1]}
PACKED = {"seq_idx": numbers([0, 0, 1, 1, 1, 2, 2]), "decoder_seq_idx": numbers([0, 0, 1, 2, 2])}
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({}, "exactly one of decoder_input_ids and decoder_inputs_embeds"),
    (TARGET | {"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
    (
        TARGET | {"encoder_outputs": (torch.zeros(1, 7, 16),)},
        "exactly one of input_ids, inputs_embeds and encoder_outp",
    ),
    (TARGET | {"attention_mask": torch.ones(1, 6)}, "attention_mask must cover the 0 cached and the 7 new tokens, got"),
    (
        TARGET | {"decoder_attention_mask": torch.ones(1, 4)},
        "must cover the 0 cached and the 5 new tokens, got length 4",
    ),
    (TARGET | {"seq_idx": PACKED["seq_idx"]}, "seq_idx and decoder_seq_idx must both be given or both be left out"),
    (TARGET | PACKED | {"decoder_seq_idx": numbers([0, 0, 1, 3, 3])}, "got 3 in row 0, which seq_idx lacks there"),
    (TARGET | PACKED | {"decoder_seq_idx": numbers([1, 0, 1, 2, 2])}, "seq_idx must be non-decreasing"),
    (TARGET | PACKED | {"decoder_seq_idx": numbers([0, 1])}, r"decoder_seq_idx must be one for each token, \(1, 5\)"),
    (
        TARGET | {"labels": LABELS[:1], "decoder_input_ids": None} | PACKED | {"decoder_seq_idx": numbers([0])},
        "as the lab",
    ),
    (TARGET | PACKED | {"seq_idx": torch.zeros(1, 7)}, "seq_idx must have an integer dtype"),
    (TARGET | PACKED | {"use_cache": True}, "packed documents .* leave no single state to cache"),
    (
        TARGET | {"cu_seq_lens_q": numbers([0, 7])},
        "cu_seq_lens_q must be left out: pack with seq_idx and decoder_seq_idx",
    ),
    (TARGET | {"shift_labels": LABELS[:1]}, "shift_labels must be left out"),
    (TARGET | {"labels": LABELS[:1, :4]}, r"labels must be \(B, L\) = \(1, 5\), one for each token, got \(1, 4\)"),
    (TARGET | {"past_key_values": DynamicCache()}, "past_key_values must be EncoderDecoderCache.DynamicCache.config="),
    (
        TARGET | {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache()), "use_cache": True},
        "past_key_values: layer 0 must be a 'zoo_recurrent' layer",
    ),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_encoder_decoder("mamba")


@pytest.mark.parametrize(("arguments", "message"), ERRORS)
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_bad_input_raises(model: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": SOURCE[:1]} | arguments))


def test_an_unknown_argument_raises(model: Any) -> None:
    with pytest.raises(TypeError, match=r"has no argument `decoder_position_ids`"):
        model(SOURCE, labels=LABELS, decoder_position_ids=LABELS)


def test_a_cache_of_another_source_raises(model: Any) -> None:
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache())
    with torch.no_grad():
        model(SOURCE, decoder_input_ids=LABELS[:, :2], cache=cache)
        with pytest.raises(ValueError, match="the same source, which has 6 columns, got the keys of 7"):
            model(SOURCE[:, :6], decoder_input_ids=LABELS[:, 2:], cache=cache)


@pytest.mark.parametrize("name", NAMES)
def test_assisted_decoding_writes_what_greedy_decoding_writes(name: str) -> None:
    model, other = make_encoder_decoder(name), make_encoder_decoder(name, seed=1)
    source = SOURCE[:1]
    greedy = model.generate(source, max_new_tokens=16, do_sample=False)
    for assistant in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": other}, {"assistant_model": model}):
        assert torch.equal(model.generate(source, max_new_tokens=16, do_sample=False, **assistant), greedy)
