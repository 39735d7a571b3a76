//! The capture of IPv6: that of IPv4 once more, with other addresses.

use ipnet::Ipv6Net;

use super::*;

/// What IPv4 says, and what IPv6 does. `::1` is all there is of loopback.
const WORDS: [(&str, &str); 4] = [
    ("--on-ip 0.0.0.0", "--on-ip ::"),
    ("127.0.0.0/8", "::1/128"),
    ("127.0.0.1", "::1"),
    ("::1/32", "::1/128"),
];

/// The steps that capture IPv6 as these capture IPv4, in the same order. What is of IPv6 already has no twin.
pub(super) fn twins(steps: &[Step]) -> Vec<Step> {
    steps.iter().filter_map(twin).collect()
}

fn twin(step: &Step) -> Option<Step> {
    match step {
        Step::Chain(chain) if chain.family == Family::V4 => Some(Step::Chain(Chain {
            family: Family::V6,
            rules: chain.rules.iter().map(|rule| translated(rule)).collect(),
            ..chain.clone()
        })),
        Step::Rule(rule) if rule.family == Family::V4 => Some(Step::Rule(Rule {
            family: Family::V6,
            ..rule.clone()
        })),
        Step::Route(route) if route.dst.addr().is_ipv4() => Some(Step::Route(Route {
            dst: Ipv6Net::default().into(),
            ..route.clone()
        })),
        _ => None,
    }
}

/// A rule of ip6tables from one of iptables.
pub(super) fn translated(rule: &str) -> String {
    let probes = rule
        .replace(
            &format!("{PROBE_ADDRESS}/32"),
            &format!("{PROBE_ADDRESS6}/128"),
        )
        .replace(&PROBE_ADDRESS.to_string(), &PROBE_ADDRESS6.to_string())
        .replace(PROBES_SET, PROBES_SET6);
    WORDS
        .iter()
        .fold(probes, |rule, (v4, v6)| rule.replace(v4, v6))
}
