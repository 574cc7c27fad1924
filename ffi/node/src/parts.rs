//! What a node is put together from, as its configuration says.

use std::time::Duration;

use kvcache_core::prefix::data::ModelIdentity;
use kvcache_core::shape::TokensPerBlock;
use kvcache_core::{Error, Result};
use kvfabric_tiers::NameReader;
use kvfabric_transfer::backend::object::{ObjectChecksum, ObjectOptions};
use kvfabric_transfer::{
    Agent, CudaOptions, Priority, Storage, TlsOptions, UcxOptions, VerbsConnect, VerbsOptions,
};

use crate::blocks::Describer;
use crate::config::{
    EngineSection, FabricSection, NodeConfig, OBJECT_STORE, ObjectChecksumSetting, StorageSetting,
    VerbsConnectSetting,
};
use crate::names::Names;

/// Reads the names that others ask this node's peer service about.
pub(crate) fn name_reader(describer: &Describer) -> NameReader {
    let describer = describer.clone();
    NameReader::new(move |packed| {
        let names = Names::parse(packed)?;
        Ok(describer.prefix_of(&names, None)?.infos().to_vec())
    })
}

pub(crate) fn describer(config: &NodeConfig) -> Result<Describer> {
    Ok(Describer {
        model: config.model.clone(),
        identity: ModelIdentity(config.identity()?),
        shard: config.shard()?,
        scheme: config.scheme()?,
        block_tokens: TokensPerBlock::try_from(config.block_tokens)?,
        engine: config.engine.as_ref().map(EngineSection::scheme),
    })
}

pub(crate) fn agent(config: &NodeConfig) -> Result<Agent> {
    let mut builder = Agent::builder(&config.pod)
        .shm(config.fabric.shm)
        .tcp(config.fabric.tcp_listen)
        .tcp_rails(config.fabric.tcp_rails.iter().copied())
        .tcp_connections(config.fabric.tcp_connections)
        .tcp_congestion(config.fabric.tcp_congestion.as_deref())
        .look(Duration::from_micros(config.fabric.look_us))
        .connect_within(Duration::from_millis(config.fabric.connect_within_ms))
        .prefer(&config.fabric.prefer);
    if let Some(files) = &config.fabric.tls {
        let options = TlsOptions::from_files(&files.authorities, &files.certificates, &files.key);
        builder = builder.tcp_tls(Some(options.map_err(|error| error.at("fabric.tls"))?));
    }
    if let Some(cma) = config.fabric.cma {
        builder = builder.cma(cma);
    }
    if config.fabric.ucx {
        let settings = config.fabric.ucx_settings.clone().into_iter().collect();
        builder = builder.ucx(Some(UcxOptions { settings }));
    }
    if config.fabric.verbs {
        builder = builder.verbs(Some(verbs_options(&config.fabric)));
    }
    builder = builder.cuda(cuda_options(&config.fabric)?);
    if let Some(object) = &config.object {
        let mut options = ObjectOptions {
            allow_http: object.allow_http,
            authorities: object.authorities.clone(),
            checksum: match object.checksum {
                ObjectChecksumSetting::Off => ObjectChecksum::Off,
                ObjectChecksumSetting::Sha256 => ObjectChecksum::Sha256,
                ObjectChecksumSetting::Crc64Nvme => ObjectChecksum::Crc64Nvme,
            },
            ..ObjectOptions::default()
        };
        if let Some(bytes) = object.part_bytes {
            options.part_bytes = bytes;
        }
        builder = builder.object_store(OBJECT_STORE, &object.url, options);
    }
    let agent = builder.build()?;
    for (priority, rate, key) in [
        (
            Priority::Normal,
            config.fabric.bytes_per_second,
            "fabric.bytes_per_second",
        ),
        (
            Priority::Background,
            config.fabric.background_bytes_per_second,
            "fabric.background_bytes_per_second",
        ),
    ] {
        agent
            .set_rate(priority, rate)
            .map_err(|error| error.at(key))?;
    }
    Ok(agent)
}

fn verbs_options(fabric: &FabricSection) -> VerbsOptions {
    VerbsOptions {
        device: fabric.verbs_device.clone(),
        rails: fabric.verbs_rails,
        near: fabric.verbs_near.clone(),
        gid_index: fabric.verbs_gid_index,
        connect: match fabric.verbs_connect {
            VerbsConnectSetting::Exchange => VerbsConnect::Exchange,
            VerbsConnectSetting::RdmaCm => VerbsConnect::RdmaCm,
        },
        listen: fabric.verbs_listen,
        mtu: fabric.verbs_mtu,
        traffic_class: fabric.verbs_traffic_class,
        service_level: fabric.verbs_service_level,
        timeout: fabric.verbs_timeout,
        retries: fabric.verbs_retries,
        polling: Duration::from_micros(fabric.verbs_polling_us),
    }
}

/// # Errors
/// `Invalid` for settings of memory of GPUs without it.
fn cuda_options(fabric: &FabricSection) -> Result<Option<CudaOptions>> {
    let storage = match fabric.cuda_storage {
        StorageSetting::Staged => Storage::Staged,
        StorageSetting::Direct => Storage::Direct,
        StorageSetting::Cufile => Storage::Cufile,
    };
    if !fabric.cuda && storage != Storage::Staged {
        let accepted = "\"staged\" without fabric.cuda";
        let value = format!("{storage:?}").to_lowercase();
        return Err(Error::invalid("fabric.cuda_storage", value, accepted));
    }
    Ok(fabric.cuda.then(|| CudaOptions {
        storage,
        ..CudaOptions::default()
    }))
}
