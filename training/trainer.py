"""The training loop, which is transformers' Trainer: parts that all runs share, and language models on packed rows.

A resumed run continues from the last complete checkpoint and gives the same weights, bit for bit.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from ..conversion.load_model import check_finite
from ..harness.json_files import read_json_object
from ..harness.processes import check_processes
from ..harness.run_folder import read_json_or_none, write_json
from ..modeling.heads import ZooForCausalLM
from ..modeling.outputs import add_aux_loss
from .checkpoints import CheckedTrainer, check_numbers, last_checkpoint, steps_done
from .heldout import Rows, SelectionMeans, heldout_loss
from .packing import IGNORED, RowCollator
from .settings import RunSettings, Settings
from .sharding import sharded_by
from .stream import PositionedRows
from .texts import TextRows

HISTORY = 200
"""Maximum number of points of a curve."""
_STATE = "trainer_state.json"
CHECKPOINTS = "checkpoints"
"""Name of the folder with a run's checkpoints."""
STREAM = "stream.json"
"""Name of the file in a checkpoint with the position in a stream."""
# A resumed run sets the position in a stream instead of reading up to it. It is the same in every process.
_STREAMED = {"ignore_data_skip": True, "accelerator_config": {"dispatch_batches": False}}
_TENSORBOARD = "TENSORBOARD_LOGGING_DIR"
"""Variable with the folder that transformers' tracker for TensorBoard writes to."""
_logged: list[str] = []  # what the runs of this process have set it to
_POINT = ("step", "tokens", "loss", "aux_loss", "selection_rate", "grad_norm", "learning_rate", "seconds")


@dataclass
class TrainingRun(Generic[Settings]):
    """State of a training of a language model.

    Attributes:
        settings: settings of the run.
        output: folder of the run.
        tokenizer: the model's tokenizer.
        model: the model, on its device.
        rows: the tokenised texts.
        state: accelerate's view of the processes.
    """

    settings: Settings
    output: Path
    tokenizer: PreTrainedTokenizerBase
    model: ZooForCausalLM | PeftModel
    rows: TextRows
    state: PartialState

    @property
    def device(self) -> torch.device:
        assert self.state.device is not None
        return self.state.device

    @property
    def collator(self) -> RowCollator:
        padding = self.tokenizer.pad_token_id
        return RowCollator(padding if isinstance(padding, int) else 0)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training."""
        return optimiser_steps(self.settings, self.rows.length, self.state.num_processes)

    def _heldout(self, rows: Rows) -> dict[str, Any]:
        return heldout_loss(self.model, rows, self.collator, self.settings.batch_size)

    def compute(self) -> Any:
        """Return the context of every forward and backward pass."""
        return computing(self.settings.dtype, self.device)

    def evaluate(self, name: str) -> dict[str, Any]:
        """Return the results of :func:`heldout_loss`, with a name for the report."""
        with self.compute():
            measured = self._heldout(self.rows.heldout)
            if self.rows.objectives:
                losses = {name: self._heldout(rows)["loss"] for name, rows in self.rows.objectives.items()}
                measured["objectives"] = losses
        check_numbers(measured, name)
        if self.state.is_main_process:
            tqdm.write(f"{name}: held-out loss {measured['loss']:.4f}")
        return {"name": name, **measured}


def processes() -> PartialState:
    """Return accelerate's view of the processes.

    Raises:
        ValueError: if accelerate does not see all processes, or is configured for an unsupported kind of sharding.
    """
    sharded_by()
    # Unlike Accelerator, PartialState does not read the variable by itself.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    check_processes(state.num_processes)
    return state


def check_trackers(names: Sequence[str]) -> None:
    """Check that the trackers of a run are known and installed.

    Raises:
        ValueError: naming the first that is not.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"`report_to` must be among {', '.join(sorted(INTEGRATION_TO_CALLBACK))}, got {name!r}.")
        if name not in get_available_reporting_integrations():
            raise ValueError(f"`report_to`: {name!r} is not installed. Install it, or leave it out.")


def compute_dtype(dtype: str) -> torch.dtype:
    """Return the dtype of the forward and backward passes; "auto" depends on the device."""
    if dtype == "auto":
        has_bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float32
    return getattr(torch, dtype)


