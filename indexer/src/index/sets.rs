//! Interned sets of holders: the blocks of a shared prefix have the same holders, so they share one set.
//!
//! A set of one holder is that holder. Every other set is an immutable sorted list among the index's words, which lives
//! as long as a span refers to it. Readers may meet a list that is gone already; what they read then is thrown away.

#[cfg(test)]
mod tests;

use std::collections::HashMap;

use kvcache_core::Tier;

use super::arena::{WordLists, Words, get, set};
use super::hash::KeyState;
use crate::sync::AtomicU32;

/// One source's cache in one tier: the pod, the source among the pod's, the tier; or, as [`Holder::SHARED`], what every
/// pod reaches. Holders of one pod are next to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Holder(u32);

const TIER_BITS: u32 = 2;
const SOURCE_BITS: u32 = 8;
const POD_SHIFT: u32 = TIER_BITS + SOURCE_BITS;

/// The most sources of one pod.
pub(super) const POD_SOURCES_MAX: usize = 1 << SOURCE_BITS;
/// The most pods of one index.
pub(super) const PODS_MAX: usize = (1 << (31 - POD_SHIFT)) - 1;

impl Holder {
    /// The shared tiers, which belong to no source: pod 0 is nobody's.
    pub(super) const SHARED: Self = Self(Tier::Object as u32);

    /// A tier of a source. Of a shared tier it is the source's claim to have stored there, which lookups skip.
    pub(super) const fn new(source: SourceNumber, tier: Tier) -> Self {
        Self(source.0 << TIER_BITS | tier as u32)
    }

    pub(super) const fn from_raw(raw: u32) -> Self {
        Self(raw)
    }

    pub(super) const fn raw(self) -> u32 {
        self.0
    }

    pub(super) const fn source(self) -> SourceNumber {
        SourceNumber(self.0 >> TIER_BITS)
    }

    pub(super) const fn pod(self) -> u32 {
        self.0 >> POD_SHIFT
    }

    /// The tier's place in [`Tier::ALL`].
    pub(super) const fn tier(self) -> usize {
        (self.0 & 3) as usize
    }

    /// Whether it is only a source's claim.
    pub(super) const fn is_claim(self) -> bool {
        self.tier() == Tier::Object as usize && self.pod() != 0
    }
}

/// A source among all: its pod, and which of the pod's it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct SourceNumber(u32);

impl SourceNumber {
    pub(super) fn new(pod: u32, source: usize) -> Self {
        assert!(
            (1..=PODS_MAX as u32).contains(&pod) && source < POD_SOURCES_MAX,
            "{pod} {source}"
        );
        Self(pod << SOURCE_BITS | source as u32)
    }

    pub(super) const fn pod(self) -> u32 {
        self.0 >> SOURCE_BITS
    }

    /// Which of its pod's sources it is.
    pub(super) const fn of_pod(self) -> usize {
        (self.0 & ((1 << SOURCE_BITS) - 1)) as usize
    }
}

/// Marks a set of one holder, which is in the other bits.
const SINGLE: u32 = 1 << 31;

/// A set of holders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SetId(u32);

impl SetId {
    /// Nobody.
    pub(super) const EMPTY: Self = Self(0);

    pub(super) const fn single(holder: Holder) -> Self {
        Self(SINGLE | holder.0)
    }

    pub(super) const fn from_raw(raw: u32) -> Self {
        Self(raw)
    }

    pub(super) const fn raw(self) -> u32 {
        self.0
    }

    pub(super) const fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(super) const fn as_single(self) -> Option<Holder> {
        if self.0 & SINGLE == 0 {
            None
        } else {
            Some(Holder(self.0 & !SINGLE))
        }
    }

    const fn is_list(self) -> bool {
        !self.is_empty() && self.0 & SINGLE == 0
    }
}

// A list's words: how many members, how many references, its birth and what its members are like, the members.
const LENGTH: usize = 0;
const REFERENCES: usize = 1;
const BIRTH: usize = 2;
const MEMBERS: usize = 3;
/// Not all members are claims.
const IS_REAL: u32 = 1 << 31;
/// No member is a claim, and no pod is in it twice.
const IS_PLAIN: u32 = 1 << 30;
const BIRTHS_MASK: u32 = IS_PLAIN - 1;

/// The members of a list; empty for sets that have none, none when torn.
#[inline]
pub(super) fn members(words: &Words, set: SetId) -> Option<&[AtomicU32]> {
    if !set.is_list() {
        return Some(&[]);
    }
    let length = get(&words.list(set.0, 1)?[LENGTH]) as usize;
    words
        .list(set.0, length.checked_add(MEMBERS)?)?
        .get(MEMBERS..)
}

