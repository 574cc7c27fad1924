"""What the library says beside its results, in processes of their own: on standard error, from the level that is wanted on."""

import os
import socket
import subprocess
import sys

import pytest

STRANGER = """
import socket, sys
import kvfabric
port = int(sys.argv[1])
agent = kvfabric.Agent("one", tcp=f"127.0.0.1:{port}")
with socket.create_connection(("127.0.0.1", port)) as stranger:
    stranger.sendall(b"GET / HTTP/1.1\\r\\n" * 100)
    stranger.settimeout(60.0)
    try:
        while stranger.recv(4096):
            pass
    except ConnectionResetError:
        pass
"""


def said(level):
    """What a process writes to standard error whose agent a stranger connected to."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "KVFABRIC_LOG": level}
    if not level:
        del environment["KVFABRIC_LOG"]
    command = [sys.executable, "-c", STRANGER, str(port)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    return run.stderr


@pytest.mark.parametrize("level", ["", "kvfabric_transfer=warn"])
def test_warnings_are_written_to_standard_error(level):
    lines = said(level).splitlines()
    assert len(lines) == 1 and " WARN kvfabric_transfer::" in lines[0], lines
    assert "a connection broke the protocol" in lines[0]


@pytest.mark.parametrize("level", ["off", "error", "kvfabric_tiers=debug"])
def test_nothing_is_written_that_is_not_wanted(level):
    assert said(level) == ""


def test_a_level_that_is_none_is_named():
    complaint = said("loud").splitlines()[0]
    assert 'KVFABRIC_LOG: "loud": ' in complaint
    assert complaint.endswith('taken as "warn"')
