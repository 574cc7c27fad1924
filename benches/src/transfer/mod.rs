//! `kv-bench transfer`: blocks over each backend, beside references that alternate with it.

mod args;
mod contents;
mod control;
mod devices;
mod fabric;
mod goals;
mod listen;
mod measure;
mod mesh;
mod models;
mod objects;
mod plan;
mod polling;
mod process;
mod program;
mod protocol;
mod raw_tcp;
mod references;
mod remote;
mod subject;
mod target;

use std::path::PathBuf;

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_transfer::{CudaCopies, DirectMode};

use crate::recorder::Recorder;

pub(crate) use self::args::{Role, TransferArgs};
pub(crate) use self::goals::run as run_goals;
pub(crate) use self::listen::listen;
pub(crate) use self::mesh::run as run_mesh;
pub(crate) use self::models::list as list_models;
use self::objects::Storage;
pub(crate) use self::plan::BackendKind as PathKind;
use self::plan::{BackendKind, Calls, Order, Plan, Shape, Way};
use self::process::TargetAt;
use self::program::{Program, Rival};
use self::subject::Subject;
pub(crate) use self::target::serve as serve_target;

/// Measures every combination that was asked for.
///
/// # Errors
/// `Invalid` naming an option; `Corrupt` when bytes did not arrive as they left; what the backends say.
pub(crate) fn run(args: &TransferArgs, recorder: &mut Recorder) -> Result<()> {
    let plans = args.plans()?;
    let targets = args.targets();
    let folder = folder(args.dir.as_ref())?;
    let storage = Storage {
        folder: folder.path(),
        store: args.store_at(),
        gpu: args.gpu,
    };
    let has_device = plans.iter().any(|plan| plan.shape.backend.is_on_device());
    if has_device {
        recorder.state(devices::facts(args.gpu)?);
    }
    let rivals = Rival::chosen(&args.rivals, args.gpu);
    recorder.expect_steps((plans.len() * targets.len()) as u64);
    for (name, at) in &targets {
        for plan in &plans {
            if recorder.stop().is_set() {
                return Ok(());
            }
            let mut plan = plan.clone();
            if let Some(name) = name {
                plan.case = format!("{name}-{}", plan.case);
            }
            recorder.say(plan.case.clone());
            let direct = DirectMode::from(args.direct);
            let mut subjects: Vec<Box<dyn Subject>> =
                vec![Box::new(fabric::Fabric::open(&plan, at, direct, storage)?)];
            if !args.no_references {
                subjects.append(&mut references(&plan, at, direct, storage)?);
                subjects.append(&mut beside(&plan, at, &rivals, recorder));
            }
            measure::measure(&args.effort.effort(), &plan, subjects, recorder)?;
            recorder.step();
        }
    }
    if has_device && !args.no_references {
        crate::goals::conclude(devices::goals()?, recorder);
    }
    Ok(())
}

/// Whether a way to another process of this host works: what is told of it.
///
/// # Errors
/// Why it does not.
pub(crate) fn try_path(kind: PathKind) -> Result<String> {
    let shape = Shape {
        backend: kind,
        way: Way::Write,
        block_bytes: 4096,
        total_bytes: 4096,
        request_blocks: 1,
        order: Order::Contiguous,
        seed: 0,
        threads: 1,
        in_flight: 1,
        calls: Calls::Prepared,
        layers: None,
    };
    fabric::path_to_another_process(shape)
}

fn folder(dir: Option<&PathBuf>) -> Result<tempfile::TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix("kv-bench-");
    match dir {
        Some(dir) if !dir.is_dir() => {
            let context = format!("--dir {}: no such folder", dir.display());
            Err(Error::new(ErrorKind::Invalid, context))
        }
        Some(dir) => builder
            .tempdir_in(dir)
            .map_err(|error| Error::io(format!("--dir {}", dir.display()), error)),
        None => builder
            .tempdir()
            .map_err(|error| Error::io("make a temporary folder", error)),
    }
}

/// The plainest means to move the same bytes, which stand beside ours.
fn references(
    plan: &Plan,
    at: &TargetAt,
    direct: DirectMode,
    storage: Storage<'_>,
) -> Result<Vec<Box<dyn Subject>>> {
    let folder = storage.folder;
    let memcpy = || references::Memcpy::new(plan).map(Box::new);
    Ok(match plan.shape.backend {
        BackendKind::Memcpy | BackendKind::Cma | BackendKind::Ucx | BackendKind::Verbs => {
            vec![memcpy()?]
        }
        BackendKind::Shm => vec![memcpy()?, Box::new(references::MappedLoop::new(plan)?)],
        BackendKind::Tcp => vec![
            Box::new(raw_tcp::RawTcp::connect(plan, at, false)?),
            Box::new(raw_tcp::RawTcp::connect(plan, at, true)?),
            memcpy()?,
        ],
        BackendKind::File => {
            let disk = |threads| references::Disk::open(plan, direct, folder, threads);
            vec![Box::new(disk(1)?), Box::new(disk(references::DEEP)?)]
        }
        BackendKind::Cuda
        | BackendKind::CudaWithin
        | BackendKind::CudaIpc
        | BackendKind::UcxCuda
        | BackendKind::VerbsCuda => {
            let copies = CudaCopies::new(storage.gpu, plan.shape.total_bytes)?;
            vec![Box::new(devices::CuMemcpy::new(plan, copies)?)]
        }
        // Of a store somewhere nobody knows what the plainest means would be.
        BackendKind::Object if storage.store.is_some() => vec![memcpy()?],
        // Objects in a folder go through the page cache, so what stands beside them does too.
        BackendKind::Object => {
            let cached = references::Disk::open(plan, DirectMode::Off, folder, 1)?;
            vec![Box::new(cached)]
        }
    })
}

/// The rivals that this way has, on this host; what cannot be started is said aloud and left out.
fn beside(
    plan: &Plan,
    at: &TargetAt,
    rivals: &[Rival],
    recorder: &Recorder,
) -> Vec<Box<dyn Subject>> {
    let mut subjects: Vec<Box<dyn Subject>> = Vec::new();
    for rival in rivals.iter().filter(|rival| rival.is_beside(plan, at)) {
        match Program::start(rival, plan) {
            Ok(program) => subjects.push(Box::new(program)),
            Err(error) => recorder.remark(&format!(
                "{}: {} IS LEFT OUT: {error}",
                plan.case, rival.name
            )),
        }
    }
    subjects
}
