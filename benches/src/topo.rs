//! `kv-bench topo`: what is near what, and which network card each GPU should use.

use std::path::PathBuf;

use clap::Args;
use comfy_table::Table;
use comfy_table::presets::UTF8_BORDERS_ONLY;
use kvcache_core::Result;
use serde::Serialize;

use crate::doctor::Topology;
use crate::machine::{Device, Kind, Link, Machine, Port};
use crate::recorder::check_json;
use crate::report::write_json;

/// `kv-bench topo`
#[derive(Args, Debug)]
pub(crate) struct TopoArgs {
    /// Say which RDMA port each GPU should use, and why.
    #[arg(long)]
    plan: bool,
    /// Read `sys` and `proc` below this folder: those of another machine, or a copy.
    #[arg(long, value_name = "FOLDER", default_value = "/")]
    root: PathBuf,
    /// Write what was found to this file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What a GPU should use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Rail {
    gpu: String,
    /// `fabric.verbs_device` of the agent that serves this GPU; none where no port is active.
    rail: Option<String>,
    link: Option<Link>,
    why: String,
    /// The others, each with why not.
    others: Vec<String>,
}

#[derive(Serialize)]
struct Report<'a> {
    tool: &'static str,
    version: &'static str,
    command: &'static str,
    topology: &'a Topology,
    #[serde(skip_serializing_if = "Option::is_none")]
    plan: Option<&'a [Rail]>,
}

/// Prints the matrix or the plan.
///
/// # Errors
/// `Invalid` naming an option, `Io` when the JSON cannot be written.
#[expect(clippy::print_stdout, reason = "what the command is for")]
pub(crate) fn run(args: &TopoArgs) -> Result<()> {
    if let Some(path) = &args.json {
        check_json(path)?;
    }
    let machine = Machine::read_with_driver(&args.root);
    let rails = args.plan.then(|| plan(&machine));
    let topology = Topology::new(machine);
    match (&rails, topology.matrix()) {
        (Some(rails), Some(_)) if !rails.is_empty() => println!("{}", table(rails)),
        (Some(_), _) => println!("no GPU here: nothing to plan"),
        (None, Some(matrix)) => println!("{matrix}"),
        (None, None) => println!("no GPU, network card or NVMe drive here"),
    }
    if let Some(path) = &args.json {
        let report = Report {
            tool: env!("CARGO_PKG_NAME"),
            version: env!("CARGO_PKG_VERSION"),
            command: "topo",
            topology: &topology,
            plan: rails.as_deref(),
        };
        write_json(path, &report)?;
    }
    Ok(())
}

fn table(rails: &[Rail]) -> String {
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY);
    table.set_header(["GPU", "rail", "link", "why", "the others"]);
    for rail in rails {
        let link = rail.link.map(|link| link.to_string()).unwrap_or_default();
        table.add_row([
            rail.gpu.as_str(),
            rail.rail.as_deref().unwrap_or("none"),
            link.as_str(),
            rail.why.as_str(),
            rail.others.join("; ").as_str(),
        ]);
    }
    table.to_string()
}

/// A port that a GPU could use.
struct Candidate<'a> {
    device: &'a Device,
    port: &'a Port,
    /// How far; those without a place are the farthest.
    link: Option<Link>,
    /// The GPUs that use it already.
    users: Vec<String>,
}

impl Candidate<'_> {
    fn rail(&self) -> String {
        format!("{}:{}", self.device.name, self.port.number)
    }

    fn distance(&self) -> (bool, Option<Link>) {
        (self.link.is_none(), self.link)
    }

    /// What is better comes first: nearer, used by fewer, faster, in the order of names.
    fn rank(&self) -> (bool, Option<Link>, usize, u64) {
        let (is_unknown, link) = self.distance();
        (
            is_unknown,
            link,
            self.users.len(),
            u64::MAX - self.port.rate,
        )
    }

    fn place(&self) -> String {
        match self.link {
            Some(link) => format!("{link} ({})", link.meaning()),
            None => "not known how far".to_owned(),
        }
    }
}

/// For each GPU the nearest active port; of several as near ones the one that fewest GPUs have so far, then the fastest.
pub(crate) fn plan(machine: &Machine) -> Vec<Rail> {
    let mut rails: Vec<Rail> = Vec::new();
    for gpu in machine.of(Kind::Gpu) {
        let candidates = machine.of(Kind::Rdma).filter_map(|device| {
            let port = device.port.as_ref()?;
            let name = format!("{}:{}", device.name, port.number);
            let users = rails
                .iter()
                .filter(|one| one.rail.as_deref() == Some(name.as_str()));
            Some(Candidate {
                device,
                port,
                link: machine.link(gpu, device),
                users: users.map(|one| one.gpu.clone()).collect(),
            })
        });
        let mut candidates: Vec<_> = candidates.collect();
        // Stable: names decide last.
        candidates.sort_by_key(Candidate::rank);
        rails.push(choose(machine, gpu, &candidates));
    }
    rails
}

