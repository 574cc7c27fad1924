//! The index and the literal reading of its events, side by side.

use super::*;

/// The index under test, and the reading to compare with.
pub(super) struct Both {
    pub(super) index: KvIndex,
    pub(super) ids: Vec<SourceId>,
    pub(super) literal: Literal,
    /// The same without evictions.
    pub(super) complete: Literal,
    pub(super) answer: Answer,
    /// Events that are yet to be applied all at once; none when each is applied by itself.
    pub(super) together: Option<RefCell<Vec<(SourceId, SourceEvent)>>>,
}

pub(super) fn spec(source: usize) -> SourceSpec {
    let (pod, name, kind) = SOURCES[source];
    let pod = PodName::new(pod).unwrap();
    SourceSpec {
        pod,
        name: name.to_owned(),
        kind,
        block_size: BLOCK_SIZE,
    }
}

pub(super) fn stored(
    source: usize,
    blocks: &[Block],
    tier: Tier,
    with_tokens: bool,
) -> StoredBlocks {
    let is_node = SOURCES[source].2 == SourceKind::Node;
    let with_tokens = with_tokens && !is_node;
    let salt = SALTS[blocks[0].salt].filter(|_| blocks[0].depth == 1 && !is_node);
    StoredBlocks {
        hashes: blocks.iter().map(|block| block.hash(source)).collect(),
        parent: blocks[0].parent().map(|parent| parent.hash(source)),
        tokens: if with_tokens {
            blocks.iter().flat_map(|block| block.tokens()).collect()
        } else {
            vec![]
        },
        block_size: if with_tokens { BLOCK_SIZE } else { 0 },
        tier,
        group: Some(CacheGroup {
            number: 0,
            rule: GroupRule::Full,
            block_size: BLOCK_SIZE,
        }),
        lora: None,
        cache_salt: salt.map(str::to_owned),
        identifiers: vec![],
    }
}

impl Both {
    pub(super) fn new(bytes_max: Option<u64>) -> Self {
        let config = IndexConfig {
            scheme: IndexScheme::default(),
            model: String::new(),
            block_size: BLOCK_SIZE.try_into().unwrap(),
            weights: TierWeights::default(),
            orphan_blocks_max: 10_000,
        };
        let index = match bytes_max {
            Some(bytes_max) => KvIndex::bounded(config, bytes_max).unwrap(),
            None => KvIndex::new(config),
        };
        let ids = (0..SOURCES.len())
            .map(|source| index.add_source(spec(source)).unwrap())
            .collect();
        Self {
            index,
            ids,
            literal: Literal::default(),
            complete: Literal::default(),
            answer: Answer::default(),
            together: None,
        }
    }

    pub(super) fn apply(&self, source: usize, event: SourceEvent) {
        match &self.together {
            Some(together) => together.borrow_mut().push((self.ids[source], event)),
            None => {
                self.index.apply(self.ids[source], &event).unwrap();
            }
        }
    }

    /// The index, after all events.
    pub(super) fn index(&self) -> &KvIndex {
        if let Some(together) = &self.together {
            let events = together.take();
            let mut applied = 0;
            self.index.apply_all(&events, |outcome| {
                outcome.unwrap();
                applied += 1;
            });
            assert_eq!(applied, events.len());
        }
        &self.index
    }

    /// The step with the block that it picks.
    pub(super) fn resolve(&self, step: &Step) -> Option<Step> {
        let picked = |pick: usize| {
            let all = held(&self.literal);
            all.iter().nth(pick.checked_rem(all.len())?).copied()
        };
        Some(match *step {
            Step::StoreHeld { pick } => {
                let (source, last, tier) = picked(pick)?;
                let count = 1;
                Step::Store {
                    source,
                    last,
                    count,
                    tier,
                }
            }
            Step::RemoveHeld { pick } => {
                let (source, block, tier) = picked(pick)?;
                Step::Remove {
                    source,
                    block,
                    tier,
                }
            }
            _ => step.clone(),
        })
    }

    pub(super) fn step(&mut self, step: &Step) {
        let Some(step) = self.resolve(step) else {
            return;
        };
        match step {
            Step::Store {
                source,
                last,
                count,
                tier,
            } => {
                let blocks = &last.prompt()[last.depth - count..];
                self.store(source, blocks, tier, true);
            }
            Step::Mention {
                source,
                block,
                tier,
            } => self.store(source, &[block], tier, false),
            Step::Remove {
                source,
                block,
                tier,
            } => {
                let hashes = vec![block.hash(source)];
                self.apply(
                    source,
                    SourceEvent::Removed(RemovedBlocks {
                        hashes,
                        tier,
                        group: Some(0),
                    }),
                );
                self.read(|literal| literal.remove(source, block, tier));
            }
            Step::Clear { source } => self.clear(source),
            Step::Restart { source } => {
                self.index().clear_source(self.ids[source]);
                self.forget(source);
            }
            Step::Replace { source } => {
                self.index().remove_source(self.ids[source]);
                self.forget(source);
                self.ids[source] = self.index().add_source(spec(source)).unwrap();
            }
            Step::RemovePod { source } => {
                let pod = SOURCES[source].0;
                self.index().remove_pod(&PodName::new(pod).unwrap());
                assert_eq!(self.index().pod_entries(&PodName::new(pod).unwrap()), 0);
                for source in (0..SOURCES.len()).filter(|source| SOURCES[*source].0 == pod) {
                    self.forget(source);
                    self.ids[source] = self.index().add_source(spec(source)).unwrap();
                }
            }
            Step::Evict { blocks } => self.evict(blocks),
            Step::OtherGroup { source, block } if SOURCES[source].2 != SourceKind::Node => {
                let mut blocks = stored(source, &[block], Tier::Device, true);
                blocks.group = Some(CacheGroup {
                    number: 1,
                    rule: GroupRule::Nothing,
                    block_size: BLOCK_SIZE,
                });
                self.apply(source, SourceEvent::Stored(blocks));
            }
            Step::OtherGroup { .. } | Step::StoreHeld { .. } | Step::RemoveHeld { .. } => {}
        }
    }

