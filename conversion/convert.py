"""Conversion of other libraries' checkpoints to ours and back, checked by keys, shapes and the logits of both sides.

Weights are copied from file to file, one shard at a time. Only the comparison of logits loads both models, one after
the other, in float32.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..harness.json_files import json_text
from ..harness.whole_files import new_folder
from ..modeling.heads import ZooForCausalLM
from ..modeling.hub_code import code_licence
from ..modeling.prefix import has_prefix
from ..modeling.pretrained import ZooPreTrainedModel, names_in_float32
from .carried_files import LICENCES, TOKENIZER, carry_files, check_replaceable
from .checkpoint_keys import fit_keys, strip_prefix, without_wrappers
from .formats import FORMATS, detect
from .formats.bare_formats import is_transfixer, read_mixer
from .formats.format import HEAD, Format, config_errors, empty_model, own_tensors, read_config
from .formats.maskedmixers import MASKED_MIXER
from .formats.state_spaces import BYTES, byte_tokenizer
from .hub_source import source_folder
from .load_model import check_finite
from .parity import Difference, ParityReport, check_tensors, compare, logits_of_folder, logits_of_tensors
from .remote_code import check_remote_code
from .rules import LazyTensor, Mapper, check, lazy
from .weight_choice import PICKLE, PICKLE_INDEX
from .weight_files import Weights, read_checkpoint, write_weights

__all__ = ["convert"]

_ZOO_CLASSES: tuple[Any, ...] = tuple(dict.fromkeys(each.zoo_class for each in FORMATS))
_TARGETS = ("zoo", "transformers", "state-spaces", "cartesia", "maskedmixers", "torchscale", "fla")
_WITHOUT_TYPE = ("state-spaces", "torchscale")  # libraries whose config.json has no model type
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_EMBEDDING = "backbone.embeddings.weight"
_CARRIED = (r"generation_config\.json", TOKENIZER, LICENCES)


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint that was read, in its own layout and in ours.

    Attributes:
        format: its layout; None for ours.
        config: its own configuration, as `format.read` returns it.
        tensors: its own tensors, without a head that is tied to the embedding.
        model: our model, without values.
        ours: the tensors of our model.
        notes: lines for the report.
        is_plain: whether the format's library can read the same tensors from the folder by itself.
        mappers: the mappers made so far, by name of the format.
    """

    format: Format | None
    config: Any
    tensors: dict[str, LazyTensor]
    model: ZooPreTrainedModel
    ours: dict[str, LazyTensor]
    notes: list[str] = field(default_factory=list)
    is_plain: bool = False
    mappers: dict[str, Mapper] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of its format."""
        return self.format.name if self.format else f"zoo {self.zoo_config.model_type}"

    @property
    def zoo_class(self) -> type[ZooPreTrainedModel]:
        """Class of our model."""
        return type(self.model)

    @property
    def zoo_config(self) -> Any:
        """Configuration of our model."""
        return self.model.config

    def mapper(self, form: Format) -> Mapper:
        """Return the rules of a format applied to our model's keys. Each mapper is built once."""
        if form.name not in self.mappers:
            self.mappers[form.name] = form.mapper(self.model)
        return self.mappers[form.name]


