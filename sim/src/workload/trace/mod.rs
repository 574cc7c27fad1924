//! Traces in Mooncake's JSONL schema: `timestamp`, `input_length`, `output_length`, `hash_ids`, one request a line.

#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::ops::RangeInclusive;
use std::path::Path;

use kvcache_core::{Error, ErrorKind, Result};
use serde::Deserialize;
use serde_json::Value;

use super::{HASH_ID_MAX, Output, Prompt, Request, TRACE_BLOCK_TOKENS};

/// The longest line accepted, in bytes: a prompt of [`INPUT_TOKENS_MAX`] tokens takes half of it.
pub const LINE_BYTES_MAX: u64 = 1 << 20;

/// The longest prompt accepted, in tokens.
pub const INPUT_TOKENS_MAX: u64 = 1 << 24;

/// The longest answer accepted, in tokens.
pub const OUTPUT_TOKENS_MAX: u64 = 1 << 24;

/// The latest timestamp accepted, in milliseconds: some thirty years.
pub const TIMESTAMP_MS_MAX: u64 = 1 << 40;

/// The most requests accepted in a file.
pub const REQUESTS_MAX: usize = 1 << 24;

/// A whole trace, checked line by line before any of it is used.
#[derive(Clone, Debug)]
pub struct Trace {
    entries: Vec<Entry>,
    ids: Vec<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    at_ms: u64,
    output_tokens: u64,
    /// The end of its ids in the common list; they start where those of the entry before end.
    ids_end: usize,
}

/// A line as it is in the file: numbers are checked afterwards, so that an error can name field and value.
#[derive(Deserialize)]
struct Line {
    timestamp: Value,
    input_length: Value,
    output_length: Value,
    hash_ids: Vec<Value>,
}

impl Trace {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// `NotFound`, `Denied` or `Io` if it cannot be read; `Invalid` with file, line number and reason if a line is not
    /// such a request.
    pub fn load(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let file = File::open(path).map_err(|error| Error::io(name.clone(), error))?;
        Self::parse(&name, BufReader::new(file))
    }

    /// Checks a trace from any reader; `name` stands for the file in errors.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn parse(name: &str, mut reader: impl BufRead) -> Result<Self> {
        let mut trace = Self {
            entries: Vec::new(),
            ids: Vec::new(),
        };
        let mut bytes = Vec::new();
        loop {
            let number = trace.entries.len() + 1;
            bytes.clear();
            let read = (&mut reader)
                .take(LINE_BYTES_MAX + 1)
                .read_until(b'\n', &mut bytes)
                .map_err(|error| Error::io(format!("{name}:{number}"), error))?;
            if read == 0 {
                break;
            }
            trace
                .push_line(&bytes)
                .map_err(|error| error.at(format_args!("{name}:{number}")))?;
        }
        if trace.entries.is_empty() {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("{name}: there is no request in it"),
            ));
        }
        Ok(trace)
    }

    /// How many requests there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no request; never true for a trace that was read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Block accesses of all requests together.
    #[must_use]
    pub fn accesses(&self) -> usize {
        self.ids.len()
    }

    /// Different block ids in the whole trace.
    #[must_use]
    pub fn distinct_ids(&self) -> usize {
        self.ids.iter().collect::<HashSet<_>>().len()
    }

    /// The requests, in the file's order.
    pub fn requests(&self) -> impl Iterator<Item = Request> + '_ {
        (0..self.entries.len()).map(|position| self.request(position))
    }

    /// The requests, in the file's order, from a trace that is given away.
    pub fn into_requests(self) -> impl Iterator<Item = Request> + Send + 'static {
        (0..self.entries.len()).map(move |position| self.request(position))
    }

    fn request(&self, position: usize) -> Request {
        let entry = self.entries[position];
        let ids_start = position
            .checked_sub(1)
            .map_or(0, |before| self.entries[before].ids_end);
        Request {
            id: position as u64,
            at_ms: entry.at_ms,
            after: None,
            prompt: Prompt::Ids(self.ids[ids_start..entry.ids_end].to_vec()),
            output: Output::Blocks(blocks(entry.output_tokens) as u32),
        }
    }

    fn push_line(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.len() as u64 > LINE_BYTES_MAX {
            return Err(invalid(format!(
                "the line is longer than {LINE_BYTES_MAX} bytes"
            )));
        }
        if self.entries.len() == REQUESTS_MAX {
            return Err(invalid(format!(
                "there are more than {REQUESTS_MAX} requests"
            )));
        }
        let line: Line = serde_json::from_slice(bytes).map_err(|error| {
            let what = if error.is_data() {
                "is not a request"
            } else {
                "is not JSON"
            };
            invalid(format!("the line {what}")).with_source(error)
        })?;
        let at_ms = number("timestamp", &line.timestamp, 0..=TIMESTAMP_MS_MAX)?;
        let input_tokens = number("input_length", &line.input_length, 1..=INPUT_TOKENS_MAX)?;
        let output_tokens = number("output_length", &line.output_length, 0..=OUTPUT_TOKENS_MAX)?;
        let expected = blocks(input_tokens);
        if line.hash_ids.len() as u64 != expected {
            let count = line.hash_ids.len();
            return Err(invalid(format!(
                "hash_ids has {count} entries, but input_length {input_tokens} takes {expected} blocks \
                 of {TRACE_BLOCK_TOKENS} tokens"
            )));
        }
        self.push_ids(&line.hash_ids)?;
        self.entries.push(Entry {
            at_ms,
            output_tokens,
            ids_end: self.ids.len(),
        });
        Ok(())
    }

    fn push_ids(&mut self, values: &[Value]) -> Result<()> {
        let mut seen = HashSet::with_capacity(values.len());
        for value in values {
            let id = number("hash_ids entry", value, 0..=HASH_ID_MAX)?;
            if !seen.insert(id) {
                return Err(invalid(format!("hash_ids has {id} twice")));
            }
            self.ids.push(id);
        }
        Ok(())
    }
}

fn blocks(tokens: u64) -> u64 {
    tokens.div_ceil(u64::from(TRACE_BLOCK_TOKENS))
}

fn number(field: &str, value: &Value, accepted: RangeInclusive<u64>) -> Result<u64> {
    value
        .as_u64()
        .filter(|number| accepted.contains(number))
        .ok_or_else(|| Error::invalid(field, value, accepted))
}

fn invalid(reason: String) -> Error {
    Error::new(ErrorKind::Invalid, reason)
}
