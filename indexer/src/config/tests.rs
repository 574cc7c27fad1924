use std::collections::HashMap;
use std::io::Write;

use kvcache_core::PodName;

use super::*;

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::Builder::new()
        .suffix(".toml")
        .tempfile()
        .expect("temporary file");
    file.write_all(text.as_bytes()).expect("write");
    file
}

fn environment(variables: &[(&str, &str)]) -> Environment {
    let variables: HashMap<String, String> = variables
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
    Environment::with_prefix(ENVIRONMENT_PREFIX).source(Some(variables))
}

/// One key from each place, and one that all three set.
#[test]
fn flags_win_over_the_environment_and_that_over_the_file() {
    let file = file("block_size = 1\nsource_ttl_ms = 5\nkey_scheme = \"xxh64:A\"\n");
    let environment = environment(&[
        ("KVFABRIC_INDEXER_BLOCK_SIZE", "2"),
        ("KVFABRIC_INDEXER_SOURCE_TTL_MS", "6"),
        ("KVFABRIC_INDEXER_TIER_WEIGHTS__DRAM", "0.25"),
    ]);
    let flags = [("block_size", "3".to_owned())];
    let config = ServerConfig::load_with(Some(file.path()), environment, &flags).unwrap();
    assert_eq!(config.block_size, 3);
    assert_eq!(config.source_ttl_ms, 6);
    assert_eq!(config.key_scheme, "xxh64:A");
    assert_eq!(config.tier_weights.dram, 0.25);
    assert_eq!(config.tier_weights.hbm, 1.0);
}

