"""What of the package's code a checkpoint carries, on small trees of files."""

from pathlib import Path

import pytest

from ssm_zoo.modeling.exported_code import SHARED, collect_code


def collect(root: Path, files: dict[str, str], **rows: set[str]) -> dict[str, str]:
    """The exported files of `modeling/modeling_a.py` and `modeling/configuration_a.py` in a tree of files."""
    files = {"modeling/configuration_a.py": "SIZE = 1\n", **files}
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return collect_code([root / "modeling/modeling_a.py", root / "modeling/configuration_a.py"], rows)


def run(texts: dict[str, str], name: str) -> dict:
    """The names that an exported file without relative imports defines."""
    values: dict = {}
    exec(compile(texts[name], name, "exec"), values)
    return values


def test_kernels_stay_files_and_the_rest_of_modeling_becomes_one(tmp_path: Path) -> None:
    texts = collect(
        tmp_path,
        {
            "modeling/modeling_a.py": "from ..kernels.scan import scan\nfrom .layers import Layer\n\nX = Layer(scan)\n",
            "modeling/layers.py": "import torch\nfrom .inner import inner\n\n\nclass Layer:\n    f = inner(torch)\n",
            "modeling/inner.py": "def inner(x):\n    return x\n",
            "modeling/unused.py": "",
            "kernels/scan.py": "def scan():\n    from ._tiles import tiles\n\n    return tiles\n",
            "kernels/_tiles.py": "tiles = 1\n",
        },
    )
    assert list(texts) == ["_tiles.py", "configuration_a.py", "modeling_a.py", "scan.py", SHARED]
    assert (
        "from .scan import scan" in texts["modeling_a.py"] and "from .zoo_model import Layer" in texts["modeling_a.py"]
    )
    assert "    from ._tiles import tiles" in texts["scan.py"]
    assert texts[SHARED].index("def inner") < texts[SHARED].index("class Layer")
    assert ".inner" not in texts[SHARED] and "import torch" in texts[SHARED]


def test_what_nothing_reaches_stays_behind(tmp_path: Path) -> None:
    texts = collect(
        tmp_path,
        {
            "modeling/modeling_a.py": "from ..kernels.op import op\n\n\ndef f():\n    return op()\n",
            "kernels/op.py": (
                "import math\nimport json\nfrom os import path, sep\n\n_LIMIT = 3\n_OTHER = 4\n\n\n"
                "def op():\n    return math.pi, _LIMIT, sep\n\n\ndef op_reference():\n    return json, _OTHER, path\n"
            ),
        },
    )
    text = texts["op.py"]
    assert run(texts, "op.py")["op"]()[1] == 3
    for gone in ("op_reference", "_OTHER", "json", "path"):
        assert gone not in text


def test_what_registers_itself_with_something_kept_is_kept(tmp_path: Path) -> None:
    texts = collect(
        tmp_path,
        {
            "modeling/modeling_a.py": "from ..kernels.op import op\n\n\ndef f():\n    return op\n",
            "kernels/op.py": (
                "class Op(dict):\n    def register(self, f):\n        self['f'] = f\n        return f\n\n\n"
                "op, unused = Op(), Op()\n\n\n@op.register\ndef _backward():\n    return _helper()\n\n\n"
                "def _helper():\n    return 7\n\n\n"
                "other = Op()\n\n\n@other.register\ndef _theirs():\n    return 8\n\n\n"
                "op['item'] = _item = 1\nop.name = 'x'\nother.name = 'y'\n"
            ),
        },
    )
    values = run(texts, "op.py")
    assert values["op"]["f"]() == 7 and values["op"]["item"] == 1 and values["op"].name == "x"
    assert "other" not in values and "_theirs" not in texts["op.py"]


def test_statements_that_run_at_import_are_kept_with_what_they_need(tmp_path: Path) -> None:
    texts = collect(
        tmp_path,
        {
            "modeling/modeling_a.py": "from .b import f\n\nX = f\n",
            "modeling/b.py": (
                "try:\n    import triton\nexcept ImportError:\n    triton = None\n\nTABLE = {}\n\n\n"
                "def f():\n    return triton\n\n\nfor _name in ('a', 'b'):\n    TABLE[_name] = _make(_name)\n\n\n"
                "def _make(name):\n    return name\n"
            )
            .replace("for _name", "def _make(name):\n    return name * 2\n\n\nfor _name", 1)
            .rsplit("\n\n\ndef", 1)[0]
            + "\n",
        },
    )
    values = run(texts, SHARED)
    assert values["TABLE"] == {"a": "aa", "b": "bb"} and values["f"]() is values["triton"]


def test_rows_that_the_configuration_does_not_use_are_left_out_with_their_code(tmp_path: Path) -> None:
    files = {
        "modeling/modeling_a.py": "from .table import MIXERS\n\nX = MIXERS\n",
        "modeling/table.py": (
            "from .one import ONE\nfrom .two import TWO\n\n"
            "MIXERS: dict[str, int] = {\n    'one': ONE,\n    'two': TWO,\n}\n"
        ),
        "modeling/one.py": "ONE = 1\n",
        "modeling/two.py": "from ..kernels.heavy import heavy\n\nTWO = heavy\n",
        "kernels/heavy.py": "heavy = 2\n",
    }
    assert run(collect(tmp_path, files, MIXERS={"one"}), SHARED)["MIXERS"] == {"one": 1}
    assert "heavy.py" not in collect(tmp_path, files, MIXERS={"one"})
    assert "heavy.py" in collect(tmp_path, files, MIXERS={"one", "two"}) and "heavy.py" in collect(tmp_path, files)


