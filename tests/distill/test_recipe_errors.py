"""Recipes that are refused: every message names the key, the value and what is accepted."""

from pathlib import Path
from typing import Any

import pytest

from ssm_zoo.distill.recipe import parse_recipe, resolve_layers
from ssm_zoo.distill.recipe_files import load_recipe

TEXT = """
teacher: folder/of/teacher
student: {layers: odd, mixer: discrete_mamba2}
data: {train: train.txt, heldout: [a.txt, b.txt], sequence_length: 64}
stages:
  - {name: align, objective: hidden_state_alignment, tokens: 1000, batch_size: 4, learning_rate: 2e-3}
  - {name: distil, objective: logit_distillation, tokens: 1e6, batch_size: 2, learning_rate: 5e-4, schedule: wsd}
"""


def write(tmp_path: Path, text: str = TEXT) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def values(**changes: Any) -> dict[str, Any]:
    stage = {"name": "one", "objective": "matrix_orientation", "tokens": 8, "batch_size": 1, "learning_rate": 1.0}
    base = {"teacher": "t", "student": {}, "data": {"train": "a", "heldout": "b"}, "stages": [stage]}
    return {**base, **changes}


REFUSED = [
    pytest.param(["teacher=1e5"], ["`teacher` must be a text", ", got 100000.0"], id="number-for-text"),
    pytest.param(["teacher=''"], ["`teacher` must be a text that is not empty", ", got ''"], id="empty-text"),
    pytest.param(
        ["stages.1.learning_rte=1"],
        [
            "`stages.1.learning_rte` is unknown",
            "did you mean 'learning_rate'?",
            "accepted keys: name, objective, train",
        ],
        id="misspelt-key",
    ),
    pytest.param(["zzz=1"], ["`zzz` is unknown (got 1); accepted keys: teacher, student"], id="unknown-key"),
    pytest.param(
        ["data.test=a"],
        ["`data.test` is unknown (got 'a')", "train, heldout, sequence_length"],
        id="unknown-nested-key",
    ),
    pytest.param(
        ["stages.0={name: x}"],
        [
            "`stages.0.objective` is missing",
            "`stages.0.tokens` is missing",
            "required: name, objective, tokens, batch_size, learning_rate",
        ],
        id="missing-keys",
    ),
    pytest.param(
        ["stages.0.learning_rate=fast"],
        ["`stages.0.learning_rate` must be a number above 0", ", got 'fast'"],
        id="text-for-number",
    ),
    pytest.param(
        ["stages.0.learning_rate=0"], ["`stages.0.learning_rate` must be", ", got 0"], id="zero-learning-rate"
    ),
    pytest.param(["stages.0.learning_rate=.nan"], ["`stages.0.learning_rate` must be", ", got nan"], id="nan"),
    pytest.param(["stages.0.weight_decay=.inf"], ["`stages.0.weight_decay` must be", ", got inf"], id="infinity"),
    pytest.param(
        ["stages.0.weight_decay=true"], ["`stages.0.weight_decay` must be", ", got True"], id="bool-for-number"
    ),
    pytest.param(
        ["stages.0.weight_decay=-1e-9"],
        ["`stages.0.weight_decay` must be a number of 0 or more", ", got -1e-09"],
        id="negative",
    ),
    pytest.param(
        ["stages.0.tokens=1.5"],
        ["`stages.0.tokens` must be a whole number of 1 or more", ", got 1.5"],
        id="fraction-of-a-token",
    ),
    pytest.param(["stages.0.tokens=0"], ["`stages.0.tokens` must be", ", got 0"], id="no-tokens"),
    pytest.param(["stages.0.tokens=true"], ["`stages.0.tokens` must be", ", got True"], id="bool-for-count"),
    pytest.param(
        ["stages.0.sequence_length=1"],
        ["`stages.0.sequence_length` must be a whole number of 2", ", got 1"],
        id="one-token",
    ),
    pytest.param(
        ["data.sequence_length=x"], ["`data.sequence_length` must be", ", got 'x'"], id="bad-length-is-not-passed-on"
    ),
    pytest.param(
        ["stages.0.warmup=0.6"],
        ["`stages.0.warmup` must be a share of the steps from 0 to 0.5", ", got 0.6"],
        id="warmup",
    ),
    pytest.param(
        ["stages.1.warmup=0.5", "stages.1.decay=0.6"],
        ["`stages.1.decay` must be at most", ", got 0.6"],
        id="warmup-and-decay",
    ),
    pytest.param(
        ["stages.0.betas=[0.9, 1]"], ["`stages.0.betas` must be two numbers", ", got [0.9, 1]"], id="beta-of-1"
    ),
    pytest.param(["stages.0.betas=[0.9]"], ["`stages.0.betas` must be", ", got [0.9]"], id="one-beta"),
    pytest.param(["stages.0.max_grad_norm=0"], ["`stages.0.max_grad_norm` must be", ", got 0"], id="max-grad-norm"),
    pytest.param(["stages.1.temperature=0"], ["`stages.1.temperature` must be", ", got 0"], id="temperature"),
    pytest.param(
        ["stages.1.ce_weight=1.1"], ["`stages.1.ce_weight` must be a number from 0 to 1", ", got 1.1"], id="ce-weight"
    ),
    pytest.param(
        ["stages.0.schedule=linear"],
        ["`stages.0.schedule` must be 'cosine', 'wsd' or", ", got 'linear'"],
        id="schedule",
    ),
    pytest.param(
        ["stages.0.name=Stage 1"], ["`stages.0.name` must be lower-case letters", ", got 'Stage 1'"], id="stage-name"
    ),
    pytest.param(
        ["stages.1.name=align"],
        ["`stages.1.name` must be a name that no earlier stage has", ", got 'align'"],
        id="stage-names-twice",
    ),
    pytest.param(["stages=[]"], ["`stages` must be a list of at least 1 item", ", got []"], id="no-stage"),
    pytest.param(["stages={}"], ["`stages` must be a list", ", got {}"], id="mapping-for-list"),
    pytest.param(
        ["student=odd"],
        ["`student` must be a mapping with the keys layers, mixer", ", got 'odd'"],
        id="text-for-mapping",
    ),
    pytest.param(
        ["student.conv_kernel=9"],
        ["`student.conv_kernel` must be a whole number from 2 to 8", ", got 9"],
        id="conv-kernel",
    ),
    pytest.param(
        ["student.half_life=[8, 4]"],
        ["`student.half_life` must be 'calibrated' or", ", got [8, 4]"],
        id="half-life-order",
    ),
    pytest.param(["student.half_life=[0, 4]"], ["`student.half_life` must be", ", got [0, 4]"], id="half-life-zero"),
    pytest.param(["student.half_life=auto"], ["`student.half_life` must be", ", got 'auto'"], id="half-life-text"),
    pytest.param(
        ["student.normalize=1"], ["`student.normalize` must be true or false", ", got 1"], id="number-for-bool"
    ),
    pytest.param(
        ["student.layers=every:0"], ["`student.layers` must be a list of distinct", ", got 'every:0'"], id="layers"
    ),
    pytest.param(
        ["student.exact_heads=[[1, 0], [1, 0]]"],
        ["`student.exact_heads` must be a list of different pairs [layer, key-value head]", ", got [[1, 0], [1, 0]]"],
        id="exact-head-twice",
    ),
    pytest.param(
        ["student.exact_heads=[[1, 0]]"],
        ["`student.exact_heads` has no effect with mixer 'discrete_mamba2', only with mixer 'bounded_attention'"],
        id="exact-heads-of-a-state-space-layer",
    ),
    pytest.param(
        ["student.kv_dtype=int8"],
        ["`student.kv_dtype` has no effect with mixer 'discrete_mamba2', only with mixer 'bounded_attention'"],
        id="kv-dtype-of-another-mixer",
    ),
    pytest.param(["student.exact_heads=[3]"], ["`student.exact_heads` must be", ", got [3]"], id="exact-layer"),
    pytest.param(["student.exact_heads=[[1, -1]]"], ["`student.exact_heads` must be"], id="exact-negative"),
    pytest.param(["student.layers=[1, 1]"], ["`student.layers` must be", ", got [1, 1]"], id="layers-twice"),
    pytest.param(["data.train=[]"], ["`data.train` must be a path, 'builtin:NAME'", ", got []"], id="no-text"),
    pytest.param(["data.train=[a, 3]"], ["`data.train` must be", ", got ['a', 3]"], id="number-for-path"),
    pytest.param(["evaluation.prompts=[3]"], ["`evaluation.prompts.0` must be a text", ", got 3"], id="prompt"),
    pytest.param(
        ["evaluation.tokens=63"],
        ["`evaluation.tokens` must be at least sequence_length = 64", ", got 63"],
        id="less-than-a-window",
    ),
    pytest.param(
        ["evaluation.final=false", "evaluation.context_lengths=[64]"],
        ["`evaluation.context_lengths` has no effect with final False, only with final True", "(got [64])"],
        id="setting-of-a-comparison-that-is-not-made",
    ),
    pytest.param(
        ["evaluation.context_lengths=[512, 31]"],
        ["`evaluation.context_lengths` must be a list of different whole numbers of 32 or more", ", got [512, 31]"],
        id="short-context",
    ),
    pytest.param(
        ["evaluation.repeat_distances=[64, 64]"],
        ["`evaluation.repeat_distances` must be a list of different whole numbers of 1 or more", ", got [64, 64]"],
        id="distance-twice",
    ),
    pytest.param(
        ["evaluation.repeat_distances=64"], ["`evaluation.repeat_distances` must be a list", ", got 64"], id="distance"
    ),
    pytest.param(["evaluation.prefill_limit=8"], ["`evaluation.prefill_limit` must be", ", got 8"], id="prefill-limit"),
    pytest.param(["dtype=float16"], ["`dtype` must be 'float32' or 'bfloat16'", ", got 'float16'"], id="dtype"),
    pytest.param(["seed=-1"], ["`seed` must be a whole number from 0 to 2^32 - 1", ", got -1"], id="seed"),
    pytest.param(["seed=4294967296"], ["`seed` must be a whole number from 0 to 2^32 - 1"], id="large-seed"),
    pytest.param(["checkpoint_every=0"], ["`checkpoint_every` must be", ", got 0"], id="checkpoint-every"),
    pytest.param(
        ["seed=-1", "dtype=x"],
        ["`seed` must be", ", got -1", "`dtype` must be", ", got 'x'"],
        id="all-problems-at-once",
    ),
    pytest.param(["preset=mohawk"], ["`preset` is unknown"], id="preset-by-override"),
    pytest.param(["seed"], ["override must be of the form dotted.key=value, got 'seed'"], id="override-without-value"),
    pytest.param(["=1"], ["override must be of the form dotted.key=value, got '=1'"], id="override-without-key"),
    pytest.param(["a..b=1"], ["dotted.key=value, got 'a..b=1'"], id="override-with-empty-key"),
    pytest.param(
        ["stages.2.tokens=1"],
        ["into stages must be an integer from 0 to 1, got '2'"],
        id="beyond-list",
    ),
    pytest.param(
        ["stages.x.tokens=1"],
        ["into stages must be an integer from 0 to 1, got 'x'"],
        id="override-name",
    ),
    pytest.param(["teacher.name=1"], ["teacher is 'folder/of/teacher', which has no keys to set"], id="below-a-text"),
    pytest.param(["seed=[1"], ["override 'seed=[1': the value is not valid YAML"], id="override-not-yaml"),
    pytest.param(["seed=2024-13-45"], ["is not valid YAML"], id="override-impossible-date"),
    pytest.param(["student={mixer: mamba2, mixer: mamba2}"], ["the key 'mixer' occurs twice"], id="key-twice"),
]


