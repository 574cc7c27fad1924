//! Limits, devices and settings of the system, from `/proc`, `/sys` and system calls.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use kvcache_core::Error;
use kvfabric_transfer::{RdmaPort, rdma_cm, rdma_ports};
use rustix::process::{Resource, getrlimit};

use super::{Finding, State};

/// Files and sockets that a node with many peers opens.
const OPEN_FILES_WANTED: u64 = 65_536;
/// What a TCP connection over a long way should be allowed to buffer.
const SOCKET_BYTES_WANTED: u64 = 16 << 20;

/// Everything of the system.
pub(super) fn look(folder: &Path) -> Vec<Finding> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mut findings = vec![
        nodes(&names("/sys/devices/system/node", "node")),
        locked_memory(getrlimit(Resource::Memlock).current),
        open_files(getrlimit(Resource::Nofile).current),
        huge_pages(&read("/sys/kernel/mm/transparent_hugepage/enabled")),
        shared_huge_pages(&read("/sys/kernel/mm/transparent_hugepage/shmem_enabled")),
        other_processes(&read("/proc/sys/kernel/yama/ptrace_scope")),
        congestion(
            &read("/proc/sys/net/ipv4/tcp_congestion_control"),
            &read("/proc/sys/net/ipv4/tcp_available_congestion_control"),
        ),
        buffers(
            "/proc/sys/net/core/rmem_max",
            &read("/proc/sys/net/core/rmem_max"),
        ),
        buffers(
            "/proc/sys/net/core/wmem_max",
            &read("/proc/sys/net/core/wmem_max"),
        ),
        direct(folder),
    ];
    findings.extend(interfaces(Path::new("/sys/class/net")));
    findings.extend(rdma(Path::new("/sys/class/infiniband")));
    // Where there are none, or nothing reads them, the ways say so.
    let ports = rdma_ports().unwrap_or_default();
    findings.extend(ports.iter().map(addresses_of));
    if !ports.is_empty() {
        findings.push(connections(rdma_cm()));
    }
    findings.extend(super::gpus::look(
        &read("/proc/driver/nvidia/version"),
        &ports,
    ));
    findings.push(super::storage::look());
    findings
}

/// Names in a folder that begin so and end in a number; none if there is no folder.
fn names(folder: &str, start: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<_> = names
        .filter(|name| {
            name.strip_prefix(start)
                .is_some_and(|end| end.parse::<u32>().is_ok())
        })
        .collect();
    names.sort();
    names
}

fn nodes(found: &[String]) -> Finding {
    match found.len() {
        0 | 1 => Finding::ok("memory: nodes", "1"),
        count => Finding::new(
            "memory: nodes",
            State::Hint,
            count.to_string(),
            "costs the link between processors for each byte that crosses it: keep an engine, its agent and its network card on one node (numactl; `kv-bench topo --plan`)",
        ),
    }
}

fn locked_memory(limit: Option<u64>) -> Finding {
    let what = "limit: locked memory";
    match limit {
        None => Finding::ok(what, "none"),
        Some(bytes) => Finding::new(
            what,
            State::Hint,
            format!("{bytes} bytes"),
            "costs RDMA for all that is larger: what is registered is pinned. `ulimit -l unlimited`, or CAP_IPC_LOCK",
        ),
    }
}

fn open_files(limit: Option<u64>) -> Finding {
    let what = "limit: open files";
    match limit {
        Some(count) if count < OPEN_FILES_WANTED => Finding::new(
            what,
            State::Hint,
            count.to_string(),
            format!("for many peers: `ulimit -n {OPEN_FILES_WANTED}`"),
        ),
        Some(count) => Finding::ok(what, count.to_string()),
        None => Finding::ok(what, "none"),
    }
}

/// What of the kernel's words is in brackets: `always [madvise] never`.
fn chosen(setting: &str) -> Option<&str> {
    setting
        .split_whitespace()
        .find_map(|word| word.strip_prefix('[')?.strip_suffix(']'))
}

