//! The label set of a connection's metrics, in one place: what is in it decides how many time series exist.

use std::fmt;
use std::sync::{Arc, LazyLock};

use crate::identity::Identity;
use crate::state::{Service, Workload};

use super::{Direction, Endpoint, ResponseFlag};

type Label = Arc<str>;

/// Value of a label that is not known, as Istio's dashboards expect it.
static UNKNOWN: LazyLock<Label> = LazyLock::new(|| Arc::from("unknown"));

/// The values that two connections must share to be counted together. No addresses, ports or pod names.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct ConnectionLabels {
    pub direction: Direction,
    pub capture_mode: &'static str,
    source: PeerLabels,
    destination: PeerLabels,
    service: ServiceLabels,
    mutual_tls: bool,
    pub flag: ResponseFlag,
    /// Whether the workload of an end is known: then there are labels of regions and zones.
    located: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct PeerLabels {
    workload: Label,
    canonical_service: Label,
    canonical_revision: Label,
    namespace: Label,
    cluster: Label,
    region: Label,
    zone: Label,
    principal: Option<Identity>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct ServiceLabels {
    hostname: Label,
    name: Label,
    namespace: Label,
}

impl ConnectionLabels {
    /// Labels of a connection that works so far (`response_flags` is `-`).
    pub fn new(
        direction: Direction,
        capture_mode: &'static str,
        source: &Endpoint,
        destination: &Endpoint,
        service: Option<&Service>,
        mutual_tls: bool,
    ) -> Self {
        Self {
            direction,
            capture_mode,
            source: PeerLabels::of(source.workload.as_deref(), source.identity.as_ref()),
            destination: PeerLabels::of(
                destination.workload.as_deref(),
                destination.identity.as_ref(),
            ),
            service: ServiceLabels::of(service),
            mutual_tls,
            flag: ResponseFlag::None,
            located: source.workload.is_some() || destination.workload.is_some(),
        }
    }

    /// Labels of a connection that was refused before anybody knew more about it.
    pub fn refused(direction: Direction, capture_mode: &'static str, flag: ResponseFlag) -> Self {
        Self {
            direction,
            capture_mode,
            source: PeerLabels::of(None, None),
            destination: PeerLabels::of(None, None),
            service: ServiceLabels::of(None),
            mutual_tls: false,
            flag,
            located: false,
        }
    }

    /// The same connection, ended with `flag`.
    pub fn with_flag(&self, flag: ResponseFlag) -> Self {
        Self {
            flag,
            ..self.clone()
        }
    }

    /// Calls `f` with every label in the order of exposition.
    pub fn for_each<E>(
        &self,
        mut f: impl FnMut(&'static str, &dyn fmt::Display) -> Result<(), E>,
    ) -> Result<(), E> {
        let (source, destination) = (&self.source, &self.destination);
        f("reporter", &self.direction.reporter())?;
        f("source_workload", &source.workload)?;
        f("source_canonical_service", &source.canonical_service)?;
        f("source_canonical_revision", &source.canonical_revision)?;
        f("source_workload_namespace", &source.namespace)?;
        f("source_principal", &source.principal())?;
        f("source_app", &source.canonical_service)?;
        f("source_version", &source.canonical_revision)?;
        f("source_cluster", &source.cluster)?;
        f("destination_service", &self.service.hostname)?;
        f("destination_service_namespace", &self.service.namespace)?;
        f("destination_service_name", &self.service.name)?;
        f("destination_workload", &destination.workload)?;
        f(
            "destination_canonical_service",
            &destination.canonical_service,
        )?;
        f(
            "destination_canonical_revision",
            &destination.canonical_revision,
        )?;
        f("destination_workload_namespace", &destination.namespace)?;
        f("destination_principal", &destination.principal())?;
        f("destination_app", &destination.canonical_service)?;
        f("destination_version", &destination.canonical_revision)?;
        f("destination_cluster", &destination.cluster)?;
        f("request_protocol", &"tcp")?;
        f("response_flags", &self.flag)?;
        let security = if self.mutual_tls {
            "mutual_tls"
        } else {
            "unknown"
        };
        f("connection_security_policy", &security)?;
        if self.located {
            f("source_region", &source.region)?;
            f("source_zone", &source.zone)?;
            f("destination_region", &destination.region)?;
            f("destination_zone", &destination.zone)?;
        }
        f("capture_mode", &self.capture_mode)
    }
}

impl PeerLabels {
    fn of(workload: Option<&Workload>, principal: Option<&Identity>) -> Self {
        Self {
            // A workload that nothing controls (a bare pod, a state file that does not say) goes by its own name.
            workload: label(workload.map(|w| match w.workload_name.is_empty() {
                true => &w.name,
                false => &w.workload_name,
            })),
            canonical_service: label(workload.map(|w| &w.canonical_name)),
            canonical_revision: label(workload.map(|w| &w.canonical_revision)),
            namespace: label(workload.map(|w| &w.namespace)),
            cluster: label(workload.map(|w| &w.cluster_id)),
            region: label(workload.map(|w| &w.locality.region)),
            zone: label(workload.map(|w| &w.locality.zone)),
            principal: principal.cloned(),
        }
    }

    fn principal(&self) -> impl fmt::Display {
        fmt::from_fn(|f| match &self.principal {
            Some(identity) => write!(f, "{identity}"),
            None => f.write_str(&UNKNOWN),
        })
    }
}

impl ServiceLabels {
    fn of(service: Option<&Service>) -> Self {
        Self {
            hostname: label(service.map(|s| &s.hostname)),
            name: label(service.map(|s| &s.name)),
            namespace: label(service.map(|s| &s.namespace)),
        }
    }
}

/// An absent value and an empty one are the same: unknown.
fn label(value: Option<&Label>) -> Label {
    match value {
        Some(value) if !value.is_empty() => Arc::clone(value),
        _ => Arc::clone(&UNKNOWN),
    }
}
