//! The committed header is what the sources say.

use std::path::Path;

/// Generates the header and compares; `KVFABRIC_REGENERATE=1` writes it instead.
#[test]
fn the_committed_header_matches_the_sources() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    let builder = cbindgen::Builder::new().with_config(config);
    // In the order in which a reader wants them.
    let sources = [
        "status",
        "stream",
        "agent_options",
        "agent",
        "region",
        "place",
        "device",
        "range",
        "peer",
        "list",
        "transfer",
        "estimate",
        "progress",
        "node",
        "names",
        "prefix",
        "pages",
        "blocks",
        "hbm",
        "task",
        "reports",
        "upkeep",
        "service",
        "events",
        "publisher",
        "index",
    ];
    let builder = sources.iter().fold(builder, |builder, source| {
        builder.with_src(root.join("src").join(source).with_extension("rs"))
    });
    let mut generated = Vec::new();
    builder.generate().unwrap().write(&mut generated);
    let generated = String::from_utf8(generated).unwrap();
    let path = root.join("include/kvfabric.h");
    if std::env::var_os("KVFABRIC_REGENERATE").is_some() {
        std::fs::write(&path, &generated).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap();
    assert!(
        committed == generated,
        "{} differs from the sources; write it with: KVFABRIC_REGENERATE=1 cargo test -p kvfabric-c --test header",
        path.display()
    );
}
