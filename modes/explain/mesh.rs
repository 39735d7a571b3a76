//! What a proxy will decide about a connection, from what it says that it knows of the mesh.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, anyhow};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use shared_proxy::capture::HBONE_PORT;
use shared_proxy::state::balancing::Wanted;
use shared_proxy::state::policy::{Peer, Verdict, authorize};
use shared_proxy::state::workload::Protocol;
use shared_proxy::state::{Policy, Service, Snapshot, Workload};

/// How often an endpoint is drawn to learn which ones the proxy would choose among.
const DRAWS: usize = 64;

/// What a proxy decides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Decision {
    /// `hbone`, `plain`, `handOver`, `waypoint`, `refused` or `unknown`.
    pub way: Way,
    /// In words.
    pub text: String,
    /// Identity of the client, as it is proven or believed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_identity: Option<String>,
    /// Identity that the other end has to prove.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_identity: Option<String>,
    /// All endpoints among which the proxy chooses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub among: Vec<SocketAddr>,
}

/// How a connection goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Way {
    /// In a tunnel with mutual TLS.
    Hbone,
    /// As TCP.
    Plain,
    /// Inside the proxy's process.
    HandOver,
    /// By a layer 7 proxy, which is not followed.
    Waypoint,
    /// Not at all.
    Refused,
    /// It cannot be told.
    Unknown,
}

/// Where an outbound connection goes.
#[derive(Debug, Clone)]
pub(super) struct Outbound {
    pub(super) decision: Decision,
    /// What is dialled, and what is asked for there.
    pub(super) next: Option<(SocketAddr, SocketAddr)>,
}

/// What one proxy knows.
#[derive(Debug, Clone)]
pub struct Mesh(pub(super) Arc<Snapshot>);

impl Mesh {
    /// From the sections `workloads`, `services` and `policies` of a configuration dump.
    ///
    /// # Errors
    /// When they are of another version's form.
    pub fn of_dump(workloads: Value, mut services: Value, policies: Value) -> anyhow::Result<Self> {
        for service in services.as_array_mut().into_iter().flatten() {
            if let Some(service) = service.as_object_mut() {
                service.remove("endpoints");
            }
        }
        let workloads: Vec<Workload> = serde_json::from_value(workloads).context("workloads")?;
        let services: Vec<Service> = serde_json::from_value(services).context("services")?;
        let policies: Vec<Policy> = serde_json::from_value(policies).context("policies")?;
        let snapshot = Snapshot::new(workloads, services, policies)?;
        Ok(Self(Arc::new(snapshot)))
    }

    /// The address and port that a host name of the mesh stands for, `NAME.NAMESPACE` and
    /// `NAMESPACE/NAME` being enough.
    pub fn named(&self, name: &str, port: u16) -> anyhow::Result<SocketAddr> {
        let mut services = self.0.services().filter(|service| {
            *service.hostname == *name
                || service.hostname.starts_with(&format!("{name}."))
                || format!("{}/{}", service.namespace, service.name) == name
        });
        let found = services.next();
        let service = found.ok_or_else(|| anyhow!("the mesh has no service {name}"))?;
        let vip = service
            .vips
            .first()
            .ok_or_else(|| anyhow!("service {} has no address of its own", service.hostname))?;
        Ok(SocketAddr::new(vip.ip, port))
    }

    /// Hostname of the service that has this address.
    pub fn service_at(&self, ip: IpAddr) -> Option<String> {
        let service = self.0.service_by_vip(ip)?;
        Some(service.hostname.to_string())
    }

    /// The pod `NAMESPACE/NAME`.
    pub fn pod(&self, name: &str) -> Option<Arc<Workload>> {
        self.0
            .workloads()
            .find(|workload| workload.display_name() == name || *workload.name == *name)
            .cloned()
    }

    /// What the proxy of `source` does with a connection to `to`. Of several endpoints, `wanted` counts if it is one.
    pub(super) fn outbound(
        &self,
        source: SocketAddr,
        to: SocketAddr,
        wanted: Option<SocketAddr>,
    ) -> Outbound {
        let Some(client) = self.0.workload_by_ip(source.ip()) else {
            return Outbound {
                decision: Decision::new(
                    Way::Refused,
                    format!("refused: {} is no pod that the proxy knows", source.ip()),
                ),
                next: None,
            };
        };
        let identity = client.identity().ok().map(|identity| identity.to_string());
        let mut outbound = match self.0.service_by_vip(to.ip()) {
            Some(service) if !service.is_passthrough() => {
                self.service(&client, &service, to, wanted)
            }
            _ => match self.0.workload_by_ip(to.ip()) {
                Some(workload) => Self::workload(&workload, to, true),
                None => Outbound {
                    decision: Decision::new(
                        Way::Plain,
                        format!(
                            "{} is not in the mesh: plain TCP to where it was meant",
                            to.ip()
                        ),
                    ),
                    next: Some((to, to)),
                },
            },
        };
        outbound.decision.source_identity = identity;
        outbound
    }

