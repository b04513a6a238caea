"""The benchmarks of mixers and decode steps on a CPU, at small sizes: rows that add up, and sides that must agree."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cpu_compiled
import cpu_decode
import cpu_mixers
import pytest
import torch
import torch._inductor.config


@pytest.fixture(autouse=True)
def _without_a_pool_of_processes() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._inductor.config.patch(compile_threads=1):
        yield


def rows_of(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_variant_of_a_mixer_is_compared_and_timed(tmp_path: Path) -> None:
    sizes = ["--width", "64", "--forward", "8", "--training", "6", "--repeats", "2", "--threads", "1"]
    cpu_compiled.main(["--mixers", "masked_mixing", *sizes, "--output", str(tmp_path)])
    rows = rows_of(tmp_path)
    names = ["eager float32", "eager float32, oneDNN", "compiled float32", "compiled float32, oneDNN"]
    names += ["eager bfloat16", "compiled bfloat16"]
    assert [(row["step"], row["length"], row["variant"]) for row in rows] == [
        (step, length, name) for step, length in (("forward", 8), ("training", 6)) for name in names
    ]
    for row in rows:
        base = next(each for each in rows if each["step"] == row["step"] and each["variant"] == "eager float32")
        assert row["ratio"] == pytest.approx(base["seconds"]["median"] / row["seconds"]["median"])
        assert row["difference"] < (0.1 if "bfloat16" in row["variant"] else 1e-4)


def test_a_variant_that_disagrees_is_refused() -> None:
    right = cpu_compiled.Variant(lambda: (torch.ones(2),))
    for found in (torch.tensor([1.0, 1.01]), torch.tensor([1.0, torch.nan])):
        wrong = cpu_compiled.Variant(lambda found=found: (found,))
        with pytest.raises(RuntimeError, match=r"^compiled float32: results must agree with eager float32 to 0\.001"):
            cpu_compiled.measure({"eager float32": right, "compiled float32": wrong}, 1)


def test_a_decode_step_is_compared_with_the_reading_of_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setattr(cpu_decode, "SIZES", cpu_decode.SIZES | sizes)
    monkeypatch.setattr(cpu_decode, "MATRIX", 64)
    cpu_decode.main(["--models", "llama", "--steps", "2", "--threads", "1", "--output", str(tmp_path)])
    rows = rows_of(tmp_path)
    assert [(row["model"], row["way"]) for row in rows] == [("llama", way) for way in cpu_decode.WAYS]
    # Llama's layers: q, k, v, o of 64 x (64, 32, 32, 64), an MLP of three 64 x 32; a head of 100 x 64, shared.
    weights = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 32) + 100 * 64
    assert [row["weight_bytes"] for row in rows] == [4 * weights] * 3 + [2 * weights]
    for row in rows:
        step, limit = row["seconds"]["step"]["median"], row["limit_seconds"]
        assert limit == pytest.approx(row["weight_bytes"] / row["bytes_per_second"]["median"])
        assert (row["tokens_per_second"], row["of_limit"]) == pytest.approx((1 / step, limit / step))
        assert 0 < row["products_of_step"] < 1 and row["cache_bytes"] > 0
        assert row["operations"] and 0 < sum(each["share"] for each in row["operations"]) <= 1
    assert list(tmp_path.glob("*.png"))


def test_a_mixers_projections_are_timed_alone(tmp_path: Path) -> None:
    arguments = ["--forward", "4", "--backward", "3", "--repeats", "1", "--threads", "1", "--onednn"]
    cpu_mixers.main([*arguments, "--output", str(tmp_path)])
    rows = rows_of(tmp_path)
    assert [row["case"].rpartition(" d768")[0] for row in rows] == [
        f"{mixer} mixer {step}" for mixer in ("mamba2", "mamba1") for step in ("forward L4", "forward+backward L3")
    ]
    for row in rows:
        rest = (row["theirs_s"] - row["projections_s"]) / (row["ours_s"] - row["projections_s"])
        assert row["ratio_without"] == pytest.approx(rest) and row["projections_s"] > 0
        assert row["matrix_products"] == "oneDNN"
