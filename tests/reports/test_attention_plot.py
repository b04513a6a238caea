"""The pictures and tables of `ssm-zoo show`: what they show of the matrices."""

from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from ssm_zoo.reports.attention_plot import MatrixRow, draw_distances, draw_matrices, printable
from ssm_zoo.reports.attention_text import rollout_line, stack_lines

GENERATOR = np.random.default_rng(0)
GREY = (219, 219, 219)


def causal(heads: int, length: int, *, signed: bool = False) -> np.ndarray:
    return np.tril(GENERATOR.uniform(-1.0 if signed else 0.0, 1.0, (heads, length, length)))


def saved(figure: Figure) -> None:
    stream = BytesIO()
    figure.savefig(stream, format="png", dpi=50)
    assert stream.getvalue().startswith(b"\x89PNG")


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in (axes.xaxis.label, axes.yaxis.label)]


def test_few_panels_have_tokens_as_labels_and_colours_relative_to_their_largest_weight() -> None:
    matrices = (causal(2, 4, signed=True), causal(2, 4))
    row = MatrixRow("3", ("mamba2", "attention"), matrices, (("0", "5"), ("0", "5")))
    tokens = [" The", "$x$", "\n", "中"]
    figure = draw_matrices([row], ["student", "teacher"], tokens, tokens, "Title")
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == ["head 0", "head 5"] * 2
    assert [axes.get_ylabel() for axes in panels] == ["student\nlayer 3 mamba2", "", "teacher\nlayer 3 attention", ""]
    labels = ["The", "$x$", r"\n", "□"]  # on the left and below
    for place, axes in enumerate(panels):
        assert [label.get_text() for label in axes.get_yticklabels()] == (labels if place in (0, 2) else [])
        assert [label.get_text() for label in axes.get_xticklabels()] == (labels if place in (2, 3) else [])
    for axes, matrix, signed in zip(panels, np.concatenate(matrices), (True, True, False, False), strict=True):
        pixels = np.asarray(axes.images[0].get_array())
        assert np.allclose(pixels[0, 1], np.array(GREY) / 255, atol=2e-3)
        relative = matrix / np.abs(matrix).max()
        for place in ((1, 0), (3, 2)):
            root = np.sign(relative[place]) * np.sqrt(np.abs(relative[place]))
            expected = matplotlib.colormaps["RdBu"](root / 2 + 0.5) if signed else matplotlib.colormaps["Blues"](root)
            assert np.allclose(pixels[place], expected[:3])
    assert sum("signed weight" in text for text in texts(figure)) == 1
    assert sum(text.startswith("weight") for text in texts(figure)) == 1
    saved(figure)


def test_many_panels_are_one_image_of_heads_by_layers_for_each_model() -> None:
    rows = [
        MatrixRow(str(layer), ("mamba", "attention"), (causal(1, 30), causal(4, 30)), (("mean of 64",), tuple("0123")))
        for layer in range(5)
    ]
    rows.append(MatrixRow("5", ("mamba2", "attention"), (causal(4, 30), np.zeros((0, 1, 1))), (tuple("0123"), ())))
    figure = draw_matrices(rows, ["student", "teacher"], ["a"] * 30, ["a"] * 30, "Title")
    student, teacher = [axes for axes in figure.axes if axes.images]
    assert [label.get_text() for label in student.get_xticklabels()][4:] == ["4 mamba (mean of 64)", "5 mamba2"]
    assert [label.get_text() for label in teacher.get_xticklabels()] == [str(layer) for layer in range(6)]
    assert [label.get_text() for label in student.get_yticklabels()] == list("0123")
    assert [text.get_text() for text in figure.texts] == ["student", "teacher: attention", "Title"]
    assert np.asarray(student.images[0].get_array()).shape == np.asarray(teacher.images[0].get_array()).shape
    width, height = figure.get_size_inches() * figure.dpi
    for axes in (student, teacher):  # a pixel of the image is a pixel of the picture
        pixels, box = np.asarray(axes.images[0].get_array()).shape, axes.get_position()
        assert (box.height * height, box.width * width) == pytest.approx(pixels[:2])
        assert box.x1 <= 1 and box.y1 <= 1 and box.x0 >= 0 and box.y0 >= 0
    saved(figure)


def test_models_with_many_heads_and_few_layers_are_beside_each_other() -> None:
    row = MatrixRow("0", ("mamba2", "attention"), (causal(9, 30), causal(9, 30)), (tuple("012345678"),) * 2)
    figure = draw_matrices([row, row], ["student", "teacher"], ["a"] * 30, ["a"] * 30, "Title")
    student, teacher = (axes.get_position() for axes in figure.axes if axes.images)
    assert (student.y0, student.y1) == (teacher.y0, teacher.y1)
    assert student.x1 < teacher.x0 < teacher.x1 <= 1


