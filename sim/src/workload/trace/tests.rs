use std::io::Write;

use super::*;
use crate::infinite::InfiniteCache;

fn parse(text: &str) -> Result<Trace> {
    Trace::parse("calls.jsonl", text.as_bytes())
}

const GOOD: &str =
    r#"{"timestamp": 27, "input_length": 600, "output_length": 513, "hash_ids": [4, 9]}"#;

/// Reads two lines, one without a line end and with a field that nobody knows.
#[test]
fn requests_come_in_the_order_of_the_file() {
    let other =
        r#"{"hash_ids":[4],"timestamp":28,"input_length":512,"output_length":0,"user":"x"}"#;
    let trace = parse(&format!("{GOOD}\n{other}")).expect("a sound trace");
    let requests: Vec<Request> = trace.requests().collect();
    let expected = |id, at_ms, ids: &[u64], blocks| Request {
        id,
        at_ms,
        after: None,
        prompt: Prompt::Ids(ids.to_vec()),
        output: Output::Blocks(blocks),
    };
    assert_eq!(
        requests,
        [expected(0, 27, &[4, 9], 2), expected(1, 28, &[4], 0)]
    );
    assert_eq!(
        (trace.len(), trace.accesses(), trace.distinct_ids()),
        (2, 3, 2)
    );
    assert_eq!(trace.into_requests().collect::<Vec<_>>(), requests);
}

/// Puts each bad line behind a good one; the error must name file, line and reason.
#[test]
fn a_bad_line_is_named_with_file_line_and_reason() {
    let line = |timestamp: &str, input: &str, output: &str, ids: &str| {
        format!(
            r#"{{"timestamp":{timestamp},"input_length":{input},"output_length":{output},"hash_ids":{ids}}}"#
        )
    };
    let cases = [
        ("{oops".to_owned(), "is not JSON"),
        (String::new(), "is not JSON"),
        (r#"{"timestamp": 1"#.to_owned(), "is not JSON"),
        ("[1]".to_owned(), "is not a request"),
        (r#"{"timestamp": 1}"#.to_owned(), "input_length"),
        (
            line("1", "600", "1", "[1]"),
            "hash_ids has 1 entries, but input_length 600 takes 2 blocks",
        ),
        (
            line("1", "512", "1", "[1,2]"),
            "hash_ids has 2 entries, but input_length 512 takes 1",
        ),
        (line("1", "513", "1", "[7,7]"), "hash_ids has 7 twice"),
        (line("1", "0", "1", "[]"), "input_length is 0"),
        (line("-1", "1", "1", "[1]"), "timestamp is -1"),
        (line("1", "-5", "1", "[1]"), "input_length is -5"),
        (line("1", "1", "-2", "[1]"), "output_length is -2"),
        (line("1", "1", "1", "[-3]"), "hash_ids entry is -3"),
        (
            line("1", "1", "1", "[9007199254740992]"),
            "hash_ids entry is 9007199254740992",
        ),
        (line("1", "1", "1", "[1e40]"), "hash_ids entry is 1e+40"),
        (
            line("1", "99999999999999999999", "1", "[1]"),
            "input_length is 1e+20",
        ),
        (
            line("1", "16777217", "1", "[1]"),
            "input_length is 16777217",
        ),
        (
            line("1", "1", "\"many\"", "[1]"),
            "output_length is \"many\"",
        ),
        (line("1", "1", "1", "7"), "is not a request"),
    ];
    for (bad, reason) in cases {
        let error = parse(&format!("{GOOD}\n{bad}\n{GOOD}\n")).expect_err(&bad);
        assert_eq!(error.kind(), ErrorKind::Invalid, "{bad}");
        let text = error.to_string();
        assert!(text.starts_with("calls.jsonl:2: "), "{text}");
        assert!(text.contains(reason), "{text} should say {reason:?}");
    }
}

/// Writes a trace whose second line is cut off; the path is in the error, and once it is mended the file is read.
#[test]
fn a_file_is_read_whole_or_not_at_all() {
    let mut file = tempfile::NamedTempFile::new().expect("temporary file");
    write!(file, "{GOOD}\n{}", &GOOD[..GOOD.len() - 9]).expect("written");
    let error = Trace::load(file.path()).expect_err("cut off");
    let place = format!("{}:2: ", file.path().display());
    assert!(error.context().starts_with(&place), "{error}");
    write!(file, "{}", &GOOD[GOOD.len() - 9..]).expect("written");
    assert_eq!(Trace::load(file.path()).expect("mended").len(), 2);
}

/// Gives an empty file, a line that never ends, and a path where nothing is.
#[test]
fn files_that_hold_no_trace_are_refused() {
    assert!(
        parse("")
            .expect_err("empty")
            .context()
            .contains("no request")
    );
    let endless = Trace::parse(
        "calls.jsonl",
        BufReader::new(std::io::repeat(b'[').take(LINE_BYTES_MAX * 2)),
    );
    assert!(
        endless
            .expect_err("endless")
            .context()
            .contains("longer than 1048576 bytes")
    );
    let missing = Trace::load(Path::new("no/such/trace.jsonl")).expect_err("missing");
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    assert!(
        missing.context().contains("no/such/trace.jsonl"),
        "{missing}"
    );
}

/// Reads the conversation trace where `KVFABRIC_TRACE` says and compares it with its published figures.
#[test]
fn the_conversation_trace_has_its_published_figures() {
    let Some(path) = std::env::var_os("KVFABRIC_TRACE") else {
        // Not `eprintln!`: the test harness would swallow it.
        let line = "SKIPPED the conversation trace: KVFABRIC_TRACE is not set";
        writeln!(std::io::stderr(), "{line}").expect("standard error");
        return;
    };
    let trace = Trace::load(Path::new(&path)).expect("the conversation trace");
    let figures = (trace.len(), trace.accesses(), trace.distinct_ids());
    assert_eq!(figures, (12_031, 288_500, 182_790));
    let mut cache = InfiniteCache::new(TRACE_BLOCK_TOKENS);
    for request in trace.requests() {
        cache.observe(&request);
    }
    assert_eq!(cache.total().accesses, 288_500);
    assert_eq!(
        cache.total().hits,
        288_500 - 182_790,
        "every id misses once, and only once"
    );
    assert_eq!(format!("{:.2}", cache.total().ratio() * 100.0), "36.64");
}
