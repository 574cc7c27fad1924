//! Publishers' images in the place of batches that are gone, and what waits beside others.

use super::*;

fn piece(cut: u64, number: u32, count: u32) -> ImagePiece {
    ImagePiece {
        cut: Sequence(cut),
        number,
        count,
        payload: Bytes::from(format!("{number} of {count} before {cut}")),
    }
}

/// A follower of batches 0 to 4 comes back when the publisher has 10 batches and keeps the last two of them.
fn come_back_too_late() -> World {
    let mut world = connected(5);
    world.disconnect();
    world.publish(5);
    world.buffered_max = 2;
    world.connect();
    world.serve_replay();
    world
}

impl World {
    fn deliver_image(&mut self, pieces: &[ImagePiece]) {
        for piece in pieces {
            let epoch = self.epoch(self.incarnation);
            self.ingest.handle_image(self.now, epoch, piece.clone());
            self.act();
        }
    }
}

/// The image comes before the oldest batch: nothing is cleared, and it is taken up together with that batch.
#[test]
fn an_image_takes_the_place_of_batches_that_are_gone() {
    let mut world = come_back_too_late();
    let image = [piece(8, 0, 2), piece(8, 1, 2)];
    world.deliver_image(&image);
    assert_eq!(
        world.images,
        [] as [Vec<Bytes>; 0],
        "not before its batch has come"
    );
    world.settle();
    assert_eq!(world.images, [image.map(|piece| piece.payload).to_vec()]);
    assert_eq!((world.clears.len(), world.ingest.stats().images), (0, 1));
    world.assert_exact();
}

/// A follower that begins when the publisher keeps a part only gets the rest as an image.
#[test]
fn a_newcomer_begins_with_the_image() {
    let mut world = World::new(IngestConfig::default());
    world.publish(10);
    world.buffered_max = 2;
    world.connect();
    world.serve_replay();
    world.deliver_image(&[piece(8, 0, 1)]);
    world.settle();
    assert_eq!((world.images.len(), world.clears.len()), (1, 0));
    world.assert_exact();
}

/// Each image lacks something, or does not fit what follows: the source is cleared instead.
#[test]
fn an_image_that_is_not_whole_is_not_taken_up() {
    let wrong: [&[ImagePiece]; 8] = [
        &[],
        &[piece(8, 0, 2)],
        &[piece(8, 1, 2)],
        &[piece(8, 0, 3), piece(8, 2, 3)],
        &[piece(8, 0, 2), piece(7, 1, 2)],
        &[piece(7, 0, 1)],
        &[piece(8, 0, 0)],
        &[piece(8, 0, 2), piece(8, 1, 2), piece(8, 2, 2)],
    ];
    for image in wrong {
        let mut world = come_back_too_late();
        world.deliver_image(image);
        world.settle();
        assert_eq!(world.images, [] as [Vec<Bytes>; 0], "{image:?}");
        assert_eq!(world.clears, [ClearReason::HistoryLost], "{image:?}");
        world.assert_exact();
    }
}

/// More bytes than are taken.
#[test]
fn an_image_that_is_too_large_is_not_taken_up() {
    let mut world = come_back_too_late();
    world.ingest.config.image_bytes_max = 20;
    world.deliver_image(&[piece(8, 0, 2), piece(8, 1, 2)]);
    world.settle();
    assert_eq!(world.clears, [ClearReason::HistoryLost]);
}

/// Another source has taken the room that both share: the image is not taken up, and what was kept of it is given back.
#[test]
fn an_image_that_finds_no_room_beside_others_is_not_taken_up() {
    let room = Room::new(40);
    let fresh = || {
        let mut world = World::new(IngestConfig::default());
        world.ingest = Ingest::new(IngestConfig::default()).sharing(&room);
        world.publish(10);
        world.buffered_max = 2;
        world.connect();
        world.serve_replay();
        world
    };
    let (mut first, mut second) = (fresh(), fresh());
    first.deliver_image(&[piece(8, 0, 2), piece(8, 1, 2)]);
    let of_first = room.used();
    assert!(of_first > 20);
    second.deliver_image(&[piece(8, 0, 2), piece(8, 1, 2)]);
    assert_eq!(room.used(), of_first, "half an image is kept");
    second.settle();
    assert_eq!(second.images, [] as [Vec<Bytes>; 0]);
    second.assert_exact();
    first.settle();
    assert_eq!((first.images.len(), room.used()), (1, 0));
    let mut third = fresh();
    third.deliver_image(&[piece(8, 0, 2), piece(8, 1, 2)]);
    third.settle();
    assert_eq!((third.images.len(), room.used()), (1, 0));
}

/// Live batches of two sources behind replays, with room for a few: what finds none is replayed, and all room is given back.
#[test]
fn batches_that_find_no_room_beside_others_are_asked_for_again() {
    let room = Room::new(6);
    let mut worlds = [1, 2].map(|_| {
        let mut world = World::new(IngestConfig::default());
        world.ingest = Ingest::new(IngestConfig::default()).sharing(&room);
        world.connect();
        world.publish(5);
        world
    });
    for world in &mut worlds {
        while !world.live.is_empty() {
            world.deliver_live();
        }
    }
    assert_eq!(room.used(), 6);
    assert!(worlds.iter().any(|world| world.ingest.stats().dropped > 0));
    for world in &mut worlds {
        world.settle();
        world.assert_exact();
        assert_eq!(world.applied.len(), 5);
    }
    assert_eq!(room.used(), 0);
}

/// The connection ends between the image and its batch: what was applied stays as it was, and the next connection asks
/// again from there.
#[test]
fn an_image_whose_batch_never_came_changes_nothing() {
    let mut world = come_back_too_late();
    world.deliver_image(&[piece(8, 0, 1)]);
    world.disconnect();
    assert_eq!(
        (world.images.len(), world.clears.len(), world.applied.len()),
        (0, 0, 5)
    );
    world.connect();
    assert_eq!(world.request, Some(4));
    world.serve_replay();
    world.settle();
    assert_eq!(
        world.clears,
        [ClearReason::HistoryLost],
        "the old image is not kept"
    );
}

/// A node that began anew tells what it holds now, under its new epoch.
#[test]
fn an_image_of_another_incarnation_clears_first() {
    let mut world = World::new(IngestConfig::default());
    world.tells_epoch = true;
    world.publish(5);
    world.connect();
    world.settle();
    world.disconnect();
    world.restart();
    world.publish(10);
    world.buffered_max = 2;
    world.connect();
    world.serve_replay();
    world.deliver_image(&[piece(8, 0, 1)]);
    assert_eq!(world.clears, [ClearReason::NewEpoch]);
    assert_eq!(world.applied, []);
    while world.replies.is_some() {
        world.deliver_reply();
    }
    assert_eq!(world.request, Some(0), "asked again from the start");
    world.serve_replay();
    world.deliver_image(&[piece(8, 0, 1)]);
    world.settle();
    assert_eq!((world.images.len(), world.clears.len()), (1, 1));
    world.assert_exact();
}
