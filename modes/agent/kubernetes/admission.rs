//! Whether a pod that a runtime adds is captured: by what is known of it, else by asking once. Who cannot be asked is no
//! reason to let a pod start uncaptured.

use k8s_openapi::api::core::v1::{Namespace, Pod as PodObject};
use kube::Api;

use super::super::EnrolError;
use super::client::{Trouble, answered};
use super::eligibility::{Verdict, Words, judge};
use super::known::{Key, KubernetesPod};
use super::source::Source;
use super::{Identity, Wanted};
use crate::cni::PodEvent;

/// How long the API server may take here: the plugin waits 5 s for all of the enrolment.
const ANSWER_WITHIN: std::time::Duration = std::time::Duration::from_millis(1500);

impl Source {
    /// How the pod of an event is captured; none: it is not in the mesh.
    ///
    /// # Errors
    /// Kubernetes does not know it, cannot be asked, or its labels want what this agent cannot make.
    pub(in crate::agent) async fn wanted(
        &self,
        event: &PodEvent,
    ) -> Result<Option<Wanted>, EnrolError> {
        let key = Key::new(&event.pod_namespace, &event.pod_name);
        let not_ready = |reason: String| EnrolError::NotReady {
            pod: key.to_string(),
            reason,
        };
        // Without one from the runtime, the event has the container's id there.
        let says_uid = event.pod_uid != event.container_id && !event.pod_uid.is_empty();
        let meant = |pod: &KubernetesPod| {
            !says_uid || [&pod.uid, &pod.runtime_uid].contains(&&event.pod_uid)
        };
        let pod = match self.known().pod(&key).filter(|pod| says_uid && meant(pod)) {
            Some(pod) => pod,
            None => self.ask_pod(&key).await.map_err(not_ready)?,
        };
        if !meant(&pod) {
            return Err(not_ready(format!(
                "the runtime adds {}, but the pod of this name in Kubernetes is {}",
                event.pod_uid, pod.uid
            )));
        }
        let namespace_labels = match self.known().namespace(&key.namespace) {
            Some(labels) => labels,
            None => self
                .ask_namespace(&key.namespace)
                .await
                .map_err(not_ready)?,
        };
        match judge(&pod.candidate(&namespace_labels), &self.rules) {
            Verdict::Captured(mode) => Ok(Some(Wanted {
                mode,
                identity: Some(Identity {
                    dns_capture: pod.dns_capture(),
                    extent: pod.extent(),
                    uid: pod.runtime_uid,
                    service_account: pod.service_account,
                }),
            })),
            Verdict::NotCaptured(reason) => {
                tracing::debug!(pod = %key, %reason, "a pod that is added is not captured");
                Ok(None)
            }
            Verdict::Refused(refusal) => Err(EnrolError::Invalid(format!(
                "pod {key} does not start uncaptured: {refusal}"
            ))),
        }
    }

    async fn ask_pod(&self, key: &Key) -> Result<KubernetesPod, String> {
        let api: Api<PodObject> = Api::namespaced(self.client(), &key.namespace);
        let pod = ask("get pods", api.get(&key.name)).await?;
        KubernetesPod::of(&pod).ok_or_else(|| "the API server sent a pod without a name".to_owned())
    }

    async fn ask_namespace(&self, name: &str) -> Result<Words, String> {
        let api: Api<Namespace> = Api::all(self.client());
        let namespace = ask("get namespaces", api.get(name)).await?;
        Ok(namespace.metadata.labels.unwrap_or_default())
    }
}

async fn ask<T>(
    what: &str,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, String> {
    match tokio::time::timeout(ANSWER_WITHIN, answered(what, request)).await {
        Ok(Ok(found)) => Ok(found),
        Ok(Err(Trouble::Gone)) => Err(format!("{what}: the API server does not know it")),
        Ok(Err(Trouble::Refused(why))) => Err(why),
        Ok(Err(Trouble::Later(error))) => Err(format!("the API server cannot be asked: {error:#}")),
        Err(_) => Err(format!(
            "{what}: the API server did not answer within {ANSWER_WITHIN:?}"
        )),
    }
}
