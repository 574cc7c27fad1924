"""An engine's pool of blocks in shared memory.

vLLM asks a connector for a context to allocate its pool in. This one answers the one allocation
that is made there with shared memory of the same size, whose file the fabric registers instead of
an address. It depends on how vLLM 0.32 allocates: a pool that it did not see is told, not guessed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from vllm.logger import init_logger

from kvfabric import _pools

from .config import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

logger = init_logger("vllm.kvfabric.shared_pool")


def file_of(address: int, length: int) -> int:
    """The file of the engine's pool; raises `ConfigError` when that is not shared memory."""
    fd = _pools.file_of(address, length)
    if fd is None:
        raise ConfigError(
            f"shared_pool: this version of vLLM put its pool of {length} bytes elsewhere than in"
            " the memory it was given; leave shared_pool unset"
        )
    return fd


class SharedPool(TorchFunctionMode):
    """The context for one engine's pool."""

    def __init__(self) -> None:
        super().__init__()
        self._tensor: torch.Tensor | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replaces zeroed bytes of the CPU; everything else is as it was."""
        kwargs = kwargs or {}
        if func is not torch.zeros or not _is_pool(args, kwargs) or self._tensor is not None:
            return func(*args, **kwargs)
        shared = _pools.create(args[0])
        self._tensor = torch.frombuffer(shared.memory, dtype=torch.int8)
        _pools.announce(self._tensor.data_ptr(), shared)
        logger.info("the pool's %d bytes are shared memory", args[0])
        return self._tensor



def _is_pool(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return (
        len(args) == 1
        and isinstance(args[0], int)
        and args[0] > 0
        and kwargs.get("dtype") is torch.int8
        and torch.device(kwargs.get("device") or "cpu").type == "cpu"
    )
