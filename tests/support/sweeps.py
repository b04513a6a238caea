"""The mark of tests that take too long for `make test`."""

import os

import pytest

SWEEP = pytest.mark.skipif(not os.environ.get("SSM_ZOO_SWEEPS"), reason="a sweep of many minutes: make test-sweeps")