def convert(
    source: str | Path,
    folder: str | Path,
    *,
    to: str | None = None,
    dtype: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    max_shard_size: int | str = "5GB",
    settings: Sequence[str] = (),
    revision: str | None = None,
    prefix: str | None = None,
    trust_remote_code: bool = False,
) -> ParityReport:
    """Convert a checkpoint with a language-modelling head. The folder appears whole or not at all.

    The sources are the teachers of `formats.TEACHERS`, transformers' decoders with attention in every block; its
    `mamba`, `mamba2`, `falcon_mamba`, `bamba` and, without experts, `jamba`; Mamba-1 and Mamba-2 of state-spaces, the
    latter also with an MLP in each block or attention in some blocks; Cartesia's `llamba`; RetNet of torchscale, with
    its configuration as a config.json, and of flash-linear-attention; and masked, Toeplitz and structured recurrent
    mixers, which have no config.json and are recognised by their keys. A model is converted back
    to the type that it came from, if that can still express it.

    Tokenizer, licence and generation config are carried over. A state-spaces checkpoint with 256 tokens and without a
    tokenizer gets MambaByte's. A zoo checkpoint is written self-contained, as by `save_pretrained` of a zoo model.

    Args:
        source: a folder, or a Hub id.
        folder: a new or empty folder to write; its parents are made as needed.
        to: "zoo", "transformers", "state-spaces", "cartesia", "maskedmixers", "torchscale" or "fla"
            (flash-linear-attention); by default "transformers" for a zoo checkpoint, otherwise "zoo".
        dtype: "float32", "bfloat16" or "float16"; by default, each tensor keeps its dtype. With any of these,
            parameters that our models keep in float32 (A_log, D, the bias of the step sizes) are written in float32.
        allow_pickle: read `pytorch_model.bin` or its shards, with `weights_only=True`, if there is no safetensors
            file. The state dict may be under "state_dict", "model_state_dict", "model" or "module".
        overwrite: replace a folder that holds a checkpoint.
        verify: compare the logits of both sides for random tokens, if transformers has the model.
        max_shard_size: largest size of a weight file in bytes, or a text such as "5GB". It bounds the memory needed.
        settings: options that cannot be inferred from tensor shapes (mixers without a config.json), "name=value" each.
            All mixers have `pad_mode` ("shift"; "as_trained" if trained on rows padded on the left), `pad_token_id`,
            `bos_token_id`, `eos_token_id`, `hidden_act` (by default the authors') and `context_overflow`. Toeplitz and
            recurrent mixers have `mixing` (by default as in the authors' code, if that is unique), `decay_constant`
            (by default N // 512 for N positions, N // 256 with several taps, at least 1), `use_projections` (heads in
            one tensor; true by default) and `mean` (Toeplitz heads with RMS norms; required). A transfixer without a
            config.json has `num_attention_heads` (required), `rope_theta` (10000) and `norm_eps` (1e-6).
        revision: branch, tag or commit, if the source is a Hub id.
        prefix: prefix to remove from keys. Without it, a prefix is removed, added or replaced if all keys then fit the
            configuration; the report's notes say so.
        trust_remote_code: copy the code of a tokenizer that transformers does not have. No code is run.

    Returns:
        The report.

    Raises:
        ValueError: if an argument is wrong; if the source has an unknown format, has features that the target cannot
            express, or keys, shapes or dtypes that differ from its configuration; if a weight to write is not finite;
            or if the logits differ.
        OSError: if files cannot be read, the Hub cannot be reached, or a repository is not found.
    """
    folder = Path(os.path.abspath(folder))
    if to is not None and to not in _TARGETS:
        raise ValueError(f"--to must be one of {', '.join(_TARGETS)}, got {to!r}.")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
    _check_folder(folder, overwrite)
    read_from, commit = source_folder(
        source, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
    )
    check_remote_code(read_from, trusted=trust_remote_code, auto_class=None)
    if folder.resolve() in (read_from.resolve(), *read_from.resolve().parents):
        raise ValueError(f"{folder} is or holds the source. Write to another folder.")
    read = _read(read_from, allow_pickle, settings, prefix)
    if commit is not None:
        read.notes.insert(0, f"source: {source} at commit {commit}")
    if verify and read.is_plain:
        _check_reading(read, read_from)
    to = to or ("zoo" if read.format else "transformers")
    target = None if to == "zoo" else _target_format(to, read)
    ours = read.ours if dtype is None else _cast(read, _DTYPES[dtype])
    with config_errors():
        config = target.config(read.zoo_config) if target else read.zoo_config
    tensors = _tensors_of(target, read, config, ours)
    with new_folder(folder, overwrite=overwrite) as made:
        carried = _carry(read, read_from, made, target, trust_remote_code)
        write_weights(made, _only_finite(tensors, dtype), max_shard_size=max_shard_size)
        _write_config(made, target, read.model, config, _dtype(ours))
        logits = _compare(read, ours, target, made) if verify else "not asked for"
    return ParityReport(
        source=read.name,
        target=target.name if target else f"zoo {read.zoo_config.model_type}",
        keys_read=len(read.tensors),
        shapes={key: tensor.shape for key, tensor in tensors.items()},
        dtypes={key: tensor.dtype for key, tensor in tensors.items()},
        carried=carried,
        logits=logits,
        notes=read.notes,
    )


