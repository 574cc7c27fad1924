//! The other side of the conformance suite in another process, which may be on another machine: asked over a connection of its
//! own, one line each way.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_transfer::backend::conformance::{Fixture, Owned, PATIENCE, Place, Receiver};
use kvfabric_transfer::{Agent, HostMemory, MemoryKind, RegionId, RegionOptions};

use super::child::{hex, unhex};

/// How long the suite may be silent: a case that waits for something twice, on a loaded machine.
const SILENCE_MAX: Duration = PATIENCE.saturating_mul(4);

/// Answers one connection after the other, each with a new agent of the backend that its first line names.
pub(crate) fn serve(listener: &TcpListener, agent: impl Fn(&str) -> Agent) {
    for stream in listener.incoming() {
        // Whoever goes away is done, or has failed and says so.
        if let Err(error) = answer(stream.unwrap(), &agent) {
            println!("no more of this suite: {error}");
        }
    }
}

fn answer(stream: TcpStream, agent: &impl Fn(&str) -> Agent) -> std::io::Result<()> {
    stream.set_read_timeout(Some(SILENCE_MAX))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let Some(backend) = lines.next() else {
        return Ok(());
    };
    let agent = agent(&backend?);
    let mut regions = HashMap::new();
    for line in lines {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        let number = |place: usize| words[place].parse::<u64>().unwrap();
        let said = match words[0] {
            "place" => {
                let memory = HostMemory::shared(number(1)).unwrap();
                let options = RegionOptions {
                    remote_read: true,
                    remote_write: true,
                };
                let region = agent.register(memory, options).unwrap();
                let id = region.id().0;
                regions.insert(id, region);
                format!("{id} {}", hex(&agent.metadata()))
            }
            "drop" => {
                regions.remove(&number(1));
                String::new()
            }
            "read" => {
                let mut bytes = vec![0; number(3) as usize];
                regions[&number(1)].read_at(number(2), &mut bytes).unwrap();
                hex(&bytes)
            }
            "take" => {
                let taken = agent.take(Duration::from_millis(number(1))).unwrap();
                let taken: Vec<_> = taken.iter().map(|bytes| hex(bytes)).collect();
                taken.join(" ")
            }
            "turned-away" => {
                let (held_back, refused) = agent.turned_away().unwrap();
                format!("{held_back} {refused}")
            }
            other => panic!("asked for {other:?}"),
        };
        writeln!(&stream, "{said}")?;
    }
    Ok(())
}

/// The connection to it.
struct Wire(Mutex<BufReader<TcpStream>>);

impl Wire {
    fn ask(&self, line: &str) -> Result<String> {
        let failed = |error| Error::io(format!("ask the other side to {line}"), error);
        let mut stream = self.0.lock().unwrap();
        writeln!(stream.get_ref(), "{line}").map_err(failed)?;
        let mut said = String::new();
        if stream.read_line(&mut said).map_err(failed)? == 0 {
            let text = format!("the other side is gone, asked to {line}");
            return Err(Error::new(ErrorKind::PeerLost, text));
        }
        Ok(said.trim_end().to_owned())
    }
}

/// An agent here and one there.
pub(crate) struct Apart {
    backend: &'static str,
    agent: Agent,
    other: There,
}

struct There(Arc<Wire>);

impl Apart {
    /// With what [`serve`]s at `address`, which is told what to use.
    pub(crate) fn connect(backend: &'static str, told: &str, agent: Agent, address: &str) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(SILENCE_MAX)).unwrap();
        writeln!(&stream, "{told}").unwrap();
        let wire = Wire(Mutex::new(BufReader::new(stream)));
        Self {
            backend,
            agent,
            other: There(Arc::new(wire)),
        }
    }
}

impl Receiver for There {
    fn take(&self, timeout: Duration) -> Result<Vec<Bytes>> {
        let said = self.0.ask(&format!("take {}", timeout.as_millis()))?;
        let parts = said.split(' ').filter(|part| !part.is_empty());
        Ok(parts.map(|part| unhex(part).into()).collect())
    }

    fn turned_away(&self) -> Result<(u64, u64)> {
        let said = self.0.ask("turned-away")?;
        let (held_back, refused) = said.split_once(' ').unwrap();
        Ok((held_back.parse().unwrap(), refused.parse().unwrap()))
    }
}

struct Far {
    wire: Arc<Wire>,
    id: RegionId,
}

impl Owned for Far {
    fn id(&self) -> RegionId {
        self.id
    }

    fn kind(&self) -> MemoryKind {
        MemoryKind::Host
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let (id, len) = (self.id.0, bytes.len());
        let said = self.wire.ask(&format!("read {id} {offset} {len}"))?;
        bytes.copy_from_slice(&unhex(&said));
        Ok(())
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        // Nobody holds anything there when it is gone.
        let _ = self.wire.ask(&format!("drop {}", self.id.0));
    }
}

impl Fixture for Apart {
    fn backend(&self) -> &'static str {
        self.backend
    }

    fn agent(&self) -> &Agent {
        &self.agent
    }

    fn peer(&self) -> Option<&dyn Receiver> {
        Some(&self.other)
    }

    fn place(&self, bytes: u64) -> Result<Place> {
        let said = self.other.0.ask(&format!("place {bytes}"))?;
        let (id, metadata) = said.split_once(' ').unwrap();
        let owner = Far {
            wire: self.other.0.clone(),
            id: RegionId(id.parse().unwrap()),
        };
        Ok(Place {
            owner: Box::new(owner),
            peer: Some(self.agent.load_peer(&unhex(metadata))?),
        })
    }
}
