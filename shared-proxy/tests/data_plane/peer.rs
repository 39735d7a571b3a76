//! Ends of tunnels that the tests play themselves: waypoints, gateways, peers that misbehave.
#![allow(clippy::disallowed_methods)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{Request, Response, StatusCode};
use shared_proxy::identity::{Certificates, Identity, RefreshPolicy, WorkloadCertificate};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::mesh::Mesh;

const LIMIT: Duration = Duration::from_secs(30);

pub fn identity(account: &str) -> Identity {
    Identity::new("cluster.local", "default", account).unwrap()
}

pub async fn certificate(mesh: &Mesh, account: &str) -> Arc<WorkloadCertificate> {
    let certificates = Certificates::new(mesh.ca(), RefreshPolicy::default());
    certificates.get(&identity(account)).await.unwrap()
}

/// A server of HBONE whose answers the test gives.
pub struct Peer {
    requests: mpsc::UnboundedReceiver<Asked>,
    connections: Arc<AtomicUsize>,
}

/// A CONNECT that waits for its answer.
pub struct Asked {
    pub request: Request<RecvStream>,
    pub respond: SendResponse<Bytes>,
}

impl Peer {
    /// At an address of the mesh, with the certificate of an account.
    pub async fn new(mesh: &Mesh, at: SocketAddr, account: &str) -> Self {
        Self::of(&*certificate(mesh, account).await, at).await
    }

    /// The same with this certificate.
    pub async fn of(certificate: &WorkloadCertificate, at: SocketAddr) -> Self {
        let listener = TcpListener::bind(at).await.unwrap();
        let acceptor = TlsAcceptor::from(certificate.server_config());
        let (send, requests) = mpsc::unbounded_channel();
        let connections = Arc::new(AtomicUsize::new(0));
        let count = connections.clone();
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                let (acceptor, send) = (acceptor.clone(), send.clone());
                tokio::spawn(async move {
                    let Ok(tls) = acceptor.accept(tcp).await else {
                        return;
                    };
                    let mut connection = h2::server::handshake(tls).await.unwrap();
                    while let Some(Ok((request, respond))) = connection.accept().await {
                        let _ = send.send(Asked { request, respond });
                    }
                });
            }
        });
        Self {
            requests,
            connections,
        }
    }

    /// The next request.
    pub async fn asked(&mut self) -> Asked {
        timeout(LIMIT, self.requests.recv()).await.unwrap().unwrap()
    }

    /// Whether there is no request that nobody has taken.
    pub fn is_idle(&mut self) -> bool {
        self.requests.try_recv().is_err()
    }

    /// How many connections there were.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

impl Asked {
    pub fn authority(&self) -> String {
        self.request.uri().authority().unwrap().to_string()
    }

    pub fn header(&self, name: &str) -> Option<String> {
        let value = self.request.headers().get(name)?;
        Some(value.to_str().unwrap().to_owned())
    }

    /// Says 200.
    pub fn accept(mut self) -> (SendStream<Bytes>, RecvStream) {
        let send = self
            .respond
            .send_response(Response::new(()), false)
            .unwrap();
        (send, self.request.into_body())
    }

    /// Says another status.
    pub fn refuse(mut self, status: StatusCode) {
        let mut response = Response::new(());
        *response.status_mut() = status;
        self.respond.send_response(response, true).unwrap();
    }

    /// Resets the stream without an answer.
    pub fn reset(mut self, reason: Reason) {
        self.respond.send_reset(reason);
    }

    /// Says 200 and sends all bytes back, until they end.
    pub fn echo(self) {
        let (mut send, mut recv) = self.accept();
        tokio::spawn(async move {
            while let Some(Ok(data)) = recv.data().await {
                let _ = recv.flow_control().release_capacity(data.len());
                if send.send_data(data, false).is_err() {
                    return;
                }
            }
            let _ = send.send_data(Bytes::new(), true);
        });
    }

    /// Says 200 and moves the bytes to and from a TCP address.
    pub fn forward(self, to: SocketAddr) {
        let (mut send, mut recv) = self.accept();
        tokio::spawn(async move {
            let (mut read, mut write) = TcpStream::connect(to).await.unwrap().into_split();
            let there = async {
                while let Some(Ok(data)) = recv.data().await {
                    let _ = recv.flow_control().release_capacity(data.len());
                    if write.write_all(&data).await.is_err() {
                        return;
                    }
                }
                let _ = write.shutdown().await;
            };
            let back = async {
                let mut buffer = vec![0; 16 << 10];
                while let Ok(length @ 1..) = read.read(&mut buffer).await {
                    if send
                        .send_data(Bytes::copy_from_slice(&buffer[..length]), false)
                        .is_err()
                    {
                        return;
                    }
                }
                let _ = send.send_data(Bytes::new(), true);
            };
            tokio::join!(there, back);
        });
    }
}

/// A server that speaks HTTP/2 frame by frame.
pub struct RawServer {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

/// A connection of it.
pub struct RawConnection(TlsStream<TcpStream>);

/// Types of frames (RFC 9113, 6).
pub const HEADERS: u8 = 1;
pub const SETTINGS: u8 = 4;
pub const GOAWAY: u8 = 7;
/// `:status: 200` of the static table (RFC 7541, appendix A).
pub const STATUS_200: u8 = 0x88;
const END_HEADERS: u8 = 4;

impl RawServer {
    pub async fn new(mesh: &Mesh, at: SocketAddr, account: &str) -> Self {
        Self {
            listener: TcpListener::bind(at).await.unwrap(),
            acceptor: TlsAcceptor::from(certificate(mesh, account).await.server_config()),
        }
    }

    /// The next connection, after the prefaces.
    pub async fn accept(&self) -> RawConnection {
        let (tcp, _) = timeout(LIMIT, self.listener.accept())
            .await
            .unwrap()
            .unwrap();
        let mut tls = self.acceptor.accept(tcp).await.unwrap();
        let mut preface = [0; 24];
        tls.read_exact(&mut preface).await.unwrap();
        assert_eq!(&preface, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        let mut connection = RawConnection(tls);
        connection.send(SETTINGS, 0, 0, &[]).await;
        connection
    }
}

impl RawConnection {
    pub async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let mut frame = Vec::new();
        frame.extend(&(payload.len() as u32).to_be_bytes()[1..]);
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        self.0.write_all(&frame).await.unwrap();
        self.0.flush().await.unwrap();
    }

    /// Waits for a request; its stream.
    pub async fn request(&mut self) -> u32 {
        loop {
            let mut head = [0; 9];
            timeout(LIMIT, self.0.read_exact(&mut head))
                .await
                .unwrap()
                .unwrap();
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; length as usize];
            self.0.read_exact(&mut payload).await.unwrap();
            if head[3] == HEADERS {
                return u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            }
        }
    }

    pub async fn answer_200(&mut self, stream: u32) {
        self.send(HEADERS, END_HEADERS, stream, &[STATUS_200]).await;
    }
}
