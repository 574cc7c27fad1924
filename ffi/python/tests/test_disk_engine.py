"""The disk tier on io_uring and on threads, also where the system forbids io_uring."""

import json
import pathlib
import subprocess
import sys

import pytest

DISK = pathlib.Path(__file__).with_name("disk.py")
PATIENCE = 120


def run(*arguments):
    command = [sys.executable, str(DISK), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def came_back(ring):
    return {"stored": 4, "sources": ["nvme"] * 4, "same": True, "ring": ring}


def test_threads_make_no_ring(tmp_path):
    assert run("threads", tmp_path) == came_back(ring=False)


def test_io_uring_is_used_where_it_is_allowed(tmp_path):
    ring = run("io_uring", tmp_path / "ring")
    if "error" in ring:
        pytest.skip(ring["said"])
    assert ring == came_back(ring=True)
    assert run("auto", tmp_path / "auto") == came_back(ring=True)


def test_threads_take_over_where_io_uring_is_forbidden(tmp_path):
    """A filter of system calls, as container runtimes install it."""
    assert run("auto", tmp_path, "forbidden") == came_back(ring=False)


def test_io_uring_that_is_demanded_and_forbidden_is_an_error(tmp_path):
    refused = run("io_uring", tmp_path, "forbidden")
    assert refused["error"] == "UnsupportedError"
    assert "io_uring" in refused["said"] and "not permitted" in refused["said"]


def test_an_unknown_engine_is_named(tmp_path):
    refused = run("psync", tmp_path)
    assert refused["error"] == "InvalidError" and "psync" in refused["said"]