def _check_folder(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise ValueError(
            f"{folder} exists and is not empty. Write to a new or empty folder, or pass --overwrite (overwrite=True) "
            "to replace a checkpoint."
        )
    if not (folder / "config.json").is_file() and not _is_bare(folder):
        raise ValueError(f"{folder} is not replaced: it holds no config.json, so it is no checkpoint.")
    check_replaceable(folder)


def _is_bare(folder: Path) -> bool:
    """Return whether a folder holds weights without a config.json."""
    weights = any(folder.glob("model*.safetensors")) or any(
        (folder / name).is_file() for name in (PICKLE, PICKLE_INDEX)
    )
    return weights and not (folder / "config.json").is_file()


def _read(folder: Path, allow_pickle: bool, settings: Sequence[str] = (), prefix: str | None = None) -> _Checkpoint:
    """Read a checkpoint, after checking its keys, shapes and dtypes against its configuration or its sizes."""
    if _is_bare(folder):
        return _read_mixer(folder, _read_tensors(folder, allow_pickle, prefix), settings)
    values = read_config(folder)
    if values.get("model_type") == "llama":
        weights = _read_tensors(folder, allow_pickle, prefix)
        if is_transfixer(weights.tensors):
            return _read_mixer(folder, weights, settings)
    if settings:
        raise ValueError(f"--set must be left out for a checkpoint with a config.json, got {settings[0]!r}.")
    found = detect(values)
    zoo_class = found.zoo_class if found else _zoo_class(values)
    config, zoo_config = _read_configuration(folder, found, zoo_class)
    weights = _read_tensors(folder, allow_pickle, prefix)
    model = empty_model(zoo_class, zoo_config)
    mapper = found.mapper(model) if found else None
    expected = mapper.expected() if mapper else _lazy(own_tensors(model))
    embedding = mapper.theirs_of(_EMBEDDING) if mapper else _EMBEDDING
    tied = bool(zoo_config.tie_word_embeddings)
    given, unread = _without_unread(weights.tensors, found)
    fitted = fit_keys(given, expected, embedding, tied=tied, former_keys=found.former_keys if found else {})
    tensors = fitted.tensors
    if tied and HEAD in tensors and embedding in tensors:
        head = tensors.pop(HEAD)
        if head.shape != tensors[embedding].shape or not torch.equal(head.load(), tensors[embedding].load()):
            raise ValueError(
                f"{folder.name}: config.json says that the head is tied to the embedding (`tie_word_embeddings`), but "
                f"{HEAD} and {embedding} differ. Set `tie_word_embeddings` to false, or remove {HEAD}."
            )
    hint = fitted.hint
    if not tied and HEAD in expected and HEAD not in tensors and not hint:
        hint = " If the head is tied to the embedding, set `tie_word_embeddings` to true in config.json."
    check(tensors, expected, folder.name, hint=hint)
    ours = mapper.to_ours(tensors) if mapper else tensors
    notes, is_plain = [*weights.notes, *unread, *fitted.notes], weights.is_plain and not fitted.notes
    mappers = {found.name: mapper} if found and mapper else {}
    return _Checkpoint(found, config, tensors, model, ours, notes, is_plain, mappers)


def _read_configuration(folder: Path, found: Format | None, zoo_class: type[ZooPreTrainedModel]) -> tuple[Any, Any]:
    """Return the configuration in a folder, as an object of its own library and as ours."""
    read = found.read if found else zoo_class.config_class.from_pretrained  # pyright: ignore[reportOptionalMemberAccess]
    with config_errors():
        config: Any = read(folder)
        return config, found.zoo_config(config) if found else config


def _without_unread(
    tensors: Mapping[str, LazyTensor], found: Format | None
) -> tuple[Mapping[str, LazyTensor], list[str]]:
    """Leave out tensors that no model reads; return the others, and a line for the report."""
    unread = [key for key in tensors if found and found.unread and re.search(found.unread, key)]
    if not unread:
        return tensors, []
    kept = {key: tensor for key, tensor in tensors.items() if key not in unread}
    return kept, [f"keys: {len(unread)} that no model reads are left out, the first is {unread[0]}"]


def _read_tensors(folder: Path, allow_pickle: bool, prefix: str | None) -> Weights:
    """Read the weights of a folder, and remove the prefix from their keys if there is one to remove."""
    weights = read_checkpoint(folder, allow_pickle=allow_pickle)
    if prefix is None:
        return weights
    tensors, notes = strip_prefix(weights.tensors, prefix)
    return Weights(tensors, [*weights.notes, *notes], is_plain=False)


def _read_mixer(folder: Path, weights: Weights, settings: Sequence[str]) -> _Checkpoint:
    """Read a checkpoint of position mixers, which is recognised by its keys."""
    tensors, unwrapped = without_wrappers(weights.tensors)
    reading, used = read_mixer(folder, tensors, settings)
    model = empty_model(reading.model_class, reading.config)
    mapper = Mapper(reading.rules, own_tensors(model))
    check(used, mapper.expected(), folder.name, "the sizes of its first block")
    form = replace(MASKED_MIXER, name=reading.name, zoo_class=reading.model_class)
    ours, notes = mapper.to_ours(used), [*weights.notes, *unwrapped, *reading.notes]
    return _Checkpoint(form, None, used, model, ours, notes, mappers={form.name: mapper})


def _check_reading(read: _Checkpoint, folder: Path) -> None:
    """Compare the tensors with those that the source's own library loads from the folder, if it is transformers."""
    model_class = read.format.model_class if read.format else read.zoo_class
    if model_class is not None:
        check_tensors(model_class, folder, read.tensors)


def _zoo_class(values: dict[str, Any]) -> type[ZooForCausalLM]:
    """Return the class of our model that a config.json names."""
    by_type = {str(kind.config_class.model_type): kind for kind in _ZOO_CLASSES}  # pyright: ignore[reportOptionalMemberAccess]
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in by_type:
        theirs = [form.name.split()[1] for form in FORMATS if form.library not in _WITHOUT_TYPE and not form.bare]
        raise ValueError(
            f"config.json: `model_type` must be one of {', '.join([*theirs, *by_type])}, or missing beside the "
            f"`d_model` and `n_layer` of state-spaces or the `decoder_retention_heads` of torchscale, got "
            f"{model_type!r}."
        )
    architectures = values.get("architectures") or [by_type[model_type].__name__]
    if architectures != [by_type[model_type].__name__]:
        raise ValueError(
            f"config.json: `architectures` must be [{by_type[model_type].__name__!r}], as only language models are "
            f"converted, got {architectures!r}."
        )
    return by_type[model_type]


def _lazy(tensors: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    return {key: lazy(tensor) for key, tensor in tensors.items()}


def _target_format(to: str, read: _Checkpoint) -> Format:
    """Return the format to write.

    Raises:
        ValueError: if the other library has no such model.
    """
    if has_prefix(read.zoo_config):
        raise ValueError(
            f"--to {to}: `prefix_bidirectional` must be False, got True. No other library reads a prefix in both "
            "directions."
        )
    formats = [form for form in FORMATS if form.library == to and form.zoo_class is read.zoo_class]
    native = getattr(read.zoo_config, "native_model_type", None)
    for form in sorted(formats, key=lambda form: native is None or form.model_type != native):
        if form.writes(read.zoo_config):
            return form
    known = ", ".join(form.name for form in formats) or "none"
    raise ValueError(
        f"--to {to}: that library has no model like this {read.zoo_config.model_type}. Its similar formats: {known}."
    )


def _cast(read: _Checkpoint, dtype: torch.dtype) -> dict[str, LazyTensor]:
    """Return our tensors in a dtype, except for those that the model keeps in float32."""
    precise = tuple(f".{name}" for name in names_in_float32(read.model))
    return {key: tensor.to(torch.float32 if key.endswith(precise) else dtype) for key, tensor in read.ours.items()}


def _dtype(tensors: Mapping[str, LazyTensor]) -> torch.dtype:
    """Return the dtype of the embedding or, without one, of the first tensor."""
    first = next(iter(tensors))
    found = (key for key in (_EMBEDDING, _EMBEDDING.removeprefix("backbone."), first) if key in tensors)
    return tensors[next(found)].dtype


def _tensors_of(
    target: Format | None, read: _Checkpoint, config: Any, ours: dict[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """Return the tensors to write, after checking them against the model that reads them."""
    if target is None:
        return ours
    mapper = read.mapper(target)
    tensors = mapper.from_ours(ours)
    if target.model_class is not None:
        check(tensors, _lazy(own_tensors(empty_model(target.model_class, config))), target.name)
    elif read.zoo_config.tie_word_embeddings and target.keeps_tied_head:
        tensors[HEAD] = tensors[mapper.theirs_of(_EMBEDDING)]
    return tensors


def _only_finite(tensors: Mapping[str, LazyTensor], dtype: str | None) -> dict[str, LazyTensor]:
    """Return the tensors, each checked for numbers that are not finite when it is read.

    The logits of random tokens do not show all of them: they depend on few rows of the embedding.
    """
    remedy = "" if dtype is None else f"If those of the source are, {dtype} is too narrow: choose another --dtype."

    def load(key: str, tensor: LazyTensor) -> Tensor:
        value = tensor.load()
        check_finite({key: value}, "the weights to write", remedy)
        return value

    return {key: LazyTensor(each.shape, each.dtype, partial(load, key, each)) for key, each in tensors.items()}


def _write_config(
    folder: Path, target: Format | None, model: ZooPreTrainedModel, config: Any, dtype: torch.dtype
) -> None:
    if target is not None and target.bare:
        return
    if target is not None and target.model_class is None:
        (folder / "config.json").write_text(json_text(config, "config.json") + "\n", encoding="utf-8")
        return
    config.dtype = dtype
    config.architectures = [(target.model_class if target and target.model_class else type(model)).__name__]
    if target is None:
        model.name_classes()
        model.save_code(folder)
    config.save_pretrained(folder)


def _carry(read: _Checkpoint, source: Path, made: Path, target: Format | None, trust_remote_code: bool) -> list[str]:
    """Copy the files that are the same in every format, and return their names."""
    carried = carry_files(source, made, *_CARRIED, trust_remote_code=trust_remote_code)
    licence = made / "LICENSE"
    # If a zoo model's weights have no licence of their own, the file is the licence of the code, which is not carried.
    of_code = licence.is_file() and licence.read_text(encoding="utf-8") == code_licence()
    if of_code and read.format is None and target is not None:
        licence.unlink()
        carried.remove("LICENSE")
    tokenizer = any(name.startswith("tokenizer") for name in carried)
    from_state_spaces = read.format is not None and read.format.library == "state-spaces"
    is_byte_model = from_state_spaces and read.zoo_config.vocab_size == BYTES
    if is_byte_model and not tokenizer and (target is None or target.library != "state-spaces"):
        byte_tokenizer().save_pretrained(made)
        carried.append("a tokenizer of bytes, as the source has none")
    return carried


def _compare(read: _Checkpoint, ours: dict[str, LazyTensor], target: Format | None, made: Path) -> Difference | str:
    """Compare the logits of our model and of transformers', one of which is loaded from the files that were written.

    The written folder is read like any other source, so the comparison does not use the mapper that wrote it.
    """
    form = next((each for each in (target, read.format) if each is not None and each.model_class is not None), None)
    config = read.config if form is not None and form is read.format else None
    try:
        form = form or _target_format("transformers", read)
        config = config or form.config(read.zoo_config)
    except ValueError as error:
        return f"transformers has no such model ({error})"
    assert form.model_class is not None and isinstance(config, PreTrainedConfig)
    if form is target:
        theirs = logits_of_folder(form.model_class, made)
    else:
        theirs = logits_of_tensors(form.model_class, config, read.mapper(form).from_ours(ours))
    if target is None:
        mine = logits_of_folder(read.zoo_class, made)
    else:
        again = _read(made, allow_pickle=False)
        mine = logits_of_tensors(again.zoo_class, again.zoo_config, again.ours)
    return compare(mine, theirs, f"{form.model_class.__name__} and {read.zoo_class.__name__}")
