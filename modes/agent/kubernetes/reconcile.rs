//! One pod, from what it is to what it should be. What the API server said last decides; that a pod is gone is asked again
//! before anything is taken away, because the runtime may have been faster than the watch.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use host_net::netns::Netns;
use k8s_openapi::api::core::v1::Pod as PodObject;
use kube::Api;

use super::super::admission::{admit, has_address};
use super::super::{Agent, Pod, PodState};
use super::client::answered;
use super::eligibility::{Verdict, judge};
use super::known::{Key, KubernetesPod};
use super::netns::{Resident, residents};
use super::source::{Source, lock};
use super::tell::{Happened, Told};
use super::{Identity, Wanted};
use crate::cni::{PodEvent, PodIp};
use crate::options::Capture;
use crate::unix_http::Caller;

/// How old a search of all processes may be that knows a pod: many that are enrolled at once share one.
const SCAN_GOOD_FOR: Duration = Duration::from_secs(2);

/// What a search of all processes found.
pub(super) struct Scan {
    begun: Instant,
    residents: BTreeMap<String, Vec<Resident>>,
}

impl Source {
    /// Does what there is to do for the pods of this name.
    ///
    /// # Errors
    /// What failed and is to be tried again.
    pub(super) async fn reconcile(&self, agent: &Arc<Agent>, key: &Key) -> anyhow::Result<()> {
        let known = self.known().pod(key);
        let runtime_uid = known.as_ref().map(|pod| pod.runtime_uid.as_str());
        for pod in agent.pods.all() {
            let same_name = pod.namespace == key.namespace && pod.name == key.name;
            if same_name && Some(pod.uid.as_str()) != runtime_uid {
                self.release_if_gone(agent, key, &pod).await?;
            }
        }
        let Some(pod) = known else {
            return Ok(());
        };
        let Some(namespace_labels) = self.known().namespace(&key.namespace) else {
            return Err(anyhow!("the namespace {} is not known yet", key.namespace));
        };
        let enrolled = agent.pods.get(&pod.runtime_uid);
        match (
            judge(&pod.candidate(&namespace_labels), &self.rules),
            enrolled,
        ) {
            (Verdict::NotCaptured(_), Some(enrolled)) if enrolled.state == PodState::Draining => {
                self.tell(&pod, Told::default()).await
            }
            (Verdict::NotCaptured(reason), Some(enrolled)) => {
                if enrolled.state == PodState::Captured && !pod.ended {
                    // It runs on, and so do its connections.
                    let drain = agent.config.drain;
                    agent.let_go(&pod.runtime_uid, drain).await?;
                } else {
                    agent.unenrol(&pod.runtime_uid, |_| true).await?;
                }
                self.forget(&pod.runtime_uid);
                tracing::info!(pod = %key, %reason, "pod was released");
                self.event(
                    &pod,
                    Happened::Released,
                    &format!("not captured any more: {reason}"),
                )
                .await;
                self.tell(&pod, Told::default()).await
            }
            (Verdict::NotCaptured(_), None) => self.tell(&pod, Told::default()).await,
            (Verdict::Refused(refusal), None) => {
                let why = refusal.to_string();
                self.fail(&pod, Happened::Refused, &why).await;
                self.tell(&pod, Told::pending("Refused", &why)).await
            }
            (Verdict::Refused(refusal), Some(enrolled)) => {
                // A capture that stands is better than none.
                self.fail(&pod, Happened::Refused, &refusal.to_string())
                    .await;
                self.prove(agent, &pod, &enrolled, enrolled.mode).await
            }
            (Verdict::Captured(mode), enrolled) => {
                let Some(enrolled) = self.enrol(agent, &pod, mode, enrolled).await? else {
                    return Ok(());
                };
                self.prove(agent, &pod, &enrolled, mode).await
            }
        }
    }

    /// Takes a pod away that the agent has and Kubernetes has not: deleted while nobody looked, or replaced.
    async fn release_if_gone(&self, agent: &Agent, key: &Key, pod: &Pod) -> anyhow::Result<()> {
        let api: Api<PodObject> = Api::namespaced(self.client(), &key.namespace);
        let asked = answered("get pods", api.get_opt(&key.name)).await;
        let found = asked.map_err(|trouble| trouble.into_error("get pods"))?;
        let found = found.as_ref().and_then(KubernetesPod::of);
        if found.is_some_and(|found| found.runtime_uid == pod.uid) {
            return Ok(());
        }
        agent.unenrol(&pod.uid, |_| true).await?;
        self.forget(&pod.uid);
        tracing::info!(pod = %key, uid = pod.uid, "pod was released: it is not in Kubernetes any more");
        Ok(())
    }

