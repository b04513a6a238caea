"""What `test_additions.py` runs where the package is a copy with the toys in it: arguments are this package's folder,
the repository's tests, and a folder to write into."""

import os
import sys
from pathlib import Path

root, tests, out = (Path(argument) for argument in sys.argv[1:4])
# The copy in the place of the installed package.
sys.meta_path = [finder for finder in sys.meta_path if "ssm_zoo" not in str(getattr(finder, "__module__", ""))]
sys.path[:0] = [str(root), str(tests / "modeling"), str(tests / "support")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:3])

import families  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from teachers import draw_ids, make_teacher  # noqa: E402
from transformers.dynamic_module_utils import get_class_from_dynamic_module  # noqa: E402

import ssm_zoo.modeling as zoo  # noqa: E402
from ssm_zoo.distill.calibrate import calibrate  # noqa: E402
from ssm_zoo.distill.recipe import StudentSpec  # noqa: E402
from ssm_zoo.distill.student import build_student, student_mixer  # noqa: E402
from ssm_zoo.distill.teacher import Teacher  # noqa: E402
from ssm_zoo.modeling.families import preset  # noqa: E402
from ssm_zoo.reports.distillation_tables import TOKEN_MIXERS  # noqa: E402

assert Path(str(zoo.__file__)).is_relative_to(root)

# A tiny configuration of each: the entries of tests/modeling/families.py.
families.FAMILIES.clear()
families.FAMILIES["leaky-mixer"] = families._hybrid("leaky", "full_attention", leaky={"heads": 2})
families.FAMILIES["leaky-mixers"] = families.family(zoo.LeakyConfig, {"vocab_size": families.VOCAB, "hidden_size": 16})
families.ENCODERS.clear()

# The label of reports, and the sizes by name.
assert TOKEN_MIXERS["leaky"].label == "leaky sum: a decay for each head"
assert preset("leaky-small").hidden_size == 32

# Export: equal logits by the code that was saved.
for name in families.FAMILIES:
    model, ids = families.make_model(name), families.draw_ids(2, 9)
    model.save_pretrained(out / name)
    reference = model.config.auto_map["AutoModelForCausalLM"]
    loaded = get_class_from_dynamic_module(reference, str(out / name)).from_pretrained(out / name).eval()
    assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        # Hidden attention: the matrix is what the mixer does.
        layer, hidden = model.backbone.layers[0].mixer, torch.randn(2, 7, 16)
        values = layer.in_proj(hidden).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
        matrix = layer(hidden, model.backbone.sequence_of(hidden), output_attentions=True)[1]
        mixed = layer.out_proj((matrix.float() @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(mixed, layer(hidden, model.backbone.sequence_of(hidden))[0], atol=1e-5, rtol=0)

# A student that starts from attention, with calibrated half-lives and output projections.
teacher = make_teacher()
spec = StudentSpec(mixer="leaky", calibration="head_scale")
student = build_student(Teacher(teacher), spec, [1])
mixer = student_mixer(student, 1)
value = teacher.model.layers[1].self_attn.v_proj.weight
repeats = mixer.in_proj.weight.shape[0] // value.shape[0]
whole = value.unflatten(0, (-1, teacher.config.head_dim)).repeat_interleave(repeats, 0).flatten(0, 1)
assert torch.equal(mixer.in_proj.weight, whole)
before = mixer.out_proj.weight.clone()
calibrate(student, Teacher(teacher), spec, [1], draw_ids(2, 24), progress=False)
assert not torch.equal(mixer.out_proj.weight, before)
with pytest.raises(ValueError, match="only with mixer"):
    StudentSpec(mixer="leaky", feature_map="softplus")

# The tests that every family has to pass. What a mixer does with its matrix, its author adds to `applied` in
# test_mixing_matrices.py; here it is checked above.
chosen = "not definition and not exported and not lora_with and not applied_to_the_values"
names = ("eight_ways", "lora", "heads", "float32_parameters", "modeling", "mixing_matrices", "empty_batches")
paths = [str(tests / "modeling" / f"test_{name}.py") for name in names]
options = ["-q", "-x", "-p", "no:cacheprovider", "-k", f"leaky and {chosen}", f"--rootdir={tests.parent}"]
sys.exit(pytest.main([*options, "-c", str(tests.parent / "pyproject.toml"), *paths]))
