//! A stand-in for the proxy core: the real scope, and a line of text where the proxy speaks mutual TLS and HTTP/2.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};

use node_redirect::scope::NodeScope;
use shared_proxy::capture::{Captured, Listener, OnBehalfOf, Role, Scope};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::PORT;
use crate::topology::{B, MESH, VIP};

/// Which listener a connection came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Outbound,
    Plaintext,
    Hbone,
}

/// One connection that a relay accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub way: Way,
    pub client: IpAddr,
    pub dst: SocketAddr,
}

/// What the relays of a lab accepted, in order.
pub type Log = Arc<Mutex<Vec<Seen>>>;

/// Binds all listeners and serves them until the set is dropped.
pub fn start(scope: Arc<NodeScope>, log: Log) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    for role in [Role::Outbound, Role::InboundPlaintext, Role::InboundHbone] {
        for listener in scope.listen(role).unwrap() {
            tasks.spawn(accept(listener, Arc::clone(&scope), Arc::clone(&log)));
        }
    }
    tasks
}

async fn accept(listener: Listener, scope: Arc<NodeScope>, log: Log) {
    let mut connections = JoinSet::new();
    while let Ok(captured) = listener.accept().await {
        let (scope, log, role) = (Arc::clone(&scope), Arc::clone(&log), listener.role());
        connections.spawn(async move {
            // What breaks here breaks at the client, which is what tests look at.
            let _ = serve(role, captured, &scope, &log).await;
        });
    }
}

async fn serve(role: Role, captured: Captured, scope: &NodeScope, log: &Log) -> io::Result<()> {
    let (client, dst) = (captured.client, captured.dst.map_err(io::Error::other)?);
    let way = match role {
        Role::Outbound => Way::Outbound,
        Role::InboundPlaintext => Way::Plaintext,
        Role::InboundHbone => Way::Hbone,
        Role::Dns | Role::Socks5 => return Ok(()),
    };
    log.lock().unwrap().push(Seen {
        way,
        client: client.0.ip(),
        dst: dst.0,
    });
    scope.owner(role, client, dst).map_err(io::Error::other)?;
    let mut downstream = BufReader::new(captured.stream);
    let remote_client = OnBehalfOf::RemoteClient(client.0.ip());
    let mut upstream = match way {
        Way::Plaintext => dial(scope, dst.0, remote_client).await?,
        Way::Hbone => {
            let mut line = String::new();
            downstream.read_line(&mut line).await?;
            let target = line.trim_end().parse().map_err(io::Error::other)?;
            dial(scope, target, remote_client).await?
        }
        Way::Outbound => {
            let target = if dst.0 == VIP {
                SocketAddr::from((B.ip, PORT))
            } else {
                dst.0
            };
            let behalf = OnBehalfOf::LocalWorkload(client.0.ip());
            if MESH.iter().any(|pod| IpAddr::V4(pod.ip) == target.ip()) {
                let peer = SocketAddr::new(target.ip(), 15008);
                let mut tunnel = dial(scope, peer, behalf).await?;
                tunnel.write_all(format!("{target}\n").as_bytes()).await?;
                tunnel
            } else {
                dial(scope, target, behalf).await?
            }
        }
    };
    copy(&mut downstream, &mut upstream).await
}

async fn dial(scope: &NodeScope, to: SocketAddr, who: OnBehalfOf) -> io::Result<TcpStream> {
    scope.socket(to, who)?.connect(to).await
}

async fn copy(
    a: &mut (impl AsyncRead + AsyncWrite + Unpin),
    b: &mut (impl AsyncRead + AsyncWrite + Unpin),
) -> io::Result<()> {
    tokio::io::copy_bidirectional_with_sizes(a, b, 65536, 65536)
        .await
        .map(|_| ())
}