fn huge_pages(setting: &str) -> Finding {
    let what = "memory: huge pages";
    let advice = "the index and memory for transfers ask for them; without, a disk is told of up to 512 times as many pieces: \
                  echo madvise > /sys/kernel/mm/transparent_hugepage/enabled";
    match chosen(setting) {
        Some("never") => Finding::new(what, State::Hint, "never", advice),
        Some(chosen) => Finding::ok(what, chosen),
        None => Finding::new(what, State::Absent, "not told", ""),
    }
}

fn shared_huge_pages(setting: &str) -> Finding {
    let what = "memory: huge pages, shared";
    let advice = "tiers in DRAM share their memory with other processes, and ask for them: \
                  echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled";
    match chosen(setting) {
        Some(chosen @ ("never" | "deny")) => Finding::new(what, State::Hint, chosen, advice),
        Some(chosen) => Finding::ok(what, chosen),
        None => Finding::new(what, State::Absent, "not told", ""),
    }
}

fn other_processes(scope: &str) -> Finding {
    let what = "path: cma";
    match scope.trim() {
        "" | "0" => Finding::ok(what, "processes of one user may copy each other's memory"),
        scope => Finding::new(
            what,
            State::Hint,
            format!("kernel.yama.ptrace_scope is {scope}"),
            "memory that cannot be shared goes over TCP; 0 allows process_vm_readv between processes of one user",
        ),
    }
}

fn congestion(in_force: &str, available: &str) -> Finding {
    let (in_force, available) = (in_force.trim(), available.trim());
    if in_force.is_empty() {
        return Finding::new("tcp: congestion control", State::Absent, "not told", "");
    }
    Finding::ok(
        "tcp: congestion control",
        format!("{in_force} (of {available})"),
    )
}

fn buffers(path: &str, value: &str) -> Finding {
    let what = format!("tcp: {}", path.rsplit('/').next().unwrap_or(path));
    match value.trim().parse::<u64>() {
        Ok(bytes) if bytes < SOCKET_BYTES_WANTED => Finding::new(
            &what,
            State::Hint,
            format!("{bytes} bytes"),
            format!(
                "between hosts: sysctl -w net.core.{}={SOCKET_BYTES_WANTED}",
                path.rsplit('/').next().unwrap_or(path)
            ),
        ),
        Ok(bytes) => Finding::ok(&what, format!("{bytes} bytes")),
        Err(_) => Finding::new(&what, State::Absent, "not told", ""),
    }
}

/// Whether the disk of a folder takes direct I/O.
fn direct(folder: &Path) -> Finding {
    let what = "files: past the page cache";
    let path = folder.join(format!(".kv-bench-doctor-{}", std::process::id()));
    let opened = OpenOptions::new()
        .write(true)
        .create_new(true)
        .custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32)
        .open(&path);
    // Created also where the flag is refused.
    let _ = fs::remove_file(&path);
    match opened {
        Ok(_) => Finding::ok(what, format!("O_DIRECT in {}", folder.display())),
        Err(error) => Finding::new(
            what,
            State::Hint,
            format!("{}: {error}", folder.display()),
            "a disk tier there goes through the page cache; use ext4 or xfs",
        ),
    }
}

fn interfaces(folder: &Path) -> Vec<Finding> {
    let value = |name: &Path, file: &str| {
        fs::read_to_string(name.join(file)).map_or_else(|_| String::new(), |v| v.trim().to_owned())
    };
    let mut findings = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let Some(name) = entry.file_name().to_str().map(str::to_owned) else {
            continue;
        };
        let state = value(&path, "operstate");
        if name == "lo" || state == "down" {
            continue;
        }
        // Virtual ones tell no speed, or a negative one.
        let speed = value(&path, "speed").parse::<i64>().ok();
        let speed = speed.filter(|speed| *speed > 0);
        let speed = speed.map_or_else(|| "speed not told".to_owned(), |mb| format!("{mb} Mbit/s"));
        let mtu = value(&path, "mtu");
        findings.push(Finding::ok(
            &format!("network: {name}"),
            format!("{speed}, MTU {mtu}"),
        ));
    }
    findings.sort_by(|a, b| a.what.cmp(&b.what));
    findings
}

