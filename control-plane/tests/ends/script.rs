//! A server whose words are in a test's hands.

use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use control_plane::ads::DELTA_AGGREGATED_RESOURCES;
use control_plane::ca::CREATE_CERTIFICATE;
use control_plane::convert::Object;
use control_plane::messages::certificate::{CreateCertificateRequest, CreateCertificateResponse};
use control_plane::messages::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use control_plane::messages::{ADDRESS_TYPE, AUTHORIZATION_TYPE, Any};
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream, StreamExt};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use shared_proxy::state::Workload;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tonic::server::{Grpc, StreamingService, UnaryService};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use crate::rig::{Client, endpoint, follow};

pub type Answer = Result<DeltaDiscoveryResponse, Status>;

/// A stream that a client opened: what it says, and what to say to it.
pub struct Opened {
    requests: mpsc::UnboundedReceiver<DeltaDiscoveryRequest>,
    pub responses: mpsc::UnboundedSender<Answer>,
}

impl Opened {
    pub async fn hears(&mut self) -> DeltaDiscoveryRequest {
        tokio::time::timeout(Duration::from_secs(10), self.requests.recv())
            .await
            .expect("a request within ten seconds")
            .expect("the stream is open")
    }

    pub fn says(&self, type_url: &str, nonce: &str, resources: Vec<Resource>, removed: &[&str]) {
        let response = DeltaDiscoveryResponse {
            type_url: type_url.to_owned(),
            nonce: nonce.to_owned(),
            resources,
            removed_resources: removed.iter().map(ToString::to_string).collect(),
            ..DeltaDiscoveryResponse::default()
        };
        self.responses.send(Ok(response)).unwrap();
    }
}

#[derive(Clone)]
struct Script {
    opened: mpsc::UnboundedSender<Opened>,
    certificates: Issued,
}

type Issued = Arc<Mutex<Result<CreateCertificateResponse, Status>>>;

impl StreamingService<DeltaDiscoveryRequest> for Script {
    type Response = DeltaDiscoveryResponse;
    type ResponseStream = BoxStream<'static, Answer>;
    type Future = BoxFuture<'static, Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<DeltaDiscoveryRequest>>) -> Self::Future {
        let (heard, requests) = mpsc::unbounded_channel();
        let (responses, answers) = mpsc::unbounded_channel();
        self.opened
            .send(Opened {
                requests,
                responses,
            })
            .unwrap();
        let mut incoming = request.into_inner();
        tokio::spawn(async move {
            while let Ok(Some(request)) = incoming.message().await {
                if heard.send(request).is_err() {
                    return;
                }
            }
        });
        let answers = stream::unfold(answers, |mut answers| async move {
            answers.recv().await.map(|answer| (answer, answers))
        });
        Box::pin(async move { Ok(Response::new(answers.boxed())) })
    }
}

impl UnaryService<CreateCertificateRequest> for Script {
    type Response = CreateCertificateResponse;
    type Future = BoxFuture<'static, Result<Response<CreateCertificateResponse>, Status>>;

    fn call(&mut self, _: Request<CreateCertificateRequest>) -> Self::Future {
        let response = self.certificates.lock().unwrap().clone();
        Box::pin(async move { response.map(Response::new) })
    }
}

pub struct Hostile {
    pub address: String,
    pub opened: mpsc::UnboundedReceiver<Opened>,
    /// What the CA answers from here on.
    pub certificates: Issued,
    /// Connections so far.
    pub connections: Arc<AtomicUsize>,
}

pub async fn hostile() -> Hostile {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (sender, opened) = mpsc::unbounded_channel();
    let certificates = Arc::new(Mutex::new(Ok(CreateCertificateResponse::default())));
    let connections = Arc::<AtomicUsize>::default();
    let counted = Arc::clone(&connections);
    let script = Script {
        opened: sender,
        certificates: Arc::clone(&certificates),
    };
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            counted.fetch_add(1, Ordering::Relaxed);
            let script = script.clone();
            let service = service_fn(move |request: http::Request<hyper::body::Incoming>| {
                let script = script.clone();
                async move {
                    let path = request.uri().path().to_owned();
                    Ok::<_, Infallible>(match path.as_str() {
                        DELTA_AGGREGATED_RESOURCES => {
                            Grpc::new(ProstCodec::default())
                                .streaming(script, request)
                                .await
                        }
                        CREATE_CERTIFICATE => {
                            Grpc::new(ProstCodec::default())
                                .unary(script, request)
                                .await
                        }
                        _ => Status::unimplemented(path).into_http(),
                    })
                }
            });
            tokio::spawn(
                http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(tcp), service),
            );
        }
    });
    Hostile {
        address,
        opened,
        certificates,
        connections,
    }
}

pub fn resource(name: &str, version: &str, type_url: &str, value: Vec<u8>) -> Resource {
    Resource {
        name: name.to_owned(),
        version: version.to_owned(),
        resource: Some(Any {
            type_url: type_url.to_owned(),
            value: value.into(),
        }),
        aliases: Vec::new(),
    }
}

pub fn workload(uid: &str, last: u8) -> Resource {
    let workload = Workload {
        uid: uid.into(),
        addresses: vec![[10, 0, 0, last].into()],
        ..Workload::default()
    };
    let value = Object::Workload(Arc::new(workload)).encode();
    resource(uid, &format!("v{last}"), ADDRESS_TYPE, value)
}

/// A client whose first two requests have been heard.
pub async fn met() -> (Hostile, Client, Opened) {
    let mut server = hostile().await;
    let dir = TempDir::new().unwrap();
    let client = follow(endpoint(&dir, &server.address), false);
    let mut opened = server.opened.recv().await.unwrap();
    for type_url in [ADDRESS_TYPE, AUTHORIZATION_TYPE] {
        let request = opened.hears().await;
        assert_eq!(request.type_url, type_url);
        assert!(request.resource_names_subscribe.is_empty() && request.response_nonce.is_empty());
        let node = request.node.unwrap();
        assert_eq!(
            node.id,
            "ztunnel~1.1.1.1~z1.istio-system~istio-system.svc.cluster.local"
        );
        assert_eq!(node.metadata.unwrap().text("NAME"), Some("z1"));
    }
    (server, client, opened)
}
