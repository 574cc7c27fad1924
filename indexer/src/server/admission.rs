//! Which registrations fit the index.

use std::collections::BTreeSet;

use kvcache_core::{Error, ErrorKind, Result};

use super::hub::Hub;
use crate::wire::{Registration, SOURCES_PER_POD_MAX, SourceKind};
use crate::zmtp::Endpoint;

/// The longest model name, source name or endpoint accepted, in bytes.
const TEXT_BYTES_MAX: usize = 1024;

/// The most beginnings of names that say who may use a pool.
const POOL_BEGINNINGS_MAX: usize = 4096;

impl Hub {
    /// # Errors
    /// `Invalid` naming the pod, the value and what the index has or takes.
    pub(super) fn check(&self, registration: &Registration) -> Result<()> {
        let refuse = |what: String| {
            let context = format!("registration of pod {}: {what}", registration.pod);
            Err(Error::new(ErrorKind::Invalid, context))
        };
        let tenant = self.tenants.of_pod(&registration.pod, &registration.model);
        self.tenants
            .check(tenant, &format!("pod {}", registration.pod))?;
        let ours = self.scheme_name();
        if registration.key_scheme != ours {
            return refuse(format!(
                "key scheme {:?}, the index has {ours:?}",
                registration.key_scheme
            ));
        }
        let (theirs, ours) = (registration.block_size, self.config.block_size);
        if theirs == 0 || !theirs.is_multiple_of(ours) && !ours.is_multiple_of(theirs) {
            return refuse(format!(
                "blocks of {theirs} tokens, the index has {ours} and takes multiples and divisors of that"
            ));
        }
        let count = registration.sources.len();
        if !(1..=SOURCES_PER_POD_MAX).contains(&count) {
            return refuse(format!(
                "{count} sources, expected 1 to {SOURCES_PER_POD_MAX}"
            ));
        }
        let mut names = BTreeSet::new();
        for source in &registration.sources {
            if source.name.is_empty() || source.name.contains('/') {
                return refuse(format!(
                    "source name {:?} is empty or has a '/'",
                    source.name
                ));
            }
            if !names.insert(&source.name) {
                return refuse(format!("source {:?} is there twice", source.name));
            }
            if source.kind == SourceKind::Approximate {
                if count > 1 {
                    return refuse(format!(
                        "source {:?} is approximate, beside others that publish",
                        source.name
                    ));
                }
                continue;
            }
            for endpoint in std::iter::once(&source.endpoint).chain(&source.replay_endpoint) {
                if let Err(error) = endpoint.parse::<Endpoint>() {
                    return refuse(error.to_string());
                }
            }
        }
        check_texts(registration).or_else(refuse)
    }
}

/// Whether names are of a length, and a pool says for whom it is; else what is wrong.
fn check_texts(registration: &Registration) -> Result<(), String> {
    let pool_for = &registration.pool_for;
    if pool_for.len() > POOL_BEGINNINGS_MAX || pool_for.iter().any(String::is_empty) {
        let count = pool_for.len();
        return Err(format!(
            "pool_for has an empty text, or {count}: more than {POOL_BEGINNINGS_MAX}"
        ));
    }
    let texts = registration.sources.iter().map(|source| &source.name);
    let texts = texts
        .chain([&registration.model])
        .chain(&registration.peer_address)
        .chain(pool_for);
    match texts.map(String::len).max() {
        Some(longest) if longest > TEXT_BYTES_MAX => Err(format!(
            "a name of {longest} bytes, at most {TEXT_BYTES_MAX} are taken"
        )),
        _ => Ok(()),
    }
}
