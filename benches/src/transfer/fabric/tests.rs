//! What requests leave behind.

use std::path::Path;

use kvcache_core::ErrorKind;

use super::super::plan::{Shape, shape};
use super::super::target::cuda;
use super::*;
use kvfabric_transfer::{CudaOptions, CudaStandIn, UcxOptions};

fn fabric(backend: BackendKind, way: Way, folder: &Path) -> Fabric {
    open(shape(backend, way), folder)
}

fn open(shape: Shape, folder: &Path) -> Fabric {
    let plan = Plan::new(shape).unwrap();
    Fabric::open(
        &plan,
        &TargetAt::Spawned,
        DirectMode::Auto,
        Storage::folder(folder),
    )
    .unwrap()
}

/// Over a stand-in of the CUDA driver, which has no device.
pub(in super::super) fn over_device(plan: &Plan, driver: &CudaStandIn) -> Fabric {
    let agent = Agent::builder("one").build().unwrap();
    driver.serve(&agent, CudaOptions::default()).unwrap();
    let memory = || driver.allocate(0, plan.shape.total_bytes).unwrap();
    let (remote, places) = sides::device_remote(&agent, memory()).unwrap();
    if plan.shape.backend == BackendKind::Cuda {
        return Fabric::over(plan, agent, remote, places).unwrap();
    }
    let source = OnDevice::new(&agent, memory()).unwrap();
    Fabric::within(plan, agent, source, remote, places).unwrap()
}

/// Between memory of two stand-ins of the CUDA driver, or of one, within this process.
pub(in super::super) fn between_devices(plan: &Plan, drivers: [&CudaStandIn; 2]) -> Fabric {
    let backend = plan.shape.backend;
    let agents = drivers.map(|driver| {
        let builder = Agent::builder("one").memcpy(false).shm(false);
        let ucx = (backend == BackendKind::UcxCuda).then(UcxOptions::default);
        let agent = builder.ucx(ucx).build().unwrap();
        driver.open_memory();
        driver.serve(&agent, cuda(backend)).unwrap();
        agent
    });
    let memory = |at: usize| drivers[at].allocate(0, plan.shape.total_bytes).unwrap();
    let options = RegionOptions {
        remote_read: true,
        remote_write: true,
    };
    let far = OnDevice::exported(&agents[1], memory(1), options).unwrap();
    let peer = agents[0].load_peer(&agents[1].metadata()).unwrap();
    let region = far.memory.id();
    sides::check_path(&agents[0], (&peer, region), backend).unwrap();
    let places = Places::Peer(peer, region);
    let near = OnDevice::new(&agents[0], memory(0)).unwrap();
    Fabric::within(plan, agents[0].clone(), near, Remote::Device(far), places).unwrap()
}

/// Every backend of one process in both directions: not verified before, verified after.
#[test]
fn what_was_moved_is_verified_and_what_was_not_is_refused() {
    for backend in [BackendKind::Memcpy, BackendKind::File, BackendKind::Object] {
        for way in [Way::Read, Way::Write] {
            let folder = tempfile::tempdir().unwrap();
            let mut fabric = fabric(backend, way, folder.path());
            fabric.poison().unwrap();
            let error = fabric.verify().unwrap_err();
            assert_eq!(
                error.kind(),
                ErrorKind::Corrupt,
                "{backend:?} {way:?}: {error}"
            );
            assert_eq!(fabric.move_all().unwrap(), 64 << 10);
            fabric.verify().unwrap();
            assert_eq!(fabric.move_block(70).unwrap(), 4096);
            fabric.verify().unwrap();
        }
    }
}

/// Changes one byte of each kind of target after it was written rightly.
#[test]
fn a_corrupted_target_is_found() {
    let folder = tempfile::tempdir().unwrap();
    for backend in [BackendKind::Memcpy, BackendKind::File, BackendKind::Object] {
        let mut fabric = fabric(backend, Way::Write, folder.path());
        fabric.move_all().unwrap();
        fabric.verify().unwrap();
        match &fabric.remote {
            Remote::Own(region) => region.write_at(5000, b"wrong").unwrap(),
            Remote::Files(files) => {
                crate::transfer::remote::write_file(&files.paths[0], 5000, b"wrong").unwrap();
            }
            Remote::Process(_) | Remote::Objects(_) | Remote::Device(_) | Remote::Elsewhere => {
                panic!("{backend:?} needs neither another process nor a store")
            }
        }
        let error = fabric.verify().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(
            error
                .to_string()
                .contains("1 of 16 blocks are wrong, first block 1"),
            "{error}"
        );
    }
}

/// Requests that are made each time, by three threads with a window of one: every block arrives once.
#[test]
fn threads_and_one_shot_requests_move_every_block_once() {
    let folder = tempfile::tempdir().unwrap();
    for backend in [BackendKind::Memcpy, BackendKind::File, BackendKind::Object] {
        for way in [Way::Read, Way::Write] {
            let mut fabric = open(
                Shape {
                    threads: 3,
                    in_flight: 1,
                    calls: Calls::OneShot,
                    ..shape(backend, way)
                },
                folder.path(),
            );
            fabric.poison().unwrap();
            assert_eq!(fabric.move_all().unwrap(), 64 << 10);
            assert!(fabric.first_done().is_some());
            fabric.verify().unwrap();
            assert_eq!(fabric.move_block(3).unwrap(), 4096);
            fabric.verify().unwrap();
        }
    }
}
