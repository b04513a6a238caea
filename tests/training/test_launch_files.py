"""The launch files for machines with several GPUs say what their names say, in keys that accelerate knows."""

import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

FOLDER = Path(__file__).parents[2] / "examples" / "launch"
FILES = sorted(FOLDER.glob("*.yaml"))


def test_there_is_one_for_every_way_and_size() -> None:
    assert {path.stem for path in FILES} == {
        f"{way}_{size}" for way in ("fsdp2", "zero2", "zero3") for size in ("1x8", "4x8")
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_launch_file_is_what_its_name_says(path: Path) -> None:
    config = load_config_from_file(str(path))  # which refuses keys that it does not know
    way, machines, gpus = re.fullmatch(r"(\w+)_(\d)x(\d)", path.stem).groups()  # type: ignore[union-attr]
    assert (config.num_machines, config.num_processes) == (int(machines), int(machines) * int(gpus))
    assert config.mixed_precision == "no" and not config.use_cpu
    assert f"--config_file examples/launch/{path.name} " in path.read_text()
    if way == "fsdp2":
        assert config.distributed_type == "FSDP" and config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
    else:
        assert config.distributed_type == "DEEPSPEED" and config.deepspeed_config["zero_stage"] == int(way[-1])
