//! What the driver says of GPUs and of the links between them.

use super::{Finding, State};
use crate::machine::{Gpus, Kind, Machine};

const NVLINK: &str = "gpu: NVLink";

/// Nothing where there is no GPU, or where the files are another machine's.
pub(super) fn findings(machine: &Machine) -> Vec<Finding> {
    if let Some(driver) = &machine.driver {
        let name = |address: &str| {
            let mut gpus = machine.of(Kind::Gpu);
            let found = gpus.find(|one| one.address.as_deref() == Some(address));
            found.map_or(address.to_owned(), |one| one.name.clone())
        };
        return of(driver, &name);
    }
    if machine.of(Kind::Gpu).next().is_none() {
        return Vec::new();
    }
    let found = match &machine.driver_refusal {
        Some(reason) => format!("not read: {reason}"),
        None => "not read: these files are another machine's".to_owned(),
    };
    let advice = "the matrix has PCI only, and whether GPUs reach each other is not known: nvidia-smi topo -m";
    vec![Finding::new(NVLINK, State::Absent, found, advice)]
}

fn of(driver: &Gpus, name: &dyn Fn(&str) -> String) -> Vec<Finding> {
    let mut findings = vec![links(driver, name)];
    findings.extend(peers(driver, name));
    let mut hints = |what: &str, found: Vec<String>, advice: &str| {
        if !found.is_empty() {
            let finding = Finding::new(what, State::Hint, found.join("; "), advice);
            findings.push(finding);
        }
    };
    let each = |told: &dyn Fn(&crate::machine::Gpu) -> Option<String>| -> Vec<String> {
        let told = |gpu| told(gpu).map(|text| format!("{}: {text}", name(&gpu.address)));
        driver.gpus.iter().filter_map(told).collect()
    };
    hints(
        "gpu: NVLink errors",
        each(&|gpu| {
            let sum: u64 = gpu.links.iter().map(|link| link.errors).sum();
            (sum > 0).then(|| format!("{sum} since the driver was loaded"))
        }),
        "costs what is sent again; when they grow under load (nvidia-smi nvlink -e), the link or the board is bad",
    );
    hints(
        "gpu: BAR1",
        each(&|gpu| {
            let (window, memory) = (gpu.bar1_bytes?, gpu.memory_bytes?);
            let mib = |bytes: u64| bytes >> 20;
            (window < memory)
                .then(|| format!("{} MiB of {} MiB of memory", mib(window), mib(memory)))
        }),
        "network cards reach no more than that of a GPU's memory at a time, so a larger cache cannot be registered as a whole: large BAR (Above 4G Decoding, Resizable BAR) in the firmware",
    );
    hints(
        "gpu: instances (MIG)",
        each(&|gpu| gpu.is_divided.then(|| "divided".to_owned())),
        "instances do not reach each other's memory: transfers between them go through host memory",
    );
    hints(
        "gpu: clocks",
        each(&|gpu| {
            (!gpu.slowed_by.is_empty()).then(|| format!("slowed by {}", gpu.slowed_by.join(", ")))
        }),
        "figures of this moment are lower than the GPU's own",
    );
    hints(
        "gpu: lost",
        driver.lost.clone(),
        "it serves nobody until the driver is loaded again or the machine restarted: dmesg says why (Xid)",
    );
    findings
}

/// Which links are up.
fn links(driver: &Gpus, name: &dyn Fn(&str) -> String) -> Finding {
    let with: Vec<_> = driver
        .gpus
        .iter()
        .filter(|gpu| !gpu.links.is_empty())
        .collect();
    if with.is_empty() {
        return Finding::ok(
            NVLINK,
            format!("these GPUs have none; driver {}", driver.driver),
        );
    }
    let (mut up, mut down) = (Vec::new(), Vec::new());
    for gpu in with {
        let active = gpu.links.iter().filter(|link| link.is_active).count();
        let version = gpu.links.iter().find_map(|link| link.version);
        let version = version.map_or(String::new(), |version| format!(" (version {version})"));
        let (name, all) = (name(&gpu.address), gpu.links.len());
        up.push(format!("{name}: {active}{version}"));
        if active < all {
            down.push(format!("{name}: {active} of {all}"));
        }
    }
    if down.is_empty() {
        return Finding::ok(
            NVLINK,
            format!("links up: {}; driver {}", up.join(", "), driver.driver),
        );
    }
    Finding::new(
        NVLINK,
        State::Hint,
        format!("links up: {}; driver {}", down.join(", "), driver.driver),
        "costs the bandwidth of those that are down, between all GPUs where it is all of them: the fabric manager has to run (nvidia-fabricmanager), nvidia-smi nvlink -s names them; without \
         neighbours to be linked to, all is well",
    )
}

