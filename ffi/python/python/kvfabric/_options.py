"""How agents are made: plain tuples with names."""

import os
from typing import List, NamedTuple, Optional, Tuple, Union

from . import _kvfabric

_Path = Union[str, "os.PathLike[str]"]


class Tls(NamedTuple):
    """Files in PEM of what TLS needs, read when the agent is made."""

    authorities: _Path
    """Certificates of the authorities that peers' must come from."""
    certificates: _Path
    """The agent's certificate, with its name as a DNS name, then those between it and the authority."""
    key: _Path
    """The key of the agent's certificate."""


class ObjectStore(NamedTuple):
    """How an object store is reached. What is None comes from the usual environment variables of its
    kind of store (AWS_…, GOOGLE_…, AZURE_…), and credentials after that from the instance.
    """

    url: str
    """"file:///directory" (made when missing), "s3://bucket/prefix", "gs://bucket/prefix" or
    "az://container/prefix"."""
    endpoint: Optional[str] = None
    """The service's URL, when it is not the provider's own."""
    region: Optional[str] = None
    """S3: the region to sign for."""
    access_key: Optional[str] = None
    """Who we are. S3: the id of the access key; Azure: the storage account."""
    secret_key: Optional[str] = None
    """Proves it. S3: the secret key; GCS: the JSON of a service account's key; Azure: the account's
    key. Never logged."""
    session_token: Optional[str] = None
    """S3: what belongs to temporary credentials; GCS and Azure: a bearer token. Never logged."""
    authorities: Optional[_Path] = None
    """PEM file of authorities that are believed beside the system's."""
    allow_http: bool = False
    """Accept an endpoint without TLS."""
    checksum: Optional[str] = "sha256"
    """What goes with each write to S3 for the store to check: "sha256", "crc64nvme" or None."""
    part_bytes: int = 16 << 20
    """Longer objects are written and read in parts of this size, 5 MiB to 256 MiB."""
    parts_in_flight: int = 4
    """Parts of one object at once, at most 64."""
    requests_in_flight: int = 32
    """Requests to the store at once, at most 1,024."""
    attempt_timeout: float = 10.0
    """How many seconds one attempt may go without an answer or a byte."""
    retries: int = 3
    """How often a failed attempt is repeated."""

    def __repr__(self) -> str:
        """Without what must not be shown."""
        shown = self._replace(
            secret_key=self.secret_key and "(hidden)",
            session_token=self.session_token and "(hidden)",
        )
        fields = ", ".join(f"{name}={value!r}" for name, value in zip(shown._fields, tuple(shown)))
        return f"ObjectStore({fields})"


class Cuda(NamedTuple):
    """How CUDA devices are used. The defaults are right for most machines."""

    pin: bool = True
    """Whether host memory is pinned: all memory of a region, when a transfer first names it beside
    a device's. Otherwise it goes through buffers that are, and is copied once more."""
    staging_bytes: int = 16 << 20
    """Bytes of those buffers for each device, a multiple of 1 MiB, up to 1 GiB."""
    polling: float = 20e-6
    """How many seconds the device's thread looks whether copies are done before it sleeps in
    between, at most 0.01."""
    fragments: Union[int, str] = 0
    """Ranges of up to so many bytes, of which a transfer has several, are copied by a kernel, many in
    one launch; 0: the driver copies all; "measured": whoever was faster when memory of the device was
    first registered."""
    window_bytes: int = 16 << 20
    """Bytes of pinned memory for each device through which transfers with files, objects and peers
    go: a multiple of 1 MiB, from 2 MiB to 1 GiB."""
    peers: bool = True
    """Whether peers of this machine open memory of devices that is exported to them, and this agent
    theirs; devices copy then."""
    storage: str = "staged"
    """How bytes go between memory of devices and files. "staged": through pinned host memory;
    "direct": by cuFile (GPUDirect Storage) where it says that no copy of them is in host memory, which
    takes that its compatibility mode is off, and staged elsewhere; "cufile": by cuFile wherever it takes
    a file, also where it may take them through host memory."""
    storage_threads: int = 16
    """Threads that wait in cuFile, where that is used, at most 256."""


class CudaDevice(NamedTuple):
    """A GPU that this process sees."""

    ordinal: int
    """Its number in this process, from 0; another process may number it otherwise."""
    name: str
    """The vendor's name."""
    uuid: str
    """What tells it from all others, in every process: 32 hexadecimal digits."""
    pci: str
    """Its address on the PCI bus, such as "0000:17:00.0"."""
    bytes: int
    """Its memory."""
    compute: Tuple[int, int]
    """Compute capability."""


class CudaReport(NamedTuple):
    """What the CUDA driver of a system serves."""

    version: Tuple[int, int]
    """The newest CUDA that it serves."""
    has_batched_copies: bool
    """Whether it copies many ranges in one call (CUDA 12.8 and later)."""
    devices: List[CudaDevice]
    """The devices that this process sees, by ordinal."""


def cuda_probe() -> CudaReport:
    """What CUDA there is. Starts the driver, which may take seconds the first time, and makes no
    context. `UnsupportedError` with the reason: no driver, one that is too old or does not start, no
    device, or none that this process may see.
    """
    version, has_batched_copies, devices = _kvfabric.cuda_facts()
    return CudaReport(version, has_batched_copies, [CudaDevice(*device) for device in devices])


class Verbs(NamedTuple):
    """How RDMA is used. The defaults are right for most networks."""

    device: Optional[str] = None
    """The ports that may be used, with commas between them: each a device, "mlx5_0", or device and port, "mlx5_0:2"; of those
    that are up all that are as near as the nearest one otherwise."""
    gid_index: Optional[int] = None
    """The entry of each port's GID table; RoCE v2 with an IPv4 address first otherwise."""
    listen: Optional[str] = None
    """The "ip:port" where peers ask for connections; the GIDs' own addresses and any port otherwise."""
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
    rails: int = 4
    """How many ports are used at most, the nearest first, at most 8. Large requests go over all of them."""
    near: Optional[str] = None
    """What ports should be near to: the PCI address of a device, "0000:3b:00.0" for a GPU. The memory node whose processors
    alone this process may use, if it is bound to one, otherwise."""
    connect: str = "exchange"
    """How queue pairs are connected, the same on both sides: "exchange" (by what both tell each other over TCP) or "rdma_cm"
    (through librdmacm, which must be in the system then: the kernel finds the way between IP addresses)."""
