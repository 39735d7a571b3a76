#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::time::Duration;

use super::*;
use crate::capture::{ClientAddr, OrigDstAddr};
use crate::state::workload::Locality;

mod access_log;
mod series;

type Labels = BTreeMap<String, String>;
type Samples = BTreeMap<(String, Labels), f64>;

/// Reads OpenMetrics text strictly enough to notice a line that a scraper would refuse.
fn parse(text: &str) -> Samples {
    let mut samples = Samples::new();
    let mut lines = text.lines();
    assert_eq!(lines.next_back(), Some("# EOF"));
    for line in lines {
        if let Some(comment) = line.strip_prefix("# ") {
            let keyword = comment.split(' ').next().unwrap();
            assert!(["HELP", "TYPE", "UNIT"].contains(&keyword), "{line}");
            continue;
        }
        let (metric, value) = line.rsplit_once(' ').expect(line);
        let (name, mut rest) = match metric.split_once('{') {
            Some((name, labels)) => (name, labels.strip_suffix('}').expect(line)),
            None => (metric, ""),
        };
        let mut labels = Labels::new();
        while !rest.is_empty() {
            let (key, tail) = rest.split_once("=\"").expect(line);
            let (value, tail) = unquote(tail);
            assert!(
                labels.insert(key.into(), value).is_none(),
                "twice {key}: {line}"
            );
            rest = tail.strip_prefix(',').unwrap_or(tail);
        }
        let known = samples.insert((name.into(), labels), value.parse().expect(line));
        assert!(known.is_none(), "twice: {line}");
    }
    samples
}

/// A label value up to its closing quote, unescaped, and what follows.
fn unquote(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return (value, &text[at + 1..]),
            '\\' => match characters.next().unwrap().1 {
                'n' => value.push('\n'),
                other => value.push(other),
            },
            other => value.push(other),
        }
    }
    panic!("no end of label value: {text}");
}

fn telemetry() -> Telemetry {
    Telemetry::new(TelemetryOptions {
        component: "ambidex".into(),
        tag: "1.2.3".into(),
        ..TelemetryOptions::default()
    })
}

fn identity(namespace: &str, service_account: &str) -> Identity {
    format!("spiffe://cluster.local/ns/{namespace}/sa/{service_account}")
        .parse()
        .unwrap()
}

fn workload(namespace: &str, workload_name: &str, pod: &str, revision: &str) -> Arc<Workload> {
    Arc::new(Workload {
        name: pod.into(),
        namespace: namespace.into(),
        workload_name: workload_name.into(),
        canonical_name: workload_name.into(),
        canonical_revision: revision.into(),
        cluster_id: "Kubernetes".into(),
        locality: Locality {
            region: "r1".into(),
            zone: format!("{namespace}-zone").into(),
            ..Locality::default()
        },
        ..Workload::default()
    })
}

fn service() -> Arc<Service> {
    let service = serde_json::json!({
        "name": "web",
        "namespace": "shop",
        "hostname": "web.shop.svc.cluster.local",
        "vips": [],
        "ports": {},
    });
    Arc::new(serde_json::from_value(service).unwrap())
}

fn opening(direction: Direction) -> Opening {
    Opening {
        direction,
        capture_mode: "inpod",
        source: Endpoint {
            addr: "10.244.1.4:43210".parse().unwrap(),
            workload: Some(workload("default", "curl", "curl-7656-abc", "v1")),
            identity: Some(identity("default", "curl")),
        },
        destination: Endpoint {
            addr: "10.244.2.7:15008".parse().unwrap(),
            workload: Some(workload("shop", "web", "web-5d9-xyz", "")),
            identity: Some(identity("shop", "web")),
        },
        destination_service: Some(service()),
        hbone_addr: Some("10.244.2.7:8080".parse().unwrap()),
        mutual_tls: true,
    }
}