/// Whether GPUs reach each other's memory; nothing for a single one.
fn peers(driver: &Gpus, name: &dyn Fn(&str) -> String) -> Option<Finding> {
    let what = "gpu: peers";
    let pairs = &driver.pairs;
    if pairs.is_empty() {
        return None;
    }
    let refused = pairs.iter().filter_map(|pair| {
        let reason = pair.refusal.as_ref()?;
        Some(format!(
            "{}–{} {reason}",
            name(&pair.one),
            name(&pair.other)
        ))
    });
    let refused: Vec<_> = refused.collect();
    if refused.is_empty() {
        return Some(Finding::ok(what, "each reaches the memory of each"));
    }
    let advice =
        "costs the way through host memory, down and up again, for all that goes between them";
    Some(Finding::new(what, State::Hint, refused.join("; "), advice))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{Gpu, NvLink, Pair};

    fn gpu(number: u32, active: usize, links: usize) -> Gpu {
        let link = |place| NvLink {
            is_active: place < active,
            version: Some(4),
            remote: None,
            errors: 0,
        };
        Gpu {
            address: number.to_string(),
            bar1_bytes: Some(128 << 30),
            memory_bytes: Some(80 << 30),
            links: (0..links).map(link).collect(),
            ..Gpu::default()
        }
    }

    fn two(one: Gpu, other: Gpu, refusal: Option<&str>) -> Gpus {
        let pair = Pair {
            one: "0".to_owned(),
            other: "1".to_owned(),
            links: 18,
            refusal: refusal.map(str::to_owned),
        };
        Gpus {
            driver: "570.86".to_owned(),
            gpus: vec![one, other],
            pairs: vec![pair],
            lost: Vec::new(),
        }
    }

    fn told(driver: &Gpus) -> Vec<(String, State, String)> {
        let found = of(driver, &|address| format!("GPU{address}"));
        let row = |one: Finding| {
            assert_eq!(one.state == State::Ok, one.advice.is_empty(), "{one:?}");
            (one.what, one.state, one.found)
        };
        found.into_iter().map(row).collect()
    }

    #[test]
    fn gpus_that_lack_nothing_are_two_lines() {
        let found = told(&two(gpu(0, 18, 18), gpu(1, 18, 18), None));
        let states: Vec<_> = found.iter().map(|row| row.1).collect();
        assert_eq!(states, [State::Ok, State::Ok], "{found:?}");
        assert_eq!(
            found[0].2,
            "links up: GPU0: 18 (version 4), GPU1: 18 (version 4); driver 570.86"
        );
        assert_eq!(found[1].2, "each reaches the memory of each");
    }

    #[test]
    fn each_thing_that_a_gpu_lacks_is_named() {
        let mut bad = gpu(1, 17, 18);
        bad.links[3].errors = 7;
        bad.bar1_bytes = Some(256 << 20);
        bad.is_divided = true;
        bad.slowed_by = vec!["heat", "its power limit"];
        let mut all = two(gpu(0, 18, 18), bad, Some("not by this chipset"));
        all.lost.push("GPU 2: the GPU is lost".to_owned());
        let found = told(&all);
        for (what, text) in [
            (NVLINK, "links up: GPU1: 17 of 18; driver 570.86"),
            ("gpu: peers", "GPU0–GPU1 not by this chipset"),
            ("gpu: NVLink errors", "GPU1: 7 since the driver was loaded"),
            ("gpu: BAR1", "GPU1: 256 MiB of 81920 MiB of memory"),
            ("gpu: instances (MIG)", "GPU1: divided"),
            ("gpu: clocks", "GPU1: slowed by heat, its power limit"),
            ("gpu: lost", "GPU 2: the GPU is lost"),
        ] {
            let row = (what.to_owned(), State::Hint, text.to_owned());
            assert!(found.contains(&row), "{what}: {found:?}");
        }
    }

    #[test]
    fn a_gpu_without_nvlink_and_neighbours_is_one_line() {
        let alone = Gpus {
            driver: "535.1".to_owned(),
            gpus: vec![gpu(0, 0, 0)],
            ..Gpus::default()
        };
        let found = told(&alone);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].2, "these GPUs have none; driver 535.1");
    }
}
