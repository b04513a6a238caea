"""Multiple choice under four orders: the questions, and the scores of models whose answers are known."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from teachers import make_teacher
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from ssm_zoo.evaluation.multiple_choice import compare_choices, draw_questions, multiple_choice
from ssm_zoo.modeling.cache import CACHE_FIELD

FIRST = 20  # ids below it are the fixed words of a question
WORDS = ["A", "B", "C", "D", ":", "Answer", "Which", "text", "comes", "next", "?", "[UNK]"]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


def text(tokens: int = 900) -> Tensor:
    """Return a text in which each token is one more than the one before it."""
    return torch.arange(FIRST, FIRST + tokens)


class Counter(nn.Module):
    """A model that knows how the text goes on: it says the letter of the option that begins with passage's end + 1.

    Args:
        passage: tokens of a passage.
        always: the letter that it says instead, by its number.
    """

    def __init__(self, passage: int, always: int | None = None) -> None:
        super().__init__()
        self.config = LlamaConfig(num_hidden_layers=1, vocab_size=1000)
        self.device, self.passage, self.always = torch.device("cpu"), passage, always
        self.most = 0

    def forward(self, input_ids: Tensor, **fields: Any) -> Any:
        ids = input_ids[:, None, :, None].float()
        read = fields[CACHE_FIELD].update(ids, ids, 0)[0][:, 0, :, 0].long()
        self.most = max(self.most, read.shape[1])
        logits = torch.zeros(len(read), 1, 1000)
        for row, seen in enumerate(read.tolist()):
            if len(seen) == self.passage:
                continue
            wanted = seen[self.passage - 1] + 1
            begins = [seen.index(letter, self.passage) + 2 for letter in range(4)]
            letter = [seen[place] for place in begins].index(wanted)
            logits[row, 0, letter if self.always is None else self.always] = 1.0
        return SimpleNamespace(logits=logits)


def test_a_question_is_a_passage_its_continuation_and_three_other_texts() -> None:
    drawn = draw_questions(text(), 5, passage=30, option=6, seed=3)
    assert drawn.passages.shape == (5, 30) and drawn.options.shape == (5, 4, 6)
    assert drawn.passages[0, 0] == FIRST and drawn.passages[-1, -1] == FIRST + 900 - 6 - 1  # from end to end
    for passage, options, answer in zip(drawn.passages, drawn.options, drawn.answers, strict=True):
        assert options[answer].tolist() == list(range(int(passage[-1]) + 1, int(passage[-1]) + 7))
        tokens = torch.cat([passage, options.flatten()]).tolist()
        assert len(set(tokens)) == len(tokens)  # nothing overlaps
    again, other = (draw_questions(text(), 5, passage=30, option=6, seed=seed) for seed in (3, 4))
    assert torch.equal(again.options, drawn.options) and not torch.equal(other.options, drawn.options)


def test_no_option_goes_from_one_side_of_the_passage_to_the_other() -> None:
    drawn = draw_questions(text(64), 40, passage=7, option=5)
    assert drawn.options.diff().unique().tolist() == [1]
    for passage, options in zip(drawn.passages, drawn.options, strict=True):
        tokens = torch.cat([passage, options.flatten()]).tolist()
        assert len(set(tokens)) == len(tokens)


def test_a_model_that_knows_the_text_is_right_in_every_order_and_reads_each_text_by_itself() -> None:
    drawn = draw_questions(text(), 6, passage=30, option=5)
    model: Any = Counter(30)
    found = multiple_choice(model, tokenizer(), drawn)
    assert found is not None
    assert found["questions"] == 6 and found["accuracy"] == found["consistency"] == 1.0
    assert found["accuracies"] == [1.0] * 4 and found["letters"] == [0.25] * 4
    assert found["choices"] == [[answer] * 4 for answer in drawn.answers.tolist()]
    # Five words and a question mark, four letters with their colons and options, "Answer:".
    assert model.most == 30 + 5 + 4 * (2 + 5) + 2
    assert multiple_choice(model, tokenizer(), drawn, limit=model.most) == found
    assert multiple_choice(model, tokenizer(), drawn, limit=model.most - 1) is None


def test_a_model_that_always_says_the_same_letter_is_at_chance_and_never_consistent() -> None:
    drawn = draw_questions(text(), 6, passage=30, option=5)
    model: Any = Counter(30, always=2)
    found = multiple_choice(model, tokenizer(), drawn)
    assert found is not None
    assert found["accuracy"] == 0.25 and found["consistency"] == 0.0 and found["letters"] == [0.0, 0.0, 1.0, 0.0]
    assert found["choices"] == [[2, 3, 0, 1]] * 6
    assert compare_choices(found["choices"], [[answer] * 4 for answer in drawn.answers.tolist()]) == 0.25


def test_the_choices_of_a_transformer_are_those_of_whole_texts_without_a_cache() -> None:
    model: Any = AutoModelForCausalLM.from_config(make_teacher().config).eval()
    words, ids = tokenizer(), torch.randint(20, 250, (400,), generator=torch.Generator().manual_seed(2))
    drawn = draw_questions(ids, 3, passage=20, option=4)
    found = multiple_choice(model, words, drawn)
    assert found is not None

    def tokens(part: str) -> list[int]:
        return words(part, add_special_tokens=False)["input_ids"]

    letters = [tokens(f"Answer: {letter}")[-1] for letter in "ABCD"]
    for passage, options, chosen in zip(drawn.passages, drawn.options, found["choices"], strict=True):
        for order in range(4):
            whole = [*passage.tolist(), *tokens("\n\nWhich text comes next?\n")]
            for number, letter in enumerate("ABCD"):
                whole += [*tokens(f"{letter}:"), *options[(number + order) % 4].tolist(), *tokens("\n")]
            whole += tokens("Answer:")
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([whole])).logits[0, -1, letters]
            assert chosen[order] == (int(logits.argmax()) + order) % 4


def test_letters_that_are_no_token_of_their_own_leave_the_questions_out() -> None:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "Answer:": 1}, unk_token="[UNK]"))
    none = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    model: Any = Counter(30)
    assert multiple_choice(model, none, draw_questions(text(), 2, passage=30, option=5)) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"questions": 0}, "`questions` must be at least 1, got 0"),
        ({"questions": 2, "passage": 0}, "`passage` must be at least 1, got 0"),
        ({"questions": 2, "option": -1}, "`option` must be at least 1, got -1"),
        ({"questions": 2, "passage": 90, "option": 10}, "`text` must have at least 180 tokens, got 100"),
    ],
)
def test_bad_arguments_raise(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_questions(text(100), **arguments)
    with pytest.raises(ValueError, match="`reference` must have as many choices, one or more, got 0 for 1"):
        compare_choices([[1]], [])
