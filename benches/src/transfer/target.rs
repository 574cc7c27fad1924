//! The other end of transfers: memory that is read and written, and, when it is told to, transfers of its own.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_transfer::{
    Agent, CudaOptions, DeviceMemory, HostMemory, Region, RegionOptions, UcxOptions, VerbsOptions,
};

use crate::clock::process_cpu;

use super::contents::{self, POISON};
use super::control::Echo;
use super::devices::OnDevice;
use super::fabric::Fabric;
use super::plan::{BackendKind, Plan, Shape, Way};
use super::protocol::{Answer, Ask, line, read_line};
use super::raw_tcp::RawMemory;
use super::remote::Contents;
use super::subject::Subject;

/// Memory of one session of a target that the one who started it talks to alone.
const OWN_BYTES_MAX: u64 = 1 << 40;

/// Serves over the standard streams until the initiator closes them.
///
/// # Errors
/// `Io` when a pipe fails.
pub(crate) fn serve() -> Result<()> {
    let home = Arc::new(Home::new(OWN_BYTES_MAX));
    let mut session = Session::new(home, IpAddr::from(Ipv4Addr::LOCALHOST));
    let mut input = std::io::stdin().lock();
    while let Some(line) = read_line(&mut input)? {
        let mut out = std::io::stdout().lock();
        session.answer_to(&line, &mut out)?;
    }
    Ok(())
}

/// What all sessions of this process share: one agent for each way of transfer, as an engine would have it.
pub(super) struct Home {
    agents: Mutex<Vec<(BackendKind, IpAddr, Agent)>>,
    bytes_max: u64,
}

impl Home {
    /// `bytes_max`: the most memory of one session.
    pub(super) fn new(bytes_max: u64) -> Self {
        Self {
            agents: Mutex::default(),
            bytes_max,
        }
    }

    fn agent(&self, backend: BackendKind, address: IpAddr) -> Result<Agent> {
        let mut agents = self.agents.lock().unwrap_or_else(PoisonError::into_inner);
        let known = agents
            .iter()
            .find(|(kind, place, _)| (*kind, *place) == (backend, address));
        if let Some((_, _, agent)) = known {
            return Ok(agent.clone());
        }
        let agent = agent("target", backend, address)?;
        agents.push((backend, address, agent.clone()));
        Ok(agent)
    }
}

/// What one who asks has asked for so far.
pub(super) struct Session {
    home: Arc<Home>,
    /// Where agents and the raw reference listen.
    address: IpAddr,
    exposed: Option<Exposed>,
    fabric: Option<Fabric>,
    echo: Option<Echo>,
}

impl Session {
    pub(super) fn new(home: Arc<Home>, address: IpAddr) -> Self {
        Self {
            home,
            address,
            exposed: None,
            fabric: None,
            echo: None,
        }
    }

    /// Does what a line asks for and writes the answer.
    ///
    /// # Errors
    /// `Io` when it cannot be written; what could not be done is an answer too.
    pub(super) fn answer_to(&mut self, text: &str, out: &mut impl Write) -> Result<()> {
        let answer = self.answer(text).unwrap_or_else(|error| Answer::Failed {
            is_corrupt: error.kind() == ErrorKind::Corrupt,
            text: error.to_string(),
        });
        out.write_all(line(&answer)?.as_bytes())
            .and_then(|()| out.flush())
            .map_err(|error| Error::io("talk to the initiator", error))
    }

    fn answer(&mut self, line: &str) -> Result<Answer> {
        let ask: Ask = serde_json::from_str(line).map_err(|error| {
            let shown: String = line.chars().take(80).collect();
            Error::new(ErrorKind::Invalid, format!("message {shown:?}")).with_source(error)
        })?;
        match ask {
            Ask::Hello { version } => {
                let own = env!("CARGO_PKG_VERSION");
                if version != own {
                    let context = format!("this target is of version {own}, not {version}");
                    return Err(Error::new(ErrorKind::Version, context));
                }
            }
            Ask::Cpu => {
                let nanoseconds = process_cpu().as_nanos() as u64;
                return Ok(Answer::Cpu { nanoseconds });
            }
            Ask::Expose { shape, is_raw } => {
                self.check_bytes(&shape)?;
                // What was there goes first: its memory may be as large.
                self.exposed = None;
                let exposed = Exposed::new(shape, is_raw, self)?;
                let answer = exposed.whereabouts(self.address)?;
                self.exposed = Some(exposed);
                return Ok(answer);
            }
            Ask::Whereabouts => return self.exposed()?.whereabouts(self.address),
            Ask::Initiate {
                shape,
                region,
                metadata,
            } => {
                self.check_bytes(&shape)?;
                self.fabric = None;
                let agent = self.home.agent(shape.backend, self.address)?;
                let plan = Plan::new(shape)?;
                self.fabric = Some(Fabric::towards(&plan, agent, region, &metadata)?);
            }
            Ask::Echo { metadata } => {
                let Memory::Region { agent, .. } = &self.exposed()?.memory else {
                    return Err(nothing());
                };
                self.echo = Some(Echo::start(agent, &metadata)?);
            }
            Ask::Move => {
                let fabric = self.fabric.as_mut().ok_or_else(nothing)?;
                let start = Instant::now();
                let bytes = fabric.move_all()?;
                let nanoseconds = start.elapsed().as_nanos() as u64;
                return Ok(Answer::Moved { bytes, nanoseconds });
            }
            Ask::Poison => match &mut self.fabric {
                Some(fabric) => fabric.poison()?,
                None => self.exposed()?.poison()?,
            },
            Ask::Verify => match &mut self.fabric {
                Some(fabric) => fabric.verify()?,
                None => self.exposed()?.verify()?,
            },
        }
        Ok(Answer::Done)
    }