fn choose(machine: &Machine, gpu: &Device, candidates: &[Candidate<'_>]) -> Rail {
    let down = machine.of(Kind::Rdma).filter(|one| one.port.is_none());
    let down = down.map(|one| format!("{}: no active port", one.name));
    let Some((best, others)) = candidates.split_first() else {
        let why = match machine.of(Kind::Rdma).next() {
            Some(_) => "no RDMA port is active",
            None => "no RDMA device",
        };
        return Rail {
            gpu: gpu.name.clone(),
            rail: None,
            link: None,
            why: format!("{why}: TCP"),
            others: down.collect(),
        };
    };
    let as_near = others
        .iter()
        .filter(|one| one.distance() == best.distance());
    let mut why = best.place();
    if as_near.count() > 0 && best.users.is_empty() {
        why.push_str(", and no other GPU has it");
    }
    if !best.users.is_empty() {
        why.push_str(&format!(", shared with {}", best.users.join(", ")));
    }
    if best.link == Some(Link::Sys) {
        why.push_str("; every byte crosses the link between processors");
    }
    let reason = |one: &Candidate<'_>| {
        let reason = if one.distance() != best.distance() {
            one.link
                .map_or("not known how far".to_owned(), |link| link.to_string())
        } else if one.users.len() > best.users.len() {
            format!("as near, used by {}", one.users.join(", "))
        } else if one.port.rate < best.port.rate {
            format!("as near, slower ({} Gbit/s)", one.port.rate)
        } else {
            "as near".to_owned()
        };
        format!("{}: {reason}", one.rail())
    };
    Rail {
        gpu: gpu.name.clone(),
        rail: Some(best.rail()),
        link: best.link,
        why,
        others: others.iter().map(reason).chain(down).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::tree::Tree;

    /// Each GPU has a port of its own below its own switch.
    #[test]
    fn near_ports_are_shared_out() {
        let tree = Tree::large();
        let rails = plan(&Machine::read(tree.root()));
        let chosen: Vec<_> = rails.iter().filter_map(|one| one.rail.as_deref()).collect();
        let wanted: Vec<_> = (0..8).map(|number| format!("mlx5_{number}:1")).collect();
        assert_eq!(chosen, wanted);
        assert!(rails.iter().all(|one| one.link == Some(Link::Pix)));
        assert!(
            rails[1].why.contains("no other GPU has it"),
            "{}",
            rails[1].why
        );
        assert!(
            rails[1]
                .others
                .contains(&"mlx5_0:1: as near, used by GPU0".to_owned()),
            "{:?}",
            rails[1].others
        );
        assert!(rails[0].others.contains(&"mlx5_4:1: SYS".to_owned()));
    }

    /// A port that is down is passed over, a farther one shared, and all of that is said.
    #[test]
    fn a_port_that_is_down_is_passed_over() {
        let tree = Tree::large();
        for device in ["mlx5_0", "mlx5_1"] {
            let port = tree
                .root()
                .join("sys/class/infiniband")
                .join(device)
                .join("ports/1/state");
            std::fs::write(port, "1: DOWN\n").unwrap();
        }
        let rails = plan(&Machine::read(tree.root()));
        assert_eq!(rails[0].rail.as_deref(), Some("mlx5_2:1"));
        assert_eq!(rails[0].link, Some(Link::Node));
        assert!(
            rails[0]
                .others
                .contains(&"mlx5_0: no active port".to_owned())
        );
        assert_eq!(rails[1].rail.as_deref(), Some("mlx5_3:1"));
        assert_eq!(rails[2].rail.as_deref(), Some("mlx5_2:1"));
        assert!(
            rails[2].why.contains("shared with GPU0"),
            "{}",
            rails[2].why
        );
    }

    /// Neither a device nor an active port.
    #[test]
    fn without_a_port_there_is_tcp() {
        let tree = Tree::new(&["0-7"]);
        tree.gpu("pci0000:00/0000:00:05.0", 0);
        let rails = plan(&Machine::read(tree.root()));
        assert_eq!(rails[0].rail, None);
        assert_eq!(rails[0].why, "no RDMA device: TCP");
        tree.rdma("mlx5_0", "pci0000:00/0000:00:06.0", 0, "1: DOWN");
        let rails = plan(&Machine::read(tree.root()));
        assert_eq!(rails[0].why, "no RDMA port is active: TCP");
    }

    /// A slower port as near, and one across the processors.
    #[test]
    fn the_faster_of_two_as_near_goes_first() {
        let tree = Tree::new(&["0-3", "4-7"]);
        tree.gpu("pci0000:00/0000:00:05.0", 0);
        tree.rdma("mlx5_0", "pci0000:00/0000:00:06.0", 0, "4: ACTIVE");
        tree.rdma("mlx5_1", "pci0000:00/0000:00:07.0", 0, "4: ACTIVE");
        let rate = tree.root().join("sys/class/infiniband/mlx5_0/ports/1/rate");
        std::fs::write(rate, "200 Gb/sec (4X HDR)\n").unwrap();
        let rails = plan(&Machine::read(tree.root()));
        assert_eq!(rails[0].rail.as_deref(), Some("mlx5_1:1"));
        assert_eq!(rails[0].others, ["mlx5_0:1: as near, slower (200 Gbit/s)"]);
        let far = Tree::new(&["0-3", "4-7"]);
        far.gpu("pci0000:00/0000:00:05.0", 0);
        far.rdma("mlx5_0", "pci0000:80/0000:80:06.0", 1, "4: ACTIVE");
        let rails = plan(&Machine::read(far.root()));
        assert!(rails[0].why.contains("crosses"), "{}", rails[0].why);
    }
}
