//! Who shares the indexer, and how much of its memory each may have.

use std::collections::{BTreeMap, BTreeSet};

use std::net::SocketAddr;

use kvcache_core::{Error, ErrorKind, PodName, Result};
use serde::Deserialize;

use super::ServerConfig;
use crate::index::BYTES_MIN;

/// The tenant of everything that no other one claims.
pub const DEFAULT_TENANT: &str = "default";
/// The most tenants, [`DEFAULT_TENANT`] included: each has series of its own in the metrics.
pub const TENANTS_MAX: usize = 64;
/// The longest name of a tenant, in bytes.
const NAME_MAX: usize = 64;
/// What stands for no bound.
const UNLIMITED: &str = "unlimited";

/// What one tenant may have, and what is its own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TenantConfig {
    /// What its entries may take, like `512MiB`; absent: an equal part of what is left by those that say.
    pub max_bytes: Option<String>,
    /// What the names of its pods begin with.
    pub pods: Vec<String>,
    /// Its models: their pods are its own, unless `pods` of another tenant has them, and so are lookups that name no tenant.
    pub models: Vec<String>,
    /// An address of its own: callers there are this tenant, and see and register nothing of others. Port 0: any free one.
    pub grpc_listen: Option<SocketAddr>,
}

/// One tenant, settled.
#[derive(Clone, Debug)]
pub(crate) struct Tenant {
    pub(crate) name: String,
    /// What all its indexes may take together; none: as much as they need.
    pub(crate) bytes_max: Option<u64>,
    rules: TenantConfig,
}

impl Tenant {
    /// As snapshots say it: they do not name the default, so that those of an indexer without tenants stay as they were.
    pub(crate) fn name_in_snapshots(&self) -> String {
        if self.name == DEFAULT_TENANT {
            String::new()
        } else {
            self.name.clone()
        }
    }
}

/// All tenants; the first is [`DEFAULT_TENANT`].
#[derive(Clone, Debug)]
pub(crate) struct Tenants {
    all: Vec<Tenant>,
    /// What belongs to none of the named ones is refused.
    is_required: bool,
}

