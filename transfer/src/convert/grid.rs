//! Runs of bytes along three axes that lie otherwise on the other side.

use kvcache_core::shape::reshard::PageOrder;
use kvcache_core::{Error, ErrorKind, Result};

/// What all offsets, steps and lengths of a [`Grid`] are multiples of, in bytes: what a device's thread moves at once.
pub const GRID_ALIGNMENT: u64 = 16;

/// Runs of equal length, so many along each of three axes, with a step along each axis on either side: pages, heads and tokens that
/// change places, or heads that go to another rank's pages.
///
/// Runs that overlap on the target side land in no order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Bytes of a run, one head of one token as a rule.
    pub bytes: u32,
    /// Runs along each axis.
    pub counts: [u32; 3],
    /// Where the first run goes, in bytes from the start of the target.
    pub target_offset: u64,
    /// From a run to its neighbour along each axis, in the target, in bytes.
    pub target_steps: [u64; 3],
    /// Where the first run comes from, in bytes from the start of the source.
    pub source_offset: u64,
    /// From a run to its neighbour along each axis, in the source, in bytes.
    pub source_steps: [u64; 3],
}

/// One side of [`Grid::of_heads`]: a rank's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageHeads {
    /// The order of a page's bytes.
    pub order: PageOrder,
    /// Heads that the rank holds.
    pub held: u32,
    /// The first one of those that are moved.
    pub first: u32,
}

impl Grid {
    /// Heads of pages that lie side by side, each head of a token in `head_bytes`: from the one order to the other (HND, NHD), to
    /// another rank's pages, or both at once.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when one of the sides has not so many heads.
    pub fn of_heads(
        pages: u32,
        tokens: u32,
        head_bytes: u32,
        heads: u32,
        target: PageHeads,
        source: PageHeads,
    ) -> Result<Self> {
        for (side, page) in [("target", target), ("source", source)] {
            let fits = page
                .first
                .checked_add(heads)
                .is_some_and(|end| end <= page.held);
            if !fits {
                let (first, held) = (page.first, page.held);
                let text = format!("{side}: {heads} heads from {first} on, of {held}");
                return Err(Error::new(ErrorKind::Invalid, text));
            }
        }
        let run = u64::from(head_bytes);
        let side = |page: PageHeads| {
            let (token, head) = match page.order {
                PageOrder::HeadsFirst => (run, run * u64::from(tokens)),
                PageOrder::TokensFirst => (run * u64::from(page.held), run),
            };
            let bytes = run * u64::from(tokens) * u64::from(page.held);
            (head * u64::from(page.first), [bytes, token, head])
        };
        let ((target_offset, target_steps), (source_offset, source_steps)) =
            (side(target), side(source));
        Ok(Self {
            bytes: head_bytes,
            counts: [pages, tokens, heads],
            target_offset,
            target_steps,
            source_offset,
            source_steps,
        })
    }

    /// Bytes that are moved.
    #[must_use]
    pub fn moved_bytes(&self) -> u64 {
        let counts = self.counts.map(u64::from);
        counts.iter().fold(u64::from(self.bytes), |all, count| {
            all.saturating_mul(*count)
        })
    }

    /// Whether all runs lie within so many bytes on either side, and where devices can reach them.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] with what is wrong.
    pub fn check(&self, target_bytes: u64, source_bytes: u64) -> Result<()> {
        for (axis, count) in self.counts.into_iter().enumerate() {
            if count == 0 {
                return Err(Error::invalid("runs", count, 1..=u32::MAX).at(format!("axis {axis}")));
            }
        }
        let sides = [
            (
                "target",
                self.target_offset,
                self.target_steps,
                target_bytes,
            ),
            (
                "source",
                self.source_offset,
                self.source_steps,
                source_bytes,
            ),
        ];
        let length = u64::from(self.bytes);
        for (side, offset, steps, room) in sides {
            let [a, b, c] = steps;
            for number in [length, offset, a, b, c] {
                if !number.is_multiple_of(GRID_ALIGNMENT) {
                    let text = format!(
                        "a grid's {side}: {number} is no multiple of {GRID_ALIGNMENT} bytes"
                    );
                    return Err(Error::new(ErrorKind::Invalid, text));
                }
            }
            match self.end(offset, steps) {
                Some(end) if end <= room && length > 0 => {}
                end => {
                    let end = end.map_or("beyond all numbers".to_owned(), |end| end.to_string());
                    let text =
                        format!("a grid's {side}: it ends at {end}, its memory after {room} bytes");
                    return Err(Error::new(ErrorKind::Invalid, text));
                }
            }
        }
        Ok(())
    }

    /// Where the last run ends.
    fn end(&self, offset: u64, steps: [u64; 3]) -> Option<u64> {
        let mut end = offset.checked_add(u64::from(self.bytes))?;
        for (count, step) in self.counts.into_iter().zip(steps) {
            end = end.checked_add(u64::from(count.checked_sub(1)?).checked_mul(step)?)?;
        }
        Some(end)
    }

    /// Moves the runs, on the processor.
    ///
    /// # Errors
    /// As [`Grid::check`].
    pub fn apply(&self, target: &mut [u8], source: &[u8]) -> Result<()> {
        self.check(target.len() as u64, source.len() as u64)?;
        let length = self.bytes as usize;
        let place = |offset: u64, steps: [u64; 3], run: [u32; 3]| {
            let on_axis = |axis: usize| u64::from(run[axis]) * steps[axis];
            (offset + on_axis(0) + on_axis(1) + on_axis(2)) as usize
        };
        for a in 0..self.counts[0] {
            for b in 0..self.counts[1] {
                for c in 0..self.counts[2] {
                    let to = place(self.target_offset, self.target_steps, [a, b, c]);
                    let from = place(self.source_offset, self.source_steps, [a, b, c]);
                    target[to..to + length].copy_from_slice(&source[from..from + length]);
                }
            }
        }
        Ok(())
    }
}
