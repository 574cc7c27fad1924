//! Names beside a map, in waves, loose and tight.

use std::collections::HashMap;

use super::*;

/// Adds and removes tens of thousands in waves, beside a map; hashes repeat, as engines' may.
#[test]
fn what_was_added_is_found_until_it_is_removed() {
    let mut names = Names::new(Fit::Tight);
    let mut map: HashMap<u64, u32> = HashMap::new();
    let hash_of = |number: u32| u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for wave in 0..6_u32 {
        for number in 0..40_000 {
            let (position, hash) = (wave * 40_000 + number, hash_of(number * (wave + 1)));
            map.entry(hash).or_insert_with(|| {
                names.insert(hash, position);
                position
            });
        }
        for number in 0..200_000 {
            let hash = hash_of(number);
            let wanted = map.get(&hash).copied();
            let found = names.find(hash, |position| wanted == Some(position));
            assert_eq!(found, wanted);
        }
        let gone: Vec<u64> = map
            .keys()
            .copied()
            .filter(|hash| hash % 3 != 0 || wave == 5)
            .collect();
        for hash in gone {
            names.remove(hash, map.remove(&hash).unwrap());
        }
    }
    assert!(
        names
            .tables
            .iter()
            .all(|table| table.entries == 0 && table.pages == 0)
    );
    names.trim();
    assert!(names.bytes() < 40_000, "{}", names.bytes());
}

/// At a million entries the last pages are not full; at ten million an entry takes about seven and a half bytes.
#[test]
fn a_million_entries_take_less_than_nine_bytes_each() {
    let mut names = Names::new(Fit::Tight);
    for number in 0..1_000_000 {
        names.insert(u64::from(number) << 20, number);
    }
    let bytes = names.bytes() - names.scratch.capacity() * size_of::<Bucket>();
    assert!(bytes < 8_500_000, "{bytes}");
}

/// Sweeps every third position out, a few tables at a time, while others are added; beside a map.
#[test]
fn a_sweep_takes_out_what_is_dead_and_nothing_else() {
    for fit in [Fit::Tight, Fit::Loose] {
        let mut names = Names::new(fit);
        let hash_of = |number: u32| u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let is_dead = |position: u32| position < 400_000 && position.is_multiple_of(3);
        (0..400_000).for_each(|number| names.insert(hash_of(number), number));
        let mut more = 400_000;
        while names.sweep_some(7, is_dead) {
            names.insert(hash_of(more), more);
            more += 1;
        }
        let live = (0..more).filter(|position| !is_dead(*position));
        assert_eq!(names.len(), live.count() as u64);
        for number in 0..more + 1000 {
            let found = names.find(hash_of(number), |position| position == number);
            let wanted = (number < more && !is_dead(number)).then_some(number);
            assert_eq!(found, wanted);
        }
        while names.sweep_some(100, |_| true) {}
        names.trim();
        assert!(
            names.len() == 0 && names.bytes() < 40_000,
            "{}",
            names.bytes()
        );
    }
}

/// Notes where a hundred thousand hashes go while the tables are small, in three lots, then adds all of them: the tables
/// grow meanwhile. Every other hash comes twice, and is added once.
#[test]
fn what_was_noted_of_a_table_that_has_grown_since_is_not_believed() {
    for fit in [Fit::Tight, Fit::Loose] {
        let (mut names, mut starts) = (Names::new(fit), Starts::default());
        let hash_of = |number: u32| u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut grown = 0;
        for lot in 0..3 {
            let numbers = lot * 100_000..(lot + 1) * 100_000;
            let hashes = numbers.clone().map(hash_of);
            names.touch_all([hashes].into_iter(), &mut starts);
            let moves = names.moves;
            for (place, number) in numbers.enumerate() {
                let is_it = |position| position == number;
                let noted = (&starts, place);
                assert!(names.add(hash_of(number), noted, number, is_it));
                if number.is_multiple_of(2) {
                    assert!(!names.add(hash_of(number), noted, number, is_it));
                    assert!(names.vacancy(hash_of(number), noted, is_it).is_none());
                }
            }
            grown += u32::from(lot > 0 && names.moves != moves);
        }
        assert!(grown > 0, "no table has grown");
        assert_eq!(names.len(), 300_000);
        for number in 0..300_000 {
            let found = names.find(hash_of(number), |position| position == number);
            assert_eq!(found, Some(number));
        }
    }
}

/// One table, always nearly full of entries that come and go, so that every bucket is passed; what was never there is
/// asked for after each.
#[test]
fn a_search_ends_in_a_table_whose_buckets_were_all_passed() {
    let mut names = Names::new(Fit::Tight);
    let is_of_table = |hash: &u64| Tag::of(names.hash.mix(*hash)).table() == 7;
    let hashes: Vec<u64> = (0..2_000_000).filter(is_of_table).collect();
    let (absent, hashes) = hashes.split_at(hashes.len() / 2);
    let kept = Fit::Tight.entries_max(1) as usize - 2;
    for (position, hash) in (0..).zip(hashes) {
        names.insert(*hash, position);
        if let Some(before) = (position as usize).checked_sub(kept) {
            names.remove(hashes[before], before as u32);
        }
        for absent in absent
            .iter()
            .skip(position as usize % 16)
            .step_by(16)
            .take(32)
        {
            assert_eq!(names.find(*absent, |_| false), None);
        }
    }
}

/// Two positions under one hash, as a collision of keys would make them.
#[test]
fn equal_hashes_are_told_apart_by_the_caller() {
    let mut names = Names::new(Fit::Tight);
    names.insert(7, 1);
    names.insert(7, 2);
    assert_eq!(names.find(7, |position| position == 2), Some(2));
    names.remove(7, 1);
    assert_eq!(names.find(7, |_| true), Some(2));
}

/// Adds with room to spare, then looks twice at all tables: the second time none has got any more. What comes in
/// between is left alone.
#[test]
fn loose_tables_are_made_tight_when_no_more_comes() {
    let mut names = Names::new(Fit::Loose);
    let hash_of = |number: u32| u64::from(number) << 20;
    for number in 0..1_000_000 {
        names.insert(hash_of(number), number);
    }
    let loose = names.bytes();
    while names.tighten_some() {}
    assert!(names.bytes() >= loose - names.scratch.capacity() * size_of::<Bucket>() - 600_000);
    while names.tighten_some() {}
    assert!(names.bytes() < 8_500_000, "{} of {loose}", names.bytes());
    for number in 0..1_000_000 {
        let found = names.find(hash_of(number), |position| position == number);
        assert_eq!(found, Some(number));
    }
    for number in 1_000_000..1_300_000 {
        names.insert(hash_of(number), number);
    }
    for number in 0..1_300_000 {
        names.remove(hash_of(number), number);
    }
    names.trim();
    assert!(names.bytes() < 40_000, "{}", names.bytes());
}
