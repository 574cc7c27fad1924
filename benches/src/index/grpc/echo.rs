//! The reference: a service on the same gRPC stack that answers so many bytes, whatever it is asked.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::net::{Ipv4Addr, SocketAddr};
use std::task::{Context, Poll};

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_proto::v1::LookupRequest;
use kvfabric_proto::v1::lookup_request::Prompt;
use tonic::body::Body;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::{NamedService, UnaryService};
use tonic::transport::Channel;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

/// Bytes both ways, in the message that lookups use for theirs.
type Payload = LookupRequest;
type Codec = ProstCodec<Payload, Payload>;

/// Answers as many bytes as `pods_max` says.
#[derive(Clone)]
struct Echo;

impl NamedService for Echo {
    const NAME: &'static str = "kvfabric.bench.Echo";
}

impl Service<http::Request<Body>> for Echo {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::result::Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(Codec::default());
            Ok(grpc.unary(Echo, request).await)
        })
    }
}

impl UnaryService<Payload> for Echo {
    type Response = Payload;
    type Future = Ready<std::result::Result<Response<Payload>, Status>>;

    fn call(&mut self, request: Request<Payload>) -> Self::Future {
        let answer = payload(vec![7; request.get_ref().pods_max as usize], 0);
        ready(Ok(Response::new(answer)))
    }
}

fn payload(bytes: Vec<u8>, answer_bytes: u32) -> Payload {
    Payload {
        prompt: Some(Prompt::Tokens(bytes.into())),
        pods_max: answer_bytes,
        ..Payload::default()
    }
}

/// Starts the service on a free port of loopback, for as long as the runtime lives.
///
/// # Errors
/// `Io` when it cannot listen.
pub(super) fn serve() -> Result<SocketAddr> {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let failed = |error| Error::io("listen for the echo", error);
    let incoming = TcpIncoming::bind(any).map_err(failed)?;
    let address = incoming.local_addr().map_err(failed)?;
    let serving = tonic::transport::Server::builder()
        .add_service(Echo)
        .serve_with_incoming(incoming.with_nodelay(Some(true)));
    tokio::spawn(serving);
    Ok(address)
}

/// Asks the echo.
pub(super) struct EchoClient(tonic::client::Grpc<Channel>);

impl EchoClient {
    pub(super) fn new(channel: Channel) -> Self {
        Self(tonic::client::Grpc::new(channel))
    }

    /// Sends some bytes and takes so many back.
    ///
    /// # Errors
    /// `PeerLost` when there is no answer, `Internal` for one of another size.
    pub(super) async fn ask(&mut self, bytes: Vec<u8>, answer_bytes: u32) -> Result<()> {
        let lost = |error: String| {
            Error::new(
                ErrorKind::PeerLost,
                format!("the echo does not answer: {error}"),
            )
        };
        let ready = self.0.ready().await;
        ready.map_err(|error| lost(error.to_string()))?;
        let path = PathAndQuery::from_static("/kvfabric.bench.Echo/Echo");
        let request = Request::new(payload(bytes, answer_bytes));
        let answer = self.0.unary(request, path, Codec::default()).await;
        let answer = answer.map_err(|status| lost(status.to_string()))?;
        match &answer.get_ref().prompt {
            Some(Prompt::Tokens(bytes)) if bytes.len() == answer_bytes as usize => Ok(()),
            other => Err(super::wrong(format!("the echo answered {other:?}"))),
        }
    }
}
