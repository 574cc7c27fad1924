"""How agents are made: plain tuples with names."""

import os
from typing import NamedTuple, Optional, Union

_Path = Union[str, "os.PathLike[str]"]


class Tls(NamedTuple):
    """Files in PEM of what TLS needs, read when the agent is made."""

    authorities: _Path
    """Certificates of the authorities that peers' must come from."""
    certificates: _Path
    """The agent's certificate, with its name as a DNS name, then those between it and the authority."""
    key: _Path
    """The key of the agent's certificate."""


class Verbs(NamedTuple):
    """How RDMA is used. The defaults are right for most networks."""

    device: Optional[str] = None
    """The device, "mlx5_0", or device and port, "mlx5_0:2"; the first port that is up otherwise."""
    gid_index: Optional[int] = None
    """The entry of the port's GID table; RoCE v2 with an IPv4 address first otherwise."""
    listen: Optional[str] = None
    """The "ip:port" where peers ask for connections; the GID's own address and any port otherwise."""
    mtu: Optional[int] = None
    """The most bytes of content in a packet; what both ports do otherwise."""
    traffic_class: int = 0
    """The traffic class of packets; in RoCE v2 its upper six bits are the DSCP."""
    service_level: int = 0
    """The service level, at most 15."""
    timeout: int = 14
    """A packet that is not acknowledged is sent again after 4.096 µs times two to the power of this."""
    retries: int = 7
    """How often it is sent again before the peer is given up, at most 7."""
    polling: float = 20e-6
    """How many seconds the agent's thread looks for completions before it sleeps."""
