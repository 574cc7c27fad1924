//! What the bytes must be, so that every block can be checked after it was moved.

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_sim::seed::mix;

use super::plan::Plan;

/// What targets are filled with before the bytes come; no pattern consists of it.
pub(super) const POISON: u8 = 0xa5;

/// Writes what the source holds from `offset` on, a multiple of 8: words that depend on the seed and their place.
pub(super) fn fill(seed: u64, offset: u64, bytes: &mut [u8]) {
    for (word, out) in (offset / 8..).zip(bytes.chunks_mut(8)) {
        out.copy_from_slice(&mix(seed.wrapping_add(word)).to_le_bytes()[..out.len()]);
    }
}

/// Hands the whole source to `write`, block by block.
pub(super) fn write_source(
    plan: &Plan,
    mut write: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut block = vec![0; plan.shape.block_bytes as usize];
    for place in 0..plan.shape.blocks() {
        let offset = plan.offset(place);
        fill(plan.shape.seed, offset, &mut block);
        write(offset, &block)?;
    }
    Ok(())
}

/// Compares every block of the target, as `read` gives it, with the source's.
///
/// # Errors
/// `Corrupt` with the number of wrong blocks and the place of the first.
pub(super) fn verify(
    plan: &Plan,
    mut read: impl FnMut(u64, &mut [u8]) -> Result<()>,
) -> Result<()> {
    let size = plan.shape.block_bytes as usize;
    let (mut expected, mut found) = (vec![0; size], vec![0; size]);
    let (mut wrong, mut first) = (0_u32, None);
    for (&source, &target) in plan.sources().iter().zip(plan.targets()) {
        fill(plan.shape.seed, plan.offset(source), &mut expected);
        read(plan.offset(target), &mut found)?;
        if expected != found {
            wrong += 1;
            first = first.or(Some(target));
        }
    }
    match first {
        None => Ok(()),
        Some(place) => {
            let (name, blocks) = (plan.shape.name(), plan.shape.blocks());
            let context =
                format!("{name}: {wrong} of {blocks} blocks are wrong, first block {place}");
            Err(Error::new(ErrorKind::Corrupt, context))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan::{BackendKind, Way, shape};
    use super::*;

    fn moved(plan: &Plan) -> Vec<u8> {
        let mut source = vec![0; plan.shape.total_bytes as usize];
        write_source(plan, |offset, block| {
            source[offset as usize..][..block.len()].copy_from_slice(block);
            Ok(())
        })
        .unwrap();
        let size = plan.shape.block_bytes as usize;
        let mut target = vec![POISON; source.len()];
        for (&from, &to) in plan.sources().iter().zip(plan.targets()) {
            target[to as usize * size..][..size]
                .copy_from_slice(&source[from as usize * size..][..size]);
        }
        target
    }

    fn check(plan: &Plan, target: &[u8]) -> Result<()> {
        verify(plan, |offset, block| {
            block.copy_from_slice(&target[offset as usize..][..block.len()]);
            Ok(())
        })
    }

    /// Flips one bit of a target that was moved rightly; the error names the block that has it.
    #[test]
    fn one_wrong_bit_is_found_in_either_direction() {
        for way in [Way::Read, Way::Write] {
            let plan = Plan::new(shape(BackendKind::Shm, way)).unwrap();
            let mut target = moved(&plan);
            check(&plan, &target).unwrap();
            target[7 * 4096 + 100] ^= 1;
            let error = check(&plan, &target).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            assert!(
                error
                    .to_string()
                    .contains("1 of 16 blocks are wrong, first block 7"),
                "{error}"
            );
        }
    }

    /// A target that nothing was moved to, and one with two blocks exchanged.
    #[test]
    fn poison_and_exchanged_blocks_are_wrong() {
        let plan = Plan::new(shape(BackendKind::File, Way::Read)).unwrap();
        let mut target = vec![POISON; 64 << 10];
        let error = check(&plan, &target).unwrap_err();
        assert!(error.to_string().contains("16 of 16"), "{error}");
        target = moved(&plan);
        let (one, other) = target.split_at_mut(4096);
        one.swap_with_slice(&mut other[..4096]);
        let error = check(&plan, &target).unwrap_err();
        assert!(error.to_string().contains("2 of 16"), "{error}");
    }
}
