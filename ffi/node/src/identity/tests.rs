//! Identities of models in folders, as files, and by name; golden vectors from a program of their own.

use std::collections::BTreeMap;
use std::fs::File;
use std::time::{Duration, SystemTime};

use serde_json::Value;
use tempfile::TempDir;

use super::*;

const GOLDEN: &str = include_str!("../../tests/golden/identities.json");

const MODEL: Model<'_> = Model {
    path: None,
    name: None,
    element: "bf16",
    quantisation: "",
    layout: "vllm/LBHNC/1",
    attributes: &[],
};

fn golden(case: &str) -> String {
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    golden[case].as_str().unwrap().to_owned()
}

fn folder() -> TempDir {
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    let files: BTreeMap<String, String> = serde_json::from_value(golden["files"].clone()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(folder.path().join(name), text).unwrap();
    }
    folder
}

fn identity(model: &Model<'_>) -> String {
    let nowhere = tempfile::tempdir().unwrap();
    to_hex(&of_model_with(model, &DigestCache::within(nowhere.path())).unwrap())
}

/// A folder with weight files among others, with and without attributes, and one file by itself.
#[test]
fn weight_files_give_the_golden_identity() {
    let folder = folder();
    for other in ["config.json", "tokenizer.json", "weights.txt"] {
        fs::write(folder.path().join(other), "x").unwrap();
    }
    fs::create_dir(folder.path().join("old.bin")).unwrap();
    let path = Some(folder.path());
    assert_eq!(identity(&Model { path, ..MODEL }), golden("folder"));
    let attributes = &[("rope", "yarn"), ("a", "b")][..];
    let model = Model {
        path,
        attributes,
        ..MODEL
    };
    assert_eq!(identity(&model), golden("folder_with_attributes"));
    let file = folder.path().join("model-1.safetensors");
    let path = Some(file.as_path());
    assert_eq!(identity(&Model { path, ..MODEL }), golden("one_file"));
}

/// A hub's cache, reached through a link as well; the name of the operator does not count beside it.
#[test]
fn a_snapshot_of_a_hub_is_named_by_its_commit() {
    let hub = tempfile::tempdir().unwrap();
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let snapshot = hub.path().join("models--org--name/snapshots").join(commit);
    fs::create_dir_all(&snapshot).unwrap();
    fs::write(snapshot.join("model.safetensors"), "x").unwrap();
    let link = hub.path().join("link");
    std::os::unix::fs::symlink(&snapshot, &link).unwrap();
    for path in [&snapshot, &link] {
        let model = Model {
            path: Some(path),
            name: Some("mine"),
            ..MODEL
        };
        assert_eq!(identity(&model), golden("snapshot"));
    }
    let fake = hub.path().join("models--org--name/snapshots/main");
    fs::create_dir_all(&fake).unwrap();
    let model = Model {
        path: Some(&fake),
        name: Some("my weights"),
        ..MODEL
    };
    assert_eq!(identity(&model), golden("named"), "no commit, no files");
}

/// A folder that tells nothing, and no folder, each with and without the operator's name.
#[test]
fn weights_that_nothing_names_are_refused() {
    let empty = tempfile::tempdir().unwrap();
    for path in [None, Some(empty.path())] {
        let name = Some("my weights");
        let named = Model {
            path,
            name,
            ..MODEL
        };
        assert_eq!(identity(&named), golden("named"));
        let error = of_model(&Model { path, ..MODEL }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains("nothing names"), "{error}");
    }
    let path = Some(Path::new("/no/such/model"));
    let error = of_model(&Model { path, ..MODEL }).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("/no/such/model"), "{error}");
}

/// Each change alone: a byte, a name, a file more, a file less.
#[test]
fn every_change_of_the_weights_changes_the_identity() {
    let change: [fn(&Path); 4] = [
        |folder| fs::write(folder.join("a.bin"), "x").unwrap(),
        |folder| fs::rename(folder.join("a.bin"), folder.join("b.bin")).unwrap(),
        |folder| fs::write(folder.join("c.gguf"), "").unwrap(),
        |folder| fs::remove_file(folder.join("a.bin")).unwrap(),
    ];
    let mut identities = vec![golden("folder")];
    for change in change {
        let folder = folder();
        change(folder.path());
        let path = Some(folder.path());
        identities.push(identity(&Model { path, ..MODEL }));
    }
    identities.sort_unstable();
    identities.dedup();
    assert_eq!(identities.len(), 5);
}

fn rewrite(file: &Path, text: &str, modified: SystemTime) {
    fs::write(file, text).unwrap();
    let file = File::options().write(true).open(file).unwrap();
    file.set_modified(modified).unwrap();
}

/// Other bytes behind the same inode, size and time: only somebody who does not read the file again misses that.
#[test]
fn a_file_is_read_once_and_again_when_its_time_changes() {
    let (models, remembered) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let cache = DigestCache::within(remembered.path().join("deep/er"));
    let file = models.path().join("model.bin");
    let path = Some(models.path());
    let of = || of_model_with(&Model { path, ..MODEL }, &cache).unwrap();
    let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    rewrite(&file, "one", old);
    let one = of();
    rewrite(&file, "two", old);
    assert_eq!(of(), one, "taken from the cache");
    rewrite(&file, "two", old + Duration::from_nanos(1));
    assert_ne!(of(), one, "read again");

    // What the cache says is checked for its form: a damaged entry is none.
    rewrite(&file, "one", old);
    for entry in fs::read_dir(remembered.path().join("deep/er")).unwrap() {
        fs::write(entry.unwrap().path(), "abc").unwrap();
    }
    assert_eq!(of(), one);
}

/// A file written just now may be written again within the same tick of the clock.
#[test]
fn a_file_that_changed_just_now_is_not_remembered() {
    let (models, remembered) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let cache = DigestCache::within(remembered.path());
    let file = models.path().join("model.bin");
    let path = Some(models.path());
    let of = || of_model_with(&Model { path, ..MODEL }, &cache).unwrap();
    let coming = SystemTime::now() + Duration::from_secs(3600);
    rewrite(&file, "one", coming);
    let one = of();
    rewrite(&file, "two", coming);
    assert_ne!(of(), one);
}