    pub(super) fn store(&mut self, source: usize, blocks: &[Block], tier: Tier, with_tokens: bool) {
        let event = stored(source, blocks, tier, with_tokens);
        self.apply(source, SourceEvent::Stored(event));
        self.read(|literal| literal.store(source, blocks, tier, with_tokens));
    }

    /// Reads an event, with and without evictions.
    pub(super) fn read(&mut self, event: impl Fn(&mut Literal)) {
        event(&mut self.literal);
        event(&mut self.complete);
    }

    pub(super) fn forget(&mut self, source: usize) {
        self.read(|literal| {
            literal.sources.remove(&source);
        });
    }

    /// The keys of all blocks that anybody holds at their place.
    pub(super) fn keys_there(&self) -> BTreeSet<IndexKey> {
        let shared = self.index().export_shared().into_iter().flatten();
        let mut keys: BTreeSet<IndexKey> = shared.map(|(key, _)| key).collect();
        for id in &self.ids {
            let image = self.index().export(*id).unwrap();
            let blocks = image.pieces.iter().flat_map(|piece| &piece.blocks);
            keys.extend(blocks.map(|block| block.key));
        }
        keys
    }

    /// Lets the index choose what to give up; no block must go before one that comes after it.
    pub(super) fn evict(&mut self, blocks: usize) {
        // What a node has put in a shared tier and another one deleted there is in no tier, though nobody told the node.
        let there = self.keys_there();
        let mut before = self.literal.placed();
        before.retain(|block| there.contains(&block.index_key()));
        let evicted = self.index().evict(blocks);
        let left = self.keys_there();
        let (left, gone): (BTreeSet<Block>, BTreeSet<Block>) = before
            .into_iter()
            .partition(|block| left.contains(&block.index_key()));
        if self.index().usage().bytes_max.is_none() {
            assert_eq!((evicted, gone.len()), (0, 0));
        } else {
            assert!(
                left.is_empty() || evicted >= blocks,
                "{evicted} of {blocks}"
            );
        }
        for block in &left {
            let parent = block.parent();
            assert!(
                parent.is_none_or(|parent| !gone.contains(&parent)),
                "{parent:?} went before {block:?}"
            );
        }
        for block in gone {
            self.literal.evict(block);
        }
    }

    pub(super) fn clear(&mut self, source: usize) {
        self.apply(source, SourceEvent::Cleared);
        match SOURCES[source].2 {
            SourceKind::Vllm | SourceKind::VllmFull => {
                self.read(|literal| literal.clear(source, &[Tier::Device]));
            }
            SourceKind::Sglang => {
                let tiers = [Tier::Device, Tier::Host, Tier::Disk];
                self.read(|literal| literal.clear(source, &tiers));
            }
            SourceKind::Node | SourceKind::Approximate => {
                self.read(|literal| literal.clear(source, &Tier::ALL))
            }
        }
    }

    pub(super) fn check(&mut self) {
        assert_eq!(self.index().entries(), self.literal.entries());
        let one_pod = [
            PodName::new("pod-b").unwrap(),
            PodName::new("nobody").unwrap(),
        ];
        for (salt, salt_name) in SALTS.into_iter().enumerate() {
            for path in 0..1 << DEPTH {
                let prompt = Block::new(salt, DEPTH, path).prompt();
                let tokens: Vec<u32> = prompt.iter().flat_map(|block| block.tokens()).collect();
                let mut keys = Vec::new();
                self.index.keys_of(None, salt_name, &tokens, &mut keys);
                let (wanted, shared) = self.literal.depths(&prompt);

                self.index
                    .lookup(&keys, &Query::default(), &mut self.answer);
                assert_eq!(self.found(), wanted, "{prompt:?}");
                assert_eq!(self.answer.shared_depth, shared);
                // Of shared tiers nothing is compared: who has lost its name for a block cannot delete it for others.
                let (complete, _) = self.complete.depths(&prompt);
                for (pod, depth, _) in &wanted {
                    let is_in = |(other, most, _): &(String, u32, _)| other == pod && depth <= most;
                    assert!(complete.iter().any(is_in), "{pod} does not hold {depth}");
                }
                for pod in &self.answer.pods {
                    assert_eq!(pod.score, TierWeights::default().score(&pod.by_tier));
                }

                self.index.lookup(
                    &keys,
                    &Query {
                        pods_max: 2,
                        pods: &[],
                    },
                    &mut self.answer,
                );
                assert_eq!(self.found(), wanted[..wanted.len().min(2)]);

                self.index.lookup(
                    &keys,
                    &Query {
                        pods_max: 0,
                        pods: &one_pod,
                    },
                    &mut self.answer,
                );
                let only: Vec<_> = wanted
                    .into_iter()
                    .filter(|(pod, ..)| pod == "pod-b")
                    .collect();
                assert_eq!(self.found(), only);
                assert_eq!(self.answer.shared_depth, shared);
            }
        }
    }

    pub(super) fn found(&self) -> Vec<(String, u32, [u32; 4])> {
        let pods = self.answer.pods.iter();
        pods.map(|pod| (pod.pod.to_string(), pod.depth, pod.by_tier))
            .collect()
    }
}
