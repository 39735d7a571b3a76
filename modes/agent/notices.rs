//! What becomes of pods, told to whoever wants to tell others: each notice is a line of the agent's log anyway, and a
//! source of pods (Kubernetes) makes an event or a condition of it.

use std::fmt;

use tokio::sync::broadcast;

use super::Pod;

/// Notices that a listener may be behind; whoever is further behind misses the oldest.
const KEPT: usize = 1024;

/// What happened to a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// Its capture stands and the proxy serves it.
    Enrolled,
    /// It could not be enrolled; what was made was taken back.
    Failed,
    /// Something of its capture was missing or changed and was put back.
    Mended,
    /// Its capture cannot be put back; its traffic is stopped.
    Closed,
    /// Its capture is proven again; its traffic flows.
    Reopened,
}

impl What {
    /// As the reason of an event is written.
    pub fn reason(self) -> &'static str {
        match self {
            What::Enrolled => "Enrolled",
            What::Failed => "EnrolmentFailed",
            What::Mended => "CaptureMended",
            What::Closed => "CaptureClosed",
            What::Reopened => "CaptureReopened",
        }
    }

    /// Whether somebody should look at it.
    pub fn is_warning(self) -> bool {
        matches!(self, What::Failed | What::Closed)
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.reason())
    }
}

/// Something that happened to a pod.
#[derive(Debug, Clone)]
pub struct Notice {
    /// The pod.
    pub pod: Pod,
    /// What happened.
    pub what: What,
    /// The same in a sentence, with the object and the fix where they are known.
    pub sentence: String,
}

/// Where notices go: to all who listen, and to nobody's harm when none does.
#[derive(Debug)]
pub struct Notices(broadcast::Sender<Notice>);

impl Default for Notices {
    fn default() -> Self {
        Self(broadcast::Sender::new(KEPT))
    }
}

impl Notices {
    /// Hears everything from here on.
    pub fn listen(&self) -> broadcast::Receiver<Notice> {
        self.0.subscribe()
    }

    /// Tells it to those who listen.
    pub(super) fn tell(&self, pod: &Pod, what: What, sentence: impl Into<String>) {
        let notice = Notice {
            pod: pod.clone(),
            what,
            sentence: sentence.into(),
        };
        // An error means that nobody listens.
        let _ = self.0.send(notice);
    }
}
