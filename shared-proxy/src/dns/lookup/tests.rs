#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use crate::state::{Store, local_xds};

const MESH: &str = r#"
services:
- {name: web, namespace: alpha, hostname: web.alpha.svc.cluster.local, vips: ["/10.96.0.1", "/fd00::1", "east/10.97.0.1"], ports: {80: 80}}
- {name: web, namespace: beta, hostname: web.beta.svc.cluster.local, vips: ["/10.96.0.2"], ports: {80: 80}, ipFamilies: IPv4}
- {name: headless, namespace: alpha, hostname: headless.alpha.svc.cluster.local, vips: [], ports: {80: 80}}
- {name: all, namespace: alpha, hostname: all.alpha.svc.cluster.local, vips: [], ports: {80: 80},
   loadBalancer: {routingPreferences: [], mode: Standard, healthPolicy: AllowAll}}
- {name: away, namespace: alpha, hostname: away.alpha.svc.cluster.local, vips: ["east/10.97.0.9"], ports: {80: 80}}
- {name: api, namespace: beta, hostname: API.example.com, vips: ["/10.98.0.2"], ports: {443: 443}}
- {name: api, namespace: gamma, hostname: api.example.com, vips: ["/10.98.0.3"], ports: {443: 443}, canonical: true}
- {name: wild, namespace: alpha, hostname: "*.example.com", vips: ["/10.98.0.9"], ports: {443: 443}}
workloads:
- {name: one, namespace: alpha, workloadIps: ["10.244.1.1", "fd00:1::1"], services: {alpha/headless.alpha.svc.cluster.local: {80: 80}, alpha/all.alpha.svc.cluster.local: {80: 80}}}
- {name: two, namespace: alpha, workloadIps: ["10.244.1.2"], services: {alpha/headless.alpha.svc.cluster.local: {80: 80}}}
- {name: sick, namespace: alpha, workloadIps: ["10.244.1.3"], status: Unhealthy, services: {alpha/headless.alpha.svc.cluster.local: {80: 80}, alpha/all.alpha.svc.cluster.local: {80: 80}}}
- {name: far, namespace: alpha, network: east, workloadIps: ["10.244.1.4"], services: {alpha/headless.alpha.svc.cluster.local: {80: 80}}}
- {name: vm, namespace: alpha, hostname: vm.example.org, workloadIps: ["192.0.2.7"], services: {}}
- {name: elsewhere, namespace: alpha, hostname: elsewhere.example.org, workloadIps: [], services: {}}
"#;

/// The answer to A, AAAA, and the alias.
fn ask(asked: &str, namespace: &str, config: &DnsConfig) -> Option<(Vec<String>, Option<String>)> {
    let store = Store::in_network("");
    store.replace(local_xds::parse(MESH).unwrap());
    let snapshot = store.load();
    let client = Client {
        namespace,
        network: "",
    };
    let known = find(&snapshot, config, client, asked)?;
    let mut all: Vec<_> = [AddressFamily::V4, AddressFamily::V6]
        .into_iter()
        .flat_map(|family| known.addresses(&snapshot, config, client, family))
        .map(|ip| ip.to_string())
        .collect();
    all.sort();
    Some((all, known.alias_of))
}

#[rstest::rstest]
#[case::short_name("web", "alpha", &["10.96.0.1", "fd00::1"], None)]
#[case::short_name_elsewhere("web", "beta", &["10.96.0.2"], None)]
#[case::with_namespace("web.beta", "alpha", &["10.96.0.2"], None)]
#[case::full_name("web.beta.svc.cluster.local", "alpha", &["10.96.0.2"], None)]
#[case::own_search_domain("web.beta.alpha.svc.cluster.local", "alpha", &["10.96.0.2"], Some("web.beta"))]
#[case::second_search_domain("web.alpha.svc.svc.cluster.local", "beta", &["10.96.0.1", "fd00::1"], Some("web.alpha.svc"))]
#[case::headless("headless.alpha", "beta", &["10.244.1.1", "10.244.1.2", "fd00:1::1"], None)]
#[case::headless_with_the_unhealthy("all.alpha", "beta", &["10.244.1.1", "10.244.1.3", "fd00:1::1"], None)]
#[case::in_another_network("away", "alpha", &[], None)]
#[case::external_in_own_namespace("api.example.com", "beta", &["10.98.0.2"], None)]
#[case::external_canonical("api.example.com", "alpha", &["10.98.0.3"], None)]
#[case::external_behind_a_search_domain("api.example.com.alpha.svc.cluster.local", "alpha", &["10.98.0.3"], Some("api.example.com"))]
#[case::wildcard("other.example.com", "beta", &["10.98.0.9"], None)]
#[case::wildcard_of_deeper_names("a.b.example.com", "beta", &["10.98.0.9"], None)]
#[case::hostname_of_a_workload("vm.example.org", "beta", &["192.0.2.7"], None)]
fn found(
    #[case] asked: &str,
    #[case] namespace: &str,
    #[case] addresses: &[&str],
    #[case] alias_of: Option<&str>,
) {
    let want = (
        addresses.iter().map(ToString::to_string).collect(),
        alias_of.map(str::to_owned),
    );
    assert_eq!(ask(asked, namespace, &DnsConfig::default()), Some(want));
}

#[rstest::rstest]
#[case::in_another_namespace("headless", "beta")]
#[case::wildcard_does_not_cover_its_own_domain("example.com", "alpha")]
#[case::unknown("www.example.net", "alpha")]
#[case::hostname_without_an_address("elsewhere.example.org", "alpha")]
fn not_found(#[case] asked: &str, #[case] namespace: &str) {
    assert_eq!(ask(asked, namespace, &DnsConfig::default()), None);
}

#[test]
fn preferred_namespace_comes_after_the_clients_own() {
    let config = DnsConfig {
        preferred_namespace: Some("beta".into()),
        ..DnsConfig::default()
    };
    let addresses = |namespace| ask("api.example.com", namespace, &config).unwrap().0;
    assert_eq!(addresses("alpha"), ["10.98.0.2"]);
    assert_eq!(addresses("gamma"), ["10.98.0.3"]);
}

#[test]
fn other_domain_and_no_ipv6() {
    let config = DnsConfig {
        domain: "example.test".into(),
        ipv6: false,
        ..DnsConfig::default()
    };
    assert_eq!(ask("web.beta", "alpha", &config), None);
    let found = ask("web.alpha.svc.cluster.local", "alpha", &config);
    assert_eq!(found.unwrap().0, ["10.96.0.1"]);
}