@pytest.mark.parametrize(("overrides", "messages"), REFUSED)
def test_what_is_not_accepted_is_named(tmp_path: Path, overrides: list[str], messages: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        load_recipe(write(tmp_path), overrides)
    assert type(caught.value) is ValueError
    text = str(caught.value)
    for message in messages:
        assert message in text, text


def test_one_problem_is_told_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        load_recipe(write(tmp_path), ["data.sequence_length=x"])
    assert str(caught.value).count("got") == 1
    with pytest.raises(ValueError) as caught:
        load_recipe(write(tmp_path), ["student.layers=[0, 0]"])
    assert str(caught.value).count("got") == 1


ONLY_FOR_ONE = [
    pytest.param("matrix_orientation", "target", "mixer_output", id="orientation-target"),
    pytest.param("logit_distillation", "target", "block_output", id="logits-target"),
    pytest.param("matrix_orientation", "kl", "forward", id="orientation-kl"),
    pytest.param("hidden_state_alignment", "kl", "reverse", id="alignment-kl"),
    pytest.param("hidden_state_alignment", "temperature", 1.0, id="alignment-temperature"),
    pytest.param("matrix_orientation", "ce_weight", 0.0, id="orientation-ce-weight"),
    pytest.param("matrix_orientation", "other_learning_rate", 1e-3, id="mixers-only-other-learning-rate"),
    pytest.param("matrix_orientation", "decay", 0.1, id="cosine-decay"),
    pytest.param("hidden_state_alignment", "matrix_norm", "relative", id="alignment-matrix-norm"),
    pytest.param("matrix_orientation", "stream", "student", id="orientation-stream"),
    pytest.param("last_state_alignment", "stream", "student", id="last-state-stream"),
    pytest.param("last_state_alignment", "target", "block_output", id="last-state-target"),
    pytest.param("last_state_alignment", "refit", "ridge", id="last-state-refit"),
    pytest.param("last_state_alignment", "ce_weight", 0.5, id="last-state-ce-weight"),
    pytest.param("logit_distillation", "norm_learning_rate", 1e-3, id="mixers-only-norm-learning-rate"),
    pytest.param("logit_distillation", "mlp_learning_rate", 1e-3, id="mixers-only-mlp-learning-rate"),
    pytest.param("logit_distillation", "embedding_learning_rate", 1e-3, id="mixers-only-embedding-learning-rate"),
    pytest.param("logit_distillation", "reverse_weight", 0.3, id="forward-kl-reverse-weight"),
    pytest.param("hidden_state_alignment", "reverse_weight", 0.3, id="alignment-reverse-weight"),
    pytest.param("logit_distillation", "jsd_beta", 0.3, id="forward-kl-beta"),
]


@pytest.mark.parametrize(("objective", "field", "value"), ONLY_FOR_ONE)
def test_a_stage_setting_without_effect_is_refused(objective: str, field: str, value: Any) -> None:
    stage = {"name": "one", "objective": objective, "tokens": 8, "batch_size": 1, "learning_rate": 1.0}
    parse_recipe(values(stages=[stage]))
    with pytest.raises(ValueError, match=rf"recipe: `stages\.0\.{field}` has no effect with .* \(got "):
        parse_recipe(values(stages=[{**stage, field: value}]))


@pytest.mark.parametrize(("field", "value"), [("kl", "reverse"), ("temperature", 2.0)])
def test_a_divergence_without_weight_has_no_settings(field: str, value: Any) -> None:
    stage = {**values()["stages"][0], "objective": "logit_distillation", "ce_weight": 1.0}
    parse_recipe(values(stages=[stage]))
    parse_recipe(values(stages=[{**stage, "ce_weight": 0.9, field: value}]))
    with pytest.raises(ValueError, match=rf"`stages\.0\.{field}` has no effect with ce_weight 1, .* \(got "):
        parse_recipe(values(stages=[{**stage, field: value}]))
    with pytest.raises(ValueError, match=r"`stored_logits` must be left out, .* ce_weight below 1, got 'logits'"):
        parse_recipe(values(stages=[stage], stored_logits="logits"))


@pytest.mark.parametrize(("kl", "field"), [("mixed", "reverse_weight"), ("jsd", "jsd_beta")])
def test_a_weight_that_leaves_one_divergence_is_refused(kl: str, field: str) -> None:
    stage = {**values()["stages"][0], "objective": "logit_distillation", "kl": kl}
    assert getattr(parse_recipe(values(stages=[{**stage, field: 0.25}])).stages[0], field) == 0.25
    for wrong in (0, 1.0, -0.5, "half"):
        with pytest.raises(ValueError, match=rf"`stages\.0\.{field}` must be a number above 0 and below 1, got"):
            parse_recipe(values(stages=[{**stage, field: wrong}]))


@pytest.mark.parametrize(
    ("stage", "reached"),
    [
        pytest.param({"objective": "matrix_orientation"}, "", id="matrix"),
        pytest.param({"objective": "hidden_state_alignment"}, "", id="mixer"),
        pytest.param({"objective": "hidden_state_alignment", "stream": "student"}, "norm", id="mixer, own stream"),
        pytest.param({"objective": "hidden_state_alignment", "target": "block_output"}, "norm mlp", id="block"),
        pytest.param({"objective": "last_state_alignment"}, "norm mlp embedding", id="last state"),
        pytest.param({"objective": "logit_distillation"}, "norm mlp embedding", id="logits"),
    ],
)
def test_a_rate_of_weights_that_the_loss_does_not_reach_is_refused(stage: dict[str, Any], reached: str) -> None:
    for group in ("norm", "mlp", "embedding"):
        field = f"{group}_learning_rate"
        recipe = values(stages=[{**values()["stages"][0], **stage, "train": "all", field: 1e-4}])
        if group in reached:
            assert getattr(parse_recipe(recipe).stages[0], field) == 1e-4
        else:
            with pytest.raises(ValueError, match=rf"`stages\.0\.{field}` has no effect with objective"):
                parse_recipe(recipe)


def test_a_rate_of_no_weights_is_refused() -> None:
    stage = {**values()["stages"][0], "objective": "logit_distillation", "train": "mixers+norms"}
    rates = {"norm_learning_rate": 1e-4, "other_learning_rate": 1e-3}
    with pytest.raises(ValueError, match=r"`stages\.0\.other_learning_rate` has no effect .* have rates of their own"):
        parse_recipe(values(stages=[{**stage, **rates}]))


def test_an_untied_head_that_no_stage_trains_is_refused() -> None:
    stage = {**values()["stages"][0], "objective": "logit_distillation"}
    for wrong in ({}, {"train": "mixers+norms"}, {"train": "all", "objective": "last_state_alignment"}):
        with pytest.raises(ValueError, match=r"`student\.untie` must be false, since it has no effect"):
            parse_recipe(values(student={"untie": True}, stages=[{**stage, **wrong}]))
    assert parse_recipe(values(student={"untie": True}, stages=[{**stage, "train": "all"}])).student.untie


def test_constant_has_no_final_learning_rate() -> None:
    stage = {**values()["stages"][0], "schedule": "constant"}
    assert parse_recipe(values(stages=[stage])).stages[0].schedule == "constant"
    with pytest.raises(ValueError, match=r"`stages\.0\.final_learning_rate_ratio` .*\(got 0\.5\)"):
        parse_recipe(values(stages=[{**stage, "final_learning_rate_ratio": 0.5}]))


@pytest.mark.parametrize("mixer", ["mamba2", "sliding_attention"])
@pytest.mark.parametrize(
    ("field", "value", "default"),
    [
        pytest.param("feature_map", "softplus", "identity", id="feature-map"),
        pytest.param("normalize", True, False, id="normalize"),
        pytest.param("rotary", True, False, id="rotary"),
    ],
)
def test_a_mixer_setting_without_effect_is_refused(mixer: str, field: str, value: Any, default: Any) -> None:
    parse_recipe(values(student={"mixer": "discrete_mamba2", field: value}))
    parse_recipe(values(student={"mixer": mixer, field: default}))
    with pytest.raises(ValueError, match=rf"`student\.{field}` has no effect .* only with mixer 'discrete_mamba2'"):
        parse_recipe(values(student={"mixer": mixer, field: value}))


@pytest.mark.parametrize(
    ("mixer", "field", "value"),
    [
        pytest.param("discrete_mamba2", "sliding_window", 64, id="window-of-a-state-space-layer"),
        pytest.param("sliding_attention", "half_life", [2, 32], id="half-life-of-attention"),
        pytest.param("sliding_attention", "conv_kernel", 3, id="convolution-of-attention"),
        pytest.param("sliding_attention", "copy_projections", False, id="random-attention"),
        pytest.param("masked_mixing", "half_life", [2, 32], id="half-life-of-masked-mixing"),
        pytest.param("retention", "half_life", [2, 32], id="half-life-of-retention"),
    ],
)
def test_a_setting_of_the_other_kind_of_mixer_is_refused(mixer: str, field: str, value: Any) -> None:
    other = "sliding_attention" if mixer == "discrete_mamba2" else "mamba2"
    parse_recipe(values(student={"mixer": other, field: value}))
    with pytest.raises(ValueError, match=rf"`student\.{field}` has no effect .* only with mixer '"):
        parse_recipe(values(student={"mixer": mixer, field: value}))


@pytest.mark.parametrize(
    "mixer", ["sliding_attention", "linear_attention", "bounded_attention", "masked_mixing", "mamba2", "retention"]
)
def test_every_output_projection_can_be_calibrated(mixer: str) -> None:
    for calibration in ("head_scale", "ridge", "sequential"):
        recipe = parse_recipe(values(student={"mixer": mixer, "calibration": calibration}))
        assert recipe.student.calibration == calibration
        assert recipe.is_healed == (calibration == "sequential")


def test_healing_needs_a_window_to_fit_and_one_to_hold_out() -> None:
    data = {**values()["data"], "sequence_length": 64}
    stage = {**values()["stages"][0], "objective": "hidden_state_alignment"}
    calibrated = {"calibration": "sequential", "calibration_tokens": 127}
    error = r"`student\.calibration_tokens` must be at least 128, two windows .* sequential .*, got 127"
    with pytest.raises(ValueError, match=error):
        parse_recipe(values(student=calibrated, data=data))
    with pytest.raises(ValueError, match=error):
        stages = [{**stage, "refit": "sequential"}]
        parse_recipe(values(student={"calibration_tokens": 127}, data=data, stages=stages))
    parse_recipe(values(student={**calibrated, "calibration_tokens": 128}, data=data))
    parse_recipe(values(student={**calibrated, "calibration": "ridge"}, data=data))
    with pytest.raises(ValueError, match=r"`student\.calibration_tokens` must be at least 512"):
        parse_recipe(values(student={**calibrated, "mixer": "masked_mixing", "positions": 256}, data=data))


def test_masked_mixing_has_weights_for_every_text() -> None:
    student = {"mixer": "masked_mixing", "positions": 64}
    stage = {**values()["stages"][0], "sequence_length": 64}
    whole = {"student": student, "data": {**values()["data"], "sequence_length": 64}}
    assert parse_recipe(values(**whole, stages=[stage])).student.positions == 64
    with pytest.raises(
        ValueError, match=r"`stages\.0\.sequence_length` must be at most student\.positions = 64, got 65"
    ):
        parse_recipe(values(**whole, stages=[{**stage, "sequence_length": 65}]))
    with pytest.raises(
        ValueError, match=r"`evaluation\.sequence_length` must be at most student\.positions = .*, got 128"
    ):
        parse_recipe(values(**whole, stages=[stage], evaluation={"sequence_length": 128}))
    with pytest.raises(
        ValueError, match=r"`student\.positions` has no effect .* only with mixer 'masked_mixing'.*got 64"
    ):
        parse_recipe(values(student={"mixer": "mamba2", "positions": 64}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("- a\n", "the top level must be a mapping with the keys teacher, student", id="list"),
        pytest.param("", "teacher_revision, gradient_checkpointing, stored_logits, report_to, got None", id="empty"),
        pytest.param("a: [", "is not valid YAML", id="not-yaml"),
        pytest.param("teacher: a\nteacher: b\n", "the key 'teacher' occurs twice", id="key-twice"),
        pytest.param(
            "preset: nope\n",
            "`preset` must be one of demo, lolcats, mamba2_hybrid, mamba_in_llama, mohawk, priming, radlads, supra, "
            "zoo, got 'nope'",
            id="unknown-preset",
        ),
        pytest.param("preset: ../presets/mohawk\n", "zoo, got '../presets/mohawk'", id="preset-is-no-path"),
        pytest.param("preset: [mohawk]\n", "zoo, got ['mohawk']", id="preset-is-one"),
        pytest.param("teacher: !!python/object/apply:os.getcwd []\n", "is not valid YAML", id="no-python-objects"),
        pytest.param("1: a\n", "`1` must be a text, like every key, got 1", id="number-as-key"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_recipe(write(tmp_path, text))
    assert message in str(caught.value)
    assert "recipe.yaml" in str(caught.value)


def test_a_name_that_is_neither_file_nor_preset(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"recipe must be a YAML file or one of .*mohawk.*, got 'mohak'"):
        load_recipe("mohak")
    with pytest.raises(ValueError, match="must be a YAML file or one of"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("teacher: \xe4".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8"):
        load_recipe(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("spec", "num_layers", "message"),
    [
        pytest.param([0, 3], 3, r"`layers` must be from 0 to 2, got \[0, 3\]", id="out-of-range"),
        pytest.param([-1], 3, r"^`layers` must be a list of distinct .*, got \[-1\]$", id="negative"),
        pytest.param([1, 1], 3, r"^`layers` must be a list of distinct .*, got \[1, 1\]$", id="twice"),
        pytest.param([], 3, r"^`layers` must be a list of distinct .*, got \[\]$", id="empty-list"),
        pytest.param([True], 3, r"^`layers` must be a list of distinct .*, got \[True\]$", id="bool"),
        pytest.param([1.0], 3, r"^`layers` must be a list of distinct .*, got \[1.0\]$", id="float"),
        pytest.param("odd", 1, "`layers` must select at least one of 1 layers, got 'odd'", id="none-odd"),
        pytest.param("every:4", 3, "`layers` must select at least one of 3 layers, got 'every:4'", id="none-every"),
        pytest.param(
            "interleave:0.1",
            3,
            "`layers` must select at least one of 3 layers, got 'interleave:0.1'",
            id="none-interleaved",
        ),
        pytest.param("interleave:0", 3, "^`layers` must be a list of distinct .*, got 'interleave:0'$", id="share-0"),
        pytest.param(
            "interleave:1.5", 3, "^`layers` must be a list of distinct .*, got 'interleave:1.5'$", id="share-above-1"
        ),
        pytest.param(
            "interleave:1/0", 3, "^`layers` must be a list of distinct .*, got 'interleave:1/0'$", id="share-no-number"
        ),
        pytest.param("every:0", 3, "^`layers` must be a list of distinct .*, got 'every:0'$", id="every-0"),
        pytest.param("every:-2", 3, "^`layers` must be a list of distinct .*, got 'every:-2'$", id="every-negative"),
        pytest.param("every:²", 3, "^`layers` must be a list of distinct .*, got 'every:²'$", id="every-superscript"),
        pytest.param("thirds", 3, "^`layers` must be a list of distinct .*, got 'thirds'$", id="unknown"),
        pytest.param("all", 0, "`layers` must select at least one of 0 layers, got 'all'", id="no-layers"),
    ],
)
def test_resolve_layers_refuses(spec: Any, num_layers: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_layers(spec, num_layers)
