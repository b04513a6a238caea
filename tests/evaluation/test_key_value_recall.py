"""Key-value recall: the texts, and the scores of models whose answers are known."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from teachers import draw_ids, make_teacher, small_tokenizer
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedTokenizerFast

from ssm_zoo.evaluation.key_value_recall import draw_lists, key_value_recall, word_tokens
from ssm_zoo.modeling.cache import CACHE_FIELD


class Copier(nn.Module):
    """A model that finds the key before the last token in all that it has read, and predicts its value.

    Args:
        reach: how many tokens back it sees; None: all.
    """

    def __init__(self, reach: int | None = None) -> None:
        super().__init__()
        self.config = LlamaConfig(num_hidden_layers=1, vocab_size=320)
        self.device, self.reach = torch.device("cpu"), reach
        self.most = 0

    def forward(self, input_ids: Tensor, **fields: Any) -> Any:
        ids = input_ids[:, None, :, None].float()
        read = fields[CACHE_FIELD].update(ids, ids, 0)[0][:, 0, :, 0].long()
        self.most = max(self.most, read.shape[1])
        logits = torch.zeros(len(read), 1, 320)
        for row, text in enumerate(read):
            seen = text if self.reach is None else text[-self.reach :]
            places = [place for place in (seen[:-3] == seen[-2]).nonzero().flatten().tolist() if place + 2 < len(seen)]
            if places:
                logits[row, 0, seen[places[0] + 2]] = 1.0
        return SimpleNamespace(logits=logits)


def filler(tokens: int = 700) -> Tensor:
    # Of a part of the vocabulary, so that there are enough others for keys and values.
    return torch.randint(1, 60, (tokens,), generator=torch.Generator().manual_seed(1))


def test_a_model_that_copies_recalls_everything_and_one_with_a_window_what_is_in_it() -> None:
    copier: Any = Copier()
    rows = key_value_recall(copier, small_tokenizer(), filler(), pairs=(4, 16, 64), distances=(0, 100), queries=8)
    assert [(row["pairs"], row["distance"], row["queries"], row["accuracy"]) for row in rows] == [
        (pairs, distance, 8, 1.0) for pairs in (4, 16, 64) for distance in (0, 100)
    ]
    assert [row["chance"] for row in rows[::2]] == [1 / 4, 1 / 16, 1 / 64]
    assert copier.most == 64 * 4 + 100 + 3  # of the longest text: the queries do not see one another
    near: Any = Copier(reach=16 * 4 + 3)
    rows = key_value_recall(near, small_tokenizer(), filler(), pairs=(16,), distances=(0, 40, 100), queries=16)
    assert rows[0]["accuracy"] == 1.0
    # 27 tokens of the list are left: 6 whole pairs. Of the others nothing is known, and the first value is chosen.
    assert 6 / 16 <= rows[1]["accuracy"] <= 7 / 16
    assert rows[2]["accuracy"] <= 1 / 16


def test_a_random_model_is_near_chance() -> None:
    rows = key_value_recall(make_teacher(), small_tokenizer(), filler(), pairs=(4, 32), distances=(0, 30), queries=64)
    for row in rows:
        assert abs(row["accuracy"] - row["chance"]) < 0.16, row


def test_a_text_is_a_list_the_filler_and_a_key() -> None:
    tokenizer = small_tokenizer()
    drawn = draw_lists(tokenizer, 4, queries=10, avoid=filler(), seed=3)
    assert drawn.lists.shape == (3, 16) and drawn.queries.shape == (3, 4, 3) and drawn.values.shape == (3, 4)
    (colon,), (line_break,) = (tokenizer(text)["input_ids"] for text in (":", "\n"))
    for pairs, values, queries, answers in zip(drawn.lists, drawn.values, drawn.queries, drawn.answers, strict=True):
        lines = pairs.view(4, 4)
        assert (lines[:, 1] == colon).all() and (lines[:, 3] == line_break).all()
        assert torch.equal(lines[:, 2], values)
        words = lines[:, ::2].flatten().tolist()
        assert len(set(words)) == 8 and not {colon, line_break, *filler().tolist()} & set(words)
        assert sorted(answers.tolist()) == [0, 1, 2, 3]
        for query, answer in zip(queries, answers, strict=True):
            assert query.tolist() == [line_break, int(lines[answer, 0]), colon]
    again, other = (draw_lists(tokenizer, 4, queries=10, avoid=filler(), seed=seed) for seed in (3, 4))
    assert torch.equal(drawn.lists, again.lists) and not torch.equal(drawn.lists, other.lists)


def test_what_vocabulary_filler_or_limit_do_not_allow_is_left_out() -> None:
    copier: Any = Copier()
    arguments: Any = {"pairs": (4, 16), "distances": (0, 50, 90), "queries": 8}
    rows = key_value_recall(copier, small_tokenizer(), filler(120), **arguments)
    # Eight queries of four pairs need two lists, with 60 tokens of filler each.
    assert [(row["pairs"], row["distance"]) for row in rows] == [(4, 0), (4, 50), (16, 0), (16, 50), (16, 90)]
    assert key_value_recall(copier, small_tokenizer(), filler(), pairs=(200,)) == []
    with pytest.raises(ValueError, match="`pairs` must be at most 158 with this vocabulary, got 200"):
        draw_lists(small_tokenizer(), 200)
    rows = key_value_recall(copier, small_tokenizer(), filler(), **arguments, limit=70)
    assert [(row["pairs"], row["distance"]) for row in rows] == [(4, 0), (4, 50), (16, 0)]


def test_words_are_whole_words_where_there_are_enough() -> None:
    names = ["<end>", "Ġcat", "▁dog", "Ġof", "Ġhen", "hen", "ĠCat", "Ġcat's", ":", "Ġowl"]
    backend = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token=":"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    assert word_tokens(tokenizer, 4).tolist() == [1, 2, 4, 9]
    assert word_tokens(tokenizer, 3, exclude=[2]).tolist() == [1, 4, 9]
    assert word_tokens(tokenizer, 5).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": (1,)}, "`pairs` must be at least 2, got 1"),
        ({"queries": 0}, "`queries` must be at least 1, got 0"),
        ({"distances": (0, -1)}, r"`distances` must be at least 0, got \[0, -1\]"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        key_value_recall(make_teacher(), small_tokenizer(), draw_ids(100), **change)