def computing(dtype: str, device: torch.device) -> Any:
    """Return the context of every forward and backward pass of a run: autocast, unless it computes in float32."""
    chosen = compute_dtype(dtype)
    return nullcontext() if chosen == torch.float32 else torch.autocast(device.type, dtype=chosen)


class StepSettings(Protocol):
    """The settings that decide the number of optimiser steps; see `ssm_zoo.training.settings`."""

    @property
    def steps(self) -> int | None: ...
    @property
    def epochs(self) -> float: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def gradient_accumulation(self) -> int: ...


def optimiser_steps(settings: StepSettings, rows: int | None, processes: int) -> int:
    """Return the number of optimiser steps: `settings.steps`, or the steps of `settings.epochs` over the rows.

    `rows` is None for a stream, whose settings always have `steps`.
    """
    if settings.steps is not None:
        return settings.steps
    assert rows is not None
    in_a_step = settings.batch_size * settings.gradient_accumulation * processes
    return math.ceil(settings.epochs * math.ceil(rows / in_a_step))


def decayed_parameters(model: nn.Module) -> list[str]:
    """Return the names of the parameters with weight decay: matrices, and the masked mixers' stacks of matrices.

    Norms, convolutions, biases (a masked mixer's bias has an entry for each head and position) and the SSMs' decay
    rates (a matrix in Mamba-1) have no weight decay.
    """
    matrices = [name for name, p in model.named_parameters() if p.dim() == 2 or (p.dim() == 3 and p.shape[1] > 1)]
    return [name for name in matrices if not name.endswith(("A_log", ".bias"))]