def test_docstrings_are_cut_to_their_summary_and_texts_stay(tmp_path: Path) -> None:
    text = '''"""A module.

More of it.
"""

LIMIT = 3
"""What the limit is for."""


def f(x):
    """Do something
    in two lines.

    Args:
        x: a number.
    """
    text = """one

    two"""

    return text, x


class A:
    """One line."""

    field: int = 1
    """Of the class.

    At length.
    """

    def method(self):
        """Three quotes on a line of their own.
        """
        return 5
'''
    found = collect(tmp_path, {"modeling/modeling_a.py": text})["modeling_a.py"]
    values = run({"a": found}, "a")
    assert values["f"].__doc__ == "Do something\n    in two lines."
    assert values["f"](1) == ("one\n\n    two", 1)
    assert values["A"].__doc__ == "One line." and values["A"]().method() == 5
    assert "At length" not in found and "More of it" not in found and "Args" not in found


def test_annotations_in_quotes_are_followed(tmp_path: Path) -> None:
    files = {
        "modeling/modeling_a.py": "from .b import f\n\nX = f\n",
        "modeling/b.py": "def f(x: 'Kind | None') -> None:\n    pass\n\n\nclass Kind: ...\n\n\nclass Other: ...\n",
    }
    text = collect(tmp_path, files)[SHARED]
    assert "class Kind" in text and "class Other" not in text


def test_two_meanings_of_a_name_are_an_error_and_one_meaning_is_written_once(tmp_path: Path) -> None:
    files = {
        "modeling/modeling_a.py": "from .b import f\nfrom .c import g\n\nX = f, g\n",
        "modeling/b.py": (
            "import torch\n\nlogger = torch\n\n\ndef _size():\n    return 1\n\n\ndef f():\n    return _size, logger\n"
        ),
        "modeling/c.py": "import torch\n\nlogger = torch\n\n\ndef g():\n    return logger\n",
    }
    assert collect(tmp_path, files)[SHARED].count("logger = torch") == 1
    files["modeling/c.py"] = "def _size():\n    return 2\n\n\ndef g():\n    return _size()\n"
    from ssm_zoo.modeling import exported_code

    exported_code._parsed.cache_clear()
    with pytest.raises(ValueError, match=r"_size differs in (b|c)\.py and (b|c)\.py"):
        collect(tmp_path, files)


@pytest.mark.parametrize("rename", ["from .c import g as h", "from .c import g as f"])
def test_another_name_for_what_comes_into_the_same_file_is_an_error(tmp_path: Path, rename: str) -> None:
    files = {
        "modeling/modeling_a.py": "from .b import X\n\nY = X\n",
        "modeling/b.py": f"{rename}\n\nX = {rename.split()[-1]}\n",
        "modeling/c.py": "def g():\n    return 1\n",
    }
    with pytest.raises(ValueError, match=r"b\.py must import g under its own name, got [hf]"):
        collect(tmp_path, files)


RELATIVELY = "an exported file must import the package by relative imports"
ONLY = "a relative import must be `from .name import` or `from ..kernels.name import`"


@pytest.mark.parametrize("inside", ["", "def f():\n    "], ids=["top", "in-a-function"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        pytest.param("import ssm_zoo.kernels.ssd", RELATIVELY, id="import"),
        pytest.param("from ssm_zoo.kernels.ssd import ssd", RELATIVELY, id="from-import"),
        pytest.param("from . import b", ONLY, id="bare-dot"),
        pytest.param("from .sub.b import c", ONLY, id="deeper"),
        pytest.param("from ..conversion.b import c", ONLY, id="another-package"),
        pytest.param("from ..kernels import b", ONLY, id="kernels-itself"),
        pytest.param("from ...kernels.b import c", ONLY, id="too-far-up"),
    ],
)
def test_an_import_that_cannot_be_flattened_is_an_error(tmp_path: Path, line: str, message: str, inside: str) -> None:
    with pytest.raises(ValueError, match=rf"modeling_a\.py, line \d: {message}"):
        collect(tmp_path, {"modeling/modeling_a.py": inside + line + "\n"})


def test_two_files_of_one_name_are_an_error(tmp_path: Path) -> None:
    files = {
        "modeling/modeling_a.py": "from .same import x\nfrom ..kernels.same import y\n\nX = x, y\n",
        "modeling/same.py": "x = 1\n",
        "kernels/same.py": "y = 1\n",
    }
    with pytest.raises(ValueError, match=r"must have different names"):
        collect(tmp_path, files)


def test_modules_that_import_each_other_at_import_are_an_error(tmp_path: Path) -> None:
    files = {
        "modeling/modeling_a.py": "from .b import x\n\nX = x\n",
        "modeling/b.py": "from .c import y\n\nx = y\n",
        "modeling/c.py": "from .b import x\n\ny = [x]\n",
    }
    with pytest.raises(ValueError, match=r"import each other"):
        collect(tmp_path, files)
