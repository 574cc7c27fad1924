//! From a URL to a store.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result};
use object_store::aws::AmazonS3Builder;
use object_store::client::{ClientConfigKey, ClientOptions, HttpClient, HttpConnector};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{BackoffConfig, ObjectStore, RetryConfig};
use url::Url;

use super::options::{ObjectOptions, Secret};

/// The wait before the first repetition; it doubles up to [`BACKOFF_MAX`].
const BACKOFF_FIRST: Duration = Duration::from_millis(50);
/// The longest wait between two attempts.
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// How long a connection may take to open.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Opens the store at `url`: `file:///directory` (made when missing) or `s3://bucket/prefix`.
///
/// Fills what is secret in the environment into `options`, so that it can be kept out of errors.
pub(super) fn open(url: &str, options: &mut ObjectOptions) -> Result<Arc<dyn ObjectStore>> {
    options.check()?;
    let parsed = Url::parse(url)
        .map_err(|error| Error::new(ErrorKind::Invalid, format!("{url:?} is no URL: {error}")))?;
    if !parsed.username().is_empty() || parsed.password().is_some() {
        let text = "credentials belong into the options, not into the URL of an object store";
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    match parsed.scheme() {
        "file" => local(&parsed),
        "s3" => s3(&parsed, options),
        other => {
            let text = format!("scheme {other:?}, expected \"file\" or \"s3\"");
            Err(Error::new(ErrorKind::Unsupported, text))
        }
    }
}

fn local(url: &Url) -> Result<Arc<dyn ObjectStore>> {
    let directory: PathBuf = url.to_file_path().map_err(|()| {
        let text = format!("{url} names no local directory, expected file:///directory");
        Error::new(ErrorKind::Invalid, text)
    })?;
    std::fs::create_dir_all(&directory)
        .map_err(|error| Error::io(format!("make {}", directory.display()), error))?;
    let store = LocalFileSystem::new_with_prefix(&directory).map_err(|error| {
        let text = format!("open {}", directory.display());
        Error::new(ErrorKind::Io, text).with_source(error)
    })?;
    Ok(Arc::new(store))
}

fn s3(url: &Url, options: &mut ObjectOptions) -> Result<Arc<dyn ObjectStore>> {
    let Some(bucket) = url.host_str().filter(|bucket| !bucket.is_empty()) else {
        let text = format!("{url} names no bucket, expected s3://bucket/prefix");
        return Err(Error::new(ErrorKind::Invalid, text));
    };
    let environment = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    if options.access_key.is_none() {
        options.access_key = environment("AWS_ACCESS_KEY_ID");
        options.secret_key = environment("AWS_SECRET_ACCESS_KEY").map(Secret::new);
        options.session_token = environment("AWS_SESSION_TOKEN").map(Secret::new);
    }
    let mut builder = AmazonS3Builder::from_env()
        .with_bucket_name(bucket)
        .with_allow_http(options.allow_http)
        .with_http_connector(RingConnector {
            attempt_timeout: options.attempt_timeout,
        })
        .with_retry(RetryConfig {
            backoff: BackoffConfig {
                init_backoff: BACKOFF_FIRST,
                max_backoff: BACKOFF_MAX,
                base: 2.0,
            },
            max_retries: options.retries_max,
            retry_timeout: options.retry_budget,
        });
    if let Some(endpoint) = &options.endpoint {
        builder = builder.with_endpoint(endpoint);
    }
    if let Some(region) = &options.region {
        builder = builder.with_region(region);
    }
    if let (Some(access), Some(secret)) = (&options.access_key, &options.secret_key) {
        builder = builder
            .with_access_key_id(access)
            .with_secret_access_key(secret.expose());
    }
    if let Some(token) = &options.session_token {
        builder = builder.with_token(token.expose());
    }
    let store = builder.build().map_err(|error| {
        let text = options.redact(format!("{url}: {error}"));
        Error::new(ErrorKind::Invalid, text)
    })?;
    let prefix = Path::from_url_path(url.path())
        .map_err(|error| Error::new(ErrorKind::Invalid, format!("{url}: {error}")))?;
    if prefix.as_ref().is_empty() {
        return Ok(Arc::new(store));
    }
    Ok(Arc::new(PrefixStore::new(store, prefix)))
}

/// Makes HTTP clients whose TLS is `ring`, given to them by name: a library must not decide the process-wide provider.
#[derive(Debug)]
struct RingConnector {
    attempt_timeout: Duration,
}

impl HttpConnector for RingConnector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let failed =
            |source: Box<dyn std::error::Error + Send + Sync>| object_store::Error::Generic {
                store: "HTTP client",
                source,
            };
        let allow_http = options
            .get_config_value(&ClientConfigKey::AllowHttp)
            .is_some_and(|value| value == "true");
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(tls(allow_http).map_err(failed)?)
            .https_only(!allow_http)
            .http1_only()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(self.attempt_timeout)
            .build()
            .map_err(|error| failed(error.into()))?;
        Ok(HttpClient::new(client))
    }
}

/// TLS against the certificates that this system trusts. Without any, HTTPS cannot work, which matters only where plain
/// HTTP is not allowed.
fn tls(allow_http: bool) -> Result<rustls::ClientConfig, Box<dyn std::error::Error + Send + Sync>> {
    let mut roots = rustls::RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    let (added, _) = roots.add_parsable_certificates(found.certs);
    if added == 0 && !allow_http {
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
