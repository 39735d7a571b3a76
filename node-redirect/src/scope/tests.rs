#![allow(clippy::unwrap_used, clippy::expect_used)]

use rstest::rstest;
use socket2::SockRef;

use super::*;

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn pod(uid: &str, ip: &str) -> LocalWorkload {
    LocalWorkload {
        uid: uid.into(),
        name: uid.into(),
        namespace: "alpha".into(),
        service_account: "web".into(),
        addresses: [address(ip)].into(),
    }
}

fn scope(flow: Flow, same_node: SameNode) -> NodeScope {
    let config = NodeScopeConfig {
        flow,
        same_node,
        local_addresses: vec![address("172.18.0.2")],
    };
    let scope = NodeScope::new(Netns::create_unnamed().unwrap(), config);
    scope.announce(pod("a", "10.244.1.4"));
    scope.announce(pod("c", "10.244.1.5"));
    scope
}

fn owner(scope: &NodeScope, role: Role, client: &str, dst: &str) -> Result<String, Refusal> {
    let client = ClientAddr(SocketAddr::new(address(client), 40000));
    let dst = OrigDstAddr(SocketAddr::new(address(dst), 80));
    Ok(scope.owner(role, client, dst)?.uid.to_string())
}

#[test]
fn outbound_belongs_to_the_source_and_inbound_to_the_destination() {
    let scope = scope(Flow::Hybrid, SameNode::Hbone);
    let (a, c, other) = ("10.244.1.4", "10.244.1.5", "10.244.9.9");
    assert_eq!(owner(&scope, Role::Outbound, a, c), Ok("a".to_owned()));
    assert_eq!(owner(&scope, Role::InboundHbone, a, c), Ok("c".to_owned()));
    assert_eq!(
        owner(&scope, Role::InboundPlaintext, a, c),
        Ok("c".to_owned())
    );
    let unknown = Err(Refusal::UnknownOwner(address(other)));
    assert_eq!(owner(&scope, Role::Outbound, other, a), unknown);
    assert_eq!(owner(&scope, Role::InboundHbone, a, other), unknown);
}

#[test]
fn a_reused_address_belongs_to_the_pod_announced_last() {
    let scope = scope(Flow::Hybrid, SameNode::Hbone);
    scope.announce(pod("successor", "10.244.1.4"));
    // The deletion of the one before arrives late and takes nothing from the successor.
    assert!(!scope.withdraw("a"));
    let found = owner(&scope, Role::Outbound, "10.244.1.4", "10.0.0.1");
    assert_eq!(found, Ok("successor".to_owned()));
    // Announced again with another address, the old one is nobody's.
    scope.announce(pod("successor", "10.244.1.7"));
    assert!(owner(&scope, Role::Outbound, "10.244.1.4", "10.0.0.1").is_err());
    assert!(scope.withdraw("successor"));
    assert!(owner(&scope, Role::Outbound, "10.244.1.7", "10.0.0.1").is_err());
}

#[rstest]
#[case(Flow::Hybrid, SameNode::Hbone, &[(15001, 0), (15006, 0), (15008, 0), (15088, 0x404), (15053, 0)])]
#[case(Flow::Tunnel, SameNode::Hbone, &[(15001, 0x401), (15006, 0x402), (15008, 0x402), (15088, 0x404), (15053, 0x401)])]
#[case(Flow::Tunnel, SameNode::Direct, &[(15001, 0x401), (15006, 0x402), (15008, 0x402), (15053, 0x401)])]
#[tokio::test]
async fn listeners_carry_the_mark_that_leads_answers_back(
    #[case] flow: Flow,
    #[case] same_node: SameNode,
    #[case] expected: &[(u16, u32)],
) {
    let scope = scope(flow, same_node);
    let mut found: [Vec<(u16, u32)>; 2] = [Vec::new(), Vec::new()];
    let mut listeners = Vec::new();
    for role in [
        Role::Outbound,
        Role::InboundPlaintext,
        Role::InboundHbone,
        Role::Dns,
        Role::Socks5,
    ] {
        listeners.extend(scope.listen(role).unwrap());
    }
    for listener in &listeners {
        let socket = listener.as_socket();
        assert!(socket.ip_transparent_v4().unwrap());
        let local = socket.local_addr().unwrap().as_socket().unwrap();
        found[usize::from(local.is_ipv6())].push((listener.port(), socket.mark().unwrap()));
    }
    assert_eq!(found, [expected, expected], "the same for both families");
    let error = scope.listen(Role::Outbound).unwrap_err().to_string();
    assert!(error.contains("0.0.0.0:15001"), "names the object: {error}");
}

