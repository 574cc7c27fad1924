//! How an agent is made.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use kvfabric::transfer::{Agent, AgentBuilder, TlsOptions, UcxOptions, VerbsOptions};
use kvfabric::{Error, Result};
use pyo3::prelude::*;

use crate::device::Cuda;
use crate::errors::to_python;
use crate::life::parse_timeout;
use crate::place::ObjectStore;

/// `kvfabric.Tls`: files in PEM.
#[derive(FromPyObject)]
pub(crate) struct Tls {
    authorities: PathBuf,
    certificates: PathBuf,
    key: PathBuf,
}

/// `kvfabric.Verbs`.
#[derive(FromPyObject)]
pub(crate) struct Verbs {
    device: Option<String>,
    gid_index: Option<u8>,
    listen: Option<String>,
    mtu: Option<u32>,
    traffic_class: u8,
    service_level: u8,
    timeout: u8,
    retries: u8,
    polling: f64,
    rails: u8,
    near: Option<String>,
    connect: String,
}

/// What the caller has said of an agent.
pub(crate) struct AgentOptions<'a> {
    pub(crate) shm: bool,
    pub(crate) cma: Option<bool>,
    pub(crate) memcpy: bool,
    pub(crate) copy_threads: Option<usize>,
    pub(crate) tcp: Option<&'a str>,
    pub(crate) tcp_advertise: Option<&'a str>,
    pub(crate) tcp_rails: Vec<String>,
    pub(crate) tcp_connections: usize,
    pub(crate) tcp_congestion: Option<&'a str>,
    pub(crate) tls: Option<Tls>,
    pub(crate) ucx: Option<BTreeMap<String, String>>,
    pub(crate) verbs: Option<Verbs>,
    pub(crate) allow_peers: Option<Vec<String>>,
    pub(crate) prefer: Vec<String>,
    pub(crate) look: Option<f64>,
    pub(crate) slow_after: Option<f64>,
    pub(crate) connect_within: f64,
    pub(crate) object_stores: BTreeMap<String, ObjectStore>,
    pub(crate) cuda: Option<Cuda>,
}

impl AgentOptions<'_> {
    /// Starts such an agent.
    pub(crate) fn start(self, py: Python<'_>, name: &str) -> PyResult<Agent> {
        let builder = self.builder(name)?;
        py.detach(|| builder.build()).map_err(to_python)
    }

    fn builder(self, name: &str) -> PyResult<AgentBuilder> {
        let rails = self.tcp_rails.iter();
        let rails = rails.map(|rail| parse_address("tcp_rails", rail));
        let mut builder = Agent::builder(name)
            .shm(self.shm)
            .memcpy(self.memcpy)
            .tcp(optional_address("tcp", self.tcp)?)
            .tcp_advertise(optional_address("tcp_advertise", self.tcp_advertise)?)
            .tcp_rails(rails.collect::<PyResult<Vec<_>>>()?)
            .tcp_connections(self.tcp_connections)
            .tcp_congestion(self.tcp_congestion)
            .tcp_tls(self.tls.map(Tls::read).transpose().map_err(to_python)?)
            .verbs(self.verbs.map(Verbs::options).transpose()?)
            .cuda(self.cuda.map(Cuda::options).transpose()?)
            .slow_after(self.slow_after.map(parse_timeout).transpose()?)
            .connect_within(parse_timeout(self.connect_within)?)
            .prefer(self.prefer);
        if let Some(enabled) = self.cma {
            builder = builder.cma(enabled);
        }
        if let Some(threads) = self.copy_threads {
            builder = builder.copy_threads(threads);
        }
        if let Some(settings) = self.ucx {
            let settings = settings.into_iter().collect();
            builder = builder.ucx(Some(UcxOptions { settings }));
        }
        if let Some(names) = self.allow_peers {
            builder = builder.allow_peers(names);
        }
        if let Some(longest) = self.look {
            builder = builder.look(parse_timeout(longest)?);
        }
        for (name, store) in self.object_stores {
            let url = store.url.clone();
            builder = builder.object_store(&name, &url, store.options()?);
        }
        Ok(builder)
    }
}

impl Tls {
    fn read(self) -> Result<TlsOptions> {
        let Self {
            authorities,
            certificates,
            key,
        } = self;
        TlsOptions::from_files(&authorities, &certificates, &key).map_err(|e| e.at("tls"))
    }
}

impl Verbs {
    fn options(self) -> PyResult<VerbsOptions> {
        Ok(VerbsOptions {
            listen: optional_address("verbs.listen", self.listen.as_deref())?,
            polling: parse_timeout(self.polling)?,
            device: self.device,
            gid_index: self.gid_index,
            mtu: self.mtu,
            traffic_class: self.traffic_class,
            service_level: self.service_level,
            timeout: self.timeout,
            retries: self.retries,
            rails: self.rails,
            near: self.near,
            connect: self.connect.parse().map_err(to_python)?,
        })
    }
}

fn optional_address(field: &str, text: Option<&str>) -> PyResult<Option<SocketAddr>> {
    text.map(|text| parse_address(field, text)).transpose()
}

fn parse_address(field: &str, text: &str) -> PyResult<SocketAddr> {
    text.parse()
        .map_err(|_| to_python(Error::invalid(field, format!("{text:?}"), "ip:port")))
}
