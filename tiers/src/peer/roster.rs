//! Which number stands for which pod, and where its peer service listens.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use kvcache_core::{Error, ErrorKind, PeerId, PodName, Result};

/// The most pods remembered; far above any cluster that shares one index.
pub(crate) const PODS_MAX: usize = 1 << 16;

/// The longest address accepted, in bytes: a DNS name and a port.
const ADDRESS_BYTES_MAX: usize = 320;

/// Pods in the order in which they were first heard of; never forgotten, so a number never changes
/// its meaning.
#[derive(Debug, Default)]
pub(crate) struct Roster {
    entries: Mutex<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    ids: BTreeMap<PodName, PeerId>,
    pods: Vec<Pod>,
}

#[derive(Debug)]
struct Pod {
    name: PodName,
    address: Option<String>,
}

impl Roster {
    /// The pod's number.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when [`PODS_MAX`] others have one.
    pub(crate) fn id(&self, pod: &PodName) -> Result<PeerId> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.id(pod)
    }

    /// Remembers where the pod's peer service listens.
    ///
    /// # Errors
    /// As [`Roster::id`]; [`ErrorKind::Invalid`] for an address that cannot be one.
    pub(crate) fn set_address(&self, pod: &PodName, address: &str) -> Result<()> {
        check_address(address).map_err(|error| error.at(format_args!("pod {pod}")))?;
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let id = entries.id(pod)?;
        let known = &mut entries.pods[id.0 as usize].address;
        if known.as_deref() != Some(address) {
            *known = Some(address.to_owned());
        }
        Ok(())
    }

    /// The pod's name.
    pub(crate) fn name(&self, id: PeerId) -> Option<PodName> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.pods.get(id.0 as usize).map(|pod| pod.name.clone())
    }

    /// Where the pod's peer service listens, if that is known.
    pub(crate) fn address(&self, id: PeerId) -> Option<String> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.pods.get(id.0 as usize)?.address.clone()
    }
}

/// Whether text can be a `host:port`.
///
/// # Errors
/// [`ErrorKind::Invalid`] with the text.
pub(crate) fn check_address(address: &str) -> Result<()> {
    let is_odd = |c: char| c.is_control() || c.is_whitespace() || c == '/';
    if address.is_empty() || address.len() > ADDRESS_BYTES_MAX || address.chars().any(is_odd) {
        let context = format!("address {address:?} is not host:port");
        return Err(Error::new(ErrorKind::Invalid, context));
    }
    Ok(())
}

impl Entries {
    fn id(&mut self, pod: &PodName) -> Result<PeerId> {
        if let Some(id) = self.ids.get(pod) {
            return Ok(*id);
        }
        if self.pods.len() >= PODS_MAX {
            let context = format!("pod {pod} is one more than the {PODS_MAX} that are known");
            return Err(Error::new(ErrorKind::Busy, context));
        }
        let id = PeerId(self.pods.len() as u32);
        self.ids.insert(pod.clone(), id);
        self.pods.push(Pod {
            name: pod.clone(),
            address: None,
        });
        Ok(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two pods, one asked about twice, one with an address that changes.
    #[test]
    fn a_pod_keeps_its_number_and_takes_its_newest_address() {
        let roster = Roster::default();
        let (a, b) = (PodName::new("a").unwrap(), PodName::new("b").unwrap());
        let id = roster.id(&a).unwrap();
        assert_ne!(roster.id(&b).unwrap(), id);
        assert_eq!(roster.id(&a).unwrap(), id);
        assert_eq!(roster.address(id), None);
        roster.set_address(&a, "10.0.0.1:7").unwrap();
        roster.set_address(&a, "10.0.0.2:7").unwrap();
        assert_eq!(roster.address(id).as_deref(), Some("10.0.0.2:7"));
        assert_eq!(roster.name(id), Some(a));
        assert_eq!(roster.name(PeerId(99)), None);
    }

    /// Nothing, a path, a space, a line end, and far too much.
    #[test]
    fn impossible_addresses_are_refused_by_name() {
        let roster = Roster::default();
        let pod = PodName::new("a").unwrap();
        for address in ["", "host:1/path", "host :1", "host:1\n", &"x".repeat(321)] {
            let error = roster.set_address(&pod, address).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains("pod a"), "{error}");
        }
    }
}
