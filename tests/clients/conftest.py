"""Nothing is fetched, no other framework is started, and the table is printed at the end."""

import os

import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "USE_TORCH": "0", "USE_TF": "0", "USE_FLAX": "1"}

pytest.register_assert_rewrite("tests.clients.harness")

from .harness import RESULTS, table  # noqa: E402


def pytest_terminal_summary(terminalreporter):
    if RESULTS:
        terminalreporter.section("largest error of outputs and gradients, against merged models")
        terminalreporter.write_line(table())
