//! How an object store is reached.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use kvcache_core::{Error, Result};

/// The smallest part that S3 takes, the last one of an object aside.
pub(super) const PART_BYTES_MIN: u64 = 5 << 20;
/// The largest part: as much memory is taken for it.
pub(super) const PART_BYTES_MAX: u64 = 256 << 20;

/// A text that never appears in logs or errors.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Hides `text`.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    pub(super) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// The checksum that goes with each write to an S3 store, which checks it and keeps it beside the object.
///
/// The signature of a request covers its body with SHA-256 anyway, so this is for stores that check no signatures, and for
/// those who look at an object later. Reads are not checked by it: whoever needs that keeps a checksum of his own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ObjectChecksum {
    /// None, for stores that refuse it.
    Off,
    /// SHA-256, which is computed for the signature already.
    #[default]
    Sha256,
    /// CRC-64/NVME, which S3 computes by itself where nothing is given.
    Crc64Nvme,
}

/// How an object store is reached.
///
/// What is `None` here comes from the usual environment variables of each kind of store, and credentials after that from
/// the instance: `AWS_…` for `s3://`, `GOOGLE_…` for `gs://`, `AZURE_…` for `az://`.
#[derive(Clone, Debug)]
pub struct ObjectOptions {
    /// The service's URL, when it is not the provider's own.
    pub endpoint: Option<String>,
    /// S3: the region to sign for.
    pub region: Option<String>,
    /// Who we are. S3: the id of the access key; Azure: the storage account.
    pub access_key: Option<String>,
    /// Proves it. S3: the secret key; GCS: the JSON of a service account's key; Azure: the account's key.
    pub secret_key: Option<Secret>,
    /// S3: what belongs to temporary credentials; GCS and Azure: a bearer token.
    pub session_token: Option<Secret>,
    /// Accept an endpoint without TLS.
    pub allow_http: bool,
    /// PEM file of authorities whose certificates are believed, beside those that the system trusts.
    pub authorities: Option<PathBuf>,
    /// S3: what is sent with each write for the store to check.
    pub checksum: ObjectChecksum,
    /// Longer objects are written and read in parts of this size, in bytes. 5 MiB to 256 MiB.
    pub part_bytes: u64,
    /// Parts of one object at once. 1 to 64.
    pub parts_in_flight_max: usize,
    /// Requests to the store at once; more wait. 1 to 1,024.
    pub concurrency_max: usize,
    /// How long one attempt may go without an answer or a byte.
    pub attempt_timeout: Duration,
    /// How often a failed attempt of one request is repeated.
    pub retries_max: usize,
    /// No repetition is begun later than this after the first attempt, but for the time that the store asks to wait.
    pub retry_budget: Duration,
}

impl Default for ObjectOptions {
    fn default() -> Self {
        Self {
            endpoint: None,
            region: None,
            access_key: None,
            secret_key: None,
            session_token: None,
            allow_http: false,
            authorities: None,
            checksum: ObjectChecksum::default(),
            part_bytes: 16 << 20,
            parts_in_flight_max: 4,
            concurrency_max: 32,
            attempt_timeout: Duration::from_secs(10),
            retries_max: 3,
            retry_budget: Duration::from_secs(20),
        }
    }
}

impl ObjectOptions {
    pub(super) fn check(&self) -> Result<()> {
        if !(1..=1024).contains(&self.concurrency_max) {
            return Err(Error::invalid(
                "concurrency_max",
                self.concurrency_max,
                1..=1024,
            ));
        }
        if !(PART_BYTES_MIN..=PART_BYTES_MAX).contains(&self.part_bytes) {
            let range = PART_BYTES_MIN..=PART_BYTES_MAX;
            return Err(Error::invalid("part_bytes", self.part_bytes, range));
        }
        if !(1..=64).contains(&self.parts_in_flight_max) {
            return Err(Error::invalid(
                "parts_in_flight_max",
                self.parts_in_flight_max,
                1..=64,
            ));
        }
        if self.attempt_timeout.is_zero() {
            return Err(Error::invalid("attempt_timeout", 0, "more than 0 s"));
        }
        Ok(())
    }
}

/// Texts that must not be shown.
pub(super) struct Hidden(Vec<String>);

impl Hidden {
    /// What is secret in the options, and in those environment variables.
    pub(super) fn new(options: &ObjectOptions, variables: &[&str]) -> Self {
        let secrets = [&options.secret_key, &options.session_token];
        let given = secrets.into_iter().flatten().map(Secret::expose);
        let given = given.map(str::to_owned);
        let found = variables.iter().filter_map(|name| std::env::var(name).ok());
        Self(given.chain(found).filter(|text| !text.is_empty()).collect())
    }

    /// Hides one more.
    pub(super) fn add(&mut self, text: Option<&str>) {
        self.0
            .extend(text.filter(|text| !text.is_empty()).map(str::to_owned));
    }

    /// `text` without anything that is secret here.
    pub(super) fn redact(&self, text: String) -> String {
        self.0.iter().fold(text, |text, secret| {
            if text.contains(secret) {
                text.replace(secret, "(hidden)")
            } else {
                text
            }
        })
    }
}
