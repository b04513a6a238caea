"""Models and tokenizers as every command loads them: strictly, and without running code that nobody trusts.

transformers fills a weight that a checkpoint lacks with random numbers, leaves out one that it does not know, and
asks on the terminal whether to run a checkpoint's code. Here all three are errors: the checkpoint must have exactly the
model's weights, all of them finite, and code is run only where the caller says so.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file, find_adapter_config_file

from .. import modeling as _  # noqa: F401 - registers the zoo's classes, which come before a checkpoint's own code

__all__ = ["WeightsError", "check_finite", "check_keys", "load_config", "load_model", "load_tokenizer", "quiet_loading"]

# Dtypes that torch.isfinite does not know; float32 holds all their values.
_NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu)
_SHOWN = 3
_ADAPTER, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")


class WeightsError(ValueError):
    """The weights of a source are not those of its configuration, or not finite."""


def load_model(
    source: str | Path,
    auto_class: Any,
    *,
    field: str = "model",
    revision: str | None = None,
    trust_remote_code: bool = False,
    may_lack: Collection[str] = (),
    may_add: Collection[str] = (),
    **options: Any,
) -> PreTrainedModel:
    """Load a model whose weights are all there, all used and all finite. Only safetensors are read.

    Args:
        source: a folder or Hub id of a model, or of a peft adapter, which is put on its base model.
        auto_class: an Auto class of transformers, or a model's own class.
        field: what errors call the source: the argument, option or key that names it.
        revision: branch, tag or commit, for a Hub id.
        trust_remote_code: run the code that the source brings.
        may_lack: beginnings of names of weights that the source may lack, since the caller does not use them or
            sets them itself.
        may_add: beginnings of names of weights that the source may have besides the model's.
        **options: further arguments of `from_pretrained`, e.g. dtype, config or gguf_file.

    Returns:
        The model, in evaluation mode. An adapter's is its base model with the adapter's layers in it.

    Raises:
        WeightsError: if weights are missing, left over, of another shape, or not finite.
        ValueError: if the file of the weights is damaged or a pickle, or the source brings code that is not trusted.
        OSError: if the source does not exist or cannot be read.
    """
    source = str(source)
    options = {"revision": revision or "main", "trust_remote_code": trust_remote_code, **options}
    folder = options.get("subfolder", "")
    if find_adapter_config_file(source, revision=options["revision"], subfolder=folder) is not None:
        return _load_adapted(source, auto_class, field, options)
    if "gguf_file" not in options:
        _refuse_pickles(source, folder, field)
        options["use_safetensors"] = True
    with quiet_loading(source, field):
        model, found = auto_class.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    check_keys(found, f"{field}: {source}", may_lack=may_lack, may_add=may_add)
    check_finite(model, f"{field}: {source}")
    return model


def load_tokenizer(
    source: str | Path,
    *,
    field: str = "tokenizer",
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer; arguments and errors as :func:`load_model`."""
    source = str(source)
    with quiet_loading(source, field):
        return AutoTokenizer.from_pretrained(
            source, revision=revision or "main", trust_remote_code=trust_remote_code, **options
        )


