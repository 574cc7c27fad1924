//! What is learned of waits, told in durations: nothing here sleeps.
use super::*;

const LONGEST: Duration = Duration::from_micros(50);
const SHORT: Duration = Duration::from_micros(10);
/// Within a sleep's own cost of a look.
const WOKEN: Duration = Duration::from_micros(90);
const LONG: Duration = Duration::from_millis(10);

fn looks() -> Looks {
    Looks::new(LONGEST)
}

fn would_look(looks: &Looks) -> bool {
    let look = looks.begin(Instant::now() + LONG);
    look.until > look.began
}

/// Waits that last as `lasts` says, each looked for or slept in as the last ones have it. How many of them looked.
fn waits(looks: &Looks, lasts: impl Iterator<Item = Duration>) -> usize {
    let wait = |waited| {
        let looked = would_look(looks);
        looks.learn(waited, looked);
        looked
    };
    lasts.map(wait).filter(|looked| *looked).count()
}

/// Those who wait for long look a few times at most, even after looks have paid for long.
#[test]
fn looks_in_vain_end() {
    let looks = looks();
    assert_eq!(
        waits(&looks, std::iter::repeat_n(SHORT, 1000)),
        1000,
        "looks that pay go on"
    );
    assert!(waits(&looks, std::iter::repeat_n(LONG, 1000)) <= 3);
    assert!(!would_look(&looks));
}

/// After long waits, short ones are slept in for a while, and then looked for again.
#[test]
fn looks_come_back_when_waits_are_short_again() {
    let looks = looks();
    waits(&looks, std::iter::repeat_n(LONG, 1000));
    assert!(waits(&looks, std::iter::repeat_n(WOKEN, 20)) > 0);
    waits(&looks, std::iter::repeat_n(LONG, 1000));
    waits(&looks, std::iter::repeat_n(SHORT, 20));
    assert_eq!(waits(&looks, std::iter::repeat_n(SHORT, 100)), 100);
}

/// Waits that are always a little longer than a look, which is the worst case: most of them do not look.
#[test]
fn waits_just_longer_than_a_look_seldom_look() {
    let looks = looks();
    assert!(waits(&looks, std::iter::repeat_n(WOKEN, 1000)) <= 1000 / 8);
}

/// Waits of which each second is long.
#[test]
fn waits_that_are_long_half_the_time_seldom_look() {
    let looks = looks();
    let mixed = [LONG, WOKEN].into_iter().cycle().take(1000);
    assert!(waits(&looks, mixed) <= 1000 / 8);
}

/// Zero turns it off, whatever waits are like.
#[test]
fn nobody_looks_where_it_is_turned_off() {
    let looks = Looks::new(Duration::ZERO);
    for _ in 0..100 {
        let look = looks.begin(Instant::now() + LONG);
        assert!(!look.goes_on());
        assert!(!look.at(|| false));
        look.end(true);
    }
}

/// A wait that may last no longer than a look teaches nothing when it ends in vain.
#[test]
fn a_wait_without_time_is_no_look_in_vain() {
    let looks = looks();
    for _ in 0..100 {
        looks.begin(Instant::now()).end(false);
    }
    assert!(would_look(&looks));
}

/// More than [`LOOK_MAX`] is refused, with the value.
#[test]
fn a_look_has_a_bound() {
    assert!(longest(LOOK_MAX).is_ok());
    let refused = longest(LOOK_MAX + Duration::from_nanos(1)).unwrap_err();
    assert!(refused.to_string().contains("1000001"), "{refused}");
}
