//! A packet on its way, and what a namespace remembers of its connection.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// Both ends of a packet, sender first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tuple {
    /// Sender.
    pub from: SocketAddr,
    /// Receiver.
    pub to: SocketAddr,
}

impl Tuple {
    /// The other direction.
    pub fn reversed(self) -> Self {
        Self {
            from: self.to,
            to: self.from,
        }
    }
}

impl fmt::Display for Tuple {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} > {}", self.from, self.to)
    }
}

/// What a packet carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payload {
    /// TCP that begins a connection.
    Syn,
    /// TCP that answers a SYN.
    SynAck,
    /// TCP in an open connection.
    Data,
    /// The outer packet of an overlay: UDP.
    Overlay,
}

impl Payload {
    /// Name of the transport as iptables has it.
    pub fn protocol(self) -> &'static str {
        match self {
            Payload::Overlay => "udp",
            _ => "tcp",
        }
    }

    /// TCP flags by their names.
    pub fn flags(self) -> &'static [&'static str] {
        match self {
            Payload::Syn => &["SYN"],
            Payload::SynAck => &["SYN", "ACK"],
            Payload::Data => &["ACK", "PSH"],
            Payload::Overlay => &[],
        }
    }
}

/// A packet inside one namespace.
#[derive(Debug, Clone)]
pub struct Packet {
    /// Its ends as they stand in its header.
    pub tuple: Tuple,
    /// What it carries.
    pub payload: Payload,
    /// Its mark.
    pub mark: u32,
    /// Its entry in connection tracking, once it was looked up in this namespace.
    pub tracked: Option<Tracked>,
    /// The port of the proxy that TPROXY gave it to.
    pub given_to: Option<u16>,
    /// Whether a socket of this namespace sent it.
    pub from_socket: bool,
    /// What an outer packet of an overlay carries, and the network identifier that it carries it under.
    pub inner: Option<(Box<Packet>, u32)>,
}

impl Packet {
    /// As a socket sends it.
    pub fn new(tuple: Tuple, payload: Payload, mark: u32) -> Self {
        Self {
            tuple,
            payload,
            mark,
            tracked: None,
            given_to: None,
            from_socket: true,
            inner: None,
        }
    }

    /// As it arrives in another namespace: the kernel clears what belongs to the one that it leaves.
    pub fn crossed(mut self) -> Self {
        self.mark = 0;
        self.tracked = None;
        self.given_to = None;
        self.from_socket = false;
        self
    }
}

/// Where a packet stands in connection tracking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tracked {
    /// Index of the entry.
    pub entry: usize,
    /// Whether it goes against the direction of the first packet.
    pub reply: bool,
}

/// What a namespace remembers of a connection.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The first packet, as it was before any translation.
    pub original: Tuple,
    /// What an answer looks like when it comes.
    pub expected: Tuple,
    /// UDP and TCP are told apart.
    pub protocol: &'static str,
    /// Tracked apart from others.
    pub zone: u16,
    /// The connection's mark.
    pub mark: u32,
    /// Whether an answer was seen.
    pub answered: bool,
    /// Whether translation of the destination has been decided.
    pub destination_done: bool,
    /// Whether translation of the source has been decided.
    pub source_done: bool,
}

/// Connection tracking of one namespace, as far as the packets that were followed filled it.
#[derive(Debug, Clone, Default)]
pub struct Tracking {
    /// All entries.
    pub entries: Vec<Entry>,
}

impl Tracking {
    /// Finds the entry of a packet, or makes it.
    pub fn look_up(&mut self, packet: &Packet, zone: u16) -> Tracked {
        let protocol = packet.payload.protocol();
        let found = self.entries.iter().position(|entry| {
            entry.protocol == protocol
                && entry.zone == zone
                && (entry.original == packet.tuple || entry.expected == packet.tuple)
        });
        let Some(entry) = found else {
            self.entries.push(Entry {
                original: packet.tuple,
                expected: packet.tuple.reversed(),
                protocol,
                zone,
                mark: 0,
                answered: false,
                destination_done: false,
                source_done: false,
            });
            return Tracked {
                entry: self.entries.len() - 1,
                reply: false,
            };
        };
        let reply = self.entries[entry].original != packet.tuple;
        if reply {
            self.entries[entry].answered = true;
        }
        Tracked { entry, reply }
    }

    /// The entry of a packet.
    pub fn of(&self, packet: &Packet) -> Option<&Entry> {
        self.entries.get(packet.tracked?.entry)
    }

    /// The mark of a packet's connection; 0 when it has none.
    pub fn mark(&self, packet: &Packet) -> u32 {
        self.of(packet).map_or(0, |entry| entry.mark)
    }

    /// Changes the mark of a packet's connection.
    pub fn set_mark(&mut self, packet: &Packet, mark: u32) {
        if let Some(tracked) = packet.tracked
            && let Some(entry) = self.entries.get_mut(tracked.entry)
        {
            entry.mark = mark;
        }
    }

    /// `NEW`, `ESTABLISHED` or `UNTRACKED`. A packet that no first packet was followed for is in none of the connections
    /// that are told of here.
    pub fn state(&self, packet: &Packet) -> &'static str {
        match self.of(packet) {
            None => "UNTRACKED",
            Some(entry) if entry.answered => "ESTABLISHED",
            Some(_) => "NEW",
        }
    }
}

/// Which end of a packet is translated, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Before routing.
    Destination,
    /// After it.
    Source,
}

impl Entry {
    /// Whether this end is still to be decided by the rules of the table nat.
    pub fn is_open(&self, end: End) -> bool {
        !self.answered
            && match end {
                End::Destination => !self.destination_done,
                End::Source => !self.source_done,
            }
    }

    /// Notes that an end is decided, as translated to `to` or as it is.
    pub fn decide(&mut self, end: End, to: Option<SocketAddr>) {
        match end {
            End::Destination => {
                self.destination_done = true;
                self.expected.from = to.unwrap_or(self.expected.from);
            }
            End::Source => {
                self.source_done = true;
                self.expected.to = to.unwrap_or(self.expected.to);
            }
        }
    }

    /// A packet of this connection with one end as it has to be after this place.
    pub fn translated(&self, mut tuple: Tuple, reply: bool, end: End) -> Tuple {
        match (end, reply) {
            (End::Destination, false) => tuple.to = self.expected.from,
            (End::Destination, true) => tuple.to = self.original.from,
            (End::Source, false) => tuple.from = self.expected.to,
            (End::Source, true) => tuple.from = self.original.to,
        }
        tuple
    }
}

/// An address with another port.
pub fn at(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}
