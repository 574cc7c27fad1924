"""UCX beside another UCX of the same process, as an engine or a library of it may have brought one."""

import ctypes
import os
import pathlib
import re
import subprocess
import sys

import pytest

import kvfabric

CACHE = pathlib.Path(os.environ.get("CACHE") or pathlib.Path.home() / ".cache" / "kvfabric")
# Fetched by scripts/test-ucx.
OTHERS = sorted(CACHE.glob("ucx-*/libucx/lib"))
LEN = 1 << 20
# UCP_PARAM_FIELD_FEATURES, and UCP_FEATURE_RMA.
FIELDS, FEATURES = 1, 2


def renamed(folder, copies):
    """Copies of the libraries under names of their own, as wheels bundle them; the functions in them are called as ever."""
    for library in folder.rglob("*.so*"):
        if library.is_symlink() and ".so." not in library.name:
            continue
        copy = copies / library.relative_to(folder).with_name(library.name.replace("libuc", "libvc"))
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(re.sub(rb"(?<=\0)libuc([mstp])\.so\.0(?=\0)", rb"libvc\1.so.0", library.read_bytes()))
    return copies


def start_other(folder):
    """A worker of the UCX in a folder."""
    [library] = pathlib.Path(folder).glob("lib?cp.so.0")
    ucp = ctypes.CDLL(str(library))
    version = [ctypes.c_uint() for _ in range(3)]
    ucp.ucp_get_version(*map(ctypes.byref, version))
    parameters = (ctypes.c_uint64 * 64)(FIELDS, FEATURES)
    config, context, worker = (ctypes.c_void_p() for _ in range(3))
    assert ucp.ucp_config_read(None, None, ctypes.byref(config)) == 0
    made = ucp.ucp_init_version(version[0], version[1], parameters, config, ctypes.byref(context))
    assert made == 0
    assert ucp.ucp_worker_create(context, (ctypes.c_uint64 * 64)(), ctypes.byref(worker)) == 0
    ucp.ucp_worker_progress.argtypes = [ctypes.c_void_p]
    return ".".join(str(part.value) for part in version), lambda: ucp.ucp_worker_progress(worker)


def start_own():
    return [kvfabric.Agent(name, shm=False, memcpy=False, ucx={}) for name in ("initiator", "target")]


def move(initiator, target):
    """What the path says of itself, after bytes have gone over it."""
    given, taken = bytearray(os.urandom(LEN)), bytearray(LEN)
    local, remote = initiator.register(given), target.register(taken, writable=True)
    peer = initiator.load_peer(target.metadata())
    initiator.write([(local, 0, LEN)], peer, [(remote.id, 0, LEN)]).wait()
    assert taken == given
    return peer.explain_path()


def body(order, folder):
    if order == "own first":
        agents = start_own()
        said = move(*agents)
        version, progress = start_other(folder)
    else:
        version, progress = start_other(folder)
        agents = start_own()
        said = move(*agents)
    progress()
    assert move(*agents) == said
    progress()
    print(version, said, sep="\n")


def outcome(order, folder):
    """The version of the other one, and what our path says of itself."""
    command = [sys.executable, __file__, order, str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


needs_both = pytest.mark.skipif(not OTHERS, reason="no other UCX is here: scripts/test-ucx fetches one")


@pytest.fixture
def other():
    try:
        start_own()
    except kvfabric.UnsupportedError as error:
        pytest.skip(f"no UCX is here: {error}")
    return OTHERS[-1]


@needs_both
@pytest.mark.parametrize("order", ["own first", "other first"])
def test_a_ucx_of_other_names_works_beside_the_system_s(other, order, tmp_path):
    version, said = outcome(order, renamed(other, tmp_path))
    assert "ucx" in said and version not in said


@needs_both
def test_a_ucx_of_the_same_names_that_is_there_already_is_used(other):
    version, said = outcome("other first", other)
    assert f"ucx {version} " in said


if __name__ == "__main__":
    body(*sys.argv[1:])
