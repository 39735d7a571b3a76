//! The live probe: a connection from inside the pod that only a working capture answers.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, anyhow};
use host_net::netns::Netns;
use host_net::plan::Family;
use shared_proxy::probe::{self, Answer, Question, Reached};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::agent::Pod;
use crate::options::Capture;

/// How long a probe may take: a tunnel's handshake on a busy node, and a lost packet.
const WITHIN: Duration = Duration::from_secs(4);
/// How long somebody may take to accept its connection, which the kernel does on the proxy's behalf.
const TAKEN_WITHIN: Duration = Duration::from_millis(1500);

/// Why a probe did not come through.
#[derive(Debug, thiserror::Error)]
pub(in crate::agent) enum Trouble {
    /// Nobody took the connection: it was led past the proxy, or was stopped on its way.
    #[error("{0}")]
    NotTaken(String),
    /// It was taken, or was refused, and not answered as it should be.
    #[error("{0}")]
    NotAnswered(String),
}

impl From<anyhow::Error> for Trouble {
    fn from(error: anyhow::Error) -> Self {
        Trouble::NotAnswered(format!("{error:#}"))
    }
}

/// Probes a pod in each of these families: each has rules of its own.
pub(in crate::agent) async fn probe(
    pod: &Pod,
    netns: &Netns,
    families: &[Family],
) -> Result<(), Trouble> {
    for family in families {
        let address = match family {
            Family::V4 => probe::ADDRESS,
            Family::V6 => probe::ADDRESS6,
        };
        let asked = timeout(WITHIN, ask(pod, netns, address)).await;
        asked.unwrap_or_else(|_| {
            Err(Trouble::NotAnswered(format!(
                "no answer from {address} within {WITHIN:?}: a connection was taken and the proxy does not answer"
            )))
        })?;
    }
    Ok(())
}

async fn ask(pod: &Pod, netns: &Netns, address: SocketAddr) -> Result<(), Trouble> {
    let mut stream = connect(netns, address).await?;
    let question = Question {
        nonce: format!("{:032x}", rand::random::<u128>()),
    };
    let asked = probe::write(&mut stream, &question).await;
    asked.context("asking the proxy")?;
    let answer = probe::read::<Answer>(&mut stream)
        .await
        .context("the proxy's answer")?;
    let reached = match answer {
        Answer::Reached(reached) => reached,
        Answer::Failed(why) => {
            return Err(anyhow!("the proxy does not reach the pod: {why}").into());
        }
    };
    Ok(is_right(pod, &question, &reached)?)
}

fn is_right(pod: &Pod, question: &Question, reached: &Reached) -> anyhow::Result<()> {
    anyhow::ensure!(
        reached.nonce == question.nonce,
        "an answer to another question"
    );
    anyhow::ensure!(
        reached.uid == pod.uid,
        "the capture takes the pod for another one, {}",
        reached.uid
    );
    let mode = match pod.mode {
        Capture::Node => "node",
        Capture::Inpod => "inpod",
    };
    anyhow::ensure!(
        reached.capture_mode == mode,
        "captured by {}, and should be by {mode}",
        reached.capture_mode
    );
    Ok(())
}

async fn connect(netns: &Netns, address: SocketAddr) -> Result<TcpStream, Trouble> {
    // A socket stays in the namespace that it was made in.
    let socket = netns
        .run(|| match address {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        })
        .and_then(|socket| socket)
        .with_context(|| format!("a socket to {address} in the pod"))?;
    let error = match timeout(TAKEN_WITHIN, socket.connect(address)).await {
        Ok(Ok(stream)) => return Ok(stream),
        Ok(Err(error)) => error,
        Err(_) => io::ErrorKind::TimedOut.into(),
    };
    Err(match error.kind() {
        io::ErrorKind::ConnectionRefused => Trouble::NotAnswered(format!(
            "connecting to {address} in the pod: refused: the pod is captured and no proxy listens"
        )),
        io::ErrorKind::NetworkUnreachable => Trouble::NotAnswered(format!(
            "the pod has no route to {address}: without a default route nothing can be probed"
        )),
        io::ErrorKind::TimedOut => Trouble::NotTaken(format!(
            "no answer from {address} within {TAKEN_WITHIN:?}: the pod's connections do not reach the proxy, or are not captured"
        )),
        _ => Trouble::NotTaken(format!("connecting to {address} in the pod: {error}")),
    })
}
