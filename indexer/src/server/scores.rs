//! The service `indexer.v1.IndexerService` of llm-d: scores of pods for a text prompt.

use std::sync::Arc;
use std::time::Instant;

use kvfabric_proto::indexer_v1::indexer_service_server::IndexerService;
use kvfabric_proto::indexer_v1::{GetPodScoresRequest, GetPodScoresResponse, PodScore};
use kvfabric_proto::v1;
use tokio::time::timeout_at;
use tonic::{Code, Request, Response, Status};

use kvcache_core::{Error, ErrorKind, Result};

use super::access::Access;
use super::lookup::{Prompt, Question, deadline, parse_pods};
use super::native::Shared;
use super::told::Told;
use crate::tokenize::Tokenizers;

pub(super) struct ScoreService {
    pub(super) shared: Arc<Shared>,
    pub(super) access: Access,
    pub(super) tokenizers: Arc<Tokenizers>,
}

#[tonic::async_trait]
impl IndexerService for ScoreService {
    async fn get_pod_scores(
        &self,
        request: Request<GetPodScoresRequest>,
    ) -> Result<Response<GetPodScoresResponse>, Status> {
        let hub = &self.shared.hub;
        let deadline = deadline(request.metadata(), hub.config.lookup_deadline());
        let request = request.into_inner();
        let model = request.model_name.as_str();
        let scores = async {
            let _room = self.shared.admit()?;
            let tenant = hub.named_tenant(self.access, String::new())?;
            let started = Instant::now();
            let tokens = timeout_at(deadline, self.tokenizers.tokens(model, &request.prompt)).await;
            let tokens = tokens.map_err(|_| {
                Error::new(
                    ErrorKind::Timeout,
                    "the prompt could not be tokenised in time",
                )
            })??;
            let Some(tokens) = tokens else {
                return Ok(None);
            };
            hub.metrics
                .tokenised(model, started.elapsed(), tokens.len());
            let bytes: Vec<u8> = tokens
                .iter()
                .flat_map(|token| token.to_le_bytes())
                .collect();
            let question = Question {
                tenant: &tenant,
                model,
                lora: None,
                cache_salt: None,
                prompt: Prompt::Tokens(&bytes),
                pods_max: 0,
                pods: parse_pods(&request.pod_identifiers)?,
                ranking: v1::Ranking::Depth,
                explain: false,
            };
            hub.answer(&question, |told, _| scores(told)).map(Some)
        };
        let scores: Result<_> = scores.await;
        match scores {
            Ok(Some(scores)) => Ok(Response::new(GetPodScoresResponse { scores })),
            Ok(None) => {
                let said = format!(
                    "no tokenizer for model {model:?}: name its tokenizer.json under \
                     `tokenizers` in the indexer's configuration, or look up by tokens \
                     (kvfabric.v1.Index/Lookup)"
                );
                hub.metrics.refused(ErrorKind::Unsupported);
                Err(Status::new(Code::FailedPrecondition, said))
            }
            Err(error) => Err(self.shared.refuse(&error)),
        }
    }
}

/// As llm-d answers: only pods that hold the first block, or are thought to.
fn scores(told: &Told<'_>) -> Vec<PodScore> {
    let pods = told.answer.pods.iter().filter(|found| found.depth > 0);
    pods.map(|found| PodScore {
        pod: found.pod.as_str().to_owned(),
        score: found.score,
    })
    .collect()
}
