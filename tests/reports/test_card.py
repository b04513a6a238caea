"""The model card of a distilled student: front matter, numbers, links, sentences, and the example in it."""

import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import pytest
import torch
from comparison_example import example_comparison
from huggingface_hub import EvalResult, ModelCard
from report_example import HOSTILE, example_report, hostile_report, markup, table_after
from teachers import small_tokenizer

from ssm_zoo.modeling import ZooHybridConfig, ZooHybridForCausalLM
from ssm_zoo.reports.distillation_card import render_card, write_card

HEADINGS = [
    "What it is",
    "How to load it",
    "How it was trained",
    "Results",
    "What it writes",
    "Limits",
    "To repeat it",
    "Licence",
    "Citation",
]


def card_of(report: dict[str, Any], **arguments: Any) -> ModelCard:
    return ModelCard(render_card(report, **arguments))


def test_front_matter_is_what_the_hub_reads(tmp_path: Path):
    report = example_report()
    write_card(tmp_path, report, repo_id="me/student")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.base_model == "example-org/Teacher-135M"
    assert data["base_model_relation"] == "finetune"
    assert data.license == "apache-2.0"
    assert data.tags == ["ssm-zoo", "zoo_hybrid", "mamba2", "distillation", "custom_code"]
    assert data.datasets == ["Salesforce/wikitext"]
    assert data.model_name == "me/student"
    student = report["evaluations"][-1]
    assert data.eval_results is not None
    assert all(isinstance(result, EvalResult) for result in data.eval_results)
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        "loss": student["loss"],
        "perplexity": student["perplexity"],
        "kl_divergence": student["kl"],
        "top1_agreement": student["top1_agreement"],
    }
    assert {result.dataset_name for result in data.eval_results} == {
        "Held-out text: WikiText-2, lightly detokenised, CC BY-SA 3.0"
    }
    # What the Hub reads it writes back: nothing is lost on the way.
    assert str(ModelCard.load(tmp_path / "README.md")) == (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("source", "base_model"),
    [
        ("org/name", "org/name"),
        ("org/name.v1_2-x", "org/name.v1_2-x"),
        ("gpt2", None),
        ("model.gguf", None),
        ("folder/model.Q4_1.gguf", None),
        ("a/b/c", None),
        ("my teacher/x", None),
        ("/models/teacher", None),
    ],
)
def test_base_model_is_given_for_hub_ids_alone(source: str, base_model: str | None):
    report = example_report()
    report["teacher"]["source"] = source
    data = card_of(report).data
    assert data.base_model == base_model
    assert data.get("base_model_relation") == ("finetune" if base_model else None)


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("mit", {"license": "mit"}),
        ("Apache-2.0", {"license": "apache-2.0"}),
        (None, {}),
        (" ", {}),
        (
            "Example Licence 1",
            {
                "license": "other",
                "license_name": "Example Licence 1",
                "license_link": "https://huggingface.co/example-org/Teacher-135M",
            },
        ),
    ],
)
def test_licence_is_the_teachers_or_said_to_be_unknown(licence: str | None, expected: dict[str, str]):
    report = example_report()
    report["teacher"]["licence"] = licence
    card = card_of(report)
    found = {key: card.data.get(key) for key in ("license", "license_name", "license_link")}
    assert {key: value for key, value in found.items() if value is not None} == expected
    text = card.text[card.text.index("## Licence") :]
    assert ("stay under its licence, `" if expected else "whose licence is not recorded") in text
    assert "under Apache-2.0" in text


def test_front_matter_leaves_out_what_is_not_so():
    report = example_report()
    report["student"]["mixer_types"] = ["full_attention", "sliding_attention"] * 6
    report["data"] |= {"train_sources": ["novel.txt"], "heldout_sources": ["a.txt", "b.txt"]}
    report["evaluations"][-1] |= {"perplexity": float("inf"), "kl": None}
    data = card_of(report).data
    assert data.tags == ["ssm-zoo", "zoo_hybrid", "distillation", "custom_code"]
    assert data.datasets is None
    assert data.model_name == "Teacher-135M-zoo-hybrid"
    assert data.eval_results is not None
    assert [result.metric_type for result in data.eval_results] == ["loss", "top1_agreement"]
    assert data.eval_results[0].dataset_name == "Held-out text: a.txt, b.txt"