    fn forget(&self, uid: &str) {
        lock(&self.proven).remove(uid);
        lock(&self.failures).remove(uid);
    }

    /// Enrols a pod that runs, unless it is enrolled as it should be. None for one that the runtime is still at: it comes
    /// with an address.
    async fn enrol(
        &self,
        agent: &Arc<Agent>,
        pod: &KubernetesPod,
        mode: Capture,
        enrolled: Option<Pod>,
    ) -> anyhow::Result<Option<Pod>> {
        let captured = enrolled.filter(|enrolled| enrolled.state == PodState::Captured);
        let current = |known: &&Pod| {
            pod.addresses.is_empty() || same_addresses(&known.addresses, &pod.addresses)
        };
        if let Some(known) = captured.as_ref().filter(current) {
            return Ok(Some(known.clone()));
        }
        if pod.addresses.is_empty() {
            return Ok(None);
        }
        let enrolment = async {
            let event = match &captured {
                Some(known) => again(known, pod),
                None => self.event_of(agent, pod).await?,
            };
            let wanted = Wanted {
                // A captured pod's mode is not changed by the way.
                mode: captured.as_ref().map_or(mode, |known| known.mode),
                identity: Some(Identity {
                    uid: pod.runtime_uid.clone(),
                    service_account: pod.service_account.clone(),
                    dns_capture: pod.dns_capture(),
                    extent: pod.extent(),
                }),
            };
            let admitted = admit(agent, &event, wanted).await?;
            agent.enrol_live(admitted, &Caller::own()).await?;
            agent
                .pods
                .get(&pod.runtime_uid)
                .ok_or_else(|| anyhow!("it was taken away again at once"))
        };
        match enrolment.await {
            Ok(enrolled) => Ok(Some(enrolled)),
            Err(error) => {
                let why = format!("{error:#}");
                self.forget_proof(&pod.runtime_uid);
                self.fail(pod, Happened::Failed, &why).await;
                self.tell(pod, Told::pending("NotEnrolled", &why)).await?;
                Err(error)
            }
        }
    }

    fn forget_proof(&self, uid: &str) {
        lock(&self.proven).remove(uid);
    }

    /// Says what is wrong with a pod, unless that was the last that was said.
    async fn fail(&self, pod: &KubernetesPod, happened: Happened, why: &str) {
        let before = lock(&self.failures).insert(pod.runtime_uid.clone(), why.to_owned());
        if before.as_deref() != Some(why) {
            tracing::warn!(pod = %pod.key, why, "pod is not captured as it should be");
            self.event(pod, happened, why).await;
        }
    }

    /// Tells Kubernetes whether an enrolled pod's capture works: looked at in the kernel, asked of the proxy, and tried.
    async fn prove(
        &self,
        agent: &Agent,
        pod: &KubernetesPod,
        enrolled: &Pod,
        mode: Capture,
    ) -> anyhow::Result<()> {
        let uid = &pod.runtime_uid;
        let mut wrong = agent.effects.all().remove(uid).unwrap_or_default();
        if enrolled.state != PodState::Captured {
            wrong.push(format!("the pod is {}", enrolled.state));
        }
        if wrong.is_empty() && !lock(&self.proven).contains(uid) {
            let verified = agent.verify_pod(enrolled, &agent.proxy_tells().await).await;
            wrong = verified
                .checks
                .into_iter()
                .flat_map(|check| check.findings)
                .collect();
        }
        if wrong.is_empty() {
            lock(&self.proven).insert(uid.clone());
            let failed = lock(&self.failures).remove(uid).is_some();
            let remark = if enrolled.mode == mode {
                String::new()
            } else {
                format!(
                    "; mode {mode}, which its labels ask for, comes when the pod is created anew"
                )
            };
            let told = Told::proven(enrolled.mode, &remark);
            let was_told = pod.told.is_proven();
            self.tell(pod, told).await?;
            if !was_told {
                let happened = if failed {
                    Happened::Mended
                } else {
                    Happened::Captured
                };
                let note = format!("captured by mode {}{remark}", enrolled.mode);
                self.event(pod, happened, &note).await;
            }
            return Ok(());
        }
        let why = wrong.join("; ");
        self.forget_proof(uid);
        let (happened, reason) = match agent.closings.get(uid) {
            Some(_) => (Happened::Closed, "Closed"),
            None => (Happened::Broken, "NotEffective"),
        };
        self.fail(pod, happened, &why).await;
        self.tell(pod, Told::pending(reason, &why)).await?;
        Err(anyhow!(why))
    }

