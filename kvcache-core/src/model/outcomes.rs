//! What must hold of every outcome.

use super::{Engine, GARBAGE, Granted, World, genuine};
use crate::id::{LeaseId, OperationId};
use crate::key::Checksum;
use crate::manager::{BlockSource, Outcome};
use crate::place::Place;

impl World {
    /// Takes an outcome, and checks it against what was asked and what the bytes really are.
    pub(super) fn end(&mut self, outcome: Outcome) {
        match &outcome {
            Outcome::Stored {
                operation,
                stored,
                already_held,
                refused,
                failed,
            } => self.end_store(*operation, stored + already_held + refused + failed),
            Outcome::Fetched {
                operation,
                sources,
                unsettled,
            } => self.end_fetch(*operation, sources, unsettled),
            Outcome::Drained { operation } => self.end_drain(*operation),
            Outcome::Pinned { pin, depth } => self.begin_pin(*pin, *depth),
            Outcome::Retired { left, .. } => self.end_retirement(*left),
            Outcome::Flushed {
                operation,
                complete,
            } => self.end_flush(*operation, *complete),
            Outcome::LeaseReady {
                lease,
                peer,
                blocks,
                ttl,
            } => {
                let until = self.now + *ttl;
                let (peer, blocks) = (*peer, blocks.clone());
                self.begin_lease(
                    *lease,
                    Granted {
                        peer,
                        blocks,
                        until,
                    },
                );
            }
        }
        self.outcomes.push(outcome);
    }

    fn end_store(&mut self, operation: OperationId, blocks: u32) {
        let engine = self.engine(operation);
        assert!(!engine.is_fetch && !engine.ended, "{operation} ended twice");
        assert_eq!(
            blocks as usize,
            engine.blocks.len(),
            "blocks of store {operation}"
        );
        // The engine is free to reuse its memory, and does.
        engine.memory.fill(GARBAGE);
        engine.ended = true;
    }

    fn end_fetch(&mut self, operation: OperationId, sources: &[BlockSource], unsettled: &[u32]) {
        let engine = self.engine(operation);
        assert!(engine.is_fetch && !engine.ended, "{operation} ended twice");
        assert_eq!(
            sources.len(),
            engine.blocks.len(),
            "blocks of fetch {operation}"
        );
        let depth = sources
            .iter()
            .take_while(|s| **s != BlockSource::Miss)
            .count();
        let rest = &sources[depth..];
        assert!(
            rest.iter().all(|s| *s == BlockSource::Miss),
            "a hit behind a miss"
        );
        for (block, bytes) in engine.blocks.iter().zip(&engine.memory).take(depth) {
            assert_eq!(
                *bytes,
                genuine(&block.key),
                "{:?} has wrong bytes",
                block.key
            );
        }
        assert!(
            unsettled.iter().all(|p| *p as usize >= depth),
            "an unsettled hit"
        );
        engine.unsettled = unsettled.to_vec();
        engine.ended = true;
        let writes: Vec<u32> = self.writes_to(operation).collect();
        let engine = self.engine(operation);
        let named = writes
            .iter()
            .all(|position| engine.unsettled.contains(position));
        assert!(
            named,
            "{operation} ended while a transfer writes to a slot it does not name"
        );
    }

    fn end_drain(&mut self, operation: OperationId) {
        let is_busy = self.writes_to(operation).next().is_some();
        assert!(
            !is_busy,
            "{operation} drained while a transfer writes to it"
        );
        let engine = self.engine(operation);
        assert!(
            engine.ended && !engine.unsettled.is_empty(),
            "{operation} drained twice"
        );
        engine.unsettled.clear();
    }

    fn begin_lease(&mut self, lease: LeaseId, granted: Granted) {
        assert!(
            self.unready_leases.remove(&lease),
            "lease {lease} became ready twice"
        );
        for block in &granted.blocks {
            let held = self.host.get(&block.slot.index);
            let (generation, bytes) = held.copied().unwrap_or_default();
            assert_eq!(
                generation, block.slot.generation,
                "a slot leased out of date"
            );
            let is_good = Checksum::crc32c(bytes) == block.checksum;
            assert!(
                is_good || self.rotten.contains(&block.key),
                "wrong bytes leased"
            );
        }
        if !granted.blocks.is_empty() {
            self.leases.insert(lease, granted);
        }
    }

    /// The positions of the fetch that transfers still write to.
    fn writes_to(&self, operation: OperationId) -> impl Iterator<Item = u32> {
        self.moves().filter_map(move |a_move| match a_move.to {
            Place::Engine {
                operation: other,
                position,
            } if other == operation => Some(position),
            _ => None,
        })
    }

    fn engine(&mut self, operation: OperationId) -> &mut Engine {
        match self.engines.get_mut(&operation) {
            Some(engine) => engine,
            None => panic!("{operation} was never asked for"),
        }
    }
}