    fn exposed(&self) -> Result<&Exposed> {
        self.exposed.as_ref().ok_or_else(nothing)
    }

    fn check_bytes(&self, shape: &Shape) -> Result<()> {
        let most = self.home.bytes_max;
        if shape.total_bytes > most {
            return Err(Error::invalid(
                "--total-bytes",
                shape.total_bytes,
                format_args!("at most the {most} that this target gives"),
            ));
        }
        Ok(())
    }
}

fn nothing() -> Error {
    Error::new(ErrorKind::Invalid, "nothing is exposed yet")
}

/// Memory of this process that both kinds of initiator can reach.
enum Memory {
    Region {
        region: Region,
        agent: Agent,
    },
    /// Memory of a GPU.
    Device {
        device: OnDevice,
        agent: Agent,
    },
    Raw(Arc<RawMemory>),
}

struct Exposed {
    plan: Plan,
    memory: Memory,
}

impl Exposed {
    fn new(shape: Shape, is_raw: bool, session: &Session) -> Result<Self> {
        let mut plan = Plan::new(shape)?;
        let memory = if is_raw {
            plan = plan.in_order();
            Memory::Raw(Arc::new(RawMemory::new(&plan)))
        } else {
            let agent = session.home.agent(shape.backend, session.address)?;
            let options = RegionOptions {
                remote_read: true,
                remote_write: true,
            };
            if shape.backend.is_between_gpus() {
                // The first that this process may see.
                let memory = DeviceMemory::allocate(0, shape.total_bytes)?;
                let device = OnDevice::exported(&agent, memory, options)?;
                if shape.way == Way::Read {
                    device.write(&plan, Contents::Source)?;
                }
                let memory = Memory::Device { device, agent };
                return Ok(Self { plan, memory });
            }
            // Shared memory would be mapped rather than copied by the system.
            let memory = match shape.backend {
                BackendKind::Cma => HostMemory::anonymous(shape.total_bytes)?,
                _ => HostMemory::shared(shape.total_bytes)?,
            };
            let region = agent.register(memory, options)?;
            Memory::Region { region, agent }
        };
        memory.poison()?;
        if shape.way == Way::Read {
            contents::write_source(&plan, |offset, block| memory.write(offset, block))?;
        }
        Ok(Self { plan, memory })
    }

    fn whereabouts(&self, address: IpAddr) -> Result<Answer> {
        Ok(match &self.memory {
            Memory::Region { region, agent } => Answer::Exposed {
                region: region.id().0,
                metadata: agent.metadata().to_vec(),
            },
            Memory::Device { device, agent } => Answer::Exposed {
                region: device.memory.id().0,
                metadata: agent.metadata().to_vec(),
            },
            Memory::Raw(memory) => Answer::Listening {
                port: memory.listen(address)?,
            },
        })
    }

    fn verify(&self) -> Result<()> {
        match &self.memory {
            Memory::Device { device, .. } => device.verify(&self.plan),
            memory => contents::verify(&self.plan, |offset, block| memory.read(offset, block)),
        }
    }

    fn poison(&self) -> Result<()> {
        match &self.memory {
            Memory::Device { device, .. } => device.write(&self.plan, Contents::Poison),
            memory => memory.poison(),
        }
    }
}

