#![allow(clippy::unwrap_used, clippy::expect_used)]

use rstest::rstest;
use socket2::SockRef;

use super::*;

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn workload(addresses: &[&str]) -> LocalWorkload {
    LocalWorkload {
        uid: "uid-1".into(),
        name: "web-1".into(),
        namespace: "alpha".into(),
        service_account: "web".into(),
        addresses: addresses.iter().map(|ip| address(ip)).collect(),
    }
}

fn scope(netns: &Netns, addresses: &[&str]) -> InpodScope {
    let own = Netns::current().unwrap();
    InpodScope::new(netns.clone(), workload(addresses), &own).unwrap()
}

#[test]
fn the_proxys_own_namespace_is_no_pod() {
    let own = Netns::current().unwrap();
    let error = InpodScope::new(own.clone(), workload(&[]), &own).unwrap_err();
    assert!(error.to_string().contains("alpha/web-1"), "{error}");
}

#[rstest]
#[case::source(Role::Outbound, "10.244.1.4", "10.0.0.1", true)]
#[case::foreign_source(Role::Outbound, "10.244.1.5", "10.244.1.4", false)]
#[case::destination(Role::InboundHbone, "10.0.0.1", "10.244.1.4", true)]
#[case::foreign_destination(Role::InboundPlaintext, "10.244.1.4", "10.0.0.1", false)]
fn the_owner_is_fixed_but_the_address_must_be_its_own(
    #[case] role: Role,
    #[case] client: &str,
    #[case] dst: &str,
    #[case] own: bool,
) {
    let netns = Netns::create_unnamed().unwrap();
    let client = ClientAddr(SocketAddr::new(address(client), 40000));
    let dst = OrigDstAddr(SocketAddr::new(address(dst), 80));
    let known = scope(&netns, &["10.244.1.4"]).owner(role, client, dst);
    assert_eq!(known.is_ok(), own, "{known:?}");
    let untold = scope(&netns, &[]).owner(role, client, dst);
    assert_eq!(&*untold.unwrap().uid, "uid-1");
}

/// Who was led here from an interface of guests has gone somewhere; who has come by himself to this port, has not.
#[test]
fn guests_speak_with_addresses_of_their_own() {
    let netns = Netns::create_unnamed().unwrap();
    let scope = scope(&netns, &["10.244.1.4"]).with_guests(true);
    let ask = |role, client: &str, dst: &str| {
        let client = ClientAddr(SocketAddr::new(address(client), 40000));
        scope.owner(role, client, OrigDstAddr(dst.parse().unwrap()))
    };
    assert!(ask(Role::Outbound, "172.20.0.2", "10.96.0.1:80").is_ok());
    assert!(ask(Role::Outbound, "10.244.1.4", "10.96.0.1:80").is_ok());
    assert!(ask(Role::Outbound, "10.244.1.5", "10.244.1.4:15001").is_err());
    assert!(ask(Role::InboundPlaintext, "10.244.1.5", "10.0.0.1:80").is_err());
}

#[tokio::test]
async fn listeners_are_in_the_pod_marked_and_shared_with_a_second_proxy() {
    let netns = Netns::create_unnamed().unwrap();
    let (first, second) = (scope(&netns, &[]), scope(&netns, &[]));
    let mut ports = Vec::new();
    for role in [
        Role::Outbound,
        Role::InboundPlaintext,
        Role::InboundHbone,
        Role::Dns,
        Role::Socks5,
    ] {
        let listeners = first.listen(role).unwrap();
        let again = second.listen(role).unwrap();
        assert_eq!(listeners.len(), again.len());
        for listener in &listeners {
            let socket = listener.as_socket();
            assert_eq!(socket.mark().unwrap(), 0x539);
            assert!(socket.ip_transparent_v4().unwrap());
            let table = netns
                .run(|| std::fs::read_to_string("/proc/thread-self/net/tcp"))
                .unwrap()
                .unwrap();
            assert!(
                table.contains(&format!(":{:04X} ", listener.port())),
                "{table}"
            );
            ports.push(listener.port());
        }
    }
    let each = [15001, 15006, 15008, 15053, 15080];
    assert_eq!(
        ports,
        each.map(|port| [port; 2]).concat(),
        "in both families"
    );
}

/// What the socket is bound to.
fn bound(scope: &InpodScope, to: &str, who: OnBehalfOf) -> SocketAddr {
    let socket = scope.socket(to.parse().unwrap(), who).unwrap();
    assert_eq!(SockRef::from(&socket).mark().unwrap(), 0x539);
    socket.local_addr().unwrap()
}

#[tokio::test]
async fn only_a_remote_clients_address_is_put_on() {
    let netns = Netns::create_unnamed().unwrap();
    let scope = scope(&netns, &["10.244.1.4"]);
    let unbound: SocketAddr = "0.0.0.0:0".parse().unwrap();
    let own = OnBehalfOf::LocalWorkload(address("10.244.1.4"));
    assert_eq!(bound(&scope, "10.244.2.4:15008", own), unbound);
    let client = OnBehalfOf::RemoteClient(address("10.244.2.4"));
    let spoofed = bound(&scope, "10.244.1.4:8080", client);
    assert_eq!(spoofed.ip(), address("10.244.2.4"));
    assert!(ports::INPOD.contains(&spoofed.port()), "{spoofed}");
    let itself = OnBehalfOf::RemoteClient(address("10.244.1.4"));
    assert_eq!(bound(&scope, "10.244.1.4:8080", itself), unbound);
}
