//! Requests: generated from a seed, or read from a trace.
//!
//! Generated requests are token lists, cut into blocks of [`BLOCK_TOKENS_DEFAULT`] unless the caller says otherwise. A
//! trace names blocks by id; here an id *is* a block of [`TRACE_BLOCK_TOKENS`] tokens, also when it is the last, partial
//! one of its request.

mod agent;
mod chat;
mod rag;
mod settings;
mod text;
pub mod trace;

#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use kvcache_core::{Error, ErrorKind, Result};

pub use agent::{Agent, AgentOptions};
pub use chat::{Chat, ChatOptions};
pub use rag::{Rag, RagOptions};
pub use text::{Span, VOCABULARY_TOKENS};

use crate::seed::{Random, mix};

/// Tokens a block in generated workloads, unless the caller chooses another size: vLLM's default.
pub const BLOCK_TOKENS_DEFAULT: u32 = 16;

/// Tokens a block in traces: what one hash id stands for.
pub const TRACE_BLOCK_TOKENS: u32 = 512;

/// The largest hash id a trace may have: integers above are not exact in every JSON reader.
pub const HASH_ID_MAX: u64 = (1 << 53) - 1;

/// Requests of a generated workload unless the caller says otherwise: some tens of seconds of demo on two cores.
pub const REQUESTS_DEFAULT: u32 = 600;

/// Prompt tokens have this bit clear and output tokens of traces have it set, so that no prompt equals an output.
const OUTPUT_BIT: u32 = 1 << 31;

/// One call of a model: what is asked and what it will answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Counts from 0 in the order of issue.
    pub id: u64,
    /// When it is issued, in milliseconds from the start of the workload.
    pub at_ms: u64,
    /// The request whose answer this prompt contains: it must have ended before this one starts.
    pub after: Option<u64>,
    /// What is asked.
    pub prompt: Prompt,
    /// What is answered.
    pub output: Output,
}

/// What a model is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// A token list; its full blocks are accessed, and its last token is always computed.
    Tokens(Vec<u32>),
    /// A trace's block ids, each a whole block of [`TRACE_BLOCK_TOKENS`]; all are accessed and all can hit.
    Ids(Vec<u64>),
}

/// What a model answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// The answer's tokens, which a later prompt may contain.
    Tokens(Vec<u32>),
    /// So many blocks of [`TRACE_BLOCK_TOKENS`] that no prompt ever contains.
    Blocks(u32),
}

impl Request {
    /// The prompt's tokens; for a trace, those that its ids stand for.
    #[must_use]
    pub fn prompt_tokens(&self) -> Cow<'_, [u32]> {
        match &self.prompt {
            Prompt::Tokens(tokens) => Cow::Borrowed(tokens),
            Prompt::Ids(ids) => {
                let mut tokens = Vec::with_capacity(ids.len() * TRACE_BLOCK_TOKENS as usize);
                for id in ids {
                    append_id_tokens(*id, &mut tokens);
                }
                Cow::Owned(tokens)
            }
        }
    }

    /// The answer's tokens; for a trace, tokens that occur in no prompt and in no other answer.
    #[must_use]
    pub fn output_tokens(&self) -> Cow<'_, [u32]> {
        match &self.output {
            Output::Tokens(tokens) => Cow::Borrowed(tokens),
            Output::Blocks(count) => {
                let mut tokens = Vec::with_capacity(*count as usize * TRACE_BLOCK_TOKENS as usize);
                for position in 0..*count {
                    append_output_tokens(self.id, position, &mut tokens);
                }
                Cow::Owned(tokens)
            }
        }
    }

    /// The prompt's tokens followed by the answer's.
    #[must_use]
    pub fn all_tokens(&self) -> Vec<u32> {
        let mut tokens = self.prompt_tokens().into_owned();
        tokens.extend_from_slice(&self.output_tokens());
        tokens
    }

    /// How many block accesses this request is: the prompt's full blocks, or every id of a trace.
    ///
    /// # Panics
    /// If `block_tokens` is 0, or not [`TRACE_BLOCK_TOKENS`] for a request of a trace.
    #[must_use]
    pub fn prompt_blocks(&self, block_tokens: u32) -> usize {
        match &self.prompt {
            Prompt::Tokens(tokens) => tokens.len() / block_tokens as usize,
            Prompt::Ids(ids) => {
                assert_eq!(
                    block_tokens, TRACE_BLOCK_TOKENS,
                    "an id is a block of {TRACE_BLOCK_TOKENS}"
                );
                ids.len()
            }
        }
    }

    /// How many of the prompt's blocks, from the first, a cache can spare the engine.
    ///
    /// An engine needs the last token's activations, so it computes the block that ends with it; in a trace that rule is
    /// off.
    ///
    /// # Panics
    /// As [`prompt_blocks`](Self::prompt_blocks).
    #[must_use]
    pub fn reusable_blocks(&self, block_tokens: u32) -> usize {
        match &self.prompt {
            Prompt::Tokens(tokens) => tokens.len().saturating_sub(1) / block_tokens as usize,
            Prompt::Ids(_) => self.prompt_blocks(block_tokens),
        }
    }

    /// How many blocks become full while the answer is written, after those of the prompt.
    ///
    /// # Panics
    /// As [`prompt_blocks`](Self::prompt_blocks).
    #[must_use]
    pub fn output_blocks(&self, block_tokens: u32) -> usize {
        let block = block_tokens as usize;
        match (&self.prompt, &self.output) {
            (Prompt::Tokens(prompt), Output::Tokens(output)) => {
                (prompt.len() + output.len()) / block - prompt.len() / block
            }
            (Prompt::Tokens(prompt), Output::Blocks(count)) => {
                let output = *count as usize * TRACE_BLOCK_TOKENS as usize;
                (prompt.len() + output) / block - prompt.len() / block
            }
            (Prompt::Ids(_), Output::Tokens(output)) => output.len() / block,
            (Prompt::Ids(_), Output::Blocks(count)) => *count as usize,
        }
    }
}

