"""What the tests with real engines stand on: small models, servers, single-process engines,
indexes.

Nothing here is part of the package. All of it runs on the engines' own Python environment
(``scripts/engines``); the folder that holds it is named by ``KVFABRIC_ENGINES``.
"""
