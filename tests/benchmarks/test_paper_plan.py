"""The numbers of docs/scale.md are those of its script."""

from pathlib import Path

import paper_plan
import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


def test_the_tables_of_the_page_are_those_of_the_script() -> None:
    assert paper_plan.cost_table() in PAGE
    assert paper_plan.memory_table() in PAGE
    assert paper_plan.shared_sentence() in " ".join(PAGE.split())
    assert PAGE.count("\n| Llama-") == 3 * 2 + 3  # no row of another origin


def test_the_sizes_are_those_of_the_published_models() -> None:
    published = {"Llama-3.2-1B": 1_235_814_400, "Llama-3.1-8B": 8_030_261_248, "Llama-3.1-70B": 70_553_706_496}
    assert {teacher.name: teacher.parameters for teacher in paper_plan.TEACHERS} == published


def test_operations_are_about_those_of_the_usual_rule() -> None:
    """6 N per token for training and 2 N for the teacher, and 2 N for gradient checkpointing."""
    for teacher in paper_plan.TEACHERS:
        stage = paper_plan.BUDGETS["radlads"][1]
        rule = 10 * teacher.parameters
        assert paper_plan.flops_per_token(teacher, stage) == pytest.approx(rule, rel=0.15), teacher.name


def test_assumptions_and_budgets_are_named_on_the_page() -> None:
    assert f"{paper_plan.PEAK_FLOPS / 1e12:.0f}e12 operations" in PAGE and f"{paper_plan.UTILISATION:.0%}"[:-1] in PAGE
    for stages in paper_plan.BUDGETS.values():
        for stage in stages:
            assert f"{stage.tokens / 1e9:g}B" in PAGE


def test_the_launch_files_exist_for_the_number_of_gpus() -> None:
    for teacher in paper_plan.TEACHERS:
        text = (ROOT / "examples" / "launch" / teacher.launch).read_text(encoding="utf-8")
        assert f"num_processes: {teacher.gpus}\n" in text
