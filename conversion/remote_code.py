"""The check, shared by all commands, that loading a source runs no code of that source without the user's consent.

transformers, peft and sentence-transformers load classes from a repository if its JSON files name them: in `auto_map`
of the configuration, the tokenizer and the processors, as modules of an embedder, or by the base model of an adapter.
Such code is neither run nor copied unless the user asks for it, by a flag and not by answering a prompt. Models and
tokenizers that transformers or this package knows need no such code, whatever the files name.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, TOKENIZER_MAPPING
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
from transformers.utils.hub import cached_file

from .. import modeling as _  # noqa: F401 - registers the zoo's classes, which need no code of a source
from ..harness.json_files import read_json, typed
from ..harness.provenance import HUB_ID

__all__ = ["check_remote_code", "reference_of"]

CAUSAL_LM = "AutoModelForCausalLM"

_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_SENTENCE_TRANSFORMERS = "sentence_transformers."


@dataclass(frozen=True)
class _BroughtCode:
    """Code that loading a source would run.

    Attributes:
        file: file of the source that names it.
        reference: "module.Class", or "owner/repository--module.Class" for the code of another repository.
        purpose: purpose of the code, e.g. " for model_type 'x'".
    """

    file: str
    reference: str
    purpose: str = ""

    def __str__(self) -> str:
        repository, separator, name = self.reference.partition("--")
        return f"{self.file} names {f'{name} of {repository}' if separator else self.reference}{self.purpose}"


def check_remote_code(
    source: str | Path,
    *,
    trusted: bool,
    field: str = "source",
    revision: str | None = None,
    subfolder: str = "",
    auto_class: str | None = CAUSAL_LM,
    tokenizer: bool = True,
) -> None:
    """Raise a ValueError if a source can only be loaded with code of its own, and the user does not trust it.

    Args:
        source: a folder, or a Hub id, from which only configuration files are downloaded.
        trusted: whether the user has passed --trust-remote-code.
        field: what errors call the source.
        revision: branch, tag or commit, for a Hub id.
        subfolder: folder of the source that holds its files.
        auto_class: the Auto class of transformers that loads the model; None if no model is loaded, or if a class of
            the package loads it.
        tokenizer: whether the tokenizer is loaded.

    Raises:
        OSError: if the source cannot be read or found.
    """
    if trusted:
        return
    place = _Source(str(source), revision, subfolder, field)
    found = [*_of_tokenizer(place)] if tokenizer else []
    if auto_class is not None:
        found = [*_of_model(place, auto_class, follow=True), *_of_embedder(place), *found]
    if found:
        raise ValueError(
            f"{field}: {source} brings code of its own ({'; '.join(map(str, dict.fromkeys(found)))}). Read it, then "
            "pass --trust-remote-code (trust_remote_code=True) to run it."
        )


def reference_of(auto_map: Any, key: str) -> str | None:
    """Return the class that an `auto_map` names for an Auto class; the fast one of two tokenizers."""
    if isinstance(auto_map, list | tuple):  # the older form, for tokenizers
        found: Any = auto_map if key == "AutoTokenizer" else None
    else:
        found = auto_map.get(key) if isinstance(auto_map, dict) else None
    if isinstance(found, list | tuple):
        found = next((name for name in reversed(found) if name is not None), None)
    return None if found is None else str(found)


@dataclass(frozen=True)
class _Source:
    """A folder or a Hub id whose configuration files are read."""

    place: str
    revision: str | None
    subfolder: str
    field: str

    def read(self, name: str) -> Any:
        """Return the value in a JSON file of the source; None if there is no such file."""
        path = cached_file(
            self.place,
            name,
            revision=self.revision,
            subfolder=self.subfolder,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            # A file that neither the Hub nor the cache has will not be loaded later either.
            _raise_exceptions_for_connection_errors=False,
        )
        if path is None:
            return None
        return read_json(path, f"{self.field}: {name} of {self.place}", allow_infinity=True)

    def read_object(self, name: str) -> dict[str, Any] | None:
        """Return the object in a JSON file of the source; None if there is no such file.

        Raises:
            ValueError: if the file holds anything else.
        """
        value = self.read(name)
        return None if value is None else typed(value, dict, f"{self.field}: {name} of {self.place}", "")


def _of_model(source: _Source, auto_class: str, *, follow: bool) -> Iterator[_BroughtCode]:
    config, adapter = source.read_object("config.json"), source.read_object("adapter_config.json")
    if adapter is not None:
        if adapter.get("megatron_config") is not None:
            yield _BroughtCode("adapter_config.json", str(adapter.get("megatron_core")))
        base = adapter.get("base_model_name_or_path")
        if config is None and follow and isinstance(base, str) and base:
            if not Path(base).is_dir() and not HUB_ID.fullmatch(base):
                raise ValueError(
                    f"{source.field}: adapter_config.json of {source.place}: `base_model_name_or_path` must be the "
                    f"folder or Hub id of the base model, got {base!r}. Write it there, or train with --merge for a "
                    "whole model."
                )
            # The base model is loaded as well; it is not an adapter itself.
            yield from _of_model(_Source(base, None, "", source.field), auto_class, follow=False)
    config = config or {}
    kind = _config_class(config)
    if kind is not None and (auto_class == "AutoConfig" or kind in getattr(transformers, auto_class)._model_mapping):
        return
    for key in (auto_class,) if kind is not None else ("AutoConfig", auto_class):
        reference = reference_of(config.get("auto_map"), key)
        if reference is not None:
            yield _BroughtCode("config.json", reference, f" for model_type {config.get('model_type')!r}")
            return


def _config_class(config: dict[str, Any]) -> type | None:
    """Return the class of a configuration, if transformers or the package knows it."""
    model_type = config.get("model_type")
    return CONFIG_MAPPING[model_type] if isinstance(model_type, str) and model_type in CONFIG_MAPPING else None


def _of_tokenizer(source: _Source) -> Iterator[_BroughtCode]:
    values = source.read_object("tokenizer_config.json") or {}
    reference = reference_of(values.get("auto_map"), "AutoTokenizer")
    if reference is None:
        return
    name, kind = values.get("tokenizer_class"), _config_class(source.read_object("config.json") or {})
    known = isinstance(name, str) and any(
        tokenizer_class_from_name(each) is not None
        for each in (name, name.removesuffix("Fast"), f"{name.removesuffix('Fast')}Fast")
    )
    if not known and (kind is None or kind not in TOKENIZER_MAPPING):
        yield _BroughtCode("tokenizer_config.json", reference)


def _of_embedder(source: _Source) -> Iterator[_BroughtCode]:
    """Yield the modules of an embedder of sentence-transformers, and of the processors that only embedders read."""
    modules = source.read("modules.json")
    for module in modules if isinstance(modules, list) else []:
        kind = module.get("type") if isinstance(module, dict) else None
        if isinstance(kind, str) and not kind.startswith(_SENTENCE_TRANSFORMERS):
            yield _BroughtCode("modules.json", kind)
    for name in _PROCESSORS if modules is not None else ():
        values = source.read_object(name) or {}
        known = (values.get(key) for key in ("processor_class", "image_processor_type", "feature_extractor_type"))
        if any(isinstance(each, str) and hasattr(transformers, each) for each in known):
            continue
        auto_map: Any = values.get("auto_map")
        for key in auto_map if isinstance(auto_map, dict) else ():
            yield _BroughtCode(name, str(reference_of(auto_map, key)))
