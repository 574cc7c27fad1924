//! Places of a work queue: as many as the queue has, so that nothing is posted that has no room there.

/// Who is in which place.
pub(super) struct Slots<T> {
    places: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Slots<T> {
    pub(super) fn new(count: u32) -> Self {
        Self {
            places: (0..count).map(|_| None).collect(),
            free: (0..count).rev().collect(),
        }
    }

    /// Places that are free.
    pub(super) fn room(&self) -> usize {
        self.free.len()
    }

    /// Whether nobody is in any place.
    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.places.len()
    }

    /// Those who are in a place.
    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.places.iter().flatten()
    }

    /// Takes a place; gives the value back when there is none.
    pub(super) fn take(&mut self, value: T) -> Result<u32, T> {
        let Some(place) = self.free.pop() else {
            return Err(value);
        };
        self.places[place as usize] = Some(value);
        Ok(place)
    }

    /// Frees a place; none if nobody was there.
    pub(super) fn give(&mut self, place: u32) -> Option<T> {
        let value = self.places.get_mut(place as usize)?.take()?;
        self.free.push(place);
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// No place is given to two, none twice back, and never more than there are.
    #[test]
    fn a_full_queue_takes_nothing_more() {
        let mut slots = Slots::new(2);
        let (first, second) = (slots.take('a').unwrap(), slots.take('b').unwrap());
        assert_ne!(first, second);
        assert_eq!((slots.room(), slots.take('c')), (0, Err('c')));
        assert_eq!(slots.give(first), Some('a'));
        assert_eq!(slots.give(first), None);
        assert_eq!(slots.give(77), None);
        assert_eq!(slots.take('d'), Ok(first));
        assert_eq!(slots.iter().collect::<String>().len(), 2);
        assert!(!slots.is_empty());
    }

    proptest! {
        /// Beside a plain list of who is in.
        #[test]
        fn places_are_counted_like_a_list(steps in proptest::collection::vec((any::<bool>(), 0_u32..12), 0..200)) {
            let mut slots = Slots::new(8);
            let mut inside: Vec<(u32, usize)> = Vec::new();
            for (number, (enters, place)) in steps.into_iter().enumerate() {
                if enters {
                    let taken = slots.take(number);
                    prop_assert_eq!(taken.is_ok(), inside.len() < 8);
                    inside.extend(taken.ok().map(|place| (place, number)));
                } else {
                    let known = inside.iter().position(|(at, _)| *at == place);
                    let expected = known.map(|at| inside.remove(at).1);
                    prop_assert_eq!(slots.give(place), expected);
                }
                prop_assert_eq!(slots.room(), 8 - inside.len());
                prop_assert_eq!(slots.is_empty(), inside.is_empty());
            }
        }
    }
}
