//! What is not TCP: datagrams and pings.

use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
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
        let client = bind(client, (Ipv4Addr::UNSPECIFIED, 0).into())?;
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
pub fn ping(client: &Netns, to: Ipv4Addr) -> Result<(), String> {
    let answered = client.run(|| echo(to));
    match answered.and_then(|answered| answered) {
        Ok(true) => Ok(()),
        Ok(false) => Err(format!("no answer within {ANSWERED_WITHIN:?}")),
        Err(error) => Err(error.to_string()),
    }
}

fn echo(to: Ipv4Addr) -> io::Result<bool> {
    const ID: [u8; 2] = [0x4d, 0x58];
    // Type, code, checksum, identifier, number.
    let mut request = [8, 0, 0, 0, ID[0], ID[1], 0, 0];
    let sum = !(0x0800 + u16::from_be_bytes(ID));
    request[2..4].copy_from_slice(&sum.to_be_bytes());
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
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
            // After a header of 20 bytes.
            if size >= 28 && packet[20] == 0 && packet[24..26] == ID {
                return Ok(true);
            }
        }
    }
    Ok(false)
}
