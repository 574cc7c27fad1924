//! Operations: polled, waited for from several threads, signalled, dropped, panicking, and left without a runtime.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::oneshot;

use super::*;
use crate::runtime::Runtime;

const SECONDS: Duration = Duration::from_secs(20);

fn runtime() -> Runtime {
    Runtime::start("test", 1).unwrap()
}

fn is_readable(signal: BorrowedFd<'_>, patience: Duration) -> bool {
    let mut polled = [PollFd::new(&signal, PollFlags::IN)];
    let patience = Timespec::try_from(patience).unwrap();
    poll(&mut polled, Some(&patience)).unwrap() == 1
}

/// Holds the work back until everybody has seen that it is not done.
#[test]
fn an_outcome_is_seen_by_all_who_wait_and_stays() {
    let runtime = runtime();
    let (go, gone) = oneshot::channel();
    let operation = runtime.spawn(async move { Ok(gone.await.unwrap()) });
    assert!(operation.poll().is_none() && !operation.is_done());
    assert!(operation.wait(Duration::ZERO).is_none());
    let signal = operation.event_fd().unwrap();
    assert!(!is_readable(signal, Duration::ZERO));
    std::thread::scope(|scope| {
        let waits = [(); 3].map(|()| {
            let operation = operation.clone();
            scope.spawn(move || *operation.wait(SECONDS).unwrap().unwrap())
        });
        go.send(7).unwrap();
        assert_eq!(waits.map(|wait| wait.join().unwrap()), [7; 3]);
    });
    assert!(is_readable(signal, SECONDS) && is_readable(signal, SECONDS));
    assert_eq!(*operation.poll().unwrap().unwrap(), 7);
    assert_eq!(*operation.wait(Duration::MAX).unwrap().unwrap(), 7);
}

/// A descriptor that is asked for only after the end.
#[test]
fn a_late_descriptor_is_readable_at_once() {
    let runtime = runtime();
    let operation = runtime.spawn(async { Ok(()) });
    operation.wait(SECONDS).unwrap().unwrap();
    assert!(is_readable(operation.event_fd().unwrap(), Duration::ZERO));
}

/// The error of the work, asked for twice.
#[test]
fn an_error_is_told_each_time_with_its_kind_and_text() {
    let runtime = runtime();
    let operation =
        runtime.spawn::<(), _>(async { Err(Error::new(ErrorKind::NoSpace, "full").at("disk")) });
    for _ in 0..2 {
        let error = operation.wait(SECONDS).unwrap().unwrap_err();
        assert_eq!(
            (error.kind(), error.context()),
            (ErrorKind::NoSpace, "disk: full")
        );
    }
}

/// The only handle goes while the work is held back; the work still comes to its end.
#[test]
fn dropping_an_operation_stops_nothing() {
    let runtime = runtime();
    let (go, gone) = oneshot::channel::<()>();
    let (tell, told) = std::sync::mpsc::channel();
    drop(runtime.spawn(async move {
        gone.await.unwrap();
        tell.send(()).unwrap();
        Ok(())
    }));
    go.send(()).unwrap();
    told.recv_timeout(SECONDS).unwrap();
}

/// A panic inside the work is the operation's error and the end of the runtime's life.
#[test]
fn a_panic_poisons_what_the_runtime_carries() {
    let runtime = runtime();
    drop(runtime.life().enter().unwrap());
    let operation = runtime.spawn::<(), _>(async { panic!("a promise was broken") });
    let error = operation.wait(SECONDS).unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Internal);
    let error = runtime.life().enter().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Internal);
}

/// The runtime goes while the work can never end.
#[test]
fn an_operation_outlives_its_runtime_as_cancelled() {
    let runtime = runtime();
    let operation = runtime.spawn::<(), _>(std::future::pending());
    drop(runtime);
    let error = operation.wait(SECONDS).unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
}
