"""Two processes, with whole weights or with FSDP2, distil as one does, in every kind of stage, and continue for it."""

import json
from pathlib import Path
from typing import Any

import distill_in_processes
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sweeps import SWEEPING
from teachers import make_teacher, save_teacher, small_text, small_tokenizer
from two_processes import launch

from ssm_zoo.distill.precompute import precompute_logits
from ssm_zoo.distill.pseudo_labels import FOLDER
from ssm_zoo.distill.recipe import parse_recipe

TEMPLATE = "{% for message in messages %}{{ message.role[0] }}: {{ message.content }}\n{% endfor %}"
ALIGN = {"objective": "hidden_state_alignment", "tokens": 256}
LOGITS = {"objective": "logit_distillation", "tokens": 320}
RATES = {"norm_learning_rate": 2e-3, "mlp_learning_rate": 5e-4, "embedding_learning_rate": 3e-4, "train": "all"}
STAGES: dict[str, list[dict[str, Any]]] = {
    # Answers of conversations are learnt, by a head that is untied.
    "chat": [
        {**ALIGN, "name": "mixers", "stream": "student"},
        {**ALIGN, "name": "blocks", "stream": "student", "target": "block_output", "train": "all", "weight_decay": 0.1},
        {**LOGITS, "name": "states", "objective": "last_state_alignment", "train": "mixers+norms"},
        {**LOGITS, **RATES, "name": "answers", "kl": "jsd", "jsd_beta": 0.3, "temperature": 2.0, "ce_weight": 0.2},
    ],
    "stored": [
        {**ALIGN, "name": "outputs"},
        {**ALIGN, "name": "own", "stream": "student", "refit": "ridge"},
        {**LOGITS, **RATES, "name": "logits", "kl": "mixed", "repeats": 0.5},
    ],
    # Layers that are converted step by step, adapters, and text that the teacher writes.
    "steps": [
        {**ALIGN, "name": "maps", "layers": [3], "train": "feature_maps"},
        {**LOGITS, "name": "adapters", "layers": [3], "train": "lora", "lora_rank": 2, "text": "teacher"},
        {**LOGITS, "name": "whole", "train": "all", "text": "teacher", "ce_weight": 0.5},
    ],
}

_HOWS = ("ddp", "fsdp")
RUNS = [f"{name}-{how}" for name in STAGES for how in _HOWS if SWEEPING or (name, how) != ("steps", "fsdp")]
# Runs that one process begins, two continue and one ends: the recipe, and where the first two stop.
PARTS = {f"stored-{how}-parts": ("stored", "outputs/3", "logits/3") for how in _HOWS}
PARTS["steps-ddp-parts"] = ("steps", "text/1", "adapters/3")
if SWEEPING:
    PARTS["steps-fsdp-parts"] = ("steps", "text/1", "adapters/3")
    PARTS["steps-ddp-late"] = ("steps", "maps/3", "whole/3")


def recipe_of(name: str) -> dict[str, Any]:
    chat = name == "chat"
    text = "chat.jsonl" if chat else "text.txt"
    student = {"feature_map": "hedgehog"} if name == "steps" else {}
    data: dict[str, Any] = {"examples": "messages"} if chat else {}
    if name == "steps":
        data["pseudo_labels"] = {"tokens": 150, "prompt_length": 4, "batch_size": 2}
    return {
        "teacher": "teacher",
        "student": {"layers": "odd", "half_life": [1, 8], "calibration_tokens": 128, "untie": chat, **student},
        "data": {"train": text, "heldout": text, "sequence_length": 16, **data},
        "stages": [{"batch_size": 4, "learning_rate": 1e-3, **stage} for stage in STAGES[name]],
        "evaluation": {"tokens": 64, "prompts": [], "final": False},
        "checkpoint_every": 2,
    } | ({"stored_logits": "logits"} if name == "stored" else {})


