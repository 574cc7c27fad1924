//! Sets of holders: interned, counted, ended.

use super::*;

fn holder(pod: u32) -> Holder {
    Holder::new(SourceNumber::new(pod, 0), Tier::Device)
}

fn listed(words: &Words, set: SetId) -> Vec<u32> {
    members(words, set).unwrap().iter().map(get).collect()
}

/// Grows a set member by member in two orders and takes it apart again.
#[test]
fn equal_sets_are_one_and_vanish_with_their_last_reference() {
    let (words, mut lists, mut sets) = (Words::new(), WordLists::new(), Sets::new());
    let mut ids = Vec::new();
    for order in [[1, 2, 3], [3, 1, 2]] {
        let mut set = SetId::single(holder(order[0]));
        for pod in &order[1..] {
            let next = sets.with(&words, &mut lists, set, holder(*pod));
            sets.release(&words, &mut lists, set);
            set = next;
        }
        ids.push(set);
    }
    assert_eq!(ids[0], ids[1]);
    assert_eq!(listed(&words, ids[0]), [1, 2, 3].map(|pod| holder(pod).0));
    assert!(Sets::contains_source(&words, ids[0], holder(2).source()));
    assert!(!Sets::contains_source(&words, ids[0], holder(9).source()));
    for set in ids {
        let two = sets.without(&words, &mut lists, set, holder(1));
        let one = sets.without(&words, &mut lists, two, holder(3));
        assert_eq!(one, SetId::single(holder(2)));
        assert!(sets.without(&words, &mut lists, one, holder(2)).is_empty());
        sets.release(&words, &mut lists, two);
        sets.release(&words, &mut lists, set);
    }
    assert_eq!((sets.len(), sets.by_members.len()), (0, 0));
}

/// Ends a set that the memo leads to, lets another take its list, and repeats the remembered change.
#[test]
fn a_reused_list_is_not_mistaken_for_the_set_it_held() {
    let (words, mut lists, mut sets) = (Words::new(), WordLists::new(), Sets::new());
    let pair = sets.with(&words, &mut lists, SetId::single(holder(1)), holder(2));
    sets.release(&words, &mut lists, pair);
    let other = sets.with(&words, &mut lists, SetId::single(holder(5)), holder(6));
    assert_eq!(other, pair, "the list is reused");
    let again = sets.with(&words, &mut lists, SetId::single(holder(1)), holder(2));
    assert_eq!(listed(&words, again), [1, 2].map(|pod| holder(pod).0));
}

/// A claim alone, and beside somebody who holds.
#[test]
fn claims_hold_nothing() {
    let (words, mut lists, mut sets) = (Words::new(), WordLists::new(), Sets::new());
    let claim = Holder::new(SourceNumber::new(4, 1), Tier::Object);
    assert!(!Sets::is_real(&words, SetId::single(claim)));
    assert!(Sets::is_real(&words, SetId::single(Holder::SHARED)));
    let both = sets.with(&words, &mut lists, SetId::single(claim), holder(9));
    assert!(Sets::is_real(&words, both));
}
