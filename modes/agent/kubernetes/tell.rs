//! What the agent tells Kubernetes of a pod: the annotation that the field's control plane reads, a condition that says
//! more, and events. All of it goes to one object: a pod that has the same name by now gets nothing.

use std::time::{SystemTime, UNIX_EPOCH};

use k8s_openapi::api::core::v1::{ObjectReference, Pod as PodObject};
use kube::Api;
use kube::api::{Patch, PatchParams};
use kube::runtime::events::{Event, EventType, Recorder};
use serde_json::{Value, json};

use super::client::{Trouble, answered};
use super::known::KubernetesPod;
use super::source::Source;
use crate::calendar::date;
use crate::options::Capture;

/// The annotation by which the control plane learns that peers may open tunnels to a pod.
pub(super) const REDIRECTION: &str = "ambient.istio.io/redirection";
/// Its value once the capture was proven.
const ENABLED: &str = "enabled";
/// Its value while a pod that is to be captured is not, or not proven to be.
const PENDING: &str = "pending";
/// Type of the condition; usable as a readiness gate.
pub(super) const CONDITION: &str = "ambidex.io/Captured";
/// Longest note of an event, in bytes.
const NOTE_LIMIT: usize = 1024;

/// What stands in a pod's object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Told {
    /// Value of the annotation.
    pub(super) redirection: Option<String>,
    /// Whether it is captured, a word why, and a sentence.
    pub(super) condition: Option<(bool, String, String)>,
}

impl Told {
    /// The capture was proven.
    pub(super) fn proven(mode: Capture, remark: &str) -> Self {
        let sentence = format!("captured by mode {mode}, and proven to be{remark}");
        Self {
            redirection: Some(ENABLED.to_owned()),
            condition: Some((true, "Proven".to_owned(), sentence)),
        }
    }

    /// It is to be captured and is not, or not as it should be.
    pub(super) fn pending(reason: &str, sentence: &str) -> Self {
        Self {
            redirection: Some(PENDING.to_owned()),
            condition: Some((false, reason.to_owned(), bounded(sentence))),
        }
    }

    /// Whether it says that peers may open tunnels to it.
    pub(super) fn is_proven(&self) -> bool {
        self.redirection.as_deref() == Some(ENABLED)
    }

    /// What changes an object that says `before`, as a strategic merge patch; none if it says this already. Another one's
    /// value of the annotation is not ours to take away.
    fn patch(&self, before: &Self, uid: &str, now: &str) -> Option<Value> {
        let mut patch = json!({"metadata": {"uid": uid}});
        let ours = [None, Some(ENABLED), Some(PENDING)];
        let may = self.redirection.is_some() || ours.contains(&before.redirection.as_deref());
        let annotate = self.redirection != before.redirection && may;
        if annotate {
            patch["metadata"]["annotations"] = json!({REDIRECTION: self.redirection});
        }
        if self.condition != before.condition {
            let condition = match &self.condition {
                None => json!({"$patch": "delete", "type": CONDITION}),
                Some((captured, reason, message)) => {
                    let status = if *captured { "True" } else { "False" };
                    let mut condition = json!({
                        "type": CONDITION, "status": status, "reason": reason, "message": message,
                    });
                    if before.condition.as_ref().map(|before| before.0) != Some(*captured) {
                        condition["lastTransitionTime"] = now.into();
                    }
                    condition
                }
            };
            patch["status"] = json!({"conditions": [condition]});
        }
        (annotate || self.condition != before.condition).then_some(patch)
    }
}

