//! Whose turn it is at a store: so many at once, those that give way last.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::request::Priority;

/// Requests to one store at once, in the order in which they came, and those that give way behind the others.
pub(super) struct Turns {
    state: Mutex<State>,
    /// Of all turns, how many those that give way may have together.
    background_max: usize,
}

struct State {
    free: usize,
    background: usize,
    waiting: [VecDeque<oneshot::Sender<Turn>>; 2],
}

/// Given back when it is dropped.
pub(super) struct Turn {
    turns: Arc<Turns>,
    priority: Priority,
}

impl Turns {
    /// So many turns, at least one. A quarter of them is kept from those that give way.
    pub(super) fn new(count: usize) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                free: count,
                background: 0,
                waiting: [VecDeque::new(), VecDeque::new()],
            }),
            background_max: count - count / 4,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a turn.
    ///
    /// # Cancel safety
    /// Who stops waiting keeps nobody from his turn.
    pub(super) async fn take(self: &Arc<Self>, priority: Priority) -> Turn {
        let (sender, turn) = oneshot::channel();
        self.lock().waiting[priority as usize].push_back(sender);
        self.give();
        match turn.await {
            Ok(turn) => turn,
            // The sender stays in line until it gives a turn.
            Err(_) => std::future::pending().await,
        }
    }

    /// Gives turns to those who wait, as many as there are.
    fn give(self: &Arc<Self>) {
        while let Some((who, turn)) = self.next() {
            // Who does not wait any more gives it back by dropping it.
            drop(who.send(turn));
        }
    }

    fn next(self: &Arc<Self>) -> Option<(oneshot::Sender<Turn>, Turn)> {
        let mut state = self.lock();
        for priority in [Priority::Normal, Priority::Background] {
            let gives_way = priority == Priority::Background;
            if state.free == 0 || (gives_way && state.background >= self.background_max) {
                return None;
            }
            let waiting = &mut state.waiting[priority as usize];
            let Some(who) = std::iter::from_fn(|| waiting.pop_front()).find(|who| !who.is_closed())
            else {
                continue;
            };
            state.free -= 1;
            state.background += usize::from(gives_way);
            let turns = self.clone();
            return Some((who, Turn { turns, priority }));
        }
        None
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut state = self.turns.lock();
        state.free += 1;
        state.background -= usize::from(self.priority == Priority::Background);
        drop(state);
        self.turns.give();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    fn take(turns: &Arc<Turns>, priority: Priority) -> impl Future<Output = Turn> + Unpin + use<> {
        let turns = turns.clone();
        let mut taking = Box::pin(async move { turns.take(priority).await });
        // Gets in line.
        let first = taking.as_mut().now_or_never();
        Box::pin(async move {
            match first {
                Some(turn) => turn,
                None => taking.await,
            }
        })
    }

    /// Four turns: those that give way get three of them; the rest of them wait while others do.
    #[test]
    fn those_that_give_way_go_last_and_leave_room() {
        use Priority::{Background, Normal};
        let turns = Turns::new(4);
        let mut early: Vec<_> = (0..3)
            .map(|_| take(&turns, Background).now_or_never().unwrap())
            .collect();
        let mut late = take(&turns, Background);
        assert!((&mut late).now_or_never().is_none(), "one turn is kept");
        let first = take(&turns, Normal).now_or_never().unwrap();
        let (given_up, mut second) = (take(&turns, Normal), take(&turns, Normal));
        assert!(
            (&mut second).now_or_never().is_none(),
            "all turns are taken"
        );
        drop(given_up);
        early.pop();
        let second = second.now_or_never().expect("it overtakes");
        assert!((&mut late).now_or_never().is_none(), "no turn is free");
        drop((first, second));
        assert!(late.now_or_never().is_some());
    }
}
