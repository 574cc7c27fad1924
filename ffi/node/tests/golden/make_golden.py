"""Computes names.json and identities.json from the encodings in the documentation of the modules
`names` and `identity`, without any of our code.

    pip install blake3 xxhash && python make_golden.py
"""

import hashlib
import json
import struct
from pathlib import Path

import xxhash
from blake3 import blake3

HERE = Path(__file__).parent
BLOCK_TOKENS = 4
SEED = 1337


def index_keys(tokens, lora="", salt=""):
    """The xxh3 chain of block keys."""
    local_seed = SEED
    for text, seed in ((lora, 0), (salt, 1)):
        if text:
            local_seed += xxhash.xxh3_64_intdigest(text.encode(), seed)
    local_seed %= 1 << 64
    keys = []
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = struct.pack(f"<{BLOCK_TOKENS}I", *tokens[start : start + BLOCK_TOKENS])
        local = xxhash.xxh3_64_intdigest(block, local_seed)
        if keys:
            local = xxhash.xxh3_64_intdigest(struct.pack("<QQ", keys[-1], local), SEED)
        keys.append(local)
    return keys


def packed(hashes, keys, start, stop, adapter=None):
    """One run of names."""
    flags = (1 if start else 0) | (2 if adapter else 0)
    out = struct.pack("<BBHI", 1, flags, len(hashes[0]), stop - start) + (adapter or b"")
    for position in range(max(start - 1, 0), stop):
        out += hashes[position] + struct.pack("<Q", keys[position])
    return out


def string(text):
    return struct.pack("<Q", len(text)) + text


def hash_key(root, digest):
    """The index key of a block without tokens."""
    return blake3(b"kvfabric/hash-key/v1\0" + string(root) + digest).digest()[:8]


def packed_hashes(root, hashes):
    """Names of blocks without tokens."""
    size = len(hashes[0]) if hashes else 0
    out = struct.pack("<BBHI", 1, 0, size, len(hashes))
    return out + b"".join(digest + hash_key(root, digest) for digest in hashes)


def key_root(identity):
    shard = struct.pack("<7I", 0, 1, 0, 1, 0, 1, 0)
    return blake3(b"kvfabric/root/v1\0" + identity + shard + b"\0").digest()


def bridged(identity, engine, algorithm, seed, digest):
    message = b"kvfabric/engine/v1\0" + key_root(identity)
    message += string(engine) + string(algorithm) + b"\1" + string(seed) + string(digest)
    return blake3(message).digest()


def make_names():
    tokens = list(range(100, 116))
    hashes = [hashlib.sha256(b"block %d" % number).digest() for number in range(4)]
    identity, adapter = b"\xab" * 32, bytes(range(32))
    adapted = blake3(
        b"kvfabric/adapter/v1\0" + identity + string(b"") + b"\2" + adapter
    ).digest()
    cases = []
    for lora, salt, start, stop, weights in (
        ("", "", 0, 4, None),
        ("", "", 2, 4, None),
        ("", "", 4, 4, None),
        ("adapter", "", 1, 3, adapter),
        ("", "tenant", 0, 1, None),
    ):
        keys = index_keys(tokens, lora, salt)
        shaped = adapted if weights else identity
        cases.append(
            {
                "lora": lora,
                "cache_salt": salt,
                "adapter": weights.hex() if weights else None,
                "start": start,
                "stop": stop,
                "packed": packed(hashes, keys, start, stop, weights).hex(),
                "data_keys": [
                    bridged(shaped, b"vllm/tagged", b"sha256_cbor", b"0", digest).hex()
                    for digest in hashes[start:stop]
                ],
                "index_keys": ["%016x" % key for key in keys[start:stop]],
            }
        )
    return {
        "tokens": tokens,
        "block_tokens": BLOCK_TOKENS,
        "hashes": [digest.hex() for digest in hashes],
        "cases": cases,
        "without_tokens": [
            {"root": root.hex(), "count": count, "packed": packed_hashes(root, hashes[:count]).hex()}
            for root, count in ((b"root", 4), (b"other root", 1), (b"", 2), (b"root", 0))
        ],
    }


def identity_of(weights, attributes=()):
    message = b"kvfabric/model/v1\0" + weights
    message += string(b"bf16") + string(b"") + string(b"vllm/LBHNC/1")
    message += struct.pack("<I", len(attributes))
    for name, value in sorted(attributes):
        message += string(name) + string(value)
    return blake3(message).hexdigest()


def make_identities():
    files = {"model-2.safetensors": "second", "model-1.safetensors": "first", "a.bin": ""}
    listing = b"".join(
        string(name.encode()) + blake3(text.encode()).digest()
        for name, text in sorted(files.items())
    )
    digest = blake3(b"kvfabric/weights/v1\0" + struct.pack("<I", len(files)) + listing).digest()
    one = blake3(b"first").digest()
    single = blake3(b"kvfabric/weights/v1\0" + struct.pack("<I", 1) + string(b"") + one).digest()
    commit = b"0123456789abcdef0123456789abcdef01234567"
    return {
        "files": files,
        "folder": identity_of(b"\2" + digest),
        "folder_with_attributes": identity_of(b"\2" + digest, [(b"rope", b"yarn"), (b"a", b"b")]),
        "one_file": identity_of(b"\2" + single),
        "snapshot": identity_of(b"\1" + string(b"org/name") + string(commit)),
        "named": identity_of(b"\3" + string(b"my weights")),
    }


for file, content in (("names.json", make_names()), ("identities.json", make_identities())):
    (HERE / file).write_text(json.dumps(content, indent=1) + "\n")
