//! A region's gate.

#[path = "../../src/region/gate.rs"]
mod gate;

use std::sync::Arc;
use std::time::Duration;

use loom::thread;

use self::gate::Gate;
use crate::explore;

/// Two transfers and an owner who closes: when the owner's wait is over nobody is inside, and nobody comes in later.
pub fn nobody_is_inside_when_the_wait_is_over() {
    explore(3, || {
        let gate = Arc::new(Gate::default());
        // As many as are inside.
        let inside = Arc::new(loom::sync::atomic::AtomicU64::new(0));
        let users: Vec<_> = (0..2)
            .map(|_| {
                let (gate, inside) = (gate.clone(), inside.clone());
                thread::spawn(move || {
                    if gate.enter() {
                        inside.fetch_add(1, loom::sync::atomic::Ordering::Relaxed);
                        inside.fetch_sub(1, loom::sync::atomic::Ordering::Relaxed);
                        gate.leave();
                    }
                })
            })
            .collect();
        assert!(gate.close());
        assert!(gate.wait(Duration::MAX / 4));
        assert_eq!(inside.load(loom::sync::atomic::Ordering::Relaxed), 0);
        assert!(!gate.enter());
        users
            .into_iter()
            .for_each(|user| user.join().expect("it ends"));
    });
}

/// One that must end something first holds the region although it is closed; the owner waits for it.
pub fn who_holds_it_is_waited_for() {
    explore(3, || {
        let gate = Arc::new(Gate::default());
        gate.hold();
        assert!(gate.close());
        let holder = gate.clone();
        let ended = Arc::new(loom::sync::atomic::AtomicBool::new(false));
        let tells = ended.clone();
        let holder = thread::spawn(move || {
            tells.store(true, loom::sync::atomic::Ordering::Relaxed);
            holder.leave();
        });
        assert!(gate.wait(Duration::MAX / 4));
        assert!(ended.load(loom::sync::atomic::Ordering::Relaxed));
        holder.join().expect("it ends");
    });
}