/// Appends the tokens that a trace's id stands for: the id itself in the first two, so that no two ids are alike.
pub fn append_id_tokens(id: u64, tokens: &mut Vec<u32>) {
    tokens.push(id as u32 & !OUTPUT_BIT);
    tokens.push((id >> 31) as u32 & !OUTPUT_BIT);
    let mut random = Random::stream(id, 0x1d);
    tokens.extend((2..TRACE_BLOCK_TOKENS).map(|_| random.next_u64() as u32 & !OUTPUT_BIT));
}

/// Appends the tokens of one output block of a trace's request.
pub fn append_output_tokens(request: u64, position: u32, tokens: &mut Vec<u32>) {
    tokens.push(request as u32 | OUTPUT_BIT);
    tokens.push((request >> 31) as u32 | OUTPUT_BIT);
    tokens.push(position | OUTPUT_BIT);
    let mut random = Random::stream(mix(request), u64::from(position));
    tokens.extend((3..TRACE_BLOCK_TOKENS).map(|_| random.next_u64() as u32 | OUTPUT_BIT));
}

/// The generators, by the name they have on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WorkloadKind {
    /// Conversations of several turns over shared system prompts.
    Chat,
    /// Loops of a model and its tools over a growing context.
    Agent,
    /// Questions over shared documents in varying order.
    Rag,
}

impl WorkloadKind {
    /// Every generator.
    pub const ALL: [Self; 3] = [Self::Chat, Self::Agent, Self::Rag];

    /// The name on the command line and in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Agent => "agent",
            Self::Rag => "rag",
        }
    }
}

impl fmt::Display for WorkloadKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for WorkloadKind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == text)
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::Invalid,
                    format!("workload is {text:?}, expected chat, agent or rag"),
                )
            })
    }
}

/// A generator with all its settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Workload {
    /// Conversations.
    Chat(ChatOptions),
    /// Tool loops.
    Agent(AgentOptions),
    /// Questions over documents.
    Rag(RagOptions),
}

impl Workload {
    /// A generator with its default sizes.
    #[must_use]
    pub fn new(kind: WorkloadKind, seed: u64, requests: u32) -> Self {
        match kind {
            WorkloadKind::Chat => Self::Chat(ChatOptions {
                seed,
                requests,
                ..Default::default()
            }),
            WorkloadKind::Agent => Self::Agent(AgentOptions {
                seed,
                requests,
                ..Default::default()
            }),
            WorkloadKind::Rag => Self::Rag(RagOptions {
                seed,
                requests,
                ..Default::default()
            }),
        }
    }

    /// Which generator.
    #[must_use]
    pub const fn kind(&self) -> WorkloadKind {
        match self {
            Self::Chat(_) => WorkloadKind::Chat,
            Self::Agent(_) => WorkloadKind::Agent,
            Self::Rag(_) => WorkloadKind::Rag,
        }
    }

    /// The requests, made as they are asked for; the same settings always give the same ones.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] naming the setting and its value.
    pub fn requests(&self) -> Result<Requests> {
        match self {
            Self::Chat(options) => Ok(Requests(Box::new(Chat::new(options.clone())?))),
            Self::Agent(options) => Ok(Requests(Box::new(Agent::new(options.clone())?))),
            Self::Rag(options) => Ok(Requests(Box::new(Rag::new(options.clone())?))),
        }
    }
}

/// The requests of some workload, in the order of issue.
pub struct Requests(Box<dyn Iterator<Item = Request> + Send>);

impl Iterator for Requests {
    type Item = Request;

    fn next(&mut self) -> Option<Request> {
        self.0.next()
    }
}

impl fmt::Debug for Requests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Requests")
    }
}
