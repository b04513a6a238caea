"""The student before any training: the teacher itself where nothing is converted, something exactly known elsewhere.

The expected mixer outputs are loops over tokens in float64 that read the teacher's own projections.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from teachers import LLAMA3_ROPE, YARN_ROPE, draw_ids, make_qwen2, make_teacher
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, LlamaForCausalLM

from ssm_zoo.conversion.convert import convert
from ssm_zoo.distill.recipe import StudentSpec
from ssm_zoo.distill.student import build_student, output_projection, student_mixer, zeroed_mixers
from ssm_zoo.distill.teacher import Teacher
from ssm_zoo.modeling import ZooHybridConfig, ZooHybridForCausalLM
from ssm_zoo.modeling.discrete_mamba2 import DiscreteMamba2Mixer, half_life_to_bias
from ssm_zoo.modeling.token_mixers import TOKEN_MIXERS
from tolerances import TOLERANCES

RTOL, ATOL = TOLERANCES[torch.float32]
HEADS, KEY_HEADS, WIDTH = 6, 2, 8
TEACHERS = [
    pytest.param({}, id="grouped"),
    pytest.param({"num_key_value_heads": 6}, id="one key head per query head"),
    pytest.param({"attention_bias": True, "mlp_bias": True}, id="biases"),
    pytest.param({"tie_word_embeddings": True}, id="tied"),
    pytest.param({"hidden_size": 24}, id="D is not heads times width"),
    pytest.param({"rope_parameters": LLAMA3_ROPE}, id="llama3 rope"),
    pytest.param({"rope_parameters": YARN_ROPE}, id="yarn rope"),
    pytest.param({"hidden_act": "gelu", "rms_norm_eps": 1e-2}, id="activation and epsilon"),
]


def spec(**changes: Any) -> StudentSpec:
    without = ("linear_attention", "sliding_attention", "masked_mixing", "retention")
    start = {} if changes.get("mixer") in without else {"half_life": (4.0, 4.0)}
    return StudentSpec(**{**start, **changes})


def hidden_states(width: int = 48, batch: int = 2, length: int = 11) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(5))


def mixed(student: ZooHybridForCausalLM, layer: int, hidden: Tensor) -> Tensor:
    with torch.no_grad():
        return student_mixer(student, layer)(hidden, student.backbone.sequence_of(hidden))[0]


def gap(a: Any, b: Any, ids: Tensor) -> float:
    """Largest difference of two models' logits."""
    with torch.no_grad():
        return float((a(input_ids=ids).logits - b(input_ids=ids).logits).abs().max())


def linear_attention(
    teacher: LlamaForCausalLM, layer: int, hidden: Tensor, half_lives: list[float], *, rotary: bool, softplus: bool
) -> Tensor:
    """Linear attention with a decay, token by token: un-normalised, or with softplus features and a normaliser."""
    attention = teacher.model.layers[layer].self_attn
    hidden = hidden.double()
    parts = []
    for projection, heads in ((attention.q_proj, HEADS), (attention.k_proj, KEY_HEADS), (attention.v_proj, KEY_HEADS)):
        bias = None if projection.bias is None else projection.bias.double()
        parts.append(F.linear(hidden, projection.weight.double(), bias).unflatten(-1, (heads, WIDTH)))
    q, k, v = parts
    scale = WIDTH**-0.5
    outputs = torch.zeros(*hidden.shape[:2], HEADS, WIDTH, dtype=torch.float64)
    for head in range(HEADS):
        group = head // (HEADS // KEY_HEADS)
        decay = 2.0 ** (-1.0 / half_lives[head])
        for row in range(hidden.shape[0]):
            state = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
            mass = torch.zeros(WIDTH, dtype=torch.float64)
            for token in range(hidden.shape[1]):
                query, key = q[row, token, head], k[row, token, group]
                if rotary:
                    query, key = rotated(query, token), rotated(key, token)
                if softplus:
                    query, key = F.softplus(query), F.softplus(key)
                else:
                    query = query * scale
                state = decay * state + torch.outer(v[row, token, group], key)
                mass = decay * mass + key
                outputs[row, token, head] = state @ query / (mass @ query if softplus else 1.0)
    bias = None if attention.o_proj.bias is None else attention.o_proj.bias.double()
    return F.linear(outputs.flatten(2), attention.o_proj.weight.double(), bias)


