//! Without a GPU: the driver is a stand-in, everything else is as it runs.

use kvcache_core::ErrorKind;
use kvfabric_transfer::{CudaDevice, CudaDirect, CudaOptions, CudaStandIn, RemoteWrites};

use super::super::fabric::{between_devices, over_device};
use super::super::plan::{Shape, shape};
use super::super::remote::Remote;
use super::*;

const PATHS: [(BackendKind, Way); 3] = [
    (BackendKind::Cuda, Way::Write),
    (BackendKind::Cuda, Way::Read),
    (BackendKind::CudaWithin, Way::Write),
];

fn plan((backend, way): (BackendKind, Way), threads: u32) -> Plan {
    Plan::new(Shape {
        threads,
        ..shape(backend, way)
    })
    .unwrap()
}

/// Up, down and within, by one thread and by three: refused before, verified after.
#[test]
fn blocks_go_to_a_device_and_back() {
    for (path, threads) in PATHS.into_iter().flat_map(|path| [(path, 1), (path, 3)]) {
        let driver = CudaStandIn::new(1);
        let plan = plan(path, threads);
        let mut ours = over_device(&plan, &driver);
        ours.poison().unwrap();
        assert_eq!(ours.verify().unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(ours.move_all().unwrap(), 64 << 10, "{}", plan.case);
        ours.verify().unwrap();
        assert_eq!(ours.move_block(7).unwrap(), 4096);
        ours.verify().unwrap();
        ours.poison().unwrap();
        assert_eq!(ours.verify().unwrap_err().kind(), ErrorKind::Corrupt);
        driver.check();
    }
}

/// From memory of one GPU to that of another agent's, as over a network card and directly, both ways: refused before, verified
/// after.
#[test]
fn blocks_go_between_devices_of_two_agents() {
    let each = [BackendKind::UcxCuda, BackendKind::CudaIpc]
        .into_iter()
        .flat_map(|backend| [(backend, Way::Write), (backend, Way::Read)]);
    for (backend, way) in each {
        let drivers = [CudaStandIn::new(1), CudaStandIn::new(1)];
        // Of one machine, where memory is opened.
        let other = usize::from(backend == BackendKind::UcxCuda);
        let plan = plan((backend, way), 1);
        let path = format!("{}-{}", backend.name(), way.name());
        assert_eq!(plan.shape.path(), path);
        let mut ours = between_devices(&plan, [&drivers[0], &drivers[other]]);
        ours.poison().unwrap();
        assert_eq!(ours.verify().unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(ours.move_all().unwrap(), 64 << 10);
        ours.verify().unwrap();
        drop(ours);
        drivers.iter().for_each(CudaStandIn::check);
    }
}

/// One byte of the device's memory changes after blocks were moved there.
#[test]
fn a_wrong_byte_on_a_device_is_found() {
    let driver = CudaStandIn::new(1);
    let plan = plan(PATHS[0], 1);
    let agent = Agent::builder("one").build().unwrap();
    driver.serve(&agent, CudaOptions::default()).unwrap();
    let memory = driver.allocate(0, plan.shape.total_bytes).unwrap();
    let address = memory.address();
    let device = OnDevice::new(&agent, memory).unwrap();
    let mut moved = vec![0; plan.shape.total_bytes as usize];
    contents::write_source(&plan, |offset, block| {
        moved[offset as usize..][..block.len()].copy_from_slice(block);
        Ok(())
    })
    .unwrap();
    for (&source, &target) in plan.sources().iter().zip(plan.targets()) {
        let start = plan.offset(source) as usize;
        let block = &moved[start..][..plan.shape.block_bytes as usize];
        driver.write(address + plan.offset(target), block);
    }
    let mut device = Remote::Device(device);
    device.verify(&plan).unwrap();
    let wrong = driver.read(address + 5000, 1)[0] ^ 1;
    driver.write(address + 5000, &[wrong]);
    let error = device.verify(&plan).unwrap_err();
    assert!(error.to_string().contains("first block 1"), "{error}");
}

/// The same ways of the driver's own copy.
#[test]
fn the_reference_moves_every_block() {
    for path in PATHS {
        let driver = CudaStandIn::new(1);
        let plan = plan(path, 1);
        let copies = driver.copies(0, plan.shape.total_bytes).unwrap();
        let mut reference = CuMemcpy::new(&plan, copies).unwrap();
        reference.poison().unwrap();
        assert_eq!(reference.verify().unwrap_err().kind(), ErrorKind::Corrupt);
        reference.poison().unwrap();
        assert_eq!(reference.move_all().unwrap(), 64 << 10);
        reference.verify().unwrap();
        reference.verify().unwrap();
        assert_eq!(reference.move_block(15).unwrap(), 4096);
        reference.verify().unwrap();
        reference.poison().unwrap();
        assert_eq!(reference.verify().unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(reference.move_all().unwrap(), 64 << 10);
        reference.verify().unwrap();
        driver.check();
    }
}

/// Every promise is about a case of what `--memory cuda` measures by itself.
#[test]
fn every_goal_is_measured() {
    use clap::Parser;
    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: super::super::TransferArgs,
    }
    let cli = Cli::try_parse_from(["kv-bench", "--memory", "cuda"]).unwrap();
    let plans = cli.args.plans().unwrap();
    let cases: Vec<_> = plans.iter().map(|plan| plan.case.as_str()).collect();
    // Five ways, two orders, eleven sizes; each once.
    assert_eq!(cases.len(), 110);
    for goal in goals().unwrap() {
        let found = cases.iter().filter(|case| **case == goal.case).count();
        assert_eq!(found, 1, "{}", goal.case);
        assert_eq!(goal.metric, "ratio_to_cu_memcpy_async");
    }
    let other = Cli::try_parse_from(["kv-bench", "--memory", "cuda", "--backend", "shm"]);
    let error = other.unwrap().args.plans().unwrap_err();
    assert!(error.to_string().contains("--memory cuda: shm"), "{error}");
}

/// What the head of a report says, and a GPU that there is not.
#[test]
fn a_device_is_described() {
    let report = CudaReport {
        version: (12, 8),
        has_batched_copies: true,
        devices: vec![CudaDevice {
            ordinal: 0,
            name: "A GPU".to_owned(),
            uuid: [1; 16],
            pci: "0000:17:00.0".to_owned(),
            bytes: 80 << 30,
            compute: (9, 0),
            direct: CudaDirect {
                dma_buf: true,
                peer_memory: true,
                peer_memory_mapped: true,
                remote_writes: RemoteWrites::Ordered,
            },
        }],
    };
    let nowhere = tempfile::tempdir().unwrap();
    let pci = |address: &str| Pci::read(nowhere.path(), address);
    let lines = told(&report, 0, "NVRM version: 570\nGCC", pci).unwrap();
    assert_eq!(
        lines,
        [
            "GPU 0: A GPU, 80.0 GiB, compute capability 9.0",
            "driver: CUDA 12.8, copies lists in one call; NVRM version: 570",
            "PCI 0000:17:00.0: link not told",
        ]
    );
    let error = told(&report, 1, "", pci).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("--gpu"), "{error}");
}
