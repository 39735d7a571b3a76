//! Rules of iptables, met by a packet at one hook.

use std::net::IpAddr;

use super::hop::{Change, Hop, Kind, RuleHit};
use super::packet::{End, Packet, Payload, Tracking, at};
use super::rule::{Match, Rule, Target};
use super::state::{State, Tables, family};
use super::world::{OwnRules, SocketEnd, shown};

/// Own chains that call each other are a mistake that iptables refuses; deeper nesting than this is not met.
const DEPTH: usize = 16;

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It goes on.
    Accept,
    /// It ends here.
    Drop,
}

/// How a chain was left.
enum Flow {
    Next,
    Return,
    End(Verdict),
}

/// Whether a condition holds.
enum Holds {
    Yes,
    No,
    Unknown(String),
}

/// A packet at a hook of a namespace.
pub(super) struct Hook<'a> {
    pub(super) place: &'a str,
    pub(super) state: &'a State,
    pub(super) sockets: &'a [SocketEnd],
    pub(super) own: &'a OwnRules,
    pub(super) tracking: &'a mut Tracking,
    pub(super) packet: &'a mut Packet,
    pub(super) input: Option<&'a str>,
    pub(super) output: Option<&'a str>,
    pub(super) hops: &'a mut Vec<Hop>,
    /// Set by rules of the table raw: the zone, or not tracked at all.
    pub(super) zone: Option<u16>,
    translation: Option<std::net::SocketAddr>,
}

