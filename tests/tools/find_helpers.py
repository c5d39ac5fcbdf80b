"""Imported first by the tools that are commands: so they find what tests and examples share."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("", "house", "../examples")]