def rotated(vector: Tensor, position: int) -> Tensor:
    """Rotary embedding of one head at one position, pairs half a head apart, as complex numbers."""
    half = WIDTH // 2
    turns = [
        complex(math.cos(angle), math.sin(angle)) for angle in (position * 1e4 ** (-i / half) for i in range(half))
    ]
    pairs = torch.complex(vector[:half], vector[half:]) * torch.tensor(turns, dtype=torch.complex128)
    return torch.cat([pairs.real, pairs.imag])


@pytest.mark.parametrize("changes", TEACHERS)
def test_without_converted_layers_the_student_is_the_teacher(changes: dict[str, Any]) -> None:
    teacher, ids = make_teacher(**changes), draw_ids(2, 40)
    student = build_student(Teacher(teacher), spec(), [])
    assert gap(student, teacher, ids) < 1e-5
    assert student.config.mixer_types == ["full_attention"] * 4
    assert not student.training
    tied = student.lm_head.weight is student.backbone.embeddings.weight
    assert tied == teacher.config.tie_word_embeddings
    assert student.num_parameters() == teacher.num_parameters()


def test_a_qwen2_gives_a_student_too() -> None:
    """Without converted layers it computes the same; with some it starts from the teacher's projections."""
    teacher, ids = make_qwen2(hidden_size=48, num_attention_heads=6), draw_ids(2, 40)
    assert gap(build_student(Teacher(teacher), spec(), []), teacher, ids) < 1e-5
    window = build_student(Teacher(teacher), spec(mixer="sliding_attention", sliding_window=40), [0, 2])
    assert gap(window, teacher, ids) < 1e-5
    mixer: Any = student_mixer(build_student(Teacher(teacher), spec(), [1]), 1)
    attention = teacher.model.layers[1].self_attn
    assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight) and mixer.out_proj.bias is None
    values = attention.v_proj.bias.unflatten(0, (KEY_HEADS, WIDTH)).repeat_interleave(HEADS // KEY_HEADS, 0).flatten()
    assert torch.equal(mixer.in_proj.bias[: HEADS * WIDTH], values)


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "tie_word_embeddings": True}], ids=["plain", "tied"])
def test_the_student_is_what_a_conversion_of_the_teacher_gives(changes: dict[str, Any], tmp_path: Path) -> None:
    make_teacher(**changes).save_pretrained(tmp_path / "teacher")
    convert(tmp_path / "teacher", tmp_path / "converted", verify=False)
    converted = ZooHybridForCausalLM.from_pretrained(tmp_path / "converted")
    teacher = make_teacher(**changes)
    student = build_student(Teacher(teacher), spec(), [])
    expected, state = converted.state_dict(), student.state_dict()
    assert expected.keys() == state.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    of_files = {"architectures", "auto_map", "dtype", "transformers_version", "_name_or_path"}
    given, made = converted.config.to_dict(), student.config.to_dict()
    assert {key for key in given | made if given.get(key) != made.get(key)} <= of_files


def test_the_student_shares_nothing_with_the_teacher() -> None:
    teacher, ids = make_teacher(), draw_ids(1, 9)
    student = build_student(Teacher(teacher), spec(), [1])
    with torch.no_grad():
        before = teacher(input_ids=ids).logits
        for parameter in student.parameters():
            parameter.zero_()
        assert torch.equal(teacher(input_ids=ids).logits, before)
    student.generation_config.eos_token_id = 7
    student.config.rope_parameters["rope_theta"] = 3.0
    assert teacher.generation_config.eos_token_id == 0
    assert teacher.config.rope_parameters["rope_theta"] == 10000.0


