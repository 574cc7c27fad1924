//! Lists of byte ranges, checked once.

use std::sync::Arc;

use kvfabric::transfer::{
    Descriptor, Operation, PeerHandle, PreparedList, RegionId, Side, Strided,
};
use kvfabric::{Error, ErrorKind, Result};
use pyo3::prelude::*;

use crate::buffer::Numbers;
use crate::errors::to_python;
use crate::fabric::Fabric;
use crate::region::{Held, Region};

/// Numbers in a row that names one range: region, offset, length.
const PLAIN_COLUMNS: usize = 3;
/// Numbers in a row that names many: region, offset, length, stride, count.
const STRIDED_COLUMNS: usize = 5;

/// Checked ranges, for any number of requests. It keeps the memory of its regions alive.
#[pyclass(frozen, module = "kvfabric")]
pub(crate) struct Prepared {
    pub(crate) fabric: Arc<Fabric>,
    pub(crate) list: PreparedList,
    /// The own regions that it names, each once; none for a peer's ranges.
    pub(crate) regions: Vec<Arc<Held>>,
}

/// The ranges of a list as they were given.
pub(crate) enum Ranges {
    Plain(Vec<Descriptor>),
    Strided(Vec<Strided>),
}

/// A region in a descriptor.
#[derive(FromPyObject)]
enum Place<'py> {
    Own(Bound<'py, Region>),
    Number(u64),
}

impl Ranges {
    /// Reads what a caller wrote: a sequence of (region, offset, length), or an array.
    pub(crate) fn read(
        fabric: &Arc<Fabric>,
        peer: Option<&PeerHandle>,
        object: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        if let Some(numbers) = Numbers::of(object, "descriptors")? {
            return Self::of_rows(&numbers).map_err(to_python);
        }
        let listed: Vec<(Place<'_>, u64, u64)> = object.extract()?;
        let descriptor = |(place, offset, len): (Place<'_>, u64, u64)| {
            let (region, offset) = match place {
                Place::Number(number) => (RegionId(number), offset),
                Place::Own(_) if peer.is_some() => {
                    let text =
                        "a peer's region is named by its number, not by a Region of this agent";
                    return Err(Error::new(ErrorKind::Invalid, text));
                }
                Place::Own(region) => {
                    let held = &region.get().held;
                    if !held.is_of(fabric) {
                        let text = format!("region {} belongs to another agent", held.region.id());
                        return Err(Error::new(ErrorKind::Invalid, text));
                    }
                    (held.region.id(), held.offset().saturating_add(offset))
                }
            };
            Ok(Descriptor {
                region,
                offset,
                len,
            })
        };
        let descriptors: Result<Vec<_>> = listed.into_iter().map(descriptor).collect();
        Ok(Self::Plain(descriptors.map_err(to_python)?))
    }

    fn of_rows(numbers: &Numbers) -> Result<Self> {
        match *numbers.shape {
            [_, PLAIN_COLUMNS] => {
                let rows = numbers.values.chunks_exact(PLAIN_COLUMNS);
                let descriptors = rows.map(|row| Descriptor {
                    region: RegionId(row[0]),
                    offset: row[1],
                    len: row[2],
                });
                Ok(Self::Plain(descriptors.collect()))
            }
            [_, STRIDED_COLUMNS] => {
                let rows = numbers.values.chunks_exact(STRIDED_COLUMNS).enumerate();
                let strided = rows.map(|(position, row)| {
                    let count = u32::try_from(row[4]).map_err(|_| {
                        Error::invalid("count", row[4], 0..=u32::MAX).at(format!("row {position}"))
                    })?;
                    Ok(Strided {
                        region: RegionId(row[0]),
                        offset: row[1],
                        len: row[2],
                        stride: row[3],
                        count,
                    })
                });
                Ok(Self::Strided(strided.collect::<Result<_>>()?))
            }
            _ => {
                let found = format!("an array of shape {:?}", numbers.shape);
                let accepted = "rows of 3 (region, offset, length) or 5 (and stride, count)";
                Err(Error::invalid("descriptors", found, accepted))
            }
        }
    }

    /// The own regions that the ranges name, each once.
    fn regions(&self, fabric: &Fabric) -> Result<Vec<Arc<Held>>> {
        let mut regions: Vec<Arc<Held>> = Vec::new();
        let mut last = None;
        let mut meet = |id: RegionId| -> Result<()> {
            // Lists mostly stay in one region for long.
            if last == Some(id) {
                return Ok(());
            }
            last = Some(id);
            if regions.iter().all(|held| held.region.id() != id) {
                regions.push(fabric.find(id)?);
            }
            Ok(())
        };
        match self {
            Self::Plain(descriptors) => descriptors.iter().try_for_each(|d| meet(d.region))?,
            Self::Strided(strided) => strided.iter().try_for_each(|s| meet(s.region))?,
        }
        Ok(regions)
    }
}

impl Prepared {
    /// Checks ranges of own regions, or of the peer's. Must not be called with the GIL held.
    pub(crate) fn of(
        fabric: &Arc<Fabric>,
        peer: Option<&PeerHandle>,
        ranges: &Ranges,
    ) -> Result<Self> {
        let (side, regions) = match peer {
            Some(peer) => (Side::Peer(peer), Vec::new()),
            None => (Side::Local, ranges.regions(fabric)?),
        };
        let list = match ranges {
            Ranges::Plain(descriptors) => fabric.agent.prepare(side, descriptors)?,
            Ranges::Strided(strided) => fabric.agent.prepare_strided(side, strided)?,
        };
        Ok(Self {
            fabric: fabric.clone(),
            list,
            regions,
        })
    }

    /// # Errors
    /// [`ErrorKind::Denied`] when it is read-only memory.
    pub(crate) fn check_writable(&self) -> Result<()> {
        self.regions
            .iter()
            .try_for_each(|held| held.check_writable())
    }

    /// # Errors
    /// [`ErrorKind::Invalid`] when another agent made it.
    pub(crate) fn check_of(&self, fabric: &Arc<Fabric>) -> Result<()> {
        if Arc::ptr_eq(&self.fabric, fabric) {
            return Ok(());
        }
        let text = format!(
            "the list was prepared by agent {:?}",
            self.fabric.agent.name()
        );
        Err(Error::new(ErrorKind::Invalid, text))
    }
}

/// The side whose memory an operation changes must be writable.
pub(crate) fn check_target(
    operation: Operation,
    local: &Prepared,
    remote: &Prepared,
) -> Result<()> {
    match operation {
        Operation::Read => local.check_writable(),
        Operation::Write => remote.check_writable(),
    }
}

#[pymethods]
impl Prepared {
    fn __len__(&self) -> usize {
        self.list.len()
    }

    /// Bytes of all ranges together.
    #[getter]
    fn bytes(&self) -> u64 {
        self.list.bytes()
    }

    fn __repr__(&self) -> String {
        format!(
            "<kvfabric.Prepared of {} ranges, {} bytes>",
            self.list.len(),
            self.list.bytes()
        )
    }
}
