#![allow(clippy::unwrap_used, clippy::expect_used)]

use host_net::commands::as_commands;

use super::*;

fn facts() -> PodFacts {
    PodFacts {
        uid: "1e054806-e667-4109-a5af-08b3e6ba0c42".to_owned(),
        addresses: vec!["10.244.1.5".parse().unwrap()],
        ipv6: true,
        dns: false,
        live: false,
        style: Style::Redirect,
        extent: Extent::default(),
    }
}

fn snapshot(name: &str, plan: &Plan) {
    let commands = as_commands(plan).join("\n");
    insta::assert_snapshot!(name, format!("# {}\n{commands}", plan.name));
}

/// IPv6 is captured as IPv4, rule for rule, and is not dropped then.
#[test]
fn ipv6_beside_ipv4() {
    let mut dual = facts();
    dual.addresses.push("fd00:10:244:1::5".parse().unwrap());
    for phase in [Phase::Active, Phase::Draining] {
        let (v4, both) = (pod(&facts(), phase), pod(&dual, phase));
        let of_v6 = |step: &&Step| match step {
            Step::Chain(chain) => chain.family == Family::V6,
            Step::Rule(rule) => rule.family == Family::V6,
            Step::Route(route) => route.dst.addr().is_ipv6(),
            _ => false,
        };
        let own: Vec<&Step> = both.steps.iter().filter(|step| !of_v6(step)).collect();
        let alone: Vec<&Step> = v4.steps.iter().filter(|step| !of_v6(step)).collect();
        assert_eq!(own, alone, "{phase:?}");
        assert_eq!(both.steps.iter().filter(of_v6).count(), own.len());
        let commands = as_commands(&both).join("\n");
        assert!(!commands.contains(V6_INPUT_CHAIN), "{commands}");
    }
    let mut only_v6 = pod(&dual, Phase::Active);
    only_v6.steps = ipv6::twins(&pod(&facts(), Phase::Active).steps);
    snapshot("pod_ipv6", &only_v6);
    assert_eq!(host_pod(&dual, Phase::Active).steps.len(), 2);
    let live = |style| PodFacts {
        style,
        live: true,
        dns: true,
        ..dual.clone()
    };
    let mut only_v6 = pod(&live(Style::Tproxy), Phase::Active);
    only_v6
        .steps
        .retain(|step| step.to_string().contains("ip6tables"));
    snapshot("pod_tproxy_ipv6", &only_v6);
    snapshot(
        "pod_nftables_ipv6",
        &pod(&live(Style::Nftables), Phase::Active),
    );
}

/// A gateway has its inbound traffic to itself, and guests of a pod are captured with it: in every style, by both families.
#[test]
fn a_pod_with_an_extent_of_its_own() {
    let with = |style, bypass_inbound, guests: &str, phase| {
        let facts = PodFacts {
            addresses: vec!["10.244.1.5".parse().unwrap(), "fd00::5".parse().unwrap()],
            style,
            extent: Extent::of(Some(bypass_inbound), Some(guests)),
            ..facts()
        };
        as_commands(&pod(&facts, phase)).join("\n")
    };
    for style in [Style::Redirect, Style::Tproxy, Style::Nftables] {
        for phase in [Phase::Active, Phase::Draining] {
            let gateway = with(style, true, "", phase);
            // What the guards have to do with it begins with "--dports 15001" or "dport { 15001".
            let to_15006 = gateway.matches("15006").count();
            let guards =
                gateway.matches("15001,15006").count() + gateway.matches("15001, 15006").count();
            assert_eq!(to_15006, guards, "{style:?} {phase:?}: {gateway}");
            for probes in ["-s 169.254.7.127", "saddr 169.254.7.127"] {
                assert!(!gateway.contains(probes), "{style:?} {phase:?}: {gateway}");
            }
        }
        // Nobody comes to the proxy's ports from outside, by either family.
        let gateway = with(style, true, "", Phase::Active);
        let guards = match style {
            Style::Nftables => {
                gateway
                    .matches("dport { 15001, 15006 } counter drop")
                    .count()
                    * 2
            }
            _ => gateway.matches("--dports 15001,15006 -j DROP").count(),
        };
        assert_eq!(guards, 2, "{style:?}: {gateway}");
        let taken = |commands: &str| {
            let rules = [
                "-i br0 -p tcp -j REDIRECT --to-ports 15001",
                "iifname \"br0\" meta l4proto tcp counter redirect to :15001",
            ];
            rules
                .iter()
                .map(|rule| commands.matches(rule).count())
                .sum::<usize>()
        };
        let families = if style == Style::Nftables { 1 } else { 2 };
        let guests = with(style, false, "br0,br1", Phase::Active);
        assert_eq!(taken(&guests), families, "{style:?}: {guests}");
        assert!(guests.contains("15006"), "{style:?}: {guests}");
        assert_eq!(taken(&with(style, false, "br0", Phase::Draining)), 0);
        assert_eq!(taken(&with(style, false, "", Phase::Active)), 0);
    }
    let whole = |style| PodFacts {
        style,
        live: true,
        extent: Extent::of(Some(true), Some("br0")),
        ..facts()
    };
    for (name, style) in [
        ("pod_extent_redirect", Style::Redirect),
        ("pod_extent_tproxy", Style::Tproxy),
        ("pod_extent_nftables", Style::Nftables),
    ] {
        snapshot(name, &pod(&whole(style), Phase::Active));
    }
    let guests = PodFacts {
        extent: Extent::of(None, Some("br0")),
        ..facts()
    };
    for (name, style) in [
        ("pod_guests_redirect", Style::Redirect),
        ("pod_guests_tproxy", Style::Tproxy),
        ("pod_guests_nftables", Style::Nftables),
    ] {
        let guests = PodFacts {
            style,
            ..guests.clone()
        };
        snapshot(name, &pod(&guests, Phase::Active));
    }
}