/// The labels of [`opening`], reported by the source.
fn labels(flag: &str) -> Labels {
    [
        ("reporter", "source"),
        ("source_workload", "curl"),
        ("source_canonical_service", "curl"),
        ("source_canonical_revision", "v1"),
        ("source_workload_namespace", "default"),
        (
            "source_principal",
            "spiffe://cluster.local/ns/default/sa/curl",
        ),
        ("source_app", "curl"),
        ("source_version", "v1"),
        ("source_cluster", "Kubernetes"),
        ("destination_service", "web.shop.svc.cluster.local"),
        ("destination_service_namespace", "shop"),
        ("destination_service_name", "web"),
        ("destination_workload", "web"),
        ("destination_canonical_service", "web"),
        ("destination_canonical_revision", "unknown"),
        ("destination_workload_namespace", "shop"),
        (
            "destination_principal",
            "spiffe://cluster.local/ns/shop/sa/web",
        ),
        ("destination_app", "web"),
        ("destination_version", "unknown"),
        ("destination_cluster", "Kubernetes"),
        ("request_protocol", "tcp"),
        ("response_flags", flag),
        ("connection_security_policy", "mutual_tls"),
        ("source_region", "r1"),
        ("source_zone", "default-zone"),
        ("destination_region", "r1"),
        ("destination_zone", "shop-zone"),
        ("capture_mode", "inpod"),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into()
}

/// Samples of the connection metrics only.
fn tcp(telemetry: &Telemetry) -> Samples {
    let mut samples = parse(&telemetry.encode().unwrap());
    samples.retain(|(name, _), _| name.starts_with("istio_tcp_"));
    samples
}

fn expect(values: &[(&str, Labels, f64)]) -> Samples {
    values
        .iter()
        .map(|(name, labels, value)| ((format!("istio_tcp_{name}"), labels.clone()), *value))
        .collect()
}

fn open_gauge(reporter: &str, mode: &str) -> Labels {
    [("reporter", reporter), ("capture_mode", mode)]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
}

#[test]
fn a_connection_is_counted_with_every_label_while_it_lives_and_when_it_ends() {
    let telemetry = telemetry();
    let record = telemetry.open(opening(Direction::Outbound));
    record.sent(1_000);
    record.received(20);
    let living = |sent, received| {
        expect(&[
            ("connections_opened_total", labels("-"), 1.0),
            ("connections_closed_total", labels("-"), 0.0),
            ("sent_bytes_total", labels("-"), sent),
            ("received_bytes_total", labels("-"), received),
            ("sockets_open", open_gauge("source", "inpod"), 1.0),
        ])
    };
    assert_eq!(tcp(&telemetry), living(1_000.0, 20.0));
    record.sent(5);
    assert_eq!(tcp(&telemetry), living(1_005.0, 20.0));
    record.received(1);
    record.finish(Ok(()));
    let ended = expect(&[
        ("connections_opened_total", labels("-"), 1.0),
        ("connections_closed_total", labels("-"), 1.0),
        ("sent_bytes_total", labels("-"), 1_005.0),
        ("received_bytes_total", labels("-"), 21.0),
        ("sockets_open", open_gauge("source", "inpod"), 0.0),
    ]);
    assert_eq!(tcp(&telemetry), ended);
    assert_eq!(tcp(&telemetry), ended, "a scrape counts nothing twice");
}

#[test]
fn a_failure_is_closed_and_failed_under_its_flag() {
    let telemetry = telemetry();
    let record = telemetry.open(opening(Direction::Outbound));
    record.finish(Err(ConnectionError::new(
        ResponseFlag::Connect,
        "connection refused",
    )));
    let expected = expect(&[
        ("connections_opened_total", labels("-"), 1.0),
        ("connections_closed_total", labels("-"), 0.0),
        ("connections_closed_total", labels("CONNECT"), 1.0),
        ("connections_failed_total", labels("CONNECT"), 1.0),
        ("sent_bytes_total", labels("-"), 0.0),
        ("received_bytes_total", labels("-"), 0.0),
        ("sockets_open", open_gauge("source", "inpod"), 0.0),
    ]);
    assert_eq!(
        tcp(&telemetry),
        expected,
        "no series of what never happened under a flag"
    );
}

#[test]
fn a_workload_that_nothing_controls_goes_by_its_own_name() {
    let telemetry = telemetry();
    let bare = workload("default", "", "one-pod", "v1");
    let source = Endpoint {
        workload: Some(bare),
        ..opening(Direction::Outbound).source
    };
    let opening = Opening {
        source,
        ..opening(Direction::Outbound)
    };
    telemetry.open(opening).finish(Ok(()));
    let samples = tcp(&telemetry);
    let ((_, labels), _) = samples
        .iter()
        .find(|((name, _), _)| name == "istio_tcp_connections_opened_total")
        .unwrap();
    assert_eq!(labels["source_workload"], "one-pod");
    assert_eq!(labels["source_canonical_service"], "unknown");
}

#[test]
fn a_destination_found_later_labels_everything() {
    let telemetry = telemetry();
    let known = opening(Direction::Outbound);
    let record = telemetry.open(Opening {
        destination: Endpoint::unknown("10.96.0.1:80".parse().unwrap()),
        destination_service: None,
        hbone_addr: None,
        mutual_tls: false,
        ..known.clone()
    });
    record.sent(7);
    record.set_destination(
        known.destination,
        known.destination_service,
        known.hbone_addr,
        true,
    );
    record.finish(Ok(()));
    let expected = expect(&[
        ("connections_opened_total", labels("-"), 1.0),
        ("connections_closed_total", labels("-"), 1.0),
        ("sent_bytes_total", labels("-"), 7.0),
        ("received_bytes_total", labels("-"), 0.0),
        ("sockets_open", open_gauge("source", "inpod"), 0.0),
    ]);
    assert_eq!(tcp(&telemetry), expected);
}

#[test]
fn hostile_names_stay_inside_their_label() {
    let telemetry = telemetry();
    let name = "a\"b\\c\n# EOF";
    telemetry
        .open(Opening {
            source: Endpoint {
                workload: Some(workload("default", name, "pod", "v1")),
                ..opening(Direction::Outbound).source
            },
            ..opening(Direction::Outbound)
        })
        .finish(Ok(()));
    let samples = tcp(&telemetry);
    assert!(
        samples
            .keys()
            .any(|(_, labels)| labels.get("source_workload").is_some_and(|v| v == name))
    );
}

#[test]
fn process_build_and_pod_metrics_are_exposed() {
    let telemetry = telemetry();
    let pods = telemetry.workload_manager();
    pods.proxy_started();
    pods.proxy_started();
    pods.proxy_stopped();
    pods.set_pending(3);
    let samples = parse(&telemetry.encode().unwrap());
    let plain = |name: &str| samples[&(name.to_owned(), Labels::new())];
    assert_eq!(plain("workload_manager_active_proxy_count"), 1.0);
    assert_eq!(plain("workload_manager_pending_proxy_count"), 3.0);
    assert_eq!(plain("workload_manager_proxies_started_total"), 2.0);
    assert_eq!(plain("workload_manager_proxies_stopped_total"), 1.0);
    assert!(plain("process_open_fds") >= 3.0);
    assert!(plain("process_max_fds") >= plain("process_open_fds"));
    let build = [("component", "ambidex"), ("tag", "1.2.3")]
        .map(|(key, value)| (key.to_owned(), value.to_owned()));
    assert_eq!(samples[&("istio_build".to_owned(), build.into())], 1.0);
}

#[test]
fn live_connections_are_listed_oldest_first_and_leave_at_the_end() {
    let telemetry = telemetry();
    let records: Vec<_> = (0..40)
        .map(|_| telemetry.open(opening(Direction::Inbound)))
        .collect();
    records[0].sent(9);
    let list = telemetry.connections();
    assert!(list.is_sorted_by_key(|connection| connection.id));
    assert_eq!((list.len(), list[0].sent), (40, 9));
    assert_eq!(list[0].source.workload.as_deref(), Some("curl-7656-abc"));
    drop(records);
    assert!(telemetry.connections().is_empty());
}

#[test]
fn bytes_from_many_threads_all_arrive() {
    let telemetry = telemetry();
    let record = telemetry.open(opening(Direction::Outbound));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..10_000).for_each(|_| record.sent(3)));
        }
        for _ in 0..50 {
            telemetry.encode().unwrap();
        }
    });
    record.finish(Ok(()));
    let sent = ("istio_tcp_sent_bytes_total".to_owned(), labels("-"));
    assert_eq!(tcp(&telemetry)[&sent], 120_000.0);
}
