#![allow(clippy::unwrap_used, clippy::expect_used)]

use host_net::commands::as_commands;
use rstest::rstest;

use super::*;

fn host_facts() -> HostFacts {
    HostFacts {
        proxy_ip: Ipv4Addr::new(10, 244, 1, 2),
        proxy_veth: "veth5db63c11".to_owned(),
        host_ip: Ipv4Addr::new(10, 244, 1, 1),
        overlay: OverlayKind::Geneve,
        port: OVERLAY_PORT,
        mtu: 1450,
        main_has_default_route: true,
        ipv6: true,
        ends6: None,
        dns: false,
    }
}

fn proxy_facts() -> ProxyFacts {
    ProxyFacts {
        proxy_ip: Ipv4Addr::new(10, 244, 1, 2),
        host_ip: Ipv4Addr::new(10, 244, 1, 1),
        device: "eth0".to_owned(),
        overlay: OverlayKind::Geneve,
        port: OVERLAY_PORT,
        mtu: 1450,
        ends6: None,
        dns: false,
    }
}

fn pod_facts() -> PodFacts {
    PodFacts {
        uid: "0ff78312-3a13-4a02-b39d-644bfb91e861".to_owned(),
        addresses: vec!["10.244.1.5".parse().unwrap()],
        veth: "veth99".to_owned(),
        host_ip: Ipv4Addr::new(10, 244, 1, 1),
        ends6: None,
        main_has_default_route: true,
        live: true,
        ipv6: true,
        dns_exempt: false,
    }
}

fn snapshot(name: &str, plan: &Plan) {
    let commands = as_commands(plan).join("\n");
    insta::assert_snapshot!(name, format!("# {}\n{commands}", plan.name));
}

#[rstest]
fn host_and_proxy_in_both_flows(#[values(Flow::Hybrid, Flow::Tunnel)] flow: Flow) {
    snapshot(&format!("host_{flow}"), &host(&host_facts(), flow));
    snapshot(&format!("proxy_{flow}"), &proxy(&proxy_facts(), flow));
}

/// What the capture of DNS adds, and nothing else.
#[rstest]
fn dns_in_both_flows(#[values(Flow::Hybrid, Flow::Tunnel)] flow: Flow) {
    let commands = |dns| {
        let (mut on_host, mut in_proxy) = (host_facts(), proxy_facts());
        (on_host.dns, in_proxy.dns) = (dns, dns);
        [host(&on_host, flow), proxy(&in_proxy, flow)].map(|plan| as_commands(&plan))
    };
    let (without, with) = (commands(false), commands(true));
    let mut added = Vec::new();
    for (without, with) in without.iter().zip(&with) {
        added.extend(
            with.iter()
                .filter(|command| !without.contains(command))
                .cloned(),
        );
        assert!(without.iter().all(|command| with.contains(command)));
    }
    insta::assert_snapshot!("dns", added.join("\n"));
    let of_tunnel = |command: &&String| command.contains("-i pistioout -p tcp");
    let order: Vec<_> = with[1].iter().filter(of_tunnel).collect();
    assert!(order[0].contains("--on-port 15053"), "{order:?}");
}

/// An exempt pod is in the set where its queries would be led away: by UDP on the node, by TCP behind the tunnel.
#[test]
fn an_exempt_pod() {
    let facts = PodFacts {
        dns_exempt: true,
        ..pod_facts()
    };
    let member = format!("ipset add {DNS_EXEMPT_SET} 10.244.1.5");
    let has = |plan: &Plan| as_commands(plan).iter().any(|it| it.contains(&member));
    assert!(has(&pod(&facts, Phase::Active)) && has(&proxy_pod(&facts, Phase::Active)));
    assert!(!has(&pod(&pod_facts(), Phase::Active)));
    for phase in [Phase::Draining, Phase::Absent] {
        assert_eq!(proxy_pod(&facts, phase).steps, []);
    }
}

#[test]
fn pod_in_every_phase() {
    let plan = |phase| pod(&pod_facts(), phase);
    snapshot("pod_active", &plan(Phase::Active));
    snapshot("pod_draining", &plan(Phase::Draining));
    assert_eq!(plan(Phase::Absent).steps, []);
}

