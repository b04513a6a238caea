"""The mark of tests that take too long for `make test`."""

import os

import pytest

SWEEPING = bool(os.environ.get("SSM_ZOO_SWEEPS"))
SWEEP = pytest.mark.skipif(not SWEEPING, reason="a sweep of many minutes: make test-sweeps")