def test_a_bfloat16_teacher_gives_a_float32_student() -> None:
    rounded = make_teacher()
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16())
    student = build_student(Teacher(make_teacher().bfloat16()), spec(), [])
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert gap(student, rounded, draw_ids(1, 9)) < 1e-5


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("rotary", [False, True], ids=["no rotary", "rotary"])
@pytest.mark.parametrize("softplus", [False, True], ids=["un-normalised", "softplus normalised"])
@pytest.mark.parametrize("half_life", [(3.0, 3.0), (1.0, 32.0)], ids=["one half-life", "spread"])
def test_step_0_is_linear_attention_with_a_decay(
    half_life: tuple[float, float], softplus: bool, rotary: bool, bias: bool
) -> None:
    teacher, layer = make_teacher(attention_bias=bias), 2
    features = {"feature_map": "softplus", "normalize": True} if softplus else {}
    student = build_student(Teacher(teacher), spec(half_life=half_life, rotary=rotary, **features), [layer])
    first, last = half_life
    half_lives = [first * (last / first) ** (head / (HEADS - 1)) for head in range(HEADS)]
    hidden = hidden_states()
    expected = linear_attention(teacher, layer, hidden, half_lives, rotary=rotary, softplus=softplus)
    torch.testing.assert_close(mixed(student, layer, hidden).double(), expected, rtol=RTOL, atol=ATOL)
    # What was not asked for would show: the expected outputs differ by far more than the tolerance.
    other = linear_attention(teacher, layer, hidden, half_lives[::-1], rotary=not rotary, softplus=softplus)
    assert (other - expected).abs().max() > 1e-2


def test_an_untied_head_starts_as_the_embedding() -> None:
    teacher, ids = make_teacher(tie_word_embeddings=True), draw_ids(1, 9)
    student = build_student(Teacher(teacher), spec(untie=True), [])
    assert gap(student, teacher, ids) < 1e-5
    assert not student.config.tie_word_embeddings
    assert student.lm_head.weight is not student.backbone.embeddings.weight
    with torch.no_grad():
        student.lm_head.weight.zero_()
    assert student.backbone.embeddings.weight.abs().max() > 0
    with pytest.raises(ValueError, match=r"`student\.untie` must be false for this teacher"):
        build_student(Teacher(make_teacher()), spec(untie=True), [])


@pytest.mark.parametrize("kind", [kind for kind, row in TOKEN_MIXERS.items() if row.student is not None])
def test_a_mixer_has_what_the_options_of_its_row_need(kind: str) -> None:
    """`FromAttention.options` in `modeling/mixer.py`."""
    needs = {
        "half_life": ("set_half_lives", "hidden_attention", "num_heads"),
        "calibration": ("num_heads",),
        "copy_projections": ("start_from",),
    }
    student = build_student(Teacher(make_teacher()), StudentSpec(mixer=kind), [1])  # pyright: ignore[reportArgumentType]
    mixer, row = student_mixer(student, 1), TOKEN_MIXERS[kind].student
    assert row is not None
    if "calibration" in row.options:
        assert output_projection(student, 1).out_features == student.config.hidden_size
    assert [name for option in row.options for name in needs.get(option, ()) if not hasattr(mixer, name)] == []


def test_uncalibrated_half_lives_are_4_to_64_tokens() -> None:
    student = build_student(Teacher(make_teacher()), StudentSpec(), [1])
    mixer = student_mixer(student, 1)
    half_lives = -math.log(2) / mixer.log_decay(hidden_states())[0, 0]  # pyright: ignore[reportCallIssue]
    expected = torch.tensor([4 * 16 ** (head / 5) for head in range(HEADS)])
    torch.testing.assert_close(half_lives, expected, rtol=1e-5, atol=0.0)


