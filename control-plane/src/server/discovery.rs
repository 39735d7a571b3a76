//! Delta discovery: one task per stream.

use std::sync::Arc;

use futures_util::future::{BoxFuture, FutureExt};
use futures_util::stream::BoxStream;
use futures_util::{StreamExt, stream};
use tokio::sync::{mpsc, watch};
use tonic::server::StreamingService;
use tonic::{Request, Response, Status, Streaming};

use super::Shared;
use super::catalogue::Catalogue;
use super::subscription::{Reply, Subscription};
use crate::messages::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use crate::messages::{ADDRESS_TYPE, AUTHORIZATION_TYPE};

/// Responses that wait for the client to read them; one of each type is outstanding at most.
const WAITING: usize = 4;

/// The method.
pub(super) struct Discovery(pub(super) Arc<Shared>);

type Responses = BoxStream<'static, Result<DeltaDiscoveryResponse, Status>>;

impl StreamingService<DeltaDiscoveryRequest> for Discovery {
    type Response = DeltaDiscoveryResponse;
    type ResponseStream = Responses;
    type Future = BoxFuture<'static, Result<Response<Responses>, Status>>;

    fn call(&mut self, request: Request<Streaming<DeltaDiscoveryRequest>>) -> Self::Future {
        let shared = Arc::clone(&self.0);
        async move {
            shared.authenticate(request.metadata())?;
            tracing::debug!(headers = ?super::shown(request.metadata()), "discovery stream opened");
            let (sender, receiver) = mpsc::channel(WAITING);
            let stream = Stream {
                catalogue: shared.catalogue.subscribe(),
                ending: shared.ending.clone(),
                responses: sender,
                types: [ADDRESS_TYPE, AUTHORIZATION_TYPE].map(Subscription::new),
                nonce: 0,
                client: "unknown".to_owned(),
            };
            tokio::spawn(stream.run(request.into_inner()));
            let responses = stream::unfold(receiver, |mut receiver| async move {
                receiver.recv().await.map(|item| (item, receiver))
            });
            Ok(Response::new(responses.boxed()))
        }
        .boxed()
    }
}

struct Stream {
    catalogue: watch::Receiver<Arc<Catalogue>>,
    ending: watch::Receiver<bool>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    types: [Subscription; 2],
    nonce: u64,
    client: String,
}

impl Stream {
    async fn run(mut self, mut requests: Streaming<DeltaDiscoveryRequest>) {
        let mut ending = self.ending.clone();
        loop {
            let outcome = tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) => self.request(request),
                    Ok(None) => return,
                    Err(error) => {
                        tracing::info!(client = %self.client, %error, "discovery stream ended");
                        return;
                    }
                },
                changed = self.catalogue.changed() => match changed {
                    Ok(()) => Ok(()),
                    Err(_) => return,
                },
                _ = ending.wait_for(|ending| *ending) => {
                    Err(Status::unavailable("the control plane is shutting down"))
                }
            };
            let sent = match outcome {
                Ok(()) => self.send().await,
                Err(status) => {
                    let _ = self.responses.send(Err(status)).await;
                    return;
                }
            };
            if sent.is_err() {
                return;
            }
        }
    }

    fn request(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        if let Some(node) = &request.node {
            self.client.clone_from(&node.id);
            tracing::info!(client = %self.client, type_url = request.type_url, held = request.initial_resource_versions.len(), "client follows");
            tracing::debug!(client = %self.client, metadata = ?node.metadata, "client says of itself");
        }
        let subscription = match request.type_url.as_str() {
            ADDRESS_TYPE => &mut self.types[0],
            AUTHORIZATION_TYPE => &mut self.types[1],
            other => {
                return Err(Status::invalid_argument(format!(
                    "there are no resources of type {other:?}"
                )));
            }
        };
        let type_url = request.type_url.clone();
        match subscription.request(request) {
            Reply::Nack(message) => {
                tracing::warn!(client = %self.client, type_url, message, "the client refused resources");
            }
            Reply::Ack => tracing::debug!(client = %self.client, type_url, "acknowledged"),
            Reply::None => {}
        }
        Ok(())
    }

    /// Fails when the client has gone.
    async fn send(&mut self) -> Result<(), ()> {
        let catalogue = Arc::clone(&self.catalogue.borrow_and_update());
        for subscription in &mut self.types {
            let nonce = &mut self.nonce;
            let response = subscription.next(&catalogue, || {
                *nonce += 1;
                nonce.to_string()
            });
            if let Some(response) = response {
                tracing::debug!(client = %self.client, type_url = response.type_url, resources = response.resources.len(), removed = response.removed_resources.len(), "sending");
                self.responses.send(Ok(response)).await.map_err(|_| ())?;
            }
        }
        Ok(())
    }
}