impl Tenants {
    /// # Errors
    /// [`ErrorKind::Invalid`] naming the key and the value: no size, too little, shares that exceed the whole, names that
    /// are none, what two tenants claim.
    pub(crate) fn new(config: &ServerConfig) -> Result<Self> {
        let total = match config.max_bytes.as_deref() {
            None => available_bytes().map(|bytes| (bytes / 2).max(BYTES_MIN)),
            Some(text) if text.trim() == UNLIMITED => None,
            Some(text) => Some(parse_bytes("max_bytes", text)?),
        };
        let mut all: BTreeMap<&str, TenantConfig> = BTreeMap::new();
        all.insert(DEFAULT_TENANT, TenantConfig::default());
        for (name, rules) in &config.tenants {
            check_name(name)?;
            all.insert(name, rules.clone());
        }
        if all.len() > TENANTS_MAX {
            return Err(Error::invalid("tenants", all.len(), 0..=TENANTS_MAX - 1));
        }
        check_claims(&all)?;
        let shares = shares(&all, total)?;
        let (default, others): (Vec<_>, Vec<_>) = all
            .into_iter()
            .zip(shares)
            .map(|((name, rules), bytes_max)| Tenant {
                name: name.to_owned(),
                bytes_max,
                rules,
            })
            .partition(|tenant| tenant.name == DEFAULT_TENANT);
        if config.require_tenant && others.is_empty() {
            let context = "require_tenant, but no tenant is configured under tenants";
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        Ok(Self {
            all: default.into_iter().chain(others).collect(),
            is_required: config.require_tenant,
        })
    }

    pub(crate) fn all(&self) -> &[Tenant] {
        &self.all
    }

    /// # Errors
    /// [`ErrorKind::Denied`] naming who belongs to no tenant, when everybody must.
    pub(crate) fn check(&self, tenant: usize, who: &str) -> Result<()> {
        if self.is_required && tenant == 0 {
            let context = format!("{who} belongs to no configured tenant (require_tenant)");
            return Err(Error::new(ErrorKind::Denied, context));
        }
        Ok(())
    }

    /// The tenant of a pod that serves a model: the longest beginning of the pod's name decides, else the model.
    pub(crate) fn of_pod(&self, pod: &PodName, model: &str) -> usize {
        let beginnings = self.all.iter().enumerate().flat_map(|(place, tenant)| {
            let fitting = tenant.rules.pods.iter();
            let fitting = fitting.filter(|beginning| pod.as_str().starts_with(beginning.as_str()));
            fitting.map(move |beginning| (beginning.len(), place))
        });
        let longest = beginnings.max();
        longest.map_or_else(|| self.of_model(model), |(_, place)| place)
    }

    fn of_model(&self, model: &str) -> usize {
        let has_it = |tenant: &Tenant| tenant.rules.models.iter().any(|own| own == model);
        self.all.iter().position(has_it).unwrap_or(0)
    }

    /// The tenant with this name; an empty one stands for whose the model is.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] naming a tenant that is not configured; as [`Self::check`].
    pub(crate) fn of_question(&self, name: &str, model: &str) -> Result<usize> {
        let place = if name.is_empty() {
            self.of_model(model)
        } else {
            self.by_name(name).ok_or_else(|| {
                let context = format!("tenant {name:?} is not in the indexer's configuration");
                Error::new(ErrorKind::Invalid, context)
            })?
        };
        self.check(place, &format!("a question about model {model:?}"))?;
        Ok(place)
    }

    pub(crate) fn by_name(&self, name: &str) -> Option<usize> {
        self.all.iter().position(|tenant| tenant.name == name)
    }
}

fn check_name(name: &str) -> Result<()> {
    let is_name = (1..=NAME_MAX).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if is_name {
        return Ok(());
    }
    Err(Error::invalid(
        "tenants",
        format!("{name:?}"),
        "names of 1 to 64 letters, digits, '-', '_' and '.'",
    ))
}

/// Nothing may be two tenants' own.
fn check_claims(all: &BTreeMap<&str, TenantConfig>) -> Result<()> {
    let mut claimed = BTreeSet::new();
    for (name, rules) in all {
        let pods = rules.pods.iter().map(|pod| ("pods", pod));
        let models = rules.models.iter().map(|model| ("models", model));
        for (key, value) in pods.chain(models) {
            let place = format!("tenants.{name}.{key}");
            if value.is_empty() || *name == DEFAULT_TENANT {
                let accepted =
                    "a beginning of names or a model, of another tenant than the default";
                return Err(Error::invalid(&place, format!("{value:?}"), accepted));
            }
            if !claimed.insert((key, value.clone())) {
                let context = format!("{place}: {value:?} is there twice");
                return Err(Error::new(ErrorKind::Invalid, context));
            }
        }
    }
    Ok(())
}

/// What each may take, in their order.
fn shares(all: &BTreeMap<&str, TenantConfig>, total: Option<u64>) -> Result<Vec<Option<u64>>> {
    let own = |(name, rules): (&&str, &TenantConfig)| {
        let text = rules.max_bytes.as_deref();
        text.map(|text| parse_bytes(&format!("tenants.{name}.max_bytes"), text))
            .transpose()
    };
    let own: Vec<Option<u64>> = all.iter().map(own).collect::<Result<_>>()?;
    let Some(total) = total else {
        return Ok(own);
    };
    let given = own
        .iter()
        .flatten()
        .fold(0_u64, |sum, share| sum.saturating_add(*share));
    let others = own.iter().filter(|share| share.is_none()).count() as u64;
    let left = total.checked_sub(given).ok_or_else(|| {
        let context = format!("tenants: their max_bytes add up to {given}, max_bytes is {total}");
        Error::new(ErrorKind::Invalid, context)
    })?;
    let share = left.checked_div(others).unwrap_or(0);
    if others > 0 && share < BYTES_MIN {
        let context = format!(
            "max_bytes is {total}: {given} are given to tenants by name, which leaves {share} \
             bytes for each of {others} others; at least {BYTES_MIN} are needed"
        );
        return Err(Error::new(ErrorKind::Invalid, context));
    }
    let settled = own.into_iter().map(|own| Some(own.unwrap_or(share)));
    Ok(settled.collect())
}

/// # Errors
/// [`ErrorKind::Invalid`] naming the key and the text.
fn parse_bytes(key: &str, text: &str) -> Result<u64> {
    let text = text.trim();
    let digits = text.len()
        - text
            .trim_start_matches(|byte: char| byte.is_ascii_digit())
            .len();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim_start() {
        "" | "B" => Some(0),
        "KiB" => Some(10),
        "MiB" => Some(20),
        "GiB" => Some(30),
        "TiB" => Some(40),
        _ => None,
    };
    let bytes = number
        .parse::<u64>()
        .ok()
        .zip(shift)
        .and_then(|(number, shift)| number.checked_mul(1 << shift));
    match bytes {
        Some(bytes) if bytes >= BYTES_MIN => Ok(bytes),
        _ => Err(Error::invalid(
            key,
            format!("{text:?}"),
            format!("at least {BYTES_MIN} bytes, as a number or with KiB, MiB, GiB or TiB"),
        )),
    }
}

/// The memory that this process may use: the machine's, or less when its control group says so.
fn available_bytes() -> Option<u64> {
    let limits = [
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    ];
    let limits = limits.into_iter().filter_map(|path| {
        let text = std::fs::read_to_string(path).ok()?;
        text.trim().parse::<u64>().ok()
    });
    limits.chain(machine_bytes()).min()
}

fn machine_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let total = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kibibytes: u64 = total.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}
