//! Files and objects as regions.

use std::path::PathBuf;

use kvfabric::Error;
use kvfabric::transfer::{
    DirectMode, FileEngineMode, ObjectChecksum, ObjectOptions, ObjectWrite, Secret,
};
use pyo3::prelude::*;

use crate::errors::to_python;
use crate::life::parse_timeout;

/// `kvfabric.ObjectStore`.
#[derive(FromPyObject)]
pub(crate) struct ObjectStore {
    pub(crate) url: String,
    endpoint: Option<String>,
    region: Option<String>,
    access_key: Option<String>,
    secret_key: Option<String>,
    session_token: Option<String>,
    authorities: Option<PathBuf>,
    allow_http: bool,
    checksum: Option<String>,
    part_bytes: u64,
    parts_in_flight: usize,
    requests_in_flight: usize,
    attempt_timeout: f64,
    retries: usize,
}

impl ObjectStore {
    pub(crate) fn options(self) -> PyResult<ObjectOptions> {
        let checksum = match self.checksum.as_deref() {
            None => ObjectChecksum::Off,
            Some(name) => chosen(
                "object store checksum",
                name,
                &[
                    ("sha256", ObjectChecksum::Sha256),
                    ("crc64nvme", ObjectChecksum::Crc64Nvme),
                ],
            )?,
        };
        Ok(ObjectOptions {
            endpoint: self.endpoint,
            region: self.region,
            access_key: self.access_key,
            secret_key: self.secret_key.map(Secret::new),
            session_token: self.session_token.map(Secret::new),
            authorities: self.authorities,
            allow_http: self.allow_http,
            checksum,
            part_bytes: self.part_bytes,
            parts_in_flight_max: self.parts_in_flight,
            concurrency_max: self.requests_in_flight,
            attempt_timeout: parse_timeout(self.attempt_timeout)?,
            retries_max: self.retries,
            ..ObjectOptions::default()
        })
    }
}

/// Whether the page cache is passed by; where it can be if nothing is said.
pub(crate) fn direct(passed_by: Option<bool>) -> DirectMode {
    match passed_by {
        None => DirectMode::Auto,
        Some(true) => DirectMode::On,
        Some(false) => DirectMode::Off,
    }
}

pub(crate) fn engine(name: &str) -> PyResult<FileEngineMode> {
    let known = [
        ("auto", FileEngineMode::Auto),
        ("io_uring", FileEngineMode::Uring),
        ("threads", FileEngineMode::Blocking),
    ];
    chosen("file engine", name, &known)
}

pub(crate) fn when_there(name: &str) -> PyResult<ObjectWrite> {
    let known = [
        ("replace", ObjectWrite::Replace),
        ("create", ObjectWrite::Create),
        ("keep", ObjectWrite::Keep),
    ];
    chosen("when_there", name, &known)
}

/// What a word stands for.
fn chosen<T: Copy>(field: &str, name: &str, known: &[(&str, T)]) -> PyResult<T> {
    let found = known.iter().find(|(word, _)| *word == name);
    found.map(|(_, value)| *value).ok_or_else(|| {
        let words: Vec<&str> = known.iter().map(|(word, _)| *word).collect();
        let found = format!("{name:?}");
        to_python(Error::invalid(field, found, words.join(", ")))
    })
}
