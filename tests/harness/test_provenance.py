"""What is only decoration never costs a run: cards that cannot be read, a Hub that is not there."""

from pathlib import Path

import huggingface_hub
import pytest

from ssm_zoo.conversion.carried_files import check_replaceable
from ssm_zoo.conversion.source_files import MOST_LAYERS, check_config, check_memory
from ssm_zoo.harness.provenance import provenance
from ssm_zoo.harness.published import DecorationWarning, decoration


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n# x", "mit"),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("# no front matter", None),
        ("---\n---\n", None),
        ("---\nlicense: [mit, gpl]\n---\n", None),
        ("---\nlicense: 3\n---\n", None),
        ("---\nlicense: other\nlicense_name: qwen-research\n---\n", "qwen-research"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: mit\nlicense_name: qwen-research\n---\n", "mit"),
        ("", None),
    ],
)
def test_the_licence_is_read_from_a_card(tmp_path: Path, card: str, licence: str | None) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert provenance(str(tmp_path)) == (tmp_path.name, licence)


@pytest.mark.parametrize(
    "card",
    [b"---\nlicense: [mit\n---\n", b"---\n- mit\n---\n", b"---\nlicense: mit\n", b"---\nlicense: \xff\n---\n",
     b"---\na: !!python/object:os.system x\n---\n"],
)  # fmt: skip
def test_a_broken_card_is_told_and_left_out(tmp_path: Path, card: bytes) -> None:
    (tmp_path / "README.md").write_bytes(card)
    with pytest.warns(DecorationWarning, match=r"the licence of .*; going on without it"):
        assert provenance(str(tmp_path)) == (tmp_path.name, None)


@pytest.mark.parametrize("source", ["[]", '{"license": "mit"', '{"license": 4, "hub_id": []}'])
def test_a_broken_note_of_a_conversion_is_left_out(tmp_path: Path, source: str) -> None:
    (tmp_path / "gguf_source.json").write_text(source)
    if source.endswith("]}"):
        assert provenance(str(tmp_path)) == (tmp_path.name, None)
        return
    with pytest.warns(DecorationWarning):
        assert provenance(str(tmp_path)) == (tmp_path.name, None)


def test_a_hub_that_is_not_there_costs_the_licence_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.warns(DecorationWarning, match="the licence of a/b"):
        assert provenance("a/b") == ("a/b", None)
    assert provenance("no id at all/ /") == ("no id at all/ /", None)


def test_a_decoration_hides_no_bug() -> None:
    with pytest.raises(KeyError), decoration("a card"):
        raise KeyError("a bug")


def test_a_checkpoint_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json", "README.md", "LICENSE", "cache.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_hybrid.ZooHybridModel"}}')
    (tmp_path / "modeling_hybrid.py").write_text("from .cache import Cache\n")
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "loss.png").write_text("")
    check_replaceable(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "config.json").write_text("")
    (tmp_path / "thesis.py").write_text("")
    (tmp_path / "thesis.tex").write_text("")
    holds = r"is not replaced: it also holds data/config\.json, thesis\.py, thesis\.tex, which"
    with pytest.raises(ValueError, match=holds):
        check_replaceable(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 10**9}, rf"`num_hidden_layers` must be at most {MOST_LAYERS:,}, got 1,000,000,000\."),
        ({"n_layer": 5000, "d_model": 5}, r"`n_layer` must be at most"),
        ({"hidden_size": 10**7, "vocab_size": 10**7}, r"needs at least .* GiB of memory, this machine has"),
        ({"hidden_size": "8"}, r"`hidden_size` must be an integer of at least 1, got '8'"),
        ({"hidden_size": True}, r"`hidden_size` must be an integer"),
        ({"vocab_size": 0}, r"`vocab_size` must be an integer of at least 1, got 0"),
        ({"dtype": "float77"}, r"`dtype` must be the name of a dtype"),
        ({"torch_dtype": "load"}, r"`torch_dtype` must be the name of a dtype"),
        ({"architectures": "X"}, r"`architectures` must be a list, got a string \('X'\)"),
        ({"architectures": [1]}, r"`architectures` must be a string"),
        ({"auto_map": []}, r"`auto_map` must be an object"),
    ],
)
def test_a_configuration_that_no_model_can_have_is_refused_by_its_key(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^c.json: .*{message}"):
        check_config(values, "c.json")


def test_usual_configurations_pass() -> None:
    check_config({"dtype": "bfloat16", "hidden_size": 4096, "num_hidden_layers": 64, "vocab_size": 50280}, "c")
    check_config({"dtype": None, "architectures": None, "torch_dtype": "torch.float32", "d_model": 768}, "c")
    check_memory(1, "nothing")
