//! Who moves what, as far as that follows from the kinds of places on both sides.

use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::{Agent, RemoteRegion};
use crate::backend::gds::{self, GdsBackend};
use crate::backend::{Backend, staged};
use crate::descriptor::Target;
use crate::plan::Plan;
use crate::region::{MemoryKind, RegionCore};

/// Backends that reach no peers, and are there without being asked for.
const OWN_BACKENDS: [&str; 6] = ["memcpy", "file", "object", "cuda", "gds", "staged"];

/// What no device reaches: bytes go there by way of host memory.
const BEYOND_DEVICES: [MemoryKind; 2] = [MemoryKind::File, MemoryKind::Object];

impl Agent {
    /// The backends that a request names, which must be among those that the agent has or can have.
    pub(super) fn wanted(&self, names: &[String]) -> Result<Arc<[String]>> {
        let fabrics = self.0.exports.fabrics();
        let mut known: Vec<&str> = fabrics.iter().map(|fabric| fabric.name()).collect();
        known.extend(
            OWN_BACKENDS
                .iter()
                .filter(|own| !known.contains(own))
                .copied()
                .collect::<Vec<_>>(),
        );
        match names.iter().find(|name| !known.contains(&name.as_str())) {
            Some(name) => Err(Error::invalid(
                "backend",
                format!("{name:?}"),
                known.join(", "),
            )),
            None => Ok(names.into()),
        }
    }

    /// The one engine that serves all of both sides.
    pub(super) fn own_backend(&self, plan: &Plan) -> Result<Arc<dyn Backend>> {
        // Memory of a device is moved by the device's backend, whatever is on the other side.
        let of_local = locals(&plan.local).find_map(|region| Some(region.external()?.backend()));
        let mut chosen: Option<Arc<dyn Backend>> = None;
        for region in locals(&plan.remote) {
            let usual = || of_local.as_ref().unwrap_or(&self.0.own).clone();
            let backend = region.external().map_or_else(usual, |e| e.backend());
            if !region.kind().is_among(backend.capabilities().remote) {
                let text = format!("{} does not reach {}", backend.name(), region.kind());
                return Err(Error::new(ErrorKind::Unsupported, text));
            }
            match &chosen {
                Some(other) if other.name() != backend.name() => {
                    let text = format!(
                        "one request cannot use both {} and {}",
                        other.name(),
                        backend.name()
                    );
                    return Err(Error::new(ErrorKind::Unsupported, text));
                }
                Some(_) => {}
                None => chosen = Some(backend),
            }
        }
        let chosen = chosen.unwrap_or_else(|| self.0.own.clone());
        let reaches = chosen.capabilities().remote;
        let is_beyond = |kind: &MemoryKind| kind.is_among(reaches);
        let is_device =
            |region: &Arc<RegionCore>| region.kind().is_among(&[MemoryKind::ANY_DEVICE]);
        if BEYOND_DEVICES.iter().any(is_beyond) && locals(&plan.local).any(is_device) {
            return self.beyond_devices(plan);
        }
        match unmoved(&plan.local, chosen.capabilities().local) {
            None => Ok(chosen),
            Some(reason) => Err(Error::new(
                ErrorKind::Unsupported,
                format!("{} {reason}", chosen.name()),
            )),
        }
    }

    /// Who moves bytes between devices and files or objects: the devices' drives themselves, where that is asked for and goes; or host
    /// memory is between.
    fn beyond_devices(&self, plan: &Plan) -> Result<Arc<dyn Backend>> {
        let refused = match GdsBackend::of(self.core()) {
            Ok(gds) => match gds.declines(plan) {
                None => return Ok(gds),
                Some(reason) => Error::new(ErrorKind::Unsupported, format!("gds: {reason}")),
            },
            Err(error) => error,
        };
        match plan.wants(gds::NAME) && !plan.wants(staged::NAME) {
            true => Err(refused),
            false => Ok(self.staged_backend()?),
        }
    }

    /// # Errors
    /// [`ErrorKind::Unsupported`] with what each way says, when none of them moves what is on both sides, as it is wanted.
    pub(super) fn check_moved_to_peers(&self, plan: &Plan) -> Result<()> {
        let mut reasons = Vec::new();
        for fabric in self.0.exports.fabrics() {
            let kinds = fabric.kinds();
            let is_checked = plan.is_checked() || plan.sums;
            let unchecked = || fabric.unchecked().filter(|_| is_checked);
            let reason = unmoved(&plan.local, kinds.local)
                .or_else(|| unreached(plan, kinds.remote))
                .or_else(|| unchecked().map(str::to_owned));
            match reason {
                None => return Ok(()),
                Some(reason) => reasons.push(format!("{}: {reason}", fabric.name())),
            }
        }
        if reasons.is_empty() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Unsupported, reasons.join("; ")))
    }
}

/// # Errors
/// [`ErrorKind::Unsupported`] for a file or an object: those are for the remote side.
pub(super) fn check_local(targets: &[Target]) -> Result<()> {
    const SIDE: [MemoryKind; 2] = [MemoryKind::Host, MemoryKind::ANY_DEVICE];
    match locals(targets).find(|region| !region.kind().is_among(&SIDE)) {
        None => Ok(()),
        Some(region) => {
            let (id, kind) = (region.id(), region.kind());
            let text = format!("region {id} on the local side is no memory but {kind}");
            Err(Error::new(ErrorKind::Unsupported, text))
        }
    }
}

/// # Errors
/// [`ErrorKind::Unsupported`] with the reason, when the backend does not do what the plan asks for.
pub(super) fn check_backend(backend: &dyn Backend, plan: &Plan) -> Result<()> {
    match backend.refusal(plan) {
        Some(reason) => {
            let text = format!("{}: {reason}", backend.name());
            Err(Error::new(ErrorKind::Unsupported, text))
        }
        None => Ok(()),
    }
}

fn locals(targets: &[Target]) -> impl Iterator<Item = &Arc<RegionCore>> {
    targets.iter().filter_map(|target| match target {
        Target::Local(region) => Some(region),
        Target::Remote(_) => None,
    })
}

/// What a backend that moves these kinds says of a local side that has another one; none if it has not.
pub(super) fn unmoved(local: &[Target], kinds: &[MemoryKind]) -> Option<String> {
    let other = locals(local).find(|region| !region.kind().is_among(kinds))?;
    let (id, kind) = (other.id(), other.kind());
    Some(format!("does not move {kind} (region {id})"))
}

/// What a way that reaches these kinds says of a peer's region of another one; none if it is one of them.
pub(super) fn not_reached(region: &RemoteRegion, kinds: &[MemoryKind]) -> Option<String> {
    let (id, kind) = (region.id, region.kind);
    (!kind.is_among(kinds)).then(|| format!("does not reach a peer's {kind} (region {id})"))
}

/// As [`not_reached`], of all of a plan's remote side.
fn unreached(plan: &Plan, kinds: &[MemoryKind]) -> Option<String> {
    plan.remote.iter().find_map(|target| match target {
        Target::Local(_) => None,
        Target::Remote(region) => not_reached(region, kinds),
    })
}
