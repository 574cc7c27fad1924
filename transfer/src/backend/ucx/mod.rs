//! UCX: whatever it finds between two agents, be it InfiniBand, RoCE, NVLink between processes, or TCP.
//!
//! Agents meet by the addresses of their UCX workers, which their metadata carries, and talk by active messages: who is
//! there, which region may be used, notifications. Bytes are read and written by remote memory access, with no word of
//! the peer's. So a deregistered region counts as used until every peer that has its key has let go of it, or is proved
//! unable to use it (`user::Proof`).

mod active;
mod channel;
mod driver;
mod frame;
mod lending;
mod moving;
mod notifying;
mod options;
mod state;
mod sums;
mod user;
mod using;

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::direct::HOST_AND_DEVICES;
use super::unix::Outcome;
use super::{Channel, Fabric, Kinds};
use crate::agent::{Exports, PeerCard};
use crate::region::RegionCore;
use crate::sys::ucx::{Library, Worker};

use channel::UcxChannel;
use driver::Driver;
pub use options::UcxOptions;
use state::State;

const NAME: &str = "ucx";

struct UcxFabric {
    driver: Arc<Driver>,
    address: Vec<u8>,
    version: &'static str,
}

/// Opens UCX for an agent.
pub(crate) fn fabric(exports: &Arc<Exports>, options: &UcxOptions) -> Result<Arc<dyn Fabric>> {
    let settings = if options::has_rdma() {
        let version = Library::get()?.version();
        options.complete(version, options::is_in_environment)
    } else {
        options.settings.clone()
    };
    let worker = Worker::open(&settings)?;
    let (address, version) = (worker.address().to_vec(), worker.version());
    let state = State::new(worker, exports.clone());
    Ok(Arc::new(UcxFabric {
        driver: Driver::start(state)?,
        address,
        version,
    }))
}

impl Fabric for UcxFabric {
    fn name(&self) -> &'static str {
        NAME
    }

    fn address(&self) -> Option<Vec<u8>> {
        Some(self.address.clone())
    }

    fn kinds(&self) -> Kinds {
        Kinds {
            local: HOST_AND_DEVICES,
            remote: HOST_AND_DEVICES,
        }
    }

    fn connect(&self, peer: &PeerCard, timeout: Duration) -> Result<Arc<dyn Channel>> {
        let Some(address) = peer.address(NAME) else {
            let text = "the peer does not offer ucx";
            return Err(Error::new(ErrorKind::Unsupported, text));
        };
        let (session, shared, call) = self
            .driver
            .with(|state| state.connect(address, peer.incarnation))?;
        let channel = UcxChannel::new(&self.driver, session, shared, timeout);
        let welcome = match call.wait(Instant::now() + timeout)? {
            (Outcome::Done, _) => Ok(()),
            (Outcome::Failed { code, text }, _) => Err(Outcome::failure(code, &text)),
            _ => Err(Error::new(
                ErrorKind::Corrupt,
                "a greeting is answered by something else",
            )),
        };
        welcome?;
        // A channel that is dropped ends its path.
        Ok(Arc::new(channel.described(self.version)?))
    }

    fn withdraw(&self, region: &Arc<RegionCore>) {
        self.driver.with(|state| state.withdraw(region));
    }

    fn close(&self) {
        self.driver.close();
    }
}

impl Drop for UcxFabric {
    fn drop(&mut self) {
        self.driver.close();
    }
}
