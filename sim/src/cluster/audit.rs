//! What must hold when everything has come to rest.

use std::collections::BTreeSet;

use kvcache_core::manager::FetchRequest;
use kvcache_core::{BlockInfo, IndexKey, SlotIndex, Tier};

use super::pod::{Operation, Pod, Purpose};
use super::{Check, Cluster, Faults, REST_WAIT};

impl Cluster {
    /// Lets everything that is under way end, and dead pods come back.
    pub(super) fn rest(&mut self) -> Check {
        let limit = self.now + REST_WAIT;
        while let Some(what) = self.unrest() {
            if self.now > limit || self.next_time().is_none() {
                return Err(format!("never comes to rest: {what}"));
            }
            self.step()?;
        }
        Ok(())
    }

    fn unrest(&self) -> Option<String> {
        if !self.agenda.is_empty() {
            return Some(format!("{} things are on the agenda", self.agenda.len()));
        }
        if self.exchange.in_flight() > 0 || !self.transfers.is_empty() {
            return Some(format!("{} transfers are under way", self.transfers.len()));
        }
        self.pods.iter().find_map(|pod| {
            let stats = pod.manager.stats();
            let levels = [
                (stats.operations, "operations"),
                (stats.leases, "leases"),
                (stats.pins, "pins"),
                (u64::from(pod.ending), "ends before it"),
                (stats.commands_in_flight, "commands"),
                (stats.host_quarantined, "quarantined arena slots"),
                (
                    pod.quarantined.len() as u64,
                    "fetches with engine slots in quarantine",
                ),
            ];
            let (count, what) = levels.into_iter().find(|(count, _)| *count > 0)?;
            Some(format!("{} has {count} {what}", pod.name))
        })
    }

    pub(super) fn audit(&mut self) -> Check {
        self.summary
            .tally
            .check()
            .map_err(|error| error.to_string())?;
        let (counted, judged) = (self.summary.tally.accesses, self.infinite.total().accesses);
        if counted != judged {
            return Err(format!(
                "{counted} accesses were counted, the workload has {judged}"
            ));
        }
        for pod in &self.pods {
            self.audit_pod(pod)?;
        }
        for record in self.objects.values() {
            self.content
                .verify(&record.info.key, &record.bytes)
                .map_err(|mismatch| {
                    let key = record.info.key;
                    format!("wrong byte accepted in the object store: {key:?}: {mismatch}")
                })?;
        }
        (0..self.pods.len()).for_each(|position| self.add_counters(position));
        self.audit_sources()?;
        self.read_back()
    }

    /// Every block of every fetch that ended came from somewhere, or is a miss.
    fn audit_sources(&self) -> Check {
        let sources = [
            "fetched_host",
            "fetched_disk",
            "fetched_peer",
            "fetched_object",
            "missed",
        ];
        let of = |name| self.summary.counters.get(name).copied().unwrap_or(0);
        let told: u64 = sources.into_iter().map(of).sum();
        let ended = self.summary.fetched_blocks;
        if told != ended {
            return Err(format!(
                "fetches of {ended} blocks ended, the pods count {told} by source"
            ));
        }
        Ok(())
    }

    fn audit_pod(&self, pod: &Pod) -> Check {
        pod.manager.check_invariants();
        let (stats, name) = (pod.manager.stats(), &pod.name);
        let slots = u64::from(pod.manager.limits().host_slots);
        if stats.host_blocks + stats.host_vacant != slots {
            let (blocks, vacant) = (stats.host_blocks, stats.host_vacant);
            return Err(format!(
                "{name} has {blocks} blocks and {vacant} vacant slots of {slots}"
            ));
        }
        let (available, capacity) = (pod.engine.available(), pod.engine.capacity() as usize);
        if available != capacity {
            return Err(format!(
                "{name}'s engine has {available} of {capacity} slots at rest"
            ));
        }
        let Some(entries) = self.directory.entries(pod.peer) else {
            return Err(format!("{name} lives, but the index has lost it"));
        };
        if entries.engine.len() != pod.engine.blocks() {
            let (announced, there) = (entries.engine.len(), pod.engine.blocks());
            return Err(format!(
                "{name}'s engine announced {announced} blocks, and has {there}"
            ));
        }
        for tier in [Tier::Host, Tier::Disk] {
            let announced: BTreeSet<IndexKey> = entries
                .node
                .iter()
                .filter(|(of, _)| *of == tier)
                .map(|(_, key)| *key)
                .collect();
            let there: BTreeSet<IndexKey> = pod
                .manager
                .contents(tier)
                .map(|block| block.index_key)
                .collect();
            if announced != there {
                let (missing, extra) = (
                    there.difference(&announced).count(),
                    announced.difference(&there).count(),
                );
                return Err(format!(
                    "{name} in {tier}: {missing} blocks were not announced, {extra} not withdrawn"
                ));
            }
        }
        Ok(())
    }

    /// Fetches every block that a pod says it has, with nothing going wrong any more.
    fn read_back(&mut self) -> Check {
        let may_be_spoilt =
            self.config.faults.disk_flip > 0 || self.summary.kills + self.summary.retirements > 0;
        self.config.faults = Faults::default();
        for position in 0..self.pods.len() {
            let manager = &self.pods[position].manager;
            let mut blocks: Vec<BlockInfo> = manager
                .contents(Tier::Host)
                .chain(manager.contents(Tier::Disk))
                .collect();
            blocks.sort_by_key(|block| block.key);
            blocks.dedup_by_key(|block| block.key);
            for block in blocks {
                let held = self.pods[position].manager.lookup(&[block.key]);
                let is_read = self.read_one(position, block)?;
                let may_fail = held.host == 0 && (held.disk == 0 || may_be_spoilt);
                if !is_read && !may_fail {
                    let name = &self.pods[position].name;
                    return Err(format!("{name} has {:?}, but cannot supply it", block.key));
                }
            }
        }
        self.rest()
    }

    fn read_one(&mut self, position: usize, block: BlockInfo) -> Check<bool> {
        let deadline = self.now + self.config.operation_wait;
        let request = FetchRequest {
            blocks: vec![block],
            ..FetchRequest::default()
        };
        let pod = &mut self.pods[position];
        let operation = pod
            .manager
            .handle_fetch(self.now, request, deadline)
            .map_err(|error| format!("a fetch at rest is refused: {error}"))?;
        let (blocks, slots) = (vec![block], vec![SlotIndex(0)]);
        let entry = Operation {
            purpose: Purpose::Audit,
            deadline,
            blocks,
            slots,
        };
        pod.operations.insert(operation, entry);
        self.audited = None;
        self.pump()?;
        loop {
            if let Some(is_read) = self.audited {
                return Ok(is_read);
            }
            if self.next_time().is_none() {
                return Err("a fetch at rest never ends".to_owned());
            }
            self.step()?;
        }
    }
}
