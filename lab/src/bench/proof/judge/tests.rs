use std::net::SocketAddrV4;

use super::*;

const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 10);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 10);
const MARKER: &[u8] = b"a marker";

/// As many TLS records as the exchange takes.
fn tls() -> Vec<u8> {
    let mut stream = Vec::new();
    while stream.len() < EXCHANGE as usize {
        stream.extend([23, 3, 3, 0x40, 0]);
        stream.resize(stream.len() + 0x4000, 0xaa);
    }
    stream
}

/// The exchange, with the marker in it.
fn clear() -> Vec<u8> {
    let mut stream = MARKER.to_vec();
    stream.resize(EXCHANGE as usize, 0);
    stream
}

/// A connection to a port of the server with this payload both ways.
fn heard(port: u16, payload: &[u8]) -> Heard {
    let client = SocketAddrV4::new(CLIENT, 40000);
    let server = SocketAddrV4::new(SERVER, port);
    let mut capture = Capture::default();
    for (from, to) in [(client, server), (server, client)] {
        let flow = Flow { from, to };
        let volume = Volume {
            segments: CONNECTIONS + 10,
            syns: CONNECTIONS,
            payload: payload.len() as u64,
        };
        capture.volumes.insert(flow, volume);
        if !payload.is_empty() {
            capture.streams.insert(flow, payload.to_vec());
        }
    }
    Heard {
        capture,
        dropped: 0,
    }
}

fn observed(wires: Vec<(Wire, Heard)>) -> Observed {
    Observed {
        client: CLIENT,
        server: SERVER,
        marker: MARKER.to_vec(),
        failure: None,
        bytes: 2 * EXCHANGE,
        client_seen: Some(CLIENT.into()),
        istioin_ever: 0,
        wires: wires
            .into_iter()
            .map(|(wire, heard)| (wire, format!("{wire:?}"), heard))
            .collect(),
    }
}

/// What a correct lab of this variant looks like across nodes.
fn good(variant: &Variant) -> Observed {
    let mut wires = vec![match variant {
        Variant::None => (Wire::Uplink, heard(PROOF_PORT, &clear())),
        _ => (Wire::Uplink, heard(TUNNEL_PORT, &tls())),
    }];
    wires.push(match variant {
        Variant::Inpod => (Wire::ClientVeth, heard(TUNNEL_PORT, &tls())),
        _ => (Wire::ClientVeth, heard(PROOF_PORT, &clear())),
    });
    match variant {
        Variant::NodeTunnel => {
            wires.push((Wire::Istioout, heard(PROOF_PORT, &clear())));
            wires.push((Wire::Istioin, heard(TUNNEL_PORT, &tls())));
        }
        Variant::NodeHybrid | Variant::NodeDirect => {
            wires.push((Wire::Istioout, heard(PROOF_PORT, b"")));
            wires.push((Wire::Istioin, heard(TUNNEL_PORT, b"")));
        }
        // What a relay's wires look like is the matter of `relayed`.
        Variant::None | Variant::Relay | Variant::Inpod | Variant::External(_) => {}
    }
    observed(wires)
}

/// The claims that do not hold.
fn failed(variant: &Variant, observed: &Observed) -> Vec<String> {
    let proof = judge(variant, Path::CrossNode, observed);
    proof
        .failed()
        .map(|statement| statement.claim.clone())
        .collect()
}

/// Replaces what was heard on a wire.
fn with(mut observed: Observed, wire: Wire, heard: Heard) -> Observed {
    observed.wires.retain(|(other, _, _)| *other != wire);
    observed.wires.push((wire, format!("{wire:?}"), heard));
    observed
}

#[test]
fn each_variant_is_proven_by_its_own_picture_and_by_no_other() {
    for lab in Variant::DEFAULT {
        for judged in Variant::DEFAULT {
            let failed = failed(&judged, &good(&lab));
            assert_eq!(
                failed.is_empty(),
                lab == judged,
                "{lab} as {judged}: {failed:?}"
            );
        }
    }
}

#[test]
fn only_tls_on_15008_and_all_of_it_is_a_proof() {
    let inpod = |heard| {
        failed(
            &Variant::Inpod,
            &with(good(&Variant::Inpod), Wire::Uplink, heard),
        )
    };
    assert_eq!(
        inpod(heard(TUNNEL_PORT, &clear())),
        [
            "Uplink: the marker is never in the clear",
            "Uplink: port 15008 carries all, in TLS records only"
        ]
    );
    assert_eq!(
        inpod(heard(8080, &tls())),
        [
            "Uplink: port 15008 carries all, in TLS records only",
            "Uplink: no TCP payload outside port 15008"
        ]
    );
    for silent in [Heard::default(), heard(TUNNEL_PORT, &tls()[..1 << 20])] {
        assert_eq!(
            inpod(silent),
            ["Uplink: port 15008 carries all, in TLS records only"]
        );
    }
}

