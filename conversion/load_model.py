"""Strict loading of models and tokenizers, for all commands, without running code that is not trusted.

transformers initialises missing weights randomly, ignores unknown ones, and asks on the terminal whether to run a
checkpoint's code. Here all three are errors: the checkpoint must have exactly the model's weights, all of them finite,
and code is run only if the caller trusts it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from .. import modeling as _  # noqa: F401 - registers the zoo's classes, which come before a checkpoint's own code
from .remote_code import check_remote_code
from .source_files import check_source_files
from .weight_choice import check_names
from .weight_files import check_shards_differ

__all__ = [
    "WeightsError",
    "check_finite",
    "check_keys",
    "load_config",
    "load_model",
    "load_tokenizer",
    "put_adapter",
    "quiet_loading",
]

# Dtypes that torch.isfinite does not support; float32 holds all their values.
_NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu)
_SHOWN = 3
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")


class WeightsError(ValueError):
    """The weights of a source do not fit its configuration, or are not finite."""


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
    """Load a model, after checking that all weights are there, used and finite. Only safetensors are read.

    Args:
        source: a folder or Hub id of a model, or of a peft adapter, which is added to its base model.
        auto_class: an Auto class of transformers, or a model's own class.
        field: what errors call the source: the argument, option or key that names it.
        revision: branch, tag or commit, for a Hub id.
        trust_remote_code: run the code that the source brings.
        may_lack: prefixes of weights that the source may lack, since the caller does not use them or sets them itself.
        may_add: prefixes of weights that the source may have in addition to the model's.
        **options: further arguments of `from_pretrained`, e.g. dtype, config or gguf_file.

    Returns:
        The model, in evaluation mode. For an adapter, this is the base model with the adapter's layers in it.

    Raises:
        WeightsError: if weights are missing, left over, of another shape, or not finite.
        ValueError: if a weight file is damaged or a pickle, a weight is in two shards of a folder, an adapter is not in
            the model's layers (prompt tuning, activated LoRA), or the source brings code that is not trusted.
        OSError: if the source does not exist or cannot be read.
    """
    source = str(source)
    options = {"revision": revision or "main", "trust_remote_code": trust_remote_code, **options}
    folder = options.get("subfolder", "")
    name = auto_class.__name__ if auto_class.__module__.startswith("transformers.models.auto.") else None
    check_remote_code(
        source,
        trusted=trust_remote_code,
        field=field,
        revision=options["revision"],
        subfolder=folder,
        auto_class=name,
        tokenizer=False,
    )
    if Path(source).is_dir():
        check_names(Path(source) / folder)
    if find_adapter_config_file(source, revision=options["revision"], subfolder=folder) is not None:
        return _load_adapted(source, auto_class, field, options)
    if "gguf_file" not in options:
        _refuse_pickles(source, folder, field)
        check_shards_differ(Path(source) / folder, field)
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
    """Load a tokenizer. Arguments and errors are those of :func:`load_model`."""
    source = str(source)
    if "gguf_file" not in options:
        check_remote_code(
            source,
            trusted=trust_remote_code,
            field=field,
            revision=revision,
            subfolder=options.get("subfolder", ""),
            auto_class=None,
        )
    with quiet_loading(source, field):
        return AutoTokenizer.from_pretrained(
            source, revision=revision or "main", trust_remote_code=trust_remote_code, **options
        )


def load_config(
    source: str | Path, *, field: str = "model", revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Load a configuration. Arguments and errors are those of :func:`load_model`."""
    source = str(source)
    check_remote_code(
        source, trusted=trust_remote_code, field=field, revision=revision, auto_class="AutoConfig", tokenizer=False
    )
    with quiet_loading(source, field):
        return AutoConfig.from_pretrained(source, revision=revision or "main", trust_remote_code=trust_remote_code)