def test_grouped_heads_are_copied_whole_and_into_their_places() -> None:
    teacher, layer, inner = make_teacher(attention_bias=True), 1, HEADS * WIDTH
    attention = teacher.model.layers[layer].self_attn
    mixer: Any = student_mixer(build_student(Teacher(teacher), spec(), [layer]), layer)
    weight, bias = mixer.in_proj.weight, mixer.in_proj.bias
    keys = attention.k_proj.weight.unflatten(0, (KEY_HEADS, WIDTH))
    assert (keys[0] - keys[1]).abs().max() > 0.1
    scale = WIDTH**-0.5
    for head in range(HEADS):
        group = head // 3
        own, shared = slice(WIDTH * head, WIDTH * (head + 1)), slice(WIDTH * group, WIDTH * (group + 1))
        for part, name, rows, factor in ((0, "v", shared, 1.0), (1, "k", shared, 1.0), (2, "q", own, scale)):
            projection = attention.get_submodule(f"{name}_proj")
            place = slice(part * inner + own.start, part * inner + own.stop)
            torch.testing.assert_close(weight[place], projection.weight[rows] * factor)
            torch.testing.assert_close(bias[place], projection.bias[rows] * factor)
    # z and a, which attention does not have: no effect of the input, gate open, no skip, no mixing by the convolution.
    assert weight[3 * inner :].abs().max() == 0 and bias[3 * inner :].abs().max() == 0
    torch.testing.assert_close(F.silu(mixer.z_bias), torch.ones(inner))
    assert mixer.D.abs().max() == 0
    assert torch.equal(mixer.conv1d.weight[:, 0], torch.tensor([0.0, 0, 0, 1]).expand(3 * inner, 4))
    assert mixer.conv1d.bias.abs().max() == 0
    assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)
    assert torch.equal(mixer.out_proj.bias, attention.o_proj.bias)


@pytest.mark.parametrize("width", [48, 24], ids=["expand 1", "expand 2"])
def test_a_mamba2_mixer_gets_the_projections_after_its_gate(width: int) -> None:
    teacher, layer, inner = make_teacher(hidden_size=width), 3, HEADS * WIDTH
    student = build_student(Teacher(teacher), spec(mixer="mamba2", half_life=(2.0, 2.0)), [layer])
    mixer: Any = student_mixer(student, layer)
    assert (mixer.n_groups, mixer.num_heads, mixer.head_dim, mixer.state_size) == (HEADS, HEADS, WIDTH, WIDTH)
    view = Teacher(teacher).attention(layer)
    gate, x, B, C, dt = mixer.in_proj.weight.split([inner] * 4 + [HEADS])
    assert gate.std() > 0.01
    torch.testing.assert_close(x, view.v.unflatten(0, (2, 8)).repeat_interleave(3, 0).flatten(0, 1))
    torch.testing.assert_close(B, view.k.unflatten(0, (2, 8)).repeat_interleave(3, 0).flatten(0, 1))
    torch.testing.assert_close(C, view.q * WIDTH**-0.5)
    assert dt.abs().max() == 0 and mixer.D.abs().max() == 0
    assert torch.equal(mixer.out_proj.weight, view.o)
    hidden = hidden_states(width)
    decays = mixer.log_decay(hidden).exp()
    torch.testing.assert_close(decays, torch.full_like(decays, 2**-0.5))
    # The rest of the mixer is Mamba-2's: silu behind the convolution, steps dt = -log decay, gated norm.
    values, keys, queries = (F.silu(F.linear(hidden, rows)).unflatten(-1, (HEADS, WIDTH)) for rows in (x, B, C))
    opening = F.silu(F.linear(hidden, gate)).unflatten(-1, (HEADS, WIDTH))
    age = (torch.arange(11)[:, None] - torch.arange(11)).clamp(min=0)
    matrix = torch.einsum("bihn,bjhn->bhij", queries, keys) * torch.tril(0.5 ** (age / 2)) * math.log(2) / 2
    y = torch.einsum("bhij,bjhp->bihp", matrix, values) * opening
    normed = y * (y.square().mean(-1, keepdim=True) + teacher.config.rms_norm_eps).rsqrt()
    expected = F.linear(normed.flatten(2), view.o)
    torch.testing.assert_close(mixed(student, layer, hidden), expected, rtol=RTOL, atol=ATOL)


def test_retention_takes_grouped_heads_and_biases_as_they_are() -> None:
    teacher, layer = make_teacher(attention_bias=True), 1
    attention = teacher.model.layers[layer].self_attn
    student = build_student(Teacher(teacher), spec(mixer="retention"), [layer])
    assert student.config.retention == {"v_head_dim": WIDTH, "use_output_gate": False}
    mixer = student_mixer(student, layer)
    copied, given = mixer.state_dict(), attention.state_dict()
    assert copied.keys() == given.keys() and all(torch.equal(copied[key], given[key]) for key in given)
    rates = -mixer.log_decay(hidden_states())[0, 0]  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(rates, torch.tensor([-math.log1p(-(2.0 ** (-5 - head))) for head in range(HEADS)]))
    random = build_student(Teacher(teacher), spec(mixer="retention", copy_projections=False), [layer])
    assert not torch.equal(student_mixer(random, layer).state_dict()["q_proj.weight"], given["q_proj.weight"])


