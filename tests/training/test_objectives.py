"""Samples of the training objectives, the rates that a bandit chooses, and settings that are refused."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssm_zoo.conversion.formats.state_spaces import byte_tokenizer
from ssm_zoo.harness.settings import check
from ssm_zoo.training.from_scratch_settings import parse_from_scratch
from ssm_zoo.training.new_model import learn_vocabulary
from ssm_zoo.training.objective_rates import Rates, reward
from ssm_zoo.training.objective_settings import MIXES, ObjectiveMix, ObjectiveSettings
from ssm_zoo.training.objectives import ObjectiveTokens, Sample, add_tokens, least, make_sample

TEXT = [1000 + index for index in range(500)]  # every token once, so that places can be found again
SENTINELS = 32
TOKENS = ObjectiveTokens(
    control={"infilling": 1, "autoencoding": 2, "copying": 3, "selective_copying": 4, "deshuffling": 5},
    sentinels=[100 + index for index in range(SENTINELS)],
    context=6,
    target=7,
    end=8,
    ordinary=list(range(10, 90)),
)


def objective(kind: str, **parameters: Any) -> ObjectiveSettings:
    return check(ObjectiveSettings, {"objective": kind, "rate": 1.0, **parameters})


def parts(sample: Sample | None, control: str) -> tuple[list[int], list[int]]:
    """The input between its control token and the target token, and the target without its end."""
    assert sample is not None
    given, target = sample.ids[: sample.prefix], sample.ids[sample.prefix :]
    assert given[0] == TOKENS.control[control] and given[-1] == TOKENS.target and target[-1] == TOKENS.end
    return given[1:-1], target[:-1]


def filled_in(shown: list[int], answers: list[int]) -> list[int]:
    """The text with the spans of the target in place of the sentinels."""
    spans: dict[int, list[int]] = {}
    for token in answers:
        if token in TOKENS.sentinels:
            spans[token] = []
        else:
            spans[max(spans)].append(token)
    assert list(spans) == TOKENS.sentinels[: len(spans)]
    assert all(spans.values())
    return [t for token in shown for t in spans.get(token, [token])]


@pytest.mark.parametrize("room", [16, 17, 100, 499, 2000])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_sample_fits_and_can_be_solved_from_its_input(room: int, seed: int) -> None:
    rng = random.Random(seed)
    for settings in MIXES["birdie"]["objectives"]:
        chosen = check(ObjectiveSettings, settings)
        sample = make_sample(chosen, TEXT, room, TOKENS, rng)
        kind = chosen.objective
        if kind == "selective_copying" and room < 200:
            assert sample is None or len(sample.ids) <= room
            continue
        assert sample is not None and len(sample.ids) <= room and 0 < sample.used <= len(TEXT)
        body = TEXT[: sample.used]
        if kind in ("next_token", "prefix_lm"):
            target = sample.ids[sample.prefix :]
            assert target == TEXT[: len(target)] if kind == "next_token" else body[-len(target) :] == target
            continue
        shown, answers = parts(sample, kind)
        if kind in ("copying", "deshuffling", "autoencoding"):
            assert answers == body
            assert len(sample.ids) >= min(room, 2 * len(TEXT)) - 2 or kind == "autoencoding"
        if kind == "copying":
            assert shown == body
        if kind == "infilling":
            assert filled_in(shown, answers) == body
        if kind == "autoencoding":
            kept = [token for token in shown if token not in TOKENS.sentinels]
            assert kept == sorted(set(body) & set(shown)) and 0.4 * len(body) <= len(kept) <= 0.6 * len(body)
            assert [t for t in shown if t in TOKENS.sentinels] == TOKENS.sentinels[: len(shown) - len(kept)]
        if kind == "deshuffling":
            moved = sum(a != b for a, b in zip(shown, body, strict=True))
            assert sorted(shown) == body and 0 <= moved <= max(round((chosen.share or 0) * len(body)), 2)


def test_the_shares_and_lengths_of_spans_are_those_asked_for() -> None:
    rng = random.Random(0)
    sample = make_sample(objective("infilling", corruption=0.5, mean_span=8.0), TEXT, 2000, TOKENS, rng)
    shown, answers = parts(sample, "infilling")
    sentinels = sum(token in TOKENS.sentinels for token in shown)
    assert sentinels == round(0.5 * sample.used / 8)  # pyright: ignore[reportOptionalMemberAccess]
    assert len(answers) - sentinels == round(0.5 * sample.used)  # pyright: ignore[reportOptionalMemberAccess]
    prefixed = make_sample(objective("prefix_lm", prefix=0.6), TEXT, 100, TOKENS, rng)
    assert prefixed == Sample(TEXT[:100], 60, 100)
    corrupted = make_sample(objective("prefix_lm", prefix=0.5, corruption=0.3), TEXT, 100, TOKENS, rng)
    assert corrupted is not None and corrupted.ids[corrupted.prefix :] == TEXT[50:100] and corrupted.prefix == 40
    shuffled = make_sample(objective("deshuffling", share=1.0), TEXT, 203, TOKENS, rng)
    assert sum(a != b for a, b in zip(*parts(shuffled, "deshuffling"), strict=True)) > 90


def test_few_sentinels_shorten_a_text() -> None:
    few = ObjectiveTokens(**{**vars(TOKENS), "sentinels": TOKENS.sentinels[:3]})
    for kind in ("infilling", "autoencoding", "prefix_lm"):
        sample = make_sample(objective(kind, corruption=0.5), TEXT, 400, few, random.Random(0))
        assert sample is not None and 12 <= sample.used <= 32
        assert {t for t in sample.ids if t in TOKENS.sentinels} == set(few.sentinels)


@pytest.mark.parametrize("question", ["before", "after"])
def test_the_delimiters_in_the_question_find_the_spans(question: str) -> None:
    settings = objective("selective_copying", question=question, spans=3, span_tokens=16)
    for seed in range(5):
        sample = make_sample(settings, TEXT, 400, TOKENS, random.Random(seed))
        shown, answers = parts(sample, "selective_copying")
        place = shown.index(TOKENS.context)
        context, asked = shown[place + 1 :], shown[:place]
        if question == "after":
            place = context.index(TOKENS.sentinels[0])
            context, asked = context[:place], context[place:]
        assert [token for token in context if token >= 1000] == TEXT[: sample.used]  # pyright: ignore
        assert len(answers) == 3 * 17
        for index in range(3):
            sentinel, span = answers[17 * index], answers[17 * index + 1 : 17 * index + 17]
            assert sentinel == TOKENS.sentinels[index]
            end = asked.index(TOKENS.sentinels[index + 1]) if index < 2 else len(asked)
            delimiters = asked[asked.index(sentinel) + 1 : end]
            at = context.index(span[0])
            found = [
                n
                for n in range(2, 17)
                if context[at - n : at] == delimiters[:n]
                and context[at + 16 : at + 16 + len(delimiters) - n] == delimiters[n:]
            ]
            assert context[at : at + 16] == span and found and 4 <= len(delimiters) <= 32


def test_a_vocabulary_without_room_for_delimiters_is_an_error() -> None:
    small = ObjectiveTokens(**{**vars(TOKENS), "ordinary": [10]})
    with pytest.raises(ValueError, match=r"found no 2 tokens .* in a vocabulary of 1\. Raise `delimiter_tokens`"):
        make_sample(objective("selective_copying", delimiter_tokens=[2, 2]), TEXT, 400, small, random.Random(0))


def test_no_draw_decides_whether_a_sample_fits() -> None:
    """A row could otherwise wait for a lucky draw, and a resumed run be refused."""
    chosen = objective("selective_copying")
    smallest = 4 + 2 * 4 + 2 + 8 + 16  # one span with delimiters of two tokens, in a text twice as long
    for seed in range(30):
        assert make_sample(chosen, TEXT, smallest - 1, TOKENS, random.Random(seed)) is None
        sample = make_sample(chosen, TEXT, smallest, TOKENS, random.Random(seed))
        assert sample is not None and len(sample.ids) == smallest and sample.used == 16


@pytest.mark.parametrize("sentinels", [1, SENTINELS])
def test_the_least_text_and_room_decide_alone_whether_there_is_a_sample(sentinels: int) -> None:
    tokens = ObjectiveTokens(**{**vars(TOKENS), "sentinels": TOKENS.sentinels[:sentinels]})
    chosen = [check(ObjectiveSettings, settings) for settings in MIXES["birdie"]["objectives"]]
    chosen += [objective("prefix_lm", prefix=0.99, corruption=0.9), objective("infilling", corruption=0.9, mean_span=1)]
    for settings in chosen:
        text, room = least(settings)
        for length in (1, 2, 3, text - 1, text, text + 1, 90):
            for space in (1, 2, 3, 6, 7, 8, room - 1, room, room + 1, 200):
                if settings.objective == "selective_copying" and sentinels == 1 and space == 200:
                    continue  # with more spans than sentinels, which the settings refuse
                sample = make_sample(settings, TEXT[:length], space, tokens, random.Random(0))
                assert (sample is not None) == (length >= text and space >= room), (settings.name, length, space)


def test_short_texts_and_rooms_have_no_sample() -> None:
    for settings in MIXES["birdie"]["objectives"]:
        chosen = check(ObjectiveSettings, settings)
        assert make_sample(chosen, TEXT[:1], 100, TOKENS, random.Random(0)) is None
        assert make_sample(chosen, TEXT, 1, TOKENS, random.Random(0)) is None


def test_next_token_reads_the_last_token_again() -> None:
    text, found = TEXT[:25], []
    while len(text) > 1:
        sample = make_sample(objective("next_token"), text, 10, TOKENS, random.Random(0))
        assert sample is not None
        found += sample.ids[1:]
        text = text[sample.used :]
    assert found == TEXT[1:25]


@pytest.mark.parametrize("make", [byte_tokenizer, lambda: learn_vocabulary(["ab ab abc"] * 9, 280, progress=False)])
def test_tokens_are_added_once_and_saved_with_the_tokenizer(make: Any, tmp_path: Path) -> None:
    tokenizer, mix = make(), check(ObjectiveMix, MIXES["birdie"] | {"sentinels": 5})
    before = len(tokenizer)
    tokens = add_tokens(tokenizer, mix)
    assert len(tokenizer) == before + 13
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert add_tokens(loaded, mix) == tokens and len(loaded) == len(tokenizer)
    assert loaded("a<|copying|>b")["input_ids"][1] == tokens.control["copying"]
    ours = {*tokens.control.values(), *tokens.sentinels, tokens.context, tokens.target, tokens.end}
    assert len(ours) == 13 and not ours & set(tokens.ordinary)


def test_a_tokenizer_that_takes_no_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    monkeypatch.setattr(tokenizer, "add_tokens", lambda *_, **__: 0)
    with pytest.raises(ValueError, match=r"objectives need the token '<\|infilling\|>', which this tokenizer neither"):
        add_tokens(tokenizer, check(ObjectiveMix, MIXES["birdie"]))


# Rates


def test_the_reward_is_that_of_the_paper() -> None:
    for old, new in ((2.0, 1.9), (2.0, 1.98), (1.0, 1.01), (3.0, 3.0)):
        change = (new - old) / old
        expected = -100 * math.e * math.tanh(math.sqrt(new * old) * change**3 * math.e)
        assert reward(old, new) == pytest.approx(min(max(expected, -1), 1))
    assert reward(2.0, 1.0) == 1.0 and reward(1.0, 2.0) == -1.0 and reward(2.0, 2.0) == 0.0
    assert 0 < reward(2.0, 1.96) < 1


def bandit(**changes: Any) -> ObjectiveMix:
    objectives = [{"objective": "next_token", "rate": 3.0}, {"objective": "copying", "rate": 1.0}]
    settings = {"every": 2, "warmup": 0.2, "exploration": [0.5, 0.2], **changes}
    return check(ObjectiveMix, {"objectives": objectives, "bandit": settings})


def test_the_bandit_prefers_the_objective_whose_loss_falls() -> None:
    rates, seen = Rates(bandit(), steps=20), []
    for done in range(1, 21):
        # Copying falls by a tenth in every period; the next token does not.
        rates.add([200.0, 10.0 * 2 * 0.9 ** ((done - 1) // 2)], [100.0, 10.0])
        rates.end_of_step(done)
        seen.append((rates.at(done), rates.at(done + 1)))
        assert sum(rates.at(done + 1)) == pytest.approx(1)
    assert seen[0] == ([0.75, 0.25], [0.75, 0.25])  # no decision before the end of the warm-up
    first = seen[3][1]  # after 4 steps, from the rows of step 6 (number 5): one mean loss, no reward
    assert seen[3][0] == [0.75, 0.25]
    x = 0.2 + 0.3 * (1 + math.cos(math.pi * 0.4)) / 2
    assert first == pytest.approx([x * 0.75 + (1 - x) / 2, x * 0.25 + (1 - x) / 2])
    value = 0.0
    for period in range(2, 10):  # the means of 8 more periods; 0.1 of a loss of 2 is a reward of 1
        value = 0.5 * value + 0.5 * reward(2 * 0.9 ** (period - 1), 2 * 0.9**period)
    assert reward(2 * 0.9, 2 * 0.9**2) == 1.0
    weight = math.exp(value / 0.25)
    assert seen[-1][1] == pytest.approx([0.2 * 0.75 + 0.8 / (1 + weight), 0.2 * 0.25 + 0.8 * weight / (1 + weight)])


def test_an_objective_without_samples_keeps_its_value() -> None:
    rates = Rates(bandit(warmup=0.0), steps=20)
    for done, copying in ((1, 2.0), (2, 2.0), (3, 1.0), (4, 1.0)):
        rates.add([200.0, copying], [100.0, 1.0])
        rates.end_of_step(done)
    before = rates.state()["values"]
    assert before == [0.0, 0.5]
    for done in (5, 6):
        rates.add([200.0, 0.0], [100.0, 0.0])
        rates.end_of_step(done)
    assert rates.state()["values"] == before


# Settings

OBJECTIVES = [{"objective": "next_token", "rate": 1.0}, {"objective": "copying", "rate": 1.0}]


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("birdy", "`objectives` must be birdie, birdie_bandit, a .yaml file or a mapping, got 'birdy'"),
        ("none.yaml", "`objectives` must be an existing file, got 'none.yaml'"),
        ({"objectives": []}, "`objectives.objectives` must be a list of at least 1 item"),
        ({"objectives": [{"objective": "copy", "rate": 1.0}]}, "`objectives.objectives.0.objective` must be"),
        ({"objectives": [{"objective": "copying", "rate": 0.0}]}, "`objectives.objectives.0.rate` must be above 0"),
        (
            {"objectives": [{"objective": "copying", "rate": 1.0, "corruption": 0.5}]},
            "`objectives.objectives.0.corruption` has no effect with objective 'copying', whose parameters are: none",
        ),
        (
            {"objectives": [{"objective": "prefix_lm", "rate": 1.0, "mean_span": 3.0}]},
            "mean_span` has no effect without `corruption`",
        ),
        ({"objectives": [{"objective": "infilling", "rate": 1.0, "corruption": 0.0}]}, "corruption` must be above 0"),
        (
            {"objectives": [{"objective": "infilling", "rate": 1.0, "corruption": None}]},
            "corruption` must have a value or be left out, got None",
        ),
        ({"objectives": [OBJECTIVES[0]] * 2}, "must have different names, got 'next_token' 2 times"),
        ({"objectives": OBJECTIVES, "sentinels": 9}, "sentinels` has no effect without prefix_lm, infilling"),
        ({"objectives": OBJECTIVES[:1], "bandit": {}}, "bandit` has no effect with one objective"),
        (
            {"objectives": OBJECTIVES, "bandit": {"every": 20}},
            "`objectives.bandit.every` must leave two decisions that apply in the 20 steps of the run, of which only "
            "the second compares losses, got 20, which leaves 0.",
        ),
        ({"objectives": OBJECTIVES, "bandit": {"every": 10}}, "got 10, which leaves 1. Lower it or the warmup, or"),
        ({"objectives": OBJECTIVES, "bandit": {"every": 7, "warmup": 0.5}}, "got 7, which leaves 1."),
        ({"objectives": OBJECTIVES, "rates": "fixed"}, "`objectives.rates` is unknown"),
    ],
)
def test_mixtures_that_are_wrong_or_without_effect_are_refused(mix: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        settings(objectives=mix)
    assert message in str(caught.value)


def settings(**changes: Any) -> Any:
    given = {"config": "mamba2-130m", "tokenizer": "bytes", "train": ["a.txt"], "heldout": ["b.txt"], "steps": 20}
    return parse_from_scratch({key: value for key, value in (given | changes).items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "`steps` must be given with `objectives`"),
        ({"streaming": True}, "`objectives` cannot be used with a streamed training text"),
        ({"packing": False}, "`packing` has no effect with `objectives`"),
    ],
)
def test_settings_that_objectives_do_not_use_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        settings(objectives="birdie", **changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(("every", "warmup"), [(9, 0.05), (9, 0.45), (4, 0.5), (1, 0.5)])
def test_two_decisions_of_a_bandit_are_enough(every: int, warmup: float) -> None:
    """The second one has rewards, and its rates are those of a step of the run."""
    mix = settings(objectives={"objectives": OBJECTIVES, "bandit": {"every": every, "warmup": warmup}}).objectives
    rates = Rates(mix, steps=20)
    for done in range(1, 21):
        rates.add([200.0, 2.0 - 0.05 * done], [100.0, 1.0])
        rates.end_of_step(done)
    assert rates.at(19)[1] > rates.at(19)[0]


def test_a_mixture_is_read_from_a_file_and_part_of_the_identity(tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(
        yaml.safe_dump({"objectives": OBJECTIVES, "bandit": {"every": 5, "exploration": [1, 0]}})
    )
    (tmp_path / "empty.yaml").write_text(yaml.safe_dump({"objectives": OBJECTIVES}) + "bandit:\n")
    with pytest.raises(ValueError, match=r"`objectives` must be a mapping with a mapping under `bandit`, e.g. \{\}"):
        settings(objectives=str(tmp_path / "empty.yaml"))
    found = settings(objectives=str(tmp_path / "mix.yaml")).identity["objectives"]
    assert [each["name"] for each in found["objectives"]] == ["next_token", "copying"]
    assert (found["bandit"]["every"], found["bandit"]["exploration"]) == (5, [1.0, 0.0])
    assert "objectives" not in settings().identity
    names = settings(objectives="birdie").objectives.names
    assert len(set(names)) == len(names) == 13 and sum(settings(objectives="birdie").objectives.rates) == pytest.approx(
        1
    )
