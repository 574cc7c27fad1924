//! Snapshots as files and as hostile input.

use kvcache_core::{EngineHash, IndexKey};
use kvfabric_proto::PROTOCOL_VERSION;
use proptest::prelude::*;
use prost::Message;

use super::*;
use crate::index::{ImageBlock, ImageContent, ImageNamespace, ImageOrphan, ImagePart};

pub(super) const TOKENS_PER_BLOCK: u32 = 2;

pub(super) fn engine_image() -> ImagePiece {
    ImagePiece {
        namespaces: vec![
            ImageNamespace::default(),
            ImageNamespace {
                lora: Some("adapter".to_owned()),
                cache_salt: Some("tenant".to_owned()),
            },
        ],
        blocks: vec![
            ImageBlock {
                hash: EngineHash(1),
                key: IndexKey(11),
                follows: false,
                is_apart: false,
                namespace: Some(0),
                copies: [2, 0, 0, 0],
            },
            ImageBlock {
                hash: EngineHash(2),
                key: IndexKey(12),
                follows: true,
                is_apart: false,
                namespace: None,
                copies: [1, 1, 0, 1],
            },
            ImageBlock {
                hash: EngineHash(4),
                key: IndexKey(14),
                follows: false,
                is_apart: true,
                namespace: None,
                copies: [1, 0, 0, 0],
            },
            ImageBlock {
                hash: EngineHash(5),
                key: IndexKey(15),
                follows: true,
                is_apart: true,
                namespace: Some(1),
                copies: [1, 0, 0, 0],
            },
        ],
        orphans: vec![ImageOrphan {
            hash: EngineHash(3),
            copies: [0, 1, 0, 0],
            content: Some(ImageContent {
                parent: EngineHash(9),
                tokens: vec![7, u32::MAX],
                identifiers: vec!["image".to_owned()],
            }),
        }],
        parts: parts(),
    }
}

fn parts() -> Vec<ImagePart> {
    vec![
        ImagePart {
            hash: EngineHash(31),
            parent: None,
            namespace: 0,
            copies: [1, 0, 0, 0],
            tokens: vec![5],
            identifiers: vec![],
            key: None,
        },
        ImagePart {
            hash: EngineHash(32),
            parent: Some(EngineHash(31)),
            namespace: 0,
            copies: [0, 2, 0, 0],
            tokens: vec![],
            identifiers: vec!["image".to_owned()],
            key: Some(IndexKey(41)),
        },
    ]
}

pub(super) fn node_image() -> ImagePiece {
    ImagePiece {
        blocks: vec![ImageBlock {
            hash: EngineHash(21),
            key: IndexKey(21),
            follows: false,
            is_apart: false,
            namespace: None,
            copies: [0, 1, 1, 0],
        }],
        ..ImagePiece::default()
    }
}

pub(super) fn shared() -> Vec<(IndexKey, Tier)> {
    vec![(IndexKey(31), Tier::Object), (IndexKey(32), Tier::Object)]
}

fn piece(piece: Piece) -> v1::SnapshotPiece {
    v1::SnapshotPiece { piece: Some(piece) }
}

/// One pod with an engine and a node.
fn pieces() -> Vec<v1::SnapshotPiece> {
    let source = |name: &str, kind: v1::SourceKind| v1::Source {
        name: name.to_owned(),
        kind: kind.into(),
        endpoint: "tcp://127.0.0.1:1".to_owned(),
        replay_endpoint: "tcp://127.0.0.1:2".to_owned(),
        ..v1::Source::default()
    };
    let registration = v1::RegisterRequest {
        protocol_version: PROTOCOL_VERSION,
        pod: "pod-0".to_owned(),
        model: "m".to_owned(),
        block_size: TOKENS_PER_BLOCK,
        key_scheme: "xxh3:1337".to_owned(),
        sources: vec![
            source("engine", v1::SourceKind::Vllm),
            source("node", v1::SourceKind::Node),
        ],
        peer_address: "127.0.0.1:3".to_owned(),
        pool_for: Vec::new(),
    };
    let mark = |epoch, next| {
        let position = Position {
            epoch: Epoch(epoch),
            next: Sequence(next),
        };
        let digest = BatchDigest::of(b"batch");
        Some(Mark { position, digest })
    };
    vec![
        piece(Piece::Start(v1::SnapshotStart {
            format: FORMAT,
            key_scheme: "xxh3:1337".to_owned(),
            block_size: TOKENS_PER_BLOCK,
        })),
        piece(Piece::Pod(v1::SnapshotPod {
            registration: Some(registration),
            configured: true,
        })),
        piece(source_to_wire("engine", mark(0, 5), Some(1), &learnt())),
        piece(Piece::Image(image_to_wire(
            &engine_image(),
            wire::SourceKind::Vllm,
        ))),
        piece(source_to_wire("node", mark(7, 1), None, &Learnt::default())),
        piece(Piece::Image(image_to_wire(
            &node_image(),
            wire::SourceKind::Node,
        ))),
        piece(Piece::Shared(v1::SnapshotShared {
            model: "m".to_owned(),
            tenant: String::new(),
        })),
        piece(Piece::Image(shared_to_wire(&shared()))),
        piece(Piece::End(v1::SnapshotEnd {
            pods: 1,
            sources: 2,
            blocks: 10,
            models: 1,
        })),
    ]
}

