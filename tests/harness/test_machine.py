"""What a report says of the machine: hardware and versions, but no name and no path."""

import json
import platform

import pytest
import torch
from report_example import example_report

from ssm_zoo.harness.machine import describe_machine
from ssm_zoo.reports.distillation_report import Report, parse_report


def test_the_machine_is_described_without_its_name():
    machine = describe_machine()
    report = example_report() | machine
    assert isinstance(parse_report(report), Report)
    assert machine["hardware"].keys() == {"cpu", "cores", "memory_bytes", "gpu"}
    assert machine["hardware"]["cores"] >= 1
    assert machine["hardware"]["memory_bytes"] > 2**28
    assert machine["versions"]["torch"] == torch.__version__
    assert machine["versions"]["python"] == platform.python_version()
    assert {"transformers", "ssm-zoo"} <= machine["versions"].keys()
    text = json.dumps(machine)
    assert platform.node() not in text
    assert "/home" not in text


def test_devices_of_one_kind_are_counted(monkeypatch: pytest.MonkeyPatch):
    names = ["NVIDIA A", "NVIDIA B", "NVIDIA A"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    assert describe_machine()["hardware"]["gpu"] == "2 x NVIDIA A, 1 x NVIDIA B"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert describe_machine()["hardware"]["gpu"] is None
