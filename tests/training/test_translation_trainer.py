"""The Trainer of a translation: the order of rows in every epoch and process, and the auxiliary loss."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from families import make_model
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from ssm_zoo.modeling import outputs as modeling_outputs
from ssm_zoo.training.translation_data import EpochOfRows, LengthBuckets
from ssm_zoo.training.translation_trainer import TranslationTrainer, smoothed_loss


def test_buckets_hold_every_row_once_in_batches_of_similar_lengths() -> None:
    lengths = [int(n) for n in torch.randint(1, 500, (403,), generator=torch.Generator().manual_seed(0))]
    buckets = LengthBuckets(lengths, 4, seed=5)
    orders = []
    for epoch in (0, 1, 0):
        buckets.set_epoch(epoch)
        orders.append(list(buckets))
    assert sorted(orders[0]) == list(range(403)) == sorted(orders[1]) and len(buckets) == 403
    assert orders[0] == orders[2] != orders[1]
    batches = [[lengths[i] for i in orders[0][start : start + 4]] for start in range(0, 403, 4)]
    assert sum(max(batch) - min(batch) for batch in batches) / len(batches) < 15 < 250
    firsts = [batch[0] for batch in batches]
    assert firsts != sorted(firsts) and firsts != sorted(firsts, reverse=True)


def test_other_seeds_have_other_orders_in_every_epoch() -> None:
    """Orders of seed + epoch would make the second epoch of a seed the first of the next."""
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1)):
        buckets = LengthBuckets([1] * 40, 4, seed)
        buckets.set_epoch(epoch)
        orders.append(tuple(buckets))
    assert len(set(orders)) == 4


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_epoch_has_the_order_of_an_uninterrupted_one(processes: int, accumulation: int) -> None:
    """In every process, as the Trainer does it: the epoch is set, and batches before the checkpoint left out."""

    def batches(process: int, epoch: int, skipped: int) -> list[list[int]]:
        buckets = LengthBuckets(list(range(24)), 2 * processes, 0)
        told, args = EpochOfRows(buckets), SimpleNamespace(gradient_accumulation_steps=accumulation)
        plain: Any = DataLoader(list(range(24)), batch_size=2, sampler=buckets)  # pyright: ignore[reportArgumentType]
        loader: Any = prepare_data_loader(plain, num_processes=processes, process_index=process)
        found: Any
        if skipped:  # a run that begins here
            found, first = skip_first_batches(loader, skipped), epoch
        else:
            found, first = loader, 0
        for number in range(first, epoch + 1):
            step = (number * len(loader) + skipped) // accumulation
            told.on_epoch_begin(args, SimpleNamespace(global_step=step), None, train_dataloader=loader)
            found.set_epoch(number)
            taken = [batch.tolist() for batch in found]
        return taken

    for process in range(processes):
        for epoch in (1, 2):
            whole = batches(process, epoch, 0)
            assert batches(process, epoch, 2) == whole[2:] and whole != batches(process, 0, 0)


def test_the_auxiliary_loss_is_part_of_the_smoothed_one_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(modeling_outputs.logger, "warning_once", told.append)
    model: Any = make_model("taipan", router_aux_loss_coef=0.5, sal_selection="gumbel").train()
    smoothed = partial(smoothed_loss, epsilon=0.1, config=model.config)
    trainer = TranslationTrainer(
        model, TrainingArguments(output_dir=str(tmp_path), use_cpu=True), compute_loss_func=smoothed
    )
    ids = torch.arange(12).view(1, 12)
    loss, found = trainer.compute_loss(model, {"input_ids": ids, "labels": ids}, True, torch.tensor(22))
    plain = smoothed_loss(SimpleNamespace(logits=found.logits), ids, epsilon=0.1, config=model.config) * 11 / 22
    assert found.aux_loss > 0 and not told
    torch.testing.assert_close(loss, plain + 0.5 * found.aux_loss * 11 / 22)