class ZooTrainer(CheckedTrainer, Trainer):
    """transformers' Trainer with verified checkpoints and the zoo's weight decay."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decayed_parameters(model)


class AuxiliaryLoss(CheckedTrainer):
    """Mixin for a Trainer with a loss of its own, which adds the auxiliary loss of a model that selects tokens.

    The Trainer has :meth:`note` called after every forward pass, and computes its loss in :meth:`with_auxiliary`. The
    curve's loss is without the auxiliary part.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._selection = SelectionMeans()
        self._penalties: list[Tensor] = []
        self._auxiliary = torch.zeros((), device=self.args.device)  # auxiliary part of the loss since the last point

    def note(self, model: Any, outputs: Any) -> None:
        """Note the selection of a forward pass in training, and its auxiliary loss if it has one."""
        if not model.training or getattr(outputs, "selection_rate", None) is None:
            return
        self._selection.add(outputs)
        if outputs.aux_loss is not None:
            self._penalties.append(model.config.router_aux_loss_coef * outputs.aux_loss)

    def with_auxiliary(self, compute: Callable[[], Tensor], share: Tensor | float = 1.0) -> Tensor:
        """Return the computed loss plus `share` of the mean of the auxiliary losses of its forward passes."""
        self._penalties = []  # without the passes that a backward pass has done again
        loss = compute()
        if not self._penalties:
            return loss
        penalty = (share * torch.stack(self._penalties).mean()).to(loss.device, loss.dtype)
        self._auxiliary += penalty.detach()
        return loss + penalty

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Take the auxiliary part out of the loss of a point of the curve, and add the means of the selection."""
        if "loss" in logs:
            mean: Any = partial(self.accelerator.reduce, reduction="mean")
            last = max((point["step"] for point in self.state.log_history if "loss" in point), default=0)
            logs["loss"] -= float(mean(self._auxiliary)) / max(self.state.global_step - last, 1)
            self._auxiliary = torch.zeros_like(self._auxiliary)
            logs |= self._selection.take(mean)
        super().log(logs, start_time)


class LanguageModelTrainer(ZooTrainer):
    """Trainer of a language model on packed rows, which adds "tokens", "aux_loss" and "selection_rate" to the curve.

    The curve's loss excludes the auxiliary loss. "tokens" counts the predictions of all processes since the run began;
    "aux_loss" and "selection_rate" are means over the steps since the last point.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        model: Any = self.model
        self._config: PreTrainedConfig = model.config
        self.first_row = self.first_step = 0  # position in a stream at which this start of the run began
        self._selection = SelectionMeans()
        self._predicted = torch.zeros((), dtype=torch.int64, device=self.args.device)
        self._auxiliary = torch.zeros((), device=self.args.device)  # auxiliary part of the loss since the last point

    def get_train_dataloader(self) -> DataLoader:
        """Return the Trainer's loader, or one for a stream: it does not draw from the model's random numbers."""
        if not isinstance(self.train_dataset, PositionedRows):
            return super().get_train_dataloader()
        rows: Any = DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),
        )
        return self.accelerator.prepare(rows)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Also save the position in a stream, without the rows that were read ahead."""
        super()._save_optimizer_and_scheduler(output_dir)
        if isinstance(self.train_dataset, PositionedRows) and self.args.should_save:
            in_a_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            row = self.first_row + (self.state.global_step - self.first_step) * in_a_step
            write_json(Path(output_dir) / STREAM, self.train_dataset.position(row))

    def restore_stream(self, checkpoint: Path) -> None:
        """Set a stream to the position that a checkpoint has."""
        if isinstance(self.train_dataset, PositionedRows):
            position = read_json_object(checkpoint / STREAM)
            self.train_dataset.go_to(position)
            self.first_row, self.first_step = position["row"], steps_done(checkpoint)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the Trainer's loss and record the auxiliary part of it, which each forward pass of a step shares."""
        # Before the loss is computed: the Trainer takes the labels out of the inputs if it computes it.
        targets = inputs["labels"] if self._config.is_encoder_decoder else inputs["labels"][:, 1:]
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        self._predicted += (targets != IGNORED).sum()
        self._selection.add(outputs)
        nothing = torch.zeros_like(self._auxiliary)
        self._auxiliary += add_aux_loss(nothing, outputs, self._config, targets, num_items_in_batch).detach()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add the values of this class to a point of the curve."""
        if "loss" in logs:
            measured = self._selection.take(partial(self.accelerator.reduce, reduction="mean"))
            last = max((point["step"] for point in self.state.log_history if "loss" in point), default=0)
            auxiliary: Any = self.accelerator.reduce(self._auxiliary, reduction="sum")
            logs["loss"] -= float(auxiliary) / max(self.state.global_step - last, 1)
            self._auxiliary = torch.zeros_like(self._auxiliary)
            before = max((point.get("tokens", 0) for point in self.state.log_history), default=0)
            predicted: Any = self.accelerator.reduce(self._predicted, reduction="sum")
            self._predicted = torch.zeros_like(self._predicted)
            logs |= {"tokens": before + int(predicted), **measured}
        super().log(logs, start_time)


class CurveCallback(TrainerCallback):
    """Adds the seconds of training to every point of the curve, and measures the held-out loss during training.

    Args:
        evaluate: measures the held-out loss; None: it is not measured.
        every: steps between two measurements; there is none at the last step.
    """

    def __init__(self, evaluate: Callable[[str], dict[str, Any]] | None = None, every: int | None = None) -> None:
        self._evaluate, self._every = evaluate, every

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before = max((point.get("seconds", 0.0) for point in state.log_history), default=0.0)
        self._started = time.monotonic() - before

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if self._evaluate and self._every and step % self._every == 0 and step < state.max_steps:
            begun = time.monotonic()
            # The Trainer saves its history with every checkpoint.
            state.log_history.append({"step": step, "evaluation": self._evaluate(f"step {step}")})
            self._started += time.monotonic() - begun

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        point = state.log_history[-1]
        if "loss" in point:
            point["seconds"] = time.monotonic() - self._started
            check_numbers(point, f"step {state.global_step}")


def train(
    run: TrainingRun[Any],
    evaluate_every: int | None = None,
    make_trainer: Callable[..., "LanguageModelTrainer"] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train a language model, from the last complete checkpoint if there is one.

    Args:
        run: the run; its model is trained in place.
        evaluate_every: steps between two held-out losses during training; None: there are none.
        make_trainer: makes the Trainer with the arguments of `LanguageModelTrainer`; None: that class.

    Returns:
        The points of the curve, and the held-out losses during training, each with its "step".

    Raises:
        ValueError: if the loss is not finite.
    """
    settings = run.settings
    streamed = isinstance(run.rows.train, PositionedRows)
    trainer = (make_trainer or LanguageModelTrainer)(
        model=run.model,
        args=TrainingArguments(
            gradient_accumulation_steps=settings.gradient_accumulation,
            **trainer_arguments(settings, run.steps, run.output, run.device),
            **(_STREAMED if streamed else {}),
        ),
        train_dataset=run.rows.train,
        data_collator=run.collator,
        callbacks=[CurveCallback(run.evaluate, evaluate_every)],
    )
    found = last_checkpoint(run.output / CHECKPOINTS, main=run.state.is_main_process)
    if found is not None:
        trainer.restore_stream(found)
    run.model, points = train_or_load(trainer, found, run.steps)
    return curve_of(points), [
        {"step": point["step"], **point["evaluation"]} for point in points if "evaluation" in point
    ]


