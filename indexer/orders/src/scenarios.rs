//! One writer and one reader, each event a few stores; what the reader keeps must have been there at one moment.

use std::sync::Arc;

use kvcache_core::{IndexKey, Tier};
use loom::thread;

use super::arena::{WordLists, Words, get};
use super::doors::{Door, DoorCount, Doors};
use super::runs::{Header, RunSlots, Runs, Span};
use super::sets::{Holder, SetId, Sets, SourceNumber, members};
use super::shown::Shown;
use super::sync::{Ordering, fence};

fn holder(pod: u32) -> Holder {
    Holder::new(SourceNumber::new(pod, 0), Tier::Device)
}

fn one(pod: u32) -> SetId {
    SetId::single(holder(pod))
}

/// A run of so many blocks that one set holds.
fn fill(header: &Header, words: &Words, lists: &mut WordLists, blocks: u32, set: SetId) {
    let spans = header.spans();
    header.set_blocks(blocks);
    header.replace_spans(words, lists, (0, spans), &[Span { end: blocks, set }]);
}

/// What a lookup reads of a run, kept only if the run stood still.
fn read(header: &Header, words: &Words) -> Option<(u32, Option<Span>)> {
    let version = header.version()?;
    let found = (header.blocks(), header.span(words, 0));
    fence(Ordering::Acquire);
    header.is_still(version).then_some(found)
}

/// A run gets a block and another holder in one event; a reader sees both or neither.
pub fn a_run_changes_whole_or_not_at_all() {
    loom::model(|| {
        let shared = Arc::new((Header::default(), Words::new()));
        let mut lists = WordLists::new();
        fill(&shared.0, &shared.1, &mut lists, 1, one(1));
        let reader = {
            let shared = shared.clone();
            thread::spawn(move || read(&shared.0, &shared.1))
        };
        let (header, words) = &*shared;
        header.close();
        fill(header, words, &mut lists, 2, one(2));
        header.open();
        if let Some((blocks, span)) = reader.join().expect("the reader ends") {
            let set = one(blocks);
            assert_eq!(span, Some(Span { end: blocks, set }));
        }
    });
}

/// A run begins and an entry leads there; whoever finds the entry finds the run as the event left it.
pub fn an_entry_leads_to_what_was_written_before() {
    loom::model(|| {
        let shared = Arc::new((Doors::new(), Runs::new(), Words::new()));
        let (mut lists, mut count, mut slots) =
            (WordLists::new(), DoorCount::default(), RunSlots::default());
        let key = IndexKey(7);
        let reader = {
            let shared = shared.clone();
            thread::spawn(move || {
                let (doors, runs, words) = &*shared;
                let door = doors.find(key)?;
                let header = runs.get(door.run).expect("the run is there");
                Some((door, read(header, words)))
            })
        };
        let (doors, runs, words) = &*shared;
        let run = slots.allocate(runs);
        let header = runs.get(run).expect("the run was just made");
        header.close();
        fill(header, words, &mut lists, 1, one(1));
        let door = Door { run, block: 0 };
        count.insert(doors, key, door);
        header.open();
        if let Some((found, read)) = reader.join().expect("the reader ends") {
            assert_eq!(found, door);
            // None: it came between the entry and the end of the event.
            let span = Span {
                end: 1,
                set: one(1),
            };
            assert!(read.is_none_or(|read| read == (1, Some(span))));
        }
    });
}

/// In one event an entry goes and another one comes; a reader that searches for both finds one of them, or is turned away.
pub fn entries_change_whole_or_not_at_all() {
    loom::model(|| {
        let shared = Arc::new(Doors::new());
        let mut count = DoorCount::default();
        let (old, new) = (IndexKey(1), IndexKey(2));
        let door = |run| Door { run, block: 0 };
        count.insert(&shared, old, door(1));
        let reader = {
            let doors = shared.clone();
            thread::spawn(move || {
                let version = doors.version()?;
                let found = (doors.find(old), doors.find(new));
                fence(Ordering::Acquire);
                doors.is_still(version).then_some(found)
            })
        };
        count.remove(&shared, old, door(1));
        count.insert(&shared, new, door(2));
        count.finish(&shared);
        if let Some(found) = reader.join().expect("the reader ends") {
            let (before, after) = ((Some(door(1)), None), (None, Some(door(2))));
            assert!(found == before || found == after, "{found:?}");
        }
    });
}

/// A run's holders change, their list is given back and out again to others; a reader of the run never takes those for the
/// run's.
pub fn a_list_that_is_used_again_is_not_believed() {
    loom::model(|| {
        let shared = Arc::new((Header::default(), Words::new()));
        let (mut lists, mut sets) = (WordLists::new(), Sets::new());
        let (header, words) = &*shared;
        let pair = sets.with(words, &mut lists, one(1), holder(2));
        fill(header, words, &mut lists, 1, pair);
        let reader = {
            let shared = shared.clone();
            thread::spawn(move || {
                let (header, words) = &*shared;
                let version = header.version()?;
                let set = header.span(words, 0)?.set;
                let held = match set.as_single() {
                    Some(only) => vec![only.raw()],
                    None => members(words, set)?.iter().map(get).collect(),
                };
                fence(Ordering::Acquire);
                header.is_still(version).then_some(held)
            })
        };
        header.close();
        fill(header, words, &mut lists, 1, one(3));
        sets.release(words, &mut lists, pair);
        let other = sets.with(words, &mut lists, one(5), holder(6));
        assert_eq!(other, pair, "the list is used again");
        header.open();
        if let Some(held) = reader.join().expect("the reader ends") {
            let before = [1, 2].map(|pod| holder(pod).raw());
            let after = [holder(3).raw()];
            assert!(held == before || held == after, "{held:?}");
        }
    });
}

/// How a source stands changes twice while it is read: all of one change is seen, or nothing.
pub fn what_is_shown_is_of_one_moment() {
    loom::model(|| {
        let shown = Arc::new(Shown::<2>::new());
        let reader = {
            let shown = shown.clone();
            thread::spawn(move || shown.get())
        };
        shown.set([1; 2]);
        shown.set([2; 2]);
        if let Some(words) = reader.join().expect("the reader ends") {
            assert_eq!(words[0], words[1]);
        }
    });
}
