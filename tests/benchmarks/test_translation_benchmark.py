"""`benchmarks/claims/translation.py`: equal arms, a language with unseen names, and a file that is resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import translation
from result_file import ResultFile
from transformers import CONFIG_MAPPING, AutoModel
from translation_arms import ARMS, DEFAULT, EQUAL, MAMBA, Sizes, configuration, parameters
from translation_claims import CLOSE, names_kept, verdicts
from translation_plot import draw_results
from translation_table import table_of, tables
from translation_tasks import Language, ParallelText, chance_of_name, other_targets, segments

from ssm_zoo.evaluation.translation_scores import shared_entities


def test_all_arms_have_as_many_parameters() -> None:
    sizes = Sizes(width=128, layers=8)
    counts = {arm: parameters(configuration(arm, sizes, 4000), 4000) for arm in ARMS}
    assert all(abs(count - counts[MAMBA]) <= EQUAL * counts[MAMBA] for count in counts.values()), counts
    layout = configuration("mamba-mha", sizes, 4000)
    assert [kind for kind in layout["mixer_types"] if kind != "mamba"] == ["full_attention"] * 2
    assert layout["mixer_types"][3] == layout["mixer_types"][7] == "full_attention"
    with pytest.raises(ValueError, match="layers must be a multiple of 4"):
        configuration("retnet", Sizes(width=128, layers=6), 4000)


def test_projections_of_all_arms_begin_alike() -> None:
    """Attention, MLPs and Mamba as torch's linear layers; RetNet's retention as torchscale has it."""
    sizes, deviations = Sizes(width=96, layers=8), {}
    for arm in ("mamba", "mamba-mha", "transformer", "retnet", "encdec-transformer"):
        values = configuration(arm, sizes, 600)
        config = CONFIG_MAPPING[values.pop("model_type")](**values, vocab_size=600, pad_token_id=0)
        model = AutoModel.from_config(config)
        read = ("in_proj.weight", "q_proj.weight", "gate_proj.weight", "fc1.weight")
        for name, weight in model.named_parameters():
            if name.endswith(read) and not (arm == "retnet" and "q_proj" in name):
                deviations[f"{arm}: {name}"] = float(weight.detach().std()) * (3 * weight.shape[1]) ** 0.5
    kinds = {name.partition(":")[0] for name in deviations}
    assert len(kinds) == 5, deviations
    assert all(0.8 < deviation < 1.2 for deviation in deviations.values()), deviations


def test_names_are_copied_and_those_of_a_test_are_not_in_training() -> None:
    language = Language(words=30)
    assert len(set(language.lexicon) | set(language.lexicon.values())) == 60
    train, test = language.pairs(300, range(3, 21), range(2, 9), "train"), language.pairs(50, [15], [6], "test")
    assert test == language.pairs(50, [15], [6], "test") and len(test) == 50
    seen = set(" ".join(train.sources).split())
    for source, target in zip(test.sources, test.targets, strict=True):
        (name,) = shared_entities(source, target)
        assert len(name) == 6 and name not in seen
        assert len(source.split()) == 16
        back = {word: key for key, word in language.lexicon.items()}
        assert sorted(back.get(word, word) for word in target.split()) == sorted(source.split())
    exchanged = sum(
        [language.lexicon.get(word, word) for word in source.split()] != target.split()
        for source, target in zip(test.sources, test.targets, strict=True)
    )
    assert exchanged > 40


def test_segments_join_whole_groups_of_consecutive_pairs() -> None:
    pairs = ParallelText(list("abcde"), list("vwxyz"), [5])
    assert segments(pairs, 2) == ParallelText(["a b", "c d"], ["v w", "x y"], [2])
    assert other_targets(pairs) == ["w", "x", "y", "z", "v"]


def test_chance_of_a_name_is_a_capital_and_letters_or_digits() -> None:
    assert chance_of_name(1) == 1 / 26 and chance_of_name(3) == pytest.approx(1 / (26 * 62 * 62))


def test_the_arms_of_the_study_are_equal_at_its_sizes() -> None:
    sizes = Sizes(width=96, layers=8)
    for vocabulary in set(translation.VOCABULARY.values()):
        counts = {arm: parameters(configuration(arm, sizes, vocabulary), vocabulary) for arm in DEFAULT}
        assert all(abs(count - counts[MAMBA]) <= EQUAL * counts[MAMBA] for count in counts.values()), counts


def test_a_file_is_resumed_without_running_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    monkeypatch.setattr(translation, "NAMES", (3,))
    monkeypatch.setattr(translation, "WORDS", (4,))
    line = [
        "--arms",
        "encdec-mamba",
        "--pairs",
        "40",
        "--test-texts",
        "4",
        "--vocabulary",
        "300",
        "--width",
        "32",
    ]
    line += ["--layers", "4", "--steps", "2", "--tuning-steps", "2", "--rates", "0.001", "0.01", "--seeds", "0"]
    line += ["--beams", "2", "--work", str(tmp_path / "work"), "--output", str(tmp_path)]
    translation.main(line)
    printed = capsys.readouterr().out
    (path,) = tmp_path.glob("translation-*.jsonl")
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    assert [(row["arm"], row["purpose"]) for row in rows] == [
        ("encdec-mamba", purpose) for purpose in ("tuning", "tuning", "comparison")
    ]
    best = min(rows[:2], key=lambda row: row["heldout_loss"])
    assert rows[2]["learning_rate"] == best["learning_rate"]
    (scores,) = rows[2]["tests"].values()
    assert scores["entities"] == 4 and scores["copied"]["bleu"] >= 0 and scores["texts"] == 4
    assert str(tmp_path) not in path.read_text() and "copied source" in printed and "chance: random" in printed
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "work").glob("encdec*"))
    monkeypatch.setattr(translation, "measure", lambda *_: pytest.fail("a run was repeated"))
    translation.main([*line, "--resume", str(path)])
    assert path.read_text().count("\n") == len(rows)
    with pytest.raises(SystemExit, match="--data must be the folder of multi30k for the task en-de"):
        translation.main([*line, "--tasks", "en-de"])
    capsys.readouterr()
    translation.main([*line, "--seeds", "0", "1", "--plan", "--resume", str(path)])
    assert "1 runs of synthetic: 2 steps, 0.0 CPU hours predicted" in capsys.readouterr().out


def row_of(arm: str, bleu: float | None, *, concatenate: int = 1, long: float = 1.0) -> dict[str, Any]:
    baselines = {"copied": {"bleu": 3.0, "chrf": 6.0}, "chance": {"bleu": 1.0, "chrf": 9.0}}
    numbers = {"test_2016_flickr": bleu, "1 sentences": bleu, "5 sentences": long, "10 sentences": long}
    tests = {name: {"bleu": value, "chrf": value, **baselines} for name, value in numbers.items()}
    measured = {"diverged": "nan"} if bleu is None else {"parameters": 1000, "tests": tests}
    return {"task": "en-de", "arm": arm, "concatenate": concatenate, **measured}


def test_a_table_counts_the_seeds_that_diverged() -> None:
    rows = [row_of("mamba", None), row_of("mamba", 20.0), row_of("mamba", 30.0)]
    rows += [row_of("retnet", None), row_of("mamba-mha", 10.0)]
    assert table_of("en-de", rows, "bleu").splitlines()[1:] == [
        "| arm | parameters | seeds | test_2016_flickr |",
        "|---|---:|---:|---:|",
        f"| {ARMS['mamba']} | 1,000 | 3, 1 diverged | 25.00 (20.00-30.00) |",
        f"| {ARMS['retnet']} | - | 1, 1 diverged | - |",
        f"| {ARMS['mamba-mha']} | 1,000 | 1 | 10.00 |",
        "| copied source | - | - | 3.00 |",
        "| chance: the target of another pair | - | - | 1.00 |",
    ]
    joined = tables("length", [row_of("mamba", 20.0), row_of("mamba", 20.0, concatenate=5, long=9.0)])
    assert "1 sentences | 5 sentences | 10 sentences |" in joined and "CAT-5" in joined and "test_2016" not in joined
    assert "length: chrf" in joined


def test_names_count_where_tests_are_no_longer_than_training() -> None:
    tests = {
        "names of 3, 5 words": 0.5,
        "names of 6, 20 words": 0.7,
        "names of 12, 5 words": 0,
        "names of 3, 40 words": 0,
    }
    assert names_kept({name: {"entity_recall": value} for name, value in tests.items()}) == pytest.approx(0.6)


def test_verdicts_on_translation_follow_from_the_rows(tmp_path: Path) -> None:
    def kept(arm: str, values: list[float]) -> list[dict[str, Any]]:
        tests = [{"names of 3, 5 words": {"entity_recall": value}} for value in values]
        return [{"arm": arm, "concatenate": 1, "tests": each} for each in tests]

    rows = kept("mamba-mha", [0.9, 0.7]) + kept("transformer", [0.8, 0.75]) + kept("mamba", [0.4, 0.5])
    compared = {"synthetic": [*rows, *kept("retnet", [0.45, 0.1])]}
    found = {one["claim"]: one["verdict"] for one in verdicts(compared)}
    assert found == {
        "names-mamba-mha-transformer": "confirmed",
        "names-transformer-mamba": "confirmed",
        "names-mamba-retnet": "undecided",
        "names-mamba-mha-mamba": "confirmed",
    }
    low = kept("mamba-mha", [0.01, 0.02]) + compared["synthetic"][2:]
    assert {one["verdict"] for one in verdicts({"synthetic": low})} == {"undecided"}

    near = [
        row_of("transformer", 20.0),
        row_of("mamba", 20.1 - CLOSE),
        row_of("mamba-mha", 25.0),
        row_of("retnet", 9.0),
    ]
    found = {one["claim"]: one["verdict"] for one in verdicts({"en-de": near})}
    assert found == {"en-de-mamba": "confirmed", "en-de-mamba-mha": "confirmed", "en-de-retnet": "refuted"}
    low = [row_of("transformer", 2.0), *near[1:]]
    assert {one["verdict"] for one in verdicts({"en-de": low})} == {"undecided"}

    length = [row_of("mamba", 20.0, long=5.0), row_of("mamba", 18.0, concatenate=5, long=12.0)]
    length += [row_of("retnet", 20.0, long=19.0), row_of("retnet", 18.0, concatenate=5, long=12.0)]
    found = {one["claim"]: one["verdict"] for one in verdicts({"length": length})}
    assert (found["falls-mamba"], found["cat-mamba"]) == ("confirmed", "confirmed")
    assert (found["falls-retnet"], found["cat-retnet"]) == ("refuted", "refuted")
    assert found["cat-transformer"] == "not run"
    draw_results({"en-de": near, "length": length}, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


def test_models_of_single_sentences_are_shared_by_two_tasks(tmp_path: Path) -> None:
    options = translation.make_parser().parse_args(["--work", "x", "--tasks", "en-de", "en-fr", "length"])
    single = translation.compared_runs(options, "en-de", "mamba", 1e-3)
    both = translation.compared_runs(options, "length", "mamba", 1e-3)
    assert len(single) == 3 and both[:3] == single and {run.concatenate for run in both[3:]} == {5}
    assert translation.trials(options, "en-fr", "mamba") == translation.trials(options, "en-de", "mamba")
    # For each of 4 arms: 3 rates, and 3 seeds of each language and of CAT-5.
    text = translation.plan(ResultFile(tmp_path / "rows.jsonl", {}), options)
    assert text.startswith("48 runs of en-de, en-fr, length: ") and text.endswith("CPU hours predicted")