def test_the_numbers_are_those_of_the_report():
    report = example_report()
    text = render_card(report)
    teacher = report["evaluations"][0]["loss"]
    rows = table_after(text, "Results")
    assert len(rows) == 6
    for cells, part in zip(rows, report["evaluations"], strict=True):
        assert f"`{part['name']}`" in cells[0]
        assert cells[1] == f"{part['loss']:.4f}"
        assert cells[2] == ("—" if part["kind"] == "teacher" else f"{part['loss'] - teacher:+.4f}")
        assert cells[4] == ("—" if part["kl"] is None else f"{part['kl']:.4f}")
        assert cells[5] == ("—" if part["kl"] is None else f"{part['top1_agreement']:.1%}")
        assert cells[6] == ("—" if part["kind"] == "zeroed" else f"{part['repeat_loss']:.4f}")
        assert cells[7] == f"{part['trained_tokens']:,}"
    assert table_after(text, "What it is") == [
        ["`full_attention`, softmax attention over the whole context", "0, 2, 4, 6, 8, 10", "6"],
        ["`discrete_mamba2`, discrete Mamba-2: a state-space layer without a step size", "1, 3, 5, 7, 9, 11", "6"],
    ]
    stages = table_after(text, "How it was trained")
    assert stages[1] == [
        "`align`",
        "`hidden_state_alignment`",
        "`mixers`",
        "102,400",
        "100",
        "256",
        "4",
        "0.002",
        "250",
    ]
    for expected in (
        "Held-out loss 3.7215 nats per token, 0.0474 above the teacher's 3.6741, on 16,320 predictions.",
        "= 99.1%, with L0 = 8.6688",
        "136,200,123 parameters",
        "274,321 tokens",
        "36,123 tokens",
        "In its greedy samples 10.0% of the 4-grams",
        "`2026-01-31T12:34:56+00:00`",
        "`transformers` `5.23.0`",
        "`Example CPU @ 2.50GHz`, 2 cores",
        "\nssm-zoo distill recipe.yaml runs/first --set seed=3\n",
        "\n  learning_rate: 0.0005\n",
        "arXiv:2408.10189",
        "arXiv:2405.21060",
    ):
        assert text.count(expected) >= 1, expected
    assert markup(text)[2][1:] == HEADINGS


def test_a_stage_that_did_not_improve_is_said_so():
    report = example_report()
    assert "did not improve" not in render_card(report)
    report["evaluations"][-1]["loss"] = 3.95
    text = render_card(report)
    assert (
        text.count("- **`distil` did not improve on the one before: the held-out loss rose from 3.9023 to 3.9500") == 1
    )
    assert "0.2759 above the teacher's" in text