def test_sliding_attention_is_the_teacher_within_its_window() -> None:
    teacher = make_teacher()
    window = 40
    student = build_student(Teacher(teacher), spec(mixer="sliding_attention", sliding_window=window), [0, 2])
    assert student.config.sliding_attention["sliding_window"] == window
    assert gap(student, teacher, draw_ids(2, window)) < 1e-5
    ids = draw_ids(1, window + 30)
    with torch.no_grad():
        difference = (student(input_ids=ids).logits - teacher(input_ids=ids).logits).abs().amax((0, 2))
    assert difference[:window].max() < 1e-5
    assert difference[window + 1 :].min() > 1e-4


def test_a_student_of_exact_heads_is_its_teacher() -> None:
    """Also beyond the window; with one head that forgets it is not."""
    teacher = make_teacher()
    every = [(layer, head) for layer in (0, 2) for head in range(KEY_HEADS)]
    memory = {"mixer": "bounded_attention", "window": 4, "chunk_size": 2, "sinks": 1, "rows": 5, "slots": "equal"}
    student = build_student(Teacher(teacher), StudentSpec(**memory, exact_heads=every), [0, 2])
    assert student.config.bounded_attention["exact"] == [[0, 1], [], [0, 1], []]
    ids = draw_ids(2, 40)
    assert gap(student, teacher, ids) < 1e-5
    assert torch.equal(*(each.generate(ids, max_new_tokens=4, do_sample=False) for each in (student, teacher)))
    partial = build_student(Teacher(teacher), StudentSpec(**memory, exact_heads=every[1:]), [0, 2])
    assert gap(partial, teacher, ids) > 1e-3


@pytest.mark.parametrize(("layers", "pair"), [([0, 2], (1, 0)), ([0], (0, KEY_HEADS)), ([0], (9, 0))])
def test_exact_heads_outside_of_the_converted_layers_are_refused(layers: list[int], pair: tuple[int, int]) -> None:
    chosen = StudentSpec(mixer="bounded_attention", exact_heads=[(0, 1), pair])
    names = ", ".join(map(str, layers))
    message = (
        rf"student\.exact_heads must be .* \(these are {names}\) .* from 0 to 1, got \[{pair[0]}, {pair[1]}\]\. Rem"
    )
    with pytest.raises(ValueError, match=message):
        build_student(Teacher(make_teacher()), chosen, layers)


@pytest.mark.parametrize("mixer", ["discrete_mamba2", "mamba2"])
def test_without_copied_projections_a_mixer_is_random_and_seeded(mixer: str) -> None:
    teacher = make_teacher()
    state = torch.get_rng_state()

    def build(seed: int, copy: bool = False) -> dict[str, Tensor]:
        student = build_student(Teacher(teacher), spec(mixer=mixer, copy_projections=copy), [1], seed=seed)
        return student.state_dict()

    one, same, other, copied = build(1), build(1), build(2), build(1, copy=True)
    assert torch.equal(torch.get_rng_state(), state)
    random = {f"backbone.layers.1.mixer.{name}_proj.weight" for name in ("in", "out")}
    for name, tensor in one.items():
        assert torch.equal(tensor, same[name]), name
        if name in random:
            assert not torch.equal(tensor, other[name]) and not torch.equal(tensor, copied[name]), name
            assert 0.005 < tensor.std() < 0.2, name
        elif ".layers.1.mixer." not in name:
            assert torch.equal(tensor, other[name]) and torch.equal(tensor, copied[name]), name


