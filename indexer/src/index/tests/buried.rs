//! Names that lead to blocks which went with their pod, before they are swept out and after.

use super::*;

const PODS: usize = 3;
const SLOTS: u32 = 4;
const CONTENTS: u32 = 3;
const LONGEST: u32 = 70;
/// So many blocks stay that a few that go are not worth a sweep.
const STAYING: u32 = 600;

/// What a pod holds under the hashes of a slot: which content, and how many blocks of it.
type Held = [[(u32, u32); SLOTS as usize]; PODS];

/// A chain whose hashes are those of its slot, whatever its content is.
fn slot_chain(slot: u32, content: u32, count: u32) -> StoredBlocks {
    StoredBlocks {
        tokens: slot_tokens(slot, content, count),
        ..chain(slot, count)
    }
}

fn slot_tokens(slot: u32, content: u32, count: u32) -> Vec<u32> {
    tokens(slot * CONTENTS + content + 1, count)
}

/// Asks for every content of every slot, beside what is held.
fn check(index: &KvIndex, held: &Held, step: u32) {
    for slot in 0..SLOTS {
        for content in 0..CONTENTS {
            let answer = ask(index, &slot_tokens(slot, content, LONGEST), None, None);
            let mut found: Vec<_> = answer
                .pods
                .iter()
                .map(|pod| (&pod.pod, pod.depth))
                .collect();
            found.sort_unstable();
            let names: Vec<PodName> = (0..PODS)
                .map(|number| pod(&format!("pod-{number}")))
                .collect();
            let wanted: Vec<_> = names
                .iter()
                .zip(held)
                .map(|(name, held)| (name, held[slot as usize]))
                .filter(|(_, (its, depth))| *its == content && *depth > 0)
                .map(|(name, (_, depth))| (name, depth))
                .collect();
            assert_eq!(found, wanted, "step {step}, slot {slot}, content {content}");
        }
    }
    let entries: u32 = held.iter().flatten().map(|(_, depth)| depth).sum();
    assert_eq!(index.entries(), u64::from(entries + STAYING), "step {step}");
}

/// Pods come and go by turns and give the same hashes to other tokens each time; what they hold is asked for after every
/// step, and what is removed by hash is counted. Names are swept table by table all the while.
#[test]
fn a_hash_that_comes_again_after_its_pod_has_gone_means_what_it_says_then() {
    let index = index();
    let staying = add(&index, "staying", SourceKind::Vllm);
    for part in 0..STAYING / 60 {
        store(&index, staying, chain(100 + part, 60));
    }
    let mut ids: [Option<SourceId>; PODS] = [None; PODS];
    let mut held: Held = Default::default();
    let (mut random, mut again, mut sweeps) = (1_u64, 0, 0);
    for step in 0..4000 {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let choice = (random >> 33) as u32;
        let (number, slot) = (choice as usize % PODS, choice / 3 % SLOTS);
        let (content, depth) = held[number][slot as usize];
        let is_buried = lock(&index.state).writer.tree.has_buried();
        match choice / 16 % 8 {
            0 => {
                index.remove_pod(&pod(&format!("pod-{number}")));
                (ids[number], held[number]) = (None, Default::default());
            }
            1 => index.tidy(),
            2 if choice.is_multiple_of(5) => while index.tidy_some() {},
            3 if depth > 0 => {
                let kept = choice / 1024 % depth;
                let hashes = chain(slot, depth).hashes.split_off(kept as usize);
                let applied = remove(&index, ids[number].unwrap(), &hashes, Tier::Device);
                assert_eq!(applied.removed, depth - kept, "step {step}");
                held[number][slot as usize].1 = kept;
            }
            _ => {
                let id = *ids[number].get_or_insert_with(|| {
                    add(&index, &format!("pod-{number}"), SourceKind::Sglang)
                });
                let content = if depth == 0 {
                    choice / 128 % CONTENTS
                } else {
                    content
                };
                let length = choice / 1024 % LONGEST + 1;
                store(&index, id, slot_chain(slot, content, length));
                held[number][slot as usize] = (content, depth.max(length));
                again += u32::from(is_buried && depth == 0);
            }
        }
        check(&index, &held, step);
        sweeps += u32::from(is_buried && !lock(&index.state).writer.tree.has_buried());
    }
    assert!(again > 100 && sweeps > 20, "{again} again, {sweeps} sweeps");
    index.remove_source(staying);
    for number in 0..PODS {
        index.remove_pod(&pod(&format!("pod-{number}")));
    }
    index.tidy();
    let tree = &lock(&index.state).writer.tree;
    assert_eq!((tree.named(), tree.has_buried()), (0, false));
}

/// A pod goes beside one that holds ten times as much: its names stay, with the memory, until no events come.
#[test]
fn what_a_pod_leaves_behind_is_given_back_at_rest() {
    let index = index();
    let [staying, going] = ["staying", "going"].map(|name| add(&index, name, SourceKind::Vllm));
    for prompt in 0..2000 {
        store(&index, staying, chain(prompt, 60));
    }
    index.compact();
    let before = index.bytes();
    for round in 0..3 {
        let going = if round == 0 {
            going
        } else {
            add(&index, "going", SourceKind::Vllm)
        };
        for prompt in 0..200 {
            store(&index, going, chain(10_000 + 1000 * round + prompt, 60));
        }
        index.remove_source(going);
        index.tidy();
        assert!(lock(&index.state).writer.tree.has_buried());
        while index.tidy_some() {}
        while index.tidy_some() {}
        let tree = &lock(&index.state).writer.tree;
        assert_eq!((tree.named(), tree.has_buried()), (120_000, false));
    }
    index.compact();
    let after = index.bytes();
    assert!(
        after <= before + before / 20,
        "{after} bytes after {before}"
    );
}