/// A misspelt key at the top, inside a table, inside a list, and in the environment.
#[test]
fn an_unknown_key_is_an_error_that_names_it() {
    for text in [
        "blok_size = 16",
        "[tier_weights]\nblok_size = 1.0",
        "[[sources]]\npod = \"p\"\nendpoint = \"tcp://127.0.0.1:1\"\nblok_size = 1",
    ] {
        let file = file(text);
        let error = ServerConfig::load_with(Some(file.path()), environment(&[]), &[]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        let said = error.to_string();
        assert!(said.contains("blok_size"), "{said}");
        assert!(said.contains(&file.path().display().to_string()), "{said}");
    }
    let environment = environment(&[("KVFABRIC_INDEXER_BLOK_SIZE", "16")]);
    let error = ServerConfig::load_with(None, environment, &[]).unwrap_err();
    assert!(error.to_string().contains("blok_size"), "{error}");
}

/// Values of the right type that no index could work with, and one of the wrong type.
#[test]
fn a_value_that_does_not_fit_is_named_with_its_key() {
    for (text, key) in [
        ("block_size = 0", "block_size"),
        ("block_size = \"many\"", "block_size"),
        ("source_ttl_ms = 0", "source_ttl_ms"),
        ("key_scheme = \"md5:1\"", "key_scheme"),
        ("[tier_weights]\nnvme = -1.0", "tier_weights"),
        (
            "[[sources]]\npod = \"a b\"\nendpoint = \"tcp://127.0.0.1:1\"",
            "sources[0]",
        ),
        (
            "[[sources]]\npod = \"a\"\nkind = \"x\"\nendpoint = \"tcp://h:1\"",
            "sources[0]",
        ),
    ] {
        let file = file(text);
        let error = ServerConfig::load_with(Some(file.path()), environment(&[]), &[]).unwrap_err();
        assert!(error.to_string().contains(key), "{text}: {error}");
    }
}

/// Model names keep their case and their dots.
#[test]
fn tokenizers_and_sources_are_lists_of_tables() {
    let file = file(
        "[[tokenizers]]\nmodel = \"Qwen/Qwen3-0.6B\"\npath = \"/models/Q.json\"\n\
         [[sources]]\npod = \"10.0.0.1:8000\"\nendpoint = \"tcp://10.0.0.1:5557\"\nmodel = \"M\"\n",
    );
    let config = ServerConfig::load_with(Some(file.path()), environment(&[]), &[]).unwrap();
    assert_eq!(config.tokenizers[0].model, "Qwen/Qwen3-0.6B");
    assert_eq!(config.tokenizers[0].path, Path::new("/models/Q.json"));
    assert_eq!(config.sources[0].name, "engine");
    assert_eq!(config.sources[0].specs().unwrap()[0].kind.name(), "vllm");
}

/// The defaults themselves must pass the check.
#[test]
fn without_any_setting_the_index_listens_on_loopback() {
    let config = ServerConfig::load_with(None, environment(&[]), &[]).unwrap();
    assert_eq!(config, ServerConfig::default());
    assert!(config.grpc_listen.ip().is_loopback());
}

/// No size, none at all, an unknown unit, shares that exceed the whole, nothing left for the rest, names that are none,
/// and what two tenants claim.
#[test]
fn bytes_and_tenants_that_make_no_sense_are_refused_by_name() {
    for (text, named) in [
        ("max_bytes = \"0\"", "max_bytes is \"0\""),
        ("max_bytes = \"12x\"", "max_bytes is \"12x\""),
        ("max_bytes = \"much\"", "max_bytes is \"much\""),
        ("max_bytes = \"99999999TiB\"", "99999999TiB"),
        (
            "max_bytes = \"64MiB\"\n[tenants.a]\nmax_bytes = \"1 PiB\"",
            "tenants.a.max_bytes is \"1 PiB\"",
        ),
        (
            "max_bytes = \"64MiB\"\n[tenants.a]\nmax_bytes = \"65MiB\"",
            "68157440",
        ),
        (
            "max_bytes = \"64MiB\"\n[tenants.a]\nmax_bytes = \"60MiB\"",
            "leaves 4194304",
        ),
        ("[tenants.\"a b\"]\npods = [\"p\"]", "\"a b\""),
        ("[tenants.a]\npods = [\"\"]", "tenants.a.pods"),
        (
            "[tenants.default]\nmodels = [\"m\"]",
            "tenants.default.models",
        ),
        (
            "[tenants.a]\nmodels = [\"m\"]\n[tenants.b]\nmodels = [\"m\"]",
            "tenants.b.models: \"m\"",
        ),
        ("[tenants.a]\nbites = 1", "bites"),
    ] {
        let file = file(text);
        let error = ServerConfig::load_with(Some(file.path()), environment(&[]), &[]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains(named), "{text}: {error}");
    }
    let many: String = (0..TENANTS_MAX)
        .map(|tenant| format!("[tenants.t{tenant}]\n"))
        .collect();
    let file = file(&many);
    let error = ServerConfig::load_with(Some(file.path()), environment(&[]), &[]).unwrap_err();
    assert!(error.to_string().contains("tenants is 65"), "{error}");
}

/// A whole with one share given by name, in a unit and as a number; pods by the longest beginning, then by model.
#[test]
fn tenants_have_the_shares_pods_and_models_that_they_are_given() {
    let text = "max_bytes = \"1GiB\"\n\
        [tenants.a]\nmax_bytes = 268435456\npods = [\"a-\"]\nmodels = [\"m\"]\n\
        [tenants.b]\npods = [\"a-b-\"]";
    let file = file(text);
    let config = ServerConfig::load_with(Some(file.path()), environment(&[]), &[]).unwrap();
    let tenants = Tenants::new(&config).unwrap();
    let shares: Vec<_> = tenants
        .all()
        .iter()
        .map(|tenant| (tenant.name.as_str(), tenant.bytes_max.unwrap() >> 20))
        .collect();
    assert_eq!(shares, [("default", 384), ("a", 256), ("b", 384)]);
    let of = |pod: &str, model: &str| tenants.of_pod(&PodName::new(pod).unwrap(), model);
    assert_eq!(
        (of("x", ""), of("x", "m"), of("a-1", "n"), of("a-b-1", "m")),
        (0, 1, 1, 2)
    );
    assert_eq!(tenants.of_question("", "m").unwrap(), 1);
    assert_eq!(tenants.of_question("b", "m").unwrap(), 2);
    assert_eq!(tenants.of_question("default", "m").unwrap(), 0);
    let unlimited = ServerConfig {
        max_bytes: Some("unlimited".to_owned()),
        ..ServerConfig::default()
    };
    let unlimited = Tenants::new(&unlimited).unwrap();
    assert_eq!(unlimited.all()[0].bytes_max, None);
}

/// In the file and the environment, in any case of letters; and words that are no use of a medium.
#[test]
fn media_are_taken_for_what_is_configured() {
    use crate::adapter::MediumUse;
    use kvcache_core::Tier;
    let file = file("unknown_media = \"ignore\"\n[media]\nCXL_Pool = \"dram\"\nTAPE = \"refuse\"");
    let environment = environment(&[("KVFABRIC_INDEXER_MEDIA__TAPE", "nvme")]);
    let config = ServerConfig::load_with(Some(file.path()), environment, &[]).unwrap();
    let media = config.media().unwrap();
    assert_eq!(media.of("cxl_POOL"), (MediumUse::Tier(Tier::Host), true));
    assert_eq!(media.of("tape"), (MediumUse::Tier(Tier::Disk), true));
    assert_eq!(media.of("CPU"), (MediumUse::Tier(Tier::Host), true));
    assert_eq!(media.of("else"), (MediumUse::Ignore, false));
    for (key, value, text) in [
        ("unknown_media", "fast", "unknown_media = \"fast\""),
        ("media.x", "fast", "[media]\nX = \"fast\""),
        ("media.x", "absent", "[media]\nX = { weight = 0.5 }"),
        ("media.cpu", "-0.5", "[media]\nCPU = { weight = -0.5 }"),
        ("media.cpu", "inf", "[media]\nCPU = { weight = inf }"),
        (
            "media.cpu",
            "ignore",
            "[media]\nCPU = { tier = \"ignore\", weight = 1.0 }",
        ),
        ("media.obj", "object", "[media]\nOBJ = { weight = 1.0 }"),
        ("media", "wait", "[media]\nCPU = { wait = 1.0 }"),
    ] {
        let said = load(text).unwrap_err().to_string().to_lowercase();
        assert!(said.contains(key) && said.contains(value), "{said}");
    }
    let media = load("[media]\nCPU = { weight = 0.7 }\nX = { tier = \"nvme\" }").unwrap();
    let media = media.media().unwrap();
    let weight = |medium| media.weight_of(medium).map(|found| found.weight);
    assert_eq!((weight("cpu"), weight("DRAM")), (Some(0.7), Some(0.8)));
    assert_eq!(
        (weight("GPU"), weight("X"), weight("else")),
        (None, None, None)
    );
}

const RANKS: &str = "[[sources]]\npod = \"p\"\nendpoint = \"tcp://10.0.0.7:5557\"\n\
        replay_endpoint = \"tcp://10.0.0.7:6557\"\ndata_parallel_size = 2\n\
        [[listeners]]\nendpoint = \"tcp://127.0.0.1:7000\"\ndata_parallel_size = 2\n\
        [[listeners]]\nname = \"other\"\nendpoint = \"tcp://127.0.0.1:0\"";

fn load(text: &str) -> Result<ServerConfig> {
    let file = file(text);
    ServerConfig::load_with(Some(file.path()), environment(&[]), &[])
}

/// Ranks of a source and of a listener.
#[test]
fn ranks_are_at_the_ports_that_follow() {
    let config = load(RANKS).unwrap();
    let specs = config.sources[0].specs().unwrap();
    let told: Vec<_> = specs
        .iter()
        .map(|spec| {
            let replay = spec.replay_endpoint.as_deref().unwrap();
            (
                spec.name.as_str(),
                spec.endpoint.as_str(),
                replay,
                spec.data_parallel_rank,
            )
        })
        .collect();
    assert_eq!(
        told,
        [
            (
                "engine-0",
                "tcp://10.0.0.7:5557",
                "tcp://10.0.0.7:6557",
                Some(0)
            ),
            (
                "engine-1",
                "tcp://10.0.0.7:5558",
                "tcp://10.0.0.7:6558",
                Some(1)
            ),
        ]
    );
    let listeners = config.listeners_by_rank().unwrap();
    let told: Vec<_> = listeners
        .iter()
        .map(|one| {
            (
                one.name.as_str(),
                one.endpoint.as_str(),
                one.data_parallel_rank,
            )
        })
        .collect();
    assert_eq!(
        told,
        [
            ("engine-0", "tcp://127.0.0.1:7000", Some(0)),
            ("engine-1", "tcp://127.0.0.1:7001", Some(1)),
            ("other", "tcp://127.0.0.1:0", None),
        ]
    );
}

/// Ports beyond the last, or chosen by the system; too many ranks; a rank of ranks.
#[test]
fn ranks_without_ports_are_refused_by_name() {
    let text = RANKS;
    for (bad, said) in [
        (text.replace(":5557", ":65535"), "65535"),
        (
            text.replace("tcp://127.0.0.1:7000", "tcp://127.0.0.1:0"),
            "data_parallel_size",
        ),
        (text.replace("size = 2", "size = 65"), "65"),
        (
            text.replacen("size = 2", "size = 2\ndata_parallel_rank = 1", 1),
            "data_parallel_rank",
        ),
    ] {
        let error = load(&bad).unwrap_err().to_string();
        assert!(error.contains(said), "{said}: {error}");
    }
}