impl<'a> Hook<'a> {
    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of a place, which are borrowed apart"
    )]
    pub(super) fn new(
        place: &'a str,
        state: &'a State,
        sockets: &'a [SocketEnd],
        own: &'a OwnRules,
        tracking: &'a mut Tracking,
        packet: &'a mut Packet,
        input: Option<&'a str>,
        output: Option<&'a str>,
        hops: &'a mut Vec<Hop>,
    ) -> Self {
        Self {
            place,
            state,
            sockets,
            own,
            tracking,
            packet,
            input,
            output,
            hops,
            zone: Some(0),
            translation: None,
        }
    }

    fn tables(&self) -> &'a Tables {
        &self.state.tables[family(self.packet.tuple.to.ip())]
    }

    /// Leads the packet through a built-in chain.
    pub(super) fn meet(&mut self, table: &str, chain: &str) -> Verdict {
        if self
            .tables()
            .get(table)
            .is_none_or(|chains| !chains.contains_key(chain))
        {
            return Verdict::Accept;
        }
        if let Flow::End(verdict) = self.chain(table, chain, 0) {
            return verdict;
        }
        let policy = self.tables()[table][chain].policy.as_deref();
        if policy != Some("DROP") {
            return Verdict::Accept;
        }
        let text = format!("the policy of {table} {chain} is DROP");
        self.note(Kind::Dropped, text, self.packet.mark, self.connmark(), None);
        Verdict::Drop
    }

    /// The table nat for one end, for a connection that begins; then what was decided for it.
    pub(super) fn translate(&mut self, chain: &str, end: End) -> Verdict {
        let Some(tracked) = self.packet.tracked else {
            return Verdict::Accept;
        };
        let mut by_rule = false;
        if !tracked.reply && self.tracking.entries[tracked.entry].is_open(end) {
            if self.meet("nat", chain) == Verdict::Drop {
                return Verdict::Drop;
            }
            let to = self.translation.take();
            by_rule = to.is_some();
            self.tracking.entries[tracked.entry].decide(end, to);
        }
        let before = self.packet.tuple;
        let after = self.tracking.entries[tracked.entry].translated(before, tracked.reply, end);
        self.packet.tuple = after;
        if by_rule {
            if let Some(hop) = self.hops.last_mut() {
                hop.packet = shown(after);
            }
        } else if before != after {
            let text = match end {
                End::Destination => format!("translated back: to {}", shown_end(after.to)),
                End::Source => format!("translated back: from {}", shown_end(after.from)),
            };
            self.note(
                Kind::Translated,
                text,
                self.packet.mark,
                self.connmark(),
                None,
            );
        }
        Verdict::Accept
    }

    pub(super) fn connmark(&self) -> u32 {
        self.tracking.mark(self.packet)
    }

    fn note(&mut self, kind: Kind, text: String, mark: u32, connmark: u32, rule: Option<RuleHit>) {
        self.hops.push(Hop {
            place: self.place.to_owned(),
            device: self.input.or(self.output).map(str::to_owned),
            kind,
            text,
            packet: shown(self.packet.tuple),
            mark: Change::of(mark, self.packet.mark),
            connmark: Change::of(connmark, self.connmark()),
            rule,
            route: None,
            detail: false,
            unknown: None,
            differs: None,
        });
    }

    fn chain(&mut self, table: &str, chain: &str, depth: usize) -> Flow {
        let Some(rules) = self
            .tables()
            .get(table)
            .and_then(|chains| chains.get(chain))
        else {
            return Flow::Next;
        };
        for (index, rule) in rules.rules.iter().enumerate() {
            let hit = |own: &OwnRules| RuleHit {
                table: table.to_owned(),
                chain: chain.to_owned(),
                position: index + 1,
                text: rule.text.clone(),
                foreign: !own.contains(table, chain, &rule.text),
            };
            match self.all_hold(rule) {
                Holds::No => continue,
                Holds::Unknown(what) => {
                    let hit = hit(self.own);
                    let text = format!("{table} {chain} #{}: cannot be told", index + 1);
                    self.note(
                        Kind::Rule,
                        text,
                        self.packet.mark,
                        self.connmark(),
                        Some(hit),
                    );
                    if let Some(hop) = self.hops.last_mut() {
                        hop.unknown = Some(what);
                    }
                    continue;
                }
                Holds::Yes => {}
            }
            if let Target::Chain(name) | Target::Goto(name) = &rule.target {
                let inside = if depth < DEPTH {
                    self.chain(table, name, depth + 1)
                } else {
                    Flow::Next
                };
                match inside {
                    Flow::End(verdict) => return Flow::End(verdict),
                    _ if matches!(rule.target, Target::Goto(_)) => return Flow::Return,
                    _ => continue,
                }
            }
            let hit = hit(self.own);
            match self.act(rule, hit) {
                Flow::Next => {}
                left => return left,
            }
        }
        Flow::Next
    }

    /// Does what a rule that matches says.
    fn act(&mut self, rule: &Rule, hit: RuleHit) -> Flow {
        let (mark, connmark) = (self.packet.mark, self.connmark());
        let text = format!("{} {} #{}", hit.table, hit.chain, hit.position);
        let mut flow = Flow::Next;
        let mut unknown = None;
        let mut kind = Kind::Rule;
        let mut detail = false;
        match &rule.target {
            Target::Accept => flow = Flow::End(Verdict::Accept),
            Target::Drop | Target::Reject => {
                (flow, kind) = (Flow::End(Verdict::Drop), Kind::Dropped);
            }
            Target::Return => (flow, detail) = (Flow::Return, true),
            Target::Mark(value) => self.packet.mark = value.applied(mark),
            Target::ConnectionMark(value) => {
                self.tracking.set_mark(self.packet, value.applied(connmark));
            }
            Target::SaveMark(packet, connection) => {
                let saved = (connmark & !connection) ^ (mark & packet);
                self.tracking.set_mark(self.packet, saved);
            }
            Target::RestoreMark(packet, connection) => {
                self.packet.mark = (mark & !packet) ^ (connmark & connection);
            }
            Target::Tproxy(port, value) => {
                flow = Flow::End(Verdict::Accept);
                if self.is_for_socket(false)
                    || self.state.listens(at(self.packet.tuple.to.ip(), *port))
                {
                    self.packet.mark = value.applied(mark);
                    self.packet.given_to = Some(*port);
                } else {
                    (flow, kind) = (Flow::End(Verdict::Drop), Kind::Dropped);
                    unknown = Some(format!("nobody listens on port {port}"));
                }
            }
            Target::Redirect(port) => {
                let ip = self.own_address();
                self.translation = Some(at(ip, *port));
                flow = Flow::End(Verdict::Accept);
            }
            Target::Dnat(to) => {
                self.translation = Some(to.of(self.packet.tuple.to));
                flow = Flow::End(Verdict::Accept);
            }
            Target::Snat(to) => {
                self.translation = Some(to.of(self.packet.tuple.from));
                flow = Flow::End(Verdict::Accept);
            }
            Target::Masquerade => {
                let like = self.packet.tuple.from;
                let ip = self
                    .output
                    .and_then(|dev| self.state.address_of(dev, like.ip()));
                self.translation = Some(at(ip.unwrap_or(like.ip()), like.port()));
                flow = Flow::End(Verdict::Accept);
            }
            Target::Zone(zone) => self.zone = Some(*zone),
            Target::Untracked => self.zone = None,
            Target::Nothing => detail = true,
            Target::Unknown(what) => unknown = Some(what.clone()),
            Target::Chain(_) | Target::Goto(_) => {}
        }
        self.note(kind, text, mark, connmark, Some(hit));
        if let Some(hop) = self.hops.last_mut() {
            hop.unknown = unknown;
            hop.detail = detail;
        }
        flow
    }

    /// Where REDIRECT leads: loopback for what is sent from here, the input device's address for what arrives.
    fn own_address(&self) -> IpAddr {
        let like = self.packet.tuple.to.ip();
        let loopback = if like.is_ipv4() {
            IpAddr::from([127, 0, 0, 1])
        } else {
            IpAddr::from(std::net::Ipv6Addr::LOCALHOST)
        };
        let arrived = self.input.and_then(|dev| self.state.address_of(dev, like));
        arrived.unwrap_or(loopback)
    }

    fn all_hold(&self, rule: &Rule) -> Holds {
        let mut unknown = None;
        for (negated, condition) in &rule.matches {
            match self.holds(condition) {
                Ok(holds) if holds != *negated => {}
                Ok(_) => return Holds::No,
                Err(what) => {
                    unknown.get_or_insert(what);
                }
            }
        }
        unknown.map_or(Holds::Yes, Holds::Unknown)
    }

    fn holds(&self, condition: &Match) -> Result<bool, String> {
        let Packet {
            tuple,
            payload,
            mark,
            ..
        } = &*self.packet;
        Ok(match condition {
            Match::In(name) => is_device(self.input, name),
            Match::Out(name) => is_device(self.output, name),
            Match::Source(net) => net.contains(&tuple.from.ip()),
            Match::Destination(net) => net.contains(&tuple.to.ip()),
            Match::Protocol(name) => name == payload.protocol() || name == "all",
            Match::SourcePorts(ports) => {
                ports.iter().any(|range| range.contains(&tuple.from.port()))
            }
            Match::DestinationPorts(ports) => {
                ports.iter().any(|range| range.contains(&tuple.to.port()))
            }
            Match::Flags(mask, set) => {
                let flags = payload.flags();
                let has = |flag: &String| flags.contains(&flag.as_str());
                *payload != Payload::Overlay
                    && mask.iter().all(|flag| has(flag) == set.contains(flag))
            }
            Match::Mark(masked) => masked.fits(*mark),
            Match::ConnectionMark(masked) => {
                self.packet.tracked.is_some() && masked.fits(self.connmark())
            }
            Match::Set(name, direction) => {
                let ip = match direction.as_str() {
                    "src" => tuple.from.ip(),
                    "dst" => tuple.to.ip(),
                    _ => return Err(format!("a set of more than addresses: {name} {direction}")),
                };
                match self.state.sets.get(name) {
                    Some(members) => members.contains(&ip),
                    None => return Err(format!("no set {name}")),
                }
            }
            Match::State(states) => {
                let state = self.tracking.state(self.packet);
                states.iter().any(|wanted| wanted == state)
            }
            Match::FromSocket => self.packet.from_socket,
            Match::ForTransparentSocket => self.is_for_socket(true),
            Match::AddressType(destination, name) => {
                let ip = if *destination {
                    tuple.to.ip()
                } else {
                    tuple.from.ip()
                };
                match name.as_str() {
                    "LOCAL" => self.state.owns(ip),
                    other => return Err(format!("addresses of type {other}")),
                }
            }
            Match::Unknown(what) => return Err(what.clone()),
        })
    }

    /// Whether an open connection of this namespace waits for the packet.
    fn is_for_socket(&self, transparent: bool) -> bool {
        self.sockets.iter().any(|socket| {
            socket.local == self.packet.tuple.to
                && socket.remote == self.packet.tuple.from
                && (socket.transparent || !transparent)
        })
    }
}

fn is_device(device: Option<&str>, wanted: &str) -> bool {
    let Some(device) = device else {
        return false;
    };
    match wanted.strip_suffix('+') {
        Some(prefix) => device.starts_with(prefix),
        None => device == wanted,
    }
}

fn shown_end(end: std::net::SocketAddr) -> String {
    super::world::end(end)
}
