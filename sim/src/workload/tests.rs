use std::collections::HashMap;

use xxhash_rust::xxh3::Xxh3;

use super::*;

fn generate(kind: WorkloadKind, seed: u64, requests: u32) -> Vec<Request> {
    Workload::new(kind, seed, requests)
        .requests()
        .expect("default sizes")
        .collect()
}

fn digest(requests: &[Request]) -> u64 {
    let mut hash = Xxh3::new();
    for request in requests {
        hash.update(&request.id.to_le_bytes());
        hash.update(&request.at_ms.to_le_bytes());
        hash.update(&request.after.unwrap_or(u64::MAX).to_le_bytes());
        for tokens in [request.prompt_tokens(), request.output_tokens()] {
            hash.update(&(tokens.len() as u64).to_le_bytes());
            tokens
                .iter()
                .for_each(|token| hash.update(&token.to_le_bytes()));
        }
    }
    hash.digest()
}

/// Compares digests with recorded ones: a seed must mean the same workload on every machine, in every version.
#[test]
fn a_seed_always_gives_the_same_workload() {
    let digests = WorkloadKind::ALL.map(|kind| digest(&generate(kind, 42, 120)));
    assert_eq!(
        digests.map(|digest| format!("{digest:016x}")),
        ["5731bb8a0854c9e4", "d0741888d46547ec", "75966d47b0a2d084"]
    );
}

/// Generates twice with one seed and once with another.
#[test]
fn another_seed_gives_another_workload() {
    for kind in WorkloadKind::ALL {
        assert_eq!(generate(kind, 1, 50), generate(kind, 1, 50));
        assert_ne!(
            digest(&generate(kind, 1, 50)),
            digest(&generate(kind, 2, 50))
        );
    }
}

/// Looks at sizes and times of the default workloads: the demo is made for these.
#[test]
fn default_workloads_have_their_documented_sizes() {
    for kind in WorkloadKind::ALL {
        let requests = generate(kind, 5, REQUESTS_DEFAULT);
        assert_eq!(requests.len(), REQUESTS_DEFAULT as usize);
        let lengths: Vec<usize> = requests.iter().map(|r| r.prompt_tokens().len()).collect();
        let mean = lengths.iter().sum::<usize>() / lengths.len();
        let longest = lengths.iter().max().copied().unwrap_or(0);
        assert!(
            (900..2_200).contains(&mean),
            "{kind}: mean prompt of {mean} tokens"
        );
        assert!(
            (2_000..5_000).contains(&longest),
            "{kind}: longest prompt of {longest} tokens"
        );
        assert!(
            requests
                .iter()
                .zip(0..)
                .all(|(request, id)| request.id == id)
        );
        assert!(requests.is_sorted_by_key(|request| request.at_ms));
        let minutes = requests
            .last()
            .map_or(0.0, |last| last.at_ms as f64 / 60_000.0);
        assert!(
            (0.4..0.6).contains(&minutes),
            "{kind}: {minutes} minutes at 1,200 a minute"
        );
        let tokens = requests.iter().flat_map(|request| request.all_tokens());
        assert!(tokens.max() < Some(VOCABULARY_TOKENS));
    }
}

/// Follows `after` through chats and agent loops: the later prompt starts with the earlier prompt and its answer.
#[test]
fn a_later_turn_contains_the_earlier_one_and_its_answer() {
    for kind in [WorkloadKind::Chat, WorkloadKind::Agent] {
        let mut contexts = HashMap::new();
        let mut turns = 0;
        for request in generate(kind, 3, 300) {
            let prompt = request.prompt_tokens();
            if let Some(before) = request.after {
                let earlier: &Vec<u32> = &contexts[&before];
                assert!(
                    prompt.len() > earlier.len() && prompt.starts_with(earlier),
                    "{kind}"
                );
                turns += 1;
            }
            contexts.insert(request.id, request.all_tokens());
        }
        assert!(turns > 150, "{kind}: only {turns} later turns");
    }
}

/// Counts beginnings: system prompts, tool sets and popular documents must be shared by many requests.
#[test]
fn prompts_share_their_beginnings() {
    for (kind, shared_tokens, beginnings_max) in [
        (WorkloadKind::Chat, 400, 4),
        (WorkloadKind::Agent, 700, 2),
        (WorkloadKind::Rag, 360, 40),
    ] {
        let requests = generate(kind, 9, 200);
        let beginnings: std::collections::HashSet<Vec<u32>> = requests
            .iter()
            .map(|r| r.prompt_tokens()[..shared_tokens].to_vec())
            .collect();
        assert!(
            (2..=beginnings_max).contains(&beginnings.len()),
            "{kind}: {}",
            beginnings.len()
        );
    }
}

