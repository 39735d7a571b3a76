//! The capture in nftables: the field's tables (Istio since 1.28), and a table of our own with the guards.
//!
//! Nothing is shared with other programs here, so nothing depends on the place in a chain that others use. The guards'
//! table is another one than those that redirect.

use host_net::plan::{NftBase, NftChain, NftTable};
use shared_proxy::capture::{DNS_PORT, HBONE_PORT, INBOUND_PLAINTEXT_PORT, OUTBOUND_PORT};

use super::*;

/// Not the first packet of a connection.
const NOT_SYN: &str = "tcp flags & (fin|syn|rst|ack) != syn";
/// The first packet of a connection.
const IS_SYN: &str = "tcp flags & (fin|syn|rst|ack) == syn";

/// Everything, in the order of making; consecutive tables are one transaction.
pub(super) fn tables(facts: &PodFacts, phase: Phase) -> Vec<Step> {
    let active = phase == Phase::Active;
    let mut tables = Vec::new();
    if active {
        tables.push(guards(facts));
    }
    tables.push(mangle());
    if facts.dns {
        tables.push(raw());
    }
    tables.push(nat(facts, active));
    tables.into_iter().map(Step::NftTable).collect()
}

fn nat(facts: &PodFacts, active: bool) -> NftTable {
    let older = facts.live && active;
    let is_proxys = format!("mark and {:#x} == {:#x}", MARK_PROXY.mask, MARK_PROXY.value);
    let not_proxys = is_proxys.replace("==", "!=");
    let each = |rule: String| in_each_family(facts, &rule);
    let mut inbound = Vec::new();
    if active {
        inbound.extend(
            facts
                .extent
                .virtual_interfaces
                .iter()
                .flat_map(|interface| {
                    let guests = format!("iifname \"{interface}\" meta l4proto tcp counter");
                    [
                        format!("{guests} redirect to :{OUTBOUND_PORT}"),
                        format!("{guests} return"),
                    ]
                }),
        );
    }
    if !facts.extent.bypass_inbound {
        inbound.extend(each(format!(
            "meta l4proto tcp ip saddr {PROBE_ADDRESS} counter accept"
        )));
    }
    let mut outbound = each(format!(
        "meta l4proto tcp ip daddr {PROBE_ADDRESS} counter accept"
    ));
    if active && !facts.extent.bypass_inbound {
        inbound.extend(each(format!(
            "ip daddr != 127.0.0.1/32 tcp dport != {HBONE_PORT} {not_proxys} counter redirect to :{INBOUND_PLAINTEXT_PORT}"
        )));
    }
    if facts.dns && active {
        outbound.push(format!(
            "oifname != lo {not_proxys} udp dport 53 counter redirect to :{DNS_PORT}"
        ));
        outbound.extend(each(format!(
            "ip daddr != 127.0.0.1/32 tcp dport 53 {not_proxys} counter redirect to :{DNS_PORT}"
        )));
    }
    outbound.push(format!(
        "meta l4proto tcp mark and {:#x} == {:#x} counter accept",
        MARK_RETURN.mask, MARK_RETURN.value
    ));
    outbound.extend(each(
        "oifname lo ip daddr != 127.0.0.1/32 counter accept".to_owned(),
    ));
    if active {
        outbound.extend(each(format!(
            "meta l4proto tcp ip daddr != 127.0.0.1/32 {not_proxys} counter redirect to :{OUTBOUND_PORT}"
        )));
    }
    let base = |hook: &str, chain: &str| {
        let mut rules = Vec::new();
        if older {
            rules.push(format!("jump {NFT_OLDER_CHAIN}"));
        }
        rules.push(format!("jump {chain}"));
        base(hook, "nat", hook, -100, rules)
    };
    let mut chains = vec![
        base("prerouting", NFT_PREROUTING_CHAIN),
        base("output", NFT_OUTPUT_CHAIN),
        chain(NFT_PREROUTING_CHAIN, inbound),
        chain(NFT_OUTPUT_CHAIN, outbound),
    ];
    if older {
        // As in iptables: a connection that connection tracking hears of in mid-stream does not begin.
        chains.push(chain(
            NFT_OLDER_CHAIN,
            vec![format!("{NOT_SYN} {not_proxys} counter accept")],
        ));
    }
    NftTable {
        name: NFT_NAT_TABLE.to_owned(),
        chains,
    }
}

/// A rule with an address: of a pod whose IPv6 is captured, that of IPv6 stands behind that of IPv4.
fn in_each_family(facts: &PodFacts, rule: &str) -> Vec<String> {
    let mut rules = vec![rule.to_owned()];
    if facts.captures_ipv6() {
        let of_ipv6 = rule.replace("ip saddr", "ip6 saddr");
        let of_ipv6 = of_ipv6.replace("ip daddr", "ip6 daddr");
        rules.push(ipv6::translated(&of_ipv6));
    }
    rules
}