fn rdma(folder: &Path) -> Vec<Finding> {
    let mut findings = Vec::new();
    for device in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Some(name) = device.file_name().to_str().map(str::to_owned) else {
            continue;
        };
        let ports = fs::read_dir(device.path().join("ports"));
        for port in ports.into_iter().flatten().flatten() {
            let value = |file: &str| fs::read_to_string(port.path().join(file)).unwrap_or_default();
            let number = port.file_name().to_string_lossy().into_owned();
            findings.push(port_of(
                &name,
                &number,
                [&value("state"), &value("rate"), &value("link_layer")],
            ));
        }
    }
    if findings.is_empty() {
        let advice = "kvfabric goes over TCP between hosts";
        findings.push(Finding::new("rdma", State::Absent, "no device", advice));
    }
    findings.sort_by(|a, b| a.what.cmp(&b.what));
    findings
}

/// Whether queue pairs can be connected by IP address.
fn connections(there: Result<(), Error>) -> Finding {
    let what = "rdma: connections by rdma_cm";
    match there {
        Ok(()) => Finding::ok(what, "librdmacm and rdma_ucm are there"),
        Err(error) => Finding::new(
            what,
            State::Absent,
            error.to_string(),
            "`verbs` connects queue pairs by its own exchange; for routes of rdma_cm: the package librdmacm1 and the module rdma_ucm",
        ),
    }
}

/// `4: ACTIVE`, `100 Gb/sec (4X EDR)`, `InfiniBand`
fn port_of(device: &str, port: &str, [state, rate, layer]: [&str; 3]) -> Finding {
    let what = format!("rdma: {device} port {port}");
    let state = state.trim();
    let found = format!("{}, {}, {state}", layer.trim(), rate.trim());
    if state.ends_with("ACTIVE") {
        return Finding::new(
            &what,
            State::Hint,
            found,
            "reached by the backends verbs and ucx: fabric.verbs = true or fabric.ucx = true",
        );
    }
    Finding::new(&what, State::Absent, found, "the port is not active")
}