def check_keys(
    found: Mapping[str, Iterable[Any]],
    place: str,
    *,
    may_lack: Collection[str] = (),
    may_add: Collection[str] = (),
    of: str = "its config.json",
) -> None:
    """Check the loading report of `from_pretrained(..., output_loading_info=True)`.

    Args:
        found: the report, in which tied weights do not count as missing.
        place: beginning of errors: the field and the source.
        may_lack: prefixes of weights that may be missing.
        may_add: prefixes of weights that may be left over.
        of: name of the file that says which weights there are.

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
            (unexpected, f"unexpected weights, which are not those of {of}"),
            (shapes, f"mismatched weights, whose shapes are not those of {of}"),
        )
        if keys
    ]
    problems += [str(message) for message in found.get("error_msgs") or ()]
    if problems:
        raise WeightsError(
            f"{place} has {'; '.join(problems)}. The weights and {of.removeprefix('its ')} must belong together: "
            "save or download both again."
        )


def check_finite(model: nn.Module | Mapping[str, Tensor], place: str, remedy: str = "") -> None:
    """Check that all weights are finite numbers. Integers and weights on the meta device count as finite.

    Args:
        model: tensors by name, or a module, whose buffers are checked for NaN only, as a mask may be infinite.
        place: beginning of the error.
        remedy: last sentence of the error.

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
    """Let transformers load without asking questions and without its table of keys, and name the source in its errors.

    Raises:
        ValueError: if the source brings code that is not trusted, or transformers cannot load its files.
    """
    check_source_files(source, field)
    # A filter instead of a level, since transformers reads this logger's level to decide on other output.
    table = logging.getLogger("transformers.modeling_utils")
    table.addFilter(_is_error)
    try:
        # With 0 seconds to answer, a call that leaves the decision open gets an error instead of a question.
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
    except MemoryError:
        raise
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        StrictDataclassError,
    ) as error:
        # Raised by transformers for values in the user's files that it does not expect.
        reason = " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__
        if isinstance(error, RuntimeError) and "allocate" in reason:
            raise
        raise ValueError(
            f"{field}: transformers cannot load {source} ({type(error).__name__}: {reason}). Check its config.json and "
            "tokenizer files, or save them again."
        ) from error
    finally:
        table.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _refuse_pickles(source: str, subfolder: str, field: str) -> None:
    folder = Path(source) / subfolder
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickles = [name for name in _PICKLES if (folder / name).is_file()]
        if pickles:
            raise ValueError(
                f"{field}: {source} has its weights in {pickles[0]}, a pickle, which can hold code. Only safetensors "
                "are read. Convert it first (ssm-zoo convert --allow-pickle)."
            )


def put_adapter(model: PreTrainedModel, source: str | Path, *, field: str = "adapter", **place: Any) -> Any:
    """Add a saved peft adapter to its base model, after checking that the adapter has exactly the expected weights.

    Args:
        model: the base model, changed in place.
        source: folder or Hub id of the adapter.
        field: what errors call the source.
        **place: revision and subfolder, for a Hub id.

    Returns:
        The `PeftModel` around it.

    Raises:
        WeightsError: if weights are missing, left over, of another shape, or not finite.
        ValueError: if the weight file is damaged or a pickle.
        OSError: if the adapter cannot be read.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    source = str(source)
    _refuse_pickles(source, place.get("subfolder", ""), field)
    path = cached_file(source, _ADAPTER_WEIGHTS, **place)
    assert path is not None  # otherwise an OSError
    with quiet_loading(source, field):
        state = load_file(path)
    adapted: Any = get_peft_model(model, PeftConfig.from_pretrained(source, **place))
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    found = {
        "missing_keys": expected.keys() - state.keys(),
        "unexpected_keys": state.keys() - expected.keys(),
        "mismatched_keys": [key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape],
    }
    check_keys(found, f"{field}: {source}", of="its adapter_config.json")
    check_finite(state, f"{field}: {source}")
    set_peft_model_state_dict(adapted, state)
    return adapted


def _load_adapted(source: str, auto_class: Any, field: str, options: dict[str, Any]) -> PreTrainedModel:
    """Load the base model of a peft adapter and add the adapter.

    transformers would report only the adapter's keys, and initialise missing weights of the base model randomly.
    """
    from peft import PeftConfig

    place = {"revision": options.pop("revision"), "subfolder": options.pop("subfolder", "")}
    config = PeftConfig.from_pretrained(source, **place)
    if not config.base_model_name_or_path:
        raise ValueError(
            f"{field}: {source}: adapter_config.json must name the base model in `base_model_name_or_path`."
        )
    # These work in the forward of the `PeftModel`, which is not returned: the base model alone would be.
    activated = getattr(config, "alora_invocation_tokens", None) is not None
    if config.is_prompt_learning or activated:
        kind = "activated LoRA" if activated else getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(
            f"{field}: {source}: adapter_config.json must be that of an adapter in the model's layers, such as LoRA, "
            f"got {kind}."
        )
    base = f"{field}: {source}: its base model"
    model = load_model(config.base_model_name_or_path, auto_class, field=base, revision=config.revision, **options)
    return put_adapter(model, source, field=field, **place).get_base_model().eval()


def _first(names: Collection[str]) -> str:
    more = ", …" if len(names) > _SHOWN else ""
    return ", ".join(list(names)[:_SHOWN]) + more
