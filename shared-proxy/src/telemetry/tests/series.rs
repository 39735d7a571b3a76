//! How many series there are, and the histograms.

use super::*;

/// A connection of its own label set.
fn numbered(number: usize) -> Opening {
    let name = format!("job-{number}");
    Opening {
        source: Endpoint {
            workload: Some(workload("default", &name, "pod", "v1")),
            ..opening(Direction::Outbound).source
        },
        ..opening(Direction::Outbound)
    }
}

fn opened_series(telemetry: &Telemetry) -> Vec<String> {
    let samples = tcp(telemetry).into_keys();
    let mut names: Vec<_> = samples
        .filter(|(name, _)| name == "istio_tcp_connections_opened_total")
        .map(|(_, labels)| labels["source_workload"].clone())
        .collect();
    names.sort();
    names
}

#[test]
fn series_expire_when_nothing_used_them_for_long_and_never_under_an_open_connection() {
    let telemetry = limited(Duration::from_millis(40), 1000);
    let living = telemetry.open(numbered(1));
    telemetry.open(numbered(2)).finish(Ok(()));
    assert_eq!(opened_series(&telemetry), ["job-1", "job-2"]);
    std::thread::sleep(Duration::from_millis(80));
    assert_eq!(opened_series(&telemetry), ["job-1"]);
    telemetry.open(numbered(2)).finish(Ok(()));
    assert_eq!(opened_series(&telemetry), ["job-1", "job-2"]);
    living.sent(3);
    living.finish(Ok(()));
    let samples = parse(&telemetry.encode().unwrap());
    let expired = samples[&("ambidex_metric_series_expired_total".into(), Labels::new())];
    assert_eq!(expired, 1.0);
}

#[test]
fn the_number_of_series_is_bounded_and_the_least_used_go_first() {
    const LIMIT: usize = 64;
    let telemetry = limited(Duration::from_secs(3600), LIMIT);
    let living: Vec<_> = (0..8).map(|n| telemetry.open(numbered(n))).collect();
    for number in 8..1000 {
        telemetry.open(numbered(number)).finish(Ok(()));
    }
    let names = opened_series(&telemetry);
    assert!(names.len() <= LIMIT, "{}", names.len());
    for number in (0..8).chain([999]) {
        assert!(names.contains(&format!("job-{number}")), "{number}");
    }
    drop(living);
    // More open connections than series may be: all are counted, and go later.
    let many: Vec<_> = (0..200).map(|n| telemetry.open(numbered(n))).collect();
    assert!(opened_series(&telemetry).len() >= 200);
    drop(many);
    for number in 1000..1200 {
        telemetry.open(numbered(number)).finish(Ok(()));
    }
    assert!(opened_series(&telemetry).len() <= 200 + LIMIT);
}

fn limited(idle: Duration, count: usize) -> Telemetry {
    Telemetry::new(TelemetryOptions {
        series: SeriesLimits { idle, count },
        ..TelemetryOptions::default()
    })
}

#[test]
fn steps_are_histograms_by_capture() {
    let telemetry = telemetry();
    let record = telemetry.open(opening(Direction::Outbound));
    record.received(0);
    record.received(1);
    record.received(1);
    let times = [
        (Step::Tunnel, 40),
        (Step::Total, 300),
        (Step::TlsHandshake, 11_000_000),
    ];
    for (step, micros) in times {
        telemetry.took(
            step,
            "node",
            Direction::Inbound,
            Duration::from_micros(micros),
        );
    }
    let samples = parse(&telemetry.encode().unwrap());
    let value = |name: &str, labels: &[(&str, &str)]| {
        let labels = labels
            .iter()
            .map(|(k, v)| (k.to_string(), v.to_string()))
            .collect();
        samples[&(name.to_owned(), labels)]
    };
    let node = [("capture_mode", "node"), ("reporter", "destination")];
    let with = |more: &[(&'static str, &'static str)]| [&node[..], more].concat();
    let added = "ambidex_added_latency_seconds";
    let bucket = format!("{added}_bucket");
    assert_eq!(
        value(&bucket, &with(&[("stage", "tunnel"), ("le", "0.0001")])),
        1.0
    );
    assert_eq!(
        value(&bucket, &with(&[("stage", "total"), ("le", "0.00025")])),
        0.0
    );
    assert_eq!(
        value(&bucket, &with(&[("stage", "total"), ("le", "0.0005")])),
        1.0
    );
    let sum = value(&format!("{added}_sum"), &with(&[("stage", "total")]));
    assert!((sum - 0.0003).abs() < 1e-9);
    let handshake = "ambidex_tls_handshake_duration_seconds";
    assert_eq!(
        value(&format!("{handshake}_bucket"), &with(&[("le", "10.0")])),
        0.0
    );
    assert_eq!(
        value(&format!("{handshake}_bucket"), &with(&[("le", "+Inf")])),
        1.0
    );
    let first = "ambidex_first_byte_duration_seconds_count";
    let inpod = [("capture_mode", "inpod"), ("reporter", "source")];
    assert_eq!(value(first, &inpod), 1.0);
}