fn learnt() -> Learnt {
    let group = |number, rule| wire::CacheGroup {
        number,
        rule,
        block_size: 2 * TOKENS_PER_BLOCK,
    };
    Learnt {
        rank: Some(3),
        groups: vec![
            group(1, wire::GroupRule::Full),
            group(2, wire::GroupRule::Window { tokens: 9 }),
        ],
        block_size: 2 * TOKENS_PER_BLOCK,
        media: vec!["CPU".to_owned(), "CXL_POOL".to_owned()],
    }
}

fn read_all(pieces: impl IntoIterator<Item = v1::SnapshotPiece>) -> Result<Vec<Step>> {
    let mut reader = Reader::default();
    pieces.into_iter().map(|piece| reader.read(piece)).collect()
}

fn read_file(path: &std::path::Path) -> Result<Vec<Step>> {
    let mut file = FileReader::open(path)?.unwrap();
    let mut reader = Reader::default();
    let mut steps = Vec::new();
    while !reader.is_complete() {
        steps.push(reader.read(file.next()?)?);
    }
    Ok(steps)
}

fn write_file(path: &std::path::Path, pieces: Vec<v1::SnapshotPiece>) {
    let written = write(path, |out| pieces.into_iter().try_for_each(out)).unwrap();
    assert_eq!(written, std::fs::metadata(path).unwrap().len());
}

/// Everything that goes in, through a file.
#[test]
fn a_snapshot_comes_back_as_it_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("snapshot");
    write_file(&path, pieces());
    let steps = read_file(&path).unwrap();
    assert!(matches!(&steps[0], Step::Start { block_size: 2, .. }));
    let Step::Pod {
        registration,
        is_configured: true,
    } = &steps[1]
    else {
        panic!("{:?}", steps[1]);
    };
    assert_eq!(registration.sources.len(), 2);
    let Step::Source {
        name,
        mark: Some(mark),
        group: Some(1),
        learnt: told,
    } = &steps[2]
    else {
        panic!("{:?}", steps[2]);
    };
    assert_eq!((name.as_str(), mark.position.next), ("engine", Sequence(5)));
    assert_eq!(mark.digest, BatchDigest::of(b"batch"));
    assert_eq!(*told, learnt());
    assert!(matches!(&steps[3], Step::Image(image) if *image == engine_image()));
    assert!(matches!(&steps[5], Step::Image(image) if *image == node_image()));
    assert!(matches!(&steps[6], Step::Shared { model, .. } if model == "m"));
    assert!(matches!(&steps[7], Step::SharedImage(image) if *image == shared()));
    assert!(matches!(&steps[8], Step::End));
}

/// The file of each format, as it was written then: `KVFABRIC_REGENERATE=1` writes the newest, once.
#[test]
fn this_format_and_those_before_are_read() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/snapshot/golden");
    let before = read_file(&folder.join("format-1.snapshot")).unwrap();
    assert_eq!(before.len(), 9);
    assert!(
        matches!(&before[2], Step::Source { learnt, .. } if *learnt == Learnt::default()),
        "nothing was told of it: {:?}",
        before[2]
    );
    assert_eq!(
        read_file(&folder.join("format-2.snapshot")).unwrap().len(),
        9
    );
    let golden = folder.join("format-3.snapshot");
    if std::env::var_os("KVFABRIC_REGENERATE").is_some() {
        write_file(&golden, pieces());
    }
    assert_eq!(read_file(&golden).unwrap().len(), 9);
    let folder = tempfile::tempdir().unwrap();
    let fresh = folder.path().join("snapshot");
    write_file(&fresh, pieces());
    let same = std::fs::read(&fresh).unwrap() == std::fs::read(&golden).unwrap();
    assert!(
        same,
        "the format has changed: give it a new number and keep this file"
    );
}

