//! Conversations: each turn's prompt is the shared system prompt, everything said so far, and one more question.

use kvcache_core::Result;

use super::text::{Arrivals, Span, Text, append, check_count};
use super::{Output, Prompt, REQUESTS_DEFAULT, Request};
use crate::seed::Random;

/// Sizes and rates of a chat workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatOptions {
    /// Determines everything.
    pub seed: u64,
    /// Requests in all.
    pub requests: u32,
    /// Mean arrival rate.
    pub requests_per_minute: u32,
    /// Conversations that go on at the same time; one that ends is replaced.
    pub conversations: u32,
    /// Different system prompts, shared among the conversations.
    pub system_prompts: u32,
    /// Length of each system prompt, in tokens.
    pub system_tokens: u32,
    /// Length of a question, in tokens.
    pub question_tokens: Span,
    /// Length of an answer, in tokens.
    pub answer_tokens: Span,
    /// Questions in a conversation.
    pub turns: Span,
}

impl Default for ChatOptions {
    /// Prompts of about 500 to 3,000 tokens.
    fn default() -> Self {
        Self {
            seed: 0,
            requests: REQUESTS_DEFAULT,
            requests_per_minute: 1_200,
            conversations: 16,
            system_prompts: 4,
            system_tokens: 400,
            question_tokens: Span::new(40, 200),
            answer_tokens: Span::new(60, 240),
            turns: Span::new(3, 10),
        }
    }
}

impl ChatOptions {
    fn check(&self) -> Result<()> {
        check_count("requests", self.requests)?;
        check_count("requests_per_minute", self.requests_per_minute)?;
        check_count("conversations", self.conversations)?;
        check_count("system_prompts", self.system_prompts)?;
        check_count("system_tokens", self.system_tokens)?;
        self.question_tokens.check("question_tokens")?;
        self.answer_tokens.check("answer_tokens")?;
        self.turns.check("turns")
    }
}

/// The requests of a chat workload.
#[derive(Clone, Debug)]
pub struct Chat {
    options: ChatOptions,
    random: Random,
    arrivals: Arrivals,
    conversations: Vec<Conversation>,
    issued: u32,
    texts: u64,
}

#[derive(Clone, Debug)]
struct Conversation {
    /// Everything said so far, answers included.
    context: Vec<u32>,
    last_request: Option<u64>,
    turns_left: u32,
}

impl Chat {
    /// Starts a workload.
    ///
    /// # Errors
    /// `Invalid` naming the setting and its value.
    pub fn new(options: ChatOptions) -> Result<Self> {
        options.check()?;
        let mut random = Random::stream(options.seed, 0xc4a7);
        let conversations = (0..options.conversations)
            .map(|_| Conversation::start(&options, &mut random))
            .collect();
        let arrivals = Arrivals::new(options.requests_per_minute);
        Ok(Self {
            options,
            random,
            arrivals,
            conversations,
            issued: 0,
            texts: 0,
        })
    }

    fn text(&mut self) -> Text {
        self.texts += 1;
        Text::Own(self.texts)
    }
}

impl Conversation {
    fn start(options: &ChatOptions, random: &mut Random) -> Self {
        let system = random.below(u64::from(options.system_prompts)) as u32;
        let mut context = Vec::new();
        append(
            options.seed,
            Text::System(system),
            options.system_tokens,
            &mut context,
        );
        Self {
            context,
            last_request: None,
            turns_left: options.turns.draw(random),
        }
    }
}

impl Iterator for Chat {
    type Item = Request;

    fn next(&mut self) -> Option<Request> {
        if self.issued == self.options.requests {
            return None;
        }
        let id = u64::from(self.issued);
        self.issued += 1;
        let at_ms = self.arrivals.next_ms(&mut self.random);
        let chosen = self.random.position(self.conversations.len());
        if self.conversations[chosen].turns_left == 0 {
            self.conversations[chosen] = Conversation::start(&self.options, &mut self.random);
        }
        let question_tokens = self.options.question_tokens.draw(&mut self.random);
        let answer_tokens = self.options.answer_tokens.draw(&mut self.random);
        let (question, answer) = (self.text(), self.text());

        let seed = self.options.seed;
        let conversation = &mut self.conversations[chosen];
        conversation.turns_left -= 1;
        append(seed, question, question_tokens, &mut conversation.context);
        let prompt = conversation.context.clone();
        append(seed, answer, answer_tokens, &mut conversation.context);
        let output = conversation.context[prompt.len()..].to_vec();
        let after = conversation.last_request.replace(id);
        Some(Request {
            id,
            at_ms,
            after,
            prompt: Prompt::Tokens(prompt),
            output: Output::Tokens(output),
        })
    }
}
