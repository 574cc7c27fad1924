//! Many questions in one call: batches, and streams whose reader decides how fast it is answered.

use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_proto::v1;
use kvfabric_proto::v1_encoded::lookup_reply::Outcome;
use kvfabric_proto::v1_encoded::{LookupBatchResponse, LookupReply};
use prost::Message;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::{Instant, timeout};
use tonic::{Status, Streaming};

use super::access::Access;
use super::native::Shared;
use crate::wire::{MESSAGE_BYTES_MAX, kind_of_status};

/// The most questions in one batch.
pub(super) const QUESTIONS_MAX: usize = 1024;
/// Streams of lookups at once; further ones are refused as busy.
pub(super) const STREAMS_MAX: usize = 4096;
/// What a reply that says "no room" needs.
const FAILURE_BYTES: usize = 256;

impl Shared {
    /// Answers the questions in their order, each within what is left of the deadline.
    ///
    /// # Errors
    /// `Invalid` for too many questions.
    pub(super) async fn answer_batch(
        &self,
        questions: Vec<v1::LookupRequest>,
        deadline: Instant,
        access: Access,
    ) -> Result<LookupBatchResponse> {
        if questions.len() > QUESTIONS_MAX {
            return Err(Error::invalid(
                "questions in a batch",
                questions.len(),
                0..=QUESTIONS_MAX,
            ));
        }
        let mut replies = Vec::with_capacity(questions.len());
        // The client refuses longer messages, so that one wide answer would cost all others.
        let mut room = MESSAGE_BYTES_MAX - QUESTIONS_MAX * FAILURE_BYTES;
        for question in questions {
            let mut reply = self.reply(question, deadline, access).await;
            let bytes = reply.encoded_len();
            if bytes > room {
                let context = format!(
                    "the replies before leave {room} bytes, this one takes {bytes}: ask for fewer pods or questions"
                );
                reply = failure(&self.refuse(&Error::new(ErrorKind::Busy, context)));
            } else {
                room -= bytes;
            }
            replies.push(reply);
            // A batch is a thousand lookups; others get their turn in between.
            tokio::task::consume_budget().await;
        }
        Ok(LookupBatchResponse { replies })
    }

    async fn reply(
        &self,
        question: v1::LookupRequest,
        deadline: Instant,
        access: Access,
    ) -> LookupReply {
        match self.answer_one(question, deadline, access).await {
            Ok(answer) => LookupReply {
                outcome: Some(Outcome::Answer(answer)),
            },
            Err(error) => failure(&self.refuse(&error)),
        }
    }
}

fn failure(status: &Status) -> LookupReply {
    LookupReply {
        outcome: Some(Outcome::Failure(v1::LookupFailure {
            code: i32::from(status.code()).unsigned_abs(),
            kind: kind_of_status(status).to_owned(),
            message: status.message().to_owned(),
        })),
    }
}

/// Answers until the client has no more questions, stops reading, or the server stops.
pub(super) async fn answer_stream(
    (shared, access): (Arc<Shared>, Access),
    mut questions: Streaming<v1::LookupRequest>,
    replies: mpsc::Sender<Result<LookupReply, Status>>,
    _room: OwnedSemaphorePermit,
) {
    let mut stopping = shared.stopping.subscribe();
    let patience = shared.hub.config.reader_timeout();
    let last_word = loop {
        let question = tokio::select! {
            question = questions.message() => question,
            () = replies.closed() => return,
            _ = stopping.wait_for(|stopping| *stopping) => {
                break Status::unavailable("the indexer is shutting down");
            }
        };
        let question = match question {
            Ok(Some(question)) => question,
            Ok(None) => return,
            Err(status) => break status,
        };
        let deadline = Instant::now() + shared.hub.config.lookup_deadline();
        let reply = shared.reply(question, deadline, access).await;
        match timeout(patience, replies.send(Ok(reply))).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    };
    // Full only when the client does not read; then it learns of the end by the end.
    let _ = replies.try_send(Err(last_word));
}