@pytest.mark.parametrize(
    ("teacher", "student", "layers", "message"),
    [
        pytest.param({}, {}, [4], r"layers must be from 0 to 3, got 4", id="layer"),
        pytest.param({}, {}, [0, -1], r"layers must be from 0 to 3, got -1", id="negative layer"),
        pytest.param(
            {"hidden_size": 36},
            {"mixer": "mamba2"},
            [0],
            r"`student\.mixer` must be .*, got 'mamba2', which needs .*\(48\).*\(36\)",
            id="width",
        ),
        pytest.param(
            {},
            {"normalize": True},
            [0],
            r"`student\.normalize` must be False with feature_map 'identity'",
            id="normaliser",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    teacher: dict[str, Any], student: dict[str, Any], layers: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_student(Teacher(make_teacher(**teacher)), spec(**student), layers)


def test_a_teacher_without_an_adapter_is_refused() -> None:
    bloom = BloomForCausalLM(BloomConfig(hidden_size=8, n_layer=1, n_head=1, vocab_size=10))
    with pytest.raises(ValueError, match=r"teacher must be a model of type .*llama.*, got 'bloom'"):
        build_student(Teacher(bloom), spec(), [0])


@pytest.mark.parametrize(
    "sizes", [{"num_attention_heads": 4}, {"head_dim": 16}, {"state_size": 16}], ids=["heads", "width", "state"]
)
def test_attention_is_not_copied_into_a_mixer_of_other_sizes(sizes: dict[str, int]) -> None:
    options = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 6, "head_dim": 8, **sizes}
    config = ZooHybridConfig(**options, mixer_types=["discrete_mamba2"])
    mixer = DiscreteMamba2Mixer(config, config.settings_of("discrete_mamba2"), 0)
    before = {name: parameter.clone() for name, parameter in mixer.named_parameters()}
    with pytest.raises(ValueError, match=r"the student's mixer must have .* 6 heads of 8 .* got \d+ heads"):
        mixer.start_from(Teacher(make_teacher()).attention(0))
    for name, parameter in mixer.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num()), name


def test_zeroed_mixers_say_nothing_until_the_end() -> None:
    teacher, layers, ids = make_teacher(attention_bias=True), [0, 3], draw_ids(2, 12)
    student, silent = (build_student(Teacher(teacher), spec(), layers) for _ in range(2))
    with torch.no_grad():
        for layer in layers:
            for parameter in student_mixer(silent, layer).get_submodule("out_proj").parameters():
                parameter.zero_()
    with torch.no_grad():
        before = student(input_ids=ids).logits
        with zeroed_mixers(student, layers):
            assert torch.equal(student(input_ids=ids).logits, silent(input_ids=ids).logits)
        assert torch.equal(student(input_ids=ids).logits, before)
        assert gap(student, silent, ids) > 1e-2
        with pytest.raises(KeyError), zeroed_mixers(student, layers):
            raise KeyError
        assert torch.equal(student(input_ids=ids).logits, before)
        # Not even where they would say "infinite": the state of an untrained mixer may overflow.
        student_mixer(student, 0).get_submodule("out_proj").get_parameter("weight").fill_(torch.inf)
        with zeroed_mixers(student, layers):
            assert torch.equal(student(input_ids=ids).logits, silent(input_ids=ids).logits)


@pytest.mark.parametrize(
    "mixer", ["discrete_mamba2", "mamba2", "linear_attention", "sliding_attention", "masked_mixing", "retention"]
)
def test_all_layers_can_be_converted(mixer: str) -> None:
    student = build_student(Teacher(make_teacher(tie_word_embeddings=True)), spec(mixer=mixer), range(4))
    assert student.config.mixer_types == [mixer] * 4
    ids = draw_ids(2, 9)
    student(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    written = student.generate(ids, max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        for length in range(9, 14):
            choice = student(input_ids=written[:, :length]).logits[:, -1].argmax(-1)
            assert torch.equal(written[:, length], choice)


@pytest.mark.parametrize("half_life", [0.1, 0.5, 1.0, 7.0, 64.0, 1024.0, 1e6])
def test_a_head_halves_its_state_in_its_half_life(half_life: float) -> None:
    bias = half_life_to_bias(torch.tensor(half_life, dtype=torch.float64))
    assert torch.sigmoid(-bias) ** half_life == pytest.approx(0.5, rel=1e-9)
    single = half_life_to_bias(torch.tensor(half_life))
    assert single.dtype == torch.float32
    assert torch.exp(-F.softplus(single).double() * half_life) == pytest.approx(0.5, rel=1e-5)
