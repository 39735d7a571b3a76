//! Connections that are open and silent: opened here, in pods' namespaces, so that nothing but the proxies grows.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::bench::interrupt;
use crate::standing::Lab;

/// Port of the servers that answer each byte with itself.
const PORT: u16 = 9100;
const CONNECTS_WITHIN: Duration = Duration::from_secs(10);
const ANSWERS_WITHIN: Duration = Duration::from_secs(20);

/// Servers in pods, on a thread of this process. They end with this value, and their connections with them.
#[derive(Debug)]
pub struct Answering {
    runtime: Option<tokio::runtime::Runtime>,
}

impl Answering {
    /// Listens in these pods.
    ///
    /// # Errors
    /// When a pod does not exist or its port is taken.
    pub fn start(lab: &Lab, pods: &[String]) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        for pod in pods {
            #[allow(
                clippy::disallowed_methods,
                reason = "the application's listener, not the proxy's"
            )]
            let bind = || std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT));
            let listener = lab.netns(pod)?.run(bind)?;
            let listener = listener.with_context(|| format!("listen on {PORT} in {pod}"))?;
            listener.set_nonblocking(true)?;
            let _inside = runtime.enter();
            runtime.spawn(serve(TcpListener::from_std(listener)?));
        }
        Ok(Self {
            runtime: Some(runtime),
        })
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn serve(listener: TcpListener) {
    while let Ok((mut stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            let mut byte = [0_u8; 1];
            while let Ok(1) = stream.read(&mut byte).await {
                if stream.write_all(&byte).await.is_err() {
                    break;
                }
            }
        });
    }
}

/// Opens one connection from a pod to another and sees a byte go there and back: it is a connection on its whole way.
///
/// # Errors
/// When it is not, with both pods' names; and when an end is wanted.
pub fn open(lab: &Lab, from: &str, to: &str) -> Result<TcpStream> {
    interrupt::check()?;
    let topology = lab.topology();
    let (_, server) = topology.pod(to).with_context(|| format!("no pod {to:?}"))?;
    let address = SocketAddr::new(server.ip.into(), PORT);
    let connect = || TcpStream::connect_timeout(&address, CONNECTS_WITHIN);
    let exchange = || -> std::io::Result<TcpStream> {
        let mut stream = lab
            .netns(from)
            .map_err(std::io::Error::other)?
            .run(connect)??;
        stream.set_read_timeout(Some(ANSWERS_WITHIN))?;
        stream.write_all(b"?")?;
        stream.read_exact(&mut [0_u8; 1])?;
        Ok(stream)
    };
    exchange().with_context(|| format!("connection from {from} to {to} ({address})"))
}