/// By which address peers reach an RDMA port, and what else it has.
fn addresses_of(port: &RdmaPort) -> Finding {
    let what = format!("rdma: {} port {}: address", port.device, port.port);
    let all = port.gids.join(", ");
    let Some(used) = &port.gid_used else {
        let advice =
            "give its network interface an IP address, or name a GID: fabric.verbs_gid_index";
        return Finding::new(&what, State::Absent, format!("GIDs: [{all}]"), advice);
    };
    let (mtu, work) = (port.mtu, port.work_max);
    let buffers = match &port.dma_bufs {
        Ok(()) => "takes dma-bufs".to_owned(),
        Err(reason) => format!("takes no memory of GPUs as dma-bufs: {reason}"),
    };
    let found = format!("{used}; MTU {mtu}, work queues of {work}; {buffers}; GIDs: {all}");
    Finding::ok(&what, found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(finding: Finding) -> (State, bool) {
        (finding.state, finding.advice.is_empty())
    }

    /// What is enough gets no advice, what is not gets some.
    #[test]
    fn limits_are_judged() {
        assert_eq!(state(locked_memory(None)), (State::Ok, true));
        assert_eq!(state(locked_memory(Some(65_536))), (State::Hint, false));
        assert_eq!(state(open_files(Some(1024))), (State::Hint, false));
        assert_eq!(state(open_files(Some(1 << 20))), (State::Ok, true));
        assert_eq!(
            state(buffers("/x/rmem_max", "212992\n")),
            (State::Hint, false)
        );
        assert_eq!(state(buffers("/x/rmem_max", "67108864")), (State::Ok, true));
        assert_eq!(state(buffers("/x/rmem_max", "")).0, State::Absent);
        assert_eq!(state(nodes(&[])), (State::Ok, true));
        assert_eq!(
            state(nodes(&["node0".into(), "node1".into()])),
            (State::Hint, false)
        );
    }

    /// Where something is missing the reason is told, and what adds it.
    #[test]
    fn rdma_cm_is_told_with_what_it_lacks() {
        assert_eq!(state(connections(Ok(()))), (State::Ok, true));
        let reason = "librdmacm not found";
        let lacking = Error::new(kvcache_core::ErrorKind::Unsupported, reason);
        let found = connections(Err(lacking));
        assert!(found.found.contains(reason), "{}", found.found);
        assert_eq!(state(found), (State::Absent, false));
    }

    /// As the kernel writes them.
    #[test]
    fn settings_are_read_as_the_kernel_writes_them() {
        assert_eq!(huge_pages("always [madvise] never\n").found, "madvise");
        assert_eq!(
            state(huge_pages("always madvise [never]")),
            (State::Hint, false)
        );
        let shared = |chosen| state(shared_huge_pages(chosen));
        let never = "always within_size advise [never] deny force\n";
        assert_eq!(shared(never), (State::Hint, false));
        let advise = "always within_size [advise] never deny force\n";
        assert_eq!(shared(advise), (State::Ok, true));
        assert_eq!(state(other_processes("1\n")), (State::Hint, false));
        assert_eq!(state(other_processes("0\n")), (State::Ok, true));
        assert_eq!(
            congestion("bbr\n", "reno cubic bbr\n").found,
            "bbr (of reno cubic bbr)"
        );
        let active = port_of(
            "mlx5_0",
            "1",
            ["4: ACTIVE\n", "400 Gb/sec (4X NDR)\n", "InfiniBand\n"],
        );
        assert_eq!(active.found, "InfiniBand, 400 Gb/sec (4X NDR), 4: ACTIVE");
        assert_eq!(active.state, State::Hint);
        let down = port_of("mlx5_1", "1", ["1: DOWN", "10 Gb/sec", "Ethernet"]);
        assert_eq!(down.state, State::Absent);
    }

    /// A folder as the kernel lays out its devices.
    #[test]
    fn devices_are_found_by_their_folders() {
        let root = tempfile::tempdir().unwrap();
        let port = root.path().join("rxe0/ports/1");
        fs::create_dir_all(&port).unwrap();
        for (file, text) in [
            ("state", "4: ACTIVE"),
            ("rate", "2.5 Gb/sec"),
            ("link_layer", "Ethernet"),
        ] {
            fs::write(port.join(file), text).unwrap();
        }
        let found = rdma(root.path());
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].what, "rdma: rxe0 port 1");
        assert_eq!(rdma(&root.path().join("nowhere"))[0].state, State::Absent);
        let card = root.path().join("eth0");
        fs::create_dir_all(&card).unwrap();
        for (file, text) in [("operstate", "up"), ("speed", "-1"), ("mtu", "1500")] {
            fs::write(card.join(file), text).unwrap();
        }
        let found = interfaces(root.path());
        assert!(
            found
                .iter()
                .any(|one| one.what == "network: eth0" && one.found == "speed not told, MTU 1500")
        );
    }

    /// A port with two GIDs, and one without any.
    #[test]
    fn an_rdma_port_tells_how_it_is_reached() {
        let mut port = RdmaPort {
            device: "rxe0".to_owned(),
            port: 1,
            is_active: true,
            is_ethernet: true,
            mtu: 4096,
            gids: vec![
                "fe80::1 (index 0)".to_owned(),
                "10.9.0.1 (index 1)".to_owned(),
            ],
            gid_used: Some("10.9.0.1 (index 1)".to_owned()),
            work_max: 16384,
            dma_bufs: Ok(()),
        };
        let found = addresses_of(&port);
        assert_eq!(found.what, "rdma: rxe0 port 1: address");
        assert_eq!(
            found.found,
            "10.9.0.1 (index 1); MTU 4096, work queues of 16384; takes dma-bufs; GIDs: fe80::1 (index 0), 10.9.0.1 (index 1)"
        );
        port.gid_used = None;
        assert_eq!(addresses_of(&port).state, State::Absent);
    }
}