/// Looks for the same documents in two orders.
#[test]
fn documents_come_in_varying_order() {
    let options = RagOptions {
        documents: 2,
        document_tokens: Span::new(50, 50),
        documents_per_request: Span::new(2, 2),
        shuffled_percent: 100,
        ..RagOptions::default()
    };
    let requests: Vec<Request> = Rag::new(options).expect("sound sizes").take(40).collect();
    let parts = |request: &Request| {
        let prompt = request.prompt_tokens();
        (prompt[200..250].to_vec(), prompt[250..300].to_vec())
    };
    let (first, second) = parts(&requests[0]);
    assert!(
        requests
            .iter()
            .any(|request| parts(request) == (second.clone(), first.clone()))
    );
    assert!(
        requests
            .iter()
            .any(|request| parts(request) == (first.clone(), second.clone()))
    );
}

/// Spoils one setting of each generator; the error must name it and its value.
#[test]
fn bad_settings_are_named() {
    let refused = |workload: Workload, expected: &str| {
        let error = workload.requests().expect_err(expected);
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.context().contains(expected), "{error}");
    };
    let turns = Span::new(5, 2);
    refused(
        Workload::Chat(ChatOptions {
            turns,
            ..Default::default()
        }),
        "turns is 5..=2",
    );
    let steps = Span::new(0, 2);
    refused(
        Workload::Agent(AgentOptions {
            steps,
            ..Default::default()
        }),
        "steps is 0..=2",
    );
    refused(
        Workload::Agent(AgentOptions {
            requests: 0,
            ..Default::default()
        }),
        "requests is 0",
    );
    refused(
        Workload::Rag(RagOptions {
            documents: 3,
            ..Default::default()
        }),
        "documents_per_request is up to 4, but there are 3 documents",
    );
    refused(
        Workload::Rag(RagOptions {
            shuffled_percent: 101,
            ..Default::default()
        }),
        "shuffled_percent is 101",
    );
}

fn trace_request(id: u64, ids: &[u64], output_blocks: u32) -> Request {
    let (prompt, output) = (Prompt::Ids(ids.to_vec()), Output::Blocks(output_blocks));
    Request {
        id,
        at_ms: 0,
        after: None,
        prompt,
        output,
    }
}

/// Compares the tokens of neighbouring ids, far ids, and outputs of different requests and positions.
#[test]
fn tokens_of_ids_and_outputs_are_functions_that_never_meet() {
    let block = TRACE_BLOCK_TOKENS as usize;
    let request = trace_request(7, &[0, 1, 1 << 31, HASH_ID_MAX], 2);
    let prompt = request.prompt_tokens();
    assert_eq!(prompt.len(), 4 * block);
    assert_eq!(
        prompt,
        trace_request(8, &[0, 1, 1 << 31, HASH_ID_MAX], 0).prompt_tokens()
    );
    let blocks: Vec<&[u32]> = prompt.chunks(block).collect();
    for (position, one) in blocks.iter().enumerate() {
        assert!(
            blocks[position + 1..]
                .iter()
                .all(|other| other[..2] != one[..2])
        );
    }
    let output = request.output_tokens();
    assert_eq!(output.len(), 2 * block);
    assert_ne!(output[..block], output[block..]);
    assert_ne!(
        output[..block],
        trace_request(8, &[0], 1).output_tokens()[..]
    );
    assert!(prompt.iter().all(|token| token & OUTPUT_BIT == 0));
    assert!(output.iter().all(|token| token & OUTPUT_BIT != 0));
}

/// Counts the blocks of requests of both kinds, at and around the edges of a block.
#[test]
fn blocks_are_counted_as_the_cache_sees_them() {
    let counts = |prompt: usize, output: usize| {
        let (prompt, output) = (
            Prompt::Tokens(vec![1; prompt]),
            Output::Tokens(vec![2; output]),
        );
        let request = Request {
            id: 0,
            at_ms: 0,
            after: None,
            prompt,
            output,
        };
        (
            request.prompt_blocks(16),
            request.reusable_blocks(16),
            request.output_blocks(16),
        )
    };
    assert_eq!(counts(15, 0), (0, 0, 0));
    assert_eq!(counts(16, 1), (1, 0, 0));
    assert_eq!(counts(17, 15), (1, 1, 1));
    assert_eq!(counts(40, 8), (2, 2, 1));
    let request = trace_request(0, &[5, 6], 3);
    let block = TRACE_BLOCK_TOKENS;
    let trace = (request.prompt_blocks(block), request.reusable_blocks(block));
    assert_eq!((trace, request.output_blocks(block)), ((2, 2), 3));
}

/// Reads every name back, and one that is none.
#[test]
fn workloads_are_read_by_their_names() {
    for kind in WorkloadKind::ALL {
        assert_eq!(
            kind.name().parse::<WorkloadKind>().expect("its own name"),
            kind
        );
        assert_eq!(Workload::new(kind, 1, 2).kind(), kind);
    }
    let error = "batch"
        .parse::<WorkloadKind>()
        .expect_err("no such workload");
    assert!(error.context().contains("\"batch\""), "{error}");
}