#[rstest]
fn older_connections_are_told_apart(#[values(Flow::Hybrid, Flow::Tunnel)] flow: Flow) {
    let commands = as_commands(&host(&host_facts(), flow));
    let skips = |what: &str| {
        let mut rules = commands.iter();
        rules.any(|rule| rule.contains(what) && rule.ends_with(&format!("--set-xmark {MARK_SKIP}")))
    };
    assert!(skips("--ctstate RELATED,ESTABLISHED"));
    for direction in ["src", "dst"] {
        assert!(skips(&format!("--match-set {LIVE_PODS_SET} {direction}")));
    }
}

fn ends6() -> Option<Ends6> {
    Some(Ends6 {
        proxy_ip: "fd00:10:244:1::2".parse().unwrap(),
        host_ip: "fd00:10:244:1::1".parse().unwrap(),
    })
}

/// What the capture of IPv6 adds; what is there without it stays as it is.
#[rstest]
fn ipv6_beside_ipv4(#[values(Flow::Hybrid, Flow::Tunnel)] flow: Flow) {
    let commands = |ends6| {
        let (mut on_host, mut in_proxy) = (host_facts(), proxy_facts());
        (on_host.ends6, in_proxy.ends6) = (ends6, ends6);
        (on_host.dns, in_proxy.dns) = (true, true);
        [host(&on_host, flow), proxy(&in_proxy, flow)].map(|plan| as_commands(&plan))
    };
    let mut added = Vec::new();
    for (without, with) in commands(None).iter().zip(&commands(ends6())) {
        let mut rest = with.iter();
        assert!(without.iter().all(|wanted| rest.any(|it| it == wanted)));
        let new = with.iter().filter(|command| !without.contains(command));
        added.extend(new.cloned());
    }
    insta::assert_snapshot!(format!("ipv6_{flow}"), added.join("\n"));
}

#[test]
fn a_pod_with_several_addresses() {
    let facts = PodFacts {
        addresses: ["10.244.1.5", "10.245.1.5", "fd00:10:244:1::5"]
            .map(|ip| ip.parse().unwrap())
            .to_vec(),
        ends6: ends6(),
        ..pod_facts()
    };
    snapshot("pod_several_addresses", &pod(&facts, Phase::Active));
    // Where IPv6 is not captured, that of the pod is dropped and all else is as without it.
    let without = PodFacts {
        ends6: None,
        ..facts.clone()
    };
    let commands = as_commands(&pod(&without, Phase::Active)).join("\n");
    assert!(
        commands.contains("ambidex-v6 -i veth99 -j DROP"),
        "{commands}"
    );
    assert!(!commands.contains("fd00"), "{commands}");
    assert!(commands.contains("10.245.1.5/32"), "{commands}");
}

#[test]
fn a_pod_captured_since_birth_is_not_in_the_live_set() {
    let facts = PodFacts {
        live: false,
        ..pod_facts()
    };
    let commands = as_commands(&pod(&facts, Phase::Active));
    assert!(
        !commands
            .iter()
            .any(|command| command.contains(LIVE_PODS_SET))
    );
}

#[test]
fn without_ipv6_nothing_is_done_about_it() {
    let host_plan = host(
        &HostFacts {
            ipv6: false,
            ..host_facts()
        },
        Flow::Hybrid,
    );
    let pod_plan = pod(
        &PodFacts {
            ipv6: false,
            ..pod_facts()
        },
        Phase::Active,
    );
    for plan in [host_plan, pod_plan] {
        let commands = as_commands(&plan);
        assert!(!commands.iter().any(|command| command.contains("ip6tables")));
    }
}

#[test]
fn without_a_default_route_the_filter_is_off() {
    let facts = HostFacts {
        main_has_default_route: false,
        ..host_facts()
    };
    for step in host(&facts, Flow::Tunnel).steps {
        if let Step::Sysctl(sysctl) = step {
            assert_eq!(sysctl.value, "0", "{}", sysctl.key);
        }
    }
}

#[test]
fn words_of_flows_are_read_back() {
    for flow in [Flow::Hybrid, Flow::Tunnel] {
        assert_eq!(flow.as_str().parse(), Ok(flow));
    }
    assert!("both".parse::<Flow>().is_err());
}
