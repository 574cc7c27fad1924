"""Engines that must not start with the connector; the reason is in their log."""

import shutil

from bed.server import Engine


def test_an_engine_whose_weights_nothing_identifies_does_not_start(tiny_model, logs, tmp_path):
    """A model folder without weights, which the engine makes up: other engines' need not be the
    same, so their blocks would be wrong here.
    """
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = {
        "kv_connector": "KvFabricConnector",
        "kv_connector_module_path": "kvfabric.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"host": {"bytes": 32 << 20}},
    }
    arguments = ["--load-format", "dummy"]
    engine = Engine(model, logs, "no-weights", kv_transfer=settings, arguments=arguments)
    assert f"weights: nothing identifies the weights of '{model}'" in engine.refused()