/// The first word of a set that is a list, to have it read early.
#[inline]
pub(super) fn first_word(words: &Words, set: SetId) -> Option<u32> {
    let is_list = set.is_list();
    is_list
        .then(|| words.list(set.0, 1)?.first().map(get))
        .flatten()
}

/// Whether no member of a set is a claim, and each another pod's.
#[inline]
pub(super) fn is_plain(words: &Words, set: SetId) -> bool {
    match set.as_single() {
        Some(only) => !only.is_claim(),
        None => {
            let head = words.list(set.0, MEMBERS);
            head.is_some_and(|head| get(&head[BIRTH]) & IS_PLAIN != 0)
        }
    }
}

/// Looks at the members of a set, also of one that is no list; none when torn.
#[inline]
pub(super) fn with_members<T>(
    words: &Words,
    set: SetId,
    look: impl FnOnce(&[AtomicU32]) -> T,
) -> Option<T> {
    match set.as_single() {
        Some(only) => Some(look(&[AtomicU32::new(only.raw())])),
        None => members(words, set).map(look),
    }
}

/// One remembered change: what a set becomes with or without a holder.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Change {
    from: SetId,
    from_birth: u32,
    holder: Holder,
    is_insert: bool,
    to: SetId,
    to_birth: u32,
}

/// Remembered changes: an event changes many blocks of one set in the same way, one after the other.
const MEMO_SLOTS: usize = 1024;

/// Which sets there are; only the writer has it.
pub(super) struct Sets {
    /// By a hash of the members. Of two sets that hash alike only one is found again: the other is just not shared.
    by_members: HashMap<u64, SetId, KeyState>,
    hash: KeyState,
    memo: Vec<Option<Change>>,
    scratch: Vec<u32>,
    births: u32,
    lists: usize,
}

impl Sets {
    pub(super) fn new() -> Self {
        let hash = KeyState::random();
        Self {
            by_members: HashMap::with_hasher(hash),
            hash,
            memo: vec![None; MEMO_SLOTS],
            scratch: Vec::new(),
            births: 0,
            lists: 0,
        }
    }

    /// Whether the set has the holder.
    pub(super) fn contains(words: &Words, set: SetId, holder: Holder) -> bool {
        match set.as_single() {
            Some(only) => only == holder,
            None => find(members(words, set).unwrap_or_default(), holder.0).is_ok(),
        }
    }

    /// Whether the set has any holder of the source, a claim included.
    pub(super) fn contains_source(words: &Words, set: SetId, source: SourceNumber) -> bool {
        match set.as_single() {
            Some(only) => only.source() == source,
            None => {
                let members = members(words, set).unwrap_or_default();
                let (Ok(place) | Err(place)) = find(members, source.0 << TIER_BITS);
                let next = members.get(place).map(get);
                next.is_some_and(|next| Holder(next).source() == source)
            }
        }
    }

    /// Whether somebody holds, rather than claims.
    pub(super) fn is_real(words: &Words, set: SetId) -> bool {
        match set.as_single() {
            Some(only) => !only.is_claim(),
            None if set.is_empty() => false,
            None => get(&words.known(set.0, MEMBERS)[BIRTH]) & IS_REAL != 0,
        }
    }

    /// The set with `holder` too, with a reference to it; the same set when it was in.
    pub(super) fn with(
        &mut self,
        words: &Words,
        lists: &mut WordLists,
        from: SetId,
        holder: Holder,
    ) -> SetId {
        if from.is_empty() {
            return SetId::single(holder);
        }
        if Self::contains(words, from, holder) {
            self.acquire(words, from);
            return from;
        }
        self.change(words, lists, from, holder, true)
    }

    /// The set without `holder`, with a reference to it; the same set when it was not in.
    pub(super) fn without(
        &mut self,
        words: &Words,
        lists: &mut WordLists,
        from: SetId,
        holder: Holder,
    ) -> SetId {
        if !Self::contains(words, from, holder) {
            self.acquire(words, from);
            return from;
        }
        if from.as_single().is_some() {
            return SetId::EMPTY;
        }
        self.change(words, lists, from, holder, false)
    }

    fn change(
        &mut self,
        words: &Words,
        lists: &mut WordLists,
        from: SetId,
        holder: Holder,
        is_insert: bool,
    ) -> SetId {
        let place = (from.0 ^ holder.0.rotate_left(16) ^ u32::from(is_insert))
            .wrapping_mul(0x9e37_79b1) as usize
            >> 22;
        let from_birth = birth(words, from);
        if let Some(known) = self.memo[place]
            && (known.from, known.from_birth) == (from, from_birth)
            && (known.holder, known.is_insert) == (holder, is_insert)
            && known.to_birth == birth(words, known.to)
        {
            self.acquire(words, known.to);
            return known.to;
        }
        let to = self.changed(words, lists, from, holder, is_insert);
        self.memo[place] = Some(Change {
            from,
            from_birth,
            holder,
            is_insert,
            to,
            to_birth: birth(words, to),
        });
        to
    }