/// Every prefix of a file, and every byte of it changed.
#[test]
fn a_damaged_file_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("snapshot");
    write_file(&path, pieces());
    let whole = std::fs::read(&path).unwrap();
    for length in 0..whole.len() {
        std::fs::write(&path, &whole[..length]).unwrap();
        let error = read_file(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "cut at {length}");
        assert!(error.to_string().contains("snapshot"), "{error}");
    }
    for place in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[place] ^= 0x10;
        std::fs::write(&path, &damaged).unwrap();
        let error = read_file(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "changed at {place}");
    }
}

/// What writing fails with leaves the old file as it was.
#[test]
fn a_failed_write_keeps_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("snapshot");
    write_file(&path, pieces());
    let before = std::fs::read(&path).unwrap();
    let refusal = write(&path, |out| {
        out(pieces().remove(0))?;
        Err(Error::new(ErrorKind::Cancelled, "no more"))
    });
    assert_eq!(refusal.unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

/// Each piece left out, and each there twice.
#[test]
fn pieces_out_of_order_are_refused() {
    for place in 0..pieces().len() {
        // Without its images a snapshot counts too few blocks; without its last piece it is not complete.
        let mut fewer = pieces();
        fewer.remove(place);
        let mut reader = Reader::default();
        let read: Result<Vec<_>> = fewer.into_iter().map(|piece| reader.read(piece)).collect();
        assert!(
            read.is_err() || !reader.is_complete(),
            "without piece {place}"
        );
        let mut more = pieces();
        more.insert(place, more[place].clone());
        assert!(read_all(more).is_err(), "piece {place} twice");
    }
    assert!(read_all([v1::SnapshotPiece::default()]).is_err());
}

/// One wrong field each; the error says which.
#[test]
fn images_that_do_not_fit_together_are_refused() {
    type Break = fn(&mut v1::SnapshotImage);
    let wrongs: [(Break, &str); 8] = [
        (|image| image.keys.truncate(1), "keys"),
        (|image| image.follows.truncate(1), "follows"),
        (|image| image.copies.truncate(7), "copies"),
        (
            |image| image.namespace_positions.truncate(1),
            "namespace positions",
        ),
        (|image| image.namespace_positions[0] = 3, "namespace 3"),
        (|image| image.orphans[0].copies.push(1), "copies"),
        (
            |image| image.orphans[0].content.as_mut().unwrap().tokens = vec![1].into(),
            "1 bytes of tokens",
        ),
        (
            |image| image.namespaces[0].lora = Some("a".repeat(5000)),
            "5000",
        ),
    ];
    for (make_wrong, said) in wrongs {
        let mut image = image_to_wire(&engine_image(), wire::SourceKind::Vllm);
        make_wrong(&mut image);
        let error = image::image_from_wire(image, wire::SourceKind::Vllm, TOKENS_PER_BLOCK);
        let error = error.unwrap_err().to_string();
        assert!(error.contains(said), "{said:?} is not in {error}");
    }
    let engine = image_to_wire(&engine_image(), wire::SourceKind::Vllm);
    assert!(image::image_from_wire(engine, wire::SourceKind::Node, TOKENS_PER_BLOCK).is_err());
    let mut own = shared_to_wire(&shared());
    own.copies[Tier::Host as usize] = 1;
    let error = image::shared_from_wire(&own).unwrap_err();
    assert!(error.to_string().contains("dram"), "{error}");
    let long = v1::SnapshotImage {
        hashes: vec![0; 5000],
        ..v1::SnapshotImage::default()
    };
    let error = image::image_from_wire(long, wire::SourceKind::Node, TOKENS_PER_BLOCK).unwrap_err();
    assert!(error.to_string().contains("5000"), "{error}");
}

/// Versions to come and versions that never were.
#[test]
fn another_format_is_refused_with_both_versions_named() {
    for format in [0, FORMAT + 1] {
        let start = v1::SnapshotStart {
            format,
            ..v1::SnapshotStart::default()
        };
        let error = read_all([piece(Piece::Start(start))]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Version);
        assert!(
            error.to_string().contains(&format!("format {format}")),
            "{error}"
        );
    }
}

proptest! {
    /// Bytes that are no snapshot, and pieces with some bytes changed: an error or a step, never a panic.
    #[test]
    fn whatever_comes_is_read_or_refused(
        noise in proptest::collection::vec(any::<u8>(), 0..200),
        which in 0..9_usize,
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        if let Ok(piece) = v1::SnapshotPiece::decode(noise.as_slice()) {
            let _ = Reader::default().read(piece);
        }
        let mut bytes = pieces()[which].encode_to_vec();
        for (place, value) in changes {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        if let Ok(piece) = v1::SnapshotPiece::decode(bytes.as_slice()) {
            let mut all = pieces();
            all[which] = piece;
            let _ = read_all(all);
        }
    }

    /// A file with some bytes changed, cut out or doubled: its checksums find that out, or nothing was changed in effect.
    #[test]
    fn a_file_that_was_changed_is_found_out(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3_u8), 1..4),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("snapshot");
        write_file(&path, pieces());
        let written = std::fs::read(&path).unwrap();
        let mut bytes = written.clone();
        for (place, value, what) in changes {
            let place = place.index(bytes.len());
            match what {
                0 => bytes[place] = value,
                1 => drop(bytes.remove(place)),
                _ => bytes.insert(place, value),
            }
        }
        std::fs::write(&path, &bytes).unwrap();
        let is_whole = read_file(&path).is_ok();
        prop_assert!(!is_whole || bytes.starts_with(&written), "a change was not found");
    }
}

