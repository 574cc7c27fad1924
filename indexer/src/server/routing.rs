//! Routing decisions: what routers say of where they send prompts.

use std::time::Duration;

use kvcache_core::{Error, ErrorKind, PodName, Result};
use kvfabric_proto::v1;

use super::hub::Hub;
use super::lookup::{Question, Scratch};
use crate::index::Expectation;

impl Hub {
    /// Expects the prompt's blocks where it goes.
    ///
    /// # Errors
    /// `Invalid` naming the field; `NotFound` when the pod or its model is not registered.
    pub(super) fn record_routing(
        &self,
        request: v1::RecordRoutingRequest,
    ) -> Result<v1::RecordRoutingResponse> {
        use v1::lookup_request::Prompt as Asked;
        use v1::record_routing_request::Prompt as Told;
        let pod = PodName::new(&request.pod)?;
        let prompt = request.prompt.map(|prompt| match prompt {
            Told::Tokens(tokens) => Asked::Tokens(tokens),
            Told::Keys(keys) => Asked::Keys(keys),
        });
        let question = v1::LookupRequest {
            tenant: request.tenant,
            model: request.model,
            lora: request.lora,
            cache_salt: request.cache_salt,
            prompt,
            ..v1::LookupRequest::default()
        };
        let question = Question::parse(&question)?;
        let index = self
            .index_for(question.tenant, question.model)?
            .ok_or_else(|| {
                let context = format!("no pod has model {:?}", question.model);
                Error::new(ErrorKind::NotFound, context)
            })?;
        let mut scratch = Scratch::default();
        question.keys(&index, &mut scratch);
        let is_approximate = self.is_approximate(&pod);
        let ttl = match (request.ttl_ms, is_approximate) {
            (0, true) => self.config.approximate_ttl_ms,
            (0, false) => self.config.routing_ttl_ms,
            (told, _) => u64::from(told),
        };
        let with = Expectation {
            now: self.now(),
            ttl: Duration::from_millis(ttl),
            approximate_blocks_max: self.config.approximate_blocks_max,
        };
        let recorded = index.expect(&pod, &scratch.keys, &with)?;
        self.metrics.routed();
        Ok(v1::RecordRoutingResponse {
            blocks: scratch.keys.len() as u32,
            depth: recorded.depth,
            expected: recorded.expected,
        })
    }

    fn is_approximate(&self, pod: &PodName) -> bool {
        use crate::wire::SourceKind;
        let pods = self.pods();
        let sources = pods.get(pod).map(|pod| &pod.registration.sources);
        sources.is_some_and(|sources| {
            sources
                .iter()
                .any(|source| source.kind == SourceKind::Approximate)
        })
    }
}