/// Address and port that the socket is bound to, and its mark.
fn made(scope: &NodeScope, to: &str, who: OnBehalfOf) -> (SocketAddr, u32) {
    let socket = scope.socket(to.parse().unwrap(), who).unwrap();
    let mark = SockRef::from(&socket).mark().unwrap();
    (socket.local_addr().unwrap(), mark)
}

#[tokio::test]
async fn sockets_speak_with_the_address_they_are_made_for_from_the_reserved_ports() {
    let scope = scope(Flow::Hybrid, SameNode::Hbone);
    let client = OnBehalfOf::RemoteClient(address("10.244.2.4"));
    let workload = OnBehalfOf::LocalWorkload(address("10.244.1.4"));
    for (to, who, ip) in [
        ("10.244.1.4:8080", client, "10.244.2.4"),
        ("10.244.2.4:15008", workload, "10.244.1.4"),
    ] {
        let (bound, mark) = made(&scope, to, who);
        assert_eq!((bound.ip(), mark), (address(ip), 0));
        assert!(ports::NODE.contains(&bound.port()), "{bound}");
    }
}

#[rstest]
#[case::of_the_node("172.18.0.2", "10.244.1.4:8080")]
#[case::of_the_nodes_tunnel_end("192.168.126.1", "10.244.1.4:8080")]
#[case::of_the_destination("10.244.1.4", "10.244.1.4:8080")]
#[case::of_a_loopback("127.0.0.1", "10.244.1.4:8080")]
#[tokio::test]
async fn some_addresses_are_never_spoken_with(#[case] client: &str, #[case] to: &str) {
    let scope = scope(Flow::Hybrid, SameNode::Hbone);
    let (bound, _) = made(&scope, to, OnBehalfOf::RemoteClient(address(client)));
    assert_eq!(bound, "0.0.0.0:0".parse().unwrap());
}

#[tokio::test]
async fn a_tunnel_to_a_pod_of_this_node_is_looped_or_handed_over() {
    let who = OnBehalfOf::LocalWorkload(address("10.244.1.4"));
    let looping = scope(Flow::Hybrid, SameNode::Hbone);
    assert_eq!(made(&looping, "10.244.1.5:15008", who).1, 0x404);
    let (to_itself, mark) = made(&looping, "10.244.1.4:15008", who);
    assert_eq!((to_itself.ip(), mark), (address("10.244.1.4"), 0x404));
    assert_eq!(looping.hand_over(address("10.244.1.5")), None);
    // Not to a pod that is not captured here, not to another port, not for an application.
    assert_eq!(made(&looping, "10.244.1.9:15008", who).1, 0);
    assert_eq!(made(&looping, "10.244.1.5:8080", who).1, 0);
    let client = OnBehalfOf::RemoteClient(address("10.244.2.4"));
    assert_eq!(made(&looping, "10.244.1.5:15008", client).1, 0);

    let direct = scope(Flow::Hybrid, SameNode::Direct);
    assert_eq!(made(&direct, "10.244.1.5:15008", who).1, 0);
    let handed = direct.hand_over(address("10.244.1.5")).unwrap();
    assert_eq!(&*handed.uid, "c");
    assert_eq!(direct.hand_over(address("10.244.9.9")), None);
}

#[tokio::test]
async fn families_are_not_mixed() {
    let scope = scope(Flow::Hybrid, SameNode::Hbone);
    let who = OnBehalfOf::RemoteClient(address("fd00::7"));
    let error = scope.socket("10.244.1.4:80".parse().unwrap(), who);
    assert_eq!(error.unwrap_err().kind(), io::ErrorKind::InvalidInput);
}
