//! Many pods, what they cost, and what comes back when they go.

use super::*;

/// Three hundred pods share a beginning; each holds more of it than the one before.
#[test]
fn hundreds_of_pods_are_ranked_and_their_shared_blocks_cost_little() {
    let index = index();
    const PODS: u32 = 300;
    const SHARED: u32 = 500;
    for number in 0..PODS {
        let id = add(&index, &format!("pod-{number:03}"), SourceKind::Vllm);
        store(&index, id, chain(1, SHARED + number));
    }
    let answer = ask(&index, &tokens(1, SHARED + PODS), None, None);
    assert_eq!(answer.pods.len(), PODS as usize);
    for (position, found) in answer.pods.iter().enumerate() {
        let number = PODS - 1 - position as u32;
        assert_eq!(found.depth, SHARED + number);
        assert_eq!(found.pod, pod(&format!("pod-{number:03}")));
    }
    let (mut keys, mut few) = (Vec::new(), Answer::default());
    index.keys_of(None, None, &tokens(1, SHARED + PODS), &mut keys);
    index.lookup(
        &keys,
        &Query {
            pods_max: 5,
            pods: &[],
        },
        &mut few,
    );
    assert_eq!(few.pods, answer.pods[..5]);
    // One set for the shared beginning and one for each further block but the last, whose holder is alone.
    assert_eq!(lock(&index.state).writer.tree.sets() as u32, PODS - 1);
    let (bytes, entries) = (index.bytes(), index.entries());
    assert!(bytes / entries < 56, "{bytes} bytes for {entries}");
}

/// Fills and empties an index, by removals and by taking the source away.
#[test]
fn memory_comes_back_when_blocks_go() {
    let index = index();
    let empty = index.bytes();
    for by_events in [true, false] {
        let id = add(&index, "pod", SourceKind::Vllm);
        for prompt in 0..2000 {
            store(&index, id, chain(prompt, 64));
        }
        assert_eq!(index.entries(), 128_000);
        let full = index.bytes();
        assert!(full > empty + 128_000 * 20, "{full} bytes");
        if by_events {
            for prompt in 0..2000 {
                remove(&index, id, &chain(prompt, 64).hashes, Tier::Device);
            }
        }
        index.remove_source(id);
        assert_eq!((index.entries(), index.blocks()), (0, 0));
        assert!(
            index.bytes() < empty + (full - empty) / 4,
            "{} of {full}",
            index.bytes()
        );
    }
}

/// Pods come, store beginnings of a few chains and go, while sources that went before are still taken out, a few blocks an
/// event; after every step every chain is asked for.
#[test]
fn a_pod_that_leaves_little_by_little_is_gone_at_once() {
    const PODS: usize = 4;
    const PROMPTS: u32 = 3;
    const LONGEST: u32 = 70;
    let index = index();
    let names: Vec<String> = (0..PODS).map(|number| format!("pod-{number}")).collect();
    let mut ids: Vec<Option<SourceId>> = vec![None; PODS];
    let mut held = [[0; PROMPTS as usize]; PODS];
    let keys: Vec<Vec<IndexKey>> = (0..PROMPTS)
        .map(|prompt| {
            let mut keys = Vec::new();
            index.keys_of(None, None, &tokens(prompt, LONGEST), &mut keys);
            keys
        })
        .collect();
    let (mut state, mut depths, mut waited) = (1_u64, Depths::default(), false);
    for step in 0..3000 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let choice = (state >> 33) as u32;
        let (number, prompt) = (choice as usize % PODS, choice / 7 % PROMPTS);
        if (choice / 64).is_multiple_of(8) {
            index.remove_pod(&pod(&names[number]));
            (ids[number], held[number]) = (None, [0; PROMPTS as usize]);
            assert_eq!(index.pod_number(&pod(&names[number])), None);
        } else {
            let id =
                *ids[number].get_or_insert_with(|| add(&index, &names[number], SourceKind::Sglang));
            let length = choice / 1024 % LONGEST + 1;
            store(&index, id, chain(prompt, length));
            let deepest = &mut held[number][prompt as usize];
            *deepest = length.max(*deepest);
        }
        waited |= lock(&index.state).leaving.len() > 1;
        let entries: u32 = held.iter().flatten().sum();
        assert_eq!(index.entries(), u64::from(entries), "step {step}");
        for (prompt, keys) in keys.iter().enumerate() {
            index.depths(keys, 0, &[], &mut depths);
            let mut found: Vec<_> = depths
                .pods
                .iter()
                .map(|found| (index.pod_name(found.pod).unwrap().to_string(), found.depth))
                .collect();
            found.sort_unstable();
            let wanted = (0..PODS).filter(|number| held[*number][prompt] > 0);
            let wanted: Vec<_> = wanted
                .map(|number| (names[number].clone(), held[number][prompt]))
                .collect();
            assert_eq!(found, wanted, "step {step}");
        }
    }
    assert!(waited, "no source was still leaving when another one left");
    let longest = |prompt: usize| held.iter().map(|held| held[prompt]).max().unwrap_or(0);
    let blocks: u32 = (0..PROMPTS as usize).map(longest).sum();
    assert_eq!(index.blocks(), u64::from(blocks));
    assert!(lock(&index.state).leaving.is_empty());
}
