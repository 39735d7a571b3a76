//! Tables of what a proxy knows of the mesh, from the JSON of its configuration dump.

use std::collections::BTreeMap;
use std::time::SystemTime;

use comfy_table::Table;
use serde_json::Value;

use crate::calendar::date;
use crate::cli::output::plain_table;

/// A text of an object, `-` where it is absent or empty.
fn text(of: &Value, pointer: &str) -> String {
    match of.pointer(pointer) {
        Some(Value::String(text)) if !text.is_empty() => text.clone(),
        Some(Value::Number(number)) => number.to_string(),
        Some(Value::Bool(truth)) => truth.to_string(),
        _ => "-".to_owned(),
    }
}

/// The texts of a list, with commas.
fn texts(of: &Value, pointer: &str) -> String {
    let list = of.pointer(pointer).and_then(Value::as_array);
    let texts: Vec<&str> = list
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    if texts.is_empty() {
        "-".to_owned()
    } else {
        texts.join(",")
    }
}

/// Virtual addresses, `network/address`; the network without a name is not written.
fn addresses(of: &Value, pointer: &str) -> String {
    let all = texts(of, pointer);
    let all: Vec<&str> = all
        .split(',')
        .map(|one| one.trim_start_matches('/'))
        .collect();
    all.join(",")
}

/// A gateway: the name or the address that it is known by.
fn gateway(of: &Value, pointer: &str) -> String {
    let Some(gateway) = of.pointer(pointer).filter(|gateway| !gateway.is_null()) else {
        return "-".to_owned();
    };
    match gateway.pointer("/destination") {
        Some(Value::String(destination)) => destination.clone(),
        Some(destination) => match destination.get("hostname") {
            Some(_) => text(destination, "/hostname"),
            None => destination.to_string(),
        },
        None => gateway.to_string(),
    }
}

/// The items in the order of namespace and name.
fn sorted(items: &[Value]) -> Vec<&Value> {
    let mut sorted: Vec<&Value> = items.iter().collect();
    sorted.sort_by_key(|item| (text(item, "/namespace"), text(item, "/name")));
    sorted
}

pub(super) fn workloads(workloads: &[Value], wide: bool) -> Table {
    let mut header = vec!["NAMESPACE", "NAME", "IP", "NODE", "WAYPOINT", "PROTOCOL"];
    if wide {
        header.extend(["SERVICE ACCOUNT", "WORKLOAD", "STATUS", "NETWORK", "UID"]);
    }
    let mut table = plain_table(&header);
    for workload in sorted(workloads) {
        let addresses = match texts(workload, "/workloadIps") {
            none if none == "-" => text(workload, "/hostname"),
            addresses => addresses,
        };
        let mut row = vec![
            text(workload, "/namespace"),
            text(workload, "/name"),
            addresses,
            text(workload, "/node"),
            gateway(workload, "/waypoint"),
            text(workload, "/protocol"),
        ];
        if wide {
            row.extend(
                [
                    "/serviceAccount",
                    "/workloadName",
                    "/status",
                    "/network",
                    "/uid",
                ]
                .map(|pointer| text(workload, pointer)),
            );
        }
        table.add_row(row);
    }
    table
}

pub(super) fn services(services: &[Value], workloads: &[Value], wide: bool) -> Table {
    let mut header = vec!["NAMESPACE", "NAME", "VIP", "WAYPOINT", "ENDPOINTS"];
    if wide {
        header.extend(["HOSTNAME", "PORTS", "LOAD BALANCING"]);
    }
    let mut table = plain_table(&header);
    let endpoints = endpoints(workloads);
    for service in sorted(services) {
        let key = format!(
            "{}/{}",
            text(service, "/namespace"),
            text(service, "/hostname")
        );
        let (healthy, all) = endpoints.get(&key).copied().unwrap_or_default();
        let mut row = vec![
            text(service, "/namespace"),
            text(service, "/name"),
            addresses(service, "/vips"),
            gateway(service, "/waypoint"),
            format!("{healthy}/{all}"),
        ];
        if wide {
            let ports = service.get("ports").and_then(Value::as_object);
            let ports: Vec<String> = ports
                .into_iter()
                .flatten()
                .map(|(port, target)| match target.as_u64() {
                    Some(target) => format!("{port}>{target}"),
                    None => port.clone(),
                })
                .collect();
            row.extend([
                text(service, "/hostname"),
                ports.join(","),
                text(service, "/loadBalancer/mode"),
            ]);
        }
        table.add_row(row);
    }
    table
}

/// Healthy endpoints and all endpoints of each service, by `namespace/hostname`.
fn endpoints(workloads: &[Value]) -> BTreeMap<String, (usize, usize)> {
    let mut endpoints: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for workload in workloads {
        let healthy = text(workload, "/status") != "Unhealthy";
        let services = workload.get("services").and_then(Value::as_object);
        for service in services.into_iter().flatten().map(|(service, _)| service) {
            let (of_it, all) = endpoints.entry(service.clone()).or_default();
            *of_it += usize::from(healthy);
            *all += 1;
        }
    }
    endpoints
}

pub(super) fn policies(policies: &[Value], wide: bool) -> Table {
    let mut header = vec!["NAMESPACE", "NAME", "ACTION", "SCOPE"];
    if wide {
        header.extend(["RULES", "DRY RUN"]);
    }
    let mut table = plain_table(&header);
    for policy in sorted(policies) {
        let mut row = ["/namespace", "/name", "/action", "/scope"]
            .map(|it| text(policy, it))
            .to_vec();
        if wide {
            let rules = policy.get("rules").and_then(Value::as_array);
            row.push(rules.map_or(0, Vec::len).to_string());
            row.push(text(policy, "/dryRun"));
        }
        table.add_row(row);
    }
    table
}

pub(super) fn certificates(certificates: &[Value], now: u64, wide: bool) -> Table {
    let mut header = vec!["IDENTITY", "STATE", "EXPIRES IN", "EXPIRES"];
    if wide {
        header.extend(["VALID FROM", "SERIAL", "ERROR"]);
    }
    let mut table = plain_table(&header);
    let mut sorted: Vec<&Value> = certificates.iter().collect();
    sorted.sort_by_key(|certificate| text(certificate, "/identity"));
    for certificate in sorted {
        let time = |pointer| certificate.pointer(pointer).and_then(Value::as_u64);
        let date = |pointer| time(pointer).map_or("-".to_owned(), date);
        let left = match time("/expirationTime") {
            Some(expires) if expires <= now => "expired".to_owned(),
            Some(expires) => duration((expires - now) * 1000),
            None => "-".to_owned(),
        };
        let mut row = vec![
            text(certificate, "/identity"),
            text(certificate, "/state"),
            left,
            date("/expirationTime"),
        ];
        if wide {
            row.push(date("/validFrom"));
            row.push(text(certificate, "/serialNumber"));
            row.push(text(certificate, "/error"));
        }
        table.add_row(row);
    }
    table
}

pub(super) fn seconds_since_1970() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |since| since.as_secs())
}

/// A duration in at most two units: `1d3h`, `4m7s`, `2.5s`, `12ms`.
pub(super) fn duration(millis: u64) -> String {
    let seconds = millis / 1000;
    match seconds {
        0 => format!("{millis}ms"),
        1..60 => format!("{}.{}s", seconds, millis % 1000 / 100),
        60..3600 => format!("{}m{}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{}h", seconds / 86_400, seconds / 3600 % 24),
    }
}
