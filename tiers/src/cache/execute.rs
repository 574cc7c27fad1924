//! The manager's commands as tasks, and their results as the manager's answers.

use std::sync::Arc;
use std::time::Duration;

use kvcache_core::manager::{Command, CommandId, GrantedLease, Move};
use kvcache_core::place::Place;
use kvcache_core::{BlockKey, Error, ErrorKind, OperationId, PeerId, Result, Time};

use super::driver::Driver;
use crate::mover::{Answer, Job};

/// How a task of the driver ended.
pub(super) enum Completion {
    /// A copy command, some of whose transfers may still be at work, and which of its moves were of an engine's memory.
    Copied(CommandId, Answer, Vec<Option<(OperationId, u32)>>),
    /// The last of those transfers.
    Drained(CommandId),
    /// A peer's answer to a lease.
    Leased(CommandId, Result<GrantedLease>),
    /// The end of a flush, which has been answered.
    Synced,
    /// A segment's deletion.
    Dropped(CommandId, Result<()>),
    /// Something that is not answered.
    Silent,
}

impl Driver {
    /// Starts a command. Their number is bounded by the manager's `commands_in_flight_max`.
    pub(super) fn execute(&mut self, command: Command) {
        match command {
            Command::Copy {
                id,
                moves,
                deadline,
            } => self.copy(id, moves, deadline),
            Command::Lease {
                id,
                peer,
                keys,
                ttl,
                deadline,
            } => {
                self.ask_lease(id, peer, keys, ttl, deadline);
            }
            Command::Release { peer, lease } => {
                let peers = self.mover.peers.clone();
                self.tasks.spawn(async move {
                    peers.release(peer, lease).await;
                    Completion::Silent
                });
            }
            Command::DropSegment { id, segment } => {
                let mover = self.mover.clone();
                self.tasks.spawn(async move {
                    let dropped = match &mover.disk {
                        Some(disk) => disk.drop_segment(segment).await,
                        None => Err(Error::new(ErrorKind::Internal, "no disk tier")),
                    };
                    Completion::Dropped(id, dropped)
                });
            }
        }
    }

    fn copy(&mut self, id: CommandId, mut moves: Vec<Move>, deadline: Time) {
        let ends: Vec<_> = moves.iter().map(engine_end).collect();
        let memory = ends.iter().map(|end| {
            end.and_then(|(operation, position)| self.engine_memory(operation, position))
        });
        let engine = memory.collect();
        for (one, end) in moves.iter_mut().zip(&ends) {
            let known = end.and_then(|(operation, position)| {
                let store = self.stores.get(&operation)?;
                *store.sums.get(position as usize)?
            });
            one.checksum = one.checksum.or(known);
        }
        let job = Job {
            moves,
            engine,
            deadline: self.instant(deadline),
            landing: None,
        };
        let mover = self.mover.clone();
        self.tasks
            .spawn(async move { Completion::Copied(id, mover.copy(job).await, ends) });
    }

    /// Notes what a command says of the bytes in engines' memory.
    fn note_sums(&mut self, ends: &[Option<(OperationId, u32)>], answer: &Answer) {
        for (end, result) in ends.iter().zip(&answer.results) {
            let Some((operation, position)) = *end else {
                continue;
            };
            match (result, self.fetches.get_mut(&operation)) {
                (Ok(sum), Some(fetch)) => {
                    if let Some(place) = fetch.sums.get_mut(position as usize) {
                        *place = Some(*sum);
                    }
                }
                (Err(failure), None) if failure.kind == ErrorKind::Corrupt => {
                    if let Some(store) = self.stores.get_mut(&operation) {
                        store.corrupt.push(position);
                    }
                }
                _ => {}
            }
        }
    }

    fn ask_lease(
        &mut self,
        id: CommandId,
        peer: PeerId,
        keys: Vec<BlockKey>,
        ttl: Duration,
        deadline: Time,
    ) {
        let (peers, deadline) = (Arc::clone(&self.mover.peers), self.instant(deadline));
        self.tasks.spawn(async move {
            Completion::Leased(id, peers.lease(peer, keys, ttl, deadline).await)
        });
    }

    /// Tells the manager how a task ended.
    pub(super) fn complete(&mut self, completion: Completion) {
        let now = self.now();
        match completion {
            Completion::Copied(id, answer, ends) => {
                self.note_sums(&ends, &answer);
                let Answer { results, unsettled } = answer;
                self.manager.handle_copied(now, id, results);
                if !unsettled.is_empty() {
                    self.tasks.spawn(async move {
                        unsettled.drained().await;
                        Completion::Drained(id)
                    });
                }
            }
            Completion::Drained(id) => self.manager.handle_drained(now, id),
            Completion::Leased(id, result) => {
                let result = result.map_err(|error| {
                    tracing::debug!(%error, "no lease");
                    error.kind()
                });
                self.manager.handle_leased(now, id, result);
            }
            Completion::Dropped(id, result) => {
                let result = result.map_err(|error| {
                    tracing::warn!(%error, "segment not dropped");
                    error.kind()
                });
                self.manager.handle_segment_dropped(now, id, result);
            }
            Completion::Synced => self.syncs -= 1,
            Completion::Silent => {}
        }
    }
}

/// Which block of which operation a move begins or ends at.
fn engine_end(one: &Move) -> Option<(OperationId, u32)> {
    [one.from, one.to]
        .into_iter()
        .find_map(|place| match place {
            Place::Engine {
                operation,
                position,
            } => Some((operation, position)),
            _ => None,
        })
}
