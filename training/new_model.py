"""Configuration and tokenizer of a model that is trained from scratch."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from .. import modeling
from ..conversion.formats.state_spaces import byte_tokenizer
from ..conversion.load_model import load_config, load_tokenizer
from ..conversion.source_files import check_config
from ..harness.fingerprint import pinned_revision
from ..harness.text_files import read_text_file
from ..harness.yaml_values import override, read_yaml
from ..modeling.families import PRESETS
from ..modeling.heads import ZooHeadModel

_SUFFIXES = (".yaml", ".yml", ".json")
# The number of rows of the embedding is rounded up to a multiple of this, as in Mamba's checkpoints.
_MULTIPLE = 8


def resolve_configuration(
    source: str | Mapping[str, Any],
    overrides: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    revision: str | None = None,
    encoder_decoders: bool = False,
) -> PreTrainedConfig:
    """Return the configuration of a new causal language model, or of an encoder-decoder.

    Args:
        source: source of the sizes: a preset of `ssm_zoo.modeling.families`; a .yaml or .json file, or a mapping, with
            `model_type` and configuration keys; or a folder or Hub id of a model of the zoo.
        overrides: "key=YAML value" assignments that replace keys, including `vocab_size`.
        tokenizer: the model's tokenizer, which defines the special ids. Without a `vocab_size` (presets have none) the
            vocabulary is its number of entries, rounded up to a multiple of 8.
        revision: branch, tag or commit of a Hub id.
        encoder_decoders: also accept encoder-decoders.

    Raises:
        ValueError: if there is no such source, it is not of the zoo, a key or value is wrong, or the vocabulary is too
            small for the tokenizer.
    """
    values = override(_read(source, revision, encoder_decoders), overrides)
    if not isinstance(values.get("model_type"), str):
        raise _wrong_model_type(values.get("model_type"), encoder_decoders)
    kind = _configuration_class(values.pop("model_type"), encoder_decoders)
    accepted = configuration_keys(kind)
    for key in values:
        if key not in accepted:
            close = difflib.get_close_matches(str(key), accepted, n=3) or accepted
            raise ValueError(f"config: {kind.model_type} has no key {key!r}. Did you mean {' or '.join(close)}?")
    check_config(values, "config")
    values["vocab_size"] = _vocab_size(values.get("vocab_size"), entries_of(tokenizer))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        own, given = getattr(tokenizer, name), values.get(name)
        if given is not None and given != own:
            raise ValueError(f"config: `{name}` must be left out or the tokenizer's, {own!r}, got {given!r}.")
        values[name] = own
    try:
        return kind(**values)
    except StrictDataclassError as error:
        raise ValueError(f"config: {error.__cause__ or error}") from None


def configuration_commit(source: str | Mapping[str, Any], revision: str | None, output: Path) -> str | None:
    """Return the commit of a Hub id, as `fingerprint.pinned_revision` finds it for a run in `output`; None for every
    other source.

    Raises:
        ValueError: if another source comes with a revision.
        OSError: if the Hub cannot be reached, or has no such repository or revision.
    """
    if isinstance(source, str) and not _is_here(source) and _is_hub_id(source):
        return pinned_revision(source, revision, output, "config")
    if revision is not None:
        raise ValueError(f"revision must be left out unless `config` is a Hub id, got {revision!r} with {source!r}.")
    return None


def is_configuration(source: str) -> bool:
    """Return whether a source is a preset or a file with a configuration, which has no weights."""
    return source in PRESETS or (Path(source).suffix in _SUFFIXES and not Path(source).is_dir())


def _is_here(source: str) -> bool:
    """Return whether a source is a preset, a file or a folder."""
    return is_configuration(source) or Path(source).is_dir()


def configuration_keys(kind: type[PreTrainedConfig]) -> list[str]:
    """Return the keys of a family's configuration in order, without those that transformers gives every model."""
    general = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    more = kind.more_keys() if hasattr(kind, "more_keys") else []  # pyright: ignore[reportAttributeAccessIssue]
    return [*(field.name for field in dataclasses.fields(kind) if field.name not in general), *more]


def changed_keys(config: PreTrainedConfig) -> dict[str, Any]:
    """Return `model_type` and the keys that differ from the family's defaults: a `source` of the same configuration."""
    defaults = {field.name: _as_list(field.default) for field in dataclasses.fields(type(config))}
    keys = {key: _as_list(getattr(config, key)) for key in configuration_keys(type(config)) if key in defaults}
    nested = config.changed_settings() if hasattr(config, "changed_settings") else {}
    return {"model_type": config.model_type, **{key: v for key, v in keys.items() if v != defaults[key]}, **nested}


def recorded_configuration(recorded: Any) -> PreTrainedConfig | None:
    """The configuration that `changed_keys` of any version wrote; None if this version cannot read it."""
    if not isinstance(recorded, dict):
        return None
    try:
        kind = _configuration_class(recorded.get("model_type", ""))
        keys = {key: value for key, value in recorded.items() if key != "model_type"}
        # A configuration takes keys that it does not know, and makes nothing of them.
        return kind(**keys) if keys.keys() <= set(configuration_keys(kind)) else None
    except (StrictDataclassError, TypeError, ValueError):
        return None