/// An image with blocks that are apart goes and comes back; those who do not know of them see each begin a chain; marks
/// that are none, too few or of a node are refused.
#[test]
fn blocks_that_are_apart_stay_so() {
    let block = |key, follows, is_apart| ImageBlock {
        hash: EngineHash(key),
        key: IndexKey(key),
        follows,
        is_apart,
        namespace: None,
        copies: [1, 0, 0, 0],
    };
    let piece = ImagePiece {
        blocks: vec![
            block(1, false, false),
            block(2, true, false),
            block(3, false, true),
            block(4, true, true),
        ],
        ..ImagePiece::default()
    };
    let sent = image_to_wire(&piece, wire::SourceKind::Vllm);
    assert_eq!(sent.follows, [false, true, false, false]);
    let read =
        |image: v1::SnapshotImage, kind| image::image_from_wire(image, kind, TOKENS_PER_BLOCK);
    assert_eq!(read(sent.clone(), wire::SourceKind::Vllm).unwrap(), piece);
    for apart in [vec![0, 0, 3, 0], vec![1]] {
        let image = v1::SnapshotImage {
            apart,
            ..sent.clone()
        };
        let refusal = read(image, wire::SourceKind::Vllm).unwrap_err();
        assert!(refusal.context().contains("apart"), "{refusal}");
    }
    let of_node = v1::SnapshotImage {
        apart: vec![1],
        ..image_to_wire(&node_image(), wire::SourceKind::Node)
    };
    assert!(read(of_node, wire::SourceKind::Node).is_err());
}

/// A source's media, and names of media that are too many or too long.
#[test]
fn the_media_of_a_source_come_back() {
    let source = |media: Vec<String>| {
        let learnt = Learnt { media, ..learnt() };
        let piece = source_to_wire("engine", None, None, &learnt);
        let mut pieces = pieces();
        pieces[2] = v1::SnapshotPiece { piece: Some(piece) };
        read_all(pieces.into_iter().take(3))
    };
    let media = vec!["CPU".to_owned(), "CXL_POOL".to_owned()];
    let steps = source(media.clone()).unwrap();
    assert!(matches!(&steps[2], Step::Source { learnt, .. } if learnt.media == media));
    for bad in [vec!["M".to_owned(); 65], vec!["M".repeat(5000)]] {
        let refusal = source(bad).unwrap_err();
        assert!(refusal.context().contains("media"), "{refusal}");
    }
}

/// A part in a namespace that is not there, with too few copies, too many tokens, half a token, too long an identifier.
#[test]
fn parts_that_make_no_sense_are_refused() {
    let read = |change: &dyn Fn(&mut v1::SnapshotPart)| {
        let mut image = image_to_wire(&engine_image(), wire::SourceKind::Vllm);
        change(&mut image.parts[0]);
        image::image_from_wire(image, wire::SourceKind::Vllm, TOKENS_PER_BLOCK)
    };
    assert_eq!(read(&|_| ()).unwrap(), engine_image());
    let refused: [&dyn Fn(&mut v1::SnapshotPart); 6] = [
        &|part| part.namespace_position = 0,
        &|part| part.namespace_position = 3,
        &|part| part.copies.push(1),
        &|part| part.tokens = vec![0; 12].into(),
        &|part| part.tokens = vec![0; 3].into(),
        &|part| part.identifiers = vec!["i".repeat(5000)],
    ];
    for change in refused {
        assert!(read(change).is_err());
    }
}
