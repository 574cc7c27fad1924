//! Which runs may be cut, the least recently used first.
//!
//! A block may go when no block after it is there: of a run the last ones, down to one that another run goes on from.
//! Runs are queued by when they were used last as of when they were queued; one that was used since is queued again when
//! its turn comes, so that lookups need not know of the queue.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use super::hash::KeyState;
use super::recency::Recency;

/// What is known of a run.
#[derive(Clone, Copy, Default)]
struct Note {
    /// The key of the block before its first.
    parent: u64,
    is_there: bool,
    /// Whether `parent` is known.
    is_child: bool,
    is_queued: bool,
}

/// The runs that go on from a block.
#[derive(Clone, Copy)]
struct Children {
    count: u32,
    /// The run that the block was in when somebody last looked.
    parent_run: u32,
}

/// What may be evicted next; only the writer has it.
#[derive(Default)]
pub(super) struct Leaves {
    queue: BinaryHeap<Reverse<(u32, u32)>>,
    notes: Vec<Note>,
    /// By the block's key, so that a block that is stored anew has its children still.
    children: HashMap<u64, Children, KeyState>,
}

impl Leaves {
    /// A run begins after a block, named by its key and its run, or where nothing before is known.
    pub(super) fn begin(&mut self, run: u32, parent: Option<(u64, u32)>) {
        let place = run as usize;
        if place >= self.notes.len() {
            self.notes.resize(place + 1, Note::default());
        }
        let is_queued = self.notes[place].is_queued;
        self.notes[place] = Note {
            is_there: true,
            is_queued,
            ..Note::default()
        };
        if let Some(parent) = parent {
            self.adopt(run, parent);
        }
    }

    /// The run goes on from a block, as is known by now.
    pub(super) fn adopt(&mut self, run: u32, (parent, parent_run): (u64, u32)) {
        let Some(note) = self.notes.get_mut(run as usize) else {
            return;
        };
        if note.is_child || !note.is_there || run == parent_run {
            return;
        }
        (note.parent, note.is_child) = (parent, true);
        let children = self.children.entry(parent).or_insert(Children {
            count: 0,
            parent_run,
        });
        children.count += 1;
        children.parent_run = parent_run;
    }

    /// The run has blocks that may go, or will.
    #[inline]
    pub(super) fn enqueue(&mut self, recency: &Recency, run: u32) {
        if let Some(note) = self.notes.get_mut(run as usize)
            && note.is_there
            && !note.is_queued
        {
            note.is_queued = true;
            self.queue.push(Reverse((recency.last_use(run), run)));
        }
    }

    /// The run has become shorter, or has ended.
    pub(super) fn cut(&mut self, recency: &Recency, run: u32, is_over: bool) {
        if !is_over {
            self.enqueue(recency, run);
            return;
        }
        let Some(note) = self.notes.get_mut(run as usize) else {
            return;
        };
        note.is_there = false;
        if !std::mem::take(&mut note.is_child) {
            return;
        }
        let parent = note.parent;
        if let Some(children) = self.children.get_mut(&parent) {
            children.count -= 1;
            let Children { count, parent_run } = *children;
            if count == 0 {
                self.children.remove(&parent);
                self.enqueue(recency, parent_run);
            }
        }
    }

    /// The run that was used least recently of those that may have a block to give.
    pub(super) fn pop(&mut self, recency: &Recency) -> Option<u32> {
        while let Some(Reverse((queued, run))) = self.queue.pop() {
            let note = &mut self.notes[run as usize];
            if !note.is_there {
                note.is_queued = false;
                continue;
            }
            let last_use = recency.last_use(run);
            if last_use > queued {
                self.queue.push(Reverse((last_use, run)));
                continue;
            }
            note.is_queued = false;
            return Some(run);
        }
        None
    }

    /// Whether runs go on from a block of this run.
    pub(super) fn has_children(&mut self, key: u64, run: u32) -> bool {
        match self.children.get_mut(&key) {
            Some(children) => {
                // Whoever ends the last of them must find the block where it is now.
                children.parent_run = run;
                true
            }
            None => false,
        }
    }

    /// The clock begins anew.
    pub(super) fn restart(&mut self) {
        let runs = std::mem::take(&mut self.queue).into_iter();
        self.queue = runs.map(|Reverse((_, run))| Reverse((0, run))).collect();
    }

    /// Gives memory back; all runs are before `end`.
    pub(super) fn trim(&mut self, end: u32) {
        self.queue.retain(|Reverse((_, run))| *run < end);
        self.notes.truncate(end as usize);
        self.notes.shrink_to_fit();
        self.queue.shrink_to_fit();
        self.children.shrink_to_fit();
    }

    pub(super) fn bytes(&self) -> usize {
        self.queue.capacity() * size_of::<Reverse<(u32, u32)>>()
            + self.notes.capacity() * size_of::<Note>()
            + self.children.capacity() * (size_of::<(u64, Children)>() + 1) * 8 / 7
    }
}