def test_pictures_are_those_in_the_folder(tmp_path: Path):
    write_card(tmp_path, example_report())
    assert "](plots/" not in (tmp_path / "README.md").read_text(encoding="utf-8")
    (tmp_path / "plots").mkdir()
    for name in ("a b.png", "heads.png", ".tmp-losses.png", "losses.png", "heldout.png", "notes.txt"):
        (tmp_path / "plots" / name).touch()
    write_card(tmp_path, example_report())
    _, targets, _ = markup((tmp_path / "README.md").read_text(encoding="utf-8"))
    pictures = [target for target in targets if not target.startswith("https://")]
    assert pictures == ["plots/heldout.png", "plots/losses.png", "plots/heads.png", "plots/a%20b.png"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_texts_from_outside_stay_texts():
    report = hostile_report()
    report["evaluations"][0]["samples"][1]["completion"] = "{{ card_data }}{% raw %}"
    text = render_card(report)
    card = ModelCard(text)
    html, targets, headings = markup(card.text)
    assert [re.sub(r"\s+", " ", part) for part in html] == [
        "<details> <summary>The recipe that was run, with every default spelt out</summary>",
        "</details>",
    ]
    assert targets == []
    assert headings[1:] == HEADINGS
    assert "{{ card_data }}{% raw %}" in text
    assert HOSTILE.replace("\x1b", "\N{REPLACEMENT CHARACTER}") in text
    assert card.data.license == "other"
    assert card.data.get("base_model") is None
    assert [len(cells) for cells in table_after(text, "Results")] == [9] * 6


def test_no_path_of_the_machine_is_published():
    home = "/" + "home/me"
    report = example_report()
    report["command"] = f"{home}/bin/ssm-zoo distill {home}/recipe.yaml {home}/out --set teacher={home}/teacher"
    report["teacher"]["source"] = report["recipe"]["teacher"] = f"{home}/teacher"
    report["recipe"]["data"] |= {"train": [f"{home}/a.txt", f"{home}/b.txt"], "heldout": f"{home}/c.txt"}
    report["data"] |= {"train_sources": [f"{home}/a.txt"], "heldout_sources": [f"{home}/c.txt"]}
    text = render_card(report)
    assert home not in text
    assert "ssm-zoo distill recipe.yaml out --set teacher=teacher" in text
    assert ModelCard(text).data.model_name == "teacher-zoo-hybrid"


def test_every_hole_of_the_template_is_filled(monkeypatch: pytest.MonkeyPatch):
    template = resources.files("ssm_zoo.model_cards").joinpath("template.md").read_text(encoding="utf-8")
    holes = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(template))
    given: dict[str, Any] = {}

    def from_template(card_data: Any, template_str: str, **sections: str) -> ModelCard:
        given.update(sections, card_data=card_data)
        assert template_str == template
        return ModelCard("---\nlicense: mit\n---\n")

    monkeypatch.setattr(ModelCard, "from_template", from_template)
    render_card({**example_report(), "comparison": example_comparison()}, plots=["plots/heldout.png"])
    assert given.keys() == holes
    assert all(given.values())


@pytest.mark.parametrize(
    ("repo_id", "title", "loaded"),
    [
        pytest.param(None, "Teacher-135M-zoo-hybrid", "<this repository>", id="unknown"),
        pytest.param("me/student", "student", "me/student", id="known"),
    ],
)
def test_repository_names_title_and_example(repo_id: str | None, title: str, loaded: str):
    text = render_card(example_report(), repo_id=repo_id)
    assert markup(ModelCard(text).text)[2][0] == title
    assert f'repository, revision = "{loaded}", "main"' in text


def test_the_example_runs_without_the_package(tmp_path: Path):
    torch.manual_seed(0)
    tokenizer = small_tokenizer()
    config = ZooHybridConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        mixer_types=["full_attention", "discrete_mamba2"],
        eos_token_id=tokenizer.eos_token_id,
    )
    folder = tmp_path / "student"
    ZooHybridForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_card(folder, example_report())
    example = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    program = f"import sys\nsys.modules['ssm_zoo'] = None\n{example[1]}print(type(model).__module__)\n"
    finished = subprocess.run(
        [sys.executable, "-c", program.replace("<this repository>", str(folder))],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    # The first line of the answer would be a question, had the example not said that it trusts the code.
    assert finished.stdout.startswith("The capital of France is"), finished.stdout
    assert finished.stdout.splitlines()[-1].startswith("transformers_modules.")
    assert "of type `zoo_hybrid`" not in finished.stderr


def test_a_bad_report_or_repository_leaves_the_card_as_it_was(tmp_path: Path):
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    report = example_report()
    del report["evaluations"][3]["loss"]
    with pytest.raises(ValueError, match=r"^report: `evaluations\.3\.loss` is missing; required: name, kind, loss"):
        write_card(tmp_path, report)
    with pytest.raises(ValueError, match=r"^repo_id must be a Hub id ORGANISATION/NAME, got 'a/b/c'"):
        write_card(tmp_path, example_report(), repo_id="a/b/c")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine"
    with pytest.raises(ValueError, match=r"^folder must be the folder of an exported model, got '.*missing'\.$"):
        write_card(tmp_path / "missing", example_report())
    assert not (tmp_path / "missing").exists()