def trainer_arguments(settings: RunSettings, steps: int, output: Path, device: torch.device) -> dict[str, Any]:
    """Return the arguments of transformers' `TrainingArguments` for a run with its number of optimiser steps."""
    return {
        **loop_arguments(steps, output, device, settings.checkpoint_every, settings.report_to),
        "per_device_train_batch_size": settings.batch_size,
        **settings.optimisation(steps),
        "bf16": compute_dtype(settings.dtype) == torch.bfloat16,
        **(gradient_checkpointing() if settings.gradient_checkpointing else {}),
        "seed": settings.seed,
        "data_seed": settings.seed,
    }


def loop_arguments(
    steps: int, output: Path, device: torch.device, checkpoint_every: int, report_to: Sequence[str]
) -> dict[str, Any]:
    """Return the arguments of transformers' `TrainingArguments` that all trainings share.

    Args:
        steps: optimiser steps of the whole training.
        output: folder of the run.
        device: device of the training.
        checkpoint_every: steps between two checkpoints.
        report_to: trackers that receive the points of the curve, by transformers' names.
    """
    if "tensorboard" in report_to and os.environ.get(_TENSORBOARD) in (None, *_logged):  # otherwise it is the user's
        os.environ[_TENSORBOARD] = str(output / "tensorboard")
        _logged.append(os.environ[_TENSORBOARD])
    every = math.ceil(steps / HISTORY)
    return {
        "output_dir": str(output / CHECKPOINTS),
        "max_steps": steps,
        "logging_steps": every,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        # Checkpoints are saved at points of the curve: the Trainer does not save the loss since the last point.
        "save_steps": math.ceil(checkpoint_every / every) * every,
        "report_to": list(report_to),
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
    }


def train_or_load(
    trainer: ZooTrainer | CheckedTrainer, found: Path | None, steps: int
) -> tuple[Any, list[dict[str, Any]]]:
    """Train for a number of steps, or load the result if a checkpoint already has it.

    Args:
        trainer: trainer made with :func:`loop_arguments`; its model is trained in place.
        found: the last complete checkpoint, or None.
        steps: optimiser steps of the whole training.

    Returns:
        The trained model, whole in every process, and the Trainer's history.

    Raises:
        ValueError: if the loss, the gradient or the trained weights are not finite.
    """
    if found is not None and (steps_done(found) >= steps or trainer.sharding.fsdp):
        trainer._load_from_checkpoint(str(found))
    if found is None or steps_done(found) < steps:
        trainer.train(resume_from_checkpoint=None if found is None else str(found))
        history = trainer.state.log_history
    else:  # the Trainer would do one more step
        history = read_json_or_none(found / _STATE)["log_history"]
    model = trainer.whole_model()
    trainer.keep_use_cache(model)
    check_finite(model, f"{trainer.stage_name}the trained model", "Lower learning_rate.")
    return model, history


def curve_of(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the points of the curve in the Trainer's history."""

    def of_objectives(point: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in point.items() if key.startswith(("loss/", "samples/", "rate/"))}

    points = [point for point in history if "loss" in point]
    return [{key: point[key] for key in _POINT if key in point} | of_objectives(point) for point in points]


def gradient_checkpointing() -> dict[str, Any]:
    """Return the Trainer's arguments for gradient checkpointing, which transformers 5.23 renamed."""
    new = "activation_checkpointing" in {field.name for field in fields(TrainingArguments)}
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def set_gradient_checkpointing(model: Any, on: bool) -> None:
    """Turn gradient checkpointing of a model on, as the Trainer does with :func:`gradient_checkpointing`, or off."""
    (name, _), (_, options) = gradient_checkpointing().items()
    if on:
        getattr(model, f"{name}_enable")(options)
    else:
        getattr(model, f"{name}_disable")()
