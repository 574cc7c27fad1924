//! Pages that are taken from the kernel before anybody needs them: from which memory node, and by how many threads.

use std::sync::atomic::{AtomicU64, Ordering};

use kvcache_core::{Error, ErrorKind, Result};

use super::{Mapping, Ownership};

/// The most memory nodes that a kernel can have (`CONFIG_NODES_SHIFT` of 10).
const NODES_MAX: usize = 1024;

/// What a thread takes from the kernel at a time, and the most threads that do.
const POPULATE_STEP_BYTES: u64 = 64 << 20;
const POPULATE_THREADS_MAX: usize = 8;

impl Mapping {
    /// Has the kernel take pages that nobody has touched yet from this memory node, while there are some.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a number that no node can have, [`ErrorKind::Unsupported`] for memory of someone else's;
    /// otherwise what the kernel says, such as that it knows of no nodes.
    pub(crate) fn prefer_node(&self, node: u32) -> Result<()> {
        if self.ownership == Ownership::Lent {
            let text = "memory of someone else's is theirs to place";
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        let mut mask = [0_u64; NODES_MAX / 64];
        match mask.get_mut(node as usize / 64) {
            Some(word) => *word = 1 << (node % 64),
            None => return Err(Error::invalid("memory node", node, 0..NODES_MAX)),
        }
        // SAFETY: the range is this mapping, which begins at a page; the mask has as many bits as are told, and the kernel
        // takes one off that number. No byte changes, and no page moves.
        let placed = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.base.as_ptr(),
                self.len,
                libc::MPOL_PREFERRED as usize,
                mask.as_ptr(),
                NODES_MAX + 1,
                0_usize,
            )
        };
        if placed == 0 {
            return Ok(());
        }
        let error = std::io::Error::last_os_error();
        Err(Error::io(format!("place memory on node {node}"), error))
    }

    /// Takes all pages from the kernel now, as [`Mapping::populate`] does, by several threads: each page is zeroed by whoever
    /// takes it, and one thread does not reach what memory gives.
    pub(crate) fn populate_all(&self) -> Result<()> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let steps = self.len().div_ceil(POPULATE_STEP_BYTES);
        let next = AtomicU64::new(0);
        let work = || -> Result<()> {
            loop {
                let step = next.fetch_add(1, Ordering::Relaxed);
                if step >= steps {
                    return Ok(());
                }
                let offset = step * POPULATE_STEP_BYTES;
                self.populate(offset, POPULATE_STEP_BYTES.min(self.len() - offset))?;
            }
        };
        let others = threads.min(POPULATE_THREADS_MAX).min(steps as usize) - 1;
        std::thread::scope(|scope| {
            let others: Vec<_> = (0..others)
                .filter_map(|_| {
                    let named = std::thread::Builder::new().name("first touch".to_owned());
                    named.spawn_scoped(scope, work).ok()
                })
                .collect();
            let own = work();
            let ended = others.into_iter().map(|other| {
                let gone = |_| {
                    Err(Error::new(
                        ErrorKind::Internal,
                        "a thread that touches memory",
                    ))
                };
                other.join().unwrap_or_else(gone)
            });
            // All of them have to end before anything is told.
            ended.fold(own, |first, other| first.and(other))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs::read_to_string;

    use super::*;

    impl Mapping {
        /// Bytes of pages that are there.
        pub(crate) fn resident_bytes(&self) -> u64 {
            const PAGE_BYTES: u64 = 4096;
            let mut pages = vec![0_u8; self.len().div_ceil(PAGE_BYTES) as usize];
            // SAFETY: the range is this mapping, and there is a byte for each of its pages, which have 4 KiB at least.
            let told =
                unsafe { libc::mincore(self.base.as_ptr().cast(), self.len, pages.as_mut_ptr()) };
            assert_eq!(told, 0);
            let there = pages.iter().filter(|page| **page & 1 == 1).count();
            there as u64 * PAGE_BYTES
        }
    }

    /// All of it, the last step too, which is shorter; and what it held stays.
    #[test]
    fn all_pages_are_taken_and_their_content_stays() {
        let len = 2 * POPULATE_STEP_BYTES + (5 << 20);
        let mapping = Mapping::anonymous(len).unwrap();
        mapping.fill(len - 100, 100, 7).unwrap();
        assert!(mapping.resident_bytes() < len / 2);
        mapping.populate_all().unwrap();
        assert_eq!(mapping.resident_bytes(), len);
        let mut bytes = [0; 101];
        mapping.read(len - 101, &mut bytes).unwrap();
        assert_eq!((bytes[0], &bytes[1..]), (0, &[7; 100][..]));
    }

    #[test]
    fn pages_come_from_the_node_that_is_preferred() {
        let mapping = Mapping::anonymous(1 << 20).unwrap();
        match mapping.prefer_node(0) {
            Ok(()) => {}
            // A kernel without memory nodes.
            Err(error) if read_to_string("/proc/self/numa_maps").is_err() => {
                eprintln!("SKIPPED: {error}");
                return;
            }
            Err(error) => panic!("{error}"),
        }
        mapping.populate_all().unwrap();
        let start = format!("{:x} prefer", mapping.address());
        let told = read_to_string("/proc/self/numa_maps").unwrap();
        assert!(told.lines().any(|line| line.starts_with(&start)), "{told}");
        let error = mapping.prefer_node(1024).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains("memory node"), "{error}");
        // One that no machine of ours has.
        let error = mapping.prefer_node(1023).unwrap_err();
        assert!(error.to_string().contains("node 1023"), "{error}");
    }

    #[test]
    fn memory_of_others_is_neither_placed_nor_taken() {
        let owner = Mapping::anonymous(1 << 20).unwrap();
        // SAFETY: the owner's memory, which outlives what is lent.
        let lent = unsafe { Mapping::lent(owner.base().as_ptr(), owner.len()) }.unwrap();
        for refused in [lent.prefer_node(0), lent.populate_all()] {
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::Unsupported);
        }
    }
}
