"""Text that the teacher writes: what is sampled, how it is read, and that an interrupted run writes the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from teachers import save_teacher, small_text, small_tokenizer, trained_teacher

from ssm_zoo.distill import pseudo_labels as writing
from ssm_zoo.distill.data import TokenWindows, tokenize
from ssm_zoo.distill.distiller import Distiller, StageWindows
from ssm_zoo.distill.pseudo_labels import FOLDER, check_prompts, write_batch
from ssm_zoo.distill.recipe import Recipe, as_mapping, parse_recipe
from ssm_zoo.distill.run import distill
from ssm_zoo.distill.teacher import Teacher

LENGTH, PROMPT = 24, 6
LOGITS = {"objective": "logit_distillation", "tokens": 256, "batch_size": 4, "sequence_length": 16}


def values(folder: Path, text: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    return {
        "teacher": str(folder / "teacher"),
        "student": {"layers": "odd", "half_life": [1, 8]},
        "data": {
            "train": str(folder / "train.txt"),
            "heldout": str(folder / "heldout.txt"),
            "sequence_length": LENGTH,
            **({} if text is None else {"pseudo_labels": text}),
        },
        "stages": [
            {**LOGITS, "name": "theirs", "text": "teacher", "learning_rate": 1e-3, "ce_weight": 0.9},
            {**LOGITS, "name": "ours", "learning_rate": 1e-3},
        ],
        "evaluation": {"tokens": 96, "final": False},
        **changes,
    }


def recipe_of(**text: Any) -> Recipe:
    spec = {"tokens": 200, "prompt_length": PROMPT, "batch_size": 3, **text}
    return parse_recipe(values(Path(), spec))


@pytest.fixture(scope="module")
def train() -> TokenWindows:
    return TokenWindows(tokenize([small_text(100, seed=1)], small_tokenizer(), progress=False))


def texts_of(batch: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Prompt and continuation of each text of a batch."""
    starts = [0, *((batch["learnt"][1:].int() - batch["learnt"][:-1].int()) < 0).nonzero()[:, 0].add(1).tolist()]
    ids = batch["ids"].long().tensor_split(starts[1:])
    learnt = batch["learnt"].tensor_split(starts[1:])
    return [(part[~chosen], part[chosen]) for part, chosen in zip(ids, learnt, strict=True)]


def test_prompts_are_cut_from_the_text_and_continued_by_the_likeliest_tokens(train: TokenWindows) -> None:
    teacher = Teacher(trained_teacher(), small_tokenizer())
    recipe = recipe_of(top_p=1e-6)
    texts = texts_of(write_batch(recipe, teacher, train, 1))
    windows = train.batch(1, 3, PROMPT, 2)
    assert len(texts) == 3
    for (prompt, continuation), window in zip(texts, windows, strict=True):
        assert torch.equal(prompt, window)
        ids = prompt
        for token in continuation:
            with torch.no_grad():
                assert int(teacher.model(ids[None]).logits[0, -1].argmax()) == int(token)
            ids = torch.cat([ids, token[None]])
        assert len(ids) == LENGTH or int(ids[-1]) == small_tokenizer().eos_token_id


def test_a_text_ends_with_its_last_token_and_settings_of_the_model_have_no_effect(train: TokenWindows) -> None:
    plain = write_batch(recipe_of(), Teacher(trained_teacher(), small_tokenizer()), train, 0)
    changed = trained_teacher()
    changed.generation_config.update(top_k=1, repetition_penalty=9.0, temperature=0.01, min_p=0.9, typical_p=0.1)
    changed.generation_config.update(min_new_tokens=9, return_dict_in_generate=True)
    again = write_batch(recipe_of(), Teacher(changed, small_tokenizer()), train, 0)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    other = write_batch(recipe_of(), Teacher(changed, small_tokenizer()), train, 1)
    assert other["ids"].tolist() != plain["ids"].tolist()
    # A token that the teacher wrote early ends the texts from now on.
    first = int(texts_of(plain)[0][1][1])
    changed.generation_config.eos_token_id = first
    ended = texts_of(write_batch(recipe_of(), Teacher(changed, small_tokenizer()), train, 0))
    assert int(ended[0][1][-1]) == first and len(ended[0][1]) <= 2
    for _, continuation in ended:
        assert first not in continuation[:-1].tolist()


def test_a_stage_reads_its_text_from_the_beginning(train: TokenWindows) -> None:
    stages = recipe_of().stages
    learnt = torch.arange(len(train)) % 3 == 0
    windows = TokenWindows(torch.arange(len(train)), learnt)
    ours = StageWindows(train, stages, 1, 0)
    assert torch.equal(ours[0]["input_ids"], train.window(0, 16, 0))
    theirs = StageWindows(windows, stages, 0, 0)[2]
    assert torch.equal(theirs["learnt"], theirs["input_ids"] % 3 == 0)


class _StoppedError(Exception):
    """Ends a run."""


