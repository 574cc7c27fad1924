//! Which states random histories reach.

use super::*;

/// How often a history came into each state.
#[derive(Default)]
struct Reached(BTreeMap<&'static str, u32>);

impl Reached {
    fn count(&mut self, state: &'static str, is_reached: bool) {
        *self.0.entry(state).or_default() += u32::from(is_reached);
    }

    /// The states that a step leads from and to.
    #[expect(clippy::too_many_lines, reason = "a few lines a state")]
    fn look(&mut self, step: &Step, before: &Literal, after: &Literal, gone: &BTreeSet<Held>) {
        let (old, new) = (held(before), held(after));
        let holds = |all: &BTreeSet<Held>, source, block| {
            all.iter().any(|held| (held.0, held.1) == (source, block))
        };
        let placed = |literal: &Literal, (source, block, _): &Held| {
            let literal = literal.sources.get(source);
            literal.is_some_and(|literal| literal.placed.contains(block))
        };
        let is_hole = |all: &BTreeSet<Held>, literal: &Literal, held: &Held| {
            let parent = held.1.parent().filter(|_| placed(literal, held));
            parent.is_some_and(|parent| !holds(all, held.0, parent))
        };
        self.count(
            "stored again after it was removed",
            new.difference(&old).any(|held| gone.contains(held)),
        );
        self.count(
            "a second copy",
            after
                .sources
                .values()
                .any(|s| s.copies.values().any(|copies| *copies > 1)),
        );
        self.count("a hole", new.iter().any(|held| is_hole(&new, after, held)));
        self.count(
            "a hole filled",
            old.intersection(&new).any(|held| {
                is_hole(&old, before, held) && !is_hole(&new, after, held) && placed(after, held)
            }),
        );
        self.count(
            "a child before its parent",
            new.iter().any(|held| !placed(after, held)),
        );
        self.count(
            "the parent comes",
            old.intersection(&new)
                .any(|held| !placed(before, held) && placed(after, held)),
        );
        let sibling = |block: Block| {
            let other = block.path ^ 1 << (block.depth - 1);
            Block::new(block.salt, block.depth, other)
        };
        self.count(
            "a branch",
            new.iter().any(|held| holds(&new, held.0, sibling(held.1))),
        );
        self.count(
            "held by four sources",
            new.iter().any(|held| {
                let holders: BTreeSet<_> =
                    new.iter().filter(|h| h.1 == held.1).map(|h| h.0).collect();
                holders.len() >= 4
            }),
        );
        self.count(
            "shared behind a hole",
            after.shared.iter().any(|block| {
                block
                    .parent()
                    .is_some_and(|parent| !after.shared.contains(&parent))
            }),
        );
        let has_any = |source: usize| old.iter().any(|held| held.0 == source);
        match *step {
            Step::Remove {
                source,
                block,
                tier,
            } => {
                self.count("removed unheld", !old.contains(&(source, block, tier)));
                let two = before
                    .sources
                    .get(&source)
                    .is_some_and(|s| s.copies(block, tier) > 1);
                self.count("one of two copies removed", two);
            }
            Step::Clear { source } => {
                self.count("cleared", has_any(source));
                self.count(
                    "a clear leaves a tier",
                    new.iter().any(|held| held.0 == source),
                );
            }
            Step::Restart { source } => self.count("restarted", has_any(source)),
            Step::Replace { source } => self.count("replaced", has_any(source)),
            Step::RemovePod { source } => self.count("a pod goes", has_any(source)),
            Step::Mention { source, block, .. } => {
                let is_known = before
                    .sources
                    .get(&source)
                    .is_some_and(|s| s.placed.contains(&block));
                self.count("a known block without tokens", is_known);
                self.count("an unknown block without tokens", !is_known);
            }
            _ => {}
        }
    }
}

/// Forty histories from a fixed seed, each state counted: what the generator never reaches the comparison says nothing of.
#[test]
fn random_histories_reach_every_state() {
    let mut runner = TestRunner::deterministic();
    let mut reached = Reached::default();
    for _ in 0..40 {
        let histories = proptest::collection::vec(step(), 300..400);
        let steps = histories.new_tree(&mut runner).unwrap().current();
        let (mut both, mut gone) = (Both::new(None), BTreeSet::new());
        for step in &steps {
            let before = both.literal.clone();
            let Some(step) = both.resolve(step) else {
                continue;
            };
            both.step(&step);
            reached.look(&step, &before, &both.literal, &gone);
            gone.extend(held(&before).difference(&held(&both.literal)).copied());
        }
    }
    println!("{:#?}", reached.0);
    assert_eq!(reached.0.len(), 18);
    let rare: Vec<_> = reached.0.iter().filter(|(_, count)| **count < 40).collect();
    assert!(rare.is_empty(), "hardly ever reached: {rare:?}");
}
