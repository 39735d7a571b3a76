//! The way to the API server.

use std::time::Duration;

use anyhow::{Context, anyhow};
use kube::config::{Config, KubeConfigOptions, Kubeconfig};
use kube::{Client, Error};

use super::Settings;

/// How long the API server may take to take a connection.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// How long it may take to answer one request, other than a watch.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// A client; nothing is connected yet.
pub(super) async fn client(settings: &Settings) -> anyhow::Result<Client> {
    // Of the two libraries that a build may contain, the one that the tunnels use; a second call changes nothing.
    let provider = shared_proxy::identity::provider();
    let _ = provider.as_ref().clone().install_default();
    let mut config = match &settings.kubeconfig {
        Some(path) => {
            let file = Kubeconfig::read_from(path)
                .with_context(|| format!("{} (--kubeconfig, KUBECONFIG)", path.display()))?;
            Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
                .await
                .with_context(|| path.display().to_string())?
        }
        None => Config::incluster().context(
            "--source kubernetes: this is no pod with a service account: name a file with --kubeconfig (KUBECONFIG)",
        )?,
    };
    config.connect_timeout = Some(CONNECT_WITHIN);
    // Whoever asks has their own time limit; pods are tried again by the queue.
    config.default_retry = false;
    Client::try_from(config).context("client of the API server")
}

/// What a failed request means for whoever made it.
#[derive(Debug)]
pub(super) enum Trouble {
    /// There is no such object, or no longer the one that was meant.
    Gone,
    /// This will not become better by trying again.
    Refused(String),
    /// It may.
    Later(anyhow::Error),
}

/// Waits for a request's answer, not for ever.
pub(super) async fn answered<T>(
    what: &str,
    request: impl Future<Output = Result<T, Error>>,
) -> Result<T, Trouble> {
    match tokio::time::timeout(ANSWER_WITHIN, request).await {
        Ok(answer) => answer.map_err(|error| judge(what, error)),
        Err(_) => Err(Trouble::Later(anyhow!(
            "{what}: the API server did not answer within {ANSWER_WITHIN:?}"
        ))),
    }
}

fn judge(what: &str, error: Error) -> Trouble {
    match &error {
        Error::Api(status) if status.is_not_found() || status.is_conflict() => Trouble::Gone,
        Error::Api(status) if status.is_forbidden() => Trouble::Refused(format!(
            "{what}: {}: the agent's ClusterRole lacks it (docs/operations.md lists what it needs)",
            status.message
        )),
        Error::Api(status) if status.is_invalid() || status.code == 400 => {
            Trouble::Refused(format!("{what}: {}", status.message))
        }
        _ => Trouble::Later(anyhow::Error::new(error).context(what.to_owned())),
    }
}

impl Trouble {
    /// As an error of a whole task that goes on without it.
    pub(super) fn into_error(self, what: &str) -> anyhow::Error {
        match self {
            Trouble::Gone => anyhow!("{what}: not found"),
            Trouble::Refused(why) => anyhow!(why),
            Trouble::Later(error) => error,
        }
    }
}
