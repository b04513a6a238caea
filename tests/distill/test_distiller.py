"""What a stage does with its gradients, and the ways to share out its weights that are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import save_llama
from torch import Tensor, nn

from ssm_zoo.distill import run
from ssm_zoo.distill.recipe import parse_recipe
from ssm_zoo.modeling.modeling_hybrid import HybridBlock
from ssm_zoo.training.sharding import clip_gradients

BOUND = 1e-3


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("abcdefgh bcdefgha cdefghab " * 20)
    monkeypatch.chdir(tmp_path)


def distill(objective: str, output: str = "run", **changes: Any) -> dict[str, Any]:
    stage = {"name": "a", "objective": objective, "tokens": 64, "batch_size": 2, "learning_rate": 1e-3}
    recipe = {
        "teacher": "teacher",
        "student": {"layers": "all", "half_life": [1, 8]},
        "data": {"train": "text.txt", "heldout": "text.txt", "sequence_length": 16},
        "stages": [{**stage, "max_grad_norm": BOUND}],
        "evaluation": {"tokens": 32, "prompts": [], "final": False},
        **changes,
    }
    return run.distill(parse_recipe(recipe), output)


@pytest.mark.parametrize(
    "objective", ["matrix_orientation", "hidden_state_alignment", "last_state_alignment", "logit_distillation"]
)
def test_each_layer_is_clipped_by_itself_where_it_is_a_problem_of_its_own(
    objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    students: list[Any] = []
    inner, build = torch.optim.AdamW.step, run.build_student
    monkeypatch.setattr(run, "build_student", lambda *a, **o: students.append(build(*a, **o)) or students[0])
    seen: list[list[float]] = []

    def looking(self: Any, *arguments: Any, **options: Any) -> Any:
        norms = []
        for block in students[0].backbone.layers:
            gradients = [p.grad.flatten() for p in block.parameters() if p.grad is not None]
            norms.append(float(torch.cat(gradients).norm()))
        seen.append(norms)
        return inner(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", looking)
    distill(objective)
    assert len(seen) == 2 and len(seen[0]) > 1
    for norms in seen:
        if objective in ("last_state_alignment", "logit_distillation"):
            assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(BOUND, rel=1e-3)
        else:
            assert norms == pytest.approx([BOUND] * len(norms), rel=1e-3)


def test_clipping_is_torchs() -> None:
    def gradients(scale: float) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [scale * torch.randn(3, 4, generator=generator), scale * torch.randn(5, generator=generator)]

    for scale in (1e-3, 10.0):
        ours, theirs = ([nn.Parameter(torch.zeros_like(g)) for g in gradients(scale)] for _ in range(2))
        for parameters in (ours, theirs):
            for parameter, gradient in zip(parameters, gradients(scale), strict=True):
                parameter.grad = gradient
        idle = nn.Parameter(torch.zeros(2))
        norm = clip_gradients([*ours, idle], 1.0)
        assert torch.equal(norm, nn.utils.clip_grad_norm_(theirs, 1.0))
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.grad is not None and other.grad is not None and torch.equal(mine.grad, other.grad)
        assert idle.grad is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        pytest.param(
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            r"`stages.0.objective` must be 'logit_distillation' or .* under DeepSpeed, .*, got 'matrix_orientation'",
            id="DeepSpeed",
        ),
        pytest.param({"ACCELERATE_USE_FSDP": "true"}, "`fsdp_version` must be 2, got 1", id="FSDP"),
        pytest.param({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "`fsdp_version` must be 2", id="FSDP 1"),
    ],
)
def test_what_cannot_share_out_the_weights_is_refused_before_anything_is_written(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distill("matrix_orientation")
    assert not Path("run").exists()


def test_masters_are_float32_under_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 1e-5, which are lost in bfloat16, change every weight."""
    moved: list[Tensor] = []
    inner = torch.optim.AdamW.step

    def looking(self: Any, *arguments: Any, **options: Any) -> Any:
        weights = [weight for group in self.param_groups for weight in group["params"] if weight.grad is not None]
        before = [weight.detach().clone() for weight in weights]
        result = inner(self, *arguments, **options)
        assert {weight.dtype for weight in weights} == {torch.float32}
        assert {state.dtype for each in self.state.values() for state in each.values()} == {torch.float32}
        moved.extend((weight.detach() - old).abs() for weight, old in zip(weights, before, strict=True))
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", looking)
    stage = {"name": "a", "objective": "logit_distillation", "tokens": 64, "batch_size": 2, "learning_rate": 1e-5}
    options = {"train": "all", "schedule": "constant", "warmup": 0.0}
    report = distill("logit_distillation", stages=[{**stage, **options}], dtype="bfloat16")
    assert report["recipe"]["dtype"] == "bfloat16" and len(moved) > 10
    assert all(step.max() > 1e-6 for step in moved) and max(step.max() for step in moved) < 1e-4
    tensors = load_file(Path("run", "student", "model.safetensors"))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    large = tensors["backbone.layers.0.mlp.gate_proj.weight"]
    assert not torch.equal(large, large.bfloat16().float())


def test_a_layerwise_stage_recomputes_nothing_after_one_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[bool]] = {}
    students: list[Any] = []
    build, inner = run.build_student, torch.optim.AdamW.step
    monkeypatch.setattr(run, "build_student", lambda *a, **o: students.append(build(*a, **o)) or students[0])

    def looking(self: Any, *arguments: Any, **options: Any) -> Any:
        on = any(getattr(module, "gradient_checkpointing", False) for module in students[0].modules())
        seen.setdefault(str(self.param_groups[0]["betas"][0]), []).append(on)
        return inner(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", looking)
    stage = {"tokens": 64, "batch_size": 2, "learning_rate": 1e-3}
    stages = [
        {**stage, "name": "whole", "objective": "logit_distillation", "betas": [0.8, 0.9]},
        {**stage, "name": "layers", "objective": "hidden_state_alignment", "betas": [0.7, 0.9]},
    ]
    distill("", stages=stages, gradient_checkpointing=True)
    assert seen == {"0.8": [True, True], "0.7": [False, False]}


def test_gradient_checkpointing_changes_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = distill("logit_distillation", "plain")
    ran: list[bool] = []
    inner = HybridBlock.forward
    monkeypatch.setattr(HybridBlock, "forward", lambda *a, **o: ran.append(torch.is_grad_enabled()) or inner(*a, **o))
    less = distill("logit_distillation", "less", gradient_checkpointing=True)
    losses = [[point["loss"] for point in report["stages"][0]["history"]] for report in (plain, less)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    # Two steps, each block once in the backward with gradients, and once before it or in an evaluation.
    assert ran.count(True) >= 2 * len(plain["student"]["layers"])
    assert less["recipe"]["gradient_checkpointing"] is True and "gradient_checkpointing" not in plain["recipe"]
    configs = [Path(name, "student", "config.json").read_text(encoding="utf-8") for name in ("plain", "less")]
    assert configs[0] == configs[1]
