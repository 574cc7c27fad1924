//! What is said last is heard, however the path ends.

use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

fn pair(reactor: &Arc<Reactor>) -> [Arc<Link>; 2] {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (one, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    [one, other].map(|socket| Arc::new(Link::new(socket, reactor).unwrap()))
}

/// Nobody listens: what counts here is what is in the socket.
struct Deaf;

impl Source for Deaf {
    fn ready(&self, _readiness: Interest) {}

    fn orphaned(&self) {}
}

/// The regions that the other end has let go of, until it has closed the path.
fn last_words(link: &Link) -> Vec<RegionId> {
    let until = Instant::now() + PATIENCE;
    let mut regions = Vec::new();
    loop {
        match link.receive() {
            Ok(Some(Received {
                message: Message::Unmapped { region },
                ..
            })) => regions.push(region),
            Ok(Some(_)) => {}
            Ok(None) if Instant::now() < until => std::thread::yield_now(),
            Ok(None) => panic!("the path is still open after {regions:?}"),
            Err(_) => return regions,
        }
    }
}

#[test]
fn what_was_said_before_a_path_was_closed_with_something_unread_is_heard() {
    let (reactor, thread) = Reactor::start().unwrap();
    let [owner, user] = pair(&reactor);
    let unread = Message::Revoke {
        region: RegionId(1),
    };
    owner.send(&unread, None).unwrap();
    let regions: Vec<RegionId> = (1..4).map(RegionId).collect();
    for region in &regions {
        user.send_last_word(*region);
    }
    drop(user);
    assert_eq!(last_words(&owner), regions);
    reactor.close();
    thread.join().unwrap();
}

#[test]
fn last_words_wait_for_room_when_the_path_has_ended() {
    let (reactor, thread) = Reactor::start().unwrap();
    let [owner, user] = pair(&reactor);
    user.watch(Arc::new(Deaf), Arc::new(Deaf)).unwrap();
    let long = Message::Notify {
        id: 1,
        bytes: vec![0; 8192].into(),
    };
    while user.lock().unsent.is_empty() {
        user.send(&long, None).unwrap();
    }
    user.send_last_word(RegionId(1));
    user.ignore_death();
    user.ignore_messages();
    // By a copy that was under way.
    user.send_last_word(RegionId(2));
    drop(user);
    assert_eq!(last_words(&owner), [RegionId(1), RegionId(2)]);
    reactor.close();
    thread.join().unwrap();
}
