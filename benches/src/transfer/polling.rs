//! The barest exchange of two threads that never sleep: what sockets of this machine allow at best.

use std::io::{ErrorKind as IoErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use crate::statistics::Samples;

use super::plan::BackendKind;

/// Bytes that go there and back.
const BYTES: usize = 8;
/// Exchanges before those that count.
const WARM_UP: u32 = 100;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// A socket that does not block.
trait Stream: Read + Write + Send {}

impl<T: Read + Write + Send> Stream for T {}

/// Both ends of a connection: over TCP for `tcp`, else a Unix socket.
fn ends(backend: BackendKind) -> std::io::Result<[Box<dyn Stream>; 2]> {
    if backend != BackendKind::Tcp {
        let (one, other) = UnixStream::pair()?;
        one.set_nonblocking(true)?;
        other.set_nonblocking(true)?;
        return Ok([Box::new(one), Box::new(other)]);
    }
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let one = TcpStream::connect(listener.local_addr()?)?;
    let (other, _) = listener.accept()?;
    for end in [&one, &other] {
        end.set_nodelay(true)?;
        end.set_nonblocking(true)?;
    }
    Ok([Box::new(one), Box::new(other)])
}

/// Takes a whole message, asking again and again as our own waits do. False at the end of the connection.
fn take(end: &mut dyn Stream, bytes: &mut [u8; BYTES]) -> std::io::Result<bool> {
    let (mut taken, until) = (0, Instant::now() + PATIENCE);
    while taken < BYTES {
        match end.read(&mut bytes[taken..]) {
            Ok(0) => return Ok(false),
            Ok(count) => taken += count,
            Err(error) if error.kind() == IoErrorKind::WouldBlock => {
                if Instant::now() > until {
                    return Err(IoErrorKind::TimedOut.into());
                }
                std::thread::yield_now();
            }
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

fn answer(mut end: Box<dyn Stream>) -> std::io::Result<()> {
    let mut bytes = [0; BYTES];
    while take(&mut *end, &mut bytes)? {
        end.write_all(&bytes)?;
    }
    Ok(())
}

/// How long each of `count` exchanges took.
///
/// # Errors
/// What a socket says; `Corrupt` when something else came back.
pub(super) fn round(backend: BackendKind, count: u32) -> Result<Samples> {
    let failed = |error| Error::io("the polled exchange", error);
    let [mut own, other] = ends(backend).map_err(failed)?;
    let mut samples = Samples::default();
    std::thread::scope(|scope| {
        let answering = scope.spawn(move || answer(other));
        let mut exchange = |number: u32| {
            let sent = u64::from(number).to_le_bytes();
            let mut came = [0; BYTES];
            let start = Instant::now();
            own.write_all(&sent).map_err(failed)?;
            let is_there = take(&mut *own, &mut came).map_err(failed)?;
            let took = start.elapsed();
            if !is_there || came != sent {
                let context = format!("exchange {number} brought back {came:?}");
                return Err(Error::new(ErrorKind::Corrupt, context));
            }
            if number >= WARM_UP {
                samples.push_us(took);
            }
            Ok(())
        };
        let outcome = (0..WARM_UP + count).try_for_each(&mut exchange);
        drop(own);
        let answered = answering
            .join()
            .map_err(|_| Error::new(ErrorKind::Internal, "a thread panicked"))?;
        outcome.and(answered.map_err(failed))
    })?;
    Ok(samples)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Over both kinds of sockets, each exchange is counted, and those before are not.
    #[test]
    fn exchanges_are_counted() {
        for backend in [BackendKind::Shm, BackendKind::Tcp] {
            let samples = round(backend, 50).unwrap();
            assert_eq!(samples.summary().unwrap().n, 50);
        }
    }
}
