//! CPU time, which stays meaningful on a machine that others use too.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// CPU time of all threads of this process so far, those that have ended included.
pub(crate) fn process_cpu() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    // The kernel counts upwards from 0, so neither part is negative.
    Duration::new(
        time.tv_sec.unsigned_abs(),
        time.tv_nsec.unsigned_abs() as u32,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Works until the clock has moved, then checks that it never went back.
    #[test]
    fn cpu_time_grows_with_work() {
        let start = process_cpu();
        let mut state = 1_u64;
        while process_cpu() == start {
            state = std::hint::black_box(kvfabric_sim::seed::mix(state));
        }
        assert!(process_cpu() > start);
    }
}
