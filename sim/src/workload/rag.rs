//! Questions over shared documents: popular documents come often, and not always in the same order.

use kvcache_core::{Error, ErrorKind, Result};

use super::text::{Arrivals, Span, Text, append, check_count};
use super::{Output, Prompt, REQUESTS_DEFAULT, Request};
use crate::seed::Random;

/// The weight of the most popular document; the n-th one has the n-th part of it (Zipf's law).
const POPULARITY: u64 = 1 << 20;

/// Sizes and rates of a retrieval workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RagOptions {
    /// Determines everything.
    pub seed: u64,
    /// Requests in all.
    pub requests: u32,
    /// Mean arrival rate.
    pub requests_per_minute: u32,
    /// Length of the one system prompt, in tokens.
    pub system_tokens: u32,
    /// Documents there are.
    pub documents: u32,
    /// Length of a document, in tokens.
    pub document_tokens: Span,
    /// Documents in a prompt, all different.
    pub documents_per_request: Span,
    /// How many in a hundred prompts have their documents in random order; the others have the popular ones first.
    pub shuffled_percent: u32,
    /// Length of a question, in tokens.
    pub question_tokens: Span,
    /// Length of an answer, in tokens.
    pub answer_tokens: Span,
}

impl Default for RagOptions {
    /// Prompts of about 600 to 3,000 tokens.
    fn default() -> Self {
        Self {
            seed: 0,
            requests: REQUESTS_DEFAULT,
            requests_per_minute: 1_200,
            system_tokens: 200,
            documents: 60,
            document_tokens: Span::new(200, 900),
            documents_per_request: Span::new(2, 4),
            shuffled_percent: 30,
            question_tokens: Span::new(20, 80),
            answer_tokens: Span::new(40, 160),
        }
    }
}

impl RagOptions {
    fn check(&self) -> Result<()> {
        check_count("requests", self.requests)?;
        check_count("requests_per_minute", self.requests_per_minute)?;
        check_count("system_tokens", self.system_tokens)?;
        check_count("documents", self.documents)?;
        self.document_tokens.check("document_tokens")?;
        self.documents_per_request.check("documents_per_request")?;
        self.question_tokens.check("question_tokens")?;
        self.answer_tokens.check("answer_tokens")?;
        if self.documents_per_request.max > self.documents {
            let (most, all) = (self.documents_per_request.max, self.documents);
            let rule =
                format!("documents_per_request is up to {most}, but there are {all} documents");
            return Err(Error::new(ErrorKind::Invalid, rule));
        }
        if self.shuffled_percent > 100 {
            return Err(Error::invalid(
                "shuffled_percent",
                self.shuffled_percent,
                0..=100,
            ));
        }
        Ok(())
    }
}

/// The requests of a retrieval workload.
#[derive(Clone, Debug)]
pub struct Rag {
    options: RagOptions,
    random: Random,
    arrivals: Arrivals,
    /// Per document, its own weight and that of all more popular ones.
    cumulative: Vec<u64>,
    /// Per document, its length in tokens.
    lengths: Vec<u32>,
    issued: u32,
    texts: u64,
}

impl Rag {
    /// Starts a workload.
    ///
    /// # Errors
    /// `Invalid` naming the setting and its value.
    pub fn new(options: RagOptions) -> Result<Self> {
        options.check()?;
        let mut random = Random::stream(options.seed, 0x4a6);
        let mut total = 0;
        let cumulative = (1..=u64::from(options.documents))
            .map(|rank| {
                total += POPULARITY / rank;
                total
            })
            .collect();
        let lengths = (0..options.documents)
            .map(|_| options.document_tokens.draw(&mut random))
            .collect();
        let arrivals = Arrivals::new(options.requests_per_minute);
        Ok(Self {
            options,
            random,
            arrivals,
            cumulative,
            lengths,
            issued: 0,
            texts: 0,
        })
    }

    fn text(&mut self) -> Text {
        self.texts += 1;
        Text::Own(self.texts)
    }

    /// Different documents, by popularity, in the order they will have in the prompt.
    fn choose_documents(&mut self) -> Vec<u32> {
        let count = self.options.documents_per_request.draw(&mut self.random) as usize;
        let total = self.cumulative.last().copied().unwrap_or(0);
        let mut chosen: Vec<u32> = Vec::with_capacity(count);
        while chosen.len() < count {
            let point = self.random.below(total);
            let mut document = self.cumulative.partition_point(|sum| *sum <= point) as u32;
            // The next free one, so that the loop ends also when every document is wanted.
            while chosen.contains(&document) {
                document = (document + 1) % self.options.documents;
            }
            chosen.push(document);
        }
        if self.random.below(100) < u64::from(self.options.shuffled_percent) {
            self.random.shuffle(&mut chosen);
        } else {
            chosen.sort_unstable();
        }
        chosen
    }
}

impl Iterator for Rag {
    type Item = Request;

    fn next(&mut self) -> Option<Request> {
        if self.issued == self.options.requests {
            return None;
        }
        let id = u64::from(self.issued);
        self.issued += 1;
        let seed = self.options.seed;
        let at_ms = self.arrivals.next_ms(&mut self.random);
        let mut prompt = Vec::new();
        append(
            seed,
            Text::System(0),
            self.options.system_tokens,
            &mut prompt,
        );
        for document in self.choose_documents() {
            let length = self.lengths[document as usize];
            append(seed, Text::Document(document), length, &mut prompt);
        }
        let question_tokens = self.options.question_tokens.draw(&mut self.random);
        let answer_tokens = self.options.answer_tokens.draw(&mut self.random);
        let (question, answer) = (self.text(), self.text());
        append(seed, question, question_tokens, &mut prompt);
        let mut output = Vec::new();
        append(seed, answer, answer_tokens, &mut output);
        let (prompt, output) = (Prompt::Tokens(prompt), Output::Tokens(output));
        Some(Request {
            id,
            at_ms,
            after: None,
            prompt,
            output,
        })
    }
}
