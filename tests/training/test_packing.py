"""Packed training is training on separate documents: rows, losses and gradients, by our collators and transformers'."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, draw_ids, make_model
from torch import Tensor
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from ssm_zoo.training.packing import (
    IGNORED,
    PackedDocuments,
    PackingCollator,
    RowCollator,
    first_fit_decreasing,
)

pytestmark = pytest.mark.usefixtures("without_gate_noise")

LENGTHS = [7, 1, 12, 3, 5, 2]


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def documents(lengths: list[int] = LENGTHS) -> list[Tensor]:
    return [draw_ids(length, seed=index) for index, length in enumerate(lengths)]


def items(lengths: list[int] = LENGTHS) -> list[dict[str, Any]]:
    return [{"input_ids": ids.tolist()} for ids in documents(lengths)]


# Bins


def naive_first_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        for placed in bins:
            if sum(lengths[index] for index in placed) + lengths[item] <= capacity:
                placed.append(item)
                break
        else:
            bins.append([item])
    return bins


@pytest.mark.parametrize("number", [0, 1, 2, 3, 8, 9, 100])
def test_bins_are_those_of_first_fit_decreasing(number: int) -> None:
    draw = random.Random(number)
    lengths = [draw.randint(1, 20) for _ in range(number)]
    assert first_fit_decreasing(lengths, 20) == naive_first_fit_decreasing(lengths, 20)


@pytest.mark.parametrize("lengths", [[3, 21], [-1, 3]])
def test_an_item_must_fit_into_a_bin(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"`lengths` must be from 0 to 20, got -?\d+ to \d+"):
        first_fit_decreasing(lengths, 20)


# Rows


def test_one_row_without_padding() -> None:
    batch = PackingCollator()(items())
    ids = documents()
    assert torch.equal(batch["input_ids"], torch.cat(ids)[None])
    assert torch.equal(
        batch["labels"], torch.cat([torch.cat([torch.tensor([IGNORED]), part[1:]]) for part in ids])[None]
    )
    assert torch.equal(batch["position_ids"], torch.cat([torch.arange(len(part)) for part in ids])[None])
    numbered = [torch.full((len(part),), index) for index, part in enumerate(ids)]
    assert torch.equal(batch["seq_idx"], torch.cat(numbered).int()[None])


def test_rows_of_a_budget_end_in_padding() -> None:
    batch = PackingCollator(16, pad_token_id=9)(items())
    assert {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in batch.items()} == {
        "input_ids": ((2, 16), torch.int64),
        "labels": ((2, 16), torch.int64),
        "seq_idx": ((2, 16), torch.int32),
        "position_ids": ((2, 16), torch.int64),
    }
    # 12 + 3 + 1 and 7 + 5 + 2, two left.
    assert batch["seq_idx"].tolist() == [[0] * 12 + [1] * 3 + [2], [0] * 7 + [1] * 5 + [2] * 2 + [-1] * 2]
    ids = documents()
    assert torch.equal(batch["input_ids"][0], torch.cat([ids[2], ids[3], ids[1]]))
    assert torch.equal(batch["input_ids"][1, :14], torch.cat([ids[0], ids[4], ids[5]]))
    assert batch["input_ids"][1, 14:].tolist() == [9, 9]
    assert batch["labels"][1, 14:].tolist() == [IGNORED, IGNORED]


@pytest.mark.parametrize("length", [1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 23])
def test_every_token_but_the_first_is_predicted_once_from_the_one_before(length: int) -> None:
    """Also where a document is cut: pieces overlap by one."""
    ids = torch.arange(100, 100 + length)
    batch = PackingCollator(5)([{"input_ids": ids}])
    assert batch["input_ids"].shape[1] == 5
    pairs = [
        (before, label)
        for row, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
        for before, label in zip(row, labels[1:], strict=False)
        if label != IGNORED
    ]
    assert sorted(pairs) == [(token, token + 1) for token in range(100, 99 + length)]


def test_labels_of_the_item_are_kept() -> None:
    """A prompt without a loss, in a document that is cut."""
    ids, labels = list(range(10, 19)), [IGNORED] * 6 + [16, 17, 18]
    batch = PackingCollator(5)([{"input_ids": ids, "labels": labels, "text": "left out"}])
    assert set(batch) == {"input_ids", "labels", "seq_idx", "position_ids"}
    assert sorted(batch["labels"][batch["labels"] != IGNORED].tolist()) == [16, 17, 18]
    assert batch["labels"][:, 0].tolist() == [IGNORED] * 2


@pytest.mark.parametrize("packing", [True, False])
def test_documents_are_packed_ahead(packing: bool) -> None:
    ids = [part.int() for part in documents([*LENGTHS, 0, 30])]
    rows = PackedDocuments(ids, 16, packing=packing)
    # 30 becomes 16 and 15; those of 0 and 1 have nothing to predict.
    assert rows.tokens == 7 + 12 + 3 + 5 + 2 + 16 + 15
    assert rows.targets == 6 + 11 + 2 + 4 + 1 + 29
    batch = RowCollator()([rows[index] for index in range(len(rows))])
    assert (batch["labels"] != IGNORED).sum() == rows.targets
    assert (batch["seq_idx"] >= 0).sum() == rows.tokens
    assert batch["input_ids"].dtype == torch.int64
    if packing:
        assert len(rows) == 4
        assert [int(row.max()) for row in batch["seq_idx"]] == [0, 0, 1, 2]
    else:
        assert batch["seq_idx"].max() == 0
        assert sorted(len(rows[index]["input_ids"]) for index in range(len(rows))) == [2, 3, 5, 7, 12, 15, 16]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PackingCollator(1), "`budget` must be at least 2 .*, got 1"),
        (lambda: PackedDocuments(documents(), 0), "`budget` must be at least 2 .*, got 0"),
        (lambda: PackedDocuments(documents([1, 1]), 8), "must have two tokens or more, got 2 shorter"),
        (lambda: PackingCollator()([{"input_ids": []}]), "`items` must have at least one token, got 1 items"),
        (lambda: PackingCollator()([{"input_ids": [1, 2], "labels": [1]}]), r"`labels` must have .*, got \(1,\) for"),
    ],
    ids=["collator", "documents", "nothing-to-predict", "no-token", "labels"],
)
def test_what_cannot_be_packed_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Training


def gradients(model: Any, batches: list[dict[str, Any]], targets: int) -> tuple[float, dict[str, Tensor]]:
    """Loss per target and its gradients, summed over batches."""
    model.train()
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=torch.tensor(targets)).loss
        loss.backward()
        total += loss.item()
    return total, {key: parameter.grad.clone() for key, parameter in model.named_parameters()}


def unpacked(batch: list[dict[str, Any]]) -> Any:
    rows = PackedDocuments([torch.tensor(item["input_ids"]) for item in batch], 99, packing=False)
    return (rows[index] for index in range(len(rows)))


COLLATORS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "one-row": PackingCollator(),
    "budget": PackingCollator(16, pad_token_id=3),
    "padded": lambda batch: RowCollator()(list(unpacked(batch))),
    "transformers-positions": DataCollatorWithFlattening(),
    "transformers-cu-seq-lens": DataCollatorWithFlattening(return_position_ids=False, return_flash_attn_kwargs=True),
    "transformers-seq-idx": DataCollatorWithFlattening(return_position_ids=False, return_seq_idx=True),
}


def test_packed_training_is_training_on_separate_documents(name: str) -> None:
    """The loss, a mean over all targets, and the gradient of every parameter, by every collator."""
    model = make_model(name)
    separate = [{"input_ids": ids[None], "labels": ids[None]} for ids in documents() if len(ids) > 1]
    targets = sum(LENGTHS) - len(LENGTHS)
    expected, wanted = gradients(model, separate, targets)
    for way, collate in COLLATORS.items():
        loss, found = gradients(model, [dict(collate(items()))], targets)
        assert abs(loss - expected) < 1e-5, way
        for key, gradient in wanted.items():
            scale = max(1.0, gradient.abs().max().item())
            assert (found[key] - gradient).abs().max() < 1e-5 * scale, f"{way}: {key}"
    without_borders = {"input_ids": torch.cat(documents())[None], "labels": PackingCollator()(items())["labels"]}
    assert abs(gradients(model, [without_borders], targets)[0] - expected) > 1e-4


class Items(torch.utils.data.Dataset):
    """Documents with columns that no model takes."""

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**items()[index], "text": "abc", "length": LENGTHS[index]}


def trained(folder: Path, collator: Any, **arguments: Any) -> Any:
    """A model after the Trainer's steps of plain gradient descent."""
    model = make_model("mamba2-full")
    settings = {
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "num_train_epochs": 1,
        "dataloader_pin_memory": False,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **(settings | arguments)),
        train_dataset=Items(),
        data_collator=collator,
    )
    trainer.train()
    return trainer.model


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"per_device_train_batch_size": 6}, id="one-batch"),
        pytest.param({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, id="accumulated"),
        pytest.param({"per_device_train_batch_size": 6, "remove_unused_columns": False}, id="all-columns"),
        pytest.param({"per_device_train_batch_size": 6, "train_sampling_strategy": "group_by_length"}, id="by-length"),
    ],
)
@pytest.mark.parametrize("budget", [None, 16])
def test_a_step_of_the_trainer_weighs_every_token_alike(
    tmp_path: Path, budget: int | None, arguments: dict[str, Any]
) -> None:
    model = trained(tmp_path, PackingCollator(budget), **arguments)
    plain = make_model("mamba2-full")
    separate = [{"input_ids": ids[None], "labels": ids[None]} for ids in documents() if len(ids) > 1]
    _, wanted = gradients(plain, separate, sum(LENGTHS) - len(LENGTHS))
    moved = dict(model.named_parameters())
    for key, parameter in plain.named_parameters():
        torch.testing.assert_close(moved[key], parameter - 0.5 * wanted[key], rtol=0, atol=1e-5, msg=key)
