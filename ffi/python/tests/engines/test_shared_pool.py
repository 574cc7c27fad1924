"""An engine's pool in shared memory, allocated by vLLM's own code, without an engine."""

import os

import pytest
import torch
from connector_pool import engine_config, pool, tensors

from kvfabric import _pools
from kvfabric.vllm.config import ConfigError, ConnectorConfig
from kvfabric.vllm.engine import EngineFacts
from kvfabric.vllm.layout import PageLayout
from kvfabric.vllm.shared_pool import SharedPool, file_of
from kvfabric.vllm.worker import WorkerSide


@pytest.fixture(scope="module")
def engine(tiny_model):
    return engine_config(tiny_model)


def test_the_pool_and_nothing_else_is_shared_memory(engine):
    """What the engine writes is in the file; other tensors made meanwhile are the engine's own."""
    cache = pool(engine)
    with SharedPool():
        other = torch.zeros(16, dtype=torch.float32)
        views = tensors(cache)
        later = torch.zeros(4096, dtype=torch.int8, device="cpu")
    layout = PageLayout.of(cache, views)
    fd = file_of(layout.address, layout.length)
    assert os.fstat(fd).st_size == layout.length
    assert os.pread(fd, layout.length, 0) == bytes(layout.length)
    list(views.values())[1][2].view(torch.uint8).fill_(7)
    span = layout.spans[1]
    assert os.pread(fd, span.length, span.offset + 2 * span.stride) == b"\x07" * span.length
    for tensor in (other, later):
        assert _pools.file_of(tensor.data_ptr(), tensor.untyped_storage().nbytes()) is None


def test_the_pools_size_cannot_change(engine):
    """Or a peer that maps it could be ended by it."""
    cache = pool(engine)
    with SharedPool():
        layout = PageLayout.of(cache, tensors(cache))
    fd = file_of(layout.address, layout.length)
    for length in (layout.length - 4096, layout.length + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, length)


def test_a_pool_that_is_elsewhere_is_refused(engine):
    """As if vLLM had not asked for the context, or allocated without it."""
    config = ConnectorConfig.parse({"host": {"bytes": 1 << 24}, "shared_pool": True})
    cache = pool(engine)
    side = WorkerSide(config, EngineFacts.of(config, engine, cache), engine, 0)
    with pytest.raises(ConfigError, match="shared_pool: this version of vLLM put its pool"):
        side.register(cache, tensors(cache))
    context = side.pool_context()
    assert context is not None
    with context:
        views = tensors(cache)
    side.register(cache, views)


def test_without_the_setting_the_pool_is_where_the_engine_likes(engine):
    """No context is given."""
    config = ConnectorConfig.parse({"host": {"bytes": 1 << 24}})
    facts = EngineFacts.of(config, engine, pool(engine))
    assert WorkerSide(config, facts, engine, 0).pool_context() is None
