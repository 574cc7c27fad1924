//! What happened so far, as numbers.

macro_rules! stats {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters since the start and, where it says so, levels now.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Stats {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Stats {
            /// Every value by its name, in a fixed order.
            #[must_use]
            pub fn entries(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)*]
            }
        }
    };
}

stats! {
    /// Level: slots of DRAM that hold a block.
    host_blocks,
    /// Level: slots of DRAM that hold nothing.
    host_vacant,
    /// Level: slots of DRAM that wait for a failed transfer to drain.
    host_quarantined,
    /// Level: blocks on disk.
    disk_blocks,
    /// Level: blocks known to be in the object store.
    object_blocks,
    /// Level: stores, fetches and flushes under way.
    operations,
    /// Level: leases granted to peers, ready or being readied.
    leases,
    /// Level: pins, in force or being readied.
    pins,
    /// Level: blocks that they keep.
    pinned_blocks,
    /// Level: commands with the driver.
    commands_in_flight,
    /// Level: 1 while the disk takes no blocks because it was full or failed.
    disk_stopped,
    /// Blocks copied from engines and sealed.
    stored,
    /// Blocks offered by engines that were here already.
    already_held,
    /// Blocks for which there was no room in time.
    refused,
    /// Blocks whose copy from the engine failed.
    store_failed,
    /// Fetched blocks that came from DRAM.
    fetched_host,
    /// Fetched blocks that came from disk.
    fetched_disk,
    /// Fetched blocks that came from peers.
    fetched_peer,
    /// Fetched blocks that came from the object store.
    fetched_object,
    /// Blocks that were asked for and not found in time.
    missed,
    /// Fetched blocks whose first source failed, so that another was tried.
    replanned,
    /// Leases asked of peers.
    leases_asked,
    /// Leases that a peer granted in part or not at all.
    leases_short,
    /// Leases that peers asked of us.
    leases_granted,
    /// Leases that ended by their time.
    leases_expired,
    /// Pins that ended by their time.
    pins_expired,
    /// Pins that ended as they were asked for, because they had been let go of before.
    pins_unpinned_early,
    /// Blocks forgotten on demand.
    removed,
    /// Blocks brought up from disk for a lease or a pin.
    staged,
    /// Blocks written from DRAM to disk.
    demoted_disk,
    /// Blocks written from DRAM to the object store.
    demoted_object,
    /// Blocks written from disk to the object store before their segment was dropped.
    rescued,
    /// Blocks whose way to a lower tier failed.
    demotions_failed,
    /// Blocks dropped from DRAM that another own tier had.
    evicted_clean,
    /// Blocks dropped from DRAM that were nowhere else in this node's tiers.
    evicted_lost,
    /// Segments dropped for room.
    segments_dropped,
    /// Blocks that left the disk with a dropped segment, wherever else they were.
    disk_evicted,
    /// Of those, blocks that were nowhere else in this node's reach.
    disk_lost,
    /// Copies forgotten because their bytes were wrong or gone.
    corrupt,
    /// Moves that failed without being settled.
    unsettled,
    /// Blocks found on disk at the start.
    recovered,
    /// Requests refused because a limit was reached.
    busy,
    /// Answers that named nothing under way, or did not fit what was asked.
    stray_answers,
}
