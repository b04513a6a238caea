"""Run a selection of layers and heads: from a teacher and a text to a folder with the choice and its evidence.

The folder contains `run.json` and, while the selection runs, `measured.json`; at the end `selection.yaml` (the part of
a recipe), `selection.json` (the evidence) and `selection.png`. The same command resumes an interrupted selection.
"""

import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..harness.fingerprint import claim_run, fingerprint
from ..harness.machine import describe_machine
from ..harness.processes import command_line
from ..harness.provenance import provenance
from ..harness.published import decoration
from ..harness.run_folder import check_output_folder, claimed_folders_end, write_json
from ..harness.whole_files import write_text_whole, write_whole
from ..harness.yaml_values import write_yaml
from ..reports.selection_plot import draw_selection
from ..training.report import public_sources
from .data import TokenWindows, check_vocabulary, read_texts, tokenize
from .fetch import teacher_commit
from .report import finite
from .selection import Measurements, Selector
from .selection_settings import SelectionSettings
from .teacher import load_teacher

KIND = "ssm-zoo selection of layers"
FRAGMENT, EVIDENCE, PLOT = "selection.yaml", "selection.json", "selection.png"
"""Names of the files in the folder of a selection."""
_MEASURED = "measured.json"


@claimed_folders_end()
def select(
    settings: SelectionSettings, output: str | Path, *, command: str | None = None, progress: bool = True
) -> dict[str, Any]:
    """Choose layers and heads of a teacher, or resume such a selection.

    Args:
        settings: the settings.
        output: a new or empty folder, or the folder of an unfinished selection with the same settings.
        command: command line for the report; None: the command line of this process.
        progress: show progress bars.

    Returns:
        The evidence, as in `selection.json`.

    Raises:
        ValueError: if settings, teacher, text and folder do not fit together (nothing is written in this case), or the
            folder contains a finished selection.
    """
    output = Path(output)
    check_output_folder(output)
    if (output / EVIDENCE).is_file():
        raise ValueError(f"output folder: {output} contains a finished selection. Give another folder.")
    texts = read_texts(settings.data, "train")
    commit = teacher_commit(settings.teacher, settings.revision, output)
    teacher = load_teacher(settings.teacher, revision=commit, trust_remote_code=settings.trust_remote_code)
    teacher.model.to("cuda" if torch.cuda.is_available() else "cpu")  # pyright: ignore[reportArgumentType]
    check_vocabulary(teacher.tokenizer, teacher.model.config)
    windows = TokenWindows(tokenize(texts, teacher.tokenizer, progress=progress))
    ids = windows.windows(1)[:, 0] if len(windows) else torch.zeros(0, dtype=torch.long)
    selector = Selector(teacher, ids, settings, progress=progress)
    identity = {**settings.identity, "data_sha256": windows.fingerprint()}
    claim_run(output, identity, {"teacher": fingerprint(settings.teacher, commit)}, KIND)
    selector.measurements = Measurements(output / _MEASURED)
    source, licence = provenance(settings.teacher, commit)
    report = {
        "format": 1,
        "kind": KIND,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command or command_line(sys.argv[1:]),
        **describe_machine(),
        "settings": {**settings.identity, "teacher": source, "data": public_sources(settings.data)},
        "teacher": {
            "source": source,
            "model_type": teacher.model.config.model_type,
            "num_layers": teacher.num_layers,
            "num_key_value_heads": selector.heads_per_layer,
            "licence": licence,
        },
        **selector.select(),
    }
    with decoration("the plot"):
        write_whole(output / PLOT, partial(draw_selection(report).savefig, format="png"))
    write_text_whole(output / FRAGMENT, fragment(report))
    write_json(output / EVIDENCE, finite(report))
    (output / _MEASURED).unlink(missing_ok=True)
    return report


def fragment(report: dict[str, Any]) -> str:
    """Return the part of a recipe that a selection chose, as YAML."""
    student: dict[str, Any] = {"layers": report["layers"]}
    if report["exact_heads"]:
        student["exact_heads"] = report["exact_heads"]
    settings = report["settings"]
    note = f"# Chosen by {settings['methods'][0]}"
    if report["exact_heads"]:
        note += f", heads by {settings['head_method']}; exact_heads needs student.mixer bounded_attention"
    return f"{note}. Evidence: {EVIDENCE}\n{write_yaml({'student': student})}"
