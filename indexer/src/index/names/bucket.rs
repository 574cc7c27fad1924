//! A cache line of entries, and what they keep of a hash.

use super::TABLES;

pub(super) const BUCKET_ENTRIES: usize = 10;
pub(super) const TABLE_BITS: u32 = 10;
pub(super) const TAG_BITS: u32 = 20;
pub(super) const POSITION_BITS: u32 = 28;
pub(super) const POSITION_MASK: u32 = (1 << POSITION_BITS) - 1;
/// The bits of a tag that tell entries of one bucket apart come first to be compared: the lower ones.
pub(super) const LOW_TAG_BITS: u32 = 16;

/// A cache line of entries: the lower 16 bits of their tags, two a word; then the upper 4 bits of their tags with their
/// positions; then how many there are, and which went past this bucket because it was full, by their
/// lowest tag bits: so a search for what is not there ends here, but for few.
pub(super) type Bucket = [u32; BUCKET_WORDS];

pub(super) const BUCKET_WORDS: usize = 16;
pub(super) const REST: usize = BUCKET_ENTRIES / 2;
pub(super) const COUNTS: usize = BUCKET_WORDS - 1;
/// Where the bits of entries that went past begin, and how many there are. They stay until the table is rebuilt.
pub(super) const PASSED_SHIFT: u32 = 16;
pub(super) const PASSED_BITS: u32 = 16;
pub(super) const EMPTY: Bucket = [0; BUCKET_WORDS];

const _: () = assert!(REST + BUCKET_ENTRIES == COUNTS);

pub(super) fn used(bucket: &Bucket) -> usize {
    // Never more, but so the compiler knows it.
    (bucket[COUNTS] as u16 as usize).min(BUCKET_ENTRIES)
}

/// Whether an entry with this tag may have gone past.
pub(super) const fn was_passed(bucket: &Bucket, tag: Tag) -> bool {
    bucket[COUNTS] & tag.passing() != 0
}

pub(super) fn tags(bucket: &Bucket) -> &[u16] {
    bytemuck::cast_slice(&bucket[..REST])
}

pub(super) fn tags_mut(bucket: &mut Bucket) -> &mut [u16] {
    bytemuck::cast_slice_mut(&mut bucket[..REST])
}

/// Tags in a word.
pub(super) const LANES: usize = 4;
const LANE_BITS: u32 = 16;
const LANE_ONES: u64 = u64::MAX / 0xffff;
const LANE_SIGNS: u64 = LANE_ONES << (LANE_BITS - 1);

/// The highest bit of each lane that has these lower tag bits, by words; seldom also of others, or of unused entries.
#[inline]
pub(super) fn alike(bucket: &Bucket, low: u16) -> [u64; BUCKET_ENTRIES.div_ceil(LANES)] {
    let asked = LANE_ONES * u64::from(low);
    let word = |low: u32, high: u32| {
        // Lanes that are 0 borrow from the next one: https://graphics.stanford.edu/~seander/bithacks.html#ZeroInWord
        let unlike = (u64::from(high) << 32 | u64::from(low)) ^ asked;
        unlike.wrapping_sub(LANE_ONES) & !unlike & LANE_SIGNS
    };
    let last = word(bucket[4], 0) & u64::from(u32::MAX);
    [word(bucket[0], bucket[1]), word(bucket[2], bucket[3]), last]
}

/// Whether there is surely no entry with this tag, neither here nor further on; seldom false for no reason.
#[inline]
pub(super) fn is_unknown(bucket: &Bucket, tag: Tag) -> bool {
    let low = tag.low();
    let is_alike = tags(bucket)
        .iter()
        .fold(false, |any, tag| any | (*tag == low));
    !is_alike && !was_passed(bucket, tag)
}

/// The entry of a lane in [`alike`].
#[inline]
pub(super) const fn entry_of(word: usize, bits: u64) -> usize {
    (word * LANES + (bits.trailing_zeros() / LANE_BITS) as usize) % BUCKET_ENTRIES
}

/// Adds an entry to a bucket if it has room, else notes that it went past.
#[inline]
pub(super) fn try_push(bucket: &mut Bucket, tag: Tag, position: u32) -> bool {
    let entry = used(bucket);
    if entry == BUCKET_ENTRIES {
        bucket[COUNTS] |= tag.passing();
        return false;
    }
    tags_mut(bucket)[entry] = tag.low();
    bucket[REST + entry] = tag.rest(position);
    bucket[COUNTS] += 1;
    true
}

/// The tag of an entry of a table.
pub(super) fn tag_of(table: usize, bucket: &Bucket, entry: usize) -> Tag {
    let high = bucket[REST + entry] >> POSITION_BITS << LOW_TAG_BITS;
    Tag::new(table, high | u32::from(tags(bucket)[entry]))
}

/// Takes an entry of a bucket out; the last one comes in its place.
pub(super) fn take(bucket: &mut Bucket, entry: usize) {
    let last = used(bucket) - 1;
    bucket[REST + entry] = bucket[REST + last];
    let tags = tags_mut(bucket);
    tags[entry] = tags[last];
    bucket[COUNTS] -= 1;
}

/// What a table keeps of a hash, and which table it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tag(u32);

impl Tag {
    #[inline]
    pub(super) const fn of(hash: u64) -> Self {
        Self((hash >> (64 - TABLE_BITS - TAG_BITS)) as u32)
    }

    #[inline]
    pub(super) const fn new(table: usize, bits: u32) -> Self {
        Self((table as u32) << TAG_BITS | bits)
    }

    #[inline]
    pub(super) const fn table(self) -> usize {
        (self.0 >> TAG_BITS) as usize % TABLES
    }

    #[inline]
    pub(super) const fn bits(self) -> u32 {
        self.0 & ((1 << TAG_BITS) - 1)
    }

    pub(super) const fn low(self) -> u16 {
        self.0 as u16
    }

    /// Its bit among those that went past.
    pub(super) const fn passing(self) -> u32 {
        1 << (PASSED_SHIFT + self.0 % PASSED_BITS)
    }

    pub(super) const fn rest(self, position: u32) -> u32 {
        self.bits() >> LOW_TAG_BITS << POSITION_BITS | position
    }
}
