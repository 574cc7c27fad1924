//! The HTTP client of the stores: whom it believes, how long it waits, and when it asks again.

use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};
use object_store::client::{
    ClientConfigKey, ClientOptions, HttpClient, HttpConnector, HttpError, HttpErrorKind,
    HttpRequest, HttpResponse, HttpService,
};
use object_store::{BackoffConfig, RetryConfig};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::options::ObjectOptions;

/// The wait before the first repetition; it doubles up to [`BACKOFF_MAX`].
const BACKOFF_FIRST: Duration = Duration::from_millis(50);
/// The longest wait between two attempts.
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// The longest wait that a store may ask for.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(10);
/// How long a connection may take to open.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How failed attempts are repeated.
pub(super) fn retry(options: &ObjectOptions) -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: BACKOFF_FIRST,
            max_backoff: BACKOFF_MAX,
            base: 2.0,
        },
        max_retries: options.retries_max,
        retry_timeout: options.retry_budget,
    }
}

/// A store that answered a conditional write with "not implemented".
#[derive(Debug)]
pub(super) struct NotConditional;

impl std::fmt::Display for NotConditional {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the store knows no conditional writes")
    }
}

impl std::error::Error for NotConditional {}

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Makes HTTP clients whose TLS is `ring`, given to them by name: a library must not decide the process-wide provider.
#[derive(Debug)]
pub(super) struct RingConnector {
    attempt_timeout: Duration,
    authorities: Vec<CertificateDer<'static>>,
}

impl RingConnector {
    /// Reads the authorities that the options name.
    pub(super) fn new(options: &ObjectOptions) -> Result<Self> {
        let authorities = options.authorities.as_deref().map(read_authorities);
        Ok(Self {
            attempt_timeout: options.attempt_timeout,
            authorities: authorities.transpose()?.unwrap_or_default(),
        })
    }

    /// TLS against the certificates that this system trusts, and those of our own authorities. Without any, HTTPS cannot
    /// work, which matters only where plain HTTP is not allowed.
    fn tls(&self, allow_http: bool) -> Result<rustls::ClientConfig, Failure> {
        let mut roots = rustls::RootCertStore::empty();
        let found = rustls_native_certs::load_native_certs();
        roots.add_parsable_certificates(found.certs);
        for certificate in &self.authorities {
            roots.add(certificate.clone())?;
        }
        if roots.is_empty() && !allow_http {
            let reason = found
                .errors
                .first()
                .map_or(String::new(), |error| format!(": {error}"));
            return Err(format!("this system has no trusted certificates{reason}").into());
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        Ok(rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth())
    }
}

fn read_authorities(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let place = format!("authorities {}", path.display());
    let pem = std::fs::read(path).map_err(|error| Error::io(place.clone(), error))?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(Error::new(
            ErrorKind::Invalid,
            format!("{place}: no certificate in it"),
        )),
        Err(error) => Err(Error::new(ErrorKind::Invalid, place).with_source(error)),
    }
}

impl HttpConnector for RingConnector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let failed = |source: Failure| object_store::Error::Generic {
            store: "HTTP client",
            source,
        };
        let allow_http = options
            .get_config_value(&ClientConfigKey::AllowHttp)
            .is_some_and(|value| value == "true");
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(self.tls(allow_http).map_err(failed)?)
            .https_only(!allow_http)
            .http1_only()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(self.attempt_timeout)
            .build()
            .map_err(|error| failed(error.into()))?;
        Ok(HttpClient::new(Patient {
            client,
            not_before: Mutex::new(None),
        }))
    }
}

/// Sends requests, and none of them before a store that asked to wait wants the next one.
#[derive(Debug)]
struct Patient {
    client: reqwest::Client,
    not_before: Mutex<Option<Instant>>,
}

impl Patient {
    async fn wait(&self) {
        let until = *self
            .not_before
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(until) = until {
            tokio::time::sleep_until(until.into()).await;
        }
    }

    /// Remembers how long a store that is too busy asks to be left alone.
    fn note(&self, answer: &HttpResponse) {
        if !matches!(answer.status().as_u16(), 429 | 503) {
            return;
        }
        let asked = answer.headers().get("retry-after");
        let seconds = asked.and_then(|value| value.to_str().ok()?.trim().parse().ok());
        let Some(seconds) = seconds else { return };
        let pause = Duration::from_secs(seconds).min(RETRY_AFTER_MAX);
        let mut not_before = self
            .not_before
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *not_before = (*not_before).max(Some(Instant::now() + pause));
    }

    async fn send(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        self.wait().await;
        let is_conditional = request.headers().contains_key("if-none-match");
        let answer = self.client.call(request).await?;
        if is_conditional && answer.status().as_u16() == 501 {
            // Said once, it holds: not to be repeated like other errors of a server.
            return Err(HttpError::new(HttpErrorKind::Unknown, NotConditional));
        }
        self.note(&answer);
        Ok(answer)
    }
}

impl HttpService for Patient {
    // What the attribute `async_trait` makes of an asynchronous function.
    fn call<'life, 'future>(
        &'life self,
        request: HttpRequest,
    ) -> Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'future>>
    where
        'life: 'future,
        Self: 'future,
    {
        Box::pin(self.send(request))
    }
}
