use super::*;
use crate::workload::{Output, Workload, WorkloadKind};

fn request(id: u64, prompt: Prompt, output: Output) -> Request {
    Request {
        id,
        at_ms: 0,
        after: None,
        prompt,
        output,
    }
}

fn ids(ids: &[u64]) -> Request {
    request(0, Prompt::Ids(ids.to_vec()), Output::Blocks(1))
}

fn tokens(prompt: &[u32], output: &[u32]) -> Request {
    request(
        0,
        Prompt::Tokens(prompt.to_vec()),
        Output::Tokens(output.to_vec()),
    )
}

/// Serves a few short prompts whose hits can be counted by hand.
#[test]
fn hits_are_the_known_blocks_from_the_first() {
    let mut cache = InfiniteCache::new(2);
    let mut serve = |prompt: &[u32], output: &[u32]| {
        let counted = cache.observe(&tokens(prompt, output));
        (counted.accesses, counted.hits)
    };
    assert_eq!(serve(&[1, 2, 3, 4, 5], &[]), (2, 0));
    assert_eq!(serve(&[1, 2, 3, 4, 6, 7, 8], &[]), (3, 2));
    assert_eq!(
        serve(&[9, 9, 3, 4, 0], &[]),
        (2, 0),
        "a block behind another one is another block"
    );
    assert_eq!(serve(&[1, 2, 9, 9, 6, 7, 8], &[]), (3, 1));
}

/// Asks for a prompt that is there completely, once ending with a full block and once with one token more.
#[test]
fn the_block_of_the_last_token_is_computed() {
    let mut cache = InfiniteCache::new(2);
    cache.observe(&tokens(&[1, 2, 3, 4], &[]));
    assert_eq!(
        cache.observe(&tokens(&[1, 2, 3, 4], &[])),
        Accesses {
            accesses: 2,
            hits: 1
        }
    );
    assert_eq!(
        cache.observe(&tokens(&[1, 2, 3, 4, 5], &[])),
        Accesses {
            accesses: 2,
            hits: 2
        }
    );
}

/// Lets the second turn of a conversation contain the first one's answer, which starts within a block.
#[test]
fn blocks_of_an_answer_are_hits_for_the_next_turn() {
    let mut cache = InfiniteCache::new(2);
    cache.observe(&tokens(&[1, 2, 3], &[4, 5, 6, 7]));
    assert_eq!(cache.blocks(), 3);
    let next = cache.observe(&tokens(&[1, 2, 3, 4, 5, 6, 7, 8], &[]));
    assert_eq!(
        next,
        Accesses {
            accesses: 4,
            hits: 3
        }
    );
    assert_eq!(
        cache.total(),
        Accesses {
            accesses: 5,
            hits: 3
        }
    );
}

/// Serves ids: all count, the last one can hit, and an id behind other ids is another block.
#[test]
fn every_id_of_a_trace_counts_and_can_hit() {
    let mut cache = InfiniteCache::new(16);
    assert_eq!(
        cache.observe(&ids(&[1, 2, 3])),
        Accesses {
            accesses: 3,
            hits: 0
        }
    );
    assert_eq!(
        cache.observe(&ids(&[1, 2, 3])),
        Accesses {
            accesses: 3,
            hits: 3
        }
    );
    assert_eq!(
        cache.observe(&ids(&[2, 3])),
        Accesses {
            accesses: 2,
            hits: 0
        }
    );
    assert_eq!(cache.blocks(), 5);
    assert_eq!(cache.total().ratio(), 3.0 / 8.0);
}

/// Counts generated workloads a second time in the plainest way there is: every prefix as a list in a set.
#[test]
fn generated_workloads_count_the_same_in_a_set_of_prefixes() {
    const BLOCK: usize = 16;
    for kind in WorkloadKind::ALL {
        let mut cache = InfiniteCache::new(BLOCK as u32);
        let mut known = std::collections::HashSet::<Vec<u32>>::new();
        let mut plain = Accesses::default();
        for request in Workload::new(kind, 11, 60)
            .requests()
            .expect("default sizes")
        {
            let prompt = request.prompt_tokens();
            for block in 1..=prompt.len() / BLOCK {
                plain.accesses += 1;
                if block * BLOCK < prompt.len() && known.contains(&prompt[..block * BLOCK]) {
                    plain.hits += 1;
                }
            }
            let all = request.all_tokens();
            known.extend((1..=all.len() / BLOCK).map(|block| all[..block * BLOCK].to_vec()));
            cache.observe(&request);
        }
        assert_eq!(cache.total(), plain, "{kind}");
        assert!(
            plain.ratio() > 0.3,
            "{kind} shares too little to test with: {}",
            plain.ratio()
        );
    }
}