def load_config(
    source: str | Path, *, field: str = "model", revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Load a configuration; arguments and errors as :func:`load_model`."""
    source = str(source)
    with quiet_loading(source, field):
        return AutoConfig.from_pretrained(source, revision=revision or "main", trust_remote_code=trust_remote_code)


def check_keys(
    found: Mapping[str, Iterable[Any]], place: str, *, may_lack: Collection[str] = (), may_add: Collection[str] = ()
) -> None:
    """Check what `from_pretrained(..., output_loading_info=True)` reports.

    Args:
        found: the report. Weights that are tied to another one are not missing there.
        place: how errors begin: the field and the source.
        may_lack: beginnings of names of weights that may be missing.
        may_add: beginnings of names of weights that may be left over.

    Raises:
        WeightsError: if other weights are missing or left over, or some have another shape.
    """
    missing = sorted(key for key in found["missing_keys"] if not key.startswith(tuple(may_lack)))
    unexpected = sorted(key for key in found["unexpected_keys"] if not key.startswith(tuple(may_add)))
    shapes = sorted(key if isinstance(key, str) else key[0] for key in found["mismatched_keys"])
    problems = [
        f"{len(keys)} {text}: {_first(keys)}"
        for keys, text in (
            (missing, "missing weights"),
            (unexpected, "unexpected weights, which the model of its config.json does not have"),
            (shapes, "mismatched weights, whose shapes are not those of its config.json"),
        )
        if keys
    ]
    problems += [str(message) for message in found.get("error_msgs") or ()]
    if problems:
        raise WeightsError(
            f"{place} has {'; '.join(problems)}. The weights and config.json must belong together: save or download "
            "the checkpoint again."
        )


def check_finite(model: nn.Module | Mapping[str, Tensor], place: str, remedy: str = "") -> None:
    """Check that all weights are finite numbers; integers and weights on the meta device count as finite.

    Args:
        model: a module, whose parameters are checked, and its buffers for NaN (a mask may be infinite); or tensors.
        place: how the error begins.
        remedy: a sentence that follows.

    Raises:
        WeightsError: with the number of weights that are not finite and the names of the first tensors.
    """
    if isinstance(model, nn.Module):
        bad = dict(_not_finite(model.named_parameters()))
        bad |= dict(_not_finite(model.named_buffers(), infinity_too=False))
    else:
        bad = dict(_not_finite(model.items()))
    if bad:
        count = sum(bad.values())
        tail = f" {remedy}" if remedy else ""
        raise WeightsError(f"{place}: {count:,} of the weights are not finite, first: {_first(list(bad))}.{tail}")


def _not_finite(tensors: Iterable[tuple[str, Tensor]], infinity_too: bool = True) -> Iterator[tuple[str, int]]:
    for name, tensor in tensors:
        if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        values = tensor.detach()
        if values.dtype in _NARROW:
            values = values.float()
        wrong = ~values.isfinite() if infinity_too else values.isnan()
        if count := int(wrong.sum()):
            yield name, count


@contextmanager
def quiet_loading(source: str, field: str) -> Iterator[None]:
    """Let transformers load without a question and without its table of keys, and name the source in its errors.

    Raises:
        ValueError: if the source brings code that is not trusted, or its weights are no whole safetensors file.
    """
    table = logging.getLogger("transformers.modeling_utils")
    level = table.level
    table.setLevel(logging.ERROR)
    try:
        # 0 seconds to answer: whoever calls transformers without a decision gets an error in place of a question.
        with patch("transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE", 0):
            yield
    except SafetensorError as error:
        raise ValueError(
            f"{field}: the weights of {source} are no whole safetensors file ({error}). Download or save them again."
        ) from None
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{field}: {source} brings code of its own, which is not run. Read it, then pass --trust-remote-code "
            "(trust_remote_code=True) to run it."
        ) from None
    finally:
        table.setLevel(level)


def _refuse_pickles(source: str, subfolder: str, field: str) -> None:
    folder = Path(source) / subfolder
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickles = [name for name in _PICKLES if (folder / name).is_file()]
        if pickles:
            raise ValueError(
                f"{field}: {source} has its weights in {pickles[0]}, a pickle, which can hold code. Only safetensors "
                "are read; convert it first (ssm-zoo convert --allow-pickle)."
            )


def _load_adapted(source: str, auto_class: Any, field: str, options: dict[str, Any]) -> PreTrainedModel:
    """The base model of a peft adapter with the adapter in it; every weight of the adapter has its place."""
    # transformers reports the adapter's keys alone, and fills what its base lacks.
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    place = {"revision": options.pop("revision"), "subfolder": options.pop("subfolder", "")}
    config = PeftConfig.from_pretrained(source, **place)
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(f"{field}: {source}: {_ADAPTER} names no base model in base_model_name_or_path")
    _refuse_pickles(source, place["subfolder"], field)
    path = cached_file(source, _ADAPTER_WEIGHTS, **place)
    assert path is not None  # otherwise an OSError
    with quiet_loading(source, field):
        state = load_file(path)
    model = load_model(base, auto_class, field=f"{field}: the base of {source}", revision=config.revision, **options)
    adapted: Any = get_peft_model(model, config)
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    found = {
        "missing_keys": expected.keys() - state.keys(),
        "unexpected_keys": state.keys() - expected.keys(),
        "mismatched_keys": [key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape],
    }
    check_keys(found, f"{field}: the adapter {source}")
    check_finite(state, f"{field}: the adapter {source}")
    set_peft_model_state_dict(adapted, state)
    return adapted.get_base_model().eval()


def _first(names: Collection[str]) -> str:
    more = ", …" if len(names) > _SHOWN else ""
    return ", ".join(list(names)[:_SHOWN]) + more