    /// A pod that runs, as a runtime would have added it.
    async fn event_of(&self, agent: &Agent, pod: &KubernetesPod) -> anyhow::Result<PodEvent> {
        let resident = self.resident(agent, pod).await?;
        Ok(PodEvent {
            netns: resident.netns.display().to_string(),
            pod_name: pod.key.name.clone(),
            pod_namespace: pod.key.namespace.clone(),
            ips: addresses(pod),
            pod_uid: pod.runtime_uid.clone(),
            service_account: pod.service_account.clone(),
            container_id: resident.container_id,
            network: String::new(),
            if_name: String::new(),
            dns_capture: pod.dns_capture(),
            extent: pod.extent(),
        })
    }

    /// A process of the pod in a network namespace that has one of its addresses.
    async fn resident(&self, agent: &Agent, pod: &KubernetesPod) -> anyhow::Result<Resident> {
        let residents = self.residents_of(agent, &pod.runtime_uid).await?;
        let proc = self.settings.host_proc.display();
        anyhow::ensure!(
            !residents.is_empty(),
            "no process below {proc} is in a control group of the pod {} and in a network namespace of its own: has it \
             ended, or does its runtime run it in a virtual machine?",
            pod.runtime_uid
        );
        for resident in &residents {
            let Ok(netns) = Netns::open(&resident.netns) else {
                continue;
            };
            if netns.id() != resident.id {
                continue;
            }
            for address in &pod.addresses {
                if has_address(&netns, *address).await? {
                    return Ok(resident.clone());
                }
            }
        }
        Err(anyhow!(
            "none of the network namespaces of the pod's {} processes has one of its addresses {:?}",
            residents.len(),
            pod.addresses
        ))
    }

    async fn residents_of(&self, agent: &Agent, uid: &str) -> anyhow::Result<Vec<Resident>> {
        let mut scan = self.scan.lock().await;
        let of_pod = |scan: &Scan| scan.residents.get(uid).cloned();
        if let Some(recent) = scan
            .as_ref()
            .filter(|scan| scan.begun.elapsed() < SCAN_GOOD_FOR)
            && let Some(found) = of_pod(recent)
        {
            return Ok(found);
        }
        let begun = Instant::now();
        let (proc, host) = (self.settings.host_proc.clone(), agent.host.id());
        let residents = tokio::task::spawn_blocking(move || residents(&proc, host))
            .await?
            .with_context(|| self.settings.host_proc.display().to_string())?;
        let found = scan.insert(Scan { begun, residents });
        Ok(of_pod(found).unwrap_or_default())
    }
}

fn same_addresses(known: &[std::net::IpAddr], said: &[std::net::IpAddr]) -> bool {
    known.len() == said.len() && said.iter().all(|address| known.contains(address))
}

fn addresses(pod: &KubernetesPod) -> Vec<PodIp> {
    let alone = pod.addresses.iter().map(|address| PodIp {
        interface: None,
        address: (*address).into(),
        gateway: None,
    });
    alone.collect()
}

/// An enrolled pod with the addresses that it has by now.
fn again(known: &Pod, pod: &KubernetesPod) -> PodEvent {
    PodEvent {
        netns: known.netns.display().to_string(),
        pod_name: known.name.clone(),
        pod_namespace: known.namespace.clone(),
        ips: addresses(pod),
        pod_uid: known.uid.clone(),
        service_account: known.service_account.clone(),
        container_id: known.container_id.clone(),
        network: known.network.clone(),
        if_name: known.if_name.clone(),
        dns_capture: pod.dns_capture(),
        extent: pod.extent(),
    }
}
