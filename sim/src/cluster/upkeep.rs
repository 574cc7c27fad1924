//! What is wanted of pods beside stores and fetches: to keep blocks, to forget them, to wait for the disk, and to end.

use std::collections::BTreeSet;
use std::time::Duration;

use kvcache_core::{BlockInfo, BlockKey, OperationId, PinId, Tier};

use super::pod::Pin;
use super::serve::may_refuse;
use super::{Check, Cluster, Due};

/// Pins last up to this long.
const PIN: Duration = Duration::from_millis(30);
/// A flush has up to this long.
const FLUSH: Duration = Duration::from_millis(20);
/// A pod that ends has up to this long.
const END: Duration = Duration::from_millis(20);
/// The most blocks pinned or removed together.
const BLOCKS_MAX: usize = 6;

impl Cluster {
    pub(super) fn schedule_upkeep(&mut self) {
        if let Some(gap) = self.config.upkeep_gap {
            let after = self.some_time(gap * 2);
            self.schedule(after, Due::Upkeep);
        }
    }

    /// Wants something of some pod, while there is still a request to be served.
    pub(super) fn upkeep(&mut self) -> Check {
        if self.waiting.is_none() && self.active.is_empty() {
            return Ok(());
        }
        self.schedule_upkeep();
        let able: Vec<usize> = (0..self.pods.len())
            .filter(|at| self.pods[*at].alive && !self.pods[*at].ending)
            .collect();
        if able.is_empty() {
            return Ok(());
        }
        let one = able[self.random.position(able.len())];
        match self.random.below(100) {
            0..45 => self.pin(one),
            45..60 => self.unpin(one),
            60..80 => self.remove(one),
            80..82 => self.clear(one),
            82..94 => self.flush(one),
            // Somebody has to be left to work.
            _ if able.len() > 1 => self.retire(one),
            _ => Ok(()),
        }
    }

    /// A few of the pod's blocks, or none if it has none.
    fn some_blocks(&mut self, position: usize) -> Vec<BlockKey> {
        let manager = &self.pods[position].manager;
        let both = manager
            .contents(Tier::Host)
            .chain(manager.contents(Tier::Disk));
        let mut blocks: Vec<BlockInfo> = both.collect();
        blocks.sort_by_key(|block| block.key);
        blocks.dedup_by_key(|block| block.key);
        let wanted = 1 + self.random.position(BLOCKS_MAX);
        let mut keys = Vec::new();
        while keys.len() < wanted && !blocks.is_empty() {
            keys.push(blocks.swap_remove(self.random.position(blocks.len())).key);
        }
        keys
    }

    /// Pins under a new number, which was let go of before in some cases: then nothing is to be kept.
    fn pin(&mut self, position: usize) -> Check {
        let mut keys = self.some_blocks(position);
        self.next_pin += 1;
        let pin = PinId(self.next_pin);
        let is_early = self.random.below(4) == 0;
        let ttl = self.some_time(PIN);
        let pod = &mut self.pods[position];
        if is_early {
            pod.manager.handle_unpin(self.now, pin);
        }
        match pod.manager.handle_pin(self.now, pin, &keys, ttl) {
            Ok(()) => {
                if is_early {
                    keys.clear();
                }
                let until = None;
                pod.pins.insert(pin, Pin { keys, ttl, until });
                Ok(())
            }
            Err(error) if may_refuse(pod, &error) => Ok(()),
            Err(error) => Err(format!("pin {pin} is refused: {error}")),
        }
    }

    pub(super) fn take_pinned(&mut self, position: usize, pin: PinId, depth: u32) -> Check {
        let pod = &mut self.pods[position];
        let Some(asked) = pod.pins.get_mut(&pin) else {
            return Err(format!("nobody asked for pin {pin}"));
        };
        if asked.until.is_some() || asked.keys.len() < depth as usize {
            return Err(format!("pin {pin} keeps {depth} blocks of {asked:?}"));
        }
        if depth == 0 {
            pod.pins.remove(&pin);
            return Ok(());
        }
        asked.keys.truncate(depth as usize);
        asked.until = Some(self.now + asked.ttl);
        self.summary.pinned += 1;
        Ok(())
    }

