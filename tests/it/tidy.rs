//! What lints cannot see.

use std::fs;
use std::path::{Path, PathBuf};

/// Longer files lose their reader; generated code and tests are exempt.
const LINES_MAX: usize = 500;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

/// Every file with this extension, in a stable order; build output and hidden folders are left out.
pub(crate) fn files_below(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                if !name.starts_with('.') && name != "target" && name != "node_modules" {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|e| e == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn is_generated(path: &Path) -> bool {
    path.components()
        .any(|part| part.as_os_str() == "generated")
}

fn is_test(path: &Path) -> bool {
    path.ends_with("tests.rs") || path.components().any(|part| part.as_os_str() == "tests")
}

fn complain(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

/// Counts lines up to an inline test module.
#[test]
fn files_fit_in_the_head() {
    let mut long = Vec::new();
    for extension in ["rs", "py", "c", "h"] {
        for path in files_below(&root(), extension) {
            if is_generated(&path) || is_test(&path) || path.ends_with("include/kvfabric.h") {
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            let lines = text
                .lines()
                .take_while(|line| line.trim() != "#[cfg(test)]")
                .count();
            if lines > LINES_MAX {
                long.push(format!("{}: {lines} lines", path.display()));
            }
        }
    }
    complain(&long);
}

/// `unsafe` stands only where unsafe-modules.txt lists it.
#[test]
fn unsafe_code_stands_only_where_it_is_listed() {
    let list = fs::read_to_string(root().join("unsafe-modules.txt")).unwrap();
    let allowed: Vec<&str> = list
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .collect();
    for path in &allowed {
        assert!(
            root().join(path).exists(),
            "unsafe-modules.txt names {path}, which is not there"
        );
    }
    let mut found = Vec::new();
    for path in files_below(&root(), "rs") {
        let relative = path
            .strip_prefix(root())
            .unwrap()
            .to_string_lossy()
            .into_owned();
        if is_generated(&path) || allowed.iter().any(|prefix| relative.starts_with(prefix)) {
            continue;
        }
        for (number, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let mentions = ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"];
            if mentions.iter().any(|m| code.contains(m)) && !code.contains('"') {
                found.push(format!("{relative}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    complain(&found);
}

/// Marks of unfinished work, ignored tests and drawers for everything.
#[test]
fn nothing_is_left_half_done() {
    let marks = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("XX", "X"),
        concat!("#[ig", "nore"),
        concat!("unimple", "mented!("),
        concat!("to", "do!("),
    ];
    let mut found = Vec::new();
    for extension in ["rs", "py", "c", "h", "sh", "toml", "proto", "md"] {
        for path in files_below(&root(), extension) {
            if is_generated(&path) {
                continue;
            }
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            if ["utils", "util", "common", "helpers", "misc", "v2"].contains(&&*name) {
                found.push(format!("{}: a name that says nothing", path.display()));
            }
            for (number, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
                for mark in marks {
                    if line.contains(mark) {
                        found.push(format!("{}:{}: {mark}", path.display(), number + 1));
                    }
                }
            }
        }
    }
    complain(&found);
}

/// Each library says what it is not for, so that readers know where to look instead.
#[test]
fn each_library_says_what_it_does_not_do() {
    let silent: Vec<String> = [
        "kvcache-core",
        "proto",
        "transfer",
        "tiers",
        "indexer",
        "ffi/node",
        "ffi/c",
        "ffi/python",
        "sim",
    ]
    .iter()
    .map(|folder| root().join(folder).join("src/lib.rs"))
    .filter(|path| {
        !fs::read_to_string(path)
            .unwrap()
            .contains("//! This crate does not")
    })
    .map(|path| path.display().to_string())
    .collect();
    complain(&silent);
}

/// Relative links in the documentation lead to files that exist.
#[test]
fn links_in_the_documentation_lead_somewhere() {
    let mut broken = Vec::new();
    for path in files_below(&root(), "md") {
        let text = fs::read_to_string(&path).unwrap();
        for piece in text.split("](").skip(1) {
            let target = piece.split([')', '#']).next().unwrap_or_default();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            if !path.parent().unwrap().join(target).exists() {
                broken.push(format!("{}: {target}", path.display()));
            }
        }
    }
    complain(&broken);
}

/// Every dependency of a package is used by it: a name in Cargo.toml that no source file mentions is dead weight.
#[test]
fn every_dependency_is_used() {
    // Linked for their features or initialisation alone; each line says why.
    const SILENT: [(&str, &str); 5] = [
        // Generated code names them.
        ("kvfabric-proto", "prost-types"),
        // Named by the indexer's files, which this package builds too.
        ("kvfabric-index-schedules", "bytemuck"),
        ("kvfabric-index-schedules", "memmap2"),
        // The same of the fabric's.
        ("kvfabric-transfer-orders", "rustix"),
        ("kvfabric-transfer-orders", "tracing"),
    ];
    let metadata = cargo_metadata::MetadataCommand::new()
        .manifest_path(root().join("Cargo.toml"))
        .no_deps()
        .exec()
        .unwrap();
    let mut unused = Vec::new();
    for package in &metadata.packages {
        let folder = package.manifest_path.parent().unwrap();
        let text: String = files_below(folder.as_std_path(), "rs")
            .iter()
            .map(|path| fs::read_to_string(path).unwrap())
            .collect();
        for dependency in &package.dependencies {
            let name = dependency.rename.as_ref().unwrap_or(&dependency.name);
            let ident = name.replace('-', "_");
            if !mentions(&text, &ident) && !SILENT.contains(&(package.name.as_str(), name.as_str()))
            {
                unused.push(format!("{}: {name}", package.name));
            }
        }
    }
    complain(&unused);
}

/// Whether `ident` is the first part of some path in the text: `ident::`, not preceded by a longer name.
fn mentions(text: &str, ident: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    let path = format!("{ident}::");
    let imported = [format!("use {ident};"), format!("use {ident} as ")];
    text.match_indices(&path)
        .any(|(at, _)| !text[..at].ends_with(is_part))
        || imported.iter().any(|form| text.contains(form))
}
