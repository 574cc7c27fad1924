"""NIXL's Python interface over :class:`kvfabric.Agent`: what engines call runs unmodified.

``_api`` and ``_bindings`` have the names of the modules that engines import from ``nixl``; the wheel ``kvfabric-nixl``
puts them there. The same calls give the same states, return types and exception classes, with these differences:

- Every agent may be used from any thread, whatever its ``sync_mode``. No thread polls: an idle agent uses no CPU.
- One backend, under the name that engines ask for by default, ``"UCX"``. It is kvfabric's own: shared memory and copies
  from process to process on one host, TCP between hosts. See ``BACKEND_PARAMS`` in ``_settings`` for what it takes,
  as backend parameters or from the environment.
- Host memory only. Device memory and files are refused with a reason.
- Every exception says why, after the name of the status that NIXL raises alone.
- Metadata is kvfabric's own and versioned: an agent of the real NIXL is refused by name, and the other way round.
- A transfer that is not finished after a deadline fails with ``nixlBackendError``; NIXL waits for ever.
- A lost peer is reached anew by the next transfer, without loading its metadata again, if it is still the same process.
- Releasing a transfer cancels it. As long as bytes may still land, releasing fails and the handle stays valid.
- Descriptor lists serialise to a format of their own, not to pickle.

This package does not offer the metadata server, the listener thread, partial metadata, or memory views for devices.
"""
