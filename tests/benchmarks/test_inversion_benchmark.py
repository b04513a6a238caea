"""The comparison of what hidden states hold, at a tiny size: its models, texts, searches and rows."""

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import inversion
import pytest
import torch
from inversion import ALL, COMPARED, DESCENT, LARGE, LAST, RESULT, SMALL, TRAINING, Comparison, Data, Run, main
from mixer_arms import LLAMA, MIXER, equal_sizes, make
from result_file import ResultFile
from stories_example import write_stories

VOCABULARY = 280
ARGUMENTS = f"--widths 8 16 --tuned-width 8 --vocabulary {VOCABULARY} --length 6 --steps 2 --batch 2 --texts 2"
ARGUMENTS += " --descent 3 --seeds 1 2 --threads 1"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    write_stories(path)
    return path


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result file of a whole run."""
    folder = tmp_path_factory.mktemp("results")
    main([str(text), *ARGUMENTS.split(), "--output", str(folder)])
    (path,) = folder.glob("*.jsonl")
    return path


@pytest.mark.parametrize("width", [64, 128, 256])
def test_the_arms_are_of_about_equal_size_besides_embedding_and_head(width: int):
    def blocks(arm: str) -> int:
        model = make(arm, equal_sizes(arm, width), VOCABULARY, 32, 0)
        return sum(p.numel() for p in model.parameters()) - 2 * VOCABULARY * width

    sizes = {arm: blocks(arm) for arm in COMPARED}
    assert max(sizes.values()) < 1.12 * min(sizes.values()), sizes
    assert all(size == pytest.approx(32 * width**2, rel=0.1) for size in sizes.values())


def comparison(path: Path) -> Comparison:
    options = argparse.Namespace(vocabulary=VOCABULARY, length=6, batch=2, texts=2, descent=3, restarts=1)
    generator = torch.Generator().manual_seed(0)
    data = Data(*(torch.randint(VOCABULARY, (300,), generator=generator) for _ in range(3)))
    return Comparison(ResultFile(path, {}), data, options)


@pytest.mark.parametrize("arm", COMPARED)
def test_a_model_starts_with_the_embedding_that_its_run_names_and_is_trained_for_its_steps(arm: str, tmp_path: Path):
    made = comparison(tmp_path / "rows.jsonl")
    untrained = made.train(arm, 16, 0.3, 1, 1e-2, 0)
    again, trained = (made.train(arm, 16, 0.3, 1, 1e-2, steps) for steps in (0, 2))
    weight = untrained.get_input_embeddings().get_parameter("weight").detach()
    assert float(weight.std()) == pytest.approx(0.3, rel=0.05)
    states = [dict(model.named_parameters()) for model in (untrained, again, trained)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(
        not torch.equal(states[0][name], states[2][name]) for name in states[0] if name.endswith("embeddings.weight")
    )


def test_results_and_trials_are_inverted_on_different_texts_and_every_seed_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made, seen = comparison(tmp_path / "rows.jsonl"), []
    invert = inversion.invert_representation
    monkeypatch.setattr(
        inversion,
        "invert_representation",
        lambda model, ids, **options: seen.append(ids) or invert(model, ids, **options),
    )
    run = Run(RESULT, MIXER, 16, 1.0, 1, 1e-2, 0, ALL, 0.02)
    for changed in (run, replace(run, arm=LLAMA), replace(run, seed=2), replace(run, purpose=DESCENT)):
        made.row(changed)
    assert torch.equal(seen[0], seen[1])
    streams = ("results", "results", "results", "trials")
    for ids, name in zip(seen, streams, strict=True):
        stream = getattr(made.data, name).unfold(0, 6, 1).tolist()
        assert all(row in stream for row in ids.tolist())
    assert not torch.equal(seen[0], seen[2])


def test_every_cell_has_its_search_and_its_seeds(finished: Path):
    rows = read(finished)
    (summary,) = (row for row in rows if row["purpose"] == "summary")
    assert len(summary["cells"]) == len(COMPARED) * 2 * 2 * (2 + 1)
    assert summary["chance"] == 1 / VOCABULARY
    for cell in summary["cells"]:
        about = {key: cell[key] for key in ("arm", "width", "embedding", "places", "rate")}
        about["steps"] = 2 if cell["trained"] else 0
        trials = [row for row in rows if {**about, "purpose": DESCENT, "width": 8}.items() <= row.items()]
        assert trials[0]["size"] == 0.02
        assert cell["size"] == min(trials, key=lambda row: row["left"])["size"]
        assert {cell["size"] / 4, cell["size"] * 4} <= {row["size"] for row in trials}
        results = [row for row in rows if {**about, "purpose": RESULT}.items() <= row.items()]
        assert [row["seed"] for row in results] == [1, 2]
        assert {row["size"] for row in results} == {cell["size"]}
        assert [cell["low"], cell["high"]] == sorted(row["accuracy"] for row in results)
    assert {cell["width"] for cell in summary["cells"] if cell["places"] == LAST} == {8}
    for key in itertools.product(COMPARED, (LARGE, SMALL)):
        trials = [row for row in rows if row["purpose"] == TRAINING and (row["arm"], row["embedding"]) == key]
        assert trials[0]["rate"] == 4e-3
        best = min(trials, key=lambda row: row["held_out"])
        assert {c["rate"] for c in summary["cells"] if (c["arm"], c["embedding"]) == key} == {best["rate"]}
    assert all(row.keys() >= {"hardware", "versions", "date", "command"} for row in rows)
    assert finished.with_suffix(".png").exists()


def test_going_on_repeats_no_run(finished: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "cut-off.jsonl"
    path.write_bytes(finished.read_bytes())
    done, execute = [], Comparison.execute
    monkeypatch.setattr(Comparison, "execute", lambda self, run: done.append(run) or execute(self, run))
    arguments = [str(text), *ARGUMENTS.split(), "--resume", str(path)]
    main(arguments)
    assert done == []
    assert len(read(path)) == len(read(finished))
    main([*arguments, "--seeds", "1", "2", "5"])
    assert {(run.purpose, run.seed) for run in done} == {(RESULT, 5)}
    assert len(done) == len(COMPARED) * 2 * 2 * (2 + 1)
