//! Random stores, fetches and restarts beside a map of what was stored: a fetch may miss, but what it brings is what
//! was stored.

use std::collections::BTreeSet;

use kvcache_core::ErrorKind;
use kvcache_core::ports::Located;
use kvfabric_tiers::Source;
use proptest::prelude::*;

use crate::support::*;

/// One step of a run.
#[derive(Clone, Debug)]
enum Step {
    /// Store so many blocks of a chain, from this one on.
    Store { chain: u8, first: u8, count: u8 },
    /// Fetch the first blocks of a chain.
    Fetch { chain: u8, count: u8 },
    /// Shut down in order and open again.
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let chains = 1..4_u8;
    let store = (chains.clone(), 0..8_u8, 1..5_u8).prop_map(|(chain, first, count)| Step::Store {
        chain,
        first,
        count,
    });
    let fetch = (chains, 1..12_u8).prop_map(|(chain, count)| Step::Fetch { chain, count });
    prop::collection::vec(
        prop_oneof![6 => store, 6 => fetch, 1 => Just(Step::Restart)],
        1..40,
    )
}

struct Run {
    directory: tempfile::TempDir,
    objects: tempfile::TempDir,
    node: Option<Node>,
    stored: BTreeSet<(u8, u8)>,
    starts: u32,
}

impl Run {
    async fn start(&mut self) {
        self.starts += 1;
        let name = format!("pod-{}", self.starts);
        let mut config = config(&name, 4);
        config.disk = disk(self.directory.path(), 3);
        config.object = cold();
        let opened = async {
            loop {
                let agent = agent(&name, Way::Memcpy, Some(self.objects.path()));
                match Node::try_open(config.clone(), agent).await {
                    Ok(node) => return node,
                    Err(error) => assert_eq!(error.kind(), ErrorKind::Busy, "{error}"),
                }
                tokio::task::yield_now().await;
            }
        };
        let opened = tokio::time::timeout(PATIENCE, opened).await;
        self.node = Some(opened.expect("the directory becomes free"));
    }

    async fn step(&mut self, step: &Step) {
        let node = self.node.as_ref().unwrap();
        match *step {
            Step::Store {
                chain,
                first,
                count,
            } => {
                let numbers = first..first + count;
                let blocks: Vec<_> = numbers.clone().map(|number| block(chain, number)).collect();
                let report = node.store_at(&blocks, 0).await;
                let total = report.stored + report.already_held + report.refused + report.failed;
                assert_eq!(total, u32::from(count));
                assert_eq!(report.failed, 0);
                self.stored.extend(numbers.map(|number| (chain, number)));
            }
            Step::Fetch { chain: of, count } => {
                // The bytes are compared inside, for everything that is said to be there.
                let hints = Located {
                    shared: std::iter::once(0..count.into()).collect(),
                    ..Located::default()
                };
                let sources = node.fetch(&chain(of, count), hints).await;
                for (number, source) in (0..).zip(&sources) {
                    let known = self.stored.contains(&(of, number));
                    assert!(
                        known || *source == Source::Miss,
                        "a block that nobody stored"
                    );
                }
            }
            Step::Restart => {
                self.node.take().unwrap().shutdown().await;
                self.start().await;
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Four slots of memory, three segments of four, an object store; chains compete for all of them.
    #[test]
    fn a_fetch_may_miss_but_never_brings_wrong_bytes(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut run = Run {
                directory: tempfile::tempdir().unwrap(),
                objects: tempfile::tempdir().unwrap(),
                node: None,
                stored: BTreeSet::new(),
                starts: 0,
            };
            run.start().await;
            for step in &steps {
                run.step(step).await;
            }
            let node = run.node.take().unwrap();
            assert_eq!(node.stat("corrupt_blocks").await, 0);
            assert_eq!(node.stat("stray_answers").await, 0);
            node.shutdown().await;
        });
    }
}
