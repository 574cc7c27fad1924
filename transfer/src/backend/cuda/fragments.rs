//! Who copies small ranges, and how that is measured.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::options::Fragments;
use super::task::{COPIES_MAX, Way};
use super::worker::FLIGHTS_MAX;
use crate::sys::cuda::{Batch, DeviceMemory, Flight, Gpu, Kernels, Pinned, Place, Stream, Unsent};
use crate::sys::memory::HostMemory;

/// The sizes that are measured, in bytes.
const SIZES: [u64; 8] = [
    512,
    1 << 10,
    2 << 10,
    4 << 10,
    8 << 10,
    16 << 10,
    32 << 10,
    64 << 10,
];

/// Ranges of one measurement: with the largest size 8 MiB.
const RANGES: u64 = 128;
const BYTES: u64 = RANGES * SIZES[SIZES.len() - 1];

/// Has no divisor with [`RANGES`] in common: ranges go all over the memory.
const STRIDE: u64 = 37;

/// Measurements of each, of which the fastest counts.
const ROUNDS: usize = 3;

/// A copy of 8 MiB that takes longer than this never ends.
const PATIENCE: Duration = Duration::from_secs(5);

/// Places in a measurement: host memory, and the device's two halves.
const HOST: usize = 0;
const DEVICE: usize = 1;

/// Has the streams copy small ranges as the options say: those that wait for nobody, by which it is measured, and those that wait for
/// an engine's.
///
/// # Errors
/// When the kernel is asked for by a size and cannot be had.
pub(super) fn arm(
    gpu: &Arc<Gpu>,
    fragments: Fragments,
    free: &mut [Stream; 3],
    ordered: &mut [Stream; 3],
) -> Result<()> {
    let mut load = || {
        let kernels = Kernels::load(gpu)?;
        for stream in free.iter_mut().chain(ordered.iter_mut()) {
            stream.gather_by(&kernels, FLIGHTS_MAX as u64, COPIES_MAX as u64)?;
        }
        Ok(())
    };
    let limits = match fragments {
        Fragments::Copies => return Ok(()),
        Fragments::Kernel { up_to_bytes } => {
            load()?;
            [u64::from(up_to_bytes); 3]
        }
        Fragments::Measured => {
            let measured = load().and_then(|()| measure(gpu, free));
            measured.unwrap_or_else(|error| {
                let device = gpu.ordinal();
                tracing::warn!(%error, device, "the driver copies small ranges, too");
                [0; 3]
            })
        }
    };
    let [to_device, from_device, within] = limits;
    tracing::info!(
        device = gpu.ordinal(),
        to_device,
        from_device,
        within,
        "ranges of up to so many bytes are copied by a kernel"
    );
    for streams in [free, ordered] {
        for (stream, limit) in streams.iter_mut().zip(limits) {
            stream.gather_up_to(limit);
        }
    }
    Ok(())
}

/// Where measurements copy.
struct Ground {
    places: Arc<[Place]>,
    host: Arc<Pinned>,
}