fn bounded(text: &str) -> String {
    let mut end = text.len().min(NOTE_LIMIT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

impl Source {
    /// Brings a pod's object to say this.
    ///
    /// # Errors
    /// When it may succeed later. What the server refuses is logged, once, and not tried again before the pod changes.
    pub(super) async fn tell(&self, pod: &KubernetesPod, told: Told) -> anyhow::Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = date(now.map_or(0, |now| now.as_secs()));
        let Some(patch) = told.patch(&pod.told, &pod.uid, &now) else {
            return Ok(());
        };
        let api: Api<PodObject> = Api::namespaced(self.client(), &pod.key.namespace);
        let (parameters, patch) = (PatchParams::default(), Patch::Strategic(&patch));
        let request = api.patch_status(&pod.key.name, &parameters, &patch);
        match answered("patch pods/status", request).await {
            Ok(_) => self.known().note_told(&pod.key, &pod.uid, told),
            Err(Trouble::Gone) => {
                tracing::debug!(pod = %pod.key, uid = pod.uid, "nothing told of a pod that is gone");
            }
            Err(Trouble::Refused(why)) => self.complain(&why),
            Err(Trouble::Later(error)) => return Err(error),
        }
        Ok(())
    }

    /// Says what happened to a pod. One that does not come through is no reason to do anything again.
    pub(super) async fn event(&self, pod: &KubernetesPod, happened: Happened, note: &str) {
        let (type_, reason, action) = happened.words();
        let event = Event {
            type_,
            reason: reason.to_owned(),
            note: Some(bounded(note)),
            action: action.to_owned(),
            secondary: None,
        };
        let reference = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: Some(pod.key.name.clone()),
            namespace: Some(pod.key.namespace.clone()),
            uid: Some(pod.uid.clone()),
            ..ObjectReference::default()
        };
        let recorder: &Recorder = self.recorder();
        match answered("create events", recorder.publish(&event, &reference)).await {
            Ok(()) | Err(Trouble::Gone) => {}
            Err(Trouble::Refused(why)) => self.complain(&why),
            Err(Trouble::Later(error)) => {
                let error = format!("{error:#}");
                tracing::warn!(pod = %pod.key, reason, error, "an event was not taken");
            }
        }
    }
}

/// What may happen to a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Happened {
    /// It is captured, and that was proven.
    Captured,
    /// It could not be enrolled.
    Failed,
    /// Its capture does not work any more.
    Broken,
    /// It does again.
    Mended,
    /// Its capture cannot be put back, and its traffic is stopped.
    Closed,
    /// It is not captured any more.
    Released,
    /// Its labels want something that is not possible.
    Refused,
}

impl Happened {
    /// Type, reason and action of the event.
    fn words(self) -> (EventType, &'static str, &'static str) {
        match self {
            Self::Captured => (EventType::Normal, "Captured", "Enrol"),
            Self::Failed => (EventType::Warning, "CaptureFailed", "Enrol"),
            Self::Broken => (EventType::Warning, "CaptureBroken", "Verify"),
            Self::Mended => (EventType::Normal, "CaptureMended", "Verify"),
            Self::Closed => (EventType::Warning, "CaptureClosed", "Close"),
            Self::Released => (EventType::Normal, "Released", "Unenrol"),
            Self::Refused => (EventType::Warning, "CaptureRefused", "Enrol"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const NOW: &str = "2024-01-01T00:00:00Z";

    #[test]
    fn only_what_differs_is_patched_and_only_in_the_pod_that_is_meant() {
        let nothing = Told::default();
        let pending = Told::pending("NotEnrolled", "no proxy");
        let proven = Told::proven(Capture::Node, "");
        assert_eq!(nothing.patch(&nothing, "u", NOW), None);
        assert_eq!(proven.patch(&proven, "u", NOW), None);
        let patch = proven.patch(&pending, "u", NOW).unwrap();
        assert_eq!(patch["metadata"]["uid"], "u");
        assert_eq!(patch["metadata"]["annotations"][REDIRECTION], "enabled");
        assert_eq!(patch["status"]["conditions"][0]["lastTransitionTime"], NOW);
        // Another reason is no transition.
        let patch = Told::pending("NotEffective", "x")
            .patch(&pending, "u", NOW)
            .unwrap();
        assert!(patch["metadata"].get("annotations").is_none());
        assert!(
            patch["status"]["conditions"][0]
                .get("lastTransitionTime")
                .is_none()
        );
        let patch = nothing.patch(&proven, "u", NOW).unwrap();
        assert_eq!(patch["metadata"]["annotations"], json!({REDIRECTION: null}));
        assert_eq!(
            patch["status"]["conditions"],
            json!([{"$patch": "delete", "type": CONDITION}])
        );
    }

    #[test]
    fn what_somebody_else_wrote_is_not_taken_away() {
        let foreign = Told {
            redirection: Some("disabled".to_owned()),
            condition: None,
        };
        assert_eq!(Told::default().patch(&foreign, "u", NOW), None);
        assert!(
            Told::proven(Capture::Inpod, "")
                .patch(&foreign, "u", NOW)
                .is_some()
        );
    }

    #[test]
    fn notes_are_cut_between_characters() {
        assert_eq!(bounded(&"ä".repeat(1000)).len(), NOTE_LIMIT);
        assert_eq!(
            bounded(&format!("x{}", "ä".repeat(1000))).len(),
            NOTE_LIMIT - 1
        );
    }
}
