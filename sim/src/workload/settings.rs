//! The generators' settings by name, for command lines.

use kvcache_core::{Error, ErrorKind, Result};

use super::{AgentOptions, ChatOptions, RagOptions, Span, Workload};

/// A setting that can be changed.
enum Setting<'a> {
    Count(&'a mut u32),
    Span(&'a mut Span),
}

impl Workload {
    /// The names that [`set`](Self::set) takes, each with its value now, in a fixed order.
    #[must_use]
    pub fn settings(&self) -> Vec<(&'static str, String)> {
        let mut copy = self.clone();
        let settings = copy.named();
        let shown = settings.into_iter().map(|(name, setting)| match setting {
            Setting::Count(count) => (name, count.to_string()),
            Setting::Span(span) => (name, format!("{}-{}", span.min, span.max)),
        });
        shown.collect()
    }

    /// Changes one setting: `turns` to `4`, or to any of `3-8`.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] with the text and what would be accepted. Whether the values fit together is checked by
    /// [`requests`](Self::requests).
    pub fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let kind = self.kind();
        let mut settings = self.named();
        let Some((_, setting)) = settings.iter_mut().find(|(known, _)| *known == name) else {
            let names: Vec<&str> = settings.iter().map(|(known, _)| *known).collect();
            let text = format!("{kind} has no setting {name:?}, but {}", names.join(", "));
            return Err(Error::new(ErrorKind::Invalid, text));
        };
        let wrong = |expected: &str| {
            Error::new(
                ErrorKind::Invalid,
                format!("{name} is {value:?}, expected {expected}"),
            )
        };
        match setting {
            Setting::Count(count) => {
                **count = value.parse().map_err(|_| wrong("a whole number"))?;
            }
            Setting::Span(span) => {
                let (min, max) = value.split_once('-').unwrap_or((value, value));
                let number = |text: &str| text.parse().map_err(|_| wrong("a number or MIN-MAX"));
                **span = Span::new(number(min)?, number(max)?);
            }
        }
        Ok(())
    }

    fn named(&mut self) -> Vec<(&'static str, Setting<'_>)> {
        match self {
            Self::Chat(options) => chat(options),
            Self::Agent(options) => agent(options),
            Self::Rag(options) => rag(options),
        }
    }
}

fn chat(options: &mut ChatOptions) -> Vec<(&'static str, Setting<'_>)> {
    vec![
        (
            "requests_per_minute",
            Setting::Count(&mut options.requests_per_minute),
        ),
        ("conversations", Setting::Count(&mut options.conversations)),
        (
            "system_prompts",
            Setting::Count(&mut options.system_prompts),
        ),
        ("system_tokens", Setting::Count(&mut options.system_tokens)),
        (
            "question_tokens",
            Setting::Span(&mut options.question_tokens),
        ),
        ("answer_tokens", Setting::Span(&mut options.answer_tokens)),
        ("turns", Setting::Span(&mut options.turns)),
    ]
}

fn agent(options: &mut AgentOptions) -> Vec<(&'static str, Setting<'_>)> {
    vec![
        (
            "requests_per_minute",
            Setting::Count(&mut options.requests_per_minute),
        ),
        ("loops", Setting::Count(&mut options.loops)),
        ("tool_sets", Setting::Count(&mut options.tool_sets)),
        (
            "tool_set_tokens",
            Setting::Count(&mut options.tool_set_tokens),
        ),
        ("task_tokens", Setting::Span(&mut options.task_tokens)),
        ("attempts", Setting::Span(&mut options.attempts)),
        ("action_tokens", Setting::Span(&mut options.action_tokens)),
        ("result_tokens", Setting::Span(&mut options.result_tokens)),
        ("steps", Setting::Span(&mut options.steps)),
    ]
}

fn rag(options: &mut RagOptions) -> Vec<(&'static str, Setting<'_>)> {
    vec![
        (
            "requests_per_minute",
            Setting::Count(&mut options.requests_per_minute),
        ),
        ("system_tokens", Setting::Count(&mut options.system_tokens)),
        ("documents", Setting::Count(&mut options.documents)),
        (
            "document_tokens",
            Setting::Span(&mut options.document_tokens),
        ),
        (
            "documents_per_request",
            Setting::Span(&mut options.documents_per_request),
        ),
        (
            "shuffled_percent",
            Setting::Count(&mut options.shuffled_percent),
        ),
        (
            "question_tokens",
            Setting::Span(&mut options.question_tokens),
        ),
        ("answer_tokens", Setting::Span(&mut options.answer_tokens)),
    ]
}

#[cfg(test)]
mod tests {
    use super::super::WorkloadKind;
    use super::*;

    /// Every setting of every generator is set to what it is, and then to something else.
    #[test]
    fn every_setting_can_be_read_and_changed_by_its_name() {
        for kind in WorkloadKind::ALL {
            let untouched = Workload::new(kind, 1, 10);
            let mut workload = untouched.clone();
            for (name, value) in untouched.settings() {
                workload.set(name, &value).unwrap();
            }
            assert_eq!(workload, untouched);
            for (name, _) in untouched.settings() {
                workload.set(name, "3").unwrap();
                let now = workload
                    .settings()
                    .into_iter()
                    .find(|(known, _)| *known == name);
                assert!(["3", "3-3"].contains(&&*now.unwrap().1), "{kind} {name}");
            }
        }
    }

    /// A smaller system prompt makes smaller prompts: the setting reaches the generator.
    #[test]
    fn a_changed_setting_changes_the_requests() {
        let tokens = |workload: &Workload| -> usize {
            workload
                .requests()
                .unwrap()
                .map(|request| request.prompt_tokens().len())
                .sum()
        };
        let mut workload = Workload::new(WorkloadKind::Chat, 1, 20);
        let before = tokens(&workload);
        workload.set("system_tokens", "16").unwrap();
        workload.set("turns", "1").unwrap();
        assert!(tokens(&workload) < before);
    }

    /// Unknown names and values that are no sizes, by example.
    #[test]
    fn wrong_settings_are_refused_by_name() {
        let mut workload = Workload::new(WorkloadKind::Rag, 1, 10);
        let text = workload.set("turns", "3").unwrap_err().to_string();
        assert!(
            text.contains("\"turns\"") && text.contains("documents_per_request"),
            "{text}"
        );
        for (name, value) in [
            ("documents", "many"),
            ("document_tokens", "9-x"),
            ("documents", "-1"),
        ] {
            let text = workload.set(name, value).unwrap_err().to_string();
            assert!(text.contains(name) && text.contains(value), "{text}");
        }
        workload.set("document_tokens", "9-3").unwrap();
        assert!(
            workload.requests().is_err(),
            "a span whose smaller end comes last"
        );
    }
}
