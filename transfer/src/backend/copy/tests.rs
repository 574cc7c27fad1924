//! The queue of copies: who gets what of it, and that nothing is lost on the way.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::queue::{Hands, LENT_FOR, Queue};
use crate::request::Priority;

const PATIENCE: Duration = Duration::from_secs(60);

fn push(queue: &Queue<u32>, task: u32, hands: Hands) {
    queue.push(task, Priority::Normal, hands).unwrap();
}

/// A clock that always says that someone lent a thread a moment ago, and a queue in which one was.
fn lent() -> Queue<u32> {
    let queue = Queue::with_clock(|_| true);
    assert_eq!(queue.lend(), None);
    queue
}

/// Asks for a task that must be kept in order, with one in front of it that need not, and with one behind.
#[test]
fn what_is_to_be_kept_in_order_is_not_lent() {
    let queue = lent();
    push(&queue, 1, Hands::Own);
    push(&queue, 2, Hands::Any);
    assert_eq!(queue.lend(), None);
    assert_eq!(queue.next(), Some((1, Priority::Normal)));
    push(&queue, 3, Hands::Own);
    assert_eq!(queue.lend(), Some(2));
    assert_eq!(queue.next(), Some((3, Priority::Normal)));
    assert_eq!(queue.lend(), None);
}

/// Lends a task, puts it back half done, and lends again: it is the first, before those that came meanwhile.
#[test]
fn what_is_put_back_is_the_next() {
    let queue = lent();
    push(&queue, 1, Hands::Any);
    assert_eq!(queue.lend(), Some(1));
    push(&queue, 2, Hands::Any);
    queue.put_back(1).unwrap();
    assert_eq!((queue.lend(), queue.lend()), (Some(1), Some(2)));
}

/// Background tasks go to the thread alone, even while others lend theirs, and only when nothing else waits.
#[test]
fn background_tasks_are_the_threads() {
    let queue = lent();
    queue.push(1, Priority::Background, Hands::Any).unwrap();
    push(&queue, 2, Hands::Own);
    assert_eq!(queue.lend(), None);
    assert_eq!(queue.next(), Some((2, Priority::Normal)));
    assert_eq!(queue.next(), Some((1, Priority::Background)));
}

/// Lends once and then lets the task lie: the thread takes it, though nobody tells it to.
#[test]
fn what_nobody_lends_a_thread_for_is_the_threads() {
    let queue = Arc::new(Queue::new());
    let (seen, tasks) = std::sync::mpsc::channel();
    let taking = queue.clone();
    let thread = std::thread::spawn(move || {
        while let Some((task, _)) = taking.next() {
            seen.send(task).unwrap();
        }
    });
    for task in 0..100 {
        assert_eq!(queue.lend(), None);
        push(&queue, task, Hands::Any);
        assert_eq!(tasks.recv_timeout(PATIENCE), Ok(task));
    }
    queue.close();
    thread.join().unwrap();
}

/// None comes in after the end; those that waited are still done.
#[test]
fn a_closed_queue_hands_back() {
    let queue = Queue::new();
    push(&queue, 1, Hands::Any);
    push(&queue, 2, Hands::Any);
    queue.push(4, Priority::Background, Hands::Any).unwrap();
    assert_eq!(queue.lend(), Some(1));
    queue.close();
    assert_eq!(queue.put_back(1), Err(1));
    let refused = queue.push(5, Priority::Normal, Hands::Any);
    assert_eq!(refused, Err(5));
    let left: Vec<u32> = std::iter::from_fn(|| queue.next().map(|(task, _)| task)).collect();
    assert_eq!(left, [2, 4]);
}

/// Two that push, two that lend and stop half-way, and the thread: every task is done once, in whatever hands.
#[test]
fn every_task_is_done_once() {
    const EACH: usize = 2000;
    let queue = Arc::new(Queue::<(usize, u32)>::new());
    let done: Arc<Vec<AtomicUsize>> =
        Arc::new((0..2 * EACH).map(|_| AtomicUsize::new(0)).collect());
    let count = Arc::new(AtomicUsize::new(0));
    let finish = |task: usize, done: &[AtomicUsize], count: &AtomicUsize| {
        done[task].fetch_add(1, Ordering::Relaxed);
        count.fetch_add(1, Ordering::Release);
    };
    let (own, own_done, own_count) = (queue.clone(), done.clone(), count.clone());
    let thread = std::thread::spawn(move || {
        while let Some(((task, _), _)) = own.next() {
            finish(task, &own_done, &own_count);
        }
    });
    std::thread::scope(|scope| {
        for half in 0..2 {
            let queue = &queue;
            scope.spawn(move || {
                for task in 0..EACH {
                    let hands = match task % 7 {
                        0 => Hands::Own,
                        _ => Hands::Any,
                    };
                    let task = (half * EACH + task, 0);
                    queue.push(task, Priority::Normal, hands).unwrap();
                    if task.0 % 64 == 0 {
                        std::thread::sleep(LENT_FOR);
                    }
                }
            });
            let (done, count) = (&done, &count);
            scope.spawn(move || {
                let until = Instant::now() + PATIENCE;
                while count.load(Ordering::Acquire) < 2 * EACH && Instant::now() < until {
                    match queue.lend() {
                        Some((task, tries)) if tries < 2 => {
                            queue.put_back((task, tries + 1)).unwrap()
                        }
                        Some((task, _)) => finish(task, done, count),
                        None => std::thread::yield_now(),
                    }
                }
            });
        }
    });
    queue.close();
    thread.join().unwrap();
    assert!(done.iter().all(|times| times.load(Ordering::Relaxed) == 1));
}
