//! The steps of a change of capture, by name, and faults at each of them: what an agent makes of an error, of its own end
//! and of the proxy's at any moment is tested with them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::bail;
use tokio::time::sleep;

/// Variable with the path of a file that says which fault is wanted: `switch:STEP:fail` or `switch:STEP:stall`. It is read
/// before each step, and renamed to `PATH.reached` when its step comes: the step fails, or waits until that file is gone.
const VARIABLE: &str = "AMBIDEX_FAULTS";
/// A step that nobody lets go on does so by itself.
const STALLS_FOR: Duration = Duration::from_secs(60);
const LOOKS_EVERY: Duration = Duration::from_millis(20);

/// What a change consists of, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// The proxy begins nothing for the pod.
    Hold,
    /// It can serve it by the capture to be.
    Prepare,
    /// What that capture has on the node and in the proxy's namespace is made.
    NodeObjects,
    /// What it has inside the pod is made.
    PodObjects,
    /// The other capture takes nothing more.
    Exclusive,
    /// The change is on disk: whoever comes later completes it.
    Flip,
    /// The proxy goes on, by the capture that the pod has.
    Release,
    /// Nothing goes by the other capture any more: the rest of it is taken away.
    DrainEnd,
}

impl Step {
    fn name(self) -> &'static str {
        match self {
            Self::Hold => "hold",
            Self::Prepare => "prepare",
            Self::NodeObjects => "node-objects",
            Self::PodObjects => "pod-objects",
            Self::Exclusive => "exclusive",
            Self::Flip => "flip",
            Self::Release => "release",
            Self::DrainEnd => "drain-end",
        }
    }

    /// To be called before the step.
    ///
    /// # Errors
    /// It is to fail.
    pub(super) async fn comes(self) -> anyhow::Result<()> {
        match std::env::var_os(VARIABLE) {
            Some(path) => self.comes_with(Path::new(&path)).await,
            None => Ok(()),
        }
    }

    async fn comes_with(self, file: &Path) -> anyhow::Result<()> {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let wanted = text.trim().strip_prefix("switch:");
        let Some((step, action)) = wanted.and_then(|wanted| wanted.split_once(':')) else {
            return Ok(());
        };
        if step != self.name() {
            return Ok(());
        }
        let reached = PathBuf::from(format!("{}.reached", file.display()));
        std::fs::rename(file, &reached)?;
        tracing::warn!(step, action, "a fault that was asked for");
        if action == "fail" {
            bail!("step {step}: a fault that was asked for");
        }
        let mut waited = Duration::ZERO;
        while reached.exists() && waited < STALLS_FOR {
            sleep(LOOKS_EVERY).await;
            waited += LOOKS_EVERY;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn a_fault_comes_once_and_at_its_step() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("fault");
        assert!(Step::Hold.comes_with(&file).await.is_ok(), "no file");
        std::fs::write(&file, "switch:flip:fail\n").unwrap();
        assert!(Step::Hold.comes_with(&file).await.is_ok(), "another step");
        assert!(Step::Flip.comes_with(&file).await.is_err());
        assert!(Step::Flip.comes_with(&file).await.is_ok(), "once");
    }
}
