#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener as StdListener, TcpStream as StdStream};
use std::sync::mpsc;

use super::*;

/// A server on loopback that lives as long as the test process.
fn server() -> SocketAddr {
    let (ready, address) = mpsc::channel();
    std::thread::spawn(move || {
        let options = ServerOptions {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            timeout_ms: 20_000,
        };
        serve(&options, |address| Ok(ready.send(address)?)).unwrap();
    });
    address.recv_timeout(Duration::from_secs(10)).unwrap()
}

fn outcome(to: SocketAddr, check: Check) -> Outcome {
    let TrafficCommand::Client(mut options) = TrafficCommand::client(to, check) else {
        unreachable!()
    };
    options.timeout_ms = 20_000;
    super::check(&options).unwrap()
}

fn all_checks() -> Vec<Check> {
    vec![
        Check::Who,
        Check::Marker { marker: None },
        Check::Exchange {
            up: 3_000_000,
            down: 2_000_001,
        },
        Check::Exchange { up: 0, down: 0 },
        Check::HalfClose { bytes: 100_000 },
        Check::PeerReset { after: 5000 },
        Check::OwnReset,
        Check::OneByteWrites {
            count: 3000,
            pause_ms: 100,
        },
        Check::Storm { connections: 100 },
    ]
}

#[test]
fn every_check_passes_against_the_server_itself() {
    let to = server();
    for check in all_checks() {
        let outcome = outcome(to, check);
        assert!(outcome.ok, "{outcome:?}");
    }
}

#[test]
fn who_reports_the_client_as_the_server_saw_it() {
    let outcome = outcome(server(), Check::Who);
    assert_eq!(outcome.seen, outcome.local);
    assert!(outcome.seen.is_some());
}

#[test]
fn a_check_may_say_from_which_port() {
    let to = server();
    // Above the ports that the kernel gives out by itself: nothing of this process gets one of these meanwhile.
    let (port, outcome) = (61_000..61_100)
        .find_map(|port| {
            let options = ClientOptions {
                to,
                timeout_ms: 10_000,
                from_port: Some(port),
                check: Check::Who,
            };
            super::check(&options).ok().map(|outcome| (port, outcome))
        })
        .expect("none of a hundred ports is free");
    assert_eq!(outcome.seen.map(|seen| seen.port()), Some(port));
}

#[test]
fn nobody_listening_is_refused_and_a_silent_server_is_a_timeout() {
    let silent = listener();
    let to = silent.local_addr().unwrap();
    let options = ClientOptions {
        to,
        timeout_ms: 200,
        from_port: None,
        check: Check::Who,
    };
    assert_eq!(super::check(&options).unwrap().saw, Some(Saw::Timeout));
    // Bound, so that nobody else gets the port, and not listening.
    let deaf = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    deaf.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())
        .unwrap();
    let nobody = deaf.local_addr().unwrap().as_socket().unwrap();
    let refused = outcome(nobody, Check::Who);
    assert_eq!((refused.ok, refused.saw), (false, Some(Saw::Refused)));
}

/// What a broken relay may do to a connection.
#[derive(Clone, Copy)]
enum Fault {
    /// One byte of the server's is another one.
    FlipDownward,
    /// One byte of the client's is another one.
    FlipUpward,
    /// The client's end of sending closes both directions.
    NoHalfClose,
    /// A reset of either side is passed on as an orderly end.
    ResetBecomesEnd,
}

fn listener() -> StdListener {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket
        .bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())
        .unwrap();
    socket.listen(128).unwrap();
    socket.into()
}

fn connect(to: SocketAddr) -> StdStream {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.connect(&to.into()).unwrap();
    socket.into()
}

/// A relay to `server` with a fault, to show that the checks find it.
fn faulty_relay(server: SocketAddr, fault: Fault) -> SocketAddr {
    let listener = listener();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        while let Ok((client, _)) = listener.accept() {
            let upstream = connect(server);
            let (client_again, upstream_again) =
                (client.try_clone().unwrap(), upstream.try_clone().unwrap());
            std::thread::spawn(move || {
                pump(client, upstream, matches!(fault, Fault::FlipUpward), fault)
            });
            std::thread::spawn(move || {
                pump(
                    upstream_again,
                    client_again,
                    matches!(fault, Fault::FlipDownward),
                    fault,
                )
            });
        }
    });
    address
}

/// Copies one direction. Flips one bit at an offset behind every request line.
fn pump(mut from: StdStream, mut to: StdStream, flip: bool, fault: Fault) {
    let mut buffer = [0; 4096];
    let mut offset = 0;
    loop {
        let got = match from.read(&mut buffer) {
            Ok(0) => 0,
            Ok(got) => got,
            Err(_) if matches!(fault, Fault::ResetBecomesEnd) => 0,
            Err(_) => {
                socket2::SockRef::from(&to)
                    .set_linger(Some(Duration::ZERO))
                    .unwrap();
                return;
            }
        };
        if got == 0 {
            let how = if matches!(fault, Fault::NoHalfClose) {
                std::net::Shutdown::Both
            } else {
                std::net::Shutdown::Write
            };
            let _ = to.shutdown(how);
            return;
        }
        if flip && (offset..offset + got).contains(&20_000) {
            buffer[20_000 - offset] ^= 1;
        }
        offset += got;
        if to.write_all(&buffer[..got]).is_err() {
            return;
        }
    }
}

#[test]
fn faults_on_the_way_are_found() {
    let server = server();
    let exchange = Check::Exchange {
        up: 50_000,
        down: 50_000,
    };
    let upward = outcome(faulty_relay(server, Fault::FlipUpward), exchange.clone());
    assert_eq!(
        (upward.ok, upward.saw),
        (false, Some(Saw::WrongData)),
        "{upward:?}"
    );
    let downward = outcome(faulty_relay(server, Fault::FlipDownward), exchange);
    assert_eq!(
        (downward.ok, downward.saw),
        (false, Some(Saw::WrongData)),
        "{downward:?}"
    );
    assert!(downward.error.unwrap().contains("offset 20000"));
    let half = outcome(
        faulty_relay(server, Fault::NoHalfClose),
        Check::HalfClose { bytes: 200_000 },
    );
    assert!(!half.ok, "{half:?}");
    for check in [Check::PeerReset { after: 100 }, Check::OwnReset] {
        let reset = outcome(faulty_relay(server, Fault::ResetBecomesEnd), check);
        assert_eq!((reset.ok, reset.saw), (false, Some(Saw::Eof)), "{reset:?}");
    }
}

#[test]
fn a_person_can_ask_with_a_bare_word() {
    let mut stream = connect(server());
    stream.write_all(b"who\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(
        answer.trim(),
        format!("\"{}\"", stream.local_addr().unwrap())
    );
    let mut stream = connect(stream.peer_addr().unwrap());
    stream.write_all(b"nonsense\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("nonsense"), "{answer}");
}

#[test]
fn commands_survive_the_command_line() {
    for check in all_checks() {
        let command = TrafficCommand::client("10.0.0.1:80".parse().unwrap(), check);
        assert_eq!(
            TrafficCommand::from_json(&command.to_json().unwrap()).unwrap(),
            command
        );
    }
    let short = r#"{"client":{"to":"10.0.0.1:80","check":"who"}}"#;
    let parsed = TrafficCommand::from_json(short).unwrap();
    assert_eq!(
        parsed,
        TrafficCommand::client("10.0.0.1:80".parse().unwrap(), Check::Who)
    );
    assert!(
        TrafficCommand::from_json(r#"{"client":{"to":"10.0.0.1:80","check":"what"}}"#).is_err()
    );
}