def test_an_interrupted_run_writes_the_same_text_and_trains_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_teacher(tmp_path / "teacher", trained_teacher())
    (tmp_path / "train.txt").write_text(small_text(200, seed=1), encoding="utf-8")
    (tmp_path / "heldout.txt").write_text(small_text(40, seed=9), encoding="utf-8")
    recipe = parse_recipe(values(tmp_path, {"tokens": 200, "prompt_length": PROMPT, "batch_size": 3}))
    texts: list[TokenWindows] = []  # of each stage
    start = Distiller.__init__

    def record(*arguments: Any) -> None:
        texts.append(arguments[4])
        start(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "__init__", record)
        distill(recipe, tmp_path / "whole")
    written = {path.name: path.read_bytes() for path in (tmp_path / "whole" / FOLDER).iterdir()}
    assert len(written) >= 3

    def stop(recipe: Recipe, teacher: Teacher, windows: TokenWindows, number: int) -> Any:
        if number == 2:
            raise _StoppedError
        return write_batch(recipe, teacher, windows, number)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_batch", stop)
        with pytest.raises(_StoppedError):
            distill(recipe, tmp_path / "killed")
    assert len(list((tmp_path / "killed" / FOLDER).iterdir())) == 2
    torch.manual_seed(123)
    distill(recipe, tmp_path / "killed")
    assert {path.name: path.read_bytes() for path in (tmp_path / "killed" / FOLDER).iterdir()} == written
    one, other = (load_file(tmp_path / run / "student" / "model.safetensors") for run in ("whole", "killed"))
    assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []
    assert len(texts) == 2 and texts[0] != texts[1]
    ids = torch.cat([load_file(path)["ids"] for path in sorted((tmp_path / "whole" / FOLDER).iterdir())])[:200]
    assert torch.equal(texts[0].windows(1)[:, 0], ids.long()) and 0.5 < (texts[0].learnt_share or 0) < 1
    damaged = tmp_path / "killed" / FOLDER / "000001.safetensors"
    damaged.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"000001\.safetensors cannot be read: .* Remove it: the run writes it again"):
        distill(recipe, tmp_path / "killed")
    damaged.unlink()
    # A text that was written from another training text is not trained on.
    text = (tmp_path / "train.txt").read_text(encoding="utf-8")
    (tmp_path / "train.txt").write_text(text + small_text(5, seed=2), encoding="utf-8")
    with pytest.raises(ValueError, match=r"data\.train: .*000000\.safetensors was written from another training text"):
        distill(recipe, tmp_path / "killed")
    (tmp_path / "train.txt").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"another recipe \(data\.pseudo_labels\.temperature"):
        distill(
            parse_recipe(
                values(tmp_path, {"tokens": 200, "prompt_length": PROMPT, "batch_size": 3, "temperature": 0.5})
            ),
            tmp_path / "killed",
        )


def test_a_recipe_without_it_is_what_it_was() -> None:
    plain = values(Path(), None)
    del plain["stages"][0]["text"]
    mapping = as_mapping(parse_recipe(plain))
    assert "pseudo_labels" not in mapping["data"] and not any("text" in stage for stage in mapping["stages"])
    mapping = as_mapping(recipe_of())
    assert mapping["data"]["pseudo_labels"]["top_p"] == 1.0 and mapping["stages"][0]["text"] == "teacher"
    assert parse_recipe(mapping) == recipe_of()


TEXT = {"tokens": 200, "prompt_length": PROMPT}


@pytest.mark.parametrize(
    ("text", "change", "message"),
    [
        (None, {}, r"`stages\.0\.text` must be 'train', or data\.pseudo_labels given, got 'teacher'"),
        ({**TEXT, "tokens": 12}, {}, r"`data\.pseudo_labels\.tokens` must be at least stages\.0\.sequence_length = 16"),
        (
            {**TEXT, "prompt_length": 24},
            {},
            r"`data\.pseudo_labels\.prompt_length` must be below data\.sequence_length",
        ),
        ({**TEXT, "top_p": 0}, {}, r"`data\.pseudo_labels\.top_p` must be a number above 0, at most 1, got 0"),
        (TEXT, {"stored_logits": "x"}, r"`stored_logits` must be left out, since logits are not stored for the text"),
        (
            TEXT,
            {"stages": [{**LOGITS, "name": "a", "learning_rate": 1e-3}]},
            r"`data\.pseudo_labels` must be left out, since no stage has text 'teacher'",
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(
    text: dict[str, Any] | None, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse_recipe(values(Path(), text, **change))


def test_prompts_of_conversations_and_a_missing_token_are_refused() -> None:
    recipe = values(Path(), TEXT)
    recipe["data"]["examples"] = "messages"
    with pytest.raises(ValueError, match=r"`data\.pseudo_labels` must be left out with examples 'messages'"):
        parse_recipe(recipe)
    tokenizer = small_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match=r"`data\.pseudo_labels\.prompt_length` must be at least 1, since"):
        check_prompts(recipe_of(prompt_length=0), Teacher(trained_teacher(), tokenizer))
