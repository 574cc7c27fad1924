"""What engines import from ``nixl._bindings``."""

from kvfabric.nixl_compat._bindings import *  # noqa: F403
