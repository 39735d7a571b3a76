//! The live probe: a connection from inside the pod that only a working capture answers.

use std::io;
use std::time::Duration;

use anyhow::{Context, anyhow};
use host_net::netns::Netns;
use shared_proxy::probe::{self, Answer, Question};
use tokio::net::TcpSocket;
use tokio::time::timeout;

use crate::agent::Pod;
use crate::options::Capture;

/// How long a probe may take: a tunnel's handshake on a busy node, and a lost packet.
const WITHIN: Duration = Duration::from_secs(4);

/// What a probe of this pod finds wrong.
pub(in crate::agent) async fn findings(pod: &Pod, netns: &Netns) -> Vec<String> {
    let asked = timeout(WITHIN, ask(pod, netns)).await;
    let outcome = asked.unwrap_or_else(|_| {
        Err(anyhow!(
            "no answer from {} within {WITHIN:?}: the pod's connections do not reach the proxy, or are not captured",
            probe::ADDRESS
        ))
    });
    outcome
        .err()
        .map(|error| format!("{error:#}"))
        .into_iter()
        .collect()
}

async fn ask(pod: &Pod, netns: &Netns) -> anyhow::Result<()> {
    // A socket stays in the namespace that it was made in.
    let socket = netns.run(TcpSocket::new_v4)??;
    let mut stream = socket
        .connect(probe::ADDRESS)
        .await
        .map_err(explain)
        .with_context(|| format!("connecting to {} in the pod", probe::ADDRESS))?;
    let question = Question {
        nonce: format!("{:032x}", rand::random::<u128>()),
    };
    probe::write(&mut stream, &question).await?;
    let answer = probe::read::<Answer>(&mut stream)
        .await
        .context("the proxy's answer")?;
    let reached = match answer {
        Answer::Reached(reached) => reached,
        Answer::Failed(why) => return Err(anyhow!("the proxy does not reach the pod: {why}")),
    };
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

/// The errors that say which half of the way is missing.
fn explain(error: io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => {
            anyhow!("refused: the pod is captured and no proxy listens")
        }
        io::ErrorKind::NetworkUnreachable => {
            anyhow!("the pod has no route to it: without a default route nothing can be probed")
        }
        _ => error.into(),
    }
}
