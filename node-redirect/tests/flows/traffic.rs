//! What goes over the wires: an echo server that says whom it sees, its client, and pings.

use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// Greets each connection with the address it sees, then sends back what it gets.
pub async fn serve_echo(listener: TcpListener) {
    let mut connections = JoinSet::new();
    while let Ok((mut stream, peer)) = listener.accept().await {
        connections.spawn(async move {
            let greeting = format!("{}\n", peer.ip());
            if stream.write_all(greeting.as_bytes()).await.is_ok() {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            }
        });
    }
}

/// The client's end of a connection to an echo server.
pub struct Connection {
    pub stream: BufReader<TcpStream>,
}

impl Connection {
    /// Whom the server sees.
    pub async fn greeting(&mut self) -> io::Result<IpAddr> {
        let mut line = String::new();
        self.stream.read_line(&mut line).await?;
        line.trim_end().parse().map_err(io::Error::other)
    }

    /// Sends `size` bytes and gets the same back.
    pub async fn echo(&mut self, size: usize) -> io::Result<()> {
        let sent: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
        let mut received = vec![0; size];
        let (read, write) = tokio::io::split(&mut self.stream);
        let (mut read, mut write) = (read, write);
        tokio::try_join!(write.write_all(&sent), read.read_exact(&mut received))?;
        if sent == received {
            Ok(())
        } else {
            Err(io::Error::other("not the bytes that were sent"))
        }
    }
}

const PING_ID: [u8; 2] = [0x4e, 0x52];

/// One echo request from the calling thread's namespace; whether its answer came within a second.
pub fn ping_once(to: IpAddr) -> io::Result<bool> {
    // Type, code, checksum, identifier, number.
    let mut request = [0; 8];
    request[4..6].copy_from_slice(&PING_ID);
    let (domain, protocol, answer) = match to {
        IpAddr::V4(_) => {
            request[0] = 8;
            let sum = !(0x0800 + u16::from_be_bytes(PING_ID));
            request[2..4].copy_from_slice(&sum.to_be_bytes());
            (Domain::IPV4, Protocol::ICMPV4, 0)
        }
        // The kernel fills in the checksum of ICMPv6.
        IpAddr::V6(_) => {
            request[0] = 128;
            (Domain::IPV6, Protocol::ICMPV6, 129)
        }
    };
    let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    socket.connect(&SocketAddr::new(to, 0).into())?;
    socket.send(&request)?;
    let deadline = Instant::now() + Duration::from_secs(1);
    let mut packet = [0; 256];
    while Instant::now() < deadline {
        let Ok(size) = (&socket).read(&mut packet) else {
            continue;
        };
        // A raw IPv4 socket gets the IP header too.
        let message = &packet[if to.is_ipv4() { 20 } else { 0 }..size];
        if message[0] == answer && message[4..6] == PING_ID {
            return Ok(true);
        }
    }
    Ok(false)
}
