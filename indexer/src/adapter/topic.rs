//! What a publisher's topic says: whose events these are, for which model, in which incarnation.

use std::fmt;

use kvcache_core::{Epoch, Error, ErrorKind, PodName, Result};

use super::SourceKind;

/// What every topic of KV events starts with: the prefix to subscribe to.
pub const TOPIC_PREFIX: &str = "kv@";

/// The longest topic accepted, in bytes: a pod name, a model's path and some room.
pub const TOPIC_BYTES_MAX: usize = 4096;

/// The first frame of a message: `kv@<pod>@<model>` from engines, `kv@<pod>@<model>@<epoch>` from nodes.
///
/// A pod name has no `@`, a model's may: only nodes end in an epoch, so both read back unambiguously.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topic {
    /// The pod the events are about.
    pub pod: PodName,
    /// The model as the publisher names it; may be empty.
    pub model: String,
    /// The publisher's incarnation; engines do not tell theirs.
    pub epoch: Option<Epoch>,
}

impl Topic {
    /// The topic of an engine's events.
    #[must_use]
    pub fn engine(pod: &PodName, model: &str) -> Self {
        Self {
            pod: pod.clone(),
            model: model.to_owned(),
            epoch: None,
        }
    }

    /// The topic of a node's events: a new epoch tells the index to forget what earlier ones said.
    #[must_use]
    pub fn node(pod: &PodName, model: &str, epoch: Epoch) -> Self {
        Self {
            pod: pod.clone(),
            model: model.to_owned(),
            epoch: Some(epoch),
        }
    }

    /// Reads a topic of a source of `kind`.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] with the topic and what it lacks.
    pub fn parse(topic: &[u8], kind: SourceKind) -> Result<Self> {
        let text = match std::str::from_utf8(topic) {
            Ok(text) if topic.len() <= TOPIC_BYTES_MAX => text,
            Ok(_) => {
                return Err(Error::invalid(
                    "topic bytes",
                    topic.len(),
                    0..=TOPIC_BYTES_MAX,
                ));
            }
            Err(cause) => {
                return Err(Error::new(ErrorKind::Invalid, "topic is not UTF-8").with_source(cause));
            }
        };
        let lacks = |what: &str| Error::new(ErrorKind::Invalid, format!("topic {text:?} {what}"));
        let rest = text
            .strip_prefix(TOPIC_PREFIX)
            .ok_or_else(|| lacks("lacks the prefix kv@"))?;
        let (pod, rest) = rest
            .split_once('@')
            .ok_or_else(|| lacks("names no model"))?;
        let pod = PodName::new(pod).map_err(|cause| cause.at(format_args!("topic {text:?}")))?;
        if kind != SourceKind::Node {
            return Ok(Self {
                pod,
                model: rest.to_owned(),
                epoch: None,
            });
        }
        let (model, epoch) = rest
            .rsplit_once('@')
            .ok_or_else(|| lacks("names no epoch"))?;
        let epoch = epoch
            .parse()
            .map_err(|_| lacks("does not end in an epoch"))?;
        Ok(Self {
            pod,
            model: model.to_owned(),
            epoch: Some(Epoch(epoch)),
        })
    }
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{TOPIC_PREFIX}{}@{}", self.pod, self.model)?;
        match self.epoch {
            Some(epoch) => write!(f, "@{epoch}"),
            None => Ok(()),
        }
    }
}