    /// Whatever is pinned is in DRAM.
    pub(super) fn check_pins(&mut self) -> Check {
        let now = self.now;
        for pod in self.pods.iter_mut().filter(|pod| pod.alive) {
            pod.pins
                .retain(|_, pin| pin.until.is_none_or(|until| until > now));
            for (id, pin) in pod.pins.iter().filter(|(_, pin)| pin.until.is_some()) {
                let gone = |key: &&BlockKey| pod.manager.lookup(&[**key]).host == 0;
                if let Some(key) = pin.keys.iter().find(gone) {
                    let name = &pod.name;
                    return Err(format!("{name} lost {key:?}, which pin {id} keeps"));
                }
            }
        }
        Ok(())
    }

    fn unpin(&mut self, position: usize) -> Check {
        let pod = &mut self.pods[position];
        let pins: Vec<PinId> = pod.pins.keys().copied().collect();
        if !pins.is_empty() {
            let pin = pins[self.random.position(pins.len())];
            // One that does not hold yet will be told to keep nothing.
            match pod.pins.get_mut(&pin) {
                Some(asked) if asked.until.is_none() => asked.keys.clear(),
                _ => drop(pod.pins.remove(&pin)),
            }
            pod.manager.handle_unpin(self.now, pin);
        }
        Ok(())
    }

    fn remove(&mut self, position: usize) -> Check {
        let keys = self.some_blocks(position);
        let manager = &mut self.pods[position].manager;
        let removed = manager
            .handle_remove(self.now, &keys)
            .map_err(|error| format!("a removal is refused: {error}"))?;
        let stay = keys.iter().filter(|key| manager.lookup(&[**key]).depth > 0);
        let stay = stay.count();
        if stay > removed.kept as usize {
            return Err(format!("{stay} blocks stay after a removal: {removed:?}"));
        }
        self.check_pins()
    }

    fn clear(&mut self, position: usize) -> Check {
        let manager = &mut self.pods[position].manager;
        let removed = manager.handle_clear(self.now);
        let host = manager.contents(Tier::Host).count();
        let disk = manager.contents(Tier::Disk).count();
        if disk > 0 || host > removed.kept as usize {
            return Err(format!("{host} and {disk} blocks stay: {removed:?}"));
        }
        self.check_pins()
    }

    fn flush(&mut self, position: usize) -> Check {
        let deadline = self.now + self.some_time(FLUSH);
        let pod = &mut self.pods[position];
        match pod.manager.handle_flush(self.now, deadline) {
            Ok(operation) => {
                pod.flushes.insert(operation, deadline);
                Ok(())
            }
            Err(error) if may_refuse(pod, &error) => Ok(()),
            Err(error) => Err(format!("a flush is refused: {error}")),
        }
    }

    pub(super) fn take_flushed(
        &mut self,
        position: usize,
        operation: OperationId,
        complete: bool,
    ) -> Check {
        let Some(deadline) = self.pods[position].flushes.remove(&operation) else {
            return Err(format!("flush {operation} ended twice"));
        };
        if self.now > deadline {
            let late = self.now.since(deadline);
            return Err(format!(
                "flush {operation} ended {late:?} after its deadline"
            ));
        }
        self.summary.flushed += u64::from(complete);
        Ok(())
    }

    /// Tells a pod to end: requests that are there go on as long as it does.
    fn retire(&mut self, position: usize) -> Check {
        let deadline = self.now + self.some_time(END);
        let pod = &mut self.pods[position];
        pod.ending = true;
        pod.manager.handle_retire(self.now, deadline);
        self.summary.retirements += 1;
        Ok(())
    }

    /// A pod has written down what it could: it ends with this step.
    pub(super) fn take_retired(&mut self, position: usize, written: u64, left: u32) -> Check {
        let pod = &self.pods[position];
        let keys = |tier| {
            let contents = pod.manager.contents(tier);
            contents.map(|info| info.key).collect::<BTreeSet<_>>()
        };
        let (disk, object) = (keys(Tier::Disk), keys(Tier::Object));
        let is_alone = |key: &&BlockKey| !disk.contains(*key) && !object.contains(*key);
        let alone = keys(Tier::Host).iter().filter(is_alone).count();
        if !pod.ending || alone > left as usize {
            let name = &pod.name;
            return Err(format!(
                "{name} leaves {left} blocks, {alone} are in DRAM alone"
            ));
        }
        let peer = pod.peer;
        self.summary.retired += 1;
        self.summary.written_at_the_end += written;
        self.schedule(Duration::ZERO, Due::Retired(peer));
        Ok(())
    }
}