impl Ground {
    fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        let host = Arc::new(Pinned::own(gpu, HostMemory::anonymous(BYTES)?)?);
        let device = Arc::new(DeviceMemory::allocate_in(gpu.clone(), 2 * BYTES)?);
        Ok(Self {
            places: [Place::Host(host.clone()), Place::Device(device)].into(),
            host,
        })
    }

    /// Ranges of this size, from all over the one side to all over the other.
    fn batch(&self, way: Way, bytes: u64) -> Result<Batch> {
        let mut batch = Batch::new(&self.places);
        for number in 0..RANGES {
            let (there, here) = (number * STRIDE % RANGES * bytes, number * bytes);
            let (to, from) = match way {
                Way::ToDevice => ((DEVICE, there), (HOST, here)),
                Way::Within => ((DEVICE, BYTES + there), (DEVICE, here)),
                Way::FromDevice => ((HOST, there), (DEVICE, BYTES + here)),
            };
            batch.copy(to, from, bytes)?;
        }
        Ok(batch)
    }

    /// How long a batch takes, from its call to its end.
    fn time(&self, stream: &mut Stream, way: Way, bytes: u64, up_to: u64) -> Result<Duration> {
        let batch = self.batch(way, bytes)?;
        stream.gather_up_to(up_to);
        let started = Instant::now();
        let (flight, failure) = stream.submit(batch).map_err(|unsent| match unsent {
            Unsent::Refused(error) | Unsent::Broken(error) => error,
        })?;
        finish(stream, flight, started)?;
        failure.map_or_else(|| Ok(started.elapsed()), Err)
    }

    /// Whether bytes that the kernel has taken to the device, within it and back are what the same way makes of them by hand. The size is
    /// odd, so that all its loops run.
    fn prove(&self, streams: &mut [Stream; 3]) -> Result<()> {
        const LEN: u64 = 5003;
        let sent: Vec<u8> = (0..RANGES * LEN)
            .map(|at| (at / LEN + at * 7) as u8)
            .collect();
        let memory = self.host.mapping()?;
        memory.write(0, &sent)?;
        for way in [Way::ToDevice, Way::Within, Way::FromDevice] {
            self.time(&mut streams[way as usize], way, LEN, LEN)?;
        }
        let mut found = vec![0; sent.len()];
        memory.read(0, &mut found)?;
        for number in 0..RANGES {
            let moved = (0..3).fold(number, |at, _| at * STRIDE % RANGES);
            let range = |at: u64| (at * LEN) as usize..((at + 1) * LEN) as usize;
            if found[range(moved)] != sent[range(number)] {
                let text = "the kernel that copies small ranges copies them wrongly";
                return Err(Error::new(ErrorKind::Corrupt, text));
            }
        }
        Ok(())
    }
}

fn finish(stream: &mut Stream, mut flight: Flight, started: Instant) -> Result<()> {
    while !stream.is_over(&mut flight)? {
        if started.elapsed() > PATIENCE {
            // Its memory stays with the flight for ever.
            let text = format!("a copy to measure devices by has not ended after {PATIENCE:?}");
            return Err(Error::new(ErrorKind::Timeout, text));
        }
        std::thread::yield_now();
    }
    Ok(())
}

/// Up to which size the kernel copies faster, in each direction.
fn measure(gpu: &Arc<Gpu>, streams: &mut [Stream; 3]) -> Result<[u64; 3]> {
    let ground = Ground::new(gpu)?;
    ground.prove(streams)?;
    let mut limits = [0; 3];
    for way in Way::ALL {
        let is_reached = ground.places.iter().all(Place::is_reached);
        if !is_reached && way != Way::Within {
            continue;
        }
        let stream = &mut streams[way as usize];
        let mut timed = Vec::with_capacity(SIZES.len());
        for bytes in SIZES {
            let mut best = |up_to| {
                let times = (0..ROUNDS).map(|_| ground.time(stream, way, bytes, up_to));
                times.collect::<Result<Vec<_>>>()
            };
            let (kernel, copies) = (best(bytes)?, best(0)?);
            let fastest = |times: &[Duration]| times.iter().min().copied().unwrap_or_default();
            timed.push((bytes, fastest(&kernel), fastest(&copies)));
        }
        limits[way as usize] = crossover(&timed);
    }
    Ok(limits)
}

/// The largest size up to which the kernel was the faster one at all sizes; 0 if at none. Of each: its time, and the copies'.
fn crossover(timed: &[(u64, Duration, Duration)]) -> u64 {
    let faster = timed
        .iter()
        .take_while(|(_, kernel, copies)| kernel < copies);
    faster.last().map_or(0, |(bytes, ..)| *bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_crossover_is_where_the_kernel_first_loses() {
        let at = |bytes, kernel, copies| {
            let micros = Duration::from_micros;
            (bytes, micros(kernel), micros(copies))
        };
        for (expected, timed) in [
            (0, vec![]),
            (0, vec![at(512, 5, 5), at(1024, 1, 9)]),
            (
                1024,
                vec![
                    at(512, 1, 9),
                    at(1024, 2, 9),
                    at(2048, 9, 9),
                    at(4096, 1, 9),
                ],
            ),
            (2048, vec![at(512, 1, 9), at(1024, 2, 9), at(2048, 3, 9)]),
        ] {
            assert_eq!(crossover(&timed), expected, "{timed:?}");
        }
    }
}
