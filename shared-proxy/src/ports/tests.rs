#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use proptest::prelude::*;
use socket2::{Domain, Type};

use super::*;

fn tcp() -> Socket {
    Socket::new(Domain::IPV4, Type::STREAM, None).unwrap()
}

fn destination() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 9], 9))
}

/// Every port of the range without the left-out ones, each exactly once per round.
fn one_round(range: RangeInclusive<u16>) {
    let ports = SourcePorts::new(range.clone());
    let expected: BTreeSet<u16> = range.filter(|port| !LEFT_OUT.contains(port)).collect();
    let seen: BTreeSet<u16> = (0..ports.usable).map(|count| ports.port(count)).collect();
    assert_eq!(seen, expected);
    assert_eq!(ports.usable as usize, expected.len());
}

#[test]
fn a_round_is_the_range_without_the_left_out_ports() {
    for start in 14_990..15_110 {
        for length in [1, 2, 9, 10, 11, 99, 100, 101, 250] {
            let range = start..=start + length;
            if range.clone().any(|port| !LEFT_OUT.contains(&port)) {
                one_round(range);
            }
        }
    }
    one_round(NODE);
    one_round(INPOD);
}

proptest! {
    #[test]
    fn any_range_is_covered(start in 1u16..60_000, length in 0u16..500) {
        let range = start..=start + length;
        prop_assume!(range.clone().any(|port| !LEFT_OUT.contains(&port)));
        one_round(range);
    }
}

#[test]
fn consecutive_binds_take_different_ports_of_the_range() {
    let range = 14_995..=15_104;
    let ports = SourcePorts::new(range);
    let source = IpAddr::V4(Ipv4Addr::new(127, 0, 97, 1));
    let sockets: Vec<(Socket, u16)> = (0..10)
        .map(|_| {
            let socket = tcp();
            let port = ports.bind(&socket, source, destination()).unwrap();
            (socket, port)
        })
        .collect();
    let seen: BTreeSet<u16> = sockets.iter().map(|(_, port)| *port).collect();
    let expected: BTreeSet<u16> = (14_995..15_000).chain(15_100..15_105).collect();
    assert_eq!(seen, expected);
    for (socket, port) in &sockets {
        let local = socket.local_addr().unwrap().as_socket().unwrap();
        assert_eq!(local, SocketAddr::new(source, *port));
    }
}

#[test]
fn a_port_that_is_taken_is_passed_over() {
    let source = IpAddr::V4(Ipv4Addr::new(127, 0, 97, 2));
    let taken = tcp();
    taken.bind(&SocketAddr::new(source, 20_501).into()).unwrap();
    let ports = SourcePorts::new(20_500..=20_502);
    let mut seen = BTreeSet::new();
    for _ in 0..6 {
        let socket = tcp();
        seen.insert(ports.bind(&socket, source, destination()).unwrap());
    }
    assert_eq!(seen, BTreeSet::from([20_500, 20_502]));
}

#[test]
fn a_range_that_is_all_taken_says_so() {
    let source = IpAddr::V4(Ipv4Addr::new(127, 0, 97, 3));
    let taken = tcp();
    taken.bind(&SocketAddr::new(source, 20_600).into()).unwrap();
    let error = SourcePorts::new(20_600..=20_600)
        .bind(&tcp(), source, destination())
        .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    assert!(error.to_string().contains("127.0.97.3"), "{error}");
}

#[test]
fn an_address_that_is_not_local_is_an_error_at_once() {
    let ports = SourcePorts::new(NODE);
    let error = ports
        .bind(
            &tcp(),
            IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
            destination(),
        )
        .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrNotAvailable);
}
