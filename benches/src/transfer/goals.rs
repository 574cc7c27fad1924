//! `kv-bench transfer goals`: what this project promises of transfers, beside what is measured.

use std::path::PathBuf;

use clap::Args;
use kvcache_core::Result;
use kvfabric_transfer::DirectMode;

use crate::goals::{self, Goal};
use crate::recorder::{OutputArgs, Recorder};

use super::args::RivalArgs;
use super::measure::{Effort, measure};
use super::objects::Storage;
use super::plan::{BackendKind, Calls, Order, Plan, Shape, Way};
use super::process::TargetAt;
use super::program::Rival;
use super::{beside, control, fabric, folder, references};

/// What is promised.
const GOALS: &str = include_str!("../../transfer/goals.json");

/// How much is measured for the goals.
#[derive(Args, Clone, Debug)]
pub(crate) struct GoalsArgs {
    /// Bytes of an iteration.
    #[arg(long, value_parser = crate::sizes::parse_bytes, default_value = "64M")]
    total_bytes: u64,
    /// Measured iterations.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    iterations: u32,
    /// Single blocks in each of the five rounds of latencies.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    latency_samples: u32,
    /// Folder for files; a temporary one by default.
    #[arg(long, value_name = "FOLDER")]
    dir: Option<PathBuf>,
    #[command(flatten)]
    rivals: RivalArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Measures what is needed, and tells of each goal whether it is met.
///
/// # Errors
/// As `kv-bench transfer`.
pub(crate) fn run(args: &GoalsArgs, recorder: &mut Recorder) -> Result<()> {
    let folder = folder(args.dir.as_ref())?;
    let rivals = Rival::chosen(&args.rivals, 0);
    let plans = plans(args)?;
    recorder.expect_steps(plans.len() as u64 + 4);
    let effort = Effort {
        warm_up: 1,
        iterations: args.iterations,
        latency_samples: args.latency_samples,
    };
    for plan in &plans {
        if recorder.stop().is_set() {
            break;
        }
        recorder.say(plan.case.clone());
        let (at, direct) = (TargetAt::Spawned, DirectMode::Auto);
        let ours = fabric::Fabric::open(plan, &at, direct, Storage::folder(folder.path()))?;
        let mut subjects: Vec<Box<dyn super::subject::Subject>> = vec![Box::new(ours)];
        subjects.append(&mut references(
            plan,
            &at,
            direct,
            Storage::folder(folder.path()),
        )?);
        subjects.append(&mut beside(plan, &at, &rivals, recorder));
        measure(&effort, plan, subjects, recorder)?;
        recorder.step();
    }
    if !recorder.stop().is_set() {
        control::measure(recorder)?;
    }
    goals::conclude(goals()?, recorder);
    Ok(())
}

fn plans(args: &GoalsArgs) -> Result<Vec<Plan>> {
    let mut cases = vec![
        (BackendKind::Shm, 4 << 10),
        (BackendKind::Shm, 16 << 10),
        (BackendKind::Shm, 64 << 10),
        (BackendKind::Shm, 1 << 20),
        (BackendKind::Tcp, 4 << 10),
        (BackendKind::Tcp, 64 << 10),
        (BackendKind::Tcp, 1 << 20),
        (BackendKind::File, 64 << 10),
        (BackendKind::File, 1 << 20),
    ];
    if args.rivals.raw_ucx.is_some() {
        cases.extend([(BackendKind::Ucx, 64 << 10), (BackendKind::Ucx, 1 << 20)]);
    }
    let mut plans = Vec::new();
    for (backend, block_bytes) in cases {
        for way in [Way::Read, Way::Write] {
            plans.push(Plan::new(Shape {
                backend,
                way,
                block_bytes,
                total_bytes: args.total_bytes,
                request_blocks: 64,
                order: Order::Scattered,
                seed: 1,
                threads: 1,
                in_flight: 4,
                calls: Calls::Prepared,
                layers: None,
            })?);
        }
    }
    Ok(plans)
}

/// All promises; `{way}` stands for both ways.
fn goals() -> Result<Vec<Goal>> {
    let (both, one): (Vec<Goal>, Vec<Goal>) = goals::read(GOALS)?
        .into_iter()
        .partition(|goal| goal.case.contains("{way}"));
    let ways = ["read", "write"].into_iter();
    let mut goals: Vec<Goal> = ways
        .flat_map(|way| {
            both.iter().map(move |goal| Goal {
                what: goal.what.replace("{way}", way),
                case: goal.case.replace("{way}", way),
                ..goal.clone()
            })
        })
        .collect();
    goals.extend(one);
    Ok(goals)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A figure on its bound, and one on the wrong side of it, either way.
    #[test]
    fn a_goal_is_met_up_to_its_bound() {
        let goals = goals().unwrap();
        let goal = |what: &str| goals.iter().find(|goal| goal.what == what).unwrap();
        let least = goal("shm read 4 KiB over the bare loop");
        assert!(least.is_met(0.9) && !least.is_met(0.89));
        let most = goal("tcp write 4 KiB, CPU s/GB");
        assert!(most.is_met(1.5) && !most.is_met(1.51));
        assert_eq!(
            (least.target(), most.target()),
            ("≥ 0.9".into(), "≤ 1.5".into())
        );
    }

    /// Each has one bound, and a case that is measured.
    #[test]
    fn every_goal_can_be_measured() {
        let args = GoalsArgs {
            total_bytes: 1 << 20,
            iterations: 1,
            latency_samples: 1,
            dir: None,
            rivals: RivalArgs {
                raw_ucx: Some(PathBuf::new()),
                ..RivalArgs::default()
            },
            output: OutputArgs::default(),
        };
        let cases: Vec<String> = plans(&args)
            .unwrap()
            .into_iter()
            .map(|plan| plan.case)
            .collect();
        for goal in goals().unwrap() {
            assert!(
                goal.at_least.is_some() != goal.at_most.is_some(),
                "{goal:?}"
            );
            let is_path = ["shm-", "tcp-", "file-", "ucx-"]
                .iter()
                .any(|way| goal.case.starts_with(way));
            assert_eq!(cases.contains(&goal.case), is_path, "{goal:?}");
        }
    }
}