def _as_list(value: Any) -> Any:
    """Return a list for a tuple, as in JSON, and other values unchanged."""
    return list(value) if isinstance(value, tuple) else value


def _read(source: str | Mapping[str, Any], revision: str | None, encoder_decoders: bool) -> dict[str, Any]:
    """Return `model_type` and the keys that a source gives."""
    if isinstance(source, Mapping):
        return dict(source)
    if source in PRESETS:
        kind, sizes = PRESETS[source]
        # A preset's vocabulary belongs to its checkpoint's tokenizer.
        return {"model_type": kind.model_type, **{key: v for key, v in sizes.items() if key != "vocab_size"}}
    path = Path(source)
    if path.suffix in _SUFFIXES:
        if not path.is_file():
            raise ValueError(f"config: there is no file {source!r}")
        values = read_yaml(read_text_file(path, "config"), source)
        if not isinstance(values, dict):
            raise ValueError(f"config: {source!r} must have a mapping of keys to values, got {type(values).__name__}.")
        return values
    return _read_model(source, revision, encoder_decoders)


def _read_model(source: str, revision: str | None, encoder_decoders: bool) -> dict[str, Any]:
    """Return the keys of a checkpoint's configuration, without the special ids of its tokenizer."""
    if not Path(source).is_dir() and not _is_hub_id(source):
        presets = _presets(encoder_decoders)
        close = difflib.get_close_matches(source, presets, n=1)
        suggestion = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"`config` must be a preset ({', '.join(presets)}), a .yaml or .json file, a folder of a model, or a "
            f"Hub id OWNER/NAME, got {source!r}.{suggestion}"
        )
    config = load_config(source, field="config", revision=revision)
    kind = _configuration_class(config.model_type, encoder_decoders)
    special = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    return {
        "model_type": config.model_type,
        **{key: getattr(config, key) for key in configuration_keys(kind) if key in vars(config) and key not in special},
    }


def _is_hub_id(source: str) -> bool:
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return "/" in source


def _configuration_class(model_type: str, encoder_decoders: bool = False) -> type[PreTrainedConfig]:
    """Return the configuration class of a family of the zoo that has a causal language model, or writes text."""
    try:
        kind = CONFIG_MAPPING[model_type]
    except KeyError:
        raise _wrong_model_type(model_type, encoder_decoders) from None
    if not _writes(kind, encoder_decoders):
        raise _wrong_model_type(model_type, encoder_decoders)
    return kind


def _writes(kind: type[PreTrainedConfig], encoder_decoders: bool) -> bool:
    """Return whether a family of the zoo has a causal language model, or, if asked for, is an encoder-decoder."""
    tables = [MODEL_FOR_CAUSAL_LM_MAPPING]
    if encoder_decoders:
        tables.append(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
    models = [table.get(kind, None) for table in tables]
    return any(isinstance(model, type) and issubclass(model, ZooHeadModel) for model in models)


def _wrong_model_type(model_type: Any, encoder_decoders: bool = False) -> ValueError:
    accepted = ", ".join(_model_types(encoder_decoders))
    return ValueError(f"config: `model_type` must be one of {accepted}, got {model_type!r}.")


def _model_types(encoder_decoders: bool) -> list[str]:
    """Return the families of the zoo that write text."""
    exported = [getattr(modeling, name) for name in modeling.__all__]
    kinds = [kind for kind in exported if isinstance(kind, type) and issubclass(kind, PreTrainedConfig)]
    return sorted(kind.model_type for kind in kinds if _writes(kind, encoder_decoders))


def _presets(encoder_decoders: bool) -> list[str]:
    """Return the presets of these families."""
    return [name for name, (kind, _) in PRESETS.items() if _writes(kind, encoder_decoders)]


def _vocab_size(given: Any, entries: int) -> int:
    if given is None:
        return -(-entries // _MULTIPLE) * _MULTIPLE
    if not isinstance(given, int) or isinstance(given, bool) or given < entries:
        raise ValueError(
            f"config: `vocab_size` must be at least {entries}, the number of entries of the tokenizer, got {given!r}."
        )
    return given


BYTES = "bytes"
END_OF_TEXT = "<|endoftext|>"


def load_vocabulary(
    source: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or Hub id, or the one for "bytes", whose tokens are the 256 bytes.

    Args:
        source: folder, Hub id or "bytes".
        revision: branch, tag or commit, for a Hub id.
        trust_remote_code: run code that comes with the source.
    """
    if source == BYTES:
        return byte_tokenizer()
    return load_tokenizer(source, revision=revision, trust_remote_code=trust_remote_code)


def learn_vocabulary(documents: Sequence[str], entries: int, *, progress: bool) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE like GPT-2's, which can encode any text. The same texts give the same tokenizer.

    Args:
        documents: the texts.
        entries: maximum size of the vocabulary, at least 257: the end-of-text token, the bytes and the merges. It is
            smaller if the texts have no more pairs to merge.
        progress: show a progress bar.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    backend.train_from_iterator(documents, trainer, length=len(documents))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False)


def entries_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of embedding rows that a tokenizer needs: its largest id plus one. The ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1
