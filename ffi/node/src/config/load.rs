//! Where a configuration comes from: a file, a text or a value; then the environment; then overrides.

use std::path::Path;

use config::builder::DefaultState;
use config::{Config, ConfigBuilder, ConfigError, Environment, File, FileFormat};
use kvcache_core::{Error, ErrorKind, Result};
use serde::Serialize;

use super::{ENVIRONMENT_PREFIX, NodeConfig};

/// Settings that override all others: a key, like `host.bytes`, and its value as text.
pub type Overrides = [(String, String)];

impl NodeConfig {
    /// Reads `file` if one is given, then the environment, then `overrides` (`host.bytes` = `1073741824`).
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`], naming the key or the value and where it came from; [`ErrorKind::NotFound`] for a file
    /// that is not there.
    pub fn load(file: Option<&Path>, overrides: &Overrides) -> Result<Self> {
        let Some(file) = file else {
            return finish(Config::builder(), overrides, "environment, flags");
        };
        // Asked first, because the reader's own error does not say which kind it is.
        std::fs::metadata(file)
            .map_err(|e| Error::io(format!("configuration file {}", file.display()), e))?;
        let builder = Config::builder().add_source(File::from(file).format(FileFormat::Toml));
        let place = format!("{}, environment, flags", file.display());
        finish(builder, overrides, &place)
    }

    /// As [`NodeConfig::load`], from the text of such a file.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`], naming the key or the value.
    pub fn from_toml(text: &str, overrides: &Overrides) -> Result<Self> {
        let builder = Config::builder().add_source(File::from_str(text, FileFormat::Toml));
        finish(builder, overrides, "text, environment, overrides")
    }

    /// As [`NodeConfig::load`], from anything that has the file's tables and keys, such as a nested map.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`], naming the key or the value.
    pub fn from_value(value: &impl Serialize, overrides: &Overrides) -> Result<Self> {
        let place = "value, environment, overrides";
        let value = Config::try_from(value).map_err(|error| invalid(place, &error))?;
        finish(Config::builder().add_source(value), overrides, place)
    }
}

fn finish(
    mut builder: ConfigBuilder<DefaultState>,
    overrides: &Overrides,
    place: &str,
) -> Result<NodeConfig> {
    builder = builder.add_source(
        Environment::with_prefix(ENVIRONMENT_PREFIX)
            .prefix_separator("_")
            .separator("__"),
    );
    for (key, value) in overrides {
        builder = builder
            .set_override(key, value.as_str())
            .map_err(|error| invalid(place, &error))?;
    }
    let config: NodeConfig = builder
        .build()
        .and_then(Config::try_deserialize)
        .map_err(|error| invalid(place, &error))?;
    config
        .check()
        .map_err(|error| error.at(format_args!("configuration ({place})")))?;
    Ok(config)
}

fn invalid(place: &str, error: &ConfigError) -> Error {
    Error::new(
        ErrorKind::Invalid,
        format!("configuration ({place}): {error}"),
    )
}