    fn changed(
        &mut self,
        words: &Words,
        lists: &mut WordLists,
        from: SetId,
        holder: Holder,
        is_insert: bool,
    ) -> SetId {
        let mut next = std::mem::take(&mut self.scratch);
        next.clear();
        match from.as_single() {
            Some(only) => next.push(only.0),
            None => next.extend(members(words, from).unwrap_or_default().iter().map(get)),
        }
        match next.binary_search(&holder.0) {
            Err(place) if is_insert => next.insert(place, holder.0),
            Ok(place) if !is_insert => {
                next.remove(place);
            }
            _ => {}
        }
        let to = match next.as_slice() {
            [] => SetId::EMPTY,
            [only] => SetId::single(Holder(*only)),
            many => self.intern(words, lists, many),
        };
        self.scratch = next;
        to
    }

    fn intern(&mut self, words: &Words, lists: &mut WordLists, many: &[u32]) -> SetId {
        let hash = self.hash.hash_words(many.iter().copied());
        let known = self.by_members.get(&hash).copied();
        if let Some(known) = known
            && let Some(list) = members(words, known)
            && list.len() == many.len()
            && list.iter().map(get).eq(many.iter().copied())
        {
            self.acquire(words, known);
            return known;
        }
        let address = lists.allocate(words, MEMBERS + many.len());
        let list = words.known(address, MEMBERS + many.len());
        self.births = (self.births + 1) & BIRTHS_MASK;
        let mut holders = many.iter().map(|member| Holder(*member));
        let is_real = holders.clone().any(|holder| !holder.is_claim());
        // Ascending by pods, those of one pod are beside each other.
        let mut last = None;
        let is_plain = holders
            .all(|holder| !holder.is_claim() && last.replace(holder.pod()) != Some(holder.pod()));
        set(&list[LENGTH], many.len() as u32);
        set(&list[REFERENCES], 1);
        set(
            &list[BIRTH],
            self.births | if is_real { IS_REAL } else { 0 } | if is_plain { IS_PLAIN } else { 0 },
        );
        list[MEMBERS..]
            .iter()
            .zip(many)
            .for_each(|(word, member)| set(word, *member));
        let made = SetId(address);
        if known.is_none() {
            self.by_members.insert(hash, made);
        }
        self.lists += 1;
        made
    }

    /// Takes one more reference.
    pub(super) fn acquire(&self, words: &Words, id: SetId) {
        if id.is_list() {
            let references = &words.known(id.0, MEMBERS)[REFERENCES];
            set(references, get(references) + 1);
        }
    }

    /// Gives a reference back; the last one ends the set.
    pub(super) fn release(&mut self, words: &Words, lists: &mut WordLists, id: SetId) {
        if !id.is_list() {
            return;
        }
        let head = words.known(id.0, MEMBERS);
        let references = get(&head[REFERENCES]);
        assert!(references > 0, "{id:?} released more often than acquired");
        set(&head[REFERENCES], references - 1);
        if references > 1 {
            return;
        }
        let list = members(words, id).unwrap_or_default();
        let hash = self.hash.hash_words(list.iter().map(get));
        if self.by_members.get(&hash) == Some(&id) {
            self.by_members.remove(&hash);
        }
        // A remembered change that leads here must not be followed any more.
        set(&head[BIRTH], 0);
        self.lists -= 1;
        lists.release(id.0, MEMBERS + list.len());
    }

    /// How many sets of more than one holder there are.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.lists
    }

    /// Gives memory back after many sets have gone.
    pub(super) fn trim(&mut self) {
        if self.by_members.len() * 8 < self.by_members.capacity() {
            self.by_members.shrink_to(self.by_members.len() * 2);
        }
        self.memo.fill(None);
    }

    pub(super) fn bytes(&self) -> usize {
        // A hash table has a control byte per place, and one in eight places stays empty.
        self.by_members.capacity() * (size_of::<(u64, SetId)>() + 1) * 8 / 7
            + self.memo.capacity() * size_of::<Option<Change>>()
    }
}

fn birth(words: &Words, id: SetId) -> u32 {
    if !id.is_list() {
        return 0;
    }
    // No list has birth 0, so a list that has ended matches nothing; nor does one whose chunk is gone.
    words
        .list(id.0, MEMBERS)
        .map_or(u32::MAX, |head| get(&head[BIRTH]))
}

/// Where a member is, or would be.
pub(super) fn find(members: &[AtomicU32], member: u32) -> Result<usize, usize> {
    members.binary_search_by_key(&member, get)
}