    fn service(
        &self,
        client: &Workload,
        service: &Arc<Service>,
        to: SocketAddr,
        wanted: Option<SocketAddr>,
    ) -> Outbound {
        let name = &service.hostname;
        let mut choices: BTreeMap<SocketAddr, Arc<Workload>> = BTreeMap::new();
        let mut rng = rand::rng();
        for _ in 0..DRAWS {
            let drawn = self
                .0
                .choose_endpoint(service, client, Wanted::Port(to.port()), &mut rng);
            if let Some((workload, port)) = drawn
                && let Some(ip) = like(&workload.addresses, to.ip())
            {
                choices.insert(SocketAddr::new(ip, port), workload);
            }
        }
        let among: Vec<SocketAddr> = choices.keys().copied().collect();
        let chosen = wanted.filter(|wanted| choices.contains_key(wanted));
        let Some((address, workload)) = chosen
            .or(among.first().copied())
            .and_then(|it| Some((it, choices.get(&it)?)))
        else {
            return Outbound {
                decision: Decision::new(
                    Way::Refused,
                    format!(
                        "refused: service {name} has no healthy endpoint for port {}",
                        to.port()
                    ),
                ),
                next: None,
            };
        };
        if service.waypoint.is_some() {
            return Outbound::by_waypoint(format!("service {name}"));
        }
        let mut outbound = Self::workload(workload, address, false);
        let of = if among.len() > 1 {
            let all: Vec<String> = among.iter().map(ToString::to_string).collect();
            format!(" (any of {}; this one is shown)", all.join(", "))
        } else {
            String::new()
        };
        outbound.decision.text = format!("service {name}{of}: {}", outbound.decision.text);
        outbound.decision.among = among;
        outbound
    }

    /// To an address of a workload; `named`: the client named it itself, and no service of it.
    fn workload(workload: &Workload, target: SocketAddr, named: bool) -> Outbound {
        let name = workload.display_name();
        if workload.waypoint.is_some() && named {
            return Outbound::by_waypoint(format!("pod {name}"));
        }
        if workload.protocol == Protocol::Tcp {
            let text = format!("{name} takes no tunnel: plain TCP to {target}");
            return Outbound {
                decision: Decision::new(Way::Plain, text),
                next: Some((target, target)),
            };
        }
        let dialled = SocketAddr::new(target.ip(), HBONE_PORT);
        let text = format!("HBONE to {name} at {dialled}, CONNECT {target}");
        let mut decision = Decision::new(Way::Hbone, text);
        decision.destination_identity = workload.identity().ok().map(|it| it.to_string());
        Outbound {
            decision,
            next: Some((dialled, target)),
        }
    }

    /// What the proxy of the destination does with a connection of `client`, which proves who it is in a tunnel only.
    pub(super) fn inbound(&self, client: SocketAddr, target: SocketAddr, tunnel: bool) -> Decision {
        let proven = self
            .0
            .workload_by_ip(client.ip())
            .filter(|_| tunnel)
            .and_then(|workload| workload.identity().ok());
        let Some(workload) = self.0.workload_by_ip(target.ip()) else {
            return Decision::new(
                Way::Unknown,
                format!("the mesh does not know {}", target.ip()),
            );
        };
        let peer = Peer {
            identity: proven.as_ref(),
            source: client.ip(),
            destination: target,
        };
        let count = self.0.policies_for(&workload).count();
        let verdict = authorize(&self.0, &workload, &peer);
        let who = match &proven {
            Some(identity) => format!("{identity} is proven"),
            None => "nobody is proven (plain TCP)".to_owned(),
        };
        let mut decision = match verdict {
            Verdict::Allow if count == 0 => Decision::new(
                Way::Plain,
                format!("{who}; no policy applies; on to {target}"),
            ),
            Verdict::Allow => Decision::new(
                Way::Plain,
                format!("{who}; {count} policies apply and allow it; on to {target}"),
            ),
            denied @ Verdict::Deny { .. } => {
                Decision::new(Way::Refused, format!("refused: {who}; {denied}"))
            }
        };
        decision.source_identity = proven.map(|identity| identity.to_string());
        decision.destination_identity = workload.identity().ok().map(|it| it.to_string());
        decision
    }
}

/// Of several addresses the first one of the same family, else the first one.
pub(super) fn like(addresses: &[IpAddr], of: IpAddr) -> Option<IpAddr> {
    let mut same = addresses.iter().filter(|ip| ip.is_ipv4() == of.is_ipv4());
    same.next().or(addresses.first()).copied()
}

impl Decision {
    pub(super) fn new(way: Way, text: String) -> Self {
        Self {
            way,
            text,
            source_identity: None,
            destination_identity: None,
            among: Vec::new(),
        }
    }
}

impl Outbound {
    fn by_waypoint(whose: String) -> Self {
        Self {
            decision: Decision::new(
                Way::Waypoint,
                format!("to the waypoint of {whose}: its way on is not followed"),
            ),
            next: None,
        }
    }
}