def test_long_texts_are_reduced_to_their_largest_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssm_zoo.reports.attention_plot._MOST_PIXELS", 4 * 50**2)
    matrix = np.zeros((4, 99, 99))
    matrix[:, 98, 0], matrix[:, 50, 10] = 1.0, -1.0
    row = MatrixRow("0", ("mamba2",), (matrix,), (tuple("0123"),))
    figure = draw_matrices([row], ["model"], ["a"] * 99, ["a"] * 99, "Title")
    (axes,) = [axes for axes in figure.axes if axes.images]
    pixels = np.asarray(axes.images[0].get_array())[:50, :50].astype(int)
    assert np.asarray(axes.images[0].get_array()).shape == (4 * 58 - 8, 50, 3)
    colors = {place: tuple(pixels[place]) for place in ((49, 0), (25, 5), (30, 3), (0, 1))}
    assert colors[49, 0][2] > colors[49, 0][0] and colors[25, 5][0] > colors[25, 5][2]  # blue, red
    assert min(colors[30, 3]) > 240 and colors[0, 1] == GREY
    saved(figure)


def example_layer(layer: int, js: list[float | None], of: str = "heads", **changes: Any) -> dict[str, Any]:
    def spread(values: list[float | None]) -> dict[str, Any]:
        known = [value for value in values if value is not None]
        return {"mean": sum(known) / len(known) if known else None, "heads": values}

    statistics = {key: spread([0.5, 1.5]) for key in ("distance", "first", "entropy")}
    row = {"layer": layer, "mixer": "mamba2", "num_heads": 2, "heads": [0, 3], "signed": True, **statistics}
    compared = {"of": of, "js": spread(js), "same_top": spread([1.0] * len(js))}
    return {**row, "teacher": {**row, "mixer": "attention"}, "to_teacher": compared, **changes}


def test_distances_are_a_map_of_heads_by_layers() -> None:
    figure = draw_distances([example_layer(1, [0.25, None]), example_layer(4, [0.5], "mean")])
    panels = [axes for axes in figure.axes if axes.images][:2]
    grid = np.ma.filled(np.ma.asarray(panels[0].images[0].get_array()), -1.0)
    assert grid.tolist() == [[0.25, 0.5], [-1.0, -1.0]]
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["1", "4\nmean"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["0", "3"]
    saved(figure)
    saved(draw_distances([example_layer(0, [0.0, 0.0])]))


def test_the_table_has_the_numbers_of_model_and_teacher() -> None:
    many = {"mean": 1.0, "min": 0.25, "median": 1.0, "max": 2.0}
    rows = [example_layer(1, [0.25, None]), example_layer(12, [0.5], "mean", entropy=many, num_heads=1536)]
    lines = stack_lines({"name": "layers", "num_layers": 13, "layers": rows})
    assert [" ".join(line.split()) for line in lines[:2]] == [
        "layer mixer heads distance first entropy JS same top entropy by head",
        "1 mamba2 2 1.0 / 1.0 1.00 / 1.00 1.00 / 1.00 0.250 100% 0.5 1.5",
    ]
    assert lines[2].split()[:3] == ["12", "mamba2", "1,536"] and lines[2].endswith("min 0.25 median 1.00 max 2.00")
    alone = [{key: value for key, value in row.items() if key not in ("teacher", "to_teacher")} for row in rows]
    for row in alone:
        del row["distance"]
    lines = stack_lines({"name": "cross", "num_layers": 13, "layers": alone})
    assert lines[0] == "Cross-attention, from decoder to encoder"
    assert " ".join(lines[2].split()) == "1 mamba2 2 - 1.00 1.00 0.5 1.5"


def test_the_rollout_in_words() -> None:
    text = rollout_line([0.5, 0.125, 0.375], ["The", " sea", " is"], "model")
    last = "Rollout of model to the last token ' is' (2): 50.0% from the first token; of the rest "
    assert text == f"{last}75% ' is' (2), 25% ' sea' (1)."
    assert rollout_line([1.0, 0.0], ["a", "b"], "m").endswith("100.0% from the first token; of the rest nothing.")


def test_labels_of_tokens_are_printable() -> None:
    assert [printable(token) for token in (" the", "  ", "", "a\tb", "x" * 20)] == [
        "the",
        "␣␣",
        "∅",
        r"a\tb",
        f"{'x' * 13}…",
    ]
