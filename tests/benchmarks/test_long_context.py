"""`claims/long_context.py` at a tiny size: memory that does not grow, and the logits of an unchunked forward."""

import json
from pathlib import Path

import long_context


def test_a_long_prompt_is_read_in_chunks_of_constant_memory(tmp_path: Path) -> None:
    line = "--models mamba2 bounded --tokens 1100 --chunk 64 --unchunked 200"
    long_context.main([*line.split(), "--output", str(tmp_path)])
    (path,) = tmp_path.glob("*.jsonl")
    for row in map(json.loads, path.read_text().splitlines()):
        bins = row["rows"]
        assert [(part["start"], part["end"], part["read"]) for part in bins] == [
            (0, 512, 512),
            (512, 1024, 512),
            (1024, 1100, 76),
        ]
        assert len({part["cache_bytes"] for part in bins}) == 1
        compared = row["unchunked"]
        assert compared["largest_difference"] < 1e-5 * compared["largest_logit"]
        assert compared["largest_difference_without_the_past"] > 1e-3
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
