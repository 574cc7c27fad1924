"""Writes kvfabric.json: index keys and data keys by their documented rules, with other implementations of the hashes.

The rules are in the documentation of kvcache_core::prefix::xxh3 and kvcache_core::prefix::data.
"""

import json
import struct

import blake3
import xxhash


def u32(value):
    return struct.pack("<I", value)


def u64(value):
    return struct.pack("<Q", value)


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return u64(len(raw)) + raw


def optional(value):
    return b"\0" if value is None else b"\1" + text(value)


# Index keys.


def xxh3(message, seed):
    return xxhash.xxh3_64_intdigest(message, seed=seed % 2**64)


def xxh3_keys(tokens, block_size, seed, model="", lora=None, salt=None, mm=()):
    local_seed = seed
    for name, term_seed in ((lora, 0), (salt, 1), (model, 2)):
        if name:
            local_seed += xxh3(name.encode(), term_seed)
    keys = []
    for start in range(0, len(tokens) // block_size * block_size, block_size):
        content = b"".join(map(u32, tokens[start : start + block_size]))
        if start == 0:
            content += b"".join(map(text, mm))
        local = xxh3(content, local_seed)
        keys.append(xxh3(u64(keys[-1]) + u64(local), seed) if keys else local)
    return keys


def xxh3_vector(first, count, block_size, seed, **names):
    tokens = range(first, first + count)
    keys = [str(key) for key in xxh3_keys(tokens, block_size, seed, **names)]
    where = {"first_token": first, "token_count": count, "block_size": block_size, "seed": seed}
    return {**where, **names, "keys": keys}


# Data keys.


def digest(domain, message):
    return blake3.blake3(b"kvfabric/" + domain + b"/v1\0" + message).digest()


def weights(source):
    if source["kind"] == "snapshot":
        return b"\1" + text(source["repository"]) + text(source["commit"])
    if source["kind"] == "digest":
        return b"\2" + bytes.fromhex(source["digest"])
    return b"\3" + text(source["name"])


def identity(model, adapter):
    message = weights(model["weights"])
    message += text(model["element"]) + text(model["quantisation"]) + text(model["layout"])
    message += u32(len(model["attributes"]))
    message += b"".join(text(name) + text(value) for name, value in sorted(model["attributes"]))
    model_identity = digest(b"model", message)
    if adapter is None:
        return model_identity
    return digest(b"adapter", model_identity + text(adapter["name"]) + weights(adapter["weights"]))


def root(model_identity, shard, salt):
    numbers = [shard["rank"], shard["size"]]
    for first, end in (shard["layers"], shard["heads"]):
        numbers += [first, end - first]
    numbers.append(shard["group"])
    return digest(b"root", model_identity + b"".join(map(u32, numbers)) + optional(salt))


def data_keys(chain_root, blocks):
    key = chain_root
    for block in blocks:
        message = key + u32(len(block["tokens"])) + b"".join(map(u32, block["tokens"]))
        message += u32(len(block["extras"]))
        for identifier, offset in block["extras"]:
            message += text(identifier) + struct.pack("<q", offset)
        key = digest(b"tokens", message)
        yield key.hex()


def bridged(chain_root, engine):
    message = chain_root + text(engine["engine"]) + text(engine["algorithm"])
    return digest(b"engine", message + optional(engine["seed"]) + text(bytes.fromhex(engine["hash"]))).hex()


WEIGHTS = [
    {"kind": "snapshot", "repository": "meta-llama/Llama-3.1-8B", "commit": "d04e592bb4f6aa9cfee91e2e20afa771667e1d4b"},
    {"kind": "digest", "digest": "ab" * 32},
    {"kind": "named", "name": "prod-2026-11"},
]
WHOLE = {"rank": 0, "size": 1, "layers": [0, 32], "heads": [0, 8], "group": 0}
PART = {"rank": 3, "size": 4, "layers": [16, 32], "heads": [6, 8], "group": 2}
ADAPTER = {"name": "adapterA", "weights": {"kind": "named", "name": "adapterA@7"}}
INPUTS = [[], [["imgA", 4], ["imgB", 14]], [["imgB", -2]]]
CASES = [
    (WEIGHTS[0], WHOLE, None, None),
    (WEIGHTS[0], WHOLE, "", None),
    (WEIGHTS[1], WHOLE, "tenant-1", None),
    (WEIGHTS[2], PART, None, None),
    (WEIGHTS[0], PART, "sél", ADAPTER),
]


def data_vector(number, source, shard, salt, adapter):
    model = {
        "weights": source,
        "element": "bf16",
        "quantisation": "" if number % 2 == 0 else "awq",
        "layout": "vllm/LBHNC/1",
        "attributes": [["rope", "llama3"], ["backend", "flash"]][: number % 3],
    }
    firsts = [0, 16, 2**32 - 16]
    inputs = INPUTS if adapter else [[], [], []]
    blocks = [
        {"tokens": list(range(first, first + 16)), "extras": extras}
        for first, extras in zip(firsts, inputs)
    ]
    engine = {
        "engine": "vllm/tagged",
        "algorithm": "sha256_cbor",
        "seed": "0" if number % 2 == 0 else None,
        "hash": f"{number:02x}" * 32,
    }
    model_identity = identity(model, adapter)
    chain_root = root(model_identity, shard, salt)
    return {
        "model": model,
        "adapter": adapter,
        "identity": model_identity.hex(),
        "shard": shard,
        "salt": salt,
        "blocks": blocks,
        "keys": list(data_keys(chain_root, blocks)),
        "engine": engine,
        "bridged": bridged(chain_root, engine),
    }


def lines(vectors):
    return "[\n" + ",\n".join("  " + json.dumps(vector, ensure_ascii=False) for vector in vectors) + "\n ]"


def main():
    xxh3_vectors = [
        xxh3_vector(0, 64, 16, 1337),
        xxh3_vector(1, 50, 16, 1337),
        xxh3_vector(100000, 300, 64, 1337),
        xxh3_vector(0, 4096, 2048, 1337),
        xxh3_vector(0, 32, 16, 0),
        xxh3_vector(0, 6, 1, 2**64 - 1),
        xxh3_vector(0, 32, 16, 1337, lora="adapterA"),
        xxh3_vector(0, 32, 16, 1337, salt="tenant-1"),
        xxh3_vector(0, 32, 16, 1337, lora="adapterA", salt="tenant-1"),
        xxh3_vector(0, 32, 16, 1337, model="m"),
        xxh3_vector(0, 32, 16, 1337, model="m", lora="", salt=""),
        xxh3_vector(0, 32, 16, 1337, mm=["imgA", "b"]),
    ]
    data_vectors = [data_vector(number, *case) for number, case in enumerate(CASES)]
    print('{\n "xxh3": ' + lines(xxh3_vectors) + ',\n "data": ' + lines(data_vectors) + "\n}")


if __name__ == "__main__":
    main()
