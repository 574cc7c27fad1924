"""What engines import from ``nixl._api``."""

from kvfabric.nixl_compat._api import *  # noqa: F403
