//! Sections of the configuration dump, with the keys of the field's page, so that what reads that reads ours. A key that the
//! field does not have is an addition beside its own.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::SystemTime;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use serde_json::{Map, Value, json};
use shared_proxy::capture::LocalWorkload;
use shared_proxy::identity::{CertificateFacts, CertificateInfo, CertificateState};
use shared_proxy::state::{NamespacedHostname, Service, Snapshot, Workload};
use shared_proxy::telemetry::{ConnectionInfo, Direction};

use crate::calendar;

/// Width of the lines of a PEM text (RFC 7468, 2).
const PEM_LINE: usize = 64;

/// A list as JSON. What cannot be written is shown as the reason.
pub(super) fn list<'a, T: Serialize + 'a>(items: impl Iterator<Item = &'a T>) -> Value {
    items.map(written).collect()
}

fn written(item: &impl Serialize) -> Value {
    serde_json::to_value(item).unwrap_or_else(|error| Value::String(error.to_string()))
}

/// Services with their endpoints.
pub(super) fn services(snapshot: &Snapshot) -> Value {
    let service = |service: &Service| {
        let mut shown = written(service);
        let key = service.key();
        let endpoints = snapshot.endpoints(service).iter();
        let endpoints: Map<_, _> = endpoints
            .map(|workload| (workload.uid.to_string(), endpoint(workload, &key)))
            .collect();
        if let Some(shown) = shown.as_object_mut() {
            shown.insert("endpoints".into(), endpoints.into());
        }
        shown
    };
    snapshot.services().map(|it| service(it)).collect()
}

fn endpoint(workload: &Workload, service: &NamespacedHostname) -> Value {
    json!({
        "workloadUid": &*workload.uid,
        "service": service.to_string(),
        "port": workload.services.get(service),
        "status": workload.status,
    })
}

/// Services that workloads are endpoints of and that are not known themselves, with those endpoints.
pub(super) fn staged_services(snapshot: &Snapshot) -> Value {
    let mut staged: BTreeMap<String, Map<String, Value>> = BTreeMap::new();
    for workload in snapshot.workloads() {
        for key in workload.services.keys() {
            if snapshot.service(key).is_none() {
                let endpoints = staged.entry(key.to_string()).or_default();
                endpoints.insert(workload.uid.to_string(), endpoint(workload, key));
            }
        }
    }
    written(&staged)
}

/// A certificate with its chain and its roots. Times in the certificate's own part are seconds since 1970.
pub(super) fn certificate(info: &CertificateInfo) -> Value {
    let (state, error) = match &info.state {
        CertificateState::Initializing => ("Initializing".to_owned(), None),
        CertificateState::Available => ("Available".to_owned(), None),
        CertificateState::NotRenewed(error) => ("Available".to_owned(), Some(error.to_string())),
        CertificateState::Unavailable(error) => {
            (format!("Unavailable: {error}"), Some(error.to_string()))
        }
    };
    json!({
        "identity": info.identity.to_string(),
        "state": state,
        "certChain": info.chain.iter().map(|der| in_chain(der)).collect::<Value>(),
        "rootCerts": info.roots.iter().map(|der| in_chain(der)).collect::<Value>(),
        "error": error,
        "serialNumber": info.serial,
        "validFrom": info.not_before.map(seconds),
        "expirationTime": info.not_after.map(seconds),
    })
}

/// One certificate of a chain: its PEM text in Base64, as the field writes it.
fn in_chain(der: &[u8]) -> Value {
    let facts = CertificateFacts::of(der);
    let date = |time: fn(&CertificateFacts) -> SystemTime| {
        facts
            .as_ref()
            .map(|facts| calendar::date(seconds(time(facts))))
    };
    json!({
        "pem": STANDARD.encode(pem(der)),
        "serialNumber": facts.as_ref().map(|facts| facts.serial.as_str()),
        "validFrom": date(|facts| facts.not_before),
        "expirationTime": date(|facts| facts.not_after),
    })
}

fn pem(der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(PEM_LINE));
        pem.push_str(line);
        pem.push('\n');
        rest = after;
    }
    pem + "-----END CERTIFICATE-----\n"
}

fn seconds(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// A pod that is served, with its open connections.
pub(super) fn workload_state(
    workload: &LocalWorkload,
    trust_domain: &str,
    capture_mode: &str,
    open: &[ConnectionInfo],
) -> Value {
    let of_pod = |address: SocketAddr| workload.addresses.contains(&address.ip());
    let shown = |direction: Direction| -> Value {
        let ones = open.iter().filter(|it| {
            it.direction == direction
                && of_pod(match direction {
                    Direction::Inbound => it.destination.addr,
                    Direction::Outbound => it.source.addr,
                })
        });
        ones.map(connection).collect()
    };
    json!({
        "state": "Up",
        "connections": {
            "inbound": shown(Direction::Inbound),
            "outbound": shown(Direction::Outbound),
        },
        "captureMode": capture_mode,
        "info": {
            "name": &*workload.name,
            "namespace": &*workload.namespace,
            "trustDomain": trust_domain,
            "serviceAccount": &*workload.service_account,
        },
    })
}

fn connection(info: &ConnectionInfo) -> Value {
    let actual = info
        .application
        .map_or(info.destination.addr, |leg| leg.peer);
    json!({
        "src": info.source.addr,
        "originalDst": info.hbone_addr.clone().unwrap_or_else(|| info.destination.addr.to_string()),
        "actualDst": actual,
        "protocol": if info.hbone_addr.is_some() { "HBONE" } else { "TCP" },
    })
}
