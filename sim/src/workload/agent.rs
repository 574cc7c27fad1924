//! Agent loops: a model acts, a tool answers, and the next step's prompt is everything so far and the tool's answer.

use kvcache_core::Result;

use super::text::{Arrivals, Span, Text, append, check_count};
use super::{Output, Prompt, REQUESTS_DEFAULT, Request};
use crate::seed::Random;

/// Sizes and rates of an agent workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentOptions {
    /// Determines everything.
    pub seed: u64,
    /// Requests in all.
    pub requests: u32,
    /// Mean arrival rate.
    pub requests_per_minute: u32,
    /// Loops that go on at the same time; one that ends is replaced.
    pub loops: u32,
    /// Different tool sets, each with its instructions, shared among the loops.
    pub tool_sets: u32,
    /// Length of instructions and tool descriptions, in tokens.
    pub tool_set_tokens: u32,
    /// Length of a task's description, in tokens.
    pub task_tokens: Span,
    /// How often the same task is tried, each time by another loop.
    pub attempts: Span,
    /// Length of what the model writes in a step, in tokens.
    pub action_tokens: Span,
    /// Length of a tool's answer, in tokens.
    pub result_tokens: Span,
    /// Steps in a loop.
    pub steps: Span,
}

impl Default for AgentOptions {
    /// Prompts of about 800 to 3,000 tokens.
    fn default() -> Self {
        Self {
            seed: 0,
            requests: REQUESTS_DEFAULT,
            requests_per_minute: 1_200,
            loops: 12,
            tool_sets: 2,
            tool_set_tokens: 700,
            task_tokens: Span::new(80, 240),
            attempts: Span::new(1, 3),
            action_tokens: Span::new(20, 100),
            result_tokens: Span::new(40, 300),
            steps: Span::new(3, 9),
        }
    }
}

impl AgentOptions {
    fn check(&self) -> Result<()> {
        check_count("requests", self.requests)?;
        check_count("requests_per_minute", self.requests_per_minute)?;
        check_count("loops", self.loops)?;
        check_count("tool_sets", self.tool_sets)?;
        check_count("tool_set_tokens", self.tool_set_tokens)?;
        self.task_tokens.check("task_tokens")?;
        self.attempts.check("attempts")?;
        self.action_tokens.check("action_tokens")?;
        self.result_tokens.check("result_tokens")?;
        self.steps.check("steps")
    }
}

/// The requests of an agent workload.
#[derive(Clone, Debug)]
pub struct Agent {
    options: AgentOptions,
    random: Random,
    arrivals: Arrivals,
    loops: Vec<Loop>,
    task: Task,
    issued: u32,
    texts: u64,
}

/// A task that some loops still have to try.
#[derive(Clone, Debug, Default)]
struct Task {
    context: Vec<u32>,
    attempts_left: u32,
}

#[derive(Clone, Debug, Default)]
struct Loop {
    /// Everything so far; ends with the model's last action.
    context: Vec<u32>,
    last_request: Option<u64>,
    steps_left: u32,
}

impl Agent {
    /// Starts a workload.
    ///
    /// # Errors
    /// `Invalid` naming the setting and its value.
    pub fn new(options: AgentOptions) -> Result<Self> {
        options.check()?;
        let random = Random::stream(options.seed, 0xa6e7);
        let loops = vec![Loop::default(); options.loops as usize];
        let arrivals = Arrivals::new(options.requests_per_minute);
        Ok(Self {
            options,
            random,
            arrivals,
            loops,
            task: Task::default(),
            issued: 0,
            texts: 0,
        })
    }

    fn text(&mut self) -> Text {
        self.texts += 1;
        Text::Own(self.texts)
    }

    fn start_loop(&mut self) -> Loop {
        let seed = self.options.seed;
        if self.task.attempts_left == 0 {
            let tools = self.random.below(u64::from(self.options.tool_sets)) as u32;
            let mut context = Vec::new();
            append(
                seed,
                Text::System(tools),
                self.options.tool_set_tokens,
                &mut context,
            );
            let task_tokens = self.options.task_tokens.draw(&mut self.random);
            let description = self.text();
            append(seed, description, task_tokens, &mut context);
            let attempts_left = self.options.attempts.draw(&mut self.random);
            self.task = Task {
                context,
                attempts_left,
            };
        }
        self.task.attempts_left -= 1;
        let steps_left = self.options.steps.draw(&mut self.random);
        Loop {
            context: self.task.context.clone(),
            last_request: None,
            steps_left,
        }
    }
}

impl Iterator for Agent {
    type Item = Request;

    fn next(&mut self) -> Option<Request> {
        if self.issued == self.options.requests {
            return None;
        }
        let id = u64::from(self.issued);
        self.issued += 1;
        let at_ms = self.arrivals.next_ms(&mut self.random);
        let chosen = self.random.position(self.loops.len());
        if self.loops[chosen].steps_left == 0 {
            self.loops[chosen] = self.start_loop();
        }
        let result_tokens = self.options.result_tokens.draw(&mut self.random);
        let action_tokens = self.options.action_tokens.draw(&mut self.random);
        let (result, action) = (self.text(), self.text());

        let seed = self.options.seed;
        let current = &mut self.loops[chosen];
        current.steps_left -= 1;
        if current.last_request.is_some() {
            append(seed, result, result_tokens, &mut current.context);
        }
        let prompt = current.context.clone();
        append(seed, action, action_tokens, &mut current.context);
        let output = current.context[prompt.len()..].to_vec();
        let after = current.last_request.replace(id);
        Some(Request {
            id,
            at_ms,
            after,
            prompt: Prompt::Tokens(prompt),
            output: Output::Tokens(output),
        })
    }
}
