//! From a URL to a store.

use std::path::PathBuf;
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};
use object_store::ObjectStore;
use object_store::aws::{AmazonS3Builder, Checksum};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::client::ClientConfigKey;
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use url::Url;

use super::http::{RingConnector, retry};
use super::options::{Hidden, ObjectChecksum, ObjectOptions};

/// Environment variables whose values are kept out of errors.
const HIDDEN_VARIABLES: [&str; 16] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_BEARER_TOKEN",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_MASTER_KEY",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_CLIENT_SECRET",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_TOKEN",
    "AZURE_FABRIC_SESSION_TOKEN",
    "AZURE_ENCRYPTION_KEY",
];

/// An open store, and what must not be said of it.
pub(super) struct Opened {
    pub(super) store: Arc<dyn ObjectStore>,
    pub(super) hidden: Hidden,
}

/// Opens the store at `url`: `file:///directory` (made when missing), `s3://bucket/prefix`, `gs://bucket/prefix` or
/// `az://container/prefix`.
pub(super) fn open(url: &str, options: &ObjectOptions) -> Result<Opened> {
    options.check()?;
    let parsed = Url::parse(url)
        .map_err(|error| Error::new(ErrorKind::Invalid, format!("{url:?} is no URL: {error}")))?;
    if !parsed.username().is_empty() || parsed.password().is_some() {
        let text = "credentials belong into the options, not into the URL of an object store";
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    let mut hidden = Hidden::new(options, &HIDDEN_VARIABLES);
    let store = match parsed.scheme() {
        "file" => local(&parsed)?,
        "s3" => {
            hidden.add(options.access_key.as_deref());
            below(&parsed, &hidden, s3(&parsed, options)?.build())?
        }
        "gs" => below(&parsed, &hidden, gcs(&parsed, options)?.build())?,
        "az" => below(&parsed, &hidden, azure(&parsed, options)?.build())?,
        other => {
            let text = format!("scheme {other:?}, expected \"file\", \"s3\", \"gs\" or \"az\"");
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
    };
    Ok(Opened { store, hidden })
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

/// The bucket or container that a URL names.
fn bucket(url: &Url) -> Result<&str> {
    url.host_str()
        .filter(|bucket| !bucket.is_empty())
        .ok_or_else(|| {
            let scheme = url.scheme();
            let text = format!("{url} names no bucket, expected {scheme}://bucket/prefix");
            Error::new(ErrorKind::Invalid, text)
        })
}

/// The store that was built, seen from the URL's prefix.
fn below<S: ObjectStore>(
    url: &Url,
    hidden: &Hidden,
    built: object_store::Result<S>,
) -> Result<Arc<dyn ObjectStore>> {
    let store = built.map_err(|error| {
        let text = hidden.redact(format!("{url}: {error}"));
        Error::new(ErrorKind::Invalid, text)
    })?;
    let prefix = Path::from_url_path(url.path())
        .map_err(|error| Error::new(ErrorKind::Invalid, format!("{url}: {error}")))?;
    if prefix.as_ref().is_empty() {
        return Ok(Arc::new(store));
    }
    Ok(Arc::new(PrefixStore::new(store, prefix)))
}

fn s3(url: &Url, options: &ObjectOptions) -> Result<AmazonS3Builder> {
    let mut builder = AmazonS3Builder::from_env()
        .with_bucket_name(bucket(url)?)
        .with_allow_http(options.allow_http)
        .with_http_connector(RingConnector::new(options)?)
        .with_retry(retry(options));
    builder = match options.checksum {
        ObjectChecksum::Off => builder,
        ObjectChecksum::Sha256 => builder.with_checksum_algorithm(Checksum::SHA256),
        ObjectChecksum::Crc64Nvme => builder.with_checksum_algorithm(Checksum::CRC64NVME),
    };
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
    Ok(builder)
}

fn gcs(url: &Url, options: &ObjectOptions) -> Result<GoogleCloudStorageBuilder> {
    let mut builder = GoogleCloudStorageBuilder::from_env()
        .with_bucket_name(bucket(url)?)
        .with_config(
            GoogleConfigKey::Client(ClientConfigKey::AllowHttp),
            options.allow_http.to_string(),
        )
        .with_http_connector(RingConnector::new(options)?)
        .with_retry(retry(options));
    if let Some(endpoint) = &options.endpoint {
        builder = builder.with_base_url(endpoint.trim_end_matches('/'));
    }
    if let Some(key) = &options.secret_key {
        builder = builder.with_service_account_key(key.expose());
    }
    if let Some(token) = &options.session_token {
        builder = builder.with_bearer_token(token.expose());
    }
    Ok(builder)
}

fn azure(url: &Url, options: &ObjectOptions) -> Result<MicrosoftAzureBuilder> {
    let mut builder = MicrosoftAzureBuilder::from_env()
        .with_container_name(bucket(url)?)
        .with_allow_http(options.allow_http)
        .with_http_connector(RingConnector::new(options)?)
        .with_retry(retry(options));
    if let Some(endpoint) = &options.endpoint {
        builder = builder.with_endpoint(endpoint.clone());
    }
    if let Some(account) = &options.access_key {
        builder = builder.with_account(account);
    }
    if let Some(key) = &options.secret_key {
        builder = builder.with_access_key(key.expose());
    }
    if let Some(token) = &options.session_token {
        builder = builder.with_config(AzureConfigKey::Token, token.expose());
    }
    Ok(builder)
}
