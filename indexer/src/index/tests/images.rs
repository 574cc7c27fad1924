//! Sources that are written down and taken up elsewhere.

use super::*;

/// A source beside another one: names of its own, two copies, two tiers, holes, waiting blocks, a salted chain. Returns it,
/// its names of the first chain, and the salted one.
fn fill_for_image(first: &KvIndex) -> (SourceId, Vec<EngineHash>, StoredBlocks) {
    let (other, id) = (
        add(first, "other", SourceKind::Vllm),
        add(first, "pod", SourceKind::Vllm),
    );
    store(first, other, chain(1, 40));
    let mut renamed = chain(1, 30);
    renamed.hashes.iter_mut().for_each(|hash| hash.0 += 1 << 50);
    let hashes = renamed.hashes.clone();
    for _ in 0..2 {
        store(first, id, renamed.clone());
    }
    store(
        first,
        id,
        StoredBlocks {
            tier: Tier::Host,
            ..renamed.clone()
        },
    );
    remove(first, id, &hashes[10..12], Tier::Device);
    remove(first, id, &hashes[20..], Tier::Host);
    let mut waiting = chain(7, 3);
    waiting.hashes.remove(0);
    waiting.tokens.drain(..BLOCK_SIZE as usize);
    waiting.parent = Some(chain(7, 1).hashes[0]);
    assert_eq!(store(first, id, waiting).orphaned, 2);
    let mut salted = chain(2, 5000);
    salted.cache_salt = Some("tenant".to_owned());
    store(first, id, salted.clone());
    (id, hashes, salted)
}

/// What a source holds, under names of its own, twice, in two tiers and waiting, is written down and taken up elsewhere;
/// then both go on alike.
#[test]
fn a_source_taken_up_elsewhere_goes_on_alike() {
    let first = index();
    let (id, hashes, salted) = fill_for_image(&first);
    let second = index();
    let add_other = add(&second, "other", SourceKind::Vllm);
    store(&second, add_other, chain(1, 40));
    let image = first.export(id).unwrap();
    let sizes = image
        .pieces
        .iter()
        .map(|piece| piece.blocks.len() + piece.orphans.len());
    assert!(sizes.clone().all(|size| size <= IMAGE_BLOCKS_MAX) && sizes.count() == 2);
    let taken = second.add_source(image.spec.clone()).unwrap();
    second.follow_group(taken, image.group).unwrap();
    for piece in &image.pieces {
        second.import(taken, piece).unwrap();
    }
    second.tidy();
    let mut again = second.export(taken).unwrap();
    let orphans = |image: &mut SourceImage| {
        image
            .pieces
            .iter_mut()
            .for_each(|piece| piece.orphans.sort_by_key(|orphan| orphan.hash));
        let blocks = image.pieces.iter_mut().flat_map(|piece| &mut piece.blocks);
        let mut blocks: Vec<_> = blocks
            .map(|block| (block.hash, block.key, block.copies))
            .collect();
        blocks.sort_unstable();
        blocks
    };
    let mut image = image;
    assert_eq!(orphans(&mut image), orphans(&mut again));
    let mut next = chain(2, 5001);
    next.hashes.drain(..5000);
    next.tokens.drain(..5000 * BLOCK_SIZE as usize);
    next.parent = salted.hashes.last().copied();
    for (index, id) in [(&first, id), (&second, taken)] {
        store(index, id, next.clone());
        remove(index, id, &hashes[..10], Tier::Device);
        store(index, id, chain(7, 1));
        assert_eq!(index.orphans(id), 0);
    }
    assert_eq!(first.entries(), second.entries());
    for (prompt, salt) in [(1, None), (2, Some("tenant")), (7, None)] {
        let (one, two) = (
            ask(&first, &tokens(prompt, 5002), None, salt),
            ask(&second, &tokens(prompt, 5002), None, salt),
        );
        assert_eq!(one.pods, two.pods);
        assert!(!one.pods.is_empty());
    }
    for (index, id) in [(&first, id), (&second, taken)] {
        index.remove_source(id);
        assert_eq!(index.entries(), 40);
    }
}

/// A piece that points outside itself, one that is too long, and a block that waits with too few tokens.
#[test]
fn a_piece_that_contradicts_itself_is_refused_whole() {
    let index = index();
    let id = add(&index, "pod", SourceKind::Vllm);
    let block = ImageBlock {
        hash: EngineHash(1),
        key: IndexKey(1),
        follows: false,
        is_apart: false,
        namespace: Some(0),
        copies: [1, 0, 0, 0],
    };
    let orphan = ImageOrphan {
        hash: EngineHash(2),
        copies: [1, 0, 0, 0],
        content: Some(ImageContent {
            parent: EngineHash(1),
            tokens: vec![1],
            identifiers: vec![],
        }),
    };
    let outside = ImagePiece {
        blocks: vec![block],
        ..ImagePiece::default()
    };
    let long = ImagePiece {
        blocks: vec![
            ImageBlock {
                namespace: None,
                ..block
            };
            IMAGE_BLOCKS_MAX + 1
        ],
        ..ImagePiece::default()
    };
    let short = ImagePiece {
        orphans: vec![orphan],
        ..ImagePiece::default()
    };
    for (piece, named) in [(outside, "namespace"), (long, "4097"), (short, "tokens")] {
        let refusal = index.import(id, &piece).unwrap_err();
        assert!(refusal.context().contains(named), "{refusal}");
        assert_eq!(index.entries(), 0);
    }
}

/// Nodes tell blocks in an order that contradicts what an engine's tokens say; the engine's blocks are found all the same.
#[test]
fn a_told_order_that_is_wrong_hides_nothing() {
    let index = index();
    let liar = add(&index, "liar", SourceKind::Node);
    let honest = add(&index, "honest", SourceKind::Vllm);
    let mut keys = Vec::new();
    index.keys_of(None, None, &tokens(1, 6), &mut keys);
    let told = |order: &[usize]| StoredBlocks {
        hashes: order.iter().map(|at| EngineHash(keys[*at].0)).collect(),
        tokens: vec![],
        block_size: 0,
        tier: Tier::Host,
        ..chain(1, 1)
    };
    store(&index, liar, told(&[4, 1, 0, 5, 2]));
    store(&index, honest, chain(1, 6));
    let answer = ask(&index, &tokens(1, 6), None, None);
    let depths: Vec<_> = answer
        .pods
        .iter()
        .map(|pod| (pod.pod.as_str(), pod.depth))
        .collect();
    assert_eq!(depths, [("honest", 6), ("liar", 3)]);
    assert_eq!((index.blocks(), index.entries()), (6, 11));
    index.remove_pod(&pod("liar"));
    assert_eq!(depth(&index, &tokens(1, 6), None, None), 6);
    index.remove_pod(&pod("honest"));
    assert_eq!((index.blocks(), index.entries()), (0, 0));
}
