//! The lab's workloads and services in the field's LOCAL_XDS form: what every proxy of the lab knows.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{APPLICATION_PORT, Node, Pod, SERVICE_ENDPOINTS, SERVICE_PORT, SERVICE_VIP, Topology};

/// Name and namespace of the lab's service.
const SERVICE: (&str, &str) = ("echo", "beta");

/// A LOCAL_XDS file. Change what a scenario needs and write it with [`LocalXds::to_yaml`].
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LocalXds {
    /// Pods of the mesh.
    pub workloads: Vec<Workload>,
    /// Services of the mesh.
    pub services: Vec<Service>,
    /// Authorization policies in their LOCAL_XDS form; none unless a scenario adds some.
    pub policies: Vec<serde_json::Value>,
}

/// One pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Workload {
    /// Key of the workload: `cluster//Pod/namespace/name`.
    pub uid: String,
    /// Name of the pod.
    pub name: String,
    /// Namespace of the pod.
    pub namespace: String,
    /// Service account of the pod.
    pub service_account: String,
    /// Addresses of the pod.
    pub workload_ips: Vec<String>,
    /// `HBONE` for a pod whose proxy takes tunnels for it, else `TCP`.
    pub protocol: String,
    /// Node of the pod.
    pub node: String,
    /// Cluster of the pod.
    pub cluster_id: String,
    /// Policies with a selector that this pod matches: `namespace/name`.
    pub authorization_policies: Vec<String>,
    /// Services that this pod answers for, with the port on the service and on the pod.
    pub services: BTreeMap<String, BTreeMap<u16, u16>>,
    /// Further keys, which only some scenarios need.
    #[serde(flatten)]
    pub more: BTreeMap<String, serde_json::Value>,
}

/// One service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    /// Name of the service.
    pub name: String,
    /// Namespace of the service.
    pub namespace: String,
    /// Its DNS name, which is part of its key.
    pub hostname: String,
    /// `network/address`; the lab's network is the one without a name.
    pub vips: Vec<String>,
    /// Port on the service and on its endpoints.
    pub ports: BTreeMap<u16, u16>,
    /// Further keys, which only some scenarios need.
    #[serde(flatten)]
    pub more: BTreeMap<String, serde_json::Value>,
}

impl Topology {
    /// What the proxies of this lab know: all pods, the service, no policy.
    pub fn local_xds(&self) -> LocalXds {
        let (name, namespace) = SERVICE;
        let hostname = format!("{name}.{namespace}.svc.cluster.local");
        let service_key = format!("{namespace}/{hostname}");
        let workloads = self
            .pods()
            .map(|(node, pod)| workload(node, pod, &service_key))
            .collect();
        LocalXds {
            workloads,
            services: vec![Service {
                name: name.to_owned(),
                namespace: namespace.to_owned(),
                hostname,
                vips: self
                    .families
                    .addresses(SERVICE_VIP)
                    .iter()
                    .map(|ip| format!("/{ip}"))
                    .collect(),
                ports: ports(),
                more: BTreeMap::new(),
            }],
            policies: Vec::new(),
        }
    }
}

impl LocalXds {
    /// The workload of this pod.
    pub fn workload_mut(&mut self, pod: &str) -> Option<&mut Workload> {
        self.workloads
            .iter_mut()
            .find(|workload| workload.name == pod)
    }

    /// The file's text.
    ///
    /// # Errors
    /// When a policy holds something that YAML cannot.
    pub fn to_yaml(&self) -> anyhow::Result<String> {
        Ok(serde_saphyr::to_string(self)?)
    }
}

fn ports() -> BTreeMap<u16, u16> {
    BTreeMap::from([(SERVICE_PORT, APPLICATION_PORT)])
}

fn workload(node: &Node, pod: &Pod, service_key: &str) -> Workload {
    let serves = SERVICE_ENDPOINTS.contains(&pod.name.as_str());
    Workload {
        uid: format!("Kubernetes//Pod/{}/{}", pod.namespace, pod.name),
        name: pod.name.clone(),
        namespace: pod.namespace.clone(),
        service_account: pod.service_account.clone(),
        workload_ips: node
            .families
            .addresses(pod.ip)
            .iter()
            .map(ToString::to_string)
            .collect(),
        protocol: if pod.capture.is_some() {
            "HBONE"
        } else {
            "TCP"
        }
        .to_owned(),
        node: node.name.clone(),
        cluster_id: "Kubernetes".to_owned(),
        authorization_policies: Vec::new(),
        services: serves
            .then(|| (service_key.to_owned(), ports()))
            .into_iter()
            .collect(),
        more: BTreeMap::new(),
    }
}
