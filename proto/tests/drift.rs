//! The committed code is what the `.proto` files generate.
#![cfg(test)]

use std::fs;
use std::path::Path;

use prost_types::FileDescriptorSet;

const PROTOS: [&str; 4] = [
    "kvfabric/v1/types.proto",
    "kvfabric/v1/index.proto",
    "kvfabric/v1/peer.proto",
    "indexer/v1/indexer.proto",
];
const GENERATED: [&str; 4] = [
    "kvfabric.v1.rs",
    "kvfabric.v1.encoded.rs",
    "indexer.v1.rs",
    "descriptors.bin",
];

/// The index's service, whose answers to lookups are bytes.
fn generate_encoded(mut descriptors: FileDescriptorSet, out: &Path) {
    let folder = tempfile::tempdir().unwrap();
    let mut builder = tonic_prost_build::configure()
        .build_client(false)
        .out_dir(folder.path());
    descriptors
        .file
        .retain(|file| file.package() == "kvfabric.v1");
    for file in &mut descriptors.file {
        if file.name() != "kvfabric/v1/index.proto" {
            file.service.clear();
        }
        let messages = file.message_type.iter().map(|message| message.name());
        let enums = file.enum_type.iter().map(|one| one.name());
        for name in messages.chain(enums) {
            let known = match name {
                "LookupResponse" => "crate::Encoded".to_owned(),
                // They have answers in them.
                "LookupReply" | "LookupBatchResponse" => continue,
                _ => format!("crate::v1::{name}"),
            };
            builder = builder.extern_path(format!(".kvfabric.v1.{name}"), known);
        }
    }
    builder.compile_fds(descriptors).unwrap();
    let generated = folder.path().join("kvfabric.v1.rs");
    fs::copy(generated, out.join("kvfabric.v1.encoded.rs")).unwrap();
}

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
    generate_encoded(descriptors.clone(), out.path());
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
