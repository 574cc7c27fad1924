//! Copies that wait for a thread of their own, while others lend theirs and leave again. However that goes: each is done once, and
//! the thread is neither left asleep over one nor gone before it.

use std::sync::Arc;

use loom::thread;

use crate::explore;
use crate::queue::{Hands, Queue};
use crate::request::Priority;
use crate::sync::{AtomicU64, Ordering};

/// What was done, a digit for each task.
type Done = Arc<AtomicU64>;

fn finish(done: &Done, task: u64) {
    done.fetch_add(10_u64.pow(task as u32), Ordering::Relaxed);
}

/// Nobody was here a moment ago: loom's waits have no limit, so the thread sleeps until it is told.
fn queue() -> Arc<Queue<u64>> {
    Arc::new(Queue::with_clock(|_| false))
}

fn serve(queue: &Arc<Queue<u64>>, done: &Done) -> thread::JoinHandle<()> {
    let (queue, done) = (queue.clone(), done.clone());
    thread::spawn(move || {
        while let Some((task, _)) = queue.next() {
            finish(&done, task);
        }
    })
}

/// Two tasks come; one who waits takes one of them, leaves it half-way, and finishes it if it is too late for that.
pub fn a_task_that_is_lent_and_left_is_done_once() {
    explore(3, || {
        let (queue, done) = (queue(), Done::default());
        let own = serve(&queue, &done);
        let (lent, lent_done) = (queue.clone(), done.clone());
        let waiter = thread::spawn(move || {
            if let Some(task) = lent.lend()
                && let Err(task) = lent.put_back(task)
            {
                finish(&lent_done, task);
            }
        });
        for (task, hands) in [(0, Hands::Any), (1, Hands::Own)] {
            queue
                .push(task, Priority::Normal, hands)
                .expect("it is open");
        }
        queue.close();
        waiter.join().expect("it ends");
        own.join().expect("it ends");
        assert_eq!(done.load(Ordering::Relaxed), 11);
    });
}

/// Nothing closes the queue before the thread has done what was put back: it must have been told.
pub fn who_leaves_a_task_tells_the_thread() {
    explore(3, || {
        let (queue, done) = (queue(), Done::default());
        queue
            .push(0, Priority::Normal, Hands::Any)
            .expect("it is open");
        let task = queue.lend().expect("it waits");
        let (own_queue, own_done) = (queue.clone(), done.clone());
        let own = thread::spawn(move || {
            if let Some((task, _)) = own_queue.next() {
                finish(&own_done, task);
            }
        });
        queue.put_back(task).expect("it is open");
        own.join().expect("it ends");
        assert_eq!(done.load(Ordering::Relaxed), 1);
    });
}
