"""Where engines find the package ``nixl``: installed, as in the tests' own environment, or else the sources of the wheel."""

import importlib.util
import os
import pathlib
from typing import Dict

HERE = pathlib.Path(__file__).resolve().parent
SOURCES = HERE.parents[2] / "nixl" / "src"


def environment() -> Dict[str, str]:
    """What to add to an engine's environment."""
    spec = importlib.util.find_spec("nixl")
    # The folder tests/nixl looks like a package of that name, but one of no file.
    if spec is not None and spec.origin is not None:
        return {}
    # The engine's environment replaces the paths, so those that the bed adds are repeated.
    paths = [str(HERE), str(SOURCES), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(paths)}
