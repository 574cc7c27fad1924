//! How an object store is reached.

use std::fmt;
use std::time::Duration;

use kvcache_core::{Error, Result};

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

/// How an object store is reached.
///
/// For S3, what is `None` here comes from the usual environment variables (`AWS_ENDPOINT_URL`, `AWS_REGION`,
/// `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`), and credentials after that from the instance.
#[derive(Clone, Debug)]
pub struct ObjectOptions {
    /// The service's URL, when it is not Amazon's.
    pub endpoint: Option<String>,
    /// The region to sign for.
    pub region: Option<String>,
    /// Who we are.
    pub access_key: Option<String>,
    /// Proves it.
    pub secret_key: Option<Secret>,
    /// Belongs to temporary credentials.
    pub session_token: Option<Secret>,
    /// Accept an endpoint without TLS.
    pub allow_http: bool,
    /// Requests to the store at once; more wait. 1 to 1,024.
    pub concurrency_max: usize,
    /// How long one attempt may go without an answer or a byte.
    pub attempt_timeout: Duration,
    /// How often a failed attempt of one request is repeated.
    pub retries_max: usize,
    /// No attempt starts later than this after the first.
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
        if self.attempt_timeout.is_zero() {
            return Err(Error::invalid("attempt_timeout", 0, "more than 0 s"));
        }
        Ok(())
    }

    /// `text` without anything that is secret here.
    pub(super) fn redact(&self, text: String) -> String {
        let secrets = [&self.secret_key, &self.session_token];
        let known = secrets.into_iter().flatten().map(Secret::expose);
        let known = known.chain(self.access_key.as_deref());
        known
            .filter(|secret| !secret.is_empty())
            .fold(text, |text, secret| {
                if text.contains(secret) {
                    text.replace(secret, "(hidden)")
                } else {
                    text
                }
            })
    }
}
