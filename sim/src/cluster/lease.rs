//! The messages by which pods lease blocks from each other; any of them may be lost, repeated or late.

use std::time::Duration;

use kvcache_core::manager::{CommandId, GrantedBlock, GrantedLease, LeasedBlock};
use kvcache_core::place::HostSlot;
use kvcache_core::{BlockKey, ErrorKind, LeaseId, PeerId, Time};
use kvfabric_transfer::backend::sim::SimNode;

use super::{Cluster, Due};

/// What a lease message takes beside its blocks, in bytes.
const MESSAGE_BYTES: u64 = 64;

/// A message between two pods.
#[derive(Clone, Debug)]
pub(super) enum Message {
    Ask {
        from: PeerId,
        command: CommandId,
        keys: Vec<BlockKey>,
        ttl: Duration,
    },
    Answer {
        from: PeerId,
        command: CommandId,
        result: Result<Granted, ErrorKind>,
    },
    Release {
        from: PeerId,
        lease: LeaseId,
    },
}

#[derive(Clone, Debug)]
pub(super) struct Granted {
    lease: LeaseId,
    blocks: Vec<LeasedBlock>,
    ttl: Duration,
}

impl Cluster {
    pub(super) fn ask_lease(
        &mut self,
        position: usize,
        command: CommandId,
        holder: PeerId,
        keys: Vec<BlockKey>,
        ttl: Duration,
        deadline: Time,
    ) {
        let pod = &mut self.pods[position];
        pod.asked.insert(command, holder);
        let from = pod.peer;
        self.schedule_at(deadline.max(self.now), Due::Unanswered(from, command));
        let bytes = keys.len() as u64 * 32;
        self.send(
            position,
            holder,
            bytes,
            Message::Ask {
                from,
                command,
                keys,
                ttl,
            },
        );
    }

    pub(super) fn lease_unanswered(&mut self, peer: PeerId, command: CommandId) {
        let Some(position) = self.living(peer) else {
            return;
        };
        let pod = &mut self.pods[position];
        if pod.asked.remove(&command).is_some() {
            pod.manager
                .handle_leased(self.now, command, Err(ErrorKind::Timeout));
        }
    }

    pub(super) fn give_back(&mut self, position: usize, holder: PeerId, lease: LeaseId) {
        let pod = &mut self.pods[position];
        pod.held.remove(&(holder, lease));
        let from = pod.peer;
        self.send(position, holder, 8, Message::Release { from, lease });
    }

    /// A lease of ours is ready: whoever asked for it is told.
    pub(super) fn lease_ready(
        &mut self,
        position: usize,
        lease: LeaseId,
        blocks: Vec<LeasedBlock>,
        ttl: Duration,
    ) {
        let pod = &mut self.pods[position];
        let Some((asker, command)) = pod.granting.remove(&lease) else {
            return;
        };
        let from = pod.peer;
        let bytes = blocks.len() as u64 * 24;
        let result = Ok(Granted { lease, blocks, ttl });
        self.send(
            position,
            asker,
            bytes,
            Message::Answer {
                from,
                command,
                result,
            },
        );
    }

    pub(super) fn take_message(&mut self, to: SimNode, tag: u64) {
        let Some(position) = self.pods.iter().position(|pod| pod.alive && pod.node == to) else {
            return;
        };
        let Some(message) = self.messages.get(tag as usize).cloned() else {
            return;
        };
        match message {
            Message::Ask {
                from,
                command,
                keys,
                ttl,
            } => {
                let pod = &mut self.pods[position];
                match pod.manager.handle_lease(self.now, from, &keys, ttl) {
                    Ok(lease) => {
                        pod.granting.insert(lease, (from, command));
                    }
                    Err(error) => {
                        let holder = pod.peer;
                        let result = Err(error.kind());
                        self.send(
                            position,
                            from,
                            0,
                            Message::Answer {
                                from: holder,
                                command,
                                result,
                            },
                        );
                    }
                }
            }
            Message::Release { from, lease } => {
                self.pods[position]
                    .manager
                    .handle_release(self.now, from, lease);
            }
            Message::Answer {
                from,
                command,
                result,
            } => self.take_answer(position, from, command, result),
        }
    }

    fn take_answer(
        &mut self,
        position: usize,
        from: PeerId,
        command: CommandId,
        result: Result<Granted, ErrorKind>,
    ) {
        let pod = &mut self.pods[position];
        let is_expected = pod.asked.remove(&command).is_some();
        match result {
            Err(kind) if is_expected => pod.manager.handle_leased(self.now, command, Err(kind)),
            Err(_) => {}
            Ok(granted) if is_expected => {
                let slots: Vec<HostSlot> = granted.blocks.iter().map(|block| block.slot).collect();
                pod.held.insert((from, granted.lease), slots);
                let block = |block: &LeasedBlock| GrantedBlock {
                    checksum: block.checksum,
                    tier: block.tier,
                };
                let lease = GrantedLease {
                    lease: granted.lease,
                    ttl: granted.ttl,
                    blocks: granted.blocks.iter().map(block).collect(),
                };
                pod.manager.handle_leased(self.now, command, Ok(lease));
            }
            // Too late, or the answer to a repeated question: nobody will use this lease.
            Ok(granted) if !pod.held.contains_key(&(from, granted.lease)) => {
                self.give_back(position, from, granted.lease);
            }
            Ok(_) => {}
        }
    }

    fn send(&mut self, position: usize, to: PeerId, bytes: u64, message: Message) {
        let Some(receiver) = self.living(to) else {
            return;
        };
        let (from, to) = (self.pods[position].node, self.pods[receiver].node);
        let tag = self.messages.len() as u64;
        self.messages.push(message);
        // A message that the network does not take is a lost one; whoever waits has a deadline.
        let _ = self
            .exchange
            .handle_message(self.now, from, to, MESSAGE_BYTES + bytes, tag);
    }
}