impl Memory {
    fn poison(&self) -> Result<()> {
        match self {
            Self::Region { region, .. } => region.fill_at(0, region.bytes(), POISON)?,
            Self::Device { .. } => return Err(of_device()),
            Self::Raw(memory) => memory.fill(POISON),
        }
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Region { region, .. } => region.write_at(offset, bytes)?,
            Self::Device { .. } => return Err(of_device()),
            Self::Raw(memory) => {
                memory.block(offset, |block| block[..bytes.len()].copy_from_slice(bytes));
            }
        }
        Ok(())
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        match self {
            Self::Region { region, .. } => region.read_at(offset, bytes)?,
            Self::Device { .. } => return Err(of_device()),
            Self::Raw(memory) => memory.block(offset, |block| bytes.copy_from_slice(block)),
        }
        Ok(())
    }
}

/// Memory of a GPU is filled and compared as a whole.
fn of_device() -> Error {
    let text = "memory of a GPU, byte by byte";
    Error::new(ErrorKind::Unsupported, text)
}

/// Peers of this machine would open each other's memory rather than go over a network card.
pub(super) fn cuda(backend: BackendKind) -> CudaOptions {
    CudaOptions {
        peers: backend == BackendKind::CudaIpc,
        ..CudaOptions::default()
    }
}

/// An agent that reaches others only by this backend, under a name that no other has.
pub(super) fn agent(role: &str, backend: BackendKind, address: IpAddr) -> Result<Agent> {
    let chance = RandomState::new().build_hasher().finish();
    Agent::builder(&format!("{role}-{chance:016x}"))
        .shm(backend == BackendKind::Shm)
        .cma(backend == BackendKind::Cma)
        .tcp((backend == BackendKind::Tcp).then_some(SocketAddr::new(address, 0)))
        .ucx((backend.way_name() == BackendKind::Ucx.name()).then(UcxOptions::default))
        .verbs((backend.way_name() == BackendKind::Verbs.name()).then(VerbsOptions::default))
        .cuda((backend.is_on_device() || backend.is_between_gpus()).then(|| cuda(backend)))
        .build()
}

#[cfg(test)]
mod tests {
    use super::super::plan::shape;
    use super::*;

    fn session() -> Session {
        Session::new(
            Arc::new(Home::new(1 << 20)),
            IpAddr::from(Ipv4Addr::LOCALHOST),
        )
    }

    fn say(session: &mut Session, ask: &Ask) -> Result<Answer> {
        session.answer(&serde_json::to_string(ask).unwrap())
    }

    /// Speaks to a target of each kind: memory that nobody wrote is wrong, as is memory with one changed byte.
    #[test]
    fn a_target_finds_its_memory_corrupted() {
        for (backend, is_raw) in [(BackendKind::Shm, false), (BackendKind::Tcp, true)] {
            let mut session = session();
            let mut shape = shape(backend, Way::Write);
            shape.threads = 3;
            say(&mut session, &Ask::Expose { shape, is_raw }).unwrap();
            let error = say(&mut session, &Ask::Verify).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
            // What a write would leave: each block at its place.
            let Exposed { plan, memory } = session.exposed.as_ref().unwrap();
            let mut block = vec![0; plan.shape.block_bytes as usize];
            for (&source, &target) in plan.sources().iter().zip(plan.targets()) {
                contents::fill(plan.shape.seed, plan.offset(source), &mut block);
                memory.write(plan.offset(target), &block).unwrap();
            }
            say(&mut session, &Ask::Verify).unwrap();
            let memory = &session.exposed.as_ref().unwrap().memory;
            memory.write(4096 * 2, b"wrong").unwrap();
            let error = say(&mut session, &Ask::Verify).unwrap_err();
            assert!(
                error
                    .to_string()
                    .contains("1 of 16 blocks are wrong, first block 2"),
                "{error}"
            );
        }
    }

    /// Messages that make no sense, come too early, or ask for too much are answered by an error.
    #[test]
    fn a_target_refuses_what_it_cannot_do() {
        let mut session = session();
        let error = session.answer("{").unwrap_err();
        assert!(error.to_string().contains("message"), "{error}");
        for early in [Ask::Poison, Ask::Verify, Ask::Move, Ask::Whereabouts] {
            let error = say(&mut session, &early).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{early:?}");
        }
        let mut shape = shape(BackendKind::Shm, Way::Write);
        shape.total_bytes = 2 << 20;
        let error = say(
            &mut session,
            &Ask::Expose {
                shape,
                is_raw: false,
            },
        )
        .unwrap_err();
        assert!(error.to_string().contains("2097152"), "{error}");
        let version = "0.0.1".to_owned();
        let error = say(&mut session, &Ask::Hello { version }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Version);
        assert!(matches!(
            say(&mut session, &Ask::Cpu),
            Ok(Answer::Cpu { nanoseconds: 1.. })
        ));
    }
}
