"""Where the engines' environment, their models and their caches are."""

import os
import pathlib
from typing import Dict

PACKAGE = pathlib.Path(__file__).resolve().parents[3] / "python"


def engines() -> pathlib.Path:
    """The folder that ``scripts/engines`` made."""
    named = os.environ.get("KVFABRIC_ENGINES")
    if named:
        return pathlib.Path(named)
    cache = os.environ.get("CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "kvfabric")
    return pathlib.Path(cache) / "engines"


def python() -> str:
    """The interpreter that has vLLM."""
    return str(engines() / "venv" / "bin" / "python")


def environment(**more: str) -> Dict[str, str]:
    """The environment of an engine: everything it caches stays in the engines' folder, and it never
    asks the network.

    The bed itself is importable in the engine, so that tests can hand it classes that the package
    must not have.
    """
    folder = engines() / "cache"
    folder.mkdir(parents=True, exist_ok=True)
    env = dict(os.environ)
    # An engine without compiled modules takes over a minute longer to start.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    paths = [str(pathlib.Path(__file__).resolve().parents[1])]
    if env.get("PYTHONPATH"):
        paths.append(env["PYTHONPATH"])
    env.update(
        PYTHONPATH=os.pathsep.join(paths),
        PYTHONHASHSEED="0",
        VLLM_CACHE_ROOT=str(folder / "vllm"),
        VLLM_CONFIG_ROOT=str(folder / "vllm-config"),
        HF_HOME=str(folder / "huggingface"),
        XDG_CACHE_HOME=str(folder / "xdg"),
        TORCHINDUCTOR_CACHE_DIR=str(folder / "inductor"),
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        # Two engines share two cores here; pinned threads would share one of them.
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        OMP_NUM_THREADS="1",
        # Resetting an engine's prefix cache is only served in this mode.
        VLLM_SERVER_DEV_MODE="1",
    )
    env.update(more)
    return env
