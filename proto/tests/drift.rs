//! The committed code is what the `.proto` files generate.

use std::fs;
use std::path::Path;

const PROTOS: [&str; 4] = [
    "kvfabric/v1/types.proto",
    "kvfabric/v1/index.proto",
    "kvfabric/v1/peer.proto",
    "indexer/v1/indexer.proto",
];
const GENERATED: [&str; 3] = ["kvfabric.v1.rs", "indexer.v1.rs", "descriptors.bin"];

/// Generates into a temporary folder and compares byte for byte.
#[test]
fn generated_code_matches_the_proto_files() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = tempfile::tempdir().unwrap();
    let descriptors = protox::compile(PROTOS, [root]).unwrap();
    fs::write(
        out.path().join("descriptors.bin"),
        prost::Message::encode_to_vec(&descriptors),
    )
    .unwrap();
    tonic_prost_build::configure()
        .bytes(".")
        .out_dir(out.path())
        .compile_fds(descriptors)
        .unwrap();
    for name in GENERATED {
        let fresh = fs::read(out.path().join(name)).unwrap();
        let committed = root.join("src/generated").join(name);
        if std::env::var_os("KVFABRIC_REGENERATE").is_some() {
            fs::write(&committed, fresh).unwrap();
        } else {
            assert!(
                fs::read(&committed).unwrap_or_default() == fresh,
                "{name} differs from the proto files: run KVFABRIC_REGENERATE=1 cargo test -p kvfabric-proto"
            );
        }
    }
}
