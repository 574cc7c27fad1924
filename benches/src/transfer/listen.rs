//! `kv-bench transfer target`: the other side of transfers, for other processes and hosts.

use std::io::{BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use clap::Args;
use kvcache_core::{Error, Result};

use crate::sizes::parse_bytes;

use super::protocol::read_line;
use super::target::{Home, Session};

/// Sessions at once; each has threads and memory.
const SESSIONS_MAX: usize = 1024;
/// A session ends when nothing was asked for so long.
const SILENCE_MAX: Duration = Duration::from_secs(600);
/// An answer that nobody takes ends the session too.
const WRITE_PATIENCE: Duration = Duration::from_secs(120);

/// Where to listen.
#[derive(Args, Clone, Debug)]
pub(crate) struct TargetArgs {
    /// The address, like 0.0.0.0:7700; port 0 takes any free one. Everybody who reaches it can let this process use its memory
    /// and network: for networks that are trusted, while something is measured.
    #[arg(long, value_name = "IP:PORT")]
    listen: SocketAddr,
    /// The most memory of one session.
    #[arg(long, value_parser = parse_bytes, default_value = "4G")]
    session_bytes: u64,
    /// End when standard input does: what started this ends it, however it ends itself.
    #[arg(long)]
    end_with_input: bool,
}

/// Listens until it is stopped; the first line on standard output says where.
///
/// # Errors
/// `Io` when it cannot listen.
pub(crate) fn listen(args: &TargetArgs) -> Result<()> {
    let failed = |error| Error::io(format!("--listen {}", args.listen), error);
    let listener = TcpListener::bind(args.listen).map_err(failed)?;
    say(listener.local_addr().map_err(failed)?);
    if args.end_with_input {
        end_with_input()?;
    }
    let home = Arc::new(Home::new(args.session_bytes));
    let open = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        // A connection that was given up before it was taken is none of ours; too many are closed at once.
        let Ok(stream) = stream else { continue };
        if open.fetch_add(1, Ordering::Relaxed) >= SESSIONS_MAX {
            open.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (home, counted) = (home.clone(), open.clone());
        let serve = move || {
            // The other end sees it close, and tells.
            let _ = serve(&stream, home);
            counted.fetch_sub(1, Ordering::Relaxed);
        };
        let started = std::thread::Builder::new()
            .name("session".to_owned())
            .spawn(serve);
        if started.is_err() {
            open.fetch_sub(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

fn end_with_input() -> Result<()> {
    let wait = || {
        // An error is an end too.
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(0);
    };
    std::thread::Builder::new()
        .name("input".to_owned())
        .spawn(wait)
        .map(drop)
        .map_err(|error| Error::io("start a thread", error))
}

fn serve(stream: &TcpStream, home: Arc<Home>) -> Result<()> {
    let failed = |error| Error::io("a session", error);
    stream.set_nodelay(true).map_err(failed)?;
    stream.set_read_timeout(Some(SILENCE_MAX)).map_err(failed)?;
    stream
        .set_write_timeout(Some(WRITE_PATIENCE))
        .map_err(failed)?;
    // Whoever asks reaches this host at this address, so that is where agents listen.
    let address = stream.local_addr().map_err(failed)?.ip();
    let mut session = Session::new(home, address);
    let mut reader = BufReader::new(stream);
    let mut writer = stream;
    while let Some(line) = read_line(&mut reader)? {
        session.answer_to(&line, &mut writer)?;
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "it is what who started this waits for")]
fn say(address: SocketAddr) {
    println!("listening on {address}");
    // Nobody may read it.
    let _ = std::io::stdout().flush();
}