def conversations() -> str:
    """Rows with a short question and a long answer, and with a long question and a short answer, in turns."""
    lines = small_text(80, seed=1).splitlines()
    rows = []
    for index, (long, short) in enumerate(zip(lines[::2], lines[1::2], strict=True)):
        texts = [short[:4], " ".join([long] * 2)]
        question, answer = texts if index % 2 else reversed(texts)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": turns}))
    return "\n".join(rows)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of both recipes in one process and in two, and one that was continued in another number."""
    folder = tmp_path_factory.mktemp("processes")
    tokenizer = small_tokenizer()
    save_teacher(folder / "teacher", make_teacher(tie_word_embeddings=True))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "teacher")
    tokenizer.chat_template = None
    (folder / "chat.jsonl").write_text(conversations(), encoding="utf-8")
    (folder / "text.txt").write_text(small_text(80, seed=1), encoding="utf-8")
    for name in STAGES:
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe_of(name)), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        values = recipe_of("stored")
        del values["stored_logits"]
        precompute_logits(parse_recipe(values), "logits", top_k=12)
        for name in STAGES:
            distill_in_processes.run_until(name, f"{name}-one", "-")
        for run, (name, stop, _) in PARTS.items():
            distill_in_processes.run_until(name, run, stop)
        jobs = []
        for how in ("ddp", "fsdp"):
            jobs += ["fsdp"] if how == "fsdp" else []
            jobs += [f"{run.partition('-')[0]}:{run}:-" for run in RUNS if run.endswith(how)]
            jobs += [f"{name}:{run}:{stop}" for run, (name, _, stop) in PARTS.items() if f"-{how}-" in run]
        said = launch(Path(distill_in_processes.__file__), folder, *jobs)
        # In each stage of the runs that share weights, whole or begun by one process.
        stages = {"chat-fsdp": 4, "stored-fsdp": 3, "stored-fsdp-parts": 3, "steps-fsdp": 3, "steps-fsdp-parts": 2}
        sharded = sum(count for run, count in stages.items() if run in RUNS or run in PARTS)
        assert said.count("the weights are sharded over 2 processes by FSDP2") == sharded
        for run, (name, *_) in PARTS.items():
            distill_in_processes.run_until(name, run, "-")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("run", [*RUNS, *PARTS])
def test_two_processes_distil_as_one(run: str, place: Path) -> None:
    name = run.partition("-")[0]
    one, two = (json.loads((place / folder / "report.json").read_text()) for folder in (f"{name}-one", run))
    assert [one["processes"], two["processes"]] == [1, 1 if run in PARTS else 2]
    for expected, stage in zip(one["stages"], two["stages"], strict=True):
        for key in ("loss", "learning_rate", "gradient_norm"):
            found = [[point[key] for point in part["history"]] for part in (stage, expected)]
            assert len(found[0]) > 3 and found[0] == pytest.approx(found[1], rel=1e-5), (stage["name"], key)
    for expected, row in zip(one["evaluations"], two["evaluations"], strict=True):
        found = [{key: part[key] or 0 for key in ("loss", "kl")} for part in (row, expected)]
        assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-6), row["name"]
    expected, found = (load_file(place / folder / "student" / "model.safetensors") for folder in (f"{name}-one", run))
    assert found.keys() == expected.keys() and ("lm_head.weight" in found) == (name == "chat")
    for key, tensor in expected.items():
        # In norm: AdamW turns the rounding of single gradients near zero into steps of the learning rate.
        assert torch.dist(found[key], tensor) <= 1e-5 * tensor.norm(), key


@pytest.mark.slow
@pytest.mark.parametrize("run", ["chat-one", "chat-ddp", "chat-fsdp", "stored-fsdp"])
def test_layers_keep_nothing_for_one_another(run: str, place: Path) -> None:
    found = json.loads((place / f"{run}.saved.json").read_text())
    # Two layers in each of four steps of two stages.
    assert len(found["at_layers"]) == 16 and not any(found["at_layers"])
    assert len(found["of_steps"]) == 8 and all(most > 10 for most in found["of_steps"])


@pytest.mark.slow
@pytest.mark.parametrize("run", ["stored-ddp", "stored-fsdp"])
def test_each_process_reads_its_own_stored_logits(run: str, place: Path) -> None:
    one, two = (json.loads((place / f"{run}.rows-{process}.json").read_text()) for process in (0, 1))
    # Five steps of four windows, the first two of each for the first process.
    assert one == [4 * step + item for step in range(5) for item in (0, 1)]
    assert two == [4 * step + item for step in range(5) for item in (2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("run", [run for run in (*RUNS, *PARTS) if run.startswith("steps")])
def test_two_processes_write_the_files_of_the_teachers_text_that_one_writes(run: str, place: Path) -> None:
    found = [
        {path.name: path.read_bytes() for path in (place / name / FOLDER).iterdir()} for name in ("steps-one", run)
    ]
    assert found[0] == found[1] and len(found[0]) >= 5
    if run in RUNS:
        wrote = [json.loads((place / f"{run}.wrote-{process}.json").read_text()) for process in (0, 1)]
        assert sorted(wrote[0] + wrote[1]) == list(range(len(found[0]))) and min(map(len, wrote)) >= 2
