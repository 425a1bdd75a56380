"""Tests of examples/demo/, whose files are scripts that import each other by their bare names."""

import sys
from pathlib import Path

DEMO = Path(__file__).parents[2] / "examples" / "demo"
sys.path.insert(0, str(DEMO))

import corpus  # noqa: E402, F401
