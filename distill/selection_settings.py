"""The settings of a selection of layers and heads, as typed data, checked before anything is loaded or written.

The docstring of a field is also the help of its command-line option.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..harness.settings import Option, SettingsBase, check, refused, wrong
from ..training.settings import Count, NonNegative, Sources, Text, names


class SelectionSettings(SettingsBase):
    """The settings of a selection of layers to convert and heads to keep exact."""

    teacher: Annotated[Text, Option(argument=True, metavar="TEACHER")]
    """Folder, Hub id or GGUF file of the teacher."""
    data: Annotated[Sources, Option(metavar="TEXT")]
    """Text to measure on, as a recipe's data.train; may be repeated."""
    layers: Annotated[Count | None, Option(metavar="N", default="half of the teacher's layers")] = None
    """Number of layers to convert."""
    methods: Annotated[
        list[Literal["uniform", "ablation", "restore", "retrieval"]],
        Field(min_length=1),
        Option(name="--method", metavar="METHODS", parse=names, default="restore"),
    ] = ["restore"]
    """How layers are ranked. uniform: even distances, nothing is measured. ablation: harm when the attention of one
    layer of the teacher is set to zero. restore: gain when one layer gets its attention back in a student that has a
    window and sinks in all layers. retrieval: attention of the layer's heads to the passage that a repetition copies.
    Of several, separated by commas, the first chooses and the others are measured beside it."""
    heads: Annotated[int, Field(ge=0)] = 0
    """Number of key-value heads of converted layers that keep full attention (student.exact_heads)."""
    head_method: Literal["retrieval", "restore"] = "retrieval"
    """How heads are ranked. retrieval: attention to the passage that a repetition copies. restore: gain when that head
    alone gets its full attention back, one measurement for each head of the converted layers."""
    tokens: Count = 2048
    """Tokens on which the divergence from the teacher is measured."""
    sequence_length: Annotated[int, Field(ge=2)] = 512
    """Length of the windows of these tokens; longer than the student's window, so that it matters."""
    distance: Count = 416
    """Tokens between a passage and its repetition, for the repeat loss and the attention to the copied passage."""
    window: Count = 32
    """Tokens in the window of the untrained student of restore."""
    sinks: Annotated[int, Field(ge=0)] = 4
    """First tokens that this student keeps."""
    recall: NonNegative = 0.3
    """Weight of the change of the repeat loss in a score; the change of the divergence has the weight 1."""
    revision: Annotated[str | None, Option(metavar="REVISION")] = None
    """Branch, tag or commit of the teacher, for a Hub id."""
    trust_remote_code: bool = False
    """Run the Python code that the teacher's tokenizer brings along. Read it first."""

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> SelectionSettings:
        if len(set(self.methods)) < len(self.methods):
            raise refused("method", f"must name each method once, got {', '.join(self.methods)}")
        if self.tokens < self.sequence_length:
            raise wrong("tokens", self.tokens, f"at least sequence_length = {self.sequence_length}, one window")
        restored = "restore" in self.methods or (self.heads and self.head_method == "restore")
        if restored and self.window + self.sinks >= self.sequence_length:
            most = f"below sequence_length - sinks = {self.sequence_length - self.sinks}, so that restore has an effect"
            raise wrong("window", self.window, most)
        if not self.heads and "head_method" in self.model_fields_set:
            raise refused("head_method", "has no effect without --heads. Remove it, or give the number of heads.")
        return self

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that identify a selection: all that affect its results."""
        return self.model_dump(mode="json", exclude={"trust_remote_code"})


def parse_selection(values: dict[str, Any]) -> SelectionSettings:
    """Check the settings of a selection.

    Raises:
        ValueError: with a sentence for each setting that is not accepted.
    """
    return check(SelectionSettings, values)
