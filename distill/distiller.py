"""Train one stage of a distillation: the training loop of `training/` with a recipe's objectives and optimiser."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, SequentialSampler, default_collate
from transformers import ProgressCallback, TrainingArguments

from ..harness.json_files import json_text
from ..modeling import ZooHybridForCausalLM
from ..training.sharding import clip_gradients
from ..training.trainer import (
    CHECKPOINTS,
    CurveCallback,
    ZooTrainer,
    gradient_checkpointing,
    loop_arguments,
    set_gradient_checkpointing,
)
from .adapters import PART, plain_name
from .data import TokenWindows, derived_seed, repeat_a_passage
from .healing import healed_parameters
from .objectives import objective
from .recipe import Recipe
from .stages import GROUP_RATES, StageSpec
from .stored_logits import StoredLogits, tokens_before
from .teacher import Teacher

FEATURE_MAPS = (".B_features", ".C_features", ".q_features", ".k_features", ".window_factors")
"""Last parts of the names of learned feature maps, and of the factors that weigh a window against them."""
WEIGHTS, PROGRESS = "model.safetensors", "progress.json"
"""Names of the files in a checkpoint with the student's weights and the measurements."""


class StudentInStage(nn.Module):
    """A student with a stage's objective: its forward returns the loss of token ids.

    Wrappers that average or shard gradients wrap this module, so that they see every use of a weight.

    Args:
        student: the model to train.
        stage: the stage with the objective.
        teacher: the teacher, which is whole in every process and not part of this module.
        layers: converted layers.
        learnt_share: share of the training text's tokens that are learnt, if there is a choice.
    """

    def __init__(
        self,
        student: ZooHybridForCausalLM,
        stage: StageSpec,
        teacher: Teacher,
        layers: Sequence[int],
        learnt_share: float | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self._no_split_modules = student._no_split_modules
        self._loss = objective(stage, student, teacher, layers, learnt_share)

    def forward(
        self,
        input_ids: Tensor,
        learnt: Tensor | None = None,
        top_ids: Tensor | None = None,
        top_log_probs: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of (B, L) token ids; the others are for logit distillation, see :func:`objective`."""
        given = {"learnt": learnt, "top_ids": top_ids, "top_log_probs": top_log_probs}
        return self._loss(input_ids, **{name: part for name, part in given.items() if part is not None})

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Enable gradient checkpointing of the student; the Trainer of transformers 5.23 or later calls this."""
        student: Any = self.student
        student.activation_checkpointing_enable(activation_checkpointing_kwargs, **options)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Enable gradient checkpointing of the student; an older Trainer calls this."""
        self.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs)


@dataclass(frozen=True)
class StageWindows(Dataset[dict[str, Tensor]]):
    """The windows that a stage reads, in order, after those of the stages before it.

    Attributes:
        windows: the text that the stage reads.
        stages: stages of the recipe.
        index: index of the stage.
        seed: seed of the order.
        stored: the teacher's logits for the windows, if they are stored.
    """

    windows: TokenWindows
    stages: Sequence[StageSpec]
    index: int
    seed: int
    stored: StoredLogits | None = None

    def __len__(self) -> int:
        stage = self.stages[self.index]
        return stage.steps * stage.batch_size

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        stage = self.stages[self.index]
        read = tokens_before(self.stages, self.index)
        # Number of steps of this stage's size that cover what the stages before it read of its text.
        steps = -(-read // (stage.batch_size * stage.sequence_length))
        position = steps * stage.batch_size + item
        place = (position, stage.sequence_length, self.seed)
        row = {"input_ids": self.windows.window(*place)}
        learnt = self.windows.learnt(*place)
        if learnt is not None and stage.objective == "logit_distillation":
            row["learnt"] = learnt
        # Spread evenly: the whole part of item * share grows by one in each window with a repetition.
        if int((item + 1) * stage.repeats) > int(item * stage.repeats):
            seed = derived_seed(self.seed, self.index, item)
            row = {name: repeat_a_passage(part, seed) for name, part in row.items()}
        if self.stored is not None and stage.reads_predictions:
            row |= self.stored.row(self.index, item)  # of the window with its repetition
        return row


class Distiller(ZooTrainer):
    """Trains a student in one stage of a recipe.

    A layer-wise objective is a separate problem for each layer: the gradient of each layer is clipped separately, so
    that an outlier in one layer does not shrink the steps of the others.

    Args:
        student: student to train in place; a sharded one is copied.
        teacher: its teacher.
        layers: layers that are converted in the stage.
        windows: the text that the stage reads.
        recipe: the recipe.
        index: index of the stage.
        output: folder of the run.
        processes: number of processes that share a batch.
        device: device of the training.
        progress: measurements to save with every checkpoint, as values that JSON can represent.
        stored: the teacher's logits, if they are stored.
        waiting: parameters of mixers that a later stage converts, by name; they are saved with every checkpoint.
    """

    def __init__(
        self,
        student: ZooHybridForCausalLM,
        teacher: Teacher,
        layers: Sequence[int],
        windows: TokenWindows,
        recipe: Recipe,
        index: int,
        output: Path,
        processes: int,
        device: torch.device,
        progress: dict[str, Any],
        stored: StoredLogits | None = None,
        waiting: Mapping[str, Tensor] | None = None,
    ) -> None:
        stage = recipe.stages[index]
        self._waiting = dict(waiting or {})
        self._stage, self._index, self._layers, self._progress = stage, index, layers, progress
        self._every = saved_parameters(student, recipe, layers).keys()
        self.stage_name = f"stages.{stage.name}: "
        self._norms: list[float] = []
        mixers, others = trained_parameters(student, stage.train, layers)
        student.requires_grad_(False)
        for parameter in (*mixers.values(), *others.values()):
            parameter.requires_grad_(True)
        whole = not stage.layerwise  # a single layer needs little memory
        if recipe.gradient_checkpointing and not whole:
            set_gradient_checkpointing(student, False)  # an earlier stage may have turned it on
        super().__init__(
            model=StudentInStage(student, stage, teacher, layers, windows.learnt_share),
            args=TrainingArguments(
                **loop_arguments(stage.steps, output, device, recipe.checkpoint_every, recipe.report_to),
                **(gradient_checkpointing() if whole and recipe.gradient_checkpointing else {}),
                per_device_train_batch_size=stage.batch_size // processes,
                max_grad_norm=stage.max_grad_norm,
                ddp_broadcast_buffers=False,  # all are constant, and attention that waits consists of buffers
                bf16=recipe.dtype == "bfloat16",
                seed=recipe.seed,
                disable_tqdm=False,
            ),
            train_dataset=StageWindows(windows, recipe.stages, index, recipe.seed, stored),
            data_collator=default_collate,
            callbacks=[CurveCallback()],
        )
        self.model_accepts_loss_kwargs = False
        self.remove_callback(ProgressCallback)
        self.add_callback(StageProgress(stage.name))

    @property
    def student(self) -> ZooHybridForCausalLM:
        """The student under training, which may be sharded."""
        model: Any = self.model
        return model.student

    def checkpoint_name(self) -> str:
        return f"checkpoint-{self._index}-{self.state.global_step}"

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        self.optimizer, _ = make_optimizer(
            self._stage, *trained_parameters(self.student, self._stage.train, self._layers)
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        stage, chosen = self._stage, optimizer or self.optimizer
        assert chosen is not None
        self.lr_scheduler = LambdaLR(chosen, lambda step: schedule_factor(stage, min(step, stage.steps - 1)))
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        """Read the windows in order, since the data set is already shuffled."""
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(rows)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = model(**inputs)
        return (loss, {}) if return_outputs else loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if not self._stage.layerwise:
            return super()._clip_grad_norm(model)
        blocks = [self.student.backbone.layers[layer] for layer in self._layers]
        norms = [float(clip_gradients(block.parameters(), self._stage.max_grad_norm)) for block in blocks]
        return math.sqrt(sum(norm**2 for norm in norms))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._norms.append(float(norm))
        return norm

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Also average the gradient norm over the steps since the last point of the curve."""
        if "loss" in logs:
            logs["grad_norm"] = sum(self._norms) / len(self._norms)
            self._norms = []
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            model: Any = self.model
            whole = model.state_dict() if state_dict is None else state_dict
            weights = {plain_name(name): whole[f"student.{name}"] for name in self._every}
            write_progress(Path(output_dir), weights | self._waiting, self._progress)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load nothing: the student was restored from the checkpoint before the Trainer was created."""


class StageProgress(ProgressCallback):
    """Progress bar of a stage, with its loss."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self._name)
            self.training_bar.update(state.global_step)
        self.current_step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}")


def saved_parameters(student: ZooHybridForCausalLM, recipe: Recipe, layers: Sequence[int]) -> dict[str, Tensor]:
    """Return every parameter that calibration or a stage changes, by name."""
    saved, _ = trained_parameters(student, "mixers", layers)
    for stage in recipe.stages:
        mixers, others = trained_parameters(student, stage.train, layers)
        saved |= mixers | others
    if recipe.is_healed:
        saved |= healed_parameters(student, layers)
    return saved


def write_progress(folder: Path, weights: dict[str, Tensor], progress: dict[str, Any]) -> None:
    """Write the student's part of a checkpoint into its folder."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
    (folder / PROGRESS).write_text(json_text(progress, "progress", indent=None), encoding="utf-8")


def read_progress(folder: Path) -> dict[str, Any]:
    """Read the measurements that :func:`write_progress` wrote."""
    return json.loads((folder / PROGRESS).read_text(encoding="utf-8"))


def refuse_old_checkpoints(output: Path) -> None:
    """Raise a ValueError if a run's folder has checkpoints in the format of an earlier version."""
    old = next((path for path in (output / CHECKPOINTS).glob("checkpoint-*/state.json")), None)
    if old is not None:
        remedy = "Finish the run with that version, or give another folder to start again."
        if (output / "report.json").is_file():
            remedy = f"The run has finished: use {output / 'student'}, or give another folder to start again."
        raise ValueError(
            f"output folder: {old.parent} was written by an earlier version of ssm-zoo, in another format. {remedy}"
        )


def trained_parameters(
    student: ZooHybridForCausalLM, train: str, layers: Sequence[int]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the parameters that a stage trains, by name: those of the new mixers, and all others.

    Args:
        student: the student.
        train: as in the stage's specification.
        layers: converted layers.
    """
    prefixes = tuple(f"backbone.layers.{layer}.mixer." for layer in layers)
    chosen = {"feature_maps": lambda name: name.endswith(FEATURE_MAPS), "lora": lambda name: PART in name}
    mixers: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, parameter in student.named_parameters():
        if name.startswith(prefixes):
            if train not in chosen or chosen[train](name):
                mixers[name] = parameter
        elif train == "all" or (train == "mixers+norms" and group_of(name) == "norms"):
            others[name] = parameter
    return mixers, others


def group_of(name: str) -> str:
    """Return the group of a weight outside of the new mixers: a key of `GROUP_RATES`, or "other" (attention)."""
    if "norm" in name.rsplit(".", 2)[-2]:
        return "norms"
    if ".mlp." in name:
        return "mlps"
    embeddings = ("backbone.embeddings.", "backbone.position_embeddings.", "lm_head.")
    return "embeddings" if name.startswith(embeddings) else "other"


def make_optimizer(
    stage: StageSpec, mixers: dict[str, Tensor], others: dict[str, Tensor]
) -> tuple[torch.optim.AdamW, list[str]]:
    """Create AdamW for a stage's parameters; decay rates, biases, norms and skips have no weight decay.

    Returns:
        The optimiser, with the peak learning rate in each group, and the parameters' names in its order.
    """
    other_rate = stage.other_learning_rate or stage.learning_rate
    # Weights without a rate of their own stay in one group, whose order the optimisers of earlier runs have.
    kinds: dict[str, dict[str, Tensor]] = {"": {}}
    for name, parameter in others.items():
        group = group_of(name)
        own = group in GROUP_RATES and getattr(stage, GROUP_RATES[group]) is not None
        kinds.setdefault(group if own else "", {})[name] = parameter
    rated = [(mixers, stage.learning_rate)]
    for group, parameters in kinds.items():
        rated.append((parameters, getattr(stage, GROUP_RATES[group]) if group else other_rate))
    groups, names = [], []
    for parameters, rate in rated:
        for decayed in (True, False):
            chosen = [name for name, tensor in parameters.items() if _is_decayed(name, tensor) == decayed]
            if chosen:
                groups.append(
                    {
                        "params": [parameters[name] for name in chosen],
                        "lr": rate,
                        "weight_decay": stage.weight_decay if decayed else 0.0,
                    }
                )
                names += chosen
    return torch.optim.AdamW(groups, betas=stage.betas), names


def _is_decayed(name: str, parameter: Tensor) -> bool:
    """Return whether a parameter has weight decay; the bias of masked mixing is a matrix, of heads and positions."""
    return parameter.dim() > 1 and not name.endswith(".bias")


def schedule_factor(stage: StageSpec, step: int) -> float:
    """Return the learning rate of a step (from 0) as a share of its peak: warm-up, then constant, cosine or WSD."""
    steps, warm = stage.steps, _whole_steps(stage.warmup, stage.steps)
    if step < warm:
        return (step + 1) / warm
    last = stage.final_learning_rate_ratio
    if stage.schedule == "cosine":
        progress = (step - warm) / max(steps - warm - 1, 1)
        return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * progress))
    if stage.schedule == "wsd":
        falling = _whole_steps(stage.decay, steps)
        progress = (step + 1 - (steps - falling)) / max(falling, 1)
        return 1.0 if progress <= 0 else last + (1 - last) * (1 - progress)
    return 1.0


def _whole_steps(share: float, steps: int) -> int:
    """Return a share of the steps, rounded up; 0.07 of 100 steps is 7, although the product is 7.000000000000001."""
    return math.ceil(share * steps - 1e-6)
