use super::*;

const KEY: BlockKey = BlockKey([7; 32]);

fn content(block_bytes: usize, layers: u32) -> Content {
    Content::new(&[1; 32], block_bytes, layers).expect("sound sizes")
}

/// Compares the first bytes of two layers with recorded ones: other machines and later versions must agree on them.
#[test]
fn contents_match_the_test_vectors() {
    let mut bytes = [0; 40];
    content(40, 2).fill(&KEY, &mut bytes);
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(
        hex,
        "c729b8ea5400a685bb27304791f8726172e266dd2585f8baaf5e83d39c990a4cb12b3f829ecd0183"
    );
}

/// Fills blocks of many sizes, odd ones too, and checks that all bytes are as they must be.
#[test]
fn a_filled_block_passes() {
    for (block_bytes, layers) in [
        (1, 1),
        (7, 7),
        (8, 1),
        (24, 3),
        (4_096, 4),
        (4_098, 6),
        (99, 3),
    ] {
        let content = content(block_bytes, layers);
        let mut bytes = vec![0; block_bytes];
        content.fill(&KEY, &mut bytes);
        assert_eq!(
            content.verify(&KEY, &bytes),
            Ok(()),
            "{block_bytes} bytes in {layers} layers"
        );
    }
}

/// Flips one bit at every place in turn; the report must name exactly that byte.
#[test]
fn the_first_wrong_byte_is_named() {
    let content = content(75, 3);
    let mut good = vec![0; 75];
    content.fill(&KEY, &mut good);
    for offset in 0..good.len() {
        let mut bad = good.clone();
        bad[offset] ^= 0x10;
        // A second wrong byte behind must not be the one that is named.
        bad[74] ^= 0x01;
        let mismatch = content.verify(&KEY, &bad).expect_err("a wrong byte");
        assert_eq!(mismatch.offset, offset);
        assert_eq!(mismatch.layer as usize, offset / 25);
        assert_eq!(
            (mismatch.expected, mismatch.found),
            (good[offset], bad[offset])
        );
    }
}

/// Fills the same block under another model, key or layer; each must look different.
#[test]
fn model_key_and_layer_all_matter() {
    let reference = content(64, 1);
    let mut bytes = [0; 64];
    reference.fill(&KEY, &mut bytes);
    let other_model = Content::new(&[2; 32], 64, 1).expect("sound sizes");
    assert!(other_model.verify(&KEY, &bytes).is_err());
    assert!(reference.verify(&BlockKey([8; 32]), &bytes).is_err());
    assert!(reference.verify_layer(&KEY, 1, &bytes).is_err());
    assert_eq!(reference.verify_layer(&KEY, 0, &bytes[..13]), Ok(()));
}

/// Asks for layers that do not divide a block, none at all, and an empty block.
#[test]
fn sizes_that_do_not_fit_are_refused() {
    for (block_bytes, layers) in [(10, 3), (10, 0), (0, 1)] {
        let error = Content::new(&[0; 32], block_bytes, layers).expect_err("bad sizes");
        assert!(
            error
                .context()
                .contains(&format!("{layers} layers is {block_bytes}")),
            "{error}"
        );
    }
}
