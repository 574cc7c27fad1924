"""kvfabric in the place of NIXL: ``nixl._api`` and ``nixl._bindings`` are those of :mod:`kvfabric.nixl_compat`.

It refuses to be imported beside the real NIXL, of whose parts it would else be taken for one.
"""

import importlib.metadata
from typing import List

REAL_DISTRIBUTIONS = ("nixl", "nixl-cu12", "nixl-cu13", "nixl-rocm")


def _real_distributions() -> List[str]:
    found = []
    for name in REAL_DISTRIBUTIONS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


_found = _real_distributions()
if _found:
    raise ImportError(
        f"kvfabric-nixl cannot be used beside the real NIXL ({', '.join(_found)}): uninstall one of them"
    )

# In this order: where both have a name, NIXL's package has that of _api.
from kvfabric.nixl_compat._bindings import *  # noqa: E402,F403
from kvfabric.nixl_compat._api import *  # noqa: E402,F403

from . import _api, _bindings  # noqa: E402,F401
