//! What is not TCP: datagrams and pings.

use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use host_net::netns::Netns;
use socket2::{Domain, Protocol, Socket, Type};

/// How long an answer may take.
const ANSWERED_WITHIN: Duration = Duration::from_secs(20);
/// After this, a ping is sent again: the first one may wait for a neighbour.
const AGAIN_AFTER: Duration = Duration::from_secs(2);

/// Sends datagrams of `size` bytes from one namespace to a server at an address of another, and wants each back. The server
/// must see the client as it is, and must answer with the address that it was asked at.
///
/// # Errors
/// What went wrong.
pub fn datagrams(
    client: &Netns,
    server: &Netns,
    at: SocketAddr,
    seen: Option<IpAddr>,
    size: usize,
) -> Result<(), String> {
    let bind = |netns: &Netns, address: SocketAddr| -> io::Result<UdpSocket> {
        let socket = netns.run(|| UdpSocket::bind(address))??;
        socket.set_read_timeout(Some(ANSWERED_WITHIN))?;
        Ok(socket)
    };
    let exchange = || -> io::Result<()> {
        let server = bind(server, at)?;
        let at = SocketAddr::new(at.ip(), server.local_addr()?.port());
        let any = match at.ip() {
            IpAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let client = bind(client, (any, 0).into())?;
        client.connect(at)?;
        let mut buffer = vec![0; 65_536];
        for round in 0..3_u8 {
            let sent: Vec<u8> = (0..size).map(|i| (i % 251) as u8 ^ round).collect();
            client.send(&sent)?;
            let (length, source) = server.recv_from(&mut buffer)?;
            if buffer[..length] != sent {
                return Err(io::Error::other("not the bytes that were sent"));
            }
            let expected = seen.map(|ip| SocketAddr::new(ip, source.port()));
            if source != expected.unwrap_or(client.local_addr()?) {
                return Err(io::Error::other(format!("the server saw {source}")));
            }
            server.send_to(&sent, source)?;
            let length = client.recv(&mut buffer)?;
            if buffer[..length] != sent {
                return Err(io::Error::other("not the bytes that were sent back"));
            }
        }
        Ok(())
    };
    exchange().map_err(|error| error.to_string())
}

/// Sends an echo request until its answer comes.
///
/// # Errors
/// When none comes.
pub fn ping(client: &Netns, to: IpAddr) -> Result<(), String> {
    let answered = client.run(|| echo(to));
    match answered.and_then(|answered| answered) {
        Ok(true) => Ok(()),
        Ok(false) => Err(format!("no answer within {ANSWERED_WITHIN:?}")),
        Err(error) => Err(error.to_string()),
    }
}

fn echo(to: IpAddr) -> io::Result<bool> {
    const ID: [u8; 2] = [0x4d, 0x58];
    // Type, code, checksum, identifier, number.
    let mut request = [8, 0, 0, 0, ID[0], ID[1], 0, 0];
    // A raw IPv4 socket gets the header of IP, too: 20 bytes.
    let (domain, protocol, answer, header) = match to {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, 0, 20),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, 129, 0),
    };
    match to {
        IpAddr::V4(_) => {
            let sum = !(0x0800 + u16::from_be_bytes(ID));
            request[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        // The kernel fills in the checksum of ICMPv6.
        IpAddr::V6(_) => request[0] = 128,
    }
    let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    socket.connect(&SocketAddr::from((to, 0)).into())?;
    let deadline = Instant::now() + ANSWERED_WITHIN;
    let mut packet = [0; 256];
    while Instant::now() < deadline {
        socket.send(&request)?;
        let again = Instant::now() + AGAIN_AFTER;
        while Instant::now() < again {
            let Ok(size) = (&socket).read(&mut packet) else {
                continue;
            };
            let message = &packet[header..size.max(header)];
            if message.len() >= 8 && message[0] == answer && message[4..6] == ID {
                return Ok(true);
            }
        }
    }
    Ok(false)
}