fn mangle() -> NftTable {
    let (proxy, back) = (MARK_PROXY, MARK_RETURN);
    NftTable {
        name: NFT_MANGLE_TABLE.to_owned(),
        chains: vec![
            base(
                "prerouting",
                "filter",
                "prerouting",
                -150,
                vec![format!("jump {NFT_PREROUTING_CHAIN}")],
            ),
            base(
                "output",
                "route",
                "output",
                -150,
                vec![format!("jump {NFT_OUTPUT_CHAIN}")],
            ),
            chain(
                NFT_PREROUTING_CHAIN,
                vec![format!(
                    "meta mark & {:#x} == {:#x} counter ct mark set ct mark & {:#x} | {:#x}",
                    proxy.mask, proxy.value, !back.mask, back.value
                )],
            ),
            chain(
                NFT_OUTPUT_CHAIN,
                vec![format!(
                    "ct mark and {:#x} == {:#x} counter meta mark set ct mark",
                    back.mask, back.value
                )],
            ),
        ],
    }
}

/// See the chains of the same purpose in iptables.
fn raw() -> NftTable {
    let (mask, value) = (MARK_PROXY.mask, MARK_PROXY.value);
    NftTable {
        name: NFT_RAW_TABLE.to_owned(),
        chains: vec![
            base(
                "prerouting",
                "filter",
                "prerouting",
                -300,
                vec![format!("jump {NFT_PREROUTING_CHAIN}")],
            ),
            base(
                "output",
                "filter",
                "output",
                -300,
                vec![format!("jump {NFT_OUTPUT_CHAIN}")],
            ),
            chain(
                NFT_PREROUTING_CHAIN,
                vec![format!(
                    "udp sport 53 meta mark and {mask:#x} != {value:#x} counter ct zone set {DNS_ZONE}"
                )],
            ),
            chain(
                NFT_OUTPUT_CHAIN,
                vec![format!(
                    "udp dport 53 meta mark and {mask:#x} == {value:#x} counter ct zone set {DNS_ZONE}"
                )],
            ),
        ],
    }
}

/// What the guards of iptables do, and what keeps a pod without an IPv6 address off IPv6.
fn guards(facts: &PodFacts) -> NftTable {
    let (proxy, back) = (MARK_PROXY, MARK_RETURN);
    let not_proxys = format!("meta mark & {:#x} != {:#x}", proxy.mask, proxy.value);
    let not_back = format!("meta mark & {:#x} != {:#x}", back.mask, back.value);
    let mut inbound = Vec::new();
    let mut outbound = Vec::new();
    let mut forward = Vec::new();
    let each = |rule: String| in_each_family(facts, &rule);
    let guests = &facts.extent.virtual_interfaces;
    if facts.ipv6 && !facts.captures_ipv6() {
        inbound.push("meta nfproto ipv6 iifname != lo counter drop".to_owned());
        outbound.push("meta nfproto ipv6 oifname != lo counter drop".to_owned());
        forward.extend(
            guests
                .iter()
                .map(|interface| format!("meta nfproto ipv6 iifname \"{interface}\" counter drop")),
        );
    }
    if !facts.extent.bypass_inbound {
        inbound.extend(each(format!("ip saddr {PROBE_ADDRESS} counter return")));
    }
    inbound.extend(guests.iter().map(|interface| {
        format!("iifname \"{interface}\" tcp dport {OUTBOUND_PORT} counter return")
    }));
    inbound.push(match facts.extent.bypass_inbound {
        false => format!(
            "iifname != lo {IS_SYN} tcp dport != {{ {INBOUND_PLAINTEXT_PORT}, {HBONE_PORT} }} {not_back} counter drop"
        ),
        true => format!(
            "iifname != lo {IS_SYN} tcp dport {{ {OUTBOUND_PORT}, {INBOUND_PLAINTEXT_PORT} }} counter drop"
        ),
    });
    // The output device is the one before anything was redirected or led back.
    outbound.push(format!(
        "oifname != lo ct mark & {:#x} == {:#x} {not_back} counter drop",
        back.mask, back.value
    ));
    outbound.extend(each(format!("ip daddr {PROBE_ADDRESS} counter return")));
    outbound.extend(each(format!(
        "ip daddr != 127.0.0.0/8 oifname != lo {IS_SYN} {not_proxys} counter drop"
    )));
    for interface in guests {
        forward.push(format!("iifname \"{interface}\" {IS_SYN} counter drop"));
        if !facts.live {
            forward.push(format!(
                "iifname \"{interface}\" {NOT_SYN} ct state new counter drop"
            ));
        }
    }
    if !facts.live {
        outbound.push(format!(
            "oifname != lo {NOT_SYN} ct state new {not_proxys} counter drop"
        ));
    }
    let mut chains = vec![
        base("input", "filter", "input", 0, inbound),
        base("output", "filter", "output", 0, outbound),
    ];
    if !forward.is_empty() {
        chains.push(base("forward", "filter", "forward", 0, forward));
    }
    NftTable {
        name: NFT_GUARD_TABLE.to_owned(),
        chains,
    }
}

fn base(name: &str, kind: &str, hook: &str, priority: i32, rules: Vec<String>) -> NftChain {
    NftChain {
        base: Some(NftBase {
            kind: kind.to_owned(),
            hook: hook.to_owned(),
            priority,
        }),
        ..chain(name, rules)
    }
}

fn chain(name: &str, rules: Vec<String>) -> NftChain {
    NftChain {
        name: name.to_owned(),
        base: None,
        rules,
    }
}