#[test]
fn pod_in_every_phase() {
    snapshot("pod_active", &pod(&facts(), Phase::Active));
    snapshot("pod_draining", &pod(&facts(), Phase::Draining));
    assert_eq!(pod(&facts(), Phase::Absent).steps, []);
}

#[test]
fn with_dns() {
    let facts = PodFacts {
        dns: true,
        ..facts()
    };
    snapshot("pod_dns_active", &pod(&facts, Phase::Active));
    snapshot("pod_dns_draining", &pod(&facts, Phase::Draining));
}

#[test]
fn tproxy_in_every_phase() {
    let facts = |live| PodFacts {
        style: Style::Tproxy,
        live,
        ..facts()
    };
    snapshot("pod_tproxy_active", &pod(&facts(false), Phase::Active));
    snapshot("pod_tproxy_live", &pod(&facts(true), Phase::Active));
    snapshot("pod_tproxy_draining", &pod(&facts(true), Phase::Draining));
}

#[test]
fn nftables_in_every_phase() {
    let facts = |live| PodFacts {
        style: Style::Nftables,
        dns: true,
        live,
        ..facts()
    };
    snapshot("pod_nftables_active", &pod(&facts(false), Phase::Active));
    snapshot("pod_nftables_live", &pod(&facts(true), Phase::Active));
    snapshot("pod_nftables_draining", &pod(&facts(true), Phase::Draining));
}

/// Between two writers there are the rules of both; between two styles of one writer there is nothing.
#[test]
fn between_two_writers() {
    let of = |style| {
        pod(
            &PodFacts {
                style,
                live: true,
                ..facts()
            },
            Phase::Active,
        )
    };
    let styles = [Style::Redirect, Style::Tproxy, Style::Nftables].map(of);
    for (from, to) in [(0, 1), (1, 0), (0, 0), (2, 2)] {
        assert_eq!(between(&styles[from], &styles[to]), None);
    }
    for (from, to) in [(0, 2), (1, 2), (2, 0), (2, 1)] {
        let both = between(&styles[from], &styles[to]).unwrap();
        for step in styles[from].steps.iter().chain(&styles[to].steps) {
            assert!(both.steps.contains(step), "{step}");
        }
    }
    let nothing = Plan::empty(styles[0].name.clone());
    assert_eq!(between(&nothing, &styles[2]), None);
}

/// A pod that ran before has the field's chains as they are, too; what it has in addition stands in chains of ours.
#[test]
fn older_connections_change_no_chain_of_the_field() {
    for style in [Style::Redirect, Style::Tproxy] {
        let field = |live| {
            let facts = PodFacts {
                style,
                live,
                ..facts()
            };
            let mut steps = pod(&facts, Phase::Active).steps;
            steps.retain(|step| matches!(step, Step::Chain(c) if c.name.starts_with("ISTIO_")));
            steps
        };
        assert_eq!(field(true), field(false), "{style:?}");
    }
}

/// Only what a pod that was captured before it ran goes on with, has lost its way to the proxy.
#[test]
fn a_running_pod_s_connections_go_on() {
    let lost = |live| {
        let facts = PodFacts { live, ..facts() };
        let commands = as_commands(&pod(&facts, Phase::Active));
        let rules = commands
            .iter()
            .filter(|rule| rule.contains("--ctstate NEW"));
        rules.count()
    };
    assert_eq!((lost(true), lost(false)), (0, 1));
}

#[test]
fn node() {
    snapshot("host", &host(true));
    snapshot("host_pod", &host_pod(&facts(), Phase::Active));
    for phase in [Phase::Draining, Phase::Absent] {
        assert_eq!(host_pod(&facts(), phase).steps, []);
    }
}

#[test]
fn without_ipv6_nothing_is_done_about_it() {
    let facts = PodFacts {
        ipv6: false,
        ..facts()
    };
    let commands = as_commands(&pod(&facts, Phase::Active));
    assert!(!commands.iter().any(|command| command.contains("ip6tables")));
}