#[test]
fn a_capture_that_missed_packets_is_no_proof() {
    let mut dropped = heard(TUNNEL_PORT, &tls());
    dropped.dropped = 1;
    let mut gaps = heard(TUNNEL_PORT, &tls());
    gaps.capture.beyond_gaps = 1;
    for missed in [dropped, gaps] {
        let observed = with(good(&Variant::Inpod), Wire::Uplink, missed);
        assert_eq!(
            failed(&Variant::Inpod, &observed),
            ["Uplink: no packet was missed"]
        );
    }
}

#[test]
fn traffic_and_the_clients_address_are_judged() {
    let mut masqueraded = good(&Variant::NodeHybrid);
    masqueraded.client_seen = Some(Ipv4Addr::new(10, 244, 2, 1).into());
    assert_eq!(
        failed(&Variant::NodeHybrid, &masqueraded),
        ["the server sees the client's address 10.244.1.10"]
    );
    let mut broken = good(&Variant::NodeHybrid);
    broken.failure = Some("reset".to_owned());
    assert_eq!(
        failed(&Variant::NodeHybrid, &broken),
        ["traffic passes, every byte verified"]
    );
}

#[test]
fn one_way_of_a_tunnel_past_the_overlay_is_no_tunnel() {
    let mut half = heard(TUNNEL_PORT, &tls());
    for (flow, volume) in &mut half.capture.volumes {
        if flow.from.port() == TUNNEL_PORT {
            volume.payload /= 2;
        }
    }
    let observed = with(good(&Variant::NodeTunnel), Wire::Istioin, half);
    assert_eq!(
        failed(&Variant::NodeTunnel, &observed),
        ["at least 95 % of the payload through istioin on the server's node"]
    );
}

#[test]
fn a_share_of_nearly_nothing_is_no_proof() {
    for variant in [Variant::NodeHybrid, Variant::NodeTunnel] {
        let mut observed = good(&variant);
        for (wire, _, heard) in &mut observed.wires {
            if matches!(wire, Wire::Uplink | Wire::Istioin) {
                for volume in heard.capture.volumes.values_mut() {
                    volume.payload = volume.payload.min(78);
                }
            }
        }
        let failed = failed(&variant, &observed).join("; ");
        assert!(failed.contains("through istioin"), "{variant}: {failed}");
    }
}

#[test]
fn a_hybrid_connection_must_begin_in_the_overlay() {
    let claim = "the SYN, and at most 1 % of the payload, through istioin on the server's node";
    let mut observed = with(good(&Variant::NodeHybrid), Wire::Istioin, Heard::default());
    assert_eq!(failed(&Variant::NodeHybrid, &observed), [claim]);
    // A tunnel from before has no SYN to be seen; then packets must have passed at some time.
    for (wire, _, heard) in &mut observed.wires {
        if *wire == Wire::Uplink {
            heard
                .capture
                .volumes
                .values_mut()
                .for_each(|volume| volume.syns = 0);
        }
    }
    assert_eq!(failed(&Variant::NodeHybrid, &observed), [claim]);
    observed.istioin_ever = 1;
    assert!(failed(&Variant::NodeHybrid, &observed).is_empty());
}

#[test]
fn what_is_handed_over_in_the_proxy_is_on_no_wire_but_the_pods() {
    let direct = || {
        observed(vec![
            (Wire::ClientVeth, heard(PROOF_PORT, &clear())),
            (Wire::ServerVeth, heard(PROOF_PORT, &clear())),
            (Wire::ProxyLoopback, Heard::default()),
            (Wire::Uplink, Heard::default()),
            (Wire::Istioout, heard(PROOF_PORT, b"")),
        ])
    };
    let failed = |observed: &Observed| {
        judge(&Variant::NodeDirect, Path::SameNode, observed)
            .failed()
            .map(|statement| statement.claim.clone())
            .collect::<Vec<String>>()
    };
    assert_eq!(failed(&direct()), Vec::<String>::new());
    for wire in [Wire::ProxyLoopback, Wire::Uplink] {
        for payload in [clear(), tls()] {
            let observed = with(direct(), wire, heard(15088, &payload));
            let claim = format!("{wire:?}: no TCP payload at all, not even a tunnel's");
            assert_eq!(failed(&observed), [claim]);
        }
    }
    let observed = with(direct(), Wire::ServerVeth, Heard::default());
    assert_eq!(failed(&observed), ["ServerVeth: the marker is visible"]);
}
