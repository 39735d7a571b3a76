//! What the kernel and its tools can do, each tried in a network namespace that exists only for that.

use std::fmt::Display;
use std::net::Ipv4Addr;

use host_net::ipset::Ipset;
use host_net::iptables::{Iptables, Variant, choose, usable};
use host_net::netlink::Netlink;
use host_net::netns::Netns;
use host_net::nft;
use host_net::plan::{
    Family, Link, MarkMatch, NftBase, NftChain, NftTable, OverlayKind, Rule, RuleAction, Set,
};

use super::super::facts::{Facts, Feature};

/// Name of everything that is made for a trial.
const NAME: &str = "trial";

/// A rule for each feature that is one of iptables: table, chain, rule.
const RULES: [(Feature, &str, &str, &str); 10] = [
    (
        Feature::Mark,
        "mangle",
        "PREROUTING",
        "-m mark --mark 0x1/0x1 -j MARK --set-xmark 0x1/0x1",
    ),
    (
        Feature::Connmark,
        "mangle",
        "PREROUTING",
        "-m connmark --mark 0x1/0x1 -j CONNMARK --save-mark",
    ),
    (
        Feature::Conntrack,
        "mangle",
        "PREROUTING",
        "-m conntrack --ctstate NEW -j RETURN",
    ),
    (
        Feature::SetMatch,
        "mangle",
        "PREROUTING",
        "-m set --match-set trial src -j RETURN",
    ),
    (
        Feature::Comment,
        "mangle",
        "PREROUTING",
        "-m comment --comment trial -j RETURN",
    ),
    (
        Feature::Tproxy,
        "mangle",
        "PREROUTING",
        "-p tcp -j TPROXY --on-port 1 --on-ip 127.0.0.1 --tproxy-mark 0x1/0x1",
    ),
    (
        Feature::Redirect,
        "nat",
        "PREROUTING",
        "-p tcp -j REDIRECT --to-ports 1",
    ),
    (
        Feature::Nat,
        "nat",
        "POSTROUTING",
        "-p tcp -j SNAT --to-source 192.0.2.1",
    ),
    (
        Feature::Nat,
        "nat",
        "PREROUTING",
        "-p udp -j DNAT --to-destination 192.0.2.1:1",
    ),
    (
        Feature::Owner,
        "nat",
        "POSTROUTING",
        "-p tcp -m owner --socket-exists -j RETURN",
    ),
];

/// Tries everything. `here` is only asked which implementation of iptables it uses.
pub(super) async fn run(here: &Netns, facts: &mut Facts) {
    let nowhere = match Netns::create_unnamed() {
        Ok(netns) => netns,
        Err(error) => {
            facts
                .features
                .insert(Feature::Netns, Some(error.to_string()));
            return;
        }
    };
    facts.features.insert(Feature::Netns, None);
    try_devices(&nowhere, facts).await;
    let set = Ipset::open(&nowhere).and_then(|ipset| {
        ipset.create(&Set {
            name: NAME.to_owned(),
            family: Family::V4,
            comments: true,
        })
    });
    tried(facts, Feature::IpsetHashIp, set);
    try_rules(here, &nowhere, facts);
    try_nftables(&nowhere, facts);
    let has_ipv6 = here.run(|| std::path::Path::new("/proc/sys/net/ipv6").exists());
    let without_ipv6 = !has_ipv6.unwrap_or(true);
    let why = without_ipv6.then(|| "there is no IPv6".to_owned());
    facts.features.insert(Feature::Ipv6, why);
}

async fn try_devices(nowhere: &Netns, facts: &mut Facts) {
    let netlink = match Netlink::connect(nowhere).await {
        Ok(netlink) => netlink,
        Err(error) => return super::note(facts, "devices", error),
    };
    for (feature, overlay) in [
        (Feature::Geneve, OverlayKind::Geneve),
        (Feature::Vxlan, OverlayKind::Vxlan),
    ] {
        let link = Link {
            name: format!("{NAME}-{overlay}"),
            overlay,
            vni: 1,
            remote: Ipv4Addr::new(192, 0, 2, 1),
            port: 6081,
            mtu: 1450,
        };
        tried(facts, feature, netlink.add_link(&link).await);
    }
    let rule = Rule {
        family: Family::V4,
        priority: 100,
        fwmark: Some(MarkMatch {
            value: 0x100,
            mask: 0x100,
        }),
        action: RuleAction::Lookup(100),
    };
    tried(facts, Feature::FwmarkRule, netlink.add_rule(&rule).await);
}

fn try_rules(here: &Netns, nowhere: &Netns, facts: &mut Facts) {
    // As the agent would choose; where it refuses to, the other one's word on the kernel is as good.
    let variant = choose(here, Family::V4)
        .ok()
        .into_iter()
        .chain(Variant::ALL)
        .find(|variant| usable(*variant, Family::V4).is_ok());
    let Some(variant) = variant else {
        return tried(facts, Feature::Iptables, usable(Variant::Nft, Family::V4));
    };
    facts.features.insert(Feature::Iptables, None);
    let iptables = Iptables::both(variant);
    for (feature, table, chain, rule) in RULES {
        let script = format!("*{table}\n-A {chain} {rule}\nCOMMIT\n");
        let outcome = iptables.restore(nowhere, Family::V4, &script);
        if !matches!(facts.features.get(&feature), Some(Some(_))) {
            tried(facts, feature, outcome);
        }
    }
    let mut ip6tables = Variant::ALL
        .into_iter()
        .map(|variant| usable(variant, Family::V6));
    let first = ip6tables.next().unwrap_or(Ok(()));
    let outcome = match first {
        Err(_) if ip6tables.any(|other| other.is_ok()) => Ok(()),
        first => first,
    };
    tried(facts, Feature::Ip6tables, outcome);
}

/// The table of the style `nftables` that redirects, in short.
fn try_nftables(nowhere: &Netns, facts: &mut Facts) {
    let chain = NftChain {
        name: "output".to_owned(),
        base: Some(NftBase {
            kind: "nat".to_owned(),
            hook: "output".to_owned(),
            priority: -100,
        }),
        rules: vec!["meta l4proto tcp counter redirect to :1".to_owned()],
    };
    let table = NftTable {
        name: NAME.to_owned(),
        chains: vec![chain],
    };
    tried(facts, Feature::Nftables, nft::apply(nowhere, &[table]));
}

fn tried<T, E: Display>(facts: &mut Facts, feature: Feature, outcome: Result<T, E>) {
    let why = outcome.err().map(|error| error.to_string());
    facts.features.insert(feature, why);
}
