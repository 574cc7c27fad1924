//! A node's configuration, from what a Python caller has: a nested mapping, or a file.

use std::collections::BTreeMap;
use std::path::PathBuf;

use kvfabric::{Error, NodeConfig};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyFloat, PyInt, PyList, PyMapping, PyString, PyTuple};
use serde::Serialize;

use crate::errors::to_python;

/// What a setting may be: the same as in a TOML file.
#[derive(Serialize)]
#[serde(untagged)]
enum Setting {
    Flag(bool),
    Signed(i64),
    Unsigned(u64),
    Real(f64),
    Text(String),
    List(Vec<Setting>),
    Table(BTreeMap<String, Setting>),
}

/// Tables within tables: deeper ones are no configuration of ours.
const DEPTH_MAX: usize = 8;

/// Reads a configuration and what goes over it, with the environment between them.
pub(crate) fn read(
    config: &Bound<'_, PyAny>,
    overrides: Option<&Bound<'_, PyMapping>>,
) -> PyResult<NodeConfig> {
    let overrides = match overrides {
        Some(overrides) => flat(overrides)?,
        None => Vec::new(),
    };
    let read = match config.cast::<PyMapping>() {
        Ok(mapping) => {
            let table = Setting::Table(table(mapping, "", DEPTH_MAX)?);
            NodeConfig::from_value(&table, &overrides)
        }
        Err(_) => {
            let path: PathBuf = config.extract()?;
            NodeConfig::load(Some(&path), &overrides)
        }
    };
    read.map_err(to_python)
}

/// Settings by dotted key, as text.
fn flat(overrides: &Bound<'_, PyMapping>) -> PyResult<Vec<(String, String)>> {
    let mut settings = Vec::new();
    for (key, value) in entries(overrides)? {
        let text = match setting(&value, &key, 0)? {
            None => continue,
            Some(Setting::Flag(value)) => value.to_string(),
            Some(Setting::Signed(value)) => value.to_string(),
            Some(Setting::Unsigned(value)) => value.to_string(),
            Some(Setting::Real(value)) => value.to_string(),
            Some(Setting::Text(value)) => value,
            Some(Setting::List(_) | Setting::Table(_)) => {
                return Err(refused(&key, &value, "one value"));
            }
        };
        settings.push((key, text));
    }
    Ok(settings)
}

fn table(
    mapping: &Bound<'_, PyMapping>,
    place: &str,
    depth: usize,
) -> PyResult<BTreeMap<String, Setting>> {
    let mut settings = BTreeMap::new();
    for (key, value) in entries(mapping)? {
        let place = if place.is_empty() {
            key.clone()
        } else {
            format!("{place}.{key}")
        };
        // None says nothing, as if the key were not there.
        if let Some(setting) = setting(&value, &place, depth)? {
            settings.insert(key, setting);
        }
    }
    Ok(settings)
}

fn entries<'py>(mapping: &Bound<'py, PyMapping>) -> PyResult<Vec<(String, Bound<'py, PyAny>)>> {
    mapping.items()?.extract()
}

fn setting(value: &Bound<'_, PyAny>, place: &str, depth: usize) -> PyResult<Option<Setting>> {
    if value.is_none() {
        return Ok(None);
    }
    // Flags first: in Python they are whole numbers, too.
    let setting = if value.is_instance_of::<PyBool>() {
        Setting::Flag(value.extract()?)
    } else if value.is_instance_of::<PyInt>() {
        match value.extract::<i64>() {
            Ok(number) => Setting::Signed(number),
            Err(_) => Setting::Unsigned(
                value
                    .extract()
                    .map_err(|_| refused(place, value, "a number below 2^64"))?,
            ),
        }
    } else if value.is_instance_of::<PyFloat>() {
        Setting::Real(value.extract()?)
    } else if value.is_instance_of::<PyString>() {
        Setting::Text(value.extract()?)
    } else if let Ok(mapping) = value.cast::<PyMapping>()
        && depth > 0
    {
        Setting::Table(table(mapping, place, depth - 1)?)
    } else if (value.is_instance_of::<PyList>() || value.is_instance_of::<PyTuple>()) && depth > 0 {
        let mut list = Vec::new();
        for item in value.try_iter()? {
            list.extend(setting(&item?, place, depth - 1)?);
        }
        Setting::List(list)
    } else if let Ok(path) = value.extract::<PathBuf>() {
        let text = path.into_os_string().into_string();
        Setting::Text(text.map_err(|_| refused(place, value, "text in UTF-8"))?)
    } else {
        let accepted = "text, a path, a number, True, False, a list or a mapping";
        return Err(refused(place, value, accepted));
    };
    Ok(Some(setting))
}

fn refused(place: &str, value: &Bound<'_, PyAny>, accepted: &str) -> PyErr {
    let shown = value.repr().map_or_else(
        |_| "a value without a representation".to_owned(),
        |text| text.to_string(),
    );
    to_python(Error::invalid(place, shown, accepted))
}
